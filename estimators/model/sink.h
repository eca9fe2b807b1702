/* sink.h - a gradient sink receives the gradients of weights during a backward pass, where their
 * operands are at hand. Implementations: estimators/passes/importance_sink.c (mean and mean-square
 * importance), estimators/model/train.c (training), estimators/passes/tune_update.c (LoRA),
 * tests/test_backprop.c (a recorder). */
#ifndef PERTA_ESTIMATORS_MODEL_SINK_H
#define PERTA_ESTIMATORS_MODEL_SINK_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/backend.h"
#include "estimators/model/family.h"

/* n tokens of whole sequences. */
struct perta_batch {
    size_t n;
    struct perta_runs sequences;
    struct perta_runs tiles;          /* how products are cut (cut.h) */
    const struct perta_place *places; /* (n) */
    size_t first;                     /* index of the first token among all tokens of the pass */
};

/* Rows whose gradients are summed. */
struct perta_sink_rows {
    const struct perta_chunks *chunks; /* of them */
    size_t n;
    bool single; /* they are one batch */
};

struct perta_gradient_sink {
    /* The operands of a matrix's gradient, which is dy^T x over the rows that the sink chooses: x
     * (batch->n, in), dy (batch->n, out). Both are overwritten after the call. */
    int (*linear)(struct perta_gradient_sink *sink, struct perta_site site, enum perta_param param,
                  const struct perta_batch *batch, struct perta_array x, struct perta_array dy,
                  struct perta_err *err);
    /* One sequence's gradient d of a vector (a norm's weight, a bias). It is overwritten after the
     * call. NULL: these gradients are not wanted. */
    int (*vector)(struct perta_gradient_sink *sink, struct perta_site site, enum perta_param param,
                  size_t sequence, struct perta_array d, struct perta_err *err);
    /* Within a layer: begin an expert, which rows (at least one) reach. The batches that follow are
     * of these rows, and each has its samples in order, also those without a row. Then end it. NULL:
     * the sink does not need to know. */
    int (*begin_expert)(struct perta_gradient_sink *sink, const struct perta_sink_rows *rows,
                        struct perta_err *err);
    int (*end_expert)(struct perta_gradient_sink *sink, struct perta_site site,
                      struct perta_err *err);
};

#endif
