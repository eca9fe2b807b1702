/* cut.h - how rows (tokens or labels) are cut for matrix products.
 *
 * The last bits of a product depend on its number of rows. So that number follows from the samples
 * alone, never from memory or threads: consecutive whole samples form a group, up to a fixed number
 * of rows, and the rows of a group are cut into tiles. A batch is as many whole groups as memory
 * allows. */
#ifndef PERTA_ESTIMATORS_COMPUTE_CUT_H
#define PERTA_ESTIMATORS_COMPUTE_CUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

#define PERTA_TILE_ROWS 256 /* the most rows in a tile */
#define PERTA_TILE_COLS 512 /* the most columns in a tile of a product */

/* Tiles of a matrix. */
static inline size_t perta_tiles(size_t rows, size_t cols)
{
    return (rows + PERTA_TILE_ROWS - 1) / PERTA_TILE_ROWS *
           ((cols + PERTA_TILE_COLS - 1) / PERTA_TILE_COLS);
}

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
    size_t *group_tiles;     /* (n_groups + 1): first tile of each */
    uint64_t *group_samples; /* (n_groups + 1): first sample of each */
    size_t longest;          /* rows of the longest group */
};

/* Sample i has rows starts[i] .. starts[i + 1]; starts[0] is 0. A group has at most group_rows
 * rows, or is a single longer sample. The caller releases *cut with perta_cut_release. */
int perta_cut_make(const size_t *starts, uint64_t n_samples, size_t group_rows,
                   struct perta_cut *cut, struct perta_err *err);
void perta_cut_release(struct perta_cut *cut);

/* Groups of a cut that are computed together; their rows are numbered from 0. */
struct perta_cut_batch {
    size_t first_row, n;
    uint64_t first_sample, n_samples;
    struct perta_runs tiles;
    size_t end; /* the group after it */
};
/* As many groups from first on as have at most most_rows rows together, but at least one. */
struct perta_cut_batch perta_cut_batch(const struct perta_cut *cut, size_t first, size_t most_rows);

/* A weight's gradient is summed over chunks of rows: each is part of one sample, if every sample's
 * gradient is wanted on its own, or part of all rows. */
struct perta_chunk {
    size_t first, n; /* rows */
    size_t at;       /* rows of the chunks before it, each rounded up (perta_chunk_padded) */
    uint64_t sample;
    bool begins, ends; /* is the first or last of its sample; both if chunks are not by sample */
};
#define PERTA_CHUNK_ROWS 1024 /* the most rows in a chunk, also once rounded up */
struct perta_chunks {
    size_t n;
    struct perta_chunk *of; /* (n) */
    bool by_sample;
    bool parts; /* some sample has several chunks */
};

/* Rows that a chunk takes when it is packed for products. The rows that are added are zeros; they
 * keep the number of different shapes small, each of which must be compiled. */
static inline size_t perta_chunk_padded(size_t n)
{
    return (n + 15) & ~(size_t)15;
}

/* Cut runs of rows, starts[i] .. starts[i + 1], into chunks; each chunk lies within one run.
 * by_sample: runs are samples, each with a gradient of its own. */
int perta_chunks_make(const size_t *starts, uint64_t n_runs, bool by_sample,
                      struct perta_chunks *chunks, struct perta_err *err);
void perta_chunks_release(struct perta_chunks *chunks);

#endif
