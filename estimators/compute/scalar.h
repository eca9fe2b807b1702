/* scalar.h - the reference backend (backend.h): plain loops, written from the formulas, with which
 * other backends are compared. Single-threaded; products, softmax and norms are computed in float64
 * and rounded once.
 *
 * It has memory of its own: what the host shares is copied at uploaded(), and NaN before. Freed
 * memory is filled with NaN and never reused. An array that reaches past its buffer fails an
 * assert. So a pointer or handle that is used where it must not be is noticed. */
#ifndef PERTA_ESTIMATORS_COMPUTE_SCALAR_H
#define PERTA_ESTIMATORS_COMPUTE_SCALAR_H

#include "estimators/compute/backend.h"

/* The caller closes *out with perta_backend_close. */
int perta_scalar_open(struct perta_backend **out, struct perta_err *err);

#endif
