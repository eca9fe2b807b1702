/* kernels.h - the kernels that kernels.c provides for each instruction set. Internal to
 * estimators/. */
#ifndef PERTA_ESTIMATORS_EDIT_KERNELS_H
#define PERTA_ESTIMATORS_EDIT_KERNELS_H

#include "estimators/edit/edit.h"
#include "estimators/edit/running.h"

/* Elements in a tile: the kernels work on one tile at a time, and sum its weights as one block. All
 * five inputs of a tile, widened to float32, fit in the first-level cache. */
#define PERTA_TILE 1024
/* Weight i of a block is added to lane i % 16; the lanes are then added in order. */
#define PERTA_SUM_LANES 16

typedef void perta_edit_fn(const struct perta_rule *rule, const struct perta_edit_in *in,
                           const float *alphas, uint32_t n_alphas, void *const *outs,
                           struct perta_edit_counts *counts);
typedef void perta_lora_tau_fn(const struct perta_lora *lora, uint64_t first_elem, uint64_t n,
                               float *tau);
typedef uint64_t perta_running_add_fn(struct perta_running *running,
                                      const struct perta_view *gradient);

struct perta_kernels {
    perta_edit_fn *edit_f32; /* the model is F16, BF16 or F32 */
    perta_edit_fn *edit_f64; /* the model is F64 */
    perta_running_add_fn *running_add;
    perta_lora_tau_fn *lora_tau;
};

extern const struct perta_kernels perta_kernels_v2, perta_kernels_v3, perta_kernels_v4;

const struct perta_kernels *perta_kernels_of(enum perta_isa isa);

/* Output number i + 1 of SplitMix64 (Steele et al. 2014) started at state. */
static inline uint64_t perta_random_bits(uint64_t state, uint64_t i)
{
    uint64_t z = state + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The same, uniform in [0, 1), 24 bits. */
static inline float perta_random_weight(uint64_t state, uint64_t elem)
{
    return (float)(int32_t)(perta_random_bits(state, elem) >> 40) * 0x1p-24f;
}

#endif
