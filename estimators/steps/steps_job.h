/* steps_job.h - what the parts of stepwise unlearning share: the path (steps.c), the data
 * (steps_data.c), what is measured at a point (steps_measure.c), the box from the model's own
 * gradient (steps_box.c, steps_size.c), one step (steps_update.c), the loop over parameters of these
 * two (steps_pass.c), and the patches (steps_patch.c). */
#ifndef PERTA_ESTIMATORS_STEPS_STEPS_JOB_H
#define PERTA_ESTIMATORS_STEPS_STEPS_JOB_H

#include "estimators/edit/adapter.h"
#include "estimators/model/samples.h"
#include "estimators/model/weights.h"
#include "estimators/passes/importance.h"
#include "estimators/steps/steps.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "stream/input.h"
#include "stream/journal.h"
#include "stream/walk.h"

#define PERTA_STEPS_TRIALS 24

enum { PERTA_FORGET, PERTA_RETAIN };
extern const char *const perta_sets[2]; /* "forget", "retain" */

/* A size c of the box that was tried, and the mean forget probability after the first step. */
struct perta_steps_trial {
    double c, probability;
};

/* A point of the path: theta(s) after some number of steps. */
struct perta_steps_point {
    double loss[2]; /* of both sets; NAN: not measured yet */
    double probability[2];
    double moved, mean_scale;
    uint64_t samples[2], tokens[2];
    bool gradients; /* of the retain set: those that the next step uses are written */
    bool reached;   /* its scales are written */
    /* forget probability under each condition that steps->survive names; NAN: not measured yet */
    double under[PERTA_N_CONDITIONS];
    /* probability of the samples that the adapter for PERTA_RETAUGHT was taught; NAN: it is not
     * written yet */
    double taught;
    bool summed; /* the sum of the scales up to this point is written */
    /* The forget set's gradients were taken, and are written, under that condition; negative: not
     * yet. Only with steps->survive. */
    int gradients_under;
    json_t *patch; /* perta_unlearn's summary; NULL if the patch is not written */
};

struct perta_steps_job {
    const struct perta_steps *steps;
    struct perta_run run; /* for the jobs run inside this one; they always resume */
    struct perta_weights weights;
    struct perta_checkpoint *others[2]; /* tuned, base; NULL: not given */
    struct perta_adapter *adapter;      /* NULL: --tuned is not an adapter */
    double box;    /* c of the box; 0 until it is found, and with tuned and base */
    double spread; /* at the model, of the forget set (struct perta_head_means) */
    double fall;   /* perta_steps_box; negative until the box is written */
    struct perta_steps_trial trials[PERTA_STEPS_TRIALS];
    unsigned n_trials;
    struct perta_journal journal;
    struct perta_publish work; /* the work folder, with what is kept between steps; never
                                       * published */
    char *work_path;           /* name of the work folder */
    /* (n_steps + 2): the last one is the mean of others (steps_mean.c) */
    struct perta_steps_point *points;
    struct perta_samples_file data[2];
    uint64_t n_forget; /* samples of the forget set */
    bool batched;      /* the retain set has more samples than retain_batch */
    json_t *notes;     /* about the data; an array of strings */
    int patching;      /* the step whose patch an interrupted run was writing, or -1 */
};

/* Is tau formed from the model's own gradient? */
static inline bool perta_steps_is_own(const struct perta_steps *steps)
{
    return !steps->tuned && !steps->base;
}

/* ---- steps.c ---- */

/* Every flag that decides where a path of n_steps leads, for the record. */
json_t *perta_steps_parameters(const struct perta_steps_job *job, unsigned n_steps);
/* The folder of the box. The caller frees it. NULL when out of memory. */
char *perta_steps_box_folder(const struct perta_steps_job *job);
/* The folder of the scales at step k. The caller frees it. NULL when out of memory. */
char *perta_steps_scales(const struct perta_steps_job *job, unsigned k);
/* Another folder of step k in the work folder: a name with %u for k, and %s for set. The caller frees
 * it. NULL when out of memory. */
char *perta_steps_path(const struct perta_steps_job *job, const char *fmt, unsigned k,
                       const char *set);
#define PERTA_STEPS_GRADIENTS "gradients-%u-%s"
/* PERTA_EINPUT if an input has changed since the path began. */
int perta_steps_check_models(const struct perta_steps_job *job, struct perta_err *err);
/* Does step k, which has been measured, forget enough? */
bool perta_steps_forgets_enough(const struct perta_steps_job *job, unsigned k);
/* Does the step from point k, where the set has been measured, use its gradients? */
bool perta_steps_uses_gradients(const struct perta_steps_job *job, unsigned k, int set);
/* The first point up to k that forgets enough; k + 1 if there is none. */
unsigned perta_steps_first(const struct perta_steps_job *job, unsigned k);
/* Append record to the journal. Takes the reference; NULL means that making it ran out of
 * memory. */
