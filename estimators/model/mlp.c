/* The gated MLP, SwiGLU (Shazeer 2020): out += down(silu(gate n2) * up n2). */
#include "estimators/model/part.h"

static void forward(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    struct perta_linear gate = perta_layer_linear(l, PERTA_GATE);
    ops->linear_forward(l->be, &gate, &batch->tiles, a->n2, a->gate, n, false);
    struct perta_linear up = perta_layer_linear(l, PERTA_UP);
    ops->linear_forward(l->be, &up, &batch->tiles, a->n2, a->up, n, false);
    ops->swiglu_forward(l->be, a->h, a->gate, a->up, n * l->llm->intermediate);
    struct perta_linear down = perta_layer_linear(l, PERTA_DOWN);
    ops->linear_forward(l->be, &down, &batch->tiles, a->h, a->out, n, true);
}

static void backward(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    struct perta_linear down = perta_layer_linear(l, PERTA_DOWN);
    ops->linear_backward(l->be, &down, &batch->tiles, a->dout, a->dgate, n, false);
    perta_layer_linear_gradient(l, batch, PERTA_DOWN, a->h, a->dout, a->vector);
    ops->swiglu_backward(l->be, a->dgate, a->dup, a->dgate, a->gate, a->up,
                         n * l->llm->intermediate);
    struct perta_linear gate = perta_layer_linear(l, PERTA_GATE);
    ops->linear_backward(l->be, &gate, &batch->tiles, a->dgate, a->dn, n, false);
    perta_layer_linear_gradient(l, batch, PERTA_GATE, a->n2, a->dgate, a->vector);
    struct perta_linear up = perta_layer_linear(l, PERTA_UP);
    ops->linear_backward(l->be, &up, &batch->tiles, a->dup, a->dn, n, true);
    perta_layer_linear_gradient(l, batch, PERTA_UP, a->n2, a->dup, a->vector);
}

const struct perta_mlp_part perta_gated_mlp_part = {forward, backward};
