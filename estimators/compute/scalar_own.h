/* scalar_own.h - shared by the files of the reference backend. */
#ifndef PERTA_ESTIMATORS_COMPUTE_SCALAR_OWN_H
#define PERTA_ESTIMATORS_COMPUTE_SCALAR_OWN_H

#include "estimators/compute/scalar.h"

/* The address of an array of n numbers, after a check of its bounds; NULL for no array. */
float *perta_scalar_floats(struct perta_backend *be, struct perta_array a, uint64_t n);
double *perta_scalar_doubles(struct perta_backend *be, struct perta_array a, uint64_t n);
void *perta_scalar_bytes(struct perta_backend *be, struct perta_array a, uint64_t len_bytes);

/* ---- operations (backend.h): rows ---- */

void perta_scalar_zero(struct perta_backend *be, struct perta_array to, uint64_t n);
void perta_scalar_copy(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       uint64_t n);
void perta_scalar_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                      uint64_t n);
void perta_scalar_gather(struct perta_backend *be, struct perta_array to, struct perta_array from,
                         const uint32_t *index, size_t n, size_t H);
void perta_scalar_scatter(struct perta_backend *be, struct perta_array to, struct perta_array from,
                          const uint32_t *index, size_t n, size_t H);
void perta_scalar_scatter_add(struct perta_backend *be, struct perta_array to,
                              struct perta_array from, const uint32_t *index, size_t n, size_t H);
void perta_scalar_scatter_add_scaled(struct perta_backend *be, struct perta_array to,
                                     struct perta_array from, const uint32_t *index,
                                     const float *by, size_t n, size_t H);
void perta_scalar_scale(struct perta_backend *be, struct perta_array x, float by, uint64_t n);
void perta_scalar_clamp_forward(struct perta_backend *be, struct perta_array x, float limit,
                                uint64_t n);
void perta_scalar_clamp_backward(struct perta_backend *be, struct perta_array dx,
                                 struct perta_array x, float limit, uint64_t n);
void perta_scalar_scale_rows(struct perta_backend *be, struct perta_array x, const float *by,
                             size_t n, size_t H);
void perta_scalar_add_scaled(struct perta_backend *be, struct perta_array to,
                             struct perta_array from, float by, uint64_t n);
void perta_scalar_multiply_rows(struct perta_backend *be, struct perta_array to,
                                struct perta_array a, struct perta_array by, size_t n, size_t H);
void perta_scalar_row_dots(struct perta_backend *be, struct perta_array to, struct perta_array a,
                           struct perta_array b, size_t n, size_t width);
void perta_scalar_split(struct perta_backend *be, struct perta_array to, struct perta_array from,
                        size_t n, size_t width, size_t first, size_t block, size_t stride,
                        size_t n_blocks);
void perta_scalar_join(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       size_t n, size_t width, size_t first, size_t block, size_t stride,
                       size_t n_blocks);

/* ---- linear layers, LoRA, gradients, training ---- */

void perta_scalar_linear_forward(struct perta_backend *be, const struct perta_linear *linear,
                                 const struct perta_runs *tiles, struct perta_array x,
                                 struct perta_array y, size_t n, bool add);
void perta_scalar_linear_backward(struct perta_backend *be, const struct perta_linear *linear,
                                  const struct perta_runs *tiles, struct perta_array dy,
                                  struct perta_array dx, size_t n, bool add);
void perta_scalar_linear_backward_weight(struct perta_backend *be, struct perta_array dweight,
                                         struct perta_array dy, struct perta_array x, size_t n,
                                         size_t out, size_t in);
void perta_scalar_linear_backward_bias(struct perta_backend *be, struct perta_array dbias,
                                       struct perta_array dy, size_t first, size_t end, size_t out);
void perta_scalar_low_rank_forward(struct perta_backend *be, const struct perta_low_rank *lora,
                                   const struct perta_runs *tiles, struct perta_array x,
                                   struct perta_array y, size_t n, struct perta_array room);
void perta_scalar_low_rank_backward(struct perta_backend *be, const struct perta_low_rank *lora,
                                    const struct perta_runs *tiles, struct perta_array dy,
                                    struct perta_array dx, size_t n, struct perta_array room);
void perta_scalar_low_rank_gradient(struct perta_backend *be, const struct perta_low_rank *lora,
                                    const struct perta_runs *tiles, struct perta_array x,
                                    struct perta_array dy, struct perta_array da,
                                    struct perta_array db, size_t n, struct perta_array room);
