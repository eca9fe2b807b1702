/* statistic.h - from gradients to importance: the mean over samples, and the mean of squares of
 * each sample's gradient, block of rows by block of rows, written as soon as they are whole.
 *
 * Sums are float64, and every element's terms are added in the order of chunks (cut.h): the same
 * bits for every number of workers and every budget. */
#ifndef PERTA_ESTIMATORS_PASSES_STATISTIC_H
#define PERTA_ESTIMATORS_PASSES_STATISTIC_H

#include "estimators/compute/cut.h"
#include "estimators/compute/gemm.h"
#include "estimators/model/samples.h"
#include "estimators/model/store.h"
#include "estimators/passes/importance.h"

struct perta_statistic {
    struct perta_gemm *gemm;
    struct perta_importance_out *mean, *meansq; /* NULL: not wanted */
    uint64_t n_samples;
    size_t block_floats;  /* elements of a block, at most; of each of: */
    double *sum, *square; /* square: NULL where no squares are wanted */
    float *one;   /* gradient of a sample that is more than one chunk; NULL: there are none */
    float *means; /* (PERTA_MEANS): to be written */
};

#define PERTA_MEANS (1u << 20)

/* Floats that blocks of so many elements need, all together. parts: perta_chunks.parts. */
size_t perta_statistic_floats(size_t block_floats, bool meansq, bool parts);
void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, bool parts,
                             float *memory);

/* Rows of a matrix n_cols wide that fit so many floats; at least 1 of n_rows. */
size_t perta_statistic_rows(size_t block_floats, size_t n_rows, size_t n_cols);

/* Begin a block of n elements; then add to it; then end it: divided by the number of samples it
 * is written as elements first.. of the tensor. PERTA_EINPUT, with the element, where that is not
 * finite. */
void perta_statistic_begin(struct perta_statistic *s, size_t n);
int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err);

/* Add one sample's gradient of a vector. */
void perta_statistic_vector(struct perta_statistic *s, const float *gradient, size_t n);

/* What chunks first .. end add to a block (rows, in) of a matrix: over each chunk's rows dy^T x,
 * and to the row of each token that its sample holds that token's dx. */
struct perta_terms {
    size_t rows, in;
    const struct perta_chunks *chunks;
    size_t first, end;
    /* Operands (perta_gemm_dtype), chunks one after another: of each x as (padded, in) and dy as
     * (rows, padded). NULL: none */
    const uint8_t *x, *dy;
    /* An embedding's rows row .. row + rows. dx NULL: no embedding */
    const struct perta_samples *samples;
    const struct perta_store *dx; /* (tokens, in) */
    size_t row;
    uint32_t pad; /* of this token no dx counts; PERTA_NO_PAD: of all does */
};
int perta_statistic_add(struct perta_statistic *s, const struct perta_terms *terms,
                        struct perta_err *err);

/* Where the operands of products are put side by side: floats of perta_gemm_scratch. */
struct perta_packed {
    float *floats;
    size_t n_floats;
};
/* Rows of operands: row i of the chunks' is row i - origin of x (in wide) and of dy. */
struct perta_operands {
    const struct perta_store *x, *dy;
    size_t origin;
    size_t col; /* the block's first of dy's columns */
};
/* perta_statistic_add with operands that have yet to be packed, a window of chunks at a time. x_packed
 * may be NULL; *x_packed: all of x is packed from a call before, or now. */
int perta_statistic_products(struct perta_statistic *s, const struct perta_terms *terms,
                             const struct perta_operands *operands,
                             const struct perta_packed *packed, bool *x_packed,
                             struct perta_err *err);

/* The gradient of a weight (out, in), whole: over chunks, of dy^T x. dy (tokens, out) and x
 * (tokens, in) hold all tokens. */
int perta_statistic_linear(struct perta_statistic *s, const char *name, const struct perta_store *x,
                           const struct perta_store *dy, const struct perta_chunks *chunks,
                           const struct perta_packed *packed, struct perta_err *err);

#endif
