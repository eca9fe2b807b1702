/* The conditions under which enough has to be forgotten. Spec: docs/steps.md */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/tune.h"
#include "estimators/steps/steps_job.h"
#include "io/text.h"

/* A model is taught again with a new LoRA beside it, all samples in each update. */
#define RANK 8
#define LORA_ALPHA 16.0
#define SHARE 4 /* one of so many samples is taught; the others are asked */
#define SEED 0
#define DROP 0.5    /* share of the scales that are taken as 0 */
#define LEARNED 0.5 /* from this probability on, samples that are taught count as learned */

/* ---- conditions ---- */

static bool is_named(const struct perta_steps_job *job, int condition)
{
    return job->steps->survive & 1u << condition;
}

/* The forget probability at a point under a condition; NAN if it is not measured. */
static double probability_of(const struct perta_steps_job *job, unsigned k, int condition)
{
    const struct perta_steps_point *p = &job->points[k];
    return condition == PERTA_AS_IT_IS ? p->probability[PERTA_FORGET] : p->under[condition];
}

/* What it may be at most. */
static double limit_of(const struct perta_steps_job *job, int condition)
{
    return job->steps->stop_probability *
           (condition == PERTA_RETAUGHT ? job->steps->reteach.factor : 1);
}

static bool holds(const struct perta_steps_job *job, unsigned k, int condition)
{
    return probability_of(job, k, condition) <= limit_of(job, condition);
}

int perta_steps_survive_check(struct perta_steps_job *job, struct perta_err *err)
{
    int rc = 0;
    for (int c = 1; c < PERTA_N_ROUNDINGS && !rc; c++)
        if (is_named(job, c))
            rc = perta_weights_round(&job->weights, (enum perta_rounding)c, err);
    job->weights.rounding = PERTA_ROUND_NONE;
    if (!rc && is_named(job, PERTA_RETAUGHT) && job->n_forget < 2)
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: it has one sample, but --survive reteach teaches some and asks for "
                        "others",
                        job->steps->data_forget);
    return rc;
}

bool perta_steps_survives(const struct perta_steps_job *job, unsigned k, bool drawn)
{
    for (int c = 0; c < (drawn ? PERTA_N_CONDITIONS : PERTA_DROPPED); c++)
        if (is_named(job, c) && !holds(job, k, c))
            return false;
    return true;
}

/* How far a condition is from its limit at a point; above 1: it does not hold. */
static double excess_of(const struct perta_steps_job *job, unsigned k, int condition)
{
    return probability_of(job, k, condition) / limit_of(job, condition);
}

/* The condition under which gradients are taken: of those that are named and do not hold, the worst;
 * the model as it is if all of them hold. Were it among the others, it would be the worst for most
 * of the way, and its gradients hide what they are to remove. */
static int gradients_under(const struct perta_steps_job *job, unsigned k)
{
    int worst = PERTA_AS_IT_IS;
    for (int c = 0; c < PERTA_N_CONDITIONS; c++)
        if (is_named(job, c) && !holds(job, k, c) &&
            (worst == PERTA_AS_IT_IS || excess_of(job, k, c) > excess_of(job, k, worst)))
            worst = c;
    return worst;
}

/* The condition that misses its limit most, or comes nearest to it; if several do, the first. */
static int worst_of(const struct perta_steps_job *job, unsigned k)
{
    int worst = PERTA_AS_IT_IS;
    for (int c = 0; c < PERTA_N_CONDITIONS; c++)
        if (is_named(job, c) && excess_of(job, k, c) > excess_of(job, k, worst))
            worst = c;
    return worst;
}

/* ---- teach ---- */

/* The samples that are taught before point k, or the others. */
static struct perta_pick pick_of(const struct perta_steps_job *job, unsigned k,
                                 enum perta_picked what)
{
    uint64_t size = job->n_forget / SHARE;
    return (struct perta_pick){what, size ? size : 1, SEED, k};
}

/* Tune an adapter beside the model of point k, with some of the forget set's samples. */
static int tune_some(struct perta_steps_job *job, unsigned k, const struct perta_steps_model *model,
                     const char *out, struct perta_err *err)
{
    static const char *const targets[] = {"all-linear"};
    const struct perta_steps *s = job->steps;
    const struct perta_pick pick = pick_of(job, k, PERTA_PICK_SOME);
    const struct perta_tune tune = {.model = s->model,
                                    .data = s->data_forget,
                                    .data_xxh128 = job->data[PERTA_FORGET].xxh128,
                                    .out = out,
                                    .at = model->at,
                                    .pick = pick,
                                    .rank = RANK,
                                    .lora_alpha = LORA_ALPHA,
                                    .targets = targets,
                                    .n_targets = 1,
                                    .learning_rate = s->reteach.learning_rate,
                                    .scheduler = PERTA_LR_CONSTANT,
                                    .steps = s->reteach.updates,
                                    .batch_size = pick.size,
                                    .seed = k,
                                    .max_tokens = s->max_tokens,
                                    .compute = s->compute,
                                    .force = true};
    json_t *summary = NULL;
    int rc = perta_tune(&tune, &job->run, &summary, err);
    json_decref(summary);
    return rc ? rc : perta_steps_check_models(job, err);
}

