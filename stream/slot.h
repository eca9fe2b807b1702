/* slot.h - a slot: memory for a batch of pieces with all their bytes, from reading to commit. */
#ifndef PERTA_STREAM_SLOT_H
#define PERTA_STREAM_SLOT_H

#include "stream/stream.h"

enum perta_slot_state {
    SLOT_FREE,
    SLOT_READING,
    SLOT_READY,
    SLOT_WORKING,
    SLOT_DONE,
    SLOT_COMMITTED
};

/* One read serves the ranges of neighbouring pieces that are adjacent in the file. */
struct perta_slot_read {
    struct perta_request request;
    uint32_t input; /* which of n_in */
    uint32_t first_piece, n_pieces;
};

struct perta_slot {
    enum perta_slot_state state;
    struct perta_piece *pieces;    /* (pieces_max) */
    struct perta_range *ranges;    /* (pieces_max, n_in) */
    struct perta_slot_read *reads; /* (reads_max) */
    uint32_t *last;                /* (n_in): index of the input's last read, plus 1; 0: none */
    uint32_t n_pieces, n_reads, n_pending;
    uint32_t n_good; /* pieces on which work succeeded */
    uint8_t *in, *out;
    uint64_t in_bytes, out_bytes; /* used bytes of in and out */
    struct perta_err err;         /* of reading it, or of work on it */
    uint64_t digested;            /* the hasher's ticket for the bytes of a committed slot */
    void *stream;
};

/* The sizes of every slot of a stream. */
struct perta_slot_shape {
    uint32_t pieces_max, reads_max, n_in;
    uint64_t in_max, out_max; /* bytes, multiples of PERTA_BLOCK_BYTES */
};

/* The shape that a job needs. */
struct perta_slot_shape perta_slot_shape_for(const struct perta_job *job);
/* Bytes that a slot takes from the pool, and from malloc. */
uint64_t perta_slot_pool_bytes(const struct perta_slot_shape *shape);
uint64_t perta_slot_heap_bytes(const struct perta_slot_shape *shape);

int perta_slot_init(struct perta_slot *slot, const struct perta_slot_shape *shape, uint8_t *memory,
                    struct perta_err *err);
void perta_slot_release(struct perta_slot *slot);

void perta_slot_clear(struct perta_slot *slot);
/* Add a piece and its ranges. False if it does not fit. A range that continues the previous piece's
 * range of the same input extends that read. */
bool perta_slot_add(struct perta_slot *slot, const struct perta_slot_shape *shape,
                    const struct perta_piece *piece);
/* Call when no more pieces are added: gives the reads their buffers. */
void perta_slot_lay_out(struct perta_slot *slot);
/* Call after reading: sets every range's data. */
void perta_slot_point(struct perta_slot *slot);

#endif
