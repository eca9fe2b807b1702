/* unlearn_arguments.h - checks the arguments of perta_unlearn() (see stream/arguments.h). */
#ifndef PERTA_ESTIMATORS_EDIT_UNLEARN_ARGUMENTS_H
#define PERTA_ESTIMATORS_EDIT_UNLEARN_ARGUMENTS_H

#include "estimators/edit/unlearn.h"
#include "stream/arguments.h"

int perta_globs_arguments(const struct perta_globs *globs, struct perta_err *err);
int perta_unlearn_arguments(const struct perta_unlearn *unlearn, struct perta_err *err);

#endif
