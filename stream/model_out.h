/* model_out.h - the checkpoint folder that a run writes, or, without a folder, only the digests
 * that its shards would have. */
#ifndef PERTA_STREAM_MODEL_OUT_H
#define PERTA_STREAM_MODEL_OUT_H

#include <jansson.h>

#include "io/checkpoint.h"
#include "io/publish.h"
#include "stream/stream.h"

struct perta_model_out {
    bool has_folder;
    struct perta_publish folder;
    struct perta_writer writer;   /* of the shard under way, with a folder */
    uint8_t *writer_bufs;
    struct perta_digest *digest;  /* of the shard under way, without one */
    struct perta_engine *engine;
    json_t *shards;               /* [{name, bytes, xxh3_128, sha256}] of those finished */
    uint64_t written_bytes;
};

/* path NULL: digests only. engine and writer_bufs as perta_writer_open wants them, set before
 * the first shard. */
int perta_model_out_begin(struct perta_model_out *out, const char *path, bool force,
                          struct perta_err *err);
int perta_model_out_shard(struct perta_model_out *out, const char *name,
                          const uint8_t *header, uint64_t header_bytes, uint64_t file_bytes,
                          struct perta_err *err);
int perta_model_out_append(struct perta_model_out *out, const void *data, uint64_t len_bytes,
                           struct perta_err *err);
int perta_model_out_shard_end(struct perta_model_out *out, const char *name,
                              struct perta_err *err);
/* Copy what stands beside the shards of from: index, config, tokenizer. Other weight formats
 * stay behind (they would carry what was erased); their names go to skipped (may be NULL). */
int perta_model_out_copy_rest(struct perta_model_out *out, const struct perta_checkpoint *from,
                              json_t *skipped, struct perta_err *err);
int perta_model_out_commit(struct perta_model_out *out, struct perta_err *err);
/* Whatever its state; removes what was not committed. Nothing may run on the engine. */
void perta_model_out_release(struct perta_model_out *out);

#endif
