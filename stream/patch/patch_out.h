/* patch_out.h - the patch folder that a run writes, and the model that it leads to. Spec:
 * docs/patch-format.md */
#ifndef PERTA_STREAM_PATCH_PATCH_OUT_H
#define PERTA_STREAM_PATCH_PATCH_OUT_H

#include <jansson.h>

#include "io/format/patch.h"
#include "stream/input.h"
#include "stream/patch/model_out.h"

/* What was done to one tensor. */
struct perta_tensor_counts {
    const char *name;   /* borrowed */
    const char *action; /* "edited", "kept", ...; borrowed */
    uint64_t n_params, n_changed, n_rounded_away, n_nonfinite;
    uint64_t n_zero_forget, n_zero_retain; /* importances that are 0 */
    double sum_weight;
};

/* Weights over the whole patch are counted in this many equal bins of [0, 1]. */
#define PERTA_COUNT_BINS 10

struct perta_patch_out {
    struct perta_publish folder;
    struct perta_model_out model; /* the model after the patch, with or without a folder */
    struct perta_engine *engine;
    struct perta_writer writer;
    struct perta_writer_bufs writer_bufs;
    struct perta_digest *digest; /* restored, of the file that is to be reopened */

    const struct perta_checkpoint *before, *after; /* borrowed */
    const char *const *actions;                    /* borrowed; one for each tensor of after */
    bool one_way;   /* the manifest has no digests of inputs, and few counts */
    uint32_t shard; /* the current shard, or the next */
    bool shard_open;
    uint64_t n_begun; /* tensors of it */

    struct perta_patch_entry *entries; /* of the current shard */
    uint64_t n_entries, entries_max;
    uint64_t frames_at; /* where the next frame goes */

    struct perta_tensor_counts *tensors;                 /* (after->n_tensors), shard by shard */
    uint64_t n_tensors;                                  /* tensors begun, over all shards */
    json_t *shards;                                      /* finished .perta files */
    uint64_t saved_shards, saved_tensors, saved_entries; /* recorded in the journal */
    uint64_t n_encoded[PERTA_N_ENCODINGS], encoded_bytes[PERTA_N_ENCODINGS];
    uint64_t encoded_units[PERTA_N_ENCODINGS];
    uint64_t weights[PERTA_COUNT_BINS]; /* filled by the caller; all 0: left out */
    uint64_t written_bytes;
};

/* Memory that perta_patch_out_attach and all that follows allocate. It grows with the number of
 * tensors and chunks. */
uint64_t perta_patch_out_memory(const struct perta_checkpoint *before,
                                const struct perta_checkpoint *after);
/* Were so many tensors begun since the last record that the next one is due? A record takes memory
 * for each. */
bool perta_patch_out_is_due(const struct perta_patch_out *p);

/* out NULL: no model folder; else like is the model that it is made from. The journal says whether
 * a run is resumed. */
int perta_patch_out_begin(struct perta_patch_out *p, const char *path, const char *out,
                          const char *like, const struct perta_journal *journal, bool force,
                          struct perta_err *err);
/* Set what is patched. Shards and tensors of before and after agree (the caller checked), and
 * chunks will come in the order of after. actions (after->n_tensors, shard by shard) say what is
 * done to each tensor. model_bufs: only with a model folder. */
int perta_patch_out_attach(struct perta_patch_out *p, const struct perta_checkpoint *before,
                           const struct perta_checkpoint *after, const char *const *actions,
                           struct perta_engine *engine, struct perta_writer_bufs patch_bufs,
                           struct perta_writer_bufs model_bufs, struct perta_err *err);

/* Advance to this tensor of this shard: finish what comes before it, and begin it if it is new. */
int perta_patch_out_reach(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                          struct perta_err *err);
/* The counts of the tensor that was reached. The caller adds to all but n_changed and n_params. */
struct perta_tensor_counts *perta_patch_out_counts(struct perta_patch_out *p);

/* Encode a chunk: deltas, or new values only (one_way). *hash_before, the hash of the bytes before,
 * becomes what the table stores. */
int perta_patch_out_encode(bool one_way, struct perta_codec *codec, enum perta_dtype dtype,
                           const void *before, const void *after, uint64_t n_bytes, uint8_t *dst,
                           uint64_t dst_capacity, struct perta_coded *coded, uint64_t *hash_before,
                           struct perta_err *err);
/* A chunk of the tensor that was reached. */
struct perta_chunk_out {
    struct perta_coded coded;
    const uint8_t *frame; /* (coded.frame_bytes) */
    const void *after;    /* (after_bytes) */
    uint64_t after_bytes;
    uint32_t n_units;
    uint64_t hash_before, hash_after;
};
int perta_patch_out_chunk(struct perta_patch_out *p, const struct perta_chunk_out *chunk,
                          struct perta_err *err);

/* Finish all shards, and write manifest.json and the other files of the folders: afterwards only
 * the renames remain. recipe and inputs are borrowed; from is the checkpoint whose other files go
 * with the model. *summary, the caller's, gets what a person wants to know. */
int perta_patch_out_finish(struct perta_patch_out *p, json_t *recipe, json_t *inputs,
                           const struct perta_checkpoint *from, json_t **summary,
                           struct perta_err *err);

/* For the journal: sync all chunks; and save the state, as far as it changed since the last time.
 * The state is the caller's; NULL only when out of memory. */
int perta_patch_out_sync(struct perta_patch_out *p, struct perta_err *err);
json_t *perta_patch_out_save(struct perta_patch_out *p);
/* Call after perta_patch_out_attach: restore such states, in order; then reopen the current files,
 * which should be at that unit of that tensor. PERTA_EINPUT if a state is invalid or does not fit
 * that place; PERTA_ECHECK if a file is not what was synced. */
int perta_patch_out_restore(struct perta_patch_out *p, const json_t *state, struct perta_err *err);
int perta_patch_out_reopen(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                           uint64_t unit, struct perta_err *err);
void perta_patch_out_release(struct perta_patch_out *p);

#endif
