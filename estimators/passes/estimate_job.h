/* estimate_job.h - shared by the files of estimate: the memory plan (estimate_plan.c), the forward
 * pass (estimate_forward.c), which eval (eval.c) uses too, outputs and resuming
 * (estimate_resume.c), and the run itself (estimate.c). */
#ifndef PERTA_ESTIMATORS_PASSES_ESTIMATE_JOB_H
#define PERTA_ESTIMATORS_PASSES_ESTIMATE_JOB_H

#include "estimators/compute/cpu.h"
#include "estimators/compute/gemm.h"
#include "estimators/model/block.h"
#include "estimators/model/cache.h"
#include "estimators/passes/adapted.h"
#include "estimators/passes/estimate.h"
#include "estimators/passes/experts.h"
#include "estimators/passes/head.h"
#include "estimators/passes/importance_sink.h"
#include "estimators/passes/patched.h"
#include "estimators/passes/scaled.h"
#include "stream/journal.h"
#include "stream/memory.h"

struct perta_estimate_job {
    const struct perta_estimate *estimate;
    const struct perta_run *run;
    struct perta_scaled scaled; /* of estimate->at */
    /* forms the model's tensors; NULL: they are read from its files. Borrowed */
    struct perta_source *source;
    struct perta_weights weights;
    struct perta_adapted adapted;      /* estimate->adapter */
    struct perta_factors factors;      /* of the adapter, or of one that is tuned */
    struct perta_array factors_memory; /* (n_factor_arrays, factors.n_floats); values come first */
    unsigned n_factor_arrays;
    struct perta_samples samples;
    bool tunes;    /* a pass of tune: labels are pooled, and only LoRA gets gradients */
    bool answers;  /* read the other answers of each line, too */
    bool measured; /* compute what measures.h is made from */
    /* keeps keys and values of the forward pass; NULL: they are not kept. Borrowed */
    struct perta_cache *cache;
    bool adds; /* the samples are tokens that are added to the cache's sequences */
    /* instead of importance: norms of each sample's gradient, of its loss without the last label.
     * Borrowed */
    struct perta_norms *norms;
    struct perta_importance_out outs[2];
    struct perta_behind *behind; /* writes them */
    struct perta_workers *workers;
    struct perta_backend *be;
    struct perta_statistic statistic;
    struct perta_importance_sink sink;
    struct perta_head head;
    struct perta_scratch scratch;
    struct perta_journal journal;

    struct perta_pool pool;  /* rooms for weights, and means to be written */
    uint32_t memory;         /* buffer of the backend, for the following and for gradients */
    struct perta_array work; /* a batch's activations, or the head's work */
    float *inv_freq;         /* (4, head_dim / 2): perta_llm_rope_tables */
    float *slopes;           /* (n_heads), of ALiBi */

    size_t *starts;               /* (samples.n + 1): first token of each sample */
    struct perta_experts experts; /* of a model with mixtures */
    struct perta_cut cut;         /* of tokens */
    struct perta_chunks chunks;   /* of tokens */
    size_t batch_tokens;          /* tokens in a batch, at most */
    size_t n_batches;
    /* (n_layers): buffers in which the forward pass leaves a layer's activations for the backward
     * pass; 0: it does not. Only if all tokens are one batch. NULL: none */
    uint32_t *kept;
    struct perta_store *x; /* (n_layers + 1): input of each block, and result of the last */
    struct perta_store dx; /* gradient of the input of dx_layer */
    uint32_t dx_layer;
    int64_t dx_saved;        /* the layer whose dx file the last record needs; -1: none */
    uint64_t reserved_bytes; /* of memory, kept free for dx */
    uint64_t later_bytes;    /* of the heap, that the caller takes after the plan */
    uint64_t total_bytes;
    struct perta_head_means means;
    bool forward_only; /* estimate->takes_gradients returned false */
};

/* ---- estimate_plan.c ---- */

/* Set the tokens of all samples, in sequence, and how they are cut. */
int perta_estimate_tokens(struct perta_estimate_job *job, struct perta_err *err);
/* Choose the number of workers, the size of batches and whether to read ahead, as memory allows,
 * and take the memory. */
int perta_estimate_plan(struct perta_estimate_job *job, bool bf16, struct perta_err *err);

/* ---- estimate_forward.c ---- */

/* Open the model and read the samples, and check both. */
int perta_estimate_open(struct perta_estimate_job *job, struct perta_err *err);
/* After perta_estimate_open: apply a patch (path; NULL: none) while the model is read, with patched, a
 * zeroed struct that the caller closes after the job. */
int perta_estimate_apply(struct perta_estimate_job *job, const char *path,
                         struct perta_patched *patched, struct perta_err *err);
