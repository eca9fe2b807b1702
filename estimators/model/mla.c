/* Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): queries, keys and
 * values of all heads are made from vectors that are narrower than they are.
 *
 *   q = Q norm(Q_A n1), or Q n1            (n, heads, D), of which the last r elements are rotated
 *   [c, kr] = KV_A n1                      (n, C), and (n, r), which is rotated
 *   [k, v] = KV_B norm(c)                  of each head: (n, heads, D - r), (n, heads, V)
 *   mid += O(attention(q, [k, kr], v))     kr is the same for all heads
 *
 * D: head_dim, r: rotary_dim, C: kv_lora, V: value_dim. Each head has keys and values of its own,
 * which are also what is kept for the tokens that follow. */
#include "estimators/model/part.h"

/* These norms have an eps of their own, in transformers. */
#define LATENT_EPS 1e-6f

/* ---- activations ---- */

/* In acts->latent, or their gradients in acts->dlatent. R: q_lora. */
struct latents {
    struct perta_array qa, qn; /* (n, R): before and after the norm */
    struct perta_array rstd_q; /* (n) */
    struct perta_array kv_a;   /* (n, C + r): c and kr */
    struct perta_array c, cn;  /* (n, C): before and after the norm */
    struct perta_array rstd_c; /* (n) */
    struct perta_array kr;     /* (n, r) */
};

static size_t lay_out(struct latents *to, const struct perta_llm *llm, size_t n,
                      struct perta_array memory)
{
    size_t R = llm->q_lora, C = llm->kv_lora, r = llm->rotary_dim, at = 0;
    struct {
        struct perta_array *array;
        size_t width;
    } const parts[] = {{&to->qa, R}, {&to->qn, R}, {&to->rstd_q, 1}, {&to->kv_a, C + r},
                       {&to->c, C},  {&to->cn, C}, {&to->rstd_c, 1}, {&to->kr, r}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].array = perta_array_at(memory, at);
        at += n * ((parts[i].width + 15) & ~(size_t)15); /* whole cache lines */
    }
    return at;
}

static size_t latent_width(const struct perta_llm *llm)
{
    struct latents latents;
    return lay_out(&latents, llm, 1, (struct perta_array){0});
}

static struct latents latents_in(const struct perta_layer *l, const struct perta_batch *batch,
                                 struct perta_array memory)
{
    struct latents latents;
    lay_out(&latents, l->llm, batch->n, memory);
    return latents;
}

/* ---- norms ---- */

static void norm_forward(const struct perta_layer *l, const struct perta_batch *batch,
                         enum perta_param param, struct perta_array y, struct perta_array rstd,
                         struct perta_array x, size_t width)
{
    struct perta_norm norm = perta_layer_norm(l, param);
    norm.eps = LATENT_EPS;
    l->llm->family->norm->forward(l->be, &norm, y, rstd, x, batch->n, width);
}

/* dx = the gradient of x, from dy. */
static void norm_backward(const struct perta_layer *l, const struct perta_batch *batch,
                          enum perta_param param, struct perta_array dx, struct perta_array dy,
                          struct perta_array x, struct perta_array rstd, size_t width,
                          struct perta_array vector)
{
    struct perta_norm norm = perta_layer_norm(l, param);
    perta_layer_norm_gradient(l, batch, param, dy, x, rstd, 1, width, vector);
    l->be->ops->zero(l->be, dx, batch->n * width);
    l->llm->family->norm->backward(l->be, &norm, dx, dy, x, rstd, batch->n, width);
}

/* ---- queries ---- */

static void queries_forward(const struct perta_layer *l, const struct perta_batch *batch,
                            const struct perta_acts *a, const struct latents *t)
{
    const struct perta_llm *llm = l->llm;
    const struct perta_rotation rotation = perta_layer_rotation(l, llm->head_dim - llm->rotary_dim);
    if (llm->q_lora) {
        perta_layer_linear_forward(l, batch, PERTA_Q_A, a->n1, t->qa, false);
        norm_forward(l, batch, PERTA_NORM_Q_A, t->qn, t->rstd_q, t->qa, llm->q_lora);
    }
    perta_layer_linear_forward(l, batch, PERTA_Q, llm->q_lora ? t->qn : a->n1, a->q, false);
    l->be->ops->rope_forward(l->be, a->q, batch->places, &rotation, batch->n, llm->n_heads,
                             llm->head_dim);
}

/* From a->dq to a->dn, which it is added to. d: gradients of t. */
static void queries_backward(const struct perta_layer *l, const struct perta_batch *batch,
                             const struct perta_acts *a, const struct latents *t,
                             const struct latents *d)
{
    const struct perta_llm *llm = l->llm;
    const struct perta_rotation rotation = perta_layer_rotation(l, llm->head_dim - llm->rotary_dim);
    l->be->ops->rope_backward(l->be, a->dq, batch->places, &rotation, batch->n, llm->n_heads,
                              llm->head_dim);
    perta_layer_linear_gradient(l, batch, PERTA_Q, llm->q_lora ? t->qn : a->n1, a->dq, a->vector);
    if (!llm->q_lora) {
        perta_layer_linear_backward(l, batch, PERTA_Q, a->dq, a->dn, true);
        return;
    }
    perta_layer_linear_backward(l, batch, PERTA_Q, a->dq, d->qn, false);
    norm_backward(l, batch, PERTA_NORM_Q_A, d->qa, d->qn, t->qa, t->rstd_q, llm->q_lora, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_Q_A, d->qa, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_Q_A, a->n1, d->qa, a->vector);
}

/* ---- keys and values ---- */

