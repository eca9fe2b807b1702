/* accumulate.h - importance from gradient dumps: the mean, and the mean of squares, over any
 * number of checkpoints that hold one sample's gradients each, all read side by side. */
#ifndef PERTA_ESTIMATORS_PASSES_ACCUMULATE_H
#define PERTA_ESTIMATORS_PASSES_ACCUMULATE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_accumulate {
    const char *const *gradients; /* (n_gradients) files or folders, one sample each */
    uint32_t n_gradients;
    const char *out; /* OUT/mean and OUT/meansq are written */
    bool mean, meansq;
    bool force;
};

/* All gradients hold the same tensors (F16, BF16, F32 or F64, also mixed). Output: F32, sharded
 * like the first, metadata perta.stat and perta.samples. *summary is the caller's. */
PERTA_API int perta_accumulate(const struct perta_accumulate *accumulate,
                               const struct perta_run *run, json_t **summary,
                               struct perta_err *err);

#endif
