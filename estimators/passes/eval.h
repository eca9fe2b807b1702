/* eval.h - how well a model, or a model after a patch, knows answers: their losses and
 * probabilities, and whether it would give them. One forward pass through a model that need not fit
 * in memory. Spec: docs/eval.md */
#ifndef PERTA_ESTIMATORS_PASSES_EVAL_H
#define PERTA_ESTIMATORS_PASSES_EVAL_H

#include "estimators/passes/estimate.h"

#define PERTA_GENERATE_MAX (1u << 20) /* tokens of an answer */

struct perta_eval {
    const char *model;                   /* checkpoint with config.json */
    const char *patch;                   /* applied to the model as it is read; NULL: none */
    const char *adapter;                 /* a PEFT LoRA adapter beside the model; NULL: none */
    const struct perta_scaled_paths *at; /* without a patch: use theta - s * tau; NULL: no */
    enum perta_rounding quantize;        /* as in perta_estimate, after the patch */
    const char *data;                    /* JSON lines: input_ids, labels, paraphrased, perturbed */
    const char *data_xxh128;             /* as in perta_estimate */
    struct perta_pick pick;              /* all samples, unless as_estimate is set */
    uint64_t max_tokens;                 /* longer samples are refused; 0: no limit */
    enum perta_compute compute;
    const char *scratch; /* folder for what does not fit in memory; NULL: $TMPDIR or /var/tmp */
    /* leave out other answers, so that the loss has the same bits as estimate's, and the measures
     * (measures.h) */
    bool as_estimate;
    bool per_sample;    /* report every line, too */
    bool gradient_norm; /* the norm of the gradient of each line's loss, in a pass of its own */
    /* continue each line's prompt, which ends before its first label, by at most so many tokens;
     * then every line is reported. 0: no; at most PERTA_GENERATE_MAX */
    uint64_t generate;
};

/* Run the evaluation; nothing is written. The caller owns *summary: means over lines, "notes"
 * (strings) on the data, and with per_sample an object for each line under "per_sample". */
PERTA_API int perta_eval(const struct perta_eval *eval, const struct perta_run *run,
                         json_t **summary, struct perta_err *err);

#endif
