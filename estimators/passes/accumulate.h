/* accumulate.h - importance from gradient dumps: the mean, and the mean of squares, over any number
 * of checkpoints. Each holds the gradients of one sample; all are read side by side. */
#ifndef PERTA_ESTIMATORS_PASSES_ACCUMULATE_H
#define PERTA_ESTIMATORS_PASSES_ACCUMULATE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_accumulate {
    const char *const *gradients; /* (n_gradients) files or folders, one for each sample */
    uint32_t n_gradients;
    const char *out; /* the job writes OUT/mean and OUT/meansq */
    bool mean, meansq;
    bool force;
};

/* Run the job. All gradients must hold the same tensors, in F16, BF16, F32 or F64, which may be
 * mixed. The output is F32, sharded like the first of them, with metadata perta.stat and
 * perta.samples. The caller owns *summary. */
PERTA_API int perta_accumulate(const struct perta_accumulate *accumulate,
                               const struct perta_run *run, json_t **summary,
                               struct perta_err *err);

#endif
