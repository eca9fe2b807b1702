/* mixture.h - the parts of a mixture of experts, forward and backward:
 *
 *   y = sum over a token's experts e of weight_e expert_e(x) + shared(x)
 *
 * with x = acts->n2. An expert is an MLP; the shared expert, if there is one, is an MLP that every
 * token goes to, times the sigmoid of its own gate if it has one. The router (route.h) is computed
 * on the host from acts->router. Which tokens go to an expert, and in which order all this happens,
 * is the caller's (estimators/passes/experts.c). */
#ifndef PERTA_ESTIMATORS_MODEL_MIXTURE_H
#define PERTA_ESTIMATORS_MODEL_MIXTURE_H

#include "estimators/model/part.h"

/* acts->router (n, n_experts) = logits of the experts. */
void perta_router_forward(const struct perta_layer *layer, const struct perta_batch *batch,
                          const struct perta_acts *acts);
/* From acts->router, which now holds the gradients of the logits: acts->dn += the gradient of
 * n2. */
void perta_router_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                           const struct perta_acts *acts);

/* acts->branch_2 = what the shared expert gives; zeros if there is none. */
void perta_shared_forward(const struct perta_layer *layer, const struct perta_batch *batch,
                          const struct perta_acts *acts);
/* acts->dn += the gradient of n2, from dy (n, H). acts->branch_2 is overwritten. */
void perta_shared_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                           const struct perta_acts *acts, struct perta_array dy);

/* Activations of one expert, for n rows. */
struct perta_expert_acts {
    struct perta_mlp_acts mlp;   /* x, and all that follows from it */
    struct perta_array y, dy;    /* (n, H) */
    struct perta_array weighted; /* (n, H): dy (or x) times the rows' weights */
    struct perta_array dweights; /* (n): gradients of the weights */
};

size_t perta_expert_floats(const struct perta_llm *llm, size_t n);
void perta_expert_lay_out(struct perta_expert_acts *acts, const struct perta_llm *llm, size_t n,
                          struct perta_array memory);

/* acts->y from acts->mlp.x; if the router's weights scale the inputs, x is scaled. weights: host
 * (n), borrowed until the next wait. Rows are the batch's; the layer's site is the expert's. */
void perta_expert_forward(const struct perta_layer *layer, const struct perta_batch *batch,
                          const struct perta_expert_acts *acts, const float *weights);
/* From acts->dy, the gradient of the mixture's sum, and acts->mlp.x to acts->mlp.dx and
 * acts->dweights. Gradients of weights go to the sink. */
void perta_expert_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                           const struct perta_expert_acts *acts, const float *weights);

#endif
