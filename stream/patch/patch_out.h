/* patch_out.h - the patch folder that a run writes, and the model that it leads to.
 * Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_PATCH_PATCH_OUT_H
#define PERTA_STREAM_PATCH_PATCH_OUT_H

#include <jansson.h>

#include "io/format/patch.h"
#include "stream/input.h"
#include "stream/patch/model_out.h"

/* What happened to one tensor. */
struct perta_tensor_counts {
    const char *name;   /* borrowed */
    const char *action; /* "edited", "kept", ...; borrowed */
    uint64_t n_params, n_changed, n_rounded_away, n_nonfinite;
    uint64_t n_zero_forget, n_zero_retain; /* importances that are 0 */
    double sum_weight;
};

/* Counted over the whole patch, in so many equal parts of [0, 1]: whatever the job weighs. */
#define PERTA_COUNT_BINS 10

struct perta_patch_out {
    struct perta_publish folder;
    struct perta_model_out model; /* after the patch; with or without a folder */
    struct perta_engine *engine;
    struct perta_writer writer;
    struct perta_writer_bufs writer_bufs;
    struct perta_digest *digest; /* restored, of the file that is to be opened again */

    const struct perta_checkpoint *before, *after; /* borrowed */
    const char *const *actions;                    /* borrowed; one for each tensor of after */
    bool one_way;   /* the record says nothing of files that went in but names and sizes */
    uint32_t shard; /* under way, or the next */
    bool shard_open;
    uint64_t n_begun; /* tensors of it */

    struct perta_patch_entry *entries; /* of the shard under way */
    uint64_t n_entries, entries_max;
    uint64_t frames_at; /* where the next frame goes */

    struct perta_tensor_counts *tensors;                 /* (after->n_tensors), shard by shard */
    uint64_t n_tensors;                                  /* begun of all */
    json_t *shards;                                      /* finished .perta files */
    uint64_t saved_shards, saved_tensors, saved_entries; /* in a journal's record */
    uint64_t n_encoded[PERTA_N_ENCODINGS], encoded_bytes[PERTA_N_ENCODINGS];
    uint64_t encoded_units[PERTA_N_ENCODINGS];
    uint64_t weights[PERTA_COUNT_BINS]; /* the caller adds to it; all 0: not on record */
    uint64_t written_bytes;
};

/* What perta_patch_out_attach and all after it take of memory: it grows with tensors and chunks. */
uint64_t perta_patch_out_memory(const struct perta_checkpoint *before,
                                const struct perta_checkpoint *after);
/* So many tensors since a journal's record make the next one due, for it takes memory too. */
bool perta_patch_out_is_due(const struct perta_patch_out *p);

/* out NULL: no model folder; else like is the model that it is of. journal says whether to go on
 * with what an interrupted run left. */
int perta_patch_out_begin(struct perta_patch_out *p, const char *path, const char *out,
                          const char *like, const struct perta_journal *journal, bool force,
                          struct perta_err *err);
/* What is patched: shards and tensors of both agree (the caller checked), and after's order is
 * the order of the chunks to come. actions (after->n_tensors, shard by shard) say what is done
 * to each tensor. model_bufs: with a model folder. */
int perta_patch_out_attach(struct perta_patch_out *p, const struct perta_checkpoint *before,
                           const struct perta_checkpoint *after, const char *const *actions,
                           struct perta_engine *engine, struct perta_writer_bufs patch_bufs,
                           struct perta_writer_bufs model_bufs, struct perta_err *err);

/* Go on to this tensor of this shard: finish what comes before, begin it if it is new. */
int perta_patch_out_reach(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                          struct perta_err *err);
/* Counts of the tensor that was reached; the caller adds to all but n_changed, n_params. */
struct perta_tensor_counts *perta_patch_out_counts(struct perta_patch_out *p);

/* What a patch holds of a chunk: deltas, or one_way new values only. *hash_before, which is that of
 * the bytes before, becomes what the table is to hold. */
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

/* Finish all shards, write manifest.json and what else belongs to the folders: complete but for
 * their names. recipe and inputs are borrowed; from is the checkpoint whose other files go with
 * the model. *summary gets what a person wants to know, the caller's. */
int perta_patch_out_finish(struct perta_patch_out *p, json_t *recipe, json_t *inputs,
                           const struct perta_checkpoint *from, json_t **summary,
                           struct perta_err *err);

/* For a journal: bring all chunks to disk; and what to keep of the state, as far as it changed
 * since the last time, the caller's. NULL without memory. */
int perta_patch_out_sync(struct perta_patch_out *p, struct perta_err *err);
json_t *perta_patch_out_save(struct perta_patch_out *p);
/* After perta_patch_out_attach: take up such states, in order; then the files under way,
 * which should be at that unit of that tensor. PERTA_EINPUT if a state is none, or is of another
 * place; PERTA_ECHECK if a file is not as it was synced. */
int perta_patch_out_restore(struct perta_patch_out *p, const json_t *state, struct perta_err *err);
int perta_patch_out_reopen(struct perta_patch_out *p, uint32_t shard, uint64_t tensor,
                           uint64_t unit, struct perta_err *err);
void perta_patch_out_release(struct perta_patch_out *p);

#endif
