/* statistic.h - from gradients to importance: the mean gradient over samples and the mean square of
 * each sample's gradient, in blocks of rows that are written as soon as they are complete.
 *
 * Sums are float64, and the terms of each element are added in the order of chunks (cut.h), so
 * the bits are the same for every number of workers and every budget.
 *
 * Instead of importance there may be norms: each sample's gradient is squared and summed, and
 * nothing is written. */
#ifndef PERTA_ESTIMATORS_PASSES_STATISTIC_H
#define PERTA_ESTIMATORS_PASSES_STATISTIC_H

#include "estimators/compute/backend.h"
#include "estimators/passes/importance.h"
#include "estimators/passes/norms.h"

struct perta_statistic {
    struct perta_backend *be;                   /* borrowed, as all that follows */
    struct perta_importance_out *mean, *meansq; /* NULL: not wanted */
    struct perta_norms *norms;                  /* not NULL: mean and meansq are NULL */
    uint64_t n_samples;

    size_t block_floats;              /* the most elements in a block, and the size of: */
    struct perta_array sums, squares; /* float64; squares: no array if meansq is not wanted */
    /* gradient of a sample that has several chunks; no array: no sample has */
    struct perta_array sample;
    struct perta_array partial; /* (n_tiles, n_samples) float64: squares of a block, for norms */
    size_t n_tiles;
    struct perta_array means; /* (PERTA_MEANS): means to be written, copied to: */
    float *host;              /* (PERTA_MEANS); for norms, vectors are copied to it */
};

#define PERTA_MEANS (1u << 19)

/* Bytes of the backend's memory for a statistic with blocks of block_floats elements. parts:
 * perta_chunks.parts. On the host it needs PERTA_MEANS floats. */
uint64_t perta_statistic_bytes(size_t block_floats, bool meansq, bool parts);
/* The same for norms; n_tiles: the most tiles (perta_tiles) in a block. */
uint64_t perta_statistic_norms_bytes(size_t block_floats, size_t n_tiles, uint64_t n_samples,
                                     bool parts);
/* The members above the blank line must be set, and for norms n_tiles. */
void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, bool parts,
                             struct perta_array memory, float *host);

/* Rows, n_cols wide, that fit into a block; at most n_rows. */
size_t perta_statistic_rows(size_t block_floats, size_t n_rows, size_t n_cols);

/* Begin a block of n elements; then add to it with the backend's operations gradient
 * (perta_statistic_gradient sets sums, squares and sample) and accumulate; then end it. */
void perta_statistic_begin(struct perta_statistic *s, size_t n);
struct perta_gradient perta_statistic_gradient(const struct perta_statistic *s, size_t rows,
                                               size_t in);
/* Add a sample's gradient d (n) of the vector name: to sums and squares (no array: not wanted), or to
 * norms. */
int perta_statistic_add_vector(struct perta_statistic *s, const char *name, uint64_t sample,
                               struct perta_array d, size_t n, struct perta_array sums,
                               struct perta_array squares, struct perta_err *err);
/* Divide the block by the number of samples, and write it as elements first.. of the tensor. Waits
 * for the backend and returns its failure. PERTA_EINPUT, with the element, if a mean is not
 * finite. For norms: add the block's to the tensor's. */
int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err);
/* The same for sums and squares of a vector that are kept elsewhere (n float64 each; squares may be
 * no array). For norms, nothing remains to be done. */
int perta_statistic_write(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                          struct perta_array sums, struct perta_array squares,
                          struct perta_err *err);

#endif
