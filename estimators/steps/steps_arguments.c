#include <math.h>

#include "estimators/edit/unlearn_arguments.h"
#include "estimators/passes/pass_arguments.h"
#include "estimators/steps/steps_job.h"

static int in_range(const char *name, double value, struct perta_err *err)
{
    return value >= 0.001 && value <= 1000
               ? 0
               : perta_fail(err, PERTA_EUSAGE, "%s: %g; must be from 0.001 to 1000", name, value);
}

static int check_step(const struct perta_step_rule *rule, struct perta_err *err)
{
    int rc = in_range("--step", rule->step, err);
    if (!rc && rule->back_off != 0)
        rc = in_range("--back-off", rule->back_off, err);
    return rc ? rc : in_range("--max-scale", rule->max_scale, err);
}

/* A limit of INFINITY means that there is no such rule. */
static int check_stops(const struct perta_steps *s, struct perta_err *err)
{
    double p = s->stop_probability;
    if (!(s->stop_forget > 0))
        return perta_fail(err, PERTA_EUSAGE, "--stop-forget: %g; must be above 0", s->stop_forget);
    if (!(p > 0 && (p < 1 || p == (double)INFINITY)))
        return perta_fail(err, PERTA_EUSAGE, "--stop-probability: %g; must be between 0 and 1", p);
    if (!(s->max_retain_rise > -(double)INFINITY))
        return perta_fail(err, PERTA_EUSAGE, "--max-retain-rise: %g is not a number",
                          s->max_retain_rise);
    if (s->retain_batch && s->several)
        return perta_fail(err, PERTA_EUSAGE, "--retain-batch takes one number of steps: --steps K");
    if (s->hold && s->several)
        return perta_fail(err, PERTA_EUSAGE,
                          "--method signed-hold takes one number of steps: --steps K");
    return s->hold && !isfinite(s->stop_forget) && !isfinite(p)
               ? perta_fail(
                     err, PERTA_EUSAGE,
                     "--method signed-hold needs --stop-probability P or --stop-forget L, the "
                     "level to hold")
               : 0;
}

static int check_reteach(const struct perta_reteach *r, struct perta_err *err)
{
    if (!r->updates || r->updates > PERTA_STEPS_MAX)
        return perta_fail(err, PERTA_EUSAGE, "--reteach-updates: must be from 1 to %d",
                          PERTA_STEPS_MAX);
    if (!(r->learning_rate > 0 && isfinite(r->learning_rate)))
        return perta_fail(err, PERTA_EUSAGE, "--reteach-rate: %g; must be a finite number above 0",
                          r->learning_rate);
    return r->factor > 0 && isfinite(r->factor)
               ? 0
               : perta_fail(err, PERTA_EUSAGE,
                            "--reteach-factor: %g; must be a finite number above 0", r->factor);
}

static int check_survive(const struct perta_steps *s, struct perta_err *err)
{
    if (!s->survive)
        return 0;
    if (s->survive & 1u || s->survive >> PERTA_N_CONDITIONS)
        return perta_fail(err, PERTA_EUSAGE, "--survive: there is no such condition");
    if (!isfinite(s->stop_probability))
        return perta_fail(err, PERTA_EUSAGE,
                          "--survive needs --stop-probability P, the level that has to hold");
    if (s->several)
        return perta_fail(err, PERTA_EUSAGE, "--survive takes one number of steps: --steps K");
    return s->survive & 1u << PERTA_RETAUGHT ? check_reteach(&s->reteach, err) : 0;
}

static int check_box(const struct perta_steps *s, struct perta_err *err)
{
    float box = (float)s->box;
    if (s->box != 0 && !(box > 0 && isfinite(box)))
        return perta_fail(err, PERTA_EUSAGE, "--box: %g; must be a finite number above 0", s->box);
    if (s->box > 0 && (s->tuned || s->base))
        return perta_fail(err, PERTA_EUSAGE,
                          "--box C forms the task vector from the model itself; it cannot be used "
                          "with --tuned and --base");
    return 0;
}

static int check_count(const struct perta_steps *s, struct perta_err *err)
{
    if (!s->n_steps || s->n_steps > PERTA_STEPS_MAX)
        return perta_fail(err, PERTA_EUSAGE, "--steps: must be from 1 to %d", PERTA_STEPS_MAX);
    if (s->listed[0])
        return perta_fail(err, PERTA_EUSAGE, "--steps: must be from 1 to %d, but 0 is listed",
                          PERTA_STEPS_MAX);
    for (unsigned k = s->n_steps + 1; k <= PERTA_STEPS_MAX; k++)
        if (s->listed[k])
            return perta_fail(err, PERTA_EUSAGE,
                              "--steps: %u is listed, but there are %u (n_steps)", k, s->n_steps);
    return 0;
}

int perta_steps_arguments(const struct perta_steps *s, struct perta_err *err)
{
    bool own = perta_steps_is_own(s);
    bool needs_base = !own && !(s->tuned && perta_checkpoint_is_adapter(s->tuned));
    const struct perta_argument needed[] = {{"--model DIR", s->model},
                                            {"--tuned DIR", own ? s->model : s->tuned},
                                            {"--base DIR", needs_base ? s->base : s->model},
                                            {"--data-forget FILE", s->data_forget},
                                            {"--data-retain FILE", s->data_retain},
                                            {"--patch DIR", s->patch}};
    const struct perta_argument given[] = {
        {"--base", s->base}, {"--data-key", s->data_key}, {"--out", s->out}};
    int rc = check_count(s, err);
    if (!rc)
        rc = check_step(&s->rule, err);
    if (!rc)
        rc = check_stops(s, err);
    if (!rc)
        rc = check_survive(s, err);
    if (!rc)
        rc = check_box(s, err);
    if (!rc)
        rc = perta_globs_arguments(&s->globs, err);
    if (!rc)
        rc = perta_compute_argument(s->compute, err);
    if (!rc)
        rc = perta_arguments_optional(given, sizeof given / sizeof *given, err);
    return rc ? rc : perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
}
