/* lanes.h - which of several files to read from next, so that as many are being read as there are
 * threads to digest them. A file's bytes are digested in order, and SHA-256 is slower than a
 * disk. */
#ifndef PERTA_STREAM_LANES_H
#define PERTA_STREAM_LANES_H

#include <stdint.h>

#include "io/hasher.h"

struct perta_lanes {
    uint64_t n_items, n_begun;
    uint64_t item[PERTA_HASHER_THREADS_MAX]; /* (n) the item of each lane; n_items: none */
    unsigned n, turn;
    uint64_t taken_bytes; /* in this turn */
};

/* Distribute items 0 to n_items - 1 over n lanes, at most PERTA_HASHER_THREADS_MAX. */
static inline void perta_lanes_begin(struct perta_lanes *lanes, uint64_t n_items, unsigned n)
{
    *lanes = (struct perta_lanes){.n_items = n_items};
    lanes->n = n < PERTA_HASHER_THREADS_MAX ? n : PERTA_HASHER_THREADS_MAX;
    for (unsigned i = 0; i < lanes->n; i++)
        lanes->item[i] = lanes->n_begun < n_items ? lanes->n_begun++ : n_items;
}

/* The item whose turn it is; n_items if all are finished. */
static inline uint64_t perta_lanes_item(struct perta_lanes *lanes)
{
    for (unsigned i = 0; i < lanes->n && lanes->item[lanes->turn] == lanes->n_items; i++)
        lanes->turn = (lanes->turn + 1) % lanes->n;
    return lanes->item[lanes->turn];
}

/* len_bytes were taken from that item. After 4 MiB the next lane has its turn. */
static inline void perta_lanes_took(struct perta_lanes *lanes, uint64_t len_bytes)
{
    lanes->taken_bytes += len_bytes;
    if (lanes->taken_bytes < (4u << 20))
        return;
    lanes->taken_bytes = 0;
    lanes->turn = (lanes->turn + 1) % lanes->n;
}

/* That item is finished: its lane takes the next one. */
static inline void perta_lanes_end(struct perta_lanes *lanes)
{
    lanes->item[lanes->turn] = lanes->n_begun < lanes->n_items ? lanes->n_begun++ : lanes->n_items;
}

#endif
