#include "estimators/model/block.h"

#include <assert.h>

/* ---- memory ---- */

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Is a parameter in some layer? */
static bool has(const struct perta_llm *llm, enum perta_param param)
{
    return perta_llm_param(llm, PERTA_ANY_LAYER, param) != NULL;
}

/* Is more done to what attention or the MLP gives, in some layer, before it is added? */
static bool is_detached(const struct perta_llm *llm, enum perta_param after)
{
    return has(llm, after) || llm->residual_multiplier != 1;
}

/* The widths of activations (part.h). */
struct widths {
    size_t H, I, Q, A, K, V;
};

static struct widths widths_of(const struct perta_llm *llm)
{
    size_t dense = llm->any_layer & PERTA_LAYER_MIXTURE && !(llm->any_layer & PERTA_LAYER_DENSE)
                       ? 0
                       : llm->intermediate;
    return (struct widths){llm->hidden,
                           most(dense, llm->shared_intermediate),
                           (size_t)llm->n_heads * llm->head_dim,
                           (size_t)llm->n_heads * llm->value_dim,
                           (size_t)llm->n_kv_heads * llm->head_dim,
                           (size_t)llm->n_kv_heads * llm->value_dim};
}

/* Norms of a token's queries or keys (width). */
static size_t norms_of(const struct perta_llm *llm, enum perta_param norm, size_t width)
{
    const struct perta_param_row *row = perta_llm_param(llm, PERTA_ANY_LAYER, norm);
    if (!row)
        return llm->any_layer & PERTA_LAYER_QK_NORM ? width / llm->head_dim : 0;
    return width / perta_llm_norm_width(llm, row);
}

static size_t latent_width(const struct perta_llm *llm)
{
    const struct perta_attention_part *part = llm->family->attention;
    return part->latent_width ? part->latent_width(llm) : 0;
}

/* The width of the result of a linear that is several in one. */
static size_t fused_width(const struct perta_llm *llm, const struct widths *w)
{
    size_t of_keys = (size_t)llm->n_heads * (llm->head_dim - llm->rotary_dim + llm->value_dim);
    size_t fused = has(llm, PERTA_QKV) ? w->Q + w->K + w->V : 0;
    if (has(llm, PERTA_KV_B))
        fused = most(fused, of_keys);
    return has(llm, PERTA_GATE_UP) || has(llm, PERTA_SHARED_GATE_UP) ? most(fused, 2 * w->I)
                                                                     : fused;
}

/* An array, and the number of floats that it has for each token. */
struct part {
    struct perta_array *array;
    size_t width;
};

static size_t lay_out_parts(const struct part *parts, size_t n_parts, size_t n,
                            struct perta_array memory)
{
    size_t at = 0;
    for (size_t i = 0; i < n_parts; i++)
        *parts[i].array = perta_array_take(memory, &at, n * parts[i].width);
    return at;
}

/* What the backward pass needs of the forward pass. Returns the number of floats. */
static size_t lay_out_kept(struct perta_acts *a, const struct perta_llm *llm, size_t n,
                           struct perta_array memory)
{
    const struct widths w = widths_of(llm);
    size_t stats = llm->family->norm->stats;
    bool clamped = llm->clip_qkv > 0;
    size_t of_q = norms_of(llm, PERTA_NORM_Q, w.Q), of_k = norms_of(llm, PERTA_NORM_K, w.K);
    const struct part parts[] = {
        {&a->x, w.H},
        {&a->n1, w.H},
        {&a->mid, w.H},
        {&a->n2, w.H},
        {&a->q, w.Q},
        {&a->att, w.A},
        {&a->k, w.K},
        {&a->v, w.V},
        {&a->h, w.I},
        {&a->gate, most(w.I, w.Q)},
        {&a->up, most(w.I, w.A)},
        {&a->q_raw, of_q ? w.Q : 0},
        {&a->k_raw, of_k ? w.K : 0},
        {&a->q_free, clamped ? w.Q : 0},
        {&a->k_free, clamped ? w.K : 0},
        {&a->v_free, clamped ? w.V : 0},
        {&a->rstd1, stats},
        {&a->rstd2, stats},
        {&a->rstd_q, of_q * stats},
        {&a->rstd_k, of_k * stats},
        {&a->branch_1, is_detached(llm, PERTA_NORM_1_AFTER) ? w.H : 0},
        {&a->branch_2, is_detached(llm, PERTA_NORM_2_AFTER) || llm->n_experts ? w.H : 0},
        {&a->rstd1_after, has(llm, PERTA_NORM_1_AFTER) ? stats : 0},
        {&a->rstd2_after, has(llm, PERTA_NORM_2_AFTER) ? stats : 0},
        {&a->latent, latent_width(llm)},
    };
    return lay_out_parts(parts, sizeof parts / sizeof *parts, n, memory);
}