/* ---- measure ---- */

/* What is asked under a condition: the model of the step, and what is changed there. */
struct asked {
    struct perta_scaled_paths paths;
    const struct perta_scaled_paths *at; /* paths; NULL: --model as it is */
    struct perta_steps_change change;
};

static void asked_under(const struct perta_steps_job *job, unsigned k, int condition,
                        const struct perta_steps_model *model, const char *taught,
                        struct asked *asked)
{
    *asked = (struct asked){.paths = model->paths, .at = model->at ? &asked->paths : NULL};
    if (condition < PERTA_N_ROUNDINGS)
        asked->change.quantize = (enum perta_rounding)condition;
    if (condition == PERTA_DROPPED) {
        asked->paths.drop = DROP;
        asked->paths.drop_seed = k;
    }
    if (condition == PERTA_RETAUGHT)
        asked->change = (struct perta_steps_change){.adapter = taught,
                                                    .pick = pick_of(job, k, PERTA_PICK_REST)};
}

static int ask(struct perta_steps_job *job, const struct asked *asked, double *probability,
               struct perta_err *err)
{
    json_t *summary = NULL;
    int rc = perta_steps_eval(job, PERTA_FORGET, asked->at, &asked->change, &summary, err);
    *probability = json_real_value(json_object_get(summary, "probability"));
    json_decref(summary);
    return rc;
}

/* Teach some samples before point k, and ask for them: where they were not learned, it says nothing
 * that the others are not known. */
static int teach(struct perta_steps_job *job, unsigned k, const struct perta_steps_model *model,
                 const char *taught, struct perta_err *err)
{
    struct asked asked;
    double probability = 0;
    if (!isnan(job->points[k].taught))
        return 0;
    asked_under(job, k, PERTA_RETAUGHT, model, taught, &asked);
    asked.change.pick = pick_of(job, k, PERTA_PICK_SOME);
    int rc = tune_some(job, k, model, taught, err);
    if (!rc)
        rc = ask(job, &asked, &probability, err);
    if (!rc)
        rc = perta_steps_commit(
            job, json_pack("{s:I, s:f}", "step", (json_int_t)k, "taught", probability), err);
    job->points[k].taught = rc ? (double)NAN : probability;
    return rc;
}

static int measure(struct perta_steps_job *job, unsigned k, int condition,
                   const struct perta_steps_model *model, const char *taught, struct perta_err *err)
{
    double *to = &job->points[k].under[condition];
    struct asked asked;
    double probability = 0;
    if (!isnan(*to))
        return 0;
    asked_under(job, k, condition, model, taught, &asked);
    int rc = condition == PERTA_RETAUGHT ? teach(job, k, model, taught, err) : 0;
    if (!rc)
        rc = ask(job, &asked, &probability, err);
    if (!rc)
        rc = perta_steps_commit(job,
                                json_pack("{s:I, s:s, s:f}", "step", (json_int_t)k, "condition",
                                          perta_condition_name((enum perta_condition)condition),
                                          "under", probability),
                                err);
    *to = rc ? NAN : probability;
    return rc;
}

/* The gradients that the next step uses, under the worst condition. */
static int take_gradients(struct perta_steps_job *job, unsigned k,
                          const struct perta_steps_model *model, const char *taught,
                          struct perta_err *err)
{
    int under = gradients_under(job, k);
    struct asked asked;
    json_t *summary = NULL;
    asked_under(job, k, under, model, taught, &asked);
    int rc = perta_steps_estimate(job, PERTA_FORGET, asked.at, &asked.change,
                                  model->gradients[PERTA_FORGET], NULL, NULL, &summary, err);
    json_decref(summary);
    if (!rc)
        rc = perta_steps_commit(job,
                                json_pack("{s:I, s:s}", "step", (json_int_t)k, "gradients",
                                          perta_condition_name((enum perta_condition)under)),
                                err);
    job->points[k].gradients_under = rc ? -1 : under;
    return rc;
}

/* Are gradients to be taken that are not written yet? Those that a box is formed from are. */
static bool lacks_gradients(const struct perta_steps_job *job, unsigned k)
{
    bool forms_box = !k && perta_steps_is_own(job->steps);
    return k < job->steps->n_steps && !forms_box && job->points[k].gradients_under < 0 &&
           perta_steps_uses_gradients(job, k, PERTA_FORGET);
}

