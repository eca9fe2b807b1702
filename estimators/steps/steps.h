/* steps.h - stepwise unlearning: theta(s) = theta - s * tau, with one scale s in [0,
 * max_scale] for each parameter, moved by the signs of the gradients of forget probability and
 * retain loss, which are taken anew at every step. Spec: docs/method.md, docs/steps.md
 *
 *   s grows by step where moving along -tau lowers the mean probability of the forget answers
 *     and does not raise retain loss
 *   s shrinks by back_off where moving along -tau raises retain loss
 *
 * Along -tau a loss changes by -g * tau for each parameter; g of forgetting is the gradient of
 * -probability. */
#ifndef PERTA_ESTIMATORS_STEPS_STEPS_H
#define PERTA_ESTIMATORS_STEPS_STEPS_H

#include "estimators/edit/unlearn.h"
#include "estimators/passes/estimate.h"

#define PERTA_STEPS_MAX 1000

/* What a step does. */
struct perta_step_rule {
    double step;     /* all as float32 */
    double back_off; /* 0: s never shrinks */
    double max_scale;
};

struct perta_steps {
    const char *model, *tuned, *base;      /* checkpoints */
    const char *data_forget, *data_retain; /* JSON lines, as of perta_estimate */
    const char *data_key; /* file of a key: digests of both go into the record; NULL: none */
    unsigned n_steps;     /* at most */
    /* Several patches: of each step that is listed, and of the one that the way ends at, in
     * patch/step-K and out/step-K. One that is listed is that of a run with n_steps = K. */
    bool several, listed[PERTA_STEPS_MAX + 1];
    struct perta_step_rule rule;
    /* Do not stop once enough is forgotten, but stay there, and only shrink what retain needs;
     * steps get smaller to the end. The way ends at the point that forgets enough with the least
     * retain loss. */
    bool hold;
    /* Enough is forgotten once the forget loss is this, and the mean probability of the forget
     * answers that; INFINITY: whatever it is. Both: never. */
    double stop_forget, stop_probability;
    double max_retain_rise; /* stop before the retain loss has risen by more; INFINITY:
                               never */
    uint64_t max_tokens;
    enum perta_compute compute;
    const char *patch, *out; /* as of perta_unlearn */
    struct perta_globs globs;
    bool one_way; /* as of perta_unlearn */
    bool force;
};

/* Run it. *summary is perta_unlearn's, with the "step" that each patch leads to in its results,
 * and "path" beside them: for every point on the way step, forget_loss, forget_probability,
 * retain_loss, moved (share of s that the step before changed) and mean_scale; and "chosen", the
 * step that the way ends at. Where there is a stop rule, "reached" says whether enough is forgotten
 * there; that it is not is no error: the patch is written. */
PERTA_API int perta_steps(const struct perta_steps *steps, const struct perta_run *run,
                          json_t **summary, struct perta_err *err);

/* New scales from signed mean gradients: s (n, bf16) and to (n, bf16); returns how many
 * changed. Gradients are float32 or any float; *sum is that of the new scales. */
struct perta_step_in {
    struct perta_view tuned, base, forget, retain, scale;
    uint64_t n;
};
PERTA_API uint64_t perta_step_update(const struct perta_step_rule *rule,
                                     const struct perta_step_in *in, uint16_t *to, double *sum);

#endif
