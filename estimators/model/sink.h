/* sink.h - where gradients go: called during a backward pass, where what they are made of is at
 * hand. Implementations: estimators/passes/importance_sink.c (mean and mean-square importance),
 * estimators/model/train.c (training), tests/test_backprop.c (a recorder). */
#ifndef PERTA_ESTIMATORS_MODEL_SINK_H
#define PERTA_ESTIMATORS_MODEL_SINK_H

#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/backend.h"
#include "estimators/model/family.h"

/* n tokens, whole sequences. */
struct perta_batch {
    size_t n;
    struct perta_runs sequences;
    struct perta_runs tiles;          /* where products are cut (cut.h) */
    const struct perta_place *places; /* (n) */
    size_t first;                     /* the first one's number among all tokens of the pass */
};

struct perta_gradient_sink {
    /* A matrix's gradient is made of x (batch->n, in) and dy (batch->n, out): dy^T x, over whatever
     * rows the sink wants. Both arrays change after the call. */
    int (*linear)(struct perta_gradient_sink *sink, uint32_t layer, enum perta_param param,
                  const struct perta_batch *batch, struct perta_array x, struct perta_array dy,
                  struct perta_err *err);
    /* d: one sequence's gradient of a vector (a norm's weight, a bias). It changes after the
     * call. */
    int (*vector)(struct perta_gradient_sink *sink, uint32_t layer, enum perta_param param,
                  size_t sequence, struct perta_array d, struct perta_err *err);
};

#endif