int perta_steps_survive(struct perta_steps_job *job, unsigned k, struct perta_err *err)
{
    struct perta_steps_model model;
    char *taught = perta_steps_path(job, PERTA_STEPS_TAUGHT, k, "");
    int rc = perta_steps_model_open(job, k, &model, err);
    if (!rc && !taught)
        rc = perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    for (int c = 0; c < PERTA_N_CONDITIONS && !rc; c++)
        if (is_named(job, c))
            rc = measure(job, k, c, &model, taught, err);
    if (!rc && lacks_gradients(job, k))
        rc = take_gradients(job, k, &model, taught, err);
    perta_steps_model_close(&model);
    free(taught);
    return rc;
}

/* ---- records ---- */

/* The condition that a record names under key, or -1. */
static int condition_in(const json_t *record, const char *key)
{
    const char *name = json_string_value(json_object_get(record, key));
    for (int c = 0; name && c < PERTA_N_CONDITIONS; c++)
        if (!strcmp(name, perta_condition_name((enum perta_condition)c)))
            return c;
    return -1;
}

void perta_steps_survive_replay(struct perta_steps_point *point, const json_t *record)
{
    int measured = condition_in(record, "condition"), gradients = condition_in(record, "gradients");
    if (measured >= 0)
        point->under[measured] = json_real_value(json_object_get(record, "under"));
    if (gradients >= 0)
        point->gradients_under = gradients;
    if (json_object_get(record, "taught"))
        point->taught = json_real_value(json_object_get(record, "taught"));
}

static json_t *reteach_json(const struct perta_steps_job *job)
{
    const struct perta_reteach *r = &job->steps->reteach;
    return json_pack("{s:I, s:i, s:f, s:I, s:f, s:f, s:i}", "samples",
                     (json_int_t)pick_of(job, 0, PERTA_PICK_SOME).size, "rank", RANK, "lora_alpha",
                     LORA_ALPHA, "updates", (json_int_t)r->updates, "learning_rate",
                     r->learning_rate, "factor", r->factor, "seed", SEED);
}

json_t *perta_steps_survive_parameters(const struct perta_steps_job *job)
{
    json_t *list = json_array();
    for (int c = 0; c < PERTA_N_CONDITIONS; c++)
        if (is_named(job, c))
            perta_json_append(&list, json_string(perta_condition_name((enum perta_condition)c)));
    json_t *all = json_pack("{s:o}", "conditions", list);
    if (is_named(job, PERTA_DROPPED))
        perta_json_set(&all, perta_condition_name(PERTA_DROPPED),
                       json_pack("{s:f}", "share", DROP));
    if (is_named(job, PERTA_RETAUGHT))
        perta_json_set(&all, perta_condition_name(PERTA_RETAUGHT), reteach_json(job));
    return all;
}

json_t *perta_steps_survive_point(const struct perta_steps_job *job, unsigned k)
{
    json_t *all = json_object();
    for (int c = 0; c < PERTA_N_CONDITIONS; c++)
        if (is_named(job, c))
            perta_json_set(&all, perta_condition_name((enum perta_condition)c),
                           perta_real_json(job->points[k].under[c]));
    return all;
}

/* The worst first; the others in their order. */
json_t *perta_steps_survive_end(const struct perta_steps_job *job, unsigned k)
{
    int worst = worst_of(job, k);
    json_t *list = json_array();
    for (int i = -1; i < PERTA_N_CONDITIONS; i++) {
        int c = i < 0 ? worst : i;
        if ((i == worst) || !(c == PERTA_AS_IT_IS || is_named(job, c)))
            continue;
        json_t *end = json_pack("{s:s, s:o, s:f, s:b}", "condition",
                                perta_condition_name((enum perta_condition)c), "probability",
                                perta_real_json(probability_of(job, k, c)), "limit",
                                limit_of(job, c), "holds", (int)holds(job, k, c));
        if (c == PERTA_RETAUGHT)
            perta_json_set(&end, "taught", json_real(job->points[k].taught));
        perta_json_append(&list, end);
    }
    return list;
}

int perta_steps_survive_note(struct perta_steps_job *job, unsigned k, struct perta_err *err)
{
    const struct perta_reteach *r = &job->steps->reteach;
    double taught = job->points[k].taught;
    if (isnan(taught) || taught >= LEARNED)
        return 0;
    json_t *note =
        perta_text_json("--survive reteach: after %llu updates at a rate of %g, even the samples "
                        "that were taught have a probability of only %.3g, so what the others have "
                        "says little; try another --reteach-rate, or more --reteach-updates",
                        (unsigned long long)r->updates, r->learning_rate, taught);
    return json_array_append_new(job->notes, note) ? perta_fail_sys(err, ENOMEM, "notes") : 0;
}
