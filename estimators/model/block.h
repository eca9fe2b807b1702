/* block.h - one transformer block, forward and backward, over a batch of whole sequences:
 *
 *   mid = x + attention(norm(x)),   out = mid + mlp(norm(mid))
 *
 * with the parts of the model's family (part.h). Activations are not kept for the backward pass: it
 * follows a second forward pass from x. */
#ifndef PERTA_ESTIMATORS_MODEL_BLOCK_H
#define PERTA_ESTIMATORS_MODEL_BLOCK_H

#include "estimators/model/part.h"

/* Number of floats that a batch of n tokens needs. */
size_t perta_acts_floats(const struct perta_llm *llm, size_t n);
/* memory: perta_acts_floats floats of the backend's, owned by the caller. */
void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        struct perta_array memory);

/* From acts->x to acts->out (unless layer->again), with all activations between. */
void perta_block_forward(const struct perta_layer *layer, const struct perta_batch *batch,
                         const struct perta_acts *acts);
/* After perta_block_forward: from acts->dout to acts->dx. Gradients of weights go to the layer's
 * sink. */
void perta_block_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                          const struct perta_acts *acts);

#endif
