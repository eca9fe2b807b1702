/* slot.h - a slot: one batch of pieces with all their bytes, from reading to commit. */
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

/* One read serves the ranges of neighbouring pieces that touch in the file. */
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
    uint32_t *last;                /* (n_in): the input's last read, counted from 1; 0: none */
    uint32_t n_pieces, n_reads, n_pending;
    uint32_t n_good; /* pieces worked on without error */
    uint8_t *in, *out;
    uint64_t in_bytes, out_bytes; /* used of them */
    struct perta_err err;         /* of work on it, or of reading it */
    uint64_t digested;            /* the hasher's ticket for what a committed slot holds */
    void *stream;
};

/* Sizes that every slot of a stream has. */
struct perta_slot_shape {
    uint32_t pieces_max, reads_max, n_in;
    uint64_t in_max, out_max; /* bytes, multiples of PERTA_BLOCK_BYTES */
};

/* The shape that a job needs. */
struct perta_slot_shape perta_slot_shape_for(const struct perta_job *job);
/* Bytes of pool a slot takes, and of malloc. */
uint64_t perta_slot_pool_bytes(const struct perta_slot_shape *shape);
uint64_t perta_slot_heap_bytes(const struct perta_slot_shape *shape);

int perta_slot_init(struct perta_slot *slot, const struct perta_slot_shape *shape, uint8_t *memory,
                    struct perta_err *err);
void perta_slot_release(struct perta_slot *slot);

void perta_slot_clear(struct perta_slot *slot);
/* Add a piece (its ranges too); false if it does not fit any more. What touches the same input's
 * bytes of the piece before it is read with them. */
bool perta_slot_add(struct perta_slot *slot, const struct perta_slot_shape *shape,
                    const struct perta_piece *piece);
/* When no more pieces come: give the reads their room. */
void perta_slot_lay_out(struct perta_slot *slot);
/* After reading: point every range at its bytes. */
void perta_slot_point(struct perta_slot *slot);

#endif
