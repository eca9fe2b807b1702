/* block.h - one transformer block, forward and backward, over a batch of whole sequences:
 *
 *   mid = x + m after(attention(norm(x))),   out = mid + m after(mlp(norm(mid)))
 *
 * with the parts of the model's family (part.h); the norms, and the norms after, are those that the
 * layer has, and m is the model's residual multiplier. In a parallel block, the MLP starts from
 * norm(x), too. The backward pass follows a forward pass: a second one from x, or the first, if
 * there is memory to keep its activations.
 *
 * The MLP of a layer may be a mixture of experts (mixture.h), which is computed between the halves
 * of a block: perta_block_attend, perta_block_add; perta_block_branch_backward,
 * perta_block_attend_backward. */
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

/* ---- the halves, of a layer with a mixture of experts ---- */

/* From acts->x to acts->mid and acts->n2, the mixture's input. */
void perta_block_attend(const struct perta_layer *layer, const struct perta_batch *batch,
                        const struct perta_acts *acts);
/* acts->out from acts->mid and acts->branch_2, what the mixture gave. */
void perta_block_add(const struct perta_layer *layer, const struct perta_batch *batch,
                     const struct perta_acts *acts);
/* The gradient of branch_2, from acts->dout: acts->dout itself or acts->dbranch. */
struct perta_array perta_block_branch_backward(const struct perta_layer *layer,
                                               const struct perta_batch *batch,
                                               const struct perta_acts *acts);
/* From acts->dout and acts->dn, the gradient of n2, to acts->dx. */
void perta_block_attend_backward(const struct perta_layer *layer, const struct perta_batch *batch,
                                 const struct perta_acts *acts);

#endif
