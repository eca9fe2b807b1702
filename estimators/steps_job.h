/* steps_job.h - what the parts of stepwise unlearning share: the way (steps.c) and a step
 * (steps_update.c). */
#ifndef PERTA_ESTIMATORS_STEPS_JOB_H
#define PERTA_ESTIMATORS_STEPS_JOB_H

#include "estimators/backprop/weights.h"
#include "estimators/steps.h"

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
int perta_steps_update(const struct perta_step_rule *rule,
                       const struct perta_step_folders *folders,
                       const struct perta_run *run, struct perta_step_counts *counts,
                       struct perta_err *err);

#endif
