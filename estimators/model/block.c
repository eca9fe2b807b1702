#include "estimators/model/block.h"

/* ---- memory ---- */

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* What the backward pass needs of the forward pass. Returns the number of floats. */
static size_t lay_out_kept(struct perta_acts *a, const struct perta_llm *llm, size_t n,
                           struct perta_array memory)
{
    size_t at = 0;
    size_t H = llm->hidden, I = llm->intermediate, D = llm->head_dim;
    size_t Q = llm->n_heads * D, K = llm->n_kv_heads * D;
    size_t stats = llm->family->norm->stats;
    struct perta_array *const hidden[] = {&a->x, &a->n1, &a->mid, &a->n2};
    struct perta_array *const query[] = {&a->q, &a->att};
    struct perta_array *const key[] = {&a->k, &a->v};
    struct perta_array *const shared[] = {&a->gate, &a->up};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        *hidden[i] = perta_array_take(memory, &at, n * H);
    for (size_t i = 0; i < sizeof query / sizeof *query; i++)
        *query[i] = perta_array_take(memory, &at, n * Q);
    for (size_t i = 0; i < sizeof key / sizeof *key; i++)
        *key[i] = perta_array_take(memory, &at, n * K);
    a->h = perta_array_take(memory, &at, n * I);
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++)
        *shared[i] = perta_array_take(memory, &at, n * most(I, Q));
    a->q_raw = perta_array_take(memory, &at, llm->options & PERTA_QK_NORM ? n * Q : 0);
    a->k_raw = perta_array_take(memory, &at, llm->options & PERTA_QK_NORM ? n * K : 0);
    a->rstd1 = perta_array_take(memory, &at, n * stats);
    a->rstd2 = perta_array_take(memory, &at, n * stats);
    a->rstd_q = perta_array_take(memory, &at, n * llm->n_heads * stats);
    a->rstd_k = perta_array_take(memory, &at, n * llm->n_kv_heads * stats);
    return at;
}

/* The other activations: the result, gradients, scratch. */
static size_t lay_out_rest(struct perta_acts *a, const struct perta_llm *llm, size_t n,
                           struct perta_array memory)
{
    size_t at = 0;
    size_t H = llm->hidden, I = llm->intermediate, D = llm->head_dim;
    size_t Q = llm->n_heads * D, K = llm->n_kv_heads * D;
    struct perta_array *const hidden[] = {&a->out, &a->dout, &a->dmid, &a->dn, &a->dx};
    struct perta_array *const query[] = {&a->datt, &a->dq};
    struct perta_array *const key[] = {&a->dk, &a->dv};
    struct perta_array *const inner[] = {&a->dgate, &a->dup};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        *hidden[i] = perta_array_take(memory, &at, n * H);
    for (size_t i = 0; i < sizeof query / sizeof *query; i++)
        *query[i] = perta_array_take(memory, &at, n * Q);
    for (size_t i = 0; i < sizeof key / sizeof *key; i++)
        *key[i] = perta_array_take(memory, &at, n * K);
    for (size_t i = 0; i < sizeof inner / sizeof *inner; i++)
        *inner[i] = perta_array_take(memory, &at, n * I);
    a->vector = perta_array_take(memory, &at, most(2 * H, perta_llm_widest(llm)));
    return at;
}

size_t perta_acts_kept_floats(const struct perta_llm *llm, size_t n)
{
    struct perta_acts acts;
    return lay_out_kept(&acts, llm, n, (struct perta_array){0});
}

size_t perta_acts_floats(const struct perta_llm *llm, size_t n)
{
    struct perta_acts acts;
    return perta_acts_kept_floats(llm, n) + lay_out_rest(&acts, llm, n, (struct perta_array){0});
}

void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        struct perta_array memory)
{
    perta_acts_lay_out_in(acts, llm, n, memory,
                          perta_array_at(memory, perta_acts_kept_floats(llm, n)));
}

void perta_acts_lay_out_in(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                           struct perta_array kept, struct perta_array rest)
{
    lay_out_kept(acts, llm, n, kept);
    lay_out_rest(acts, llm, n, rest);
}

/* ---- a layer's parameters ---- */

static struct perta_value value_of(const struct perta_layer *l, enum perta_param param)
{
    const struct perta_param_row *row = perta_llm_param(l->llm, l->site.layer, param);
    struct perta_value value = {0};
    struct perta_err err = {0};
    if (row && !l->be->rc)
        perta_backend_fail(l->be, l->from->get(l->from, l->site, row, &value, &err), &err);
    return value;
}

struct perta_array perta_layer_vector(const struct perta_layer *l, enum perta_param param)
{
    return value_of(l, param).data;
}