/* The other activations: the result, gradients, scratch. */
static size_t lay_out_rest(struct perta_acts *a, const struct perta_llm *llm, size_t n,
                           struct perta_array memory)
{
    const struct widths w = widths_of(llm);
    bool detached = is_detached(llm, PERTA_NORM_1_AFTER) || is_detached(llm, PERTA_NORM_2_AFTER);
    const struct part parts[] = {
        {&a->out, w.H},
        {&a->dout, w.H},
        {&a->dmid, w.H},
        {&a->dn, w.H},
        {&a->dx, w.H},
        {&a->datt, most(w.A, w.Q)},
        {&a->dq, w.Q},
        {&a->dk, w.K},
        {&a->dv, w.V},
        {&a->dgate, w.I},
        {&a->dup, w.I},
        {&a->fused, fused_width(llm, &w)},
        {&a->dbranch, detached || llm->parallel || llm->n_experts ? w.H : 0},
        {&a->spare, detached || llm->n_experts ? w.H : 0},
        {&a->router, llm->n_experts},
        {&a->score, has(llm, PERTA_SHARED_SCORE)},
        {&a->dscore, has(llm, PERTA_SHARED_SCORE)},
        {&a->dsinks, has(llm, PERTA_SINKS) ? llm->n_heads : 0},
        {&a->dlatent, latent_width(llm)},
    };
    size_t at = lay_out_parts(parts, sizeof parts / sizeof *parts, n, memory);
    a->vector = perta_array_take(memory, &at, most(2 * w.H, perta_llm_widest(llm)));
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

/* ---- what attention and the MLP give ---- */

/* Is more done to it, in this layer, before it is added? */
static bool detached(const struct perta_layer *l, enum perta_param after)
{
    return perta_layer_has_norm(l, after) || l->llm->residual_multiplier != 1;
}

/* to += multiplier * norm(branch). y: scratch for what the norm gives. */
static void add_branch(const struct perta_layer *l, const struct perta_batch *batch,
                       enum perta_param after, struct perta_array to, struct perta_array branch,
                       struct perta_array rstd, struct perta_array y)
{
    size_t n = batch->n, H = l->llm->hidden;
    bool normed = perta_layer_has_norm(l, after);
    if (normed) {
        struct perta_norm norm = perta_layer_norm(l, after);
        l->llm->family->norm->forward(l->be, &norm, y, rstd, branch, n, H);
    }
    l->be->ops->add_scaled(l->be, to, normed ? y : branch, l->llm->residual_multiplier, n * H);
}

/* The gradient of branch, from d, that of the sum: in a->dbranch. */
static void branch_backward(const struct perta_layer *l, const struct perta_batch *batch,
                            const struct perta_acts *a, enum perta_param after,
                            struct perta_array d, struct perta_array branch,
                            struct perta_array rstd)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, H = l->llm->hidden;
    bool normed = perta_layer_has_norm(l, after);
    struct perta_array to = normed ? a->spare : a->dbranch;
    ops->copy(l->be, to, d, n * H);
    ops->scale(l->be, to, l->llm->residual_multiplier, n * H);
    if (!normed)
        return;
    struct perta_norm norm = perta_layer_norm(l, after);
    ops->zero(l->be, a->dbranch, n * H);
    l->llm->family->norm->backward(l->be, &norm, a->dbranch, to, branch, rstd, n, H);
    perta_layer_norm_gradient(l, batch, after, to, branch, rstd, 1, H, a->vector);
}

