/* MLPs: with a gate (Shazeer 2020), down(f(gate x) * up x), and without one, down(f(up x)). The
 * activation f is perta_llm.activation. */
#include "estimators/model/part.h"

const struct perta_mlp_roles perta_mlp_roles = {PERTA_GATE, PERTA_UP, PERTA_GATE_UP, PERTA_DOWN};
const struct perta_mlp_roles perta_shared_roles = {PERTA_SHARED_GATE, PERTA_SHARED_UP,
                                                   PERTA_SHARED_GATE_UP, PERTA_SHARED_DOWN};
const struct perta_mlp_roles perta_expert_roles = {PERTA_EXPERT_GATE, PERTA_EXPERT_UP,
                                                   PERTA_EXPERT_GATE_UP, PERTA_EXPERT_DOWN};

static bool has(const struct perta_layer *l, enum perta_param param)
{
    return perta_llm_param(l->llm, l->site.layer, param) != NULL;
}

/* Of the rows of a fused tensor, which are gates and which are ups: halves, or every other one. */
struct halves {
    size_t first[2], block, stride, n_blocks;
};

static struct halves halves_of(const struct perta_layer *l, size_t width)
{
    if (l->llm->gate_up_interleaved)
        return (struct halves){{0, 1}, 1, 2, width};
    return (struct halves){{0, width}, width, width, 1};
}

void perta_mlp_inner(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_mlp_roles *roles, const struct perta_mlp_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    const struct halves halves = halves_of(l, a->width);
    size_t n = batch->n * a->width;
    if (has(l, roles->gate_up)) {
        perta_layer_linear_forward(l, batch, roles->gate_up, a->x, a->fused, false);
        ops->split(l->be, a->gate, a->fused, batch->n, 2 * a->width, halves.first[0], halves.block,
                   halves.stride, halves.n_blocks);
        ops->split(l->be, a->up, a->fused, batch->n, 2 * a->width, halves.first[1], halves.block,
                   halves.stride, halves.n_blocks);
    } else {
        if (has(l, roles->gate))
            perta_layer_linear_forward(l, batch, roles->gate, a->x, a->gate, false);
        perta_layer_linear_forward(l, batch, roles->up, a->x, a->up, false);
    }
    if (has(l, roles->gate) || has(l, roles->gate_up))
        ops->glu_forward(l->be, &l->llm->activation, a->h, a->gate, a->up, n);
    else
        ops->act_forward(l->be, &l->llm->activation, a->h, a->up, n);
}

void perta_mlp_inner_backward(const struct perta_layer *l, const struct perta_batch *batch,
                              const struct perta_mlp_roles *roles, const struct perta_mlp_acts *a,
                              bool add)
{
    const struct perta_backend_ops *ops = l->be->ops;
    const struct halves halves = halves_of(l, a->width);
    const struct perta_activation *act = &l->llm->activation;
    size_t n = batch->n * a->width;
    if (has(l, roles->gate_up)) {
        ops->glu_backward(l->be, act, a->dgate, a->dup, a->dgate, a->gate, a->up, n);
        ops->join(l->be, a->fused, a->dgate, batch->n, 2 * a->width, halves.first[0], halves.block,
                  halves.stride, halves.n_blocks);
        ops->join(l->be, a->fused, a->dup, batch->n, 2 * a->width, halves.first[1], halves.block,
                  halves.stride, halves.n_blocks);
        perta_layer_linear_backward(l, batch, roles->gate_up, a->fused, a->dx, add);
        perta_layer_linear_gradient(l, batch, roles->gate_up, a->x, a->fused, a->vector);
        return;
    }
    if (has(l, roles->gate)) {
        ops->glu_backward(l->be, act, a->dgate, a->dup, a->dgate, a->gate, a->up, n);
        perta_layer_linear_backward(l, batch, roles->gate, a->dgate, a->dx, add);
        perta_layer_linear_gradient(l, batch, roles->gate, a->x, a->dgate, a->vector);
        add = true;
    } else {
        ops->act_backward(l->be, act, a->dup, a->dgate, a->up, n);
    }
    perta_layer_linear_backward(l, batch, roles->up, a->dup, a->dx, add);
    perta_layer_linear_gradient(l, batch, roles->up, a->x, a->dup, a->vector);
}

void perta_mlp_forward(const struct perta_layer *l, const struct perta_batch *batch,
                       const struct perta_mlp_roles *roles, const struct perta_mlp_acts *a,
                       struct perta_array to, bool add)
{
    perta_mlp_inner(l, batch, roles, a);
    perta_layer_linear_forward(l, batch, roles->down, a->h, to, add);
}

void perta_mlp_backward(const struct perta_layer *l, const struct perta_batch *batch,
                        const struct perta_mlp_roles *roles, const struct perta_mlp_acts *a,
                        struct perta_array dy, bool add)
{
    perta_layer_linear_backward(l, batch, roles->down, dy, a->dgate, false);
    perta_layer_linear_gradient(l, batch, roles->down, a->h, dy, a->vector);
    perta_mlp_inner_backward(l, batch, roles, a, add);
}
