#include "estimators/compute/cut.h"

#include <errno.h>
#include <stdlib.h>

/* ---- groups and tiles ---- */

/* Add rows first .. end as a group, with its tiles. */
static void add_group(struct perta_cut *cut, size_t first, size_t end, uint64_t samples_end)
{
    for (size_t row = first; row < end; row += PERTA_TILE_ROWS)
        cut->tiles[++cut->n_tiles] = end - row < PERTA_TILE_ROWS ? end : row + PERTA_TILE_ROWS;
    cut->groups[++cut->n_groups] = end;
    cut->group_tiles[cut->n_groups] = cut->n_tiles;
    cut->group_samples[cut->n_groups] = samples_end;
    if (end - first > cut->longest)
        cut->longest = end - first;
}

int perta_cut_make(const size_t *starts, uint64_t n_samples, size_t group_rows,
                   struct perta_cut *cut, struct perta_err *err)
{
    size_t most_tiles = starts[n_samples] / PERTA_TILE_ROWS + n_samples + 1;
    *cut = (struct perta_cut){
        .tiles = calloc(most_tiles + 1, sizeof *cut->tiles),
        .groups = calloc(n_samples + 1, sizeof *cut->groups),
        .group_tiles = calloc(n_samples + 1, sizeof *cut->group_tiles),
        .group_samples = calloc(n_samples + 1, sizeof *cut->group_samples),
    };
    if (!cut->tiles || !cut->groups || !cut->group_tiles || !cut->group_samples) {
        perta_cut_release(cut);
        return perta_fail_sys(err, ENOMEM, "%llu samples", (unsigned long long)n_samples);
    }
    for (uint64_t i = 0, end; i < n_samples; i = end) {
        for (end = i + 1; end < n_samples && starts[end + 1] - starts[i] <= group_rows;)
            end++;
        add_group(cut, starts[i], starts[end], end);
    }
    return 0;
}

void perta_cut_release(struct perta_cut *cut)
{
    free(cut->tiles);
    free(cut->groups);
    free(cut->group_tiles);
    free(cut->group_samples);
    *cut = (struct perta_cut){0};
}

struct perta_cut_batch perta_cut_batch(const struct perta_cut *cut, size_t first, size_t most_rows)
{
    size_t end = first + 1, row = cut->groups[first], tile = cut->group_tiles[first];
    while (end < cut->n_groups && cut->groups[end + 1] - row <= most_rows)
        end++;
    return (struct perta_cut_batch){
        .first_row = row,
        .n = cut->groups[end] - row,
        .first_sample = cut->group_samples[first],
        .n_samples = cut->group_samples[end] - cut->group_samples[first],
        .tiles = {cut->group_tiles[end] - tile, cut->tiles + tile, row},
        .end = end,
    };
}

/* ---- chunks ---- */

static void add_chunks(struct perta_chunks *chunks, size_t first, size_t end, uint64_t sample)
{
    for (size_t row = first; row < end; row += PERTA_CHUNK_ROWS) {
        size_t n = end - row < PERTA_CHUNK_ROWS ? end - row : PERTA_CHUNK_ROWS;
        const struct perta_chunk *last = chunks->n ? &chunks->of[chunks->n - 1] : NULL;
        chunks->of[chunks->n++] = (struct perta_chunk){
            .first = row,
            .n = n,
            .at = last ? last->at + perta_chunk_padded(last->n) : 0,
            .sample = sample,
            .begins = !chunks->by_sample || row == first,
            .ends = !chunks->by_sample || row + n == end,
        };
    }
    chunks->parts |= chunks->by_sample && end - first > PERTA_CHUNK_ROWS;
}

int perta_chunks_make(const size_t *starts, uint64_t n_runs, bool by_sample,
                      struct perta_chunks *chunks, struct perta_err *err)
{
    size_t most = starts[n_runs] / PERTA_CHUNK_ROWS + n_runs + 1;
    *chunks = (struct perta_chunks){.of = calloc(most, sizeof *chunks->of), .by_sample = by_sample};
    if (!chunks->of)
        return perta_fail_sys(err, ENOMEM, "%llu samples", (unsigned long long)n_runs);
    for (uint64_t i = 0; i < n_runs; i++)
        add_chunks(chunks, starts[i], starts[i + 1], i);
    return 0;
}

void perta_chunks_release(struct perta_chunks *chunks)
{
    free(chunks->of);
    *chunks = (struct perta_chunks){0};
}
