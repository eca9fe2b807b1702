/* Attention with rotary positions, grouped heads and, in some families (Qwen3), norms of each
 * head's queries and keys:
 *
 *   mid += O(attention(rope(norm(Q n1)), rope(norm(K n1)), V n1)) */
#include <math.h>

#include "estimators/model/part.h"

struct perta_attention perta_layer_attention(const struct perta_layer *l,
                                             const struct perta_batch *batch)
{
    return (struct perta_attention){.sequences = batch->sequences,
                                    .places = batch->places,
                                    .n_heads = l->llm->n_heads,
                                    .n_kv_heads = l->llm->n_kv_heads,
                                    .D = l->llm->head_dim,
                                    .V = l->llm->head_dim,
                                    .window = perta_llm_window(l->llm, l->site.layer),
                                    .scale = 1.0f / sqrtf((float)l->llm->head_dim)};
}

/* ---- queries and keys: norm and rotary position ---- */

struct perta_rotation perta_layer_rotation(const struct perta_layer *l, size_t first)
{
    const struct perta_rope *rope = perta_llm_rope(l->llm, l->site.layer);
    return (struct perta_rotation){l->inv_freq, first, rope->rotated, rope->interleaved,
                                   rope->scale};
}

/* Normalise each head of x (n, n_heads, D), then rotate it by its position. raw and rstd are kept
 * for the backward pass. */
static void place_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          enum perta_param param, struct perta_array x, struct perta_array raw,
                          struct perta_array rstd, size_t n_heads)
{
    size_t D = l->llm->head_dim, n = batch->n * n_heads;
    struct perta_norm norm = perta_layer_norm(l, param);
    if (perta_array_is(norm.weight)) {
        l->be->ops->copy(l->be, raw, x, n * D);
        l->llm->family->norm->forward(l->be, &norm, x, rstd, raw, n, D);
    }
    const struct perta_rotation rotation = perta_layer_rotation(l, 0);
    l->be->ops->rope_forward(l->be, x, batch->places, &rotation, batch->n, n_heads, D);
}

/* Replace d (n, n_heads, D), the gradient of the result, by that of the input. spare: scratch of
 * the same size. */
static void place_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           enum perta_param param, struct perta_array d, struct perta_array raw,
                           struct perta_array rstd, size_t n_heads, struct perta_array spare,
                           struct perta_array vector)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t D = l->llm->head_dim, n = batch->n * n_heads;
    struct perta_norm norm = perta_layer_norm(l, param);
    const struct perta_rotation rotation = perta_layer_rotation(l, 0);
    ops->rope_backward(l->be, d, batch->places, &rotation, batch->n, n_heads, D);
    if (!perta_array_is(norm.weight))
        return;
    perta_layer_norm_gradient(l, batch, param, d, raw, rstd, n_heads, D, vector);
    ops->zero(l->be, spare, n * D);
    l->llm->family->norm->backward(l->be, &norm, spare, d, raw, rstd, n, D);
    ops->copy(l->be, d, spare, n * D);
}

/* ---- the part ---- */

static void forward(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    struct perta_attention attention = perta_layer_attention(l, batch);
    perta_layer_linear_forward(l, batch, PERTA_Q, a->n1, a->q, false);
    perta_layer_linear_forward(l, batch, PERTA_K, a->n1, a->k, false);
    perta_layer_linear_forward(l, batch, PERTA_V, a->n1, a->v, false);
    place_forward(l, batch, PERTA_NORM_Q, a->q, a->q_raw, a->rstd_q, l->llm->n_heads);
    place_forward(l, batch, PERTA_NORM_K, a->k, a->k_raw, a->rstd_k, l->llm->n_kv_heads);
    if (l->past)
        l->past->attend(l->past, l, batch, a);
    else
        ops->attention_forward(l->be, &attention, a->att, a->q, a->k, a->v);
    perta_layer_linear_forward(l, batch, PERTA_O, a->att, a->mid, true);
}

static void backward(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    const struct perta_attention attention = perta_layer_attention(l, batch);
    const struct perta_array of_heads[2] = {a->gate, a->up}; /* the MLP no longer needs them */
    perta_layer_linear_backward(l, batch, PERTA_O, a->dmid, a->datt, false);
    perta_layer_linear_gradient(l, batch, PERTA_O, a->att, a->dmid, a->vector);
    ops->attention_backward(l->be, &attention, a->dq, a->dk, a->dv, a->datt, a->q, a->k, a->v,
                            of_heads);
    /* datt is scratch from here on */
    place_backward(l, batch, PERTA_NORM_Q, a->dq, a->q_raw, a->rstd_q, l->llm->n_heads, a->datt,
                   a->vector);
    place_backward(l, batch, PERTA_NORM_K, a->dk, a->k_raw, a->rstd_k, l->llm->n_kv_heads, a->datt,
                   a->vector);
    perta_layer_linear_backward(l, batch, PERTA_Q, a->dq, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_Q, a->n1, a->dq, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_K, a->dk, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_K, a->n1, a->dk, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_V, a->dv, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_V, a->n1, a->dv, a->vector);
}

const struct perta_attention_part perta_attention_part = {forward, backward};
