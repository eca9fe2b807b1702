/* norms.h - the norms of each sample's gradient, tensor by tensor, without storing a gradient. A
 * statistic (statistic.h) adds squares of elements to them.
 *
 * What comes out is open-unlearning's: the mean over the model's tensors of the L2 norm of the
 * gradient of each (src/evals/metrics/mia/gradnorm.py). */
#ifndef PERTA_ESTIMATORS_PASSES_NORMS_H
#define PERTA_ESTIMATORS_PASSES_NORMS_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/model/family.h"
#include "io/err.h"

struct perta_norms {
    uint64_t n_samples;
    double *means; /* (n_samples): set by perta_norms_end */

    uint64_t n_tensors; /* that are complete; their norms are summed in means */
    size_t n;           /* tensors that are not */
    char (*names)[PERTA_NAME_BYTES];
    double *squares; /* (n, n_samples): sums of squares */
    double *some;    /* (n_samples): scratch of the statistic */
};

/* Bytes of the heap that norms of so many samples take. */
uint64_t perta_norms_bytes(uint64_t n_samples);
int perta_norms_open(struct perta_norms *norms, uint64_t n_samples, struct perta_err *err);
/* NULL members are allowed. */
void perta_norms_release(struct perta_norms *norms);

/* The sums of squares (n_samples) of a tensor that is not complete, to be added to. At most those of
 * one layer and the two ends of the model are open at a time. */
double *perta_norms_of(struct perta_norms *norms, const char *name);
/* All tensors that were added to so far are complete. */
void perta_norms_complete(struct perta_norms *norms);
/* The same, and divide by the number of tensors. */
void perta_norms_end(struct perta_norms *norms);

#endif
