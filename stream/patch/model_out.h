/* model_out.h - the checkpoint folder that a run writes, or, without a folder, only the digests
 * that its shards would have; or not even these, where they are known already. */
#ifndef PERTA_STREAM_PATCH_MODEL_OUT_H
#define PERTA_STREAM_PATCH_MODEL_OUT_H

#include <jansson.h>

#include "io/format/checkpoint.h"
#include "io/publish/publish.h"
#include "stream/journal.h"
#include "stream/stream.h"

struct perta_model_out {
    bool has_folder, is_known;
    struct perta_publish folder;
    struct perta_writer writer; /* of the shard under way, with a folder */
    struct perta_writer_bufs writer_bufs;
    struct perta_digest *digest; /* of the shard under way, without one */
    struct perta_engine *engine;
    json_t *shards; /* [{name, bytes, xxh3_128, sha256}] of those finished */
    size_t n_saved; /* of shards, in a journal's record */
    uint64_t written_bytes;
};

/* path NULL: digests only. like: the model whose rest is copied (perta_publish_begin), or NULL.
 * journal says whether to go on with what an interrupted run left. engine
 * and writer_bufs as perta_writer_open wants them, set before the first shard. */
int perta_model_out_begin(struct perta_model_out *out, const char *path, const char *like,
                          const struct perta_journal *journal, bool force, struct perta_err *err);
/* After beginning without a folder: what the shards will be is known (a manifest's
 * outputs.model), so what is appended does not matter. */
void perta_model_out_known(struct perta_model_out *out, json_t *shards);
int perta_model_out_shard(struct perta_model_out *out, const char *name, const uint8_t *header,
                          uint64_t header_bytes, uint64_t file_bytes, struct perta_err *err);
int perta_model_out_append(struct perta_model_out *out, const void *data, uint64_t len_bytes,
                           struct perta_err *err);
int perta_model_out_shard_end(struct perta_model_out *out, const char *name, struct perta_err *err);
/* Copy what stands beside the shards of from: index, config, tokenizer. Other weight formats
 * stay behind (they would carry what was erased), and so do folders and links that lead out of the
 * folder (to a file that was not meant for others, say); their names go to *skipped, an array
 * (NULL afterwards: no memory). */
int perta_model_out_copy_rest(struct perta_model_out *out, const struct perta_checkpoint *from,
                              json_t **skipped, struct perta_err *err);

/* Other weights in the folder of ck: their names go to *names, an array (NULL afterwards: no
 * memory). */
int perta_model_out_others(const struct perta_checkpoint *ck, json_t **names,
                           struct perta_err *err);

/* For a journal: bring what was appended to disk; and what to keep of the state, as far as it
 * changed since the last time, the caller's. NULL without memory. */
int perta_model_out_sync(struct perta_model_out *out, struct perta_err *err);
json_t *perta_model_out_save(struct perta_model_out *out);
/* Take up such states, in order; then the shard under way (NULL: none), by number and name, of which
 * at_bytes should be there. PERTA_EINPUT if a state is none, or is not of that place;
 * PERTA_ECHECK if the file is not as it was synced. */
int perta_model_out_restore(struct perta_model_out *out, const json_t *state,
                            struct perta_err *err);
int perta_model_out_reopen(struct perta_model_out *out, uint32_t shard, const char *name,
                           uint64_t at_bytes, struct perta_err *err);

/* Bytes written so far. */
uint64_t perta_model_out_tell(const struct perta_model_out *out);
/* Whatever its state; removes what was not committed. Nothing may run on the engine. */
void perta_model_out_release(struct perta_model_out *out);

#endif