int perta_steps_commit(struct perta_steps_job *job, json_t *record, struct perta_err *err);

/* ---- steps_measure.c ---- */

/* Measure point k, whose scales are written, as far as that is not done. */
int perta_steps_measure(struct perta_steps_job *job, unsigned k, struct perta_err *err);

/* The model of a step, and where its gradients go. */
struct perta_steps_model {
    char *scales, *box, *gradients[2]; /* folders */
    struct perta_scaled_paths paths;
    const struct perta_scaled_paths
        *at; /* paths; NULL: --model as it is, if the box is not formed */
};
/* Closed with perta_steps_model_close, on error too. */
int perta_steps_model_open(const struct perta_steps_job *job, unsigned k,
                           struct perta_steps_model *model, struct perta_err *err);
void perta_steps_model_close(struct perta_steps_model *model);

/* A change to the model before it is asked, and which samples it is asked. */
struct perta_steps_change {
    enum perta_rounding quantize;
    const char *adapter; /* NULL: none */
    struct perta_pick pick;
};
/* Measure set at that model (NULL: --model as it is), forget or retain, forward only. *summary is
 * perta_eval's. */
int perta_steps_eval(struct perta_steps_job *job, int set, const struct perta_scaled_paths *at,
                     const struct perta_steps_change *change, json_t **summary,
                     struct perta_err *err);
/* The same with gradients, written to the folder out; of the forget set, those of minus the
 * probability. takes as in perta_estimate, NULL: always. *summary is perta_estimate's. */
int perta_steps_estimate(struct perta_steps_job *job, int set, const struct perta_scaled_paths *at,
                         const struct perta_steps_change *change, const char *out,
                         bool (*takes)(void *ctx, double loss, double probability), void *ctx,
                         json_t **summary, struct perta_err *err);

/* ---- steps_survive.c ---- */

/* PERTA_EINPUT if a condition cannot be had with this model or this forget set. */
int perta_steps_survive_check(struct perta_steps_job *job, struct perta_err *err);
/* Does the point, which has been measured, forget enough under every condition that is named? drawn:
 * those that are drawn anew at each point, too. */
bool perta_steps_survives(const struct perta_steps_job *job, unsigned k, bool drawn);
/* After the forget set is measured at point k as it is: measure it under the conditions that are
 * named; then take the gradients under the worst of them, if the next step uses any. */
int perta_steps_survive(struct perta_steps_job *job, unsigned k, struct perta_err *err);
/* Take what a record of the journal says about this. */
void perta_steps_survive_replay(struct perta_steps_point *point, const json_t *record);
/* For the record: which conditions, and all numbers that decide the result. */
json_t *perta_steps_survive_parameters(const struct perta_steps_job *job);
/* The forget probabilities of a point, for the path. */
json_t *perta_steps_survive_point(const struct perta_steps_job *job, unsigned k);
/* perta_steps' "conditions", of point k. */
json_t *perta_steps_survive_end(const struct perta_steps_job *job, unsigned k);
/* Add a note if the samples that were taught before point k did not learn much. */
int perta_steps_survive_note(struct perta_steps_job *job, unsigned k, struct perta_err *err);
#define PERTA_STEPS_TAUGHT "taught-%u%s"

/* ---- steps_mean.c ---- */

/* After point k is measured: add its scales to the sum of those from the first point on that forgot
 * enough, if there is one. Only with steps->hold and steps->survive. */
int perta_steps_sum(struct perta_steps_job *job, unsigned k, struct perta_err *err);
/* Write the mean of what was summed up to point n_steps as the scales of point n_steps + 1. *made:
 * there was more than one. */
int perta_steps_mean(struct perta_steps_job *job, bool *made, struct perta_err *err);
#define PERTA_STEPS_SUM "sum-%u%s"

/* ---- steps_data.c ---- */

/* Read both data files, for what job keeps of them: data and notes. Every step reads them again,
 * and refuses them if they have changed since. PERTA_EINPUT if a sample is in both. */
int perta_steps_read_data(struct perta_steps_job *job, struct perta_err *err);

/* ---- steps_patch.c ---- */

/* Check that the outputs may be written, and that the input folders match. */
int perta_steps_patch_check(const struct perta_steps_job *job, struct perta_err *err);
/* Write the patch of step k, unless it is written already. Its record describes a path of n_steps
 * that is measured up to last. */
int perta_steps_patch(struct perta_steps_job *job, unsigned n_steps, unsigned k, unsigned last,
                      struct perta_err *err);
/* Write the last patch, and make the summary of perta_steps. */
int perta_steps_finish(struct perta_steps_job *job, unsigned chosen, unsigned last,
                       json_t **summary, struct perta_err *err);

/* ---- steps_pass.c ---- */

/* to (n) = elements first.. of view, as double. */
void perta_steps_load(const struct perta_view *view, uint64_t first, size_t n, double *restrict to);

/* Begin a folder with those tensors of like that wanted selects (NULL: all). It replaces what is at
 * path. metadata: the reference is taken. */
