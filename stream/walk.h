/* walk.h - all chunks of a checkpoint, in order: shard by shard, tensor by tensor. */
#ifndef PERTA_STREAM_WALK_H
#define PERTA_STREAM_WALK_H

#include <stdbool.h>

#include "io/format/checkpoint.h"
#include "io/format/codec.h"
#include "stream/stream.h"

struct perta_walk {
    const struct perta_checkpoint *ck;
    uint64_t chunk_units; /* of a chunk at most; 0: PERTA_CHUNK_ELEMS */
    uint32_t shard;       /* where the next chunk is */
    uint64_t tensor, unit;
    uint64_t index; /* of that tensor in the whole checkpoint */
};

/* So many units of a tensor, or its last ones. */
struct perta_chunk_at {
    uint32_t shard, tensor;
    uint64_t index; /* of the tensor in the whole checkpoint */
    const struct perta_tensor *info;
    uint64_t first_unit, n_units;
    uint64_t off_bytes, len_bytes; /* within the tensor */
};

/* 1: *at is the next chunk; 0: there is none. Empty tensors have none. */
int perta_walk_next(struct perta_walk *walk, struct perta_chunk_at *at);
/* The same for a job's next(): *piece is of that chunk, tagged with the tensor's index. */
int perta_walk_piece(struct perta_walk *walk, struct perta_chunk_at *at, struct perta_piece *piece);

/* Does a chunk of the tensor of that number end at that unit? */
bool perta_walk_is_place(const struct perta_header *header, uint64_t tensor, uint64_t unit,
                         uint64_t chunk_units);
/* Go on from that unit of that tensor, where a chunk must end. False: there is no such place. */
bool perta_walk_to(struct perta_walk *walk, uint32_t shard, uint64_t tensor, uint64_t unit);

/* Bytes of the largest chunk that a tensor has. */
uint64_t perta_walk_chunk_bytes(const struct perta_tensor *tensor);

/* A codec for each of n workers (perta_stream_workers), for chunks of at most chunk_bytes, and a
 * NULL; each has at most perta_codec_bytes resident. perta_codecs_free takes NULL too. */
struct perta_codec **perta_codecs_new(unsigned n, uint64_t chunk_bytes, struct perta_err *err);
void perta_codecs_free(struct perta_codec **codecs);

#endif
