/* The size of a box of the model's own: with it, the first step goes a share of the way to the level
 * that is asked for. Spec: docs/steps.md */
#include "estimators/steps/steps_job.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define SHARE (1.0 / 3) /* of the way, for the first step */
#define FIRST_FALL 6.0  /* of the log odds, to first order, in the first trial */
#define DIGITS_BYTES 32

/* The forget probability to go to; 0 if no level is asked for. */
static double level_of(const struct perta_steps *s)
{
    double of_loss = isfinite(s->stop_forget) ? exp(-s->stop_forget) : 1;
    double of_probability = isfinite(s->stop_probability) ? s->stop_probability : 1;
    double level = fmin(of_loss, of_probability);
    return level < 1 ? level : 0;
}

/* Three digits: more would only say on which CPU it was found. */
static double rounded(double c)
{
    char digits[DIGITS_BYTES];
    snprintf(digits, sizeof digits, "%.2e", c);
    return strtod(digits, NULL);
}

/* ---- trials ---- */

/* The forget probability after the first step, with size c. */
static int measure(struct perta_steps_job *job, double c, double *probability,
                   struct perta_err *err)
{
    char *scales = perta_steps_scales(job, 1), *box = perta_steps_box_folder(job);
    const struct perta_scaled_paths at = {.scale = scales, .box = box, .box_size = c};
    const struct perta_steps_change none = {0};
    json_t *summary = NULL;
    int rc = scales && box ? perta_steps_eval(job, PERTA_FORGET, &at, &none, &summary, err)
                           : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    *probability = json_real_value(json_object_get(summary, "probability"));
    json_decref(summary);
    free(scales);
    free(box);
    return rc;
}

static int try(struct perta_steps_job *job, double c, struct perta_err *err)
{
    struct perta_steps_trial trial = {.c = c};
    int rc = measure(job, c, &trial.probability, err);
    if (!rc)
        rc = perta_steps_commit(job,
                                json_pack("{s:i, s:f, s:f}", "step", 0, "trial", trial.c,
                                          "probability", trial.probability),
                                err);
    if (!rc)
        job->trials[job->n_trials++] = trial;
    return rc;
}

/* ---- the search ---- */

/* The trials next to the wanted probability: the largest size with which it stays above, and the
 * smallest beyond that with which it does not. NULL if there is none yet. */
struct bracket {
    const struct perta_steps_trial *above, *below;
};

static struct bracket bracket_of(const struct perta_steps_job *job, double wanted)
{
    struct bracket b = {0};
    for (unsigned i = 0; i < job->n_trials; i++) {
        const struct perta_steps_trial *t = &job->trials[i];
        if (t->probability > wanted && (!b.above || t->c > b.above->c))
            b.above = t;
    }
    for (unsigned i = 0; i < job->n_trials; i++) {
        const struct perta_steps_trial *t = &job->trials[i];
        if (t->probability <= wanted && !(b.above && t->c < b.above->c) &&
            (!b.below || t->c < b.below->c))
            b.below = t;
    }
    return b;
}

/* Between the two, straight in the logarithm of the size. */
static double between(const struct bracket *b, double wanted)
{
    double share =
        (b->above->probability - wanted) / (b->above->probability - b->below->probability);
    return b->above->c * pow(b->below->c / b->above->c, share);
}

/* With this size, the first step lowers the log odds of the forget probability by FIRST_FALL, to
 * first order. */
static double first_size(const struct perta_steps_job *job)
{
    const struct perta_step_rule *rule = &job->steps->rule;
    return rounded(FIRST_FALL * job->spread / (fmin(rule->step, rule->max_scale) * job->fall));
}

static double next_size(const struct perta_steps_job *job, const struct bracket *b)
{
    return b->above ? 2 * b->above->c : b->below ? b->below->c / 2 : first_size(job);
}

static int search(struct perta_steps_job *job, double wanted, double *found, struct perta_err *err)
{
    int rc = 0;
    struct bracket b = bracket_of(job, wanted);
    while (!rc && !(b.above && b.below)) {
        double c = next_size(job, &b);
        if (job->n_trials == PERTA_STEPS_TRIALS || !((float)c > 0 && isfinite((float)c)))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: no size of the box was found with which the first step goes a "
                              "third of the way (spread %g, fall %g, %u trials); give one: --box C",
                              job->steps->data_forget, job->spread, job->fall, job->n_trials);
        rc = try(job, c, err);
        b = bracket_of(job, wanted);
    }
    *found = rc ? 0 : rounded(between(&b, wanted));
    return rc;
}

int perta_steps_find_size(struct perta_steps_job *job, struct perta_err *err)
{
    if (!perta_steps_is_own(job->steps) || job->box > 0)
        return 0;
    double p = job->points[0].probability[PERTA_FORGET], found;
    double wanted = p - SHARE * (p - level_of(job->steps));
    int rc = search(job, wanted, &found, err);
    if (!rc)
        rc = perta_steps_commit(job, json_pack("{s:i, s:f}", "step", 0, "box", found), err);
    job->box = rc ? 0 : found;
    return rc;
}
