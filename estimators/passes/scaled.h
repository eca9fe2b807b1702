/* scaled.h - a source of weights: the model on the way of stepwise unlearning, theta - s *
 * tau, formed as it is read. Same arithmetic as the patch at the end: docs/method.md */
#ifndef PERTA_ESTIMATORS_PASSES_SCALED_H
#define PERTA_ESTIMATORS_PASSES_SCALED_H

#include "estimators/model/source.h"
#include "estimators/passes/estimate.h"
#include "stream/input.h"

enum { PERTA_SCALED_TUNED, PERTA_SCALED_BASE, PERTA_SCALED_SCALE, PERTA_SCALED_N };

struct perta_scaled {
    struct perta_source source; /* first: it is this */
    const struct perta_checkpoint *model;
    struct perta_input in[PERTA_SCALED_N];
    bool tied;
};

/* On the model that is open as model (borrowed); its tensors that s lacks stay as they are.
 * Tensors and shapes are checked. Closed with perta_scaled_close, on error too; zeroed is
 * fine. */
int perta_scaled_open(struct perta_scaled *scaled, const struct perta_scaled_paths *from,
                      const struct perta_checkpoint *model, struct perta_err *err);
void perta_scaled_close(struct perta_scaled *scaled);

/* For a run's identity. The caller's; NULL without memory. */
json_t *perta_scaled_json(const struct perta_scaled *scaled);

#endif
