/* MLPs: with a gate (Shazeer 2020), out += down(f(gate n2) * up n2), and without one,
 * out += down(f(up n2)). The activation f is perta_llm.activation. */
#include "estimators/model/part.h"

/* ---- with a gate ---- */

static void gated_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    perta_layer_linear_forward(l, batch, PERTA_GATE, a->n2, a->gate, false);
    perta_layer_linear_forward(l, batch, PERTA_UP, a->n2, a->up, false);
    ops->glu_forward(l->be, &l->llm->activation, a->h, a->gate, a->up, n * l->llm->intermediate);
    if (!l->again)
        perta_layer_linear_forward(l, batch, PERTA_DOWN, a->h, a->out, true);
}

static void gated_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a)
{
    const struct perta_backend_ops *ops = l->be->ops;
    size_t n = batch->n;
    perta_layer_linear_backward(l, batch, PERTA_DOWN, a->dout, a->dgate, false);
    perta_layer_linear_gradient(l, batch, PERTA_DOWN, a->h, a->dout, a->vector);
    ops->glu_backward(l->be, &l->llm->activation, a->dgate, a->dup, a->dgate, a->gate, a->up,
                      n * l->llm->intermediate);
    perta_layer_linear_backward(l, batch, PERTA_GATE, a->dgate, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_GATE, a->n2, a->dgate, a->vector);
    perta_layer_linear_backward(l, batch, PERTA_UP, a->dup, a->dn, true);
    perta_layer_linear_gradient(l, batch, PERTA_UP, a->n2, a->dup, a->vector);
}

const struct perta_mlp_part perta_gated_mlp_part = {gated_forward, gated_backward};

/* ---- without ---- */

static void plain_forward(const struct perta_layer *l, const struct perta_batch *batch,
                          const struct perta_acts *a)
{
    perta_layer_linear_forward(l, batch, PERTA_UP, a->n2, a->up, false);
    l->be->ops->act_forward(l->be, &l->llm->activation, a->h, a->up,
                            batch->n * l->llm->intermediate);
    if (!l->again)
        perta_layer_linear_forward(l, batch, PERTA_DOWN, a->h, a->out, true);
}

static void plain_backward(const struct perta_layer *l, const struct perta_batch *batch,
                           const struct perta_acts *a)
{
    perta_layer_linear_backward(l, batch, PERTA_DOWN, a->dout, a->dup, false);
    perta_layer_linear_gradient(l, batch, PERTA_DOWN, a->h, a->dout, a->vector);
    l->be->ops->act_backward(l->be, &l->llm->activation, a->dup, a->dup, a->up,
                             batch->n * l->llm->intermediate);
    perta_layer_linear_backward(l, batch, PERTA_UP, a->dup, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_UP, a->n2, a->dup, a->vector);
}

const struct perta_mlp_part perta_plain_mlp_part = {plain_forward, plain_backward};
