/* train.h - loss, gradients and AdamW for a model in memory. What perta demo trains its models
 * with; estimate does the same without ever holding a model. */
#ifndef PERTA_ESTIMATORS_MODEL_TRAIN_H
#define PERTA_ESTIMATORS_MODEL_TRAIN_H

#include "estimators/model/model.h"
#include "estimators/model/samples.h"

struct perta_trainer {
    struct perta_model *model; /* borrowed */
    struct perta_workers *workers;
    struct perta_gemm *gemm;
    size_t max_tokens, max_labels;          /* of a batch */
    float *inv_freq;                        /* (head_dim / 2) */
    float *memory;                          /* of everything below */
    float *gradients, *first, *second;      /* (n_floats); moments of AdamW */
    struct perta_acts *acts;                /* (n_layers): out of one is x of the next */
    float *last, *normed, *dnormed, *dlast; /* (max_labels, H) */
    float *rstd, *most, *share, *of_label;  /* (max_labels) */
    double *sums;                           /* (max_labels) */
    float *logits;                          /* (max_labels, vocabulary) */
    uint32_t *token, *ids;                  /* (max_labels); (max_tokens) */
    struct perta_place *places;             /* (max_tokens) */
    int32_t *target;                        /* (max_labels) */
    size_t *starts;                         /* (samples + 1) */
    size_t *tiles, *label_tiles;            /* where products are cut: every PERTA_TILE_ROWS */
    uint64_t n_steps;
};

/* For batches of at most so many of these samples. */
PERTA_API int perta_trainer_open(struct perta_trainer *trainer, struct perta_model *model,
                                 const struct perta_samples *samples, size_t batch,
                                 unsigned n_threads, struct perta_err *err);
PERTA_API void perta_trainer_close(struct perta_trainer *trainer);

/* Logits of the samples which (n) where they have labels: trainer->logits (labels, vocabulary),
 * trainer->target, labels in order; *n_labels of them. */
PERTA_API int perta_trainer_forward(struct perta_trainer *trainer,
                                    const struct perta_samples *samples, const uint32_t *which,
                                    size_t n, size_t *n_labels, struct perta_err *err);
/* Forward and backward: trainer->gradients of the mean loss of the samples; *loss. */
PERTA_API int perta_trainer_gradients(struct perta_trainer *trainer,
                                      const struct perta_samples *samples, const uint32_t *which,
                                      size_t n, double *loss, struct perta_err *err);
/* One step of AdamW (Loshchilov & Hutter 2019) along trainer->gradients, betas 0.9 and 0.999. */
PERTA_API void perta_trainer_step(struct perta_trainer *trainer, float learning_rate,
                                  float weight_decay);

#endif
