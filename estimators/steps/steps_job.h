/* steps_job.h - what the parts of stepwise unlearning share: the path (steps.c), one step
 * (steps_update.c) and the patches (steps_patch.c). */
#ifndef PERTA_ESTIMATORS_STEPS_STEPS_JOB_H
#define PERTA_ESTIMATORS_STEPS_STEPS_JOB_H

#include "estimators/model/samples.h"
#include "estimators/model/weights.h"
#include "estimators/steps/steps.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "stream/journal.h"

enum { PERTA_FORGET, PERTA_RETAIN };
extern const char *const perta_sets[2]; /* "forget", "retain" */

/* A point of the path: theta(s) after some number of steps. */
struct perta_steps_point {
    double loss[2]; /* of both sets; NAN: not measured yet */
    double probability[2];
    double moved, mean_scale;
    uint64_t samples[2], tokens[2];
    bool reached;  /* its scales are written */
    json_t *patch; /* perta_unlearn's summary; NULL if the patch is not written */
};

struct perta_steps_job {
    const struct perta_steps *steps;
    struct perta_run run; /* for the jobs run inside this one; they always resume */
    struct perta_weights weights;
    struct perta_checkpoint *others[2]; /* tuned, base */
    struct perta_journal journal;
    struct perta_publish work;        /* the work folder, with what is kept between steps; never
                                       * published */
    char *work_path;                  /* name of the work folder */
    struct perta_steps_point *points; /* (n_steps + 1) */
    struct perta_samples_file data[2];
    json_t *notes; /* about the data; an array of strings */
    int patching;  /* the step whose patch an interrupted run was writing, or -1 */
};

/* ---- steps.c ---- */

/* Every flag that decides where a path of n_steps leads, for the record. */
json_t *perta_steps_parameters(const struct perta_steps_job *job, unsigned n_steps);
/* The folder of the scales at step k. The caller frees it. NULL when out of memory. */
char *perta_steps_scales(const struct perta_steps_job *job, unsigned k);
/* Does step k, which has been measured, forget enough? */
bool perta_steps_forgets_enough(const struct perta_steps_job *job, unsigned k);
/* Append record to the journal. Takes the reference; NULL means that making it ran out of
 * memory. */
int perta_steps_commit(struct perta_steps_job *job, json_t *record, struct perta_err *err);

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

/* ---- steps_update.c ---- */

/* Write a folder of scales that are all zero to the folder to: one for each parameter of model
 * whose name the globs match. */
int perta_steps_zero(const struct perta_weights *model, const struct perta_globs *globs,
                     const char *to, struct perta_err *err);

/* One step: from the scales in folder from and the mean gradients in forget and retain, compute the
 * scales in folder to. An existing folder to is replaced. */
struct perta_step_folders {
    const char *tuned, *base, *forget, *retain, *from, *to;
    bool tied; /* the model's head and its embedding are one tensor */
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
