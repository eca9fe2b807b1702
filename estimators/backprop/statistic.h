/* statistic.h - from gradients to importance: the mean over samples, and the mean of squares of
 * each sample's gradient, block of rows by block of rows, written as soon as they are whole. */
#ifndef PERTA_BACKPROP_STATISTIC_H
#define PERTA_BACKPROP_STATISTIC_H

#include "estimators/backprop/gemm.h"
#include "estimators/backprop/store.h"
#include "estimators/importance.h"

struct perta_statistic {
    struct perta_gemm *gemm;
    struct perta_importance_out *mean, *meansq; /* NULL: not wanted */
    uint64_t n_samples;
    size_t block_floats;         /* of each of: */
    float *sum, *square, *one;   /* sums over samples, and one sample's gradient */
};

/* Floats that blocks of so many need, all together. */
size_t perta_statistic_floats(size_t block_floats, bool meansq);
void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, float *memory);

/* Rows of a matrix n_cols wide that fit a block; at least 1 of n_rows. */
size_t perta_statistic_rows(const struct perta_statistic *s, size_t n_rows, size_t n_cols);

/* Begin a block of n floats; then add to it; then end it: divided by the number of samples it
 * is written as floats first.. of the tensor. PERTA_EINPUT, with the element, where that is not
 * finite. */
void perta_statistic_begin(struct perta_statistic *s, size_t n);
/* Where the next sample's gradient is to be put or added: one sample's (zeroed) if squares are
 * wanted, else the sum. */
float *perta_statistic_target(struct perta_statistic *s, size_t n);
/* The sample whose gradient stands at target is whole. */
void perta_statistic_sample(struct perta_statistic *s, size_t n);
int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err);

/* The gradient of a weight (out, in): over samples, of dy^T x. dy, x hold all tokens; segment i
 * is tokens starts[i] .. starts[i + 1]: samples where squares are wanted, else any. room (as
 * perta_store_get wants it) for the longest segment: (longest, in) and (longest, block rows). */
struct perta_segments {
    size_t n, longest;
    const size_t *starts; /* (n + 1) */
};
int perta_statistic_linear(struct perta_statistic *s, const char *name,
                           const struct perta_store *x, const struct perta_store *dy,
                           const struct perta_segments *segments, float *room,
                           struct perta_err *err);

#endif
