/* Attention with rotary positions, grouped heads and, in some families, norms of queries and keys,
 * of each head (Qwen3) or over all of them (OLMo 2), and clamped queries, keys and values (OLMo):
 *
 *   mid += O(attention(rope(clamp(norm(Q n1))), rope(clamp(norm(K n1))), clamp(V n1))) */
#include <math.h>

#include "estimators/model/part.h"
#include "io/format/convert.h"

static float scale_of(const struct perta_layer *l)
{
    const struct perta_llm *llm = l->llm;
    float scale =
        llm->attention_scale > 0 ? llm->attention_scale : 1.0f / sqrtf((float)llm->head_dim);
    return llm->scale_by_number ? scale / (float)(l->site.layer + 1) : scale;
}

struct perta_attention perta_layer_attention(const struct perta_layer *l,
                                             const struct perta_batch *batch)
{
    const struct perta_llm *llm = l->llm;
    bool chunks = perta_llm_has(llm, l->site.layer, PERTA_LAYER_CHUNKS);
    return (struct perta_attention){
        .sequences = batch->sequences,
        .places = batch->places,
        .n_heads = llm->n_heads,
        .n_kv_heads = llm->n_kv_heads,
        .D = llm->head_dim,
        .V = llm->value_dim,
        .window = perta_llm_window(llm, l->site.layer),
        .chunk = chunks ? llm->chunk : 0,
        .scale = scale_of(l),
        .softcap = llm->attention_softcap,
        .slopes = llm->alibi ? l->slopes : NULL,
        .slopes_bf16 = llm->alibi_bf16,
        .sinks = perta_layer_vector(l, PERTA_SINKS),
    };
}

/* ---- ALiBi ---- */

/* 2^(-8 / n) for a power of 2, n. */
static float slope_base(uint32_t n)
{
    return (float)exp2(-exp2(3 - log2(n)));
}

void perta_llm_alibi_slopes(const struct perta_llm *llm, float *slopes)
{
    uint32_t power = 1;
    while (power <= llm->n_heads / 2)
        power *= 2;
    for (uint32_t i = 0; i < llm->n_heads; i++) {
        bool extra = i >= power;
        float slope = powf(slope_base(extra ? 2 * power : power),
                           (float)(extra ? 2 * (i - power) + 1 : i + 1));
        slopes[i] = llm->alibi_bf16 ? perta_f32_from_bf16(perta_bf16_from_f32(slope)) : slope;
    }
}

/* ---- clamped ---- */

/* Clamp x (n, width) to llm->clip_qkv, if that is set; free keeps what it was. */
static void clamp_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          struct perta_array x, struct perta_array free, size_t width)
{
    if (!(l->llm->clip_qkv > 0))
        return;
    l->be->ops->copy(l->be, free, x, batch->n * width);
    l->be->ops->clamp_forward(l->be, x, l->llm->clip_qkv, batch->n * width);
}

static void clamp_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           struct perta_array d, struct perta_array free, size_t width)
{
    if (l->llm->clip_qkv > 0)
        l->be->ops->clamp_backward(l->be, d, free, l->llm->clip_qkv, batch->n * width);
}

/* ---- queries and keys: norm and rotary position ---- */

struct perta_rotation perta_layer_rotation(const struct perta_layer *l, size_t first)
{
    return perta_llm_rotation(l->llm, l->site.layer, l->inv_freq, first);
}

static void rotate_forward(const struct perta_layer *l, const struct perta_batch *batch,
                           struct perta_array x, size_t n_heads)
{
    const struct perta_rotation rotation = perta_layer_rotation(l, 0);
    if (!perta_llm_has(l->llm, l->site.layer, PERTA_LAYER_UNROTATED))
        l->be->ops->rope_forward(l->be, x, batch->places, &rotation, batch->n, n_heads,
                                 l->llm->head_dim);
}

static void rotate_backward(const struct perta_layer *l, const struct perta_batch *batch,
                            struct perta_array d, size_t n_heads)
{
    const struct perta_rotation rotation = perta_layer_rotation(l, 0);
    if (!perta_llm_has(l->llm, l->site.layer, PERTA_LAYER_UNROTATED))
        l->be->ops->rope_backward(l->be, d, batch->places, &rotation, batch->n, n_heads,
                                  l->llm->head_dim);
}

/* The width of a norm of queries or keys: of a head, or of all of them. 0: there is none. */
static size_t norm_width(const struct perta_layer *l, enum perta_param param)
{
    const struct perta_param_row *row = perta_llm_param(l->llm, l->site.layer, param);
    if (!row)
        return perta_llm_has(l->llm, l->site.layer, PERTA_LAYER_QK_NORM) ? l->llm->head_dim : 0;
    return perta_llm_norm_width(l->llm, row);
}

