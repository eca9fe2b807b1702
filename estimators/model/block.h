/* block.h - one transformer block, forward and backward, over a batch of whole sequences:
 *
 *   mid = x + attention(norm(x)),   out = mid + mlp(norm(mid))
 *
 * with the parts of the model's family (part.h). The backward pass follows a forward pass: a second
 * one from x, or the first, if there is memory to keep its activations. */
#ifndef PERTA_ESTIMATORS_MODEL_BLOCK_H
#define PERTA_ESTIMATORS_MODEL_BLOCK_H

#include "estimators/model/part.h"

/* Number of floats that a batch of n tokens needs. */
size_t perta_acts_floats(const struct perta_llm *llm, size_t n);
/* memory: perta_acts_floats floats of the backend's, owned by the caller. */
void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        struct perta_array memory);

/* The same with what the backward pass needs of the forward pass in kept (perta_acts_kept_floats),
 * and everything else in rest (of perta_acts_floats, at least what remains of them). */
size_t perta_acts_kept_floats(const struct perta_llm *llm, size_t n);
void perta_acts_lay_out_in(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                           struct perta_array kept, struct perta_array rest);

/* From acts->x to acts->out (unless layer->again), with all activations between. */
void perta_block_forward(const struct perta_layer *layer, const struct perta_batch *batch,
                         const struct perta_acts *acts);
/* After perta_block_forward: from acts->dout to acts->dx. Gradients of weights go to the layer's
 * sink. */
void perta_block_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                          const struct perta_acts *acts);

#endif
