/* tune.h - train a LoRA adapter on text. The model's frozen weights are read block by block, forward
 * and backward, for each update; only the adapter, its gradient and AdamW's state stay in memory.
 * Spec: docs/tune.md */
#ifndef PERTA_ESTIMATORS_PASSES_TUNE_H
#define PERTA_ESTIMATORS_PASSES_TUNE_H

#include "estimators/passes/estimate.h"

/* How the learning rate goes on after the warmup: to 0 along a line or a half cosine, or
 * constant. */
enum perta_lr_scheduler { PERTA_LR_LINEAR, PERTA_LR_COSINE, PERTA_LR_CONSTANT };

struct perta_tune_update {
    double loss;          /* mean over all labels of the batch, before the update */
    double gradient_norm; /* before clipping */
    double learning_rate;
};

/* Where 0 or NULL means a default, that is PEFT's or transformers'. */
struct perta_tune {
    const char *model;            /* checkpoint with config.json */
    const char *patch;            /* train on the model that this patch of it leads to; NULL: no */
    const char *data;             /* JSON lines, as for perta_estimate */
    const char *data_xxh128;      /* as in perta_estimate */
    const char *out;              /* the adapter's folder */
    const char *adapter;          /* start with this adapter, instead of a new one; NULL: no */
    enum perta_rounding quantize; /* of the frozen weights, as in perta_estimate (QLoRA) */
    const struct perta_scaled_paths *at; /* train beside theta - s * tau; NULL: beside the model */
    struct perta_pick pick;              /* an epoch is these samples */
    /* The new adapter. targets: names of linear modules, as in PEFT's target_modules, or
     * "all-linear"; none: q_proj and v_proj. */
    uint64_t rank;     /* 0: 8 */
    double lora_alpha; /* 0: 8 */
    const char *const *targets;
    size_t n_targets;

    double learning_rate;
    enum perta_lr_scheduler scheduler;
    double warmup;          /* updates; below 1: a share of all updates */
    uint64_t epochs, steps; /* steps: updates; both 0: 3 epochs */
    uint64_t batch_size;    /* samples of an update; 0: 8 */
    double weight_decay;
    double max_grad_norm; /* 0: gradients are not clipped */
    uint64_t seed;        /* of the new adapter and of the order of samples */

    const char *data_key; /* file of a key: the adapter records the HMAC of data; NULL: no digest */
    uint64_t max_tokens;  /* longer samples are refused; 0: no limit */
    enum perta_compute compute;
    const char *scratch; /* folder for what does not fit in memory; NULL: beside out */
    bool force;
    /* Called after each update, the first of which is number 1; may be NULL. */
    void (*on_update)(void *user, uint64_t number, uint64_t n_updates,
                      const struct perta_tune_update *update);
    void *on_update_user;
};

/* Run the training. The caller owns *summary: samples, tokens, parameters, "updates" (an array:
 * loss, gradient_norm, learning_rate of each), folder, bytes read, "notes" (strings). */
PERTA_API int perta_tune(const struct perta_tune *tune, const struct perta_run *run,
                         json_t **summary, struct perta_err *err);

#endif
