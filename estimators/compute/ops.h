/* ops.h - the parts of a transformer block that are no matrix products with weights, in float32:
 * one _forward and one _backward each. Formulas: docs/estimate.md. Arrays are row-major; T
 * tokens, H hidden, I intermediate, D head_dim. Rows are shared out among workers; results do not
 * depend on their number. */
#ifndef PERTA_ESTIMATORS_COMPUTE_OPS_H
#define PERTA_ESTIMATORS_COMPUTE_OPS_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/gemm.h"
#include "estimators/compute/place.h"

/* y (T, H) = x (T, H) * rstd * weight (H); rstd (T) = 1 / sqrt(mean(x^2) + eps). */
void perta_rmsnorm_forward(struct perta_workers *workers, float *y, float *rstd, const float *x,
                           const float *weight, size_t T, size_t H, float eps);
/* dx (T, H) += gradient through x, of dy (T, H). */
void perta_rmsnorm_backward(struct perta_workers *workers, float *dx, const float *dy,
                            const float *x, const float *rstd, const float *weight, size_t T,
                            size_t H);
/* dweight (H) += sum over tokens of dy * x * rstd. */
void perta_rmsnorm_backward_weight(struct perta_workers *workers, float *dweight, const float *dy,
                                   const float *x, const float *rstd, size_t T, size_t H);

/* Rotate x (T, n_heads, D) by the angles position * inv_freq (D / 2), halves of each head
 * paired, as transformers does; position is that of places (T). backward turns dx the other way. */
void perta_rope_forward(struct perta_workers *workers, float *x, const struct perta_place *places,
                        const float *inv_freq, size_t T, size_t n_heads, size_t D);
void perta_rope_backward(struct perta_workers *workers, float *dx, const struct perta_place *places,
                         const float *inv_freq, size_t T, size_t n_heads, size_t D);

/* h (T, I) = silu(gate) * up. */
void perta_swiglu_forward(struct perta_workers *workers, float *h, const float *gate,
                          const float *up, size_t n);
/* dgate, dup = gradients through gate and up, of dh; dgate may be dh. */
void perta_swiglu_backward(struct perta_workers *workers, float *dgate, float *dup, const float *dh,
                           const float *gate, const float *up, size_t n);

/* Cross-entropy, a block of the vocabulary at a time: logits (n, n_rows) of entries row ..
 * row + n_rows. forward, for every block in turn, keeps the running maximum and sum of
 * exponentials (Milakov & Gimelshein 2018), each (n), which begin as -INFINITY and 0, and the
 * logit of target (n) once it comes by. */
void perta_cross_entropy_forward(struct perta_workers *workers, const float *logits, size_t row,
                                 size_t n_rows, size_t n, const int32_t *target, float *most,
                                 double *sums, float *of_target);
/* Likewise the running maximum, which begins as -INFINITY, and where it is: of equals the first. */
void perta_best_forward(struct perta_workers *workers, const float *logits, size_t row,
                        size_t n_rows, size_t n, float *most, int32_t *best);
/* logits become their gradients: share (n) * (softmax - one at target), from what forward
 * left in most and sums. A log of the sum, added to a large most, would be rounded: the gradient of
 * a target that is nearly certain is what is left after taking away one. */
void perta_cross_entropy_backward(struct perta_workers *workers, float *logits, size_t row,
                                  size_t n_rows, size_t n, const int32_t *target, const float *most,
                                  const double *sums, const float *share);

/* Attention within each of a batch's sequences: q, out (n, n_heads, D), k, v (n, n_kv_heads,
 * D); every n_heads / n_kv_heads query heads share one of k and v. A token sees what its place says,
 * but those that stand window or more before it; where that is nothing, out is 0, as PyTorch's
 * scaled_dot_product_attention has it. Tokens that are seen stand in the order of at. */
struct perta_attention {
    struct perta_runs sequences;
    const struct perta_place *places; /* (n) */
    size_t n_heads, n_kv_heads, D;
    uint32_t window; /* UINT32_MAX: all */
};
/* Floats that a worker needs (perta_gemm_room). */
size_t perta_attention_room(size_t longest);
int perta_attention_forward(struct perta_gemm *gemm, const struct perta_attention *attention,
                            float *out, const float *q, const float *k, const float *v,
                            struct perta_err *err);
/* dq (n, n_heads, D), dk, dv (n, n_kv_heads, D) are set, from dout and what forward was given.
 * of_heads (2, n, n_heads, D) is scratch. */
int perta_attention_backward(struct perta_gemm *gemm, const struct perta_attention *attention,
                             float *dq, float *dk, float *dv, const float *dout, const float *q,
                             const float *k, const float *v, float *const of_heads[2],
                             struct perta_err *err);

#endif