/* Queries (PERTA_NORM_Q) or keys (PERTA_NORM_K), and what is kept for the backward pass. */
struct heads {
    enum perta_param norm;
    struct perta_array x, d; /* (n, n_heads, D): themselves, their gradient */
    struct perta_array raw, rstd, free;
    size_t n_heads;
};

static struct heads queries_of(const struct perta_layer *l, const struct perta_acts *a)
{
    return (struct heads){PERTA_NORM_Q, a->q,      a->dq,          a->q_raw,
                          a->rstd_q,    a->q_free, l->llm->n_heads};
}

static struct heads keys_of(const struct perta_layer *l, const struct perta_acts *a)
{
    return (struct heads){PERTA_NORM_K,      a->k, a->dk, a->k_raw, a->rstd_k, a->k_free,
                          l->llm->n_kv_heads};
}

/* Normalise and clamp x, and rotate each head by its position, in the order that the model says. */
static void place_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct heads *h)
{
    enum perta_param param = h->norm;
    struct perta_array x = h->x, raw = h->raw, rstd = h->rstd;
    size_t n_heads = h->n_heads;
    size_t width = n_heads * l->llm->head_dim, H = norm_width(l, param);
    bool first = l->llm->qk_norm_after_rope;
    if (first)
        rotate_forward(l, batch, x, n_heads);
    if (H) {
        struct perta_norm norm = perta_layer_norm(l, param);
        l->be->ops->copy(l->be, raw, x, batch->n * width);
        l->llm->family->norm->forward(l->be, &norm, x, rstd, raw, batch->n * (width / H), H);
    }
    clamp_forward(l, batch, x, h->free, width);
    if (!first)
        rotate_forward(l, batch, x, n_heads);
}

static void norm_backward(const struct perta_layer *l, const struct perta_batch *batch,
                          enum perta_param param, struct perta_array d, struct perta_array raw,
                          struct perta_array rstd, size_t width, struct perta_array spare,
                          struct perta_array vector)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t H = norm_width(l, param);
    if (!H)
        return;
    struct perta_norm norm = perta_layer_norm(l, param);
    perta_layer_norm_gradient(l, batch, param, d, raw, rstd, width / H, H, vector);
    ops->zero(l->be, spare, batch->n * width);
    l->llm->family->norm->backward(l->be, &norm, spare, d, raw, rstd, batch->n * (width / H), H);
    ops->copy(l->be, d, spare, batch->n * width);
}

/* Replace d, the gradient of the result, by that of the input. spare: scratch of the same size. */
static void place_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct heads *h, struct perta_array spare,
                           struct perta_array vector)
{
    bool first = l->llm->qk_norm_after_rope;
    size_t width = h->n_heads * l->llm->head_dim;
    if (!first)
        rotate_backward(l, batch, h->d, h->n_heads);
    clamp_backward(l, batch, h->d, h->free, width);
    norm_backward(l, batch, h->norm, h->d, h->raw, h->rstd, width, spare, vector);
    if (first)
        rotate_backward(l, batch, h->d, h->n_heads);
}

/* What the query at a place is multiplied by. */
static float query_scale(const struct perta_layer *l, const struct perta_place *place)
{
    const struct perta_llm *llm = l->llm;
    if (!(llm->query_beta > 0))
        return perta_rope_query_scale(perta_llm_rope(llm, l->site.layer), place->position);
    if (!perta_llm_has(llm, l->site.layer, PERTA_LAYER_UNROTATED))
        return 1;
    return log1pf(floorf(((float)place->at + 1.0f) / llm->query_floor)) * llm->query_beta + 1.0f;
}

/* Multiply queries, or their gradients, x (n, n_heads, D), by what their positions ask for, which
 * changes once in many positions. */
static void scale_queries(const struct perta_layer *l, const struct perta_batch *batch,
                          struct perta_array x)
{
    size_t width = (size_t)l->llm->n_heads * l->llm->head_dim;
    for (size_t i = 0, end; i < batch->n; i = end) {
        float by = query_scale(l, &batch->places[i]);
        for (end = i + 1; end < batch->n; end++)
            if (query_scale(l, &batch->places[end]) != by)
                break;
        if (by != 1)
            l->be->ops->scale(l->be, perta_array_at(x, i * width), by, (end - i) * width);
    }
}

/* ---- queries, keys and values in one tensor ---- */

/* Which columns of the fused result are queries (0), keys (1), values (2). */
struct columns {
    size_t width, first[3], block[3], stride, n_blocks;
};

static struct columns columns_of(const struct perta_llm *llm)
{
    size_t n = llm->qkv_by_group ? llm->n_kv_heads : 1;
    struct columns c = {.block = {(size_t)llm->n_heads * llm->head_dim / n,
                                  (size_t)llm->n_kv_heads * llm->head_dim / n,
                                  (size_t)llm->n_kv_heads * llm->value_dim / n},
                        .n_blocks = n};
    c.first[1] = c.block[0];
    c.first[2] = c.block[0] + c.block[1];
    c.stride = c.first[2] + c.block[2];
    c.width = n * c.stride;
    return c;
}

