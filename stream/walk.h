/* walk.h - iterate over all chunks of a checkpoint, shard by shard, tensor by tensor. */
#ifndef PERTA_STREAM_WALK_H
#define PERTA_STREAM_WALK_H

#include <stdbool.h>

#include "io/format/checkpoint.h"
#include "io/format/codec.h"
#include "stream/stream.h"

struct perta_walk {
    const struct perta_checkpoint *ck;
    uint64_t chunk_units; /* units of a chunk; 0: PERTA_CHUNK_ELEMS */
    uint32_t shard;       /* position of the next chunk */
    uint64_t tensor, unit;
    uint64_t index; /* of that tensor, over the whole checkpoint */
};

/* One chunk: n_units units of a tensor. */
struct perta_chunk_at {
    uint32_t shard, tensor;
    uint64_t index; /* of the tensor, over the whole checkpoint */
    const struct perta_tensor *info;
    uint64_t first_unit, n_units;
    uint64_t off_bytes, len_bytes; /* within the tensor */
};

/* 1: *at is the next chunk; 0: the end. Empty tensors have no chunks. */
int perta_walk_next(struct perta_walk *walk, struct perta_chunk_at *at);
/* The same for a job's next(): also sets *piece to that chunk, with the tensor's index as its
 * tag. */
int perta_walk_piece(struct perta_walk *walk, struct perta_chunk_at *at, struct perta_piece *piece);

/* Does a chunk of that tensor end at that unit? */
bool perta_walk_is_place(const struct perta_header *header, uint64_t tensor, uint64_t unit,
                         uint64_t chunk_units);
/* Continue after that unit of that tensor, where a chunk must end. False if none does. */
bool perta_walk_to(struct perta_walk *walk, uint32_t shard, uint64_t tensor, uint64_t unit);

/* Bytes of the tensor's largest chunk. */
uint64_t perta_walk_chunk_bytes(const struct perta_tensor *tensor);

/* Codecs for n workers (perta_stream_workers), for chunks of at most chunk_bytes, in an array that
 * ends with NULL. Each has at most perta_codec_bytes resident. perta_codecs_free accepts NULL. */
struct perta_codec **perta_codecs_new(unsigned n, uint64_t chunk_bytes, struct perta_err *err);
void perta_codecs_free(struct perta_codec **codecs);

#endif
