/* pass_arguments.h - checks of the arguments of passes over a model (stream/arguments.h). */
#ifndef PERTA_ESTIMATORS_PASSES_PASS_ARGUMENTS_H
#define PERTA_ESTIMATORS_PASSES_PASS_ARGUMENTS_H

#include "estimators/passes/estimate.h"
#include "stream/arguments.h"

/* NULL is allowed. */
int perta_scaled_arguments(const struct perta_scaled_paths *at, struct perta_err *err);
int perta_rounding_argument(enum perta_rounding quantize, struct perta_err *err);
int perta_compute_argument(enum perta_compute compute, struct perta_err *err);
int perta_pick_argument(const struct perta_pick *pick, struct perta_err *err);

#endif
