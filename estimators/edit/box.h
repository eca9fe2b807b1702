/* box.h - a task vector that steps form from the model's own gradient (docs/steps.md):
 * tau = size * sign, with one size for each tensor. A folder holds it: the signs of some of the
 * model's tensors as I8, and all sizes in the metadata of every shard. */
#ifndef PERTA_ESTIMATORS_EDIT_BOX_H
#define PERTA_ESTIMATORS_EDIT_BOX_H

#include <jansson.h>

#include "io/format/checkpoint.h"

/* The metadata of a folder of n tensors; sizes (n) are in the order of their names (by_name). The
 * caller's; NULL only when out of memory. */
json_t *perta_box_metadata(const float *sizes, uint64_t n);

/* Read the sizes (ck->n_tensors) of the folder open as ck, in the order of ck->by_name. The caller
 * frees *sizes. PERTA_ESYS (EIO) if they are not those that were written. */
int perta_box_sizes(const struct perta_checkpoint *ck, float **sizes, struct perta_err *err);

#endif
