/* model_out.h - the checkpoint folder that a run writes; or, without a folder, only the digests
 * that its shards would have; or not even those, if they are known already. */
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
    struct perta_writer writer; /* of the current shard, with a folder */
    struct perta_writer_bufs writer_bufs;
    struct perta_digest *digest; /* of the current shard, without a folder */
    struct perta_engine *engine;
    json_t *shards; /* [{name, bytes, xxh3_128, sha256}] of the finished ones */
    size_t n_saved; /* how many of shards are recorded in the journal */
    uint64_t written_bytes;
};

/* path NULL: digests only. like: the model whose other files are copied (perta_publish_begin), or
 * NULL. The journal says whether a run is resumed. Set engine and writer_bufs, for
 * perta_writer_open, before the first shard. */
int perta_model_out_begin(struct perta_model_out *out, const char *path, const char *like,
                          const struct perta_journal *journal, bool force, struct perta_err *err);
/* Call after beginning without a folder if the resulting shards are known (a manifest's
 * outputs.model): then what is appended is ignored. */
void perta_model_out_known(struct perta_model_out *out, json_t *shards);
int perta_model_out_shard(struct perta_model_out *out, const char *name, const uint8_t *header,
                          uint64_t header_bytes, uint64_t file_bytes, struct perta_err *err);
int perta_model_out_append(struct perta_model_out *out, const void *data, uint64_t len_bytes,
                           struct perta_err *err);
int perta_model_out_shard_end(struct perta_model_out *out, const char *name, struct perta_err *err);
/* Copy the other files of from: index, config, tokenizer. Other weights are left behind, because
 * they would still hold what was erased. So are folders, and links that lead out of the folder,
 * whose files may not have been meant for others. Their names are appended to *skipped, an array
 * (NULL afterwards when out of memory). */
int perta_model_out_copy_rest(struct perta_model_out *out, const struct perta_checkpoint *from,
                              json_t **skipped, struct perta_err *err);

/* Append the names of other weights in the folder of ck to *names, an array (NULL afterwards when
 * out of memory). */
int perta_model_out_others(const struct perta_checkpoint *ck, json_t **names,
                           struct perta_err *err);

/* For the journal: sync what was appended; and save the state, as far as it changed since the last
 * time. The state is the caller's; NULL only when out of memory. */
int perta_model_out_sync(struct perta_model_out *out, struct perta_err *err);
json_t *perta_model_out_save(struct perta_model_out *out);
/* Restore such states, in order; then reopen the current shard (by number and name; NULL: none),
 * which should have at_bytes. PERTA_EINPUT if a state is invalid or does not fit that place;
 * PERTA_ECHECK if the file is not what was synced. */
int perta_model_out_restore(struct perta_model_out *out, const json_t *state,
                            struct perta_err *err);
int perta_model_out_reopen(struct perta_model_out *out, uint32_t shard, const char *name,
                           uint64_t at_bytes, struct perta_err *err);

/* Bytes written so far. */
uint64_t perta_model_out_tell(const struct perta_model_out *out);
/* Release it in any state, and remove the partial folder unless it was committed or is kept.
 * Nothing may be in flight on the engine. */
void perta_model_out_release(struct perta_model_out *out);

#endif