/* ---- the block ---- */

/* The activations, where what the layer lacks is what it would be made from: without a norm before
 * attention, n1 is x; without one before the MLP, n2 is mid or, in a parallel block, n1. */
static struct perta_acts with_aliases(const struct perta_layer *l, const struct perta_acts *a)
{
    struct perta_acts own = *a;
    if (!perta_layer_has_norm(l, PERTA_NORM_1))
        own.n1 = own.x;
    if (!perta_layer_has_norm(l, PERTA_NORM_2))
        own.n2 = l->llm->parallel ? own.n1 : own.mid;
    return own;
}

static struct perta_mlp_acts mlp_acts_of(const struct perta_layer *l, const struct perta_acts *a)
{
    return (struct perta_mlp_acts){a->n2,    a->dn,  a->gate,  a->up,     a->h,
                                   a->dgate, a->dup, a->fused, a->vector, l->llm->intermediate};
}

static bool is_mixture(const struct perta_layer *l)
{
    return perta_llm_has(l->llm, l->site.layer, PERTA_LAYER_MIXTURE);
}

void perta_block_attend(const struct perta_layer *l, const struct perta_batch *batch,
                        const struct perta_acts *acts)
{
    const struct perta_acts own = with_aliases(l, acts), *a = &own;
    const struct perta_family *family = l->llm->family;
    struct perta_backend *be = l->be;
    size_t n = batch->n, H = l->llm->hidden;
    if (perta_layer_has_norm(l, PERTA_NORM_1)) {
        struct perta_norm norm = perta_layer_norm(l, PERTA_NORM_1);
        family->norm->forward(be, &norm, a->n1, a->rstd1, a->x, n, H);
    }
    be->ops->copy(be, a->mid, a->x, n * H);
    if (detached(l, PERTA_NORM_1_AFTER)) {
        family->attention->forward(l, batch, a, a->branch_1, false);
        add_branch(l, batch, PERTA_NORM_1_AFTER, a->mid, a->branch_1, a->rstd1_after, a->spare);
    } else {
        family->attention->forward(l, batch, a, a->mid, true);
    }
    if (perta_layer_has_norm(l, PERTA_NORM_2)) {
        struct perta_norm norm = perta_layer_norm(l, PERTA_NORM_2);
        struct perta_array from = l->llm->parallel ? a->x : a->mid;
        family->norm->forward(be, &norm, a->n2, a->rstd2, from, n, H);
    } else if (is_mixture(l)) {
        be->ops->copy(be, acts->n2, a->n2, n * H);
    }
}

void perta_block_add(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a)
{
    l->be->ops->copy(l->be, a->out, a->mid, batch->n * l->llm->hidden);
    add_branch(l, batch, PERTA_NORM_2_AFTER, a->out, a->branch_2, a->rstd2_after, a->spare);
}

void perta_block_forward(const struct perta_layer *l, const struct perta_batch *batch,
                         const struct perta_acts *acts)
{
    const struct perta_acts own = with_aliases(l, acts), *a = &own;
    const struct perta_mlp_acts mlp = mlp_acts_of(l, a);
    perta_block_attend(l, batch, acts);
    if (detached(l, PERTA_NORM_2_AFTER) &&
        (!l->again || perta_layer_has_norm(l, PERTA_NORM_2_AFTER))) {
        perta_mlp_forward(l, batch, &perta_mlp_roles, &mlp, a->branch_2, false);
        perta_block_add(l, batch, a);
    } else if (l->again) {
        perta_mlp_inner(l, batch, &perta_mlp_roles, &mlp);
    } else {
        l->be->ops->copy(l->be, a->out, a->mid, batch->n * l->llm->hidden);
        perta_mlp_forward(l, batch, &perta_mlp_roles, &mlp, a->out, true);
    }
}

struct perta_array perta_block_branch_backward(const struct perta_layer *l,
                                               const struct perta_batch *batch,
                                               const struct perta_acts *a)
{
    if (!detached(l, PERTA_NORM_2_AFTER))
        return a->dout;
    branch_backward(l, batch, a, PERTA_NORM_2_AFTER, a->dout, a->branch_2, a->rstd2_after);
    return a->dbranch;
}

