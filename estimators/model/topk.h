/* topk.h - which of n numbers are the largest, with ties broken as PyTorch breaks them. */
#ifndef PERTA_ESTIMATORS_MODEL_TOPK_H
#define PERTA_ESTIMATORS_MODEL_TOPK_H

#include <stddef.h>
#include <stdint.h>

#define PERTA_TOPK_MAX 1024 /* numbers */

/* which (k) = the indices of the k largest of x (n), in descending order; NaN counts as larger than
 * any number. k <= n <= PERTA_TOPK_MAX. Among equal numbers, both the choice and the order are
 * those of torch.topk on a CPU: its algorithms are not stable, and are written out here. The choice
 * is also that of torch.topk(sorted=False), whose order is another. */
void perta_topk(const float *x, size_t n, size_t k, uint32_t *which);

#endif
