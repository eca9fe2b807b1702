/* tune_job.h - shared by the files of tune: arguments (tune_arguments.c); the new adapter, the order
 * of samples and memory (tune_plan.c); one update (tune_update.c); the output and commit points
 * (tune_out.c); and the run itself (tune.c). */
#ifndef PERTA_ESTIMATORS_PASSES_TUNE_JOB_H
#define PERTA_ESTIMATORS_PASSES_TUNE_JOB_H

#include "estimators/passes/estimate_job.h"
#include "estimators/passes/tune.h"

struct perta_tune_job {
    struct perta_tune tune; /* with all defaults filled in */
    const struct perta_run *run;
    struct perta_estimate estimate; /* what a pass needs to know */
    struct perta_estimate_job pass; /* its samples are those of one update */
    struct perta_patched patched;   /* of tune.patch */
    struct perta_samples all;
    uint32_t *order;    /* (all.n): the samples in the order of an epoch */
    uint64_t ordered;   /* that epoch, from 1; 0: none yet */
    uint64_t per_epoch; /* updates */
    uint64_t n_updates, n_done;
    struct perta_tune_update *updates; /* (n_updates): those done */
    uint64_t n_recorded;               /* updates that are in the journal */
    unsigned state;                    /* the file (0 or 1) that its last record needs */
    uint32_t lowest;                   /* the first layer with a LoRA: no gradient goes below */
    /* (factors.n_floats) each, after the factors' values: AdamW's moments, and the gradients */
    struct perta_array first, second, gradients;
    struct perta_publish folder;
};

/* ---- tune_arguments.c ---- */

/* Check the arguments and fill in defaults: *job is otherwise zeroed. */
int perta_tune_arguments(struct perta_tune_job *job, const struct perta_tune *tune,
                         struct perta_err *err);
const char *perta_lr_scheduler_name(enum perta_lr_scheduler scheduler);

/* ---- tune_plan.c ---- */

/* After perta_estimate_open: lay out the adapter, if it is a new one; count updates. */
int perta_tune_count(struct perta_tune_job *job, struct perta_err *err);
/* Take the memory, enough for any update, and the adapter's initial values. */
int perta_tune_plan(struct perta_tune_job *job, struct perta_err *err);
/* Make the samples of update number n (from 0) those of the pass, and cut their tokens. */
int perta_tune_take(struct perta_tune_job *job, uint64_t n, struct perta_err *err);
/* Does a module of that name (len characters) fit a name in target_modules? As in PEFT. */
bool perta_tune_is_target(const struct perta_tune *tune, const char *module, size_t len);

/* ---- tune_update.c ---- */

/* Forward, backward, clip, AdamW: update number n_done, which is recorded in updates. */
int perta_tune_update(struct perta_tune_job *job, struct perta_err *err);

/* ---- tune_out.c ---- */

/* Begin the output, or resume what an interrupted run left. *publishing: everything is written, and
 * only perta_tune_publish is left to call. */
int perta_tune_begin(struct perta_tune_job *job, bool *publishing, struct perta_err *err);
/* Restore the state of the last commit point, if there is one. */
int perta_tune_restore(struct perta_tune_job *job, struct perta_err *err);
/* After an update: if a commit point is due, save the state and log it in the journal. */
int perta_tune_commit(struct perta_tune_job *job, struct perta_err *err);
/* Write the adapter and publish it. If an earlier run had finished, *summary is replaced by its
 * summary. */
int perta_tune_publish(struct perta_tune_job *job, json_t **summary, struct perta_err *err);
/* After an error: keep what --resume needs. */
void perta_tune_abandon(struct perta_tune_job *job, int rc, struct perta_err *err);
/* For the record: everything but paths that decided the result. The caller's; NULL only when out of
 * memory. */
json_t *perta_tune_recipe(const struct perta_tune_job *job);

#endif