/* From a->dn, the gradient of n2, to *to, which it is added to: that of mid, or in a parallel block
 * of x. */
static void norm_2_backward(const struct perta_layer *l, const struct perta_batch *batch,
                            const struct perta_acts *a, struct perta_array to)
{
    size_t n = batch->n, H = l->llm->hidden;
    struct perta_array from = l->llm->parallel ? a->x : a->mid;
    if (!perta_layer_has_norm(l, PERTA_NORM_2)) {
        l->be->ops->add(l->be, to, a->dn, n * H);
        return;
    }
    struct perta_norm norm = perta_layer_norm(l, PERTA_NORM_2);
    l->llm->family->norm->backward(l->be, &norm, to, a->dn, from, a->rstd2, n, H);
    perta_layer_norm_gradient(l, batch, PERTA_NORM_2, a->dn, from, a->rstd2, 1, H, a->vector);
}

static void attention_backward(const struct perta_layer *l, const struct perta_batch *batch,
                               const struct perta_acts *a)
{
    struct perta_array dy = a->dmid;
    if (detached(l, PERTA_NORM_1_AFTER)) {
        branch_backward(l, batch, a, PERTA_NORM_1_AFTER, a->dmid, a->branch_1, a->rstd1_after);
        dy = a->dbranch;
    }
    l->llm->family->attention->backward(l, batch, a, dy);
}

/* From a->dn, the gradient of n1, to a->dx, which it is added to. */
static void norm_1_backward(const struct perta_layer *l, const struct perta_batch *batch,
                            const struct perta_acts *a)
{
    size_t n = batch->n, H = l->llm->hidden;
    if (!perta_layer_has_norm(l, PERTA_NORM_1)) {
        l->be->ops->add(l->be, a->dx, a->dn, n * H);
        return;
    }
    struct perta_norm norm = perta_layer_norm(l, PERTA_NORM_1);
    l->llm->family->norm->backward(l->be, &norm, a->dx, a->dn, a->x, a->rstd1, n, H);
    perta_layer_norm_gradient(l, batch, PERTA_NORM_1, a->dn, a->x, a->rstd1, 1, H, a->vector);
}

/* A parallel block: x goes to attention, to the MLP and to the sum. */
static void parallel_backward(const struct perta_layer *l, const struct perta_batch *batch,
                              const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n * l->llm->hidden;
    bool own_norm = perta_layer_has_norm(l, PERTA_NORM_2);
    assert(own_norm || !detached(l, PERTA_NORM_1_AFTER)); /* dbranch is needed for one of them */
    ops->copy(l->be, a->dmid, a->dout, n);
    ops->copy(l->be, a->dx, a->dout, n);
    if (own_norm)
        norm_2_backward(l, batch, a, a->dx);
    else
        ops->copy(l->be, a->dbranch, a->dn, n);
    attention_backward(l, batch, a);
    if (!own_norm)
        ops->add(l->be, a->dn, a->dbranch, n);
    norm_1_backward(l, batch, a);
}

void perta_block_attend_backward(const struct perta_layer *l, const struct perta_batch *batch,
                                 const struct perta_acts *acts)
{
    const struct perta_acts own = with_aliases(l, acts), *a = &own;
    size_t n = batch->n * l->llm->hidden;
    if (l->llm->parallel) {
        parallel_backward(l, batch, a);
        return;
    }
    l->be->ops->copy(l->be, a->dmid, a->dout, n);
    norm_2_backward(l, batch, a, a->dmid);
    attention_backward(l, batch, a);
    l->be->ops->copy(l->be, a->dx, a->dmid, n);
    norm_1_backward(l, batch, a);
}

void perta_block_backward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *acts)
{
    const struct perta_acts own = with_aliases(l, acts), *a = &own;
    const struct perta_mlp_acts mlp = mlp_acts_of(l, a);
    struct perta_array dy = perta_block_branch_backward(l, batch, a);
    perta_mlp_backward(l, batch, &perta_mlp_roles, &mlp, dy, false);
    perta_block_attend_backward(l, batch, acts);
}
