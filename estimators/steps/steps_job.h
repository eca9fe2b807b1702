/* steps_job.h - what the parts of stepwise unlearning share: the way (steps.c), a step
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

/* theta(s) at one step, and how it came there. */
struct perta_steps_point {
    double loss[2]; /* of both sets; NAN: not measured yet */
    double probability[2];
    double moved, mean_scale;
    uint64_t samples[2], tokens[2];
    bool reached;  /* its scales are there */
    json_t *patch; /* perta_unlearn's summary; NULL: not written */
};

struct perta_steps_job {
    const struct perta_steps *steps;
    struct perta_run run; /* of what is run within: it always goes on */
    struct perta_weights weights;
    struct perta_checkpoint *others[2]; /* tuned, base */
    struct perta_journal journal;
    struct perta_publish work;        /* never published: what is kept between steps */
    char *home;                       /* the work folder's name */
    struct perta_steps_point *points; /* (n_steps + 1) */
    struct perta_samples_file data[2];
    json_t *notes; /* of the data; strings */
    int patching;  /* step whose patch an earlier run was at; -1: none */
};

/* ---- steps.c ---- */

/* Every flag that decides where a way of n_steps leads. */
json_t *perta_steps_parameters(const struct perta_steps_job *job, unsigned n_steps);
/* The folder of step k's scales; the caller's. NULL without memory. */
char *perta_steps_scales(const struct perta_steps_job *job, unsigned k);
/* Does step k, which was measured, forget enough? */
bool perta_steps_forgets_enough(const struct perta_steps_job *job, unsigned k);
/* Append record (the caller's no more; NULL: no memory) to the journal. */
int perta_steps_commit(struct perta_steps_job *job, json_t *record, struct perta_err *err);

/* ---- steps_patch.c ---- */

/* That outputs may be written, and that the folders fit together. */
int perta_steps_patch_check(const struct perta_steps_job *job, struct perta_err *err);
/* The patch of step k, unless it is there; its record is of a way that was to have n_steps,
 * measured up to last. */
int perta_steps_patch(struct perta_steps_job *job, unsigned n_steps, unsigned k, unsigned last,
                      struct perta_err *err);
/* The last patch. *summary is perta_steps's. */
int perta_steps_finish(struct perta_steps_job *job, unsigned chosen, unsigned last,
                       json_t **summary, struct perta_err *err);

/* ---- steps_update.c ---- */

/* Write scales that are all zero to the folder to, for model's parameters whose names globs
 * match. */
int perta_steps_zero(const struct perta_weights *model, const struct perta_globs *globs,
                     const char *to, struct perta_err *err);

/* A step: from the scales in folder from, and the mean gradients in forget and retain, to
 * new ones in folder to. What is at to is replaced. */
struct perta_step_folders {
    const char *tuned, *base, *forget, *retain, *from, *to;
    bool tied; /* the model's head is its embedding, by whichever name */
};
struct perta_step_counts {
    uint64_t n, n_moved; /* scales, and those that changed */
    double sum;          /* of the new ones */
};
int perta_steps_update(const struct perta_step_rule *rule, const struct perta_step_folders *folders,
                       const struct perta_run *run, struct perta_step_counts *counts,
                       struct perta_err *err);

/* Is what steps are asked what can be done? (stream/arguments.h) */
int perta_steps_arguments(const struct perta_steps *steps, struct perta_err *err);

#endif
