/* estimate_job.h - what the parts of estimate share: the plan (estimate_plan.c), the way forward
 * (estimate_forward.c), which is eval's (eval.c) too, what is kept for a run that goes on
 * (estimate_resume.c), and the run itself (estimate.c). */
#ifndef PERTA_ESTIMATORS_PASSES_ESTIMATE_JOB_H
#define PERTA_ESTIMATORS_PASSES_ESTIMATE_JOB_H

#include "estimators/compute/cpu.h"
#include "estimators/compute/gemm.h"
#include "estimators/model/block.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/head.h"
#include "estimators/passes/importance_sink.h"
#include "estimators/passes/scaled.h"
#include "stream/journal.h"
#include "stream/memory.h"

struct perta_estimate_job {
    const struct perta_estimate *estimate;
    const struct perta_run *run;
    struct perta_scaled scaled;  /* of estimate->at */
    struct perta_source *source; /* what the model's tensors are instead, or NULL; borrowed */
    struct perta_weights weights;
    struct perta_samples samples;
    bool answers; /* samples are to hold the other answers too */
    struct perta_importance_out outs[2];
    struct perta_behind *behind; /* that writes them */
    struct perta_workers *workers;
    struct perta_backend *be;
    struct perta_statistic statistic;
    struct perta_importance_sink sink;
    struct perta_head head;
    struct perta_scratch scratch;
    struct perta_journal journal;

    struct perta_pool pool;  /* rooms for weights, and what goes to files */
    uint32_t memory;         /* the backend's buffer of: */
    struct perta_array work; /* for a batch: its activations, or the head's */
    float *inv_freq;         /* (head_dim / 2) */

    size_t *starts;             /* (samples.n + 1): tokens of each */
    struct perta_cut cut;       /* tokens */
    struct perta_chunks chunks; /* tokens */
    size_t batch_tokens;        /* at a time */
    size_t n_batches;
    struct perta_store *x; /* (n_layers + 1): what each block gets; the last block's result */
    struct perta_store dx; /* the gradient of what dx_layer gets */
    uint32_t dx_layer;
    int64_t dx_saved;        /* the layer whose dx is in a file that a record counts on; -1: none */
    uint64_t reserved_bytes; /* of memory, for dx */
    uint64_t total_bytes;
    struct perta_head_means means;
};

/* ---- estimate_plan.c ---- */

/* Tokens of all samples, in sequence, and where they are cut. */
int perta_estimate_tokens(struct perta_estimate_job *job, struct perta_err *err);
/* Find the workers, the batches and what is read ahead that memory allows, and take it. */
int perta_estimate_plan(struct perta_estimate_job *job, bool bf16, struct perta_err *err);

/* ---- estimate_forward.c ---- */

/* The model and the samples, checked. */
int perta_estimate_open(struct perta_estimate_job *job, struct perta_err *err);
bool perta_estimate_bf16(const struct perta_estimate_job *job);
/* After the plan, when weights are started. statistic NULL: no gradients are to come. */
int perta_estimate_open_head(struct perta_estimate_job *job, struct perta_statistic *statistic,
                             struct perta_err *err);
/* Close and free all that a job holds; half-open is fine. */
void perta_estimate_release(struct perta_estimate_job *job);

/* What layer number makes of all tokens' rows. from and to may be the same. */
int perta_estimate_forward(struct perta_estimate_job *job, uint32_t number,
                           const struct perta_store *from, struct perta_store *to,
                           struct perta_err *err);
/* The batch that begins with a group; *group is the next batch's. */
struct perta_batch perta_estimate_batch(const struct perta_estimate_job *job, size_t *group);
/* Begin to read a layer's weights, and then those of what comes next (a layer, or the head:
 * n_layers; or nothing: UINT32_MAX). The layer is ready for use; sink: where its gradients go, or
 * NULL. */
struct perta_layer perta_estimate_layer(struct perta_estimate_job *job, uint32_t number,
                                        uint32_t next, struct perta_gradient_sink *sink);
/* After perta_head_forward: the mean loss over one sample's labels. PERTA_EINPUT, with its line,
 * where that is not a finite number. */
int perta_estimate_loss(const struct perta_estimate_job *job, uint64_t sample, double *loss,
                        struct perta_err *err);
/* Tell of progress; PERTA_EINTR if the user wants to stop. */
int perta_estimate_advance(struct perta_estimate_job *job, struct perta_err *err);
/* The same as a callback; ctx is a struct perta_estimate_job. */
int perta_estimate_on_part(void *ctx, struct perta_err *err);

/* ---- estimate_resume.c ---- */

enum perta_stage { PERTA_BEGUN, PERTA_FORWARD, PERTA_HEAD_DONE, PERTA_BACKWARD, PERTA_PUBLISH };

/* Begin the outputs, or go on with what an interrupted run left. *stage and *layer are the last
 * that are done. */
int perta_estimate_begin(struct perta_estimate_job *job, bool bf16, enum perta_stage *stage,
                         uint32_t *layer, struct perta_err *err);
/* Open stores again as they were after that stage. */
int perta_estimate_restore(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                           struct perta_err *err);
/* A stage is done: if it is time, bring it to disk and say so in the journal. */
int perta_estimate_commit(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                          struct perta_err *err);
/* All is done: give the outputs their names. *summary is replaced where an earlier run had got
 * so far. */
int perta_estimate_publish(struct perta_estimate_job *job, json_t **summary, struct perta_err *err);
/* After an error: keep what a run with --resume can go on with. */
void perta_estimate_abandon(struct perta_estimate_job *job, int rc, struct perta_err *err);

/* Names of stores in the scratch folder; buf (16). */
const char *perta_estimate_x_name(char *buf, uint32_t layer);
const char *perta_estimate_dx_name(char *buf, uint32_t layer);

#endif
