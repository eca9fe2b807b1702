/* cpu_own.h - shared by the files of the CPU's backend. */
#ifndef PERTA_ESTIMATORS_COMPUTE_CPU_OWN_H
#define PERTA_ESTIMATORS_COMPUTE_CPU_OWN_H

#include <pthread.h>

#include "estimators/compute/cpu.h"
#include "estimators/compute/gemm.h"
#include "io/pool.h"

#define PERTA_CPU_WEIGHT_ROWS 1024 /* rows of a weight that are converted at a time */

struct perta_cpu_buffer {
    uint8_t *base; /* NULL: free */
    uint64_t len_bytes;
    struct perta_pool pool; /* that base is taken from; empty if the host shares base */
};

struct perta_cpu {
    struct perta_backend backend;
    struct perta_cpu_needs needs;
    struct perta_workers *workers; /* borrowed */
    struct perta_gemm *gemm;
    size_t scratch_floats;
    bool x_packed;        /* scratch starts with all of x of the previous gradient operation */
    pthread_mutex_t lock; /* guards the table below, which put() and get() read on any thread */
    struct perta_cpu_buffer *buffers; /* (n_buffers); a handle is an index plus 1 */
    uint32_t n_buffers;
};

/* The backend, or NULL after a failure: then operations do nothing. */
static inline struct perta_cpu *perta_cpu_ready(struct perta_backend *be)
{
    return be->rc ? NULL : (struct perta_cpu *)be;
}

/* The address of an array; NULL for no array. */
void *perta_cpu_at(struct perta_cpu *cpu, struct perta_array a);

/* Distribute n rows among the workers: some() is called for ranges of rows from .. to, in any
 * order. elems is the number of elements in a row. */
void perta_cpu_share_out(const struct perta_cpu *cpu, size_t n, size_t elems,
                         void (*some)(const void *args, size_t from, size_t to), const void *args);

/* Floats of a worker's room (perta_gemm_room) that attention needs, for two blocks of scores. */
size_t perta_cpu_attention_room(size_t longest);

/* ---- operations (backend.h): rows ---- */

void perta_cpu_zero(struct perta_backend *be, struct perta_array to, uint64_t n);
void perta_cpu_copy(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    uint64_t n);
void perta_cpu_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                   uint64_t n);
void perta_cpu_gather(struct perta_backend *be, struct perta_array to, struct perta_array from,
                      const uint32_t *index, size_t n, size_t H);
void perta_cpu_scatter(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       const uint32_t *index, size_t n, size_t H);
void perta_cpu_scatter_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                           const uint32_t *index, size_t n, size_t H);
void perta_cpu_scatter_add_scaled(struct perta_backend *be, struct perta_array to,
                                  struct perta_array from, const uint32_t *index, const float *by,
                                  size_t n, size_t H);
void perta_cpu_scale(struct perta_backend *be, struct perta_array x, float by, uint64_t n);
void perta_cpu_clamp_forward(struct perta_backend *be, struct perta_array x, float limit,
                             uint64_t n);
void perta_cpu_clamp_backward(struct perta_backend *be, struct perta_array dx, struct perta_array x,
                              float limit, uint64_t n);
void perta_cpu_scale_rows(struct perta_backend *be, struct perta_array x, const float *by, size_t n,
                          size_t H);
void perta_cpu_add_scaled(struct perta_backend *be, struct perta_array to, struct perta_array from,
                          float by, uint64_t n);
void perta_cpu_multiply_rows(struct perta_backend *be, struct perta_array to, struct perta_array a,
                             struct perta_array by, size_t n, size_t H);
void perta_cpu_row_dots(struct perta_backend *be, struct perta_array to, struct perta_array a,
                        struct perta_array b, size_t n, size_t width);
void perta_cpu_split(struct perta_backend *be, struct perta_array to, struct perta_array from,
                     size_t n, size_t width, size_t first, size_t block, size_t stride,
                     size_t n_blocks);
void perta_cpu_join(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    size_t n, size_t width, size_t first, size_t block, size_t stride,
                    size_t n_blocks);

/* ---- linear layers, LoRA, gradients ---- */

void perta_cpu_linear_forward(struct perta_backend *be, const struct perta_linear *linear,
                              const struct perta_runs *tiles, struct perta_array x,
                              struct perta_array y, size_t n, bool add);
void perta_cpu_linear_backward(struct perta_backend *be, const struct perta_linear *linear,
                               const struct perta_runs *tiles, struct perta_array dy,
                               struct perta_array dx, size_t n, bool add);
void perta_cpu_linear_backward_weight(struct perta_backend *be, struct perta_array dweight,
                                      struct perta_array dy, struct perta_array x, size_t n,
                                      size_t out, size_t in);
void perta_cpu_linear_backward_bias(struct perta_backend *be, struct perta_array dbias,
                                    struct perta_array dy, size_t first, size_t end, size_t out);

void perta_cpu_low_rank_forward(struct perta_backend *be, const struct perta_low_rank *lora,
                                const struct perta_runs *tiles, struct perta_array x,
                                struct perta_array y, size_t n, struct perta_array room);
