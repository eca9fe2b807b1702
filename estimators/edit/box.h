/* box.h - a task vector that steps form from the model's own gradient (docs/steps.md):
 * tau = (c * rms) * sign, with c for all tensors and rms for each. A folder holds the signs of some of
 * the model's tensors, as I8, and in the metadata of every shard all rms; c is given beside it. */
#ifndef PERTA_ESTIMATORS_EDIT_BOX_H
#define PERTA_ESTIMATORS_EDIT_BOX_H

#include <jansson.h>

#include "io/format/checkpoint.h"

/* The metadata of a folder of n tensors; rms (n) are in the order of their names (by_name). The
 * caller's; NULL only when out of memory. */
json_t *perta_box_metadata(const float *rms, uint64_t n);

/* sizes (ck->n_tensors) = (float)c * rms for the folder open as ck, in the order of ck->by_name. The
 * caller frees *sizes. PERTA_EINPUT, naming the tensor, if one is not finite; PERTA_ESYS (EIO) if
 * the rms are not those that were written. */
int perta_box_sizes(const struct perta_checkpoint *ck, double c, float **sizes,
                    struct perta_err *err);

#endif
