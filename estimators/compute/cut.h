/* cut.h - where rows (tokens, or labels) are cut for matrix products.
 *
 * The last bits of a product depend on how many rows go into it, so that is decided by the
 * samples alone, never by memory or threads: samples are put into groups in order, whole ones, as
 * many as have so many rows together, and a group's rows are cut into tiles. A batch is as many
 * whole groups as memory allows. */
#ifndef PERTA_ESTIMATORS_COMPUTE_CUT_H
#define PERTA_ESTIMATORS_COMPUTE_CUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

#define PERTA_TILE_ROWS 256 /* at most */

/* Consecutive runs of rows: run i is rows starts[i] - origin .. starts[i + 1] - origin. */
struct perta_runs {
    size_t n;
    const size_t *starts; /* (n + 1) */
    size_t origin;
};

struct perta_cut {
    size_t n_tiles, n_groups;
    size_t *tiles;           /* (n_tiles + 1): rows */
    size_t *groups;          /* (n_groups + 1): rows */
    size_t *group_tiles;     /* (n_groups + 1): the first tile of each */
    uint64_t *group_samples; /* (n_groups + 1): the first sample of each */
    size_t longest;          /* rows of the longest group */
};

/* Sample i has rows starts[i] .. starts[i + 1]; starts[0] is 0. A group has at most group_rows
 * rows, or is one longer sample. *cut is the caller's, perta_cut_release. */
int perta_cut_make(const size_t *starts, uint64_t n_samples, size_t group_rows,
                   struct perta_cut *cut, struct perta_err *err);
void perta_cut_release(struct perta_cut *cut);

/* Groups first .. end of a cut, their rows numbered from 0. */
struct perta_cut_batch {
    size_t first_row, n;
    uint64_t first_sample, n_samples;
    struct perta_runs tiles;
    size_t end; /* the group after it */
};
/* The groups from first on that have at most most_rows rows together, and at least one. */
struct perta_cut_batch perta_cut_batch(const struct perta_cut *cut, size_t first, size_t most_rows);

/* A weight's gradient is a sum over rows, of parts of samples (where each sample's gradient is
 * wanted) or of all rows. */
struct perta_chunk {
    size_t first, n; /* rows */
    size_t at;       /* the rows of chunks before it, each rounded up (perta_chunk_padded) */
    uint64_t sample;
    bool begins, ends; /* its sample; where samples do not count: both */
};
#define PERTA_CHUNK_ROWS 1024 /* at most; rounded up they are no more */
struct perta_chunks {
    size_t n;
    struct perta_chunk *of; /* (n) */
    bool by_sample;
    bool parts; /* some sample is more than one */
};

/* Rows that a chunk takes where chunks lie one after another for products, the last of them zeros:
 * so few different shapes are compiled. */
static inline size_t perta_chunk_padded(size_t n)
{
    return (n + 15) & ~(size_t)15;
}

/* Of runs of rows, starts[i] .. starts[i + 1]; a chunk lies in one. by_sample: they are samples, each
 * with a gradient of its own. */
int perta_chunks_make(const size_t *starts, uint64_t n_runs, bool by_sample,
                      struct perta_chunks *chunks, struct perta_err *err);
void perta_chunks_release(struct perta_chunks *chunks);

#endif