void perta_scalar_gradient(struct perta_backend *be, const struct perta_gradient *gradient);
void perta_scalar_accumulate(struct perta_backend *be, struct perta_array sums,
                             struct perta_array squares, struct perta_array d, size_t n);
void perta_scalar_mean(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       double of, size_t n, bool *finite);
void perta_scalar_adamw(struct perta_backend *be, struct perta_array weight,
                        struct perta_array first, struct perta_array second,
                        struct perta_array gradient, uint64_t n, float learning_rate,
                        float weight_decay, uint64_t step);

/* ---- the parts of a block, cross-entropy ---- */

void perta_scalar_rmsnorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                  struct perta_array y, struct perta_array rstd,
                                  struct perta_array x, size_t T, size_t H);
void perta_scalar_rmsnorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                   struct perta_array dx, struct perta_array dy,
                                   struct perta_array x, struct perta_array rstd, size_t T,
                                   size_t H);
void perta_scalar_rmsnorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                          struct perta_array dweight, struct perta_array dy,
                                          struct perta_array x, struct perta_array rstd, size_t T,
                                          size_t H);
void perta_scalar_layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                    struct perta_array y, struct perta_array stats,
                                    struct perta_array x, size_t T, size_t H);
void perta_scalar_layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                     struct perta_array dx, struct perta_array dy,
                                     struct perta_array x, struct perta_array stats, size_t T,
                                     size_t H);
void perta_scalar_layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                            struct perta_array dweight, struct perta_array dbias,
                                            struct perta_array dy, struct perta_array x,
                                            struct perta_array stats, size_t T, size_t H);
void perta_scalar_rope_forward(struct perta_backend *be, struct perta_array x,
                               const struct perta_place *places,
                               const struct perta_rotation *rotation, size_t T, size_t n_heads,
                               size_t D);
void perta_scalar_rope_backward(struct perta_backend *be, struct perta_array dx,
                                const struct perta_place *places,
                                const struct perta_rotation *rotation, size_t T, size_t n_heads,
                                size_t D);
void perta_scalar_attention_forward(struct perta_backend *be,
                                    const struct perta_attention *attention, struct perta_array out,
                                    struct perta_array q, struct perta_array k,
                                    struct perta_array v);
void perta_scalar_attention_backward(struct perta_backend *be,
                                     const struct perta_attention *attention, struct perta_array dq,
                                     struct perta_array dk, struct perta_array dv,
                                     struct perta_array dout, struct perta_array q,
                                     struct perta_array k, struct perta_array v,
                                     const struct perta_array of_heads[2]);
void perta_scalar_attention_past_forward(struct perta_backend *be,
                                         const struct perta_attention_past *past,
                                         struct perta_array out, struct perta_array q,
                                         struct perta_array kv);
void perta_scalar_glu_forward(struct perta_backend *be, const struct perta_activation *act,
                              struct perta_array h, struct perta_array gate, struct perta_array up,
                              size_t n);
void perta_scalar_glu_backward(struct perta_backend *be, const struct perta_activation *act,
                               struct perta_array dgate, struct perta_array dup,
                               struct perta_array dh, struct perta_array gate,
                               struct perta_array up, size_t n);
void perta_scalar_act_forward(struct perta_backend *be, const struct perta_activation *act,
                              struct perta_array h, struct perta_array x, size_t n);
void perta_scalar_act_backward(struct perta_backend *be, const struct perta_activation *act,
                               struct perta_array dx, struct perta_array dh, struct perta_array x,
                               size_t n);
void perta_scalar_softcap_forward(struct perta_backend *be, struct perta_array x, float cap,
                                  uint64_t n);
void perta_scalar_softcap_backward(struct perta_backend *be, struct perta_array dx,
                                   struct perta_array y, float cap, uint64_t n);
void perta_scalar_cross_entropy_forward(struct perta_backend *be, struct perta_array logits,
                                        size_t row, size_t n_rows, size_t n, const int32_t *target,
                                        struct perta_array most, struct perta_array sums,
                                        struct perta_array of_target);
void perta_scalar_cross_entropy_backward(struct perta_backend *be, struct perta_array logits,
                                         size_t row, size_t n_rows, size_t n, const int32_t *target,
                                         struct perta_array most, struct perta_array sums,
                                         struct perta_array share);
void perta_scalar_best_forward(struct perta_backend *be, struct perta_array logits, size_t row,
                               size_t n_rows, size_t n, struct perta_array most,
                               struct perta_array best);
void perta_scalar_moments_forward(struct perta_backend *be, struct perta_array logits,
                                  size_t n_rows, size_t n, struct perta_array most,
                                  struct perta_array sums, struct perta_array moments);

#endif