/* Copy blocks of columns of from (n, from_width) to blocks of to (n, to_width), of each head; packed
 * (n, heads * block): scratch. */
static void move(const struct perta_layer *l, size_t n, struct perta_array to, size_t to_stride,
                 struct perta_array from, size_t from_stride, size_t block,
                 struct perta_array packed)
{
    const size_t heads = l->llm->n_heads;
    l->be->ops->split(l->be, packed, from, n, heads * from_stride, 0, block, from_stride, heads);
    l->be->ops->join(l->be, to, packed, n, heads * to_stride, 0, block, to_stride, heads);
}

/* The rotation of kr, a single head of nothing else. */
static void rotate_key(const struct perta_layer *l, const struct perta_batch *batch,
                       struct perta_array x, bool backward)
{
    const struct perta_rotation rotation = perta_layer_rotation(l, 0);
    const struct perta_backend_ops *ops = l->be->ops;
    (backward ? ops->rope_backward : ops->rope_forward)(l->be, x, batch->places, &rotation,
                                                        batch->n, 1, l->llm->rotary_dim);
}

/* scratch: (n, heads * D). */
static void keys_forward(const struct perta_layer *l, const struct perta_batch *batch,
                         const struct perta_acts *a, const struct latents *t,
                         struct perta_array scratch)
{
    const struct perta_llm *llm = l->llm;
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, h = llm->n_heads, D = llm->head_dim, V = llm->value_dim;
    size_t C = llm->kv_lora, r = llm->rotary_dim, N = D - r;
    perta_layer_linear_forward(l, batch, PERTA_KV_A, a->n1, t->kv_a, false);
    ops->split(l->be, t->c, t->kv_a, n, C + r, 0, C, C + r, 1);
    ops->split(l->be, t->kr, t->kv_a, n, C + r, C, r, C + r, 1);
    rotate_key(l, batch, t->kr, false);
    norm_forward(l, batch, PERTA_NORM_KV_A, t->cn, t->rstd_c, t->c, C);
    perta_layer_linear_forward(l, batch, PERTA_KV_B, t->cn, a->fused, false);
    move(l, n, a->k, D, a->fused, N + V, N, scratch);
    for (size_t i = 0; i < h; i++)
        ops->join(l->be, a->k, t->kr, n, h * D, i * D + N, r, D, 1);
    ops->split(l->be, a->v, a->fused, n, h * (N + V), N, V, N + V, h);
}

/* From a->dk and a->dv to a->dn, which is set. scratch: (n, heads * D). */
static void keys_backward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a, const struct latents *t,
                          const struct latents *d, struct perta_array scratch)
{
    const struct perta_llm *llm = l->llm;
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, h = llm->n_heads, D = llm->head_dim, V = llm->value_dim;
    size_t C = llm->kv_lora, r = llm->rotary_dim, N = D - r;
    ops->zero(l->be, d->kr, n * r);
    for (size_t i = 0; i < h; i++) {
        ops->split(l->be, scratch, a->dk, n, h * D, i * D + N, r, D, 1);
        ops->add(l->be, d->kr, scratch, n * r);
    }
    rotate_key(l, batch, d->kr, true);
    move(l, n, a->fused, N + V, a->dk, D, N, scratch);
    ops->join(l->be, a->fused, a->dv, n, h * (N + V), N, V, N + V, h);
    perta_layer_linear_backward(l, batch, PERTA_KV_B, a->fused, d->cn, false);
    perta_layer_linear_gradient(l, batch, PERTA_KV_B, t->cn, a->fused, a->vector);
    norm_backward(l, batch, PERTA_NORM_KV_A, d->c, d->cn, t->c, t->rstd_c, C, a->vector);
    ops->join(l->be, d->kv_a, d->c, n, C + r, 0, C, C + r, 1);
    ops->join(l->be, d->kv_a, d->kr, n, C + r, C, r, C + r, 1);
    perta_layer_linear_backward(l, batch, PERTA_KV_A, d->kv_a, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_KV_A, a->n1, d->kv_a, a->vector);
}

/* ---- the part ---- */

static void forward(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *a, struct perta_array to, bool add)
{
    const struct latents t = latents_in(l, batch, a->latent);
    struct perta_attention attention = perta_layer_attention(l, batch);
    queries_forward(l, batch, a, &t);
    keys_forward(l, batch, a, &t, a->gate); /* which the MLP does not use yet */
    if (l->past)
        l->past->attend(l->past, l, batch, a);
    else
        l->be->ops->attention_forward(l->be, &attention, a->att, a->q, a->k, a->v);
    perta_layer_linear_forward(l, batch, PERTA_O, a->att, to, add);
}

static void backward(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a, struct perta_array dy)
{
    const struct latents t = latents_in(l, batch, a->latent);
    const struct latents d = latents_in(l, batch, a->dlatent);
    struct perta_attention attention = perta_layer_attention(l, batch);
    const struct perta_array of_heads[2] = {a->gate, a->up}; /* the MLP no longer needs them */
    perta_layer_linear_backward(l, batch, PERTA_O, dy, a->datt, false);
    perta_layer_linear_gradient(l, batch, PERTA_O, a->att, dy, a->vector);
    l->be->ops->attention_backward(l->be, &attention, a->dq, a->dk, a->dv, a->datt, a->q, a->k,
                                   a->v, of_heads);
    keys_backward(l, batch, a, &t, &d, a->datt); /* which is scratch from here on */
    queries_backward(l, batch, a, &t, &d);
}

const struct perta_attention_part perta_latent_attention_part = {latent_width, forward, backward};
