/* running.h - running mean and mean of squares over the gradients of samples, in float32 with
 * compensated (TwoSum) summation. Spec: docs/method.md.
 *
 * The sum of each element is the pair (sum, carry). Adding x:
 *   t = sum + x; z = t - sum; carry += (sum - (t - z)) + (x - z); sum = t
 * (Knuth's TwoSum; carry collects what rounding loses.) The mean is
 * (float)(((double)sum + (double)carry) / (double)n). The same bits on every instruction set. */
#ifndef PERTA_ESTIMATORS_EDIT_RUNNING_H
#define PERTA_ESTIMATORS_EDIT_RUNNING_H

#include <stdint.h>

#include "estimators/edit/edit.h"

/* The state for a run of n elements. The caller owns the arrays (n). sq_sum and sq_carry are NULL
 * if no mean of squares is wanted, sum and carry if no mean is wanted. */
struct perta_running {
    float *sum, *carry;
    float *sq_sum, *sq_carry;
    uint64_t n;
};

PERTA_API void perta_running_zero(struct perta_running *running);

/* Add the gradients of one sample: n elements of the view's dtype. An element is converted to
 * float32; its square is one float32 product. Returns the index of the first element that is not
 * finite as float32, or UINT64_MAX if all are. */
PERTA_API uint64_t perta_running_add(struct perta_running *running,
                                     const struct perta_view *gradient);
PERTA_API uint64_t perta_running_add_isa(enum perta_isa isa, struct perta_running *running,
                                         const struct perta_view *gradient);

/* Write the means over n_samples samples as F32 (n elements, little endian). mean or meansq may be
 * NULL. Returns the index of the first result that is not finite, or UINT64_MAX if all are. */
PERTA_API uint64_t perta_running_finish(const struct perta_running *running, uint64_t n_samples,
                                        void *mean, void *meansq);

#endif
