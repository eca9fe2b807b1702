/* statistic.h - from gradients to importance: the mean over samples, and the mean of squares of
 * each sample's gradient, block of rows by block of rows, written as soon as they are whole.
 *
 * Sums are float64, and every element's terms are added in the order of chunks (cut.h): the same
 * bits for every number of workers and every budget. */
#ifndef PERTA_ESTIMATORS_PASSES_STATISTIC_H
#define PERTA_ESTIMATORS_PASSES_STATISTIC_H

#include "estimators/compute/backend.h"
#include "estimators/passes/importance.h"

struct perta_statistic {
    struct perta_backend *be;                   /* borrowed, as all below */
    struct perta_importance_out *mean, *meansq; /* NULL: not wanted */
    uint64_t n_samples;

    size_t block_floats;              /* elements of a block, at most; of each of: */
    struct perta_array sums, squares; /* float64; squares: none where no squares are wanted */
    struct perta_array
        sample; /* gradient of a sample that is more than one chunk; none: no sample is */
    struct perta_array means; /* (PERTA_MEANS): to be written, by way of: */
    float *host;              /* (PERTA_MEANS) */
};

#define PERTA_MEANS (1u << 19)

/* Bytes of the backend's memory that blocks of so many elements need, all together. parts:
 * perta_chunks.parts. On the host they need PERTA_MEANS floats. */
uint64_t perta_statistic_bytes(size_t block_floats, bool meansq, bool parts);
/* The fields above the blank line are set. */
void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, bool parts,
                             struct perta_array memory, float *host);

/* Rows of a matrix n_cols wide that fit so many floats; at least 1 of n_rows. */
size_t perta_statistic_rows(size_t block_floats, size_t n_rows, size_t n_cols);

/* Begin a block of n elements; then add to it, with the backend's operations gradient (sums, squares
 * and sample set by perta_statistic_gradient) and accumulate; then end it. */
void perta_statistic_begin(struct perta_statistic *s, size_t n);
struct perta_gradient perta_statistic_gradient(const struct perta_statistic *s, size_t rows,
                                               size_t in);
/* The block, divided by the number of samples, is written as elements first.. of the tensor. Waits
 * for the backend and returns its failure. PERTA_EINPUT, with the element, where a mean is not
 * finite. */
int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err);
/* The same of sums and squares that were taken elsewhere (n float64; squares none). */
int perta_statistic_write(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                          struct perta_array sums, struct perta_array squares,
                          struct perta_err *err);

#endif
