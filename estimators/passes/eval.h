/* eval.h - how well a model, or a model after a patch, knows answers: losses, probabilities
 * and whether it would give them, forward through a model that need not fit in memory.
 * Spec: docs/eval.md */
#ifndef PERTA_ESTIMATORS_PASSES_EVAL_H
#define PERTA_ESTIMATORS_PASSES_EVAL_H

#include "estimators/passes/estimate.h"

struct perta_eval {
    const char *model;                   /* checkpoint with config.json */
    const char *patch;                   /* that is applied to it while it is read; NULL: none */
    const struct perta_scaled_paths *at; /* without a patch: at theta - s * tau; NULL: none */
    const char *data;                    /* JSON lines: input_ids, labels, paraphrased, perturbed */
    const char *data_xxh128;             /* as of perta_estimate */
    uint64_t max_tokens;                 /* of a sample; 0: no bound */
    enum perta_compute compute;
    const char *scratch; /* folder for what does not fit in memory; NULL: $TMPDIR or /var/tmp */
    bool as_estimate;    /* without other answers: the same loss as estimate's to the bit */
    bool per_sample;     /* the numbers of every line too */
};

/* Run it; nothing is written. *summary is the caller's: means over the lines, "notes" (strings) on
 * the data, and where it is wanted under "per_sample" an object for each line. */
PERTA_API int perta_eval(const struct perta_eval *eval, const struct perta_run *run,
                         json_t **summary, struct perta_err *err);

#endif
