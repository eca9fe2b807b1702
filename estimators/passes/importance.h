/* importance.h - the layout of an importance folder: the shards and tensors of a checkpoint, in
 * float32, with metadata that says what they hold; and of scales (steps.h), in bfloat16. */
#ifndef PERTA_ESTIMATORS_PASSES_IMPORTANCE_H
#define PERTA_ESTIMATORS_PASSES_IMPORTANCE_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/edit/edit.h"
#include "io/behind.h"
#include "io/format/checkpoint.h"
#include "io/publish/publish.h"
#include "stream/journal.h"

struct perta_importance_shard {
    const char *name; /* borrowed from the checkpoint */
    uint8_t *header;
    uint64_t header_bytes, file_bytes;
    struct perta_tensor *tensors; /* (n_tensors), laid out; names and shapes are borrowed */
    uint64_t n_tensors;
};

struct perta_importance {
    struct perta_importance_shard *shards; /* (n_shards) */
    uint32_t n_shards;
    char *index; /* text of the index file; NULL for one shard */
};

/* What goes into the metadata of every shard. */
struct perta_importance_about {
    enum perta_stat stat;
    uint64_t n_samples;
    uint64_t n_tokens;     /* of all samples; 0: not known */
    const char *data_hmac; /* of the file of samples, with the user's key; NULL or "": none */
};

/* Lay out like a checkpoint, in dtype and with metadata (stolen), tensors for which wanted (NULL:
 * all) says yes; shards without any
 * stay away. like is borrowed. Released with perta_importance_release, on error too. */
int perta_importance_plan_as(struct perta_importance *plan, const struct perta_checkpoint *like,
                             enum perta_dtype dtype, json_t *metadata,
                             bool (*wanted)(void *ctx, const char *name), void *ctx,
                             struct perta_err *err);
/* The same for importance: F32, and what it is over. */
int perta_importance_plan(struct perta_importance *plan, const struct perta_checkpoint *like,
                          const struct perta_importance_about *about,
                          bool (*wanted)(void *ctx, const char *name), void *ctx,
                          struct perta_err *err);
void perta_importance_release(struct perta_importance *plan);

/* An importance folder that is written anywhere, in any order. */
struct perta_importance_out {
    struct perta_importance plan;
    struct perta_publish folder;
    int *fds;                    /* (plan.n_shards) */
    int *direct_fds;             /* (plan.n_shards), -1 where there is none */
    struct perta_behind *behind; /* borrowed */
    struct by_name {
        const struct perta_tensor *tensor;
        uint32_t shard;
    } *by_name; /* sorted */
    uint64_t n_tensors, written_bytes;
};

/* Takes over plan. journal says whether to go on with what an interrupted run left. behind writes,
 * and is closed before out is released. */
int perta_importance_begin(struct perta_importance_out *out, struct perta_importance *plan,
                           const char *path, const struct perta_journal *journal, bool force,
                           struct perta_behind *behind, struct perta_err *err);
/* n elements of a tensor, in the plan's dtype, from element first on. */
int perta_importance_write(struct perta_importance_out *out, const char *name, uint64_t first,
                           const void *data, uint64_t n, struct perta_err *err);
/* What was written so far is on disk. */
int perta_importance_sync(const struct perta_importance_out *out, struct perta_err *err);
/* Sync, and add the index: complete but for its name. Tensors that nobody wrote are zero. */
int perta_importance_finish(struct perta_importance_out *out, struct perta_err *err);
void perta_importance_out_release(struct perta_importance_out *out);

#endif
