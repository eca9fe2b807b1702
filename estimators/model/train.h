/* train.h - loss, gradients and AdamW for a model in memory. perta demo trains its models with it;
 * estimate computes the same without ever holding a whole model. */
#ifndef PERTA_ESTIMATORS_MODEL_TRAIN_H
#define PERTA_ESTIMATORS_MODEL_TRAIN_H

#include "estimators/model/block.h"
#include "estimators/model/model.h"
#include "estimators/model/samples.h"

struct perta_trainer {
    struct perta_model *model;     /* borrowed */
    struct perta_workers *workers; /* owned, as own_backend; both NULL if a backend was given */
    struct perta_backend *own_backend;
    struct perta_backend *be;
    struct perta_model_parameters parameters;
    size_t max_tokens, max_labels; /* in a batch */
    uint32_t weights, memory;      /* buffers: the model's weights, shared; all arrays below */
    struct perta_array gradients, first, second; /* (n_floats); moments of AdamW */
    struct perta_acts *acts;                     /* (n_layers): out of a layer is x of the next */
    struct perta_array last, normed, dnormed, dlast; /* (max_labels, H) */
    struct perta_array rstd, most, share, of_label;  /* (max_labels) */
    struct perta_array sums;                         /* (max_labels) float64 */
    struct perta_array device_logits;                /* (max_labels, vocabulary) */

    /* on the host */
    float *inv_freq;             /* (4, head_dim / 2): perta_llm_rope_tables */
    float *logits;               /* (max_labels, vocabulary): result of perta_trainer_forward */
    float *labels;               /* (3, max_labels): shares, largest logits, logits of the labels */
    double *exponentials;        /* (max_labels) */
    uint32_t *token, *ids;       /* (max_labels); (max_tokens) */
    struct perta_place *places;  /* (max_tokens) */
    int32_t *target;             /* (max_labels) */
    size_t *starts;              /* (samples + 1) */
    size_t *tiles, *label_tiles; /* products are cut every PERTA_TILE_ROWS */
    uint64_t n_steps;
};

/* Open for batches of at most batch of these samples, on the CPU. PERTA_EINPUT for a model that this
 * does not compute: with experts, ALiBi, weights stored as (in, out), multipliers, soft caps or a
 * bias of the head, or norms that add to their weights. */
PERTA_API int perta_trainer_open(struct perta_trainer *trainer, struct perta_model *model,
                                 const struct perta_samples *samples, size_t batch,
                                 unsigned n_threads, struct perta_err *err);
/* The same on a backend, which is borrowed. Until it is closed, the model's weights belong to the
 * backend; perta_trainer_step copies them back to the host. */
PERTA_API int perta_trainer_open_on(struct perta_trainer *trainer, struct perta_model *model,
                                    const struct perta_samples *samples, size_t batch,
                                    struct perta_backend *be, struct perta_err *err);
PERTA_API void perta_trainer_close(struct perta_trainer *trainer);

/* Compute the logits of the samples which (n) for their *n_labels labels, in order: trainer->logits
 * (labels, vocabulary), trainer->target (labels). */
PERTA_API int perta_trainer_forward(struct perta_trainer *trainer,
                                    const struct perta_samples *samples, const uint32_t *which,
                                    size_t n, size_t *n_labels, struct perta_err *err);
/* Forward and backward pass: *loss is the mean loss of the samples, trainer->gradients its
 * gradients. */
PERTA_API int perta_trainer_gradients(struct perta_trainer *trainer,
                                      const struct perta_samples *samples, const uint32_t *which,
                                      size_t n, double *loss, struct perta_err *err);
/* One step of AdamW (Loshchilov & Hutter 2019) along trainer->gradients, betas 0.9 and 0.999. */
PERTA_API int perta_trainer_step(struct perta_trainer *trainer, float learning_rate,
                                 float weight_decay, struct perta_err *err);

#endif