static void fused_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    const struct columns c = columns_of(l->llm);
    const struct perta_array to[] = {a->q, a->k, a->v};
    perta_layer_linear_forward(l, batch, PERTA_QKV, a->n1, a->fused, false);
    for (int i = 0; i < 3; i++)
        l->be->ops->split(l->be, to[i], a->fused, batch->n, c.width, c.first[i], c.block[i],
                          c.stride, c.n_blocks);
}

static void fused_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a)
{
    const struct columns c = columns_of(l->llm);
    const struct perta_array from[] = {a->dq, a->dk, a->dv};
    for (int i = 0; i < 3; i++)
        l->be->ops->join(l->be, a->fused, from[i], batch->n, c.width, c.first[i], c.block[i],
                         c.stride, c.n_blocks);
    perta_layer_linear_backward(l, batch, PERTA_QKV, a->fused, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_QKV, a->n1, a->fused, a->vector);
}

static void apart_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    perta_layer_linear_forward(l, batch, PERTA_Q, a->n1, a->q, false);
    perta_layer_linear_forward(l, batch, PERTA_K, a->n1, a->k, false);
    perta_layer_linear_forward(l, batch, PERTA_V, a->n1, a->v, false);
}

static void apart_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a)
{
    perta_layer_linear_backward(l, batch, PERTA_Q, a->dq, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_Q, a->n1, a->dq, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_K, a->dk, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_K, a->n1, a->dk, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_V, a->dv, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_V, a->n1, a->dv, a->vector);
}

static bool is_fused(const struct perta_layer *l)
{
    return perta_llm_param(l->llm, l->site.layer, PERTA_QKV);
}

/* ---- sinks ---- */

/* Hand the gradients of each sequence, dsinks (sequences, n_heads), to the sink. */
static void sinks_gradient(const struct perta_layer *l, const struct perta_attention *attention)
{
    struct perta_err err = {0};
    for (size_t i = 0; perta_array_is(attention->sinks) && l->sink && l->sink->vector &&
                       i < attention->sequences.n && !l->be->rc;
         i++)
        perta_backend_fail(
            l->be,
            l->sink->vector(l->sink, l->site, PERTA_SINKS, i,
                            perta_array_at(attention->dsinks, i * attention->n_heads), &err),
            &err);
}

/* ---- the part ---- */

static size_t values_width(const struct perta_llm *llm)
{
    return (size_t)llm->n_kv_heads * llm->value_dim;
}

static void forward(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *a, struct perta_array to, bool add)
{
    struct perta_attention attention = perta_layer_attention(l, batch);
    const struct heads queries = queries_of(l, a), keys = keys_of(l, a);
    if (is_fused(l))
        fused_forward(l, batch, a);
    else
        apart_forward(l, batch, a);
    place_forward(l, batch, &queries);
    place_forward(l, batch, &keys);
    clamp_forward(l, batch, a->v, a->v_free, values_width(l->llm));
    scale_queries(l, batch, a->q);
    if (l->past)
        l->past->attend(l->past, l, batch, a);
    else
        l->be->ops->attention_forward(l->be, &attention, a->att, a->q, a->k, a->v);
    perta_layer_linear_forward(l, batch, PERTA_O, a->att, to, add);
}

static void backward(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a, struct perta_array dy)
{
    struct perta_attention attention = perta_layer_attention(l, batch);
    const struct heads queries = queries_of(l, a), keys = keys_of(l, a);
    const struct perta_array of_heads[2] = {a->gate, a->up}; /* the MLP no longer needs them */
    if (perta_array_is(attention.sinks))
        attention.dsinks = a->dsinks;
    perta_layer_linear_backward(l, batch, PERTA_O, dy, a->datt, false);
    perta_layer_linear_gradient(l, batch, PERTA_O, a->att, dy, a->vector);
    l->be->ops->attention_backward(l->be, &attention, a->dq, a->dk, a->dv, a->datt, a->q, a->k,
                                   a->v, of_heads);
    sinks_gradient(l, &attention);
    scale_queries(l, batch, a->dq);
    /* datt is scratch from here on */
    place_backward(l, batch, &queries, a->datt, a->vector);
    place_backward(l, batch, &keys, a->datt, a->vector);
    clamp_backward(l, batch, a->dv, a->v_free, values_width(l->llm));
    if (is_fused(l))
        fused_backward(l, batch, a);
    else
        apart_backward(l, batch, a);
}

const struct perta_attention_part perta_attention_part = {NULL, forward, backward};
