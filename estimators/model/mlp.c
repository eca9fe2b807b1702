/* The gated MLP, SwiGLU (Shazeer 2020): out += down(silu(gate n2) * up n2). */
#include "estimators/model/part.h"

static void forward(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    perta_layer_linear_forward(l, batch, PERTA_GATE, a->n2, a->gate, false);
    perta_layer_linear_forward(l, batch, PERTA_UP, a->n2, a->up, false);
    ops->swiglu_forward(l->be, a->h, a->gate, a->up, n * l->llm->intermediate);
    if (!l->again)
        perta_layer_linear_forward(l, batch, PERTA_DOWN, a->h, a->out, true);
}

static void backward(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    perta_layer_linear_backward(l, batch, PERTA_DOWN, a->dout, a->dgate, false);
    perta_layer_linear_gradient(l, batch, PERTA_DOWN, a->h, a->dout, a->vector);
    ops->swiglu_backward(l->be, a->dgate, a->dup, a->dgate, a->gate, a->up,
                         n * l->llm->intermediate);
    perta_layer_linear_backward(l, batch, PERTA_GATE, a->dgate, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_GATE, a->n2, a->dgate, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_UP, a->dup, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_UP, a->n2, a->dup, a->vector);
}

const struct perta_mlp_part perta_gated_mlp_part = {forward, backward};
