/* steps.h - unlearning in steps. The model at scales s is theta(s) = theta - s * tau, with one
 * scale s in [0, max_scale] for each parameter. Every step recomputes the gradients of the forget
 * probability and of the retain loss, and moves the scales by their signs. Spec: docs/method.md,
 * docs/steps.md
 *
 *   s grows by step if moving along -tau lowers the mean probability of the forget answers and does
 *     not raise the retain loss
 *   s shrinks by back_off if moving along -tau raises the retain loss
 *
 * tau is tuned - base, or a LoRA adapter's task vector; or, without these, it is formed from the
 * model's own gradient.
 *
 * Along -tau a loss changes by -g * tau for each parameter. The gradient g for forgetting is that
 * of minus the probability. */
#ifndef PERTA_ESTIMATORS_STEPS_STEPS_H
#define PERTA_ESTIMATORS_STEPS_STEPS_H

#include "estimators/edit/unlearn.h"
#include "estimators/passes/estimate.h"

#define PERTA_STEPS_MAX 1000

/* The rule of a step. The values are used as float32. */
struct perta_step_rule {
    double step;
    double back_off; /* 0: s never shrinks */
    double max_scale;
};

/* A condition under which enough has to be forgotten: the model as it is; with its weights rounded
 * to a format; with a random half of the edit taken back; after a part of the forget set is taught
 * again, asked for the rest. */
enum perta_condition {
    PERTA_AS_IT_IS,
    PERTA_AT_NF4 = PERTA_ROUND_NF4,
    PERTA_AT_INT8 = PERTA_ROUND_INT8,
    PERTA_AT_INT4 = PERTA_ROUND_INT4,
    PERTA_AT_Q4_0 = PERTA_ROUND_Q4_0,
    PERTA_AT_FP8 = PERTA_ROUND_FP8,
    PERTA_DROPPED = PERTA_N_ROUNDINGS,
    PERTA_RETAUGHT,
    PERTA_N_CONDITIONS,
};

/* How the model is taught again for PERTA_RETAUGHT: updates of AdamW with a constant learning rate. */
struct perta_reteach {
    uint64_t updates;
    double learning_rate;
    double factor; /* of stop_probability: the limit for the samples that were not taught */
};

struct perta_steps {
    const char *model, *tuned, *base; /* checkpoints; tuned may be an adapter, as in perta_unlearn;
                                       * tuned and base may both be NULL */
    /* Without tuned and base, tau = (box * rms(W)) * sign(dp/dtheta) for each matrix W of the model,
     * where p is the mean probability of the forget answers at the model; other parameters stay
     * unchanged. The value is used as float32. 0: found by trying the first step. */
    double box;
    const char *data_forget, *data_retain; /* JSON lines, as for perta_estimate */
    const char *data_key; /* key file; with it the record holds keyed digests of both data files; or
                           * NULL */
    unsigned n_steps;     /* the largest number of steps */
    /* If several is set, the run writes patch/step-K and out/step-K for each step K that is listed,
     * and for the step where the path ends. A listed patch equals that of a run with n_steps =
     * K. */
    bool several, listed[PERTA_STEPS_MAX + 1];
    struct perta_step_rule rule;
    /* Hold: once enough is forgotten, do not stop, but stay at that level and only shrink the
     * scales that hurt the retain set. Steps get smaller towards the last. The path ends at the
     * point with the least retain loss among those that forget enough. */
    bool hold;
    /* Enough is forgotten if the forget loss is at least stop_forget and the mean probability of
     * the forget answers is at most stop_probability. INFINITY: no such condition; if both are
     * INFINITY, never. */
    double stop_forget, stop_probability;
    /* Conditions, besides the model as it is, under which stop_probability has to hold, too: 1u <<
     * enum perta_condition each; 0: none. The gradient for forgetting is then taken under the worst
     * of them (docs/steps.md). */
    unsigned survive;
    struct perta_reteach reteach; /* used with PERTA_RETAUGHT */
    double max_retain_rise; /* stop before the retain loss has risen by more; INFINITY: no limit */
    /* Not 0: each step takes the retain set's gradients over at most so many of its samples, batch
     * after batch of shuffled epochs. What decides where the path ends is measured over all. */
    uint64_t retain_batch;
    uint64_t max_tokens;
    enum perta_compute compute;
    const char *patch, *out; /* as in perta_unlearn */
    struct perta_globs globs;
    bool one_way; /* as in perta_unlearn */
    bool force;
};

/* The name of a condition, as in --survive and in JSON: "reteach". */
PERTA_API const char *perta_condition_name(enum perta_condition condition);

/* Run the job. *summary is that of perta_unlearn, whose results also hold the "step" that each
 * patch leads to. Without tuned and base, "box" is the one that was used. It also holds "path", with step, forget_loss, forget_probability, retain_loss,
 * moved (the share of scales that the step before changed) and mean_scale for each point; and
 * "chosen", the step where the path ends. If there is a stop rule, "reached" says whether enough is
 * forgotten there. If not, the patch is written all the same and the call succeeds. With survive,
 * points of the path also have "survive", the forget probability under each condition, and the
 * summary has "conditions", an array: condition, probability and limit at the end of the path, and
 * "holds"; the worst comes first. */
PERTA_API int perta_steps(const struct perta_steps *steps, const struct perta_run *run,
                          json_t **summary, struct perta_err *err);

/* Compute new scales to (n, bf16) from the old ones, in.scale, and from signed mean gradients.
 * Returns how many scales changed; *sum is the sum of the new ones. */
struct perta_step_in {
    struct perta_view tuned, base; /* no base.data: tuned is tau, or has its sign */
    struct perta_view forget;      /* no data: no scale grows */
    struct perta_view retain, scale;
    uint64_t n;
};
PERTA_API uint64_t perta_step_update(const struct perta_step_rule *rule,
                                     const struct perta_step_in *in, uint16_t *to, double *sum);

#endif