void perta_cpu_low_rank_backward(struct perta_backend *be, const struct perta_low_rank *lora,
                                 const struct perta_runs *tiles, struct perta_array dy,
                                 struct perta_array dx, size_t n, struct perta_array room);
void perta_cpu_low_rank_gradient(struct perta_backend *be, const struct perta_low_rank *lora,
                                 const struct perta_runs *tiles, struct perta_array x,
                                 struct perta_array dy, struct perta_array da,
                                 struct perta_array db, size_t n, struct perta_array room);

void perta_cpu_gradient(struct perta_backend *be, const struct perta_gradient *of);
void perta_cpu_accumulate(struct perta_backend *be, struct perta_array sums,
                          struct perta_array squares, struct perta_array d, size_t n);
void perta_cpu_mean(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    double of, size_t n, bool *finite);

/* ---- the parts of a block, cross-entropy ---- */

void perta_cpu_rmsnorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                               struct perta_array y, struct perta_array rstd, struct perta_array x,
                               size_t T, size_t H);
void perta_cpu_rmsnorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                struct perta_array dx, struct perta_array dy, struct perta_array x,
                                struct perta_array rstd, size_t T, size_t H);
void perta_cpu_layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                 struct perta_array y, struct perta_array stats,
                                 struct perta_array x, size_t T, size_t H);
void perta_cpu_layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                  struct perta_array dx, struct perta_array dy,
                                  struct perta_array x, struct perta_array stats, size_t T,
                                  size_t H);
void perta_cpu_rmsnorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                       struct perta_array dweight, struct perta_array dy,
                                       struct perta_array x, struct perta_array rstd, size_t T,
                                       size_t H);
void perta_cpu_layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                         struct perta_array dweight, struct perta_array dbias,
                                         struct perta_array dy, struct perta_array x,
                                         struct perta_array stats, size_t T, size_t H);
void perta_cpu_rope_forward(struct perta_backend *be, struct perta_array x,
                            const struct perta_place *places, const struct perta_rotation *rotation,
                            size_t T, size_t n_heads, size_t D);
void perta_cpu_rope_backward(struct perta_backend *be, struct perta_array dx,
                             const struct perta_place *places,
                             const struct perta_rotation *rotation, size_t T, size_t n_heads,
                             size_t D);
void perta_cpu_attention_forward(struct perta_backend *be, const struct perta_attention *attention,
                                 struct perta_array out, struct perta_array q, struct perta_array k,
                                 struct perta_array v);
void perta_cpu_attention_backward(struct perta_backend *be, const struct perta_attention *attention,
                                  struct perta_array dq, struct perta_array dk,
                                  struct perta_array dv, struct perta_array dout,
                                  struct perta_array q, struct perta_array k, struct perta_array v,
                                  const struct perta_array of_heads[2]);
void perta_cpu_attention_past_forward(struct perta_backend *be,
                                      const struct perta_attention_past *past,
                                      struct perta_array out, struct perta_array q,
                                      struct perta_array kv);
void perta_cpu_glu_forward(struct perta_backend *be, const struct perta_activation *act,
                           struct perta_array h, struct perta_array gate, struct perta_array up,
                           size_t n);
void perta_cpu_glu_backward(struct perta_backend *be, const struct perta_activation *act,
                            struct perta_array dgate, struct perta_array dup, struct perta_array dh,
                            struct perta_array gate, struct perta_array up, size_t n);
void perta_cpu_act_forward(struct perta_backend *be, const struct perta_activation *act,
                           struct perta_array h, struct perta_array x, size_t n);
void perta_cpu_act_backward(struct perta_backend *be, const struct perta_activation *act,
                            struct perta_array dx, struct perta_array dh, struct perta_array x,
                            size_t n);
void perta_cpu_softcap_forward(struct perta_backend *be, struct perta_array x, float cap,
                               uint64_t n);
void perta_cpu_softcap_backward(struct perta_backend *be, struct perta_array dx,
                                struct perta_array y, float cap, uint64_t n);
void perta_cpu_cross_entropy_forward(struct perta_backend *be, struct perta_array logits,
                                     size_t row, size_t n_rows, size_t n, const int32_t *target,
                                     struct perta_array most, struct perta_array sums,
                                     struct perta_array of_target);
void perta_cpu_cross_entropy_backward(struct perta_backend *be, struct perta_array logits,
                                      size_t row, size_t n_rows, size_t n, const int32_t *target,
                                      struct perta_array most, struct perta_array sums,
                                      struct perta_array share);
void perta_cpu_best_forward(struct perta_backend *be, struct perta_array logits, size_t row,
                            size_t n_rows, size_t n, struct perta_array most,
                            struct perta_array best);
void perta_cpu_moments_forward(struct perta_backend *be, struct perta_array logits, size_t n_rows,
                               size_t n, struct perta_array most, struct perta_array sums,
                               struct perta_array moments);

#endif