static struct perta_linear linear_of(const struct perta_layer *l, enum perta_param weight)
{
    struct perta_value value = value_of(l, weight);
    return (struct perta_linear){
        value.data,      value.dtype, value.out, value.in, perta_layer_vector(l, weight + 1),
        value.transposed};
}

void perta_layer_linear_forward(const struct perta_layer *l, const struct perta_batch *batch,
                                enum perta_param weight, struct perta_array x, struct perta_array y,
                                bool add)
{
    struct perta_linear linear = linear_of(l, weight);
    const struct perta_factor *factor = perta_factors_find(l->factors, l->site, weight);
    l->be->ops->linear_forward(l->be, &linear, &batch->tiles, x, y, batch->n, add);
    if (!factor)
        return;
    struct perta_low_rank lora = perta_factor_in(factor, l->factors->values);
    l->be->ops->low_rank_forward(l->be, &lora, &batch->tiles, x, y, batch->n, l->factors->room);
}

void perta_layer_linear_backward(const struct perta_layer *l, const struct perta_batch *batch,
                                 enum perta_param weight, struct perta_array dy,
                                 struct perta_array dx, bool add)
{
    struct perta_linear linear = linear_of(l, weight);
    const struct perta_factor *factor = perta_factors_find(l->factors, l->site, weight);
    l->be->ops->linear_backward(l->be, &linear, &batch->tiles, dy, dx, batch->n, add);
    if (!factor)
        return;
    struct perta_low_rank lora = perta_factor_in(factor, l->factors->values);
    l->be->ops->low_rank_backward(l->be, &lora, &batch->tiles, dy, dx, batch->n, l->factors->room);
}

/* ---- their gradients ---- */

void perta_layer_linear_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                                 enum perta_param weight, struct perta_array x,
                                 struct perta_array dy, struct perta_array vector)
{
    const struct perta_runs *s = &batch->sequences;
    const struct perta_param_row *bias = perta_llm_param(l->llm, l->site.layer, weight + 1);
    struct perta_err err = {0};
    if (!l->sink || l->be->rc)
        return;
    int rc = l->sink->linear(l->sink, l->site, weight, batch, x, dy, &err);
    for (size_t i = 0, out, in; bias && l->sink->vector && i < s->n && !rc; i++) {
        perta_llm_shape(l->llm, bias, &out, &in);
        l->be->ops->linear_backward_bias(l->be, vector, dy, s->starts[i] - s->origin,
                                         s->starts[i + 1] - s->origin, in);
        rc = l->sink->vector(l->sink, l->site, weight + 1, i, vector, &err);
    }
    perta_backend_fail(l->be, rc, &err);
}

/* ---- the block ---- */

void perta_block_forward(const struct perta_layer *l, const struct perta_batch *batch,
                         const struct perta_acts *a)
{
    const struct perta_family *family = l->llm->family;
    struct perta_backend *be = l->be;
    size_t n = batch->n, H = l->llm->hidden;
    struct perta_norm norm_1 = perta_layer_norm(l, PERTA_NORM_1);
    family->norm->forward(be, &norm_1, a->n1, a->rstd1, a->x, n, H);
    be->ops->copy(be, a->mid, a->x, n * H);
    family->attention->forward(l, batch, a);
    struct perta_norm norm_2 = perta_layer_norm(l, PERTA_NORM_2);
    family->norm->forward(be, &norm_2, a->n2, a->rstd2, a->mid, n, H);
    if (!l->again)
        be->ops->copy(be, a->out, a->mid, n * H);
    family->mlp->forward(l, batch, a);
}

void perta_block_backward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    const struct perta_family *family = l->llm->family;
    struct perta_backend *be = l->be;
    size_t n = batch->n, H = l->llm->hidden;
    family->mlp->backward(l, batch, a);
    struct perta_norm norm_2 = perta_layer_norm(l, PERTA_NORM_2);
    be->ops->copy(be, a->dmid, a->dout, n * H);
    family->norm->backward(be, &norm_2, a->dmid, a->dn, a->mid, a->rstd2, n, H);
    perta_layer_norm_gradient(l, batch, PERTA_NORM_2, a->dn, a->mid, a->rstd2, 1, H, a->vector);
    family->attention->backward(l, batch, a);
    struct perta_norm norm_1 = perta_layer_norm(l, PERTA_NORM_1);
    be->ops->copy(be, a->dx, a->dmid, n * H);
    family->norm->backward(be, &norm_1, a->dx, a->dn, a->x, a->rstd1, n, H);
    perta_layer_norm_gradient(l, batch, PERTA_NORM_1, a->dn, a->x, a->rstd1, 1, H, a->vector);
}
