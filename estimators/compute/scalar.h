/* scalar.h - the reference backend (backend.h): plain loops, written from the formulas to be read, with
 * which other backends are compared. One thread; products, softmax and norms in float64, rounded once.
 *
 * Its memory is its own: what the host shares is copied at uploaded() and is NaN until then; what is
 * freed is filled with NaN and never used again; an array that reaches past its buffer is an assert.
 * So a pointer or a handle that is used where it must not be shows. */
#ifndef PERTA_ESTIMATORS_COMPUTE_SCALAR_H
#define PERTA_ESTIMATORS_COMPUTE_SCALAR_H

#include "estimators/compute/backend.h"

/* *out is closed with perta_backend_close. */
int perta_scalar_open(struct perta_backend **out, struct perta_err *err);

#endif
