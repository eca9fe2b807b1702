#include "estimators/model/mixture.h"

/* ---- the router ---- */

void perta_router_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    perta_layer_linear_forward(l, batch, PERTA_ROUTER, a->n2, a->router, false);
}

void perta_router_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a)
{
    perta_layer_linear_backward(l, batch, PERTA_ROUTER, a->router, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_ROUTER, a->n2, a->router, a->vector);
}

/* ---- the shared expert ---- */

static bool has(const struct perta_layer *l, enum perta_param param)
{
    return perta_llm_param(l->llm, l->site.layer, param) != NULL;
}

static struct perta_mlp_acts shared_acts(const struct perta_layer *l, const struct perta_acts *a)
{
    return (struct perta_mlp_acts){
        a->n2,    a->dn,  a->gate,  a->up,     a->h,
        a->dgate, a->dup, a->fused, a->vector, l->llm->shared_intermediate};
}

static const struct perta_activation sigmoid = {.kind = PERTA_SIGMOID};

void perta_shared_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    const struct perta_mlp_acts mlp = shared_acts(l, a);
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, H = l->llm->hidden;
    if (!has(l, PERTA_SHARED_DOWN)) {
        ops->zero(l->be, a->branch_2, n * H);
        return;
    }
    perta_mlp_forward(l, batch, &perta_shared_roles, &mlp, a->branch_2, false);
    if (!has(l, PERTA_SHARED_SCORE))
        return;
    perta_layer_linear_forward(l, batch, PERTA_SHARED_SCORE, a->n2, a->score, false);
    ops->act_forward(l->be, &sigmoid, a->dscore, a->score, n);
    ops->multiply_rows(l->be, a->branch_2, a->branch_2, a->dscore, n, H);
}

/* s = sigmoid(score): y = s shared, dshared = s dy, ds = dy . shared. */
static struct perta_array score_backward(const struct perta_layer *l,
                                         const struct perta_batch *batch,
                                         const struct perta_acts *a, struct perta_array dy)
{
    const struct perta_mlp_acts mlp = shared_acts(l, a);
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, H = l->llm->hidden;
    perta_layer_linear_forward(l, batch, PERTA_SHARED_SCORE, a->n2, a->score, false);
    perta_layer_linear_forward(l, batch, perta_shared_roles.down, mlp.h, a->branch_2, false);
    ops->row_dots(l->be, a->dscore, a->branch_2, dy, n, H);
    ops->act_backward(l->be, &sigmoid, a->dscore, a->dscore, a->score, n);
    perta_layer_linear_backward(l, batch, PERTA_SHARED_SCORE, a->dscore, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_SHARED_SCORE, a->n2, a->dscore, a->vector);
    ops->act_forward(l->be, &sigmoid, a->dscore, a->score, n);
    ops->multiply_rows(l->be, a->branch_2, dy, a->dscore, n, H);
    return a->branch_2;
}

void perta_shared_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a, struct perta_array dy)
{
    const struct perta_mlp_acts mlp = shared_acts(l, a);
    if (!has(l, PERTA_SHARED_DOWN))
        return;
    perta_mlp_inner(l, batch, &perta_shared_roles, &mlp);
    if (has(l, PERTA_SHARED_SCORE))
        dy = score_backward(l, batch, a, dy);
    perta_mlp_backward(l, batch, &perta_shared_roles, &mlp, dy, true);
}

/* ---- an expert ---- */

