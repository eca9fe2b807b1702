/* arguments.h - what the verbs are asked that edit a model and compute with it (stream/arguments.h). */
#ifndef PERTA_ESTIMATORS_ARGUMENTS_H
#define PERTA_ESTIMATORS_ARGUMENTS_H

#include "estimators/steps.h"
#include "stream/arguments.h"

int perta_unlearn_arguments(const struct perta_unlearn *unlearn, struct perta_err *err);
int perta_steps_arguments(const struct perta_steps *steps, struct perta_err *err);
/* NULL is allowed. */
int perta_scaled_arguments(const struct perta_scaled_paths *at, struct perta_err *err);
int perta_compute_argument(enum perta_compute compute, struct perta_err *err);

#endif
