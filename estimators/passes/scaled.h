/* scaled.h - a source of weights: a model during stepwise unlearning, theta - s * tau, computed as
 * it is read, with the same arithmetic as the patch in the end (docs/method.md) */
#ifndef PERTA_ESTIMATORS_PASSES_SCALED_H
#define PERTA_ESTIMATORS_PASSES_SCALED_H

#include "estimators/edit/adapter.h"
#include "estimators/model/source.h"
#include "estimators/passes/estimate.h"
#include "stream/input.h"

enum { PERTA_SCALED_TUNED, PERTA_SCALED_BASE, PERTA_SCALED_SCALE, PERTA_SCALED_N };

struct perta_scaled {
    struct perta_source source; /* first member */
    const struct perta_checkpoint *model;
    struct perta_input in[PERTA_SCALED_N]; /* PERTA_SCALED_TUNED may be a box, without a base, or
                                            * an adapter, with or without one */
    struct perta_adapter *adapter;         /* NULL: no adapter */
    float *box_sizes;                      /* NULL: no box */
    double box_size;
    float drop;
    uint64_t drop_seed;
    bool tied;
};

/* Open on an open model (borrowed). Its tensors without scales stay as they are. Tensors and shapes
 * are checked. The caller calls perta_scaled_close, also on error; a zeroed struct is allowed
 * there. */
int perta_scaled_open(struct perta_scaled *s, const struct perta_scaled_paths *from,
                      const struct perta_checkpoint *model, struct perta_err *err);
void perta_scaled_close(struct perta_scaled *scaled);

/* For the identity of a run. The caller owns it; NULL only when out of memory. */
json_t *perta_scaled_json(const struct perta_scaled *scaled);

#endif