int perta_steps_out_begin(struct perta_importance_out *out, const struct perta_checkpoint *like,
                          enum perta_dtype dtype, json_t *metadata,
                          bool (*wanted)(void *ctx, const char *name), void *ctx, const char *path,
                          struct perta_err *err);
int perta_steps_out_finish(struct perta_importance_out *out, struct perta_err *err);
void perta_steps_out_release(struct perta_importance_out *out);

/* The metadata of a folder of scales; the caller's. NULL when out of memory. */
json_t *perta_steps_scale_metadata(void);
/* PERTA_EUSAGE if no parameter of the model has a scale: the globs select none, or none that the
 * adapter changes, or no matrix for a box of the model's own. */
int perta_steps_any(const struct perta_steps_job *job, struct perta_err *err);
/* Write a folder of scales that are all zero to the folder to: one for each such parameter. */
int perta_steps_zero(struct perta_steps_job *job, const char *to, struct perta_err *err);

#define PERTA_STEPS_INPUTS_MAX 5

struct perta_steps_input {
    const char *role, *path; /* path is NULL: there is no such input */
};

/* A chunk of a tensor that has scales: the same elements of all inputs. */
struct perta_steps_piece {
    const struct perta_tensor *scale; /* the tensor of scales */
    uint64_t index;                   /* its place in the order of names */
    uint64_t first, n;
    struct perta_view in[PERTA_STEPS_INPUTS_MAX]; /* for work(); no data where there is no input.
                                                   * Of a LoRA: its task vector, and no base */
    void *out;                                    /* head_bytes + n * elem_bytes */
};

/* A pass over all parameters that have scales. */
struct perta_steps_pass {
    void *ctx;
    size_t head_bytes, elem_bytes; /* what a piece gives */
    /* Called on several threads, in any order. */
    void (*work)(void *ctx, const struct perta_steps_piece *piece);
    /* Called in order. */
    int (*commit)(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err);
    /* Set if the first two inputs are --tuned, which may be an adapter of this model, and --base.
     * Borrowed. */
    const struct perta_checkpoint *model;
    /* The rest is set by open. */
    struct perta_input in[PERTA_STEPS_INPUTS_MAX]; /* (n_in) */
    unsigned n_in, n_read;
    struct perta_adapter *adapter;         /* NULL: --tuned is not one */
    const struct perta_checkpoint *scales; /* the last input */
    struct perta_walk walk;                /* position in it */
    bool tied;
};

/* Open the inputs (n_in), of which the first n_read are read; the last one is the folder of scales.
 * tied: the model's head and its embedding are one tensor. Closed with perta_steps_pass_close, on
 * error too. */
int perta_steps_pass_open(struct perta_steps_pass *pass, const struct perta_steps_input *inputs,
                          unsigned n_in, unsigned n_read, bool tied, struct perta_err *err);
int perta_steps_pass_run(struct perta_steps_pass *pass, const struct perta_run *run,
                         struct perta_err *err);
void perta_steps_pass_close(struct perta_steps_pass *pass);

/* ---- steps_box.c ---- */

/* Write the box of the model's own gradient to the folder to (estimators/edit/box.h), for the
 * tensors that have scales: tau = (c * rms(W)) * sign(-forget), where forget is the mean gradient of
 * minus the forget probability. An existing folder to is replaced. *fall: by how much a first step
 * of size 1 in a box with c = 1 lowers forget's loss, to first order: the sum of rms(W) * |forget|
 * over parameters whose scale it raises. */
struct perta_box_folders {
    const char *model, *forget, *retain, *scales, *to;
    bool tied; /* the model's head and its embedding are one tensor */
};
int perta_steps_box(const struct perta_box_folders *folders, const struct perta_run *run,
                    double *fall, struct perta_err *err);

/* ---- steps_size.c ---- */

/* After the first step, which does not depend on c: find job->box, unless it is known. */
int perta_steps_find_size(struct perta_steps_job *job, struct perta_err *err);

/* ---- steps_update.c ---- */

/* One step: from the scales in folder from and the mean gradients in forget and retain, compute the
 * scales in folder to. An existing folder to is replaced. */
struct perta_step_folders {
    const char *tuned, *base, *box; /* the box is NULL, or tuned and base are */
    const char *forget;             /* NULL: no scale grows */
    const char *retain, *from, *to;
    const struct perta_checkpoint *model; /* borrowed */
    bool tied;                            /* the model's head and its embedding are one tensor */
};
struct perta_step_counts {
    uint64_t n, n_moved; /* number of scales, and of those that changed */
    double sum;          /* of the new scales */
};
int perta_steps_update(const struct perta_step_rule *rule, const struct perta_step_folders *folders,
                       const struct perta_run *run, struct perta_step_counts *counts,
                       struct perta_err *err);

/* Check the arguments (stream/arguments.h). */
int perta_steps_arguments(const struct perta_steps *steps, struct perta_err *err);

#endif