static size_t lay_out(struct perta_expert_acts *a, const struct perta_llm *llm, size_t n,
                      struct perta_array memory)
{
    size_t H = llm->hidden, I = llm->expert_intermediate, at = 0;
    bool fused = perta_llm_param(llm, PERTA_ANY_LAYER, PERTA_EXPERT_GATE_UP);
    struct perta_array *const hidden[] = {&a->mlp.x, &a->mlp.dx, &a->y, &a->dy, &a->weighted};
    struct perta_array *const inner[] = {&a->mlp.gate, &a->mlp.up, &a->mlp.h, &a->mlp.dgate,
                                         &a->mlp.dup};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        *hidden[i] = perta_array_take(memory, &at, n * H);
    for (size_t i = 0; i < sizeof inner / sizeof *inner; i++)
        *inner[i] = perta_array_take(memory, &at, n * I);
    a->mlp.fused = perta_array_take(memory, &at, fused ? n * 2 * I : 0);
    a->dweights = perta_array_take(memory, &at, n);
    a->mlp.vector = perta_array_take(memory, &at, perta_llm_widest(llm));
    a->mlp.width = I;
    return at;
}

size_t perta_expert_floats(const struct perta_llm *llm, size_t n)
{
    struct perta_expert_acts acts;
    return llm->n_experts ? lay_out(&acts, llm, n, (struct perta_array){0}) : 0;
}

void perta_expert_lay_out(struct perta_expert_acts *acts, const struct perta_llm *llm, size_t n,
                          struct perta_array memory)
{
    lay_out(acts, llm, n, memory);
}

void perta_expert_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_expert_acts *a, const float *weights)
{
    if (l->llm->router.scales_input)
        l->be->ops->scale_rows(l->be, a->mlp.x, weights, batch->n, l->llm->hidden);
    perta_mlp_forward(l, batch, &perta_expert_roles, &a->mlp, a->y, false);
}

/* The weights scale what the expert gives, y = down h + b: dh = weight (down^T d), and
 * dweight = d . y = (down^T d) . h + d . b. */
static void backward_of_output(const struct perta_layer *l, const struct perta_batch *batch,
                               const struct perta_expert_acts *a, const float *weights)
{
    const struct perta_backend_ops *ops = l->be->ops;
    const enum perta_param down = perta_expert_roles.down;
    const struct perta_linear bias = {
        perta_layer_vector(l, down + 1), PERTA_F32, 1, l->llm->hidden, {0}, false};
    size_t n = batch->n, H = l->llm->hidden;
    perta_mlp_inner(l, batch, &perta_expert_roles, &a->mlp);
    perta_layer_linear_backward(l, batch, down, a->dy, a->mlp.dgate, false);
    ops->row_dots(l->be, a->dweights, a->mlp.h, a->mlp.dgate, n, a->mlp.width);
    if (perta_array_is(bias.weight))
        ops->linear_forward(l->be, &bias, &batch->tiles, a->dy, a->dweights, n, true);
    ops->scale_rows(l->be, a->mlp.dgate, weights, n, a->mlp.width);
    ops->copy(l->be, a->weighted, a->dy, n * H);
    ops->scale_rows(l->be, a->weighted, weights, n, H);
    perta_layer_linear_gradient(l, batch, down, a->mlp.h, a->weighted, a->mlp.vector);
    perta_mlp_inner_backward(l, batch, &perta_expert_roles, &a->mlp, false);
}

/* The weights scale its input x: dx = weight dx', dweight = x . dx'. */
static void backward_of_input(const struct perta_layer *l, const struct perta_batch *batch,
                              const struct perta_expert_acts *a, const float *weights)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n, H = l->llm->hidden;
    ops->copy(l->be, a->weighted, a->mlp.x, n * H);
    ops->scale_rows(l->be, a->mlp.x, weights, n, H);
    perta_mlp_inner(l, batch, &perta_expert_roles, &a->mlp);
    perta_mlp_backward(l, batch, &perta_expert_roles, &a->mlp, a->dy, false);
    ops->row_dots(l->be, a->dweights, a->weighted, a->mlp.dx, n, H);
    ops->scale_rows(l->be, a->mlp.dx, weights, n, H);
}

void perta_expert_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_expert_acts *a, const float *weights)
{
    if (l->llm->router.scales_input)
        backward_of_input(l, batch, a, weights);
    else
        backward_of_output(l, batch, a, weights);
}
