/* importance.h - the layout of an importance folder: the shards and tensors of a checkpoint, in
 * float32, with metadata that says what they hold. Folders of scales (steps.h) have the same
 * layout, in bfloat16. */
#ifndef PERTA_ESTIMATORS_PASSES_IMPORTANCE_H
#define PERTA_ESTIMATORS_PASSES_IMPORTANCE_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/compute/round.h"
#include "estimators/edit/edit.h"
#include "io/behind.h"
#include "io/format/checkpoint.h"
#include "io/publish/publish.h"
#include "stream/journal.h"

struct perta_importance_shard {
    const char *name; /* borrowed from the checkpoint */
    uint8_t *header;
    uint64_t header_bytes, file_bytes;
    struct perta_tensor *tensors; /* (n_tensors) with their offsets; names and shapes are borrowed
                                   * from the checkpoint */
    uint64_t n_tensors;
};

struct perta_importance {
    struct perta_importance_shard *shards; /* (n_shards) */
    uint32_t n_shards;
    char *index; /* text of the index file; NULL if there is one shard */
};

/* The metadata of every shard. */
struct perta_importance_about {
    enum perta_stat stat;
    uint64_t n_samples;
    uint64_t n_tokens;     /* over all samples; 0 if not known */
    const char *data_hmac; /* keyed digest of the data file; NULL or "" if there is none */
    json_t *adapter;       /* rank, alpha and so on of a LoRA that was in effect; NULL: none */
    enum perta_rounding quantize; /* of the weights at which the gradients were taken */
};

/* Plan a folder with the layout of like (borrowed): those of its tensors that wanted accepts (NULL:
 * all), in dtype. Shards without any such tensor are left out. metadata: the reference is taken.
 * Release the plan with perta_importance_release(), also after an error. */
int perta_importance_plan_as(struct perta_importance *plan, const struct perta_checkpoint *like,
                             enum perta_dtype dtype, json_t *metadata,
                             bool (*wanted)(void *ctx, const char *name), void *ctx,
                             struct perta_err *err);
/* The same for importance: in F32, with the metadata that about describes. */
int perta_importance_plan(struct perta_importance *plan, const struct perta_checkpoint *like,
                          const struct perta_importance_about *about,
                          bool (*wanted)(void *ctx, const char *name), void *ctx,
                          struct perta_err *err);
void perta_importance_release(struct perta_importance *plan);

/* An importance folder whose tensors can be written in any order. */
struct perta_importance_out {
    struct perta_importance plan;
    struct perta_publish folder;
    int *fds;                    /* (plan.n_shards) */
    int *direct_fds;             /* (plan.n_shards) for O_DIRECT; -1 if the file system has none */
    struct perta_behind *behind; /* borrowed */
    struct by_name {
        const struct perta_tensor *tensor;
        uint32_t shard;
    } *by_name; /* (n_tensors), sorted by name */
    uint64_t n_tensors, written_bytes;
};

/* Begin the folder at path. Takes over plan. journal says whether to resume what an interrupted run
 * left. All writes go through behind, which must be closed before out is released. */
int perta_importance_begin(struct perta_importance_out *out, struct perta_importance *plan,
                           const char *path, const struct perta_journal *journal, bool force,
                           struct perta_behind *behind, struct perta_err *err);
/* Write n elements of a tensor, in the plan's dtype, from element first on. */
int perta_importance_write(struct perta_importance_out *out, const char *name, uint64_t first,
                           const void *data, uint64_t n, struct perta_err *err);
/* Make everything that was written so far durable (fsync). */
int perta_importance_sync(const struct perta_importance_out *out, struct perta_err *err);
/* Sync, and write the index: then everything is written and only the rename remains. Tensors that
 * were not written are zero. */
int perta_importance_finish(struct perta_importance_out *out, struct perta_err *err);
void perta_importance_out_release(struct perta_importance_out *out);

#endif
