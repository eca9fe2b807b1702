/* running.h - running mean and mean of squares over gradient samples, in float32 with
 * compensated (TwoSum) summation. Spec: docs/method.md.
 *
 * The sum of each element is the pair (sum, carry); adding x:
 *   t = sum + x; z = t - sum; carry += (sum - (t - z)) + (x - z); sum = t
 * (Knuth's TwoSum; the carry is what rounding lost). The mean is
 * (float)(((double)sum + (double)carry) / (double)n). Same bits for every instruction set. */
#ifndef PERTA_ESTIMATORS_EDIT_RUNNING_H
#define PERTA_ESTIMATORS_EDIT_RUNNING_H

#include <stdint.h>

#include "estimators/edit/edit.h"

/* One run of n elements; arrays (n) each, the caller's. sq_* are NULL where no squares are
 * wanted, sum and carry where no means are. */
struct perta_running {
    float *sum, *carry;
    float *sq_sum, *sq_carry;
    uint64_t n;
};

PERTA_API void perta_running_zero(struct perta_running *running);

/* Add one sample's gradients (n elements of view's dtype). x is converted to float32, its
 * square is one float32 product. Returns the position of the first element that is not finite
 * as float32, or UINT64_MAX when all are. */
PERTA_API uint64_t perta_running_add(struct perta_running *running,
                                     const struct perta_view *gradient);
PERTA_API uint64_t perta_running_add_isa(enum perta_isa isa, struct perta_running *running,
                                         const struct perta_view *gradient);

/* Write means of n_samples samples as F32 (n elements, little endian); mean or meansq may be
 * NULL. Returns like perta_running_add for a result that is not finite. */
PERTA_API uint64_t perta_running_finish(const struct perta_running *running, uint64_t n_samples,
                                        void *mean, void *meansq);

#endif
