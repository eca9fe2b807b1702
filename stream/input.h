/* input.h - a checkpoint whose shards are open for the engine, and the digests of those shards. */
#ifndef PERTA_STREAM_INPUT_H
#define PERTA_STREAM_INPUT_H

#include <jansson.h>

#include "io/file.h"
#include "io/format/checkpoint.h"
#include "io/hash.h"
#include "stream/stream.h"

struct perta_input {
    const char *role; /* "model", "tuned", ...: the flag's name */
    struct perta_checkpoint *ck;
    struct perta_file *files;      /* (ck->n_shards) */
    struct perta_digest **digests; /* (ck->n_shards), of the whole file, header first */
    uint64_t *seen_bytes;          /* (ck->n_shards): how many bytes the digest covers */
    uint64_t *read_bytes;          /* (ck->n_shards): bytes that were read, in any order */
    uint64_t *saved_bytes;         /* (ck->n_shards): of those, recorded in the journal */
};

/* Open the checkpoint; role is borrowed. */
int perta_input_open(struct perta_input *input, const char *role, const char *path,
                     struct perta_err *err);
/* Open its shards for reading and start their digests. */
int perta_input_open_files(struct perta_input *input, bool direct, struct perta_err *err);
/* Compute the digests on the hasher's threads (io/hasher.h): ranges passed to perta_input_digest
 * must then stay unchanged until they have passed there. */
void perta_input_digest_offload(struct perta_input *input, struct perta_hasher *hasher);
/* A zeroed struct is allowed. */
void perta_input_close(struct perta_input *input);

/* Set range to n_units units of a tensor (perta_dtype_unit_bytes), from first_unit on. */
void perta_input_range(struct perta_input *input, const struct perta_ref *ref, uint64_t first_unit,
                       uint64_t n_units, struct perta_range *range);

/* Add a range that was read to its shard's digest. Call it in commit order. */
void perta_input_digest(struct perta_input *input, const struct perta_range *range);
/* Treat the whole input as used, whatever was read of it through the stream. */
void perta_input_digest_whole(struct perta_input *input);
/* After the run: read those shards again, for their digests, that were used completely but out of
 * order. */
int perta_input_digest_rest(struct perta_input *input, struct perta_stream *stream,
                            struct perta_err *err);

/* PERTA_EINPUT if a shard changed while it was read. */
int perta_input_unchanged(const struct perta_input *input, struct perta_err *err);

/* For a manifest: {"shards": [{name, bytes, xxh3_128 | null}]}. The digest is the whole file's;
 * null if not all of it was used. Ends the digests. NULL only when out of memory. */
json_t *perta_input_json(struct perta_input *input);

/* Append a path, borrowed, to *paths (*n_paths long), which the caller frees. */
int perta_paths_add(const char ***paths, size_t *n_paths, const char *path, struct perta_err *err);
/* Append the paths of all shards in the same way; the strings stay the input's. */
int perta_input_paths(const struct perta_input *input, const char ***paths, size_t *n_paths,
                      struct perta_err *err);

#endif