/* Add to the summary in which format weights are rounded, and how many. */
void perta_estimate_say_rounded(const struct perta_estimate_job *job, json_t **summary);
bool perta_estimate_bf16(const struct perta_estimate_job *job);
/* Set the scratch folder of a job that writes nothing: estimate->scratch, $TMPDIR or /var/tmp. */
int perta_estimate_scratch_here(struct perta_estimate_job *job, struct perta_err *err);
/* Open the head, after the plan and perta_weights_start. statistic NULL: only the forward pass
 * follows. */
int perta_estimate_open_head(struct perta_estimate_job *job, struct perta_statistic *statistic,
                             struct perta_err *err);
/* Close and free all that a job holds. Half-open jobs are allowed. */
void perta_estimate_release(struct perta_estimate_job *job);

/* Forward pass of a layer, over all tokens. from and to may be the same. */
int perta_estimate_forward(struct perta_estimate_job *job, uint32_t number,
                           const struct perta_store *from, struct perta_store *to,
                           struct perta_err *err);
/* Forward pass of the whole model: x (tokens, H) is overwritten by each block; job->head has the
 * losses. */
int perta_estimate_forward_all(struct perta_estimate_job *job, struct perta_store *x,
                               struct perta_err *err);
/* The batch that starts with *group, which becomes the first group of the next batch. */
struct perta_batch perta_estimate_batch(const struct perta_estimate_job *job, size_t *group);
/* Lay out a batch's activations of a layer. Returns whether they are kept. */
bool perta_estimate_acts(const struct perta_estimate_job *job, uint32_t layer, size_t n,
                         struct perta_acts *acts);
/* Begin to read a layer's weights, and to read ahead what next says: a layer, the head (n_layers),
 * or nothing (UINT32_MAX). Returns the layer, ready for use. sink: receives its gradients; NULL:
 * not wanted. */
struct perta_layer perta_estimate_layer(struct perta_estimate_job *job, uint32_t number,
                                        uint32_t next, struct perta_gradient_sink *sink);
/* After perta_head_forward: the mean loss over a sample's labels. PERTA_EINPUT, with its line, if
 * that is not finite. */
int perta_estimate_loss(const struct perta_estimate_job *job, uint64_t sample, double *loss,
                        struct perta_err *err);
/* Report progress. PERTA_EINTR if the run is to be cancelled. */
int perta_estimate_advance(struct perta_estimate_job *job, struct perta_err *err);
/* The same as a callback; ctx is a struct perta_estimate_job. */
int perta_estimate_on_part(void *ctx, struct perta_err *err);

/* ---- estimate.c ---- */

/* After perta_estimate_open, of a job with norms: the forward and the backward pass. Nothing is
 * written. */
int perta_estimate_norms(struct perta_estimate_job *job, struct perta_err *err);

/* Backward pass of a layer, over all tokens, from job->x of the layer and job->dx to next. Gradients
 * of weights go to the layer's sink. */
int perta_estimate_backward(struct perta_estimate_job *job, const struct perta_layer *layer,
                            struct perta_store *next, struct perta_err *err);

/* ---- estimate_resume.c ---- */

enum perta_stage { PERTA_BEGUN, PERTA_FORWARD, PERTA_HEAD_DONE, PERTA_BACKWARD, PERTA_PUBLISH };

/* Begin the outputs, or resume what an interrupted run left. *stage and *layer are the last that
 * were finished. */
int perta_estimate_begin(struct perta_estimate_job *job, bool bf16, enum perta_stage *stage,
                         uint32_t *layer, struct perta_err *err);
/* Restore the stores as they were after that stage. */
int perta_estimate_restore(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                           struct perta_err *err);
/* Call when a stage is finished: if a commit point is due, sync everything to disk and log it in
 * the journal. */
int perta_estimate_commit(struct perta_estimate_job *job, enum perta_stage stage, uint32_t layer,
                          struct perta_err *err);
/* Publish the outputs. If an earlier run had finished, *summary is replaced by its summary. */
int perta_estimate_publish(struct perta_estimate_job *job, json_t **summary, struct perta_err *err);
/* Without gradients: remove the outputs that were begun, and the journal. */
int perta_estimate_drop(struct perta_estimate_job *job, struct perta_err *err);
/* After an error: keep what --resume needs. */
void perta_estimate_abandon(struct perta_estimate_job *job, int rc, struct perta_err *err);

/* A folder for data of the output at out: in scratch; if that is NULL, in its partial folder. home:
 * a name of the output's, should it not exist. The caller frees it; NULL only when out of memory. */
char *perta_estimate_scratch(const char *scratch, const char *out, const char *home,
                             const char *partial);

/* Names of stores in the scratch folder; buf (16). */
const char *perta_estimate_x_name(char *buf, uint32_t layer);
const char *perta_estimate_dx_name(char *buf, uint32_t layer);

#endif
