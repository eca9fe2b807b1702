/* What is measured at a point of the path: the losses of both sets, and the gradients that the next
 * step uses. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/passes/eval.h"
#include "estimators/steps/steps_job.h"
#include "io/text.h"

/* ---- the model of a step ---- */

int perta_steps_model_open(const struct perta_steps_job *job, unsigned k,
                           struct perta_steps_model *model, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    bool own = perta_steps_is_own(s);
    *model = (struct perta_steps_model){.scales = perta_steps_scales(job, k),
                                        .box = perta_steps_box_folder(job)};
    for (int set = 0; set < 2; set++)
        model->gradients[set] = perta_steps_path(job, PERTA_STEPS_GRADIENTS, k, perta_sets[set]);
    model->paths = (struct perta_scaled_paths){.tuned = s->tuned,
                                               .base = s->base,
                                               .scale = model->scales,
                                               .box = own ? model->box : NULL,
                                               .box_size = job->box};
    model->at = own && !k ? NULL : &model->paths;
    return model->scales && model->box && model->gradients[0] && model->gradients[1]
               ? 0
               : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
}

void perta_steps_model_close(struct perta_steps_model *model)
{
    free(model->scales);
    free(model->box);
    free(model->gradients[0]);
    free(model->gradients[1]);
}

static const char *data_of(const struct perta_steps_job *job, int set)
{
    return set == PERTA_FORGET ? job->steps->data_forget : job->steps->data_retain;
}

int perta_steps_eval(struct perta_steps_job *job, int set, const struct perta_scaled_paths *at,
                     const struct perta_steps_change *change, json_t **summary,
                     struct perta_err *err)
{
    const struct perta_eval eval = {.model = job->steps->model,
                                    .at = at,
                                    .quantize = change->quantize,
                                    .adapter = change->adapter,
                                    .data = data_of(job, set),
                                    .data_xxh128 = job->data[set].xxh128,
                                    .pick = change->pick,
                                    .max_tokens = job->steps->max_tokens,
                                    .compute = job->steps->compute,
                                    .scratch = job->work.partial,
                                    .as_estimate = true};
    int rc = perta_eval(&eval, &job->run, summary, err);
    return rc ? rc : perta_steps_check_models(job, err);
}

int perta_steps_estimate(struct perta_steps_job *job, int set, const struct perta_scaled_paths *at,
                         const struct perta_steps_change *change, const char *out,
                         bool (*takes)(void *ctx, double loss, double probability), void *ctx,
                         json_t **summary, struct perta_err *err)
{
    const struct perta_estimate estimate = {.model = job->steps->model,
                                            .at = at,
                                            .quantize = change->quantize,
                                            .adapter = change->adapter,
                                            .data = data_of(job, set),
                                            .data_xxh128 = job->data[set].xxh128,
                                            .out = out,
                                            .mean = true,
                                            .by_probability = set == PERTA_FORGET,
                                            .takes_gradients = takes,
                                            .ctx = ctx,
                                            .pick = change->pick,
                                            .max_tokens = job->steps->max_tokens,
                                            .compute = job->steps->compute,
                                            .force = true};
    int rc = perta_estimate(&estimate, &job->run, summary, err);
    return rc ? rc : perta_steps_check_models(job, err);
}

/* ---- a point ---- */

/* What is measured at a point. */
enum what {
    FORGET, /* the loss, and the gradients if the next step uses them */
    RETAIN, /* likewise; in a path with batches, the loss alone */
    BATCH,  /* loss and gradients over a batch of the retain set */
};

/* Is the loss over the whole retain set needed at point k? Where it is not, that of the batch whose
 * gradients are taken stands in the record. */
static bool needs_retain_loss(const struct perta_steps_job *job, unsigned k)
{
    return !job->batched || !k || k >= job->steps->n_steps ||
           isfinite(job->steps->max_retain_rise) || perta_steps_forgets_enough(job, k);
}

/* With conditions, the forget set's gradients are taken under the worst of them, except those that
 * a box is formed from. */
static bool needs_loss_alone(const struct perta_steps_job *job, unsigned k, enum what what)
{
    bool forms_box = !k && perta_steps_is_own(job->steps);
    return k >= job->steps->n_steps || (what == RETAIN && job->batched) ||
           (what == FORGET && job->steps->survive && !forms_box);
}

struct measuring {
    struct perta_steps_job *job;
    unsigned k;
    int set;
};

static bool takes_gradients(void *ctx, double loss, double probability)
{
    const struct measuring *m = ctx;
    struct perta_steps_point *p = &m->job->points[m->k];
    p->loss[m->set] = loss;
    p->probability[m->set] = probability;
    return perta_steps_uses_gradients(m->job, m->k, m->set);
}

static int run_measure(struct perta_steps_job *job, unsigned k, enum what what, json_t **summary,
                       struct perta_err *err)
{
    int set = what == FORGET ? PERTA_FORGET : PERTA_RETAIN;
    const struct perta_pick batch = {PERTA_PICK_BATCH, job->steps->retain_batch, 0, k};
    const struct perta_steps_change none = {0}, change = {.pick = batch};
    struct measuring measuring = {job, k, set};
    struct perta_steps_model model;
    int rc = perta_steps_model_open(job, k, &model, err);
    if (!rc && needs_loss_alone(job, k, what))
        rc = perta_steps_eval(job, set, model.at, &none, summary, err);
    else if (!rc && what == BATCH)
        rc = perta_steps_estimate(job, set, model.at, &change, model.gradients[set], NULL, NULL,
                                  summary, err);
    else if (!rc)
        rc = perta_steps_estimate(job, set, model.at, &none, model.gradients[set], takes_gradients,
                                  &measuring, summary, err);
    perta_steps_model_close(&model);
    return rc;
}

static int commit_measured(struct perta_steps_job *job, unsigned k, enum what what,
                           struct perta_err *err)
{
    const struct perta_steps_point *p = &job->points[k];
    int set = what == FORGET ? PERTA_FORGET : PERTA_RETAIN;
    return perta_steps_commit(job,
                              json_pack("{s:I, s:f, s:f, s:f, s:I, s:I, s:b}", "step",
                                        (json_int_t)k, perta_sets[set], p->loss[set], "probability",
                                        p->probability[set], "spread", job->spread, "samples",
                                        (json_int_t)p->samples[set], "tokens",
                                        (json_int_t)p->tokens[set], "batch", (int)(what == BATCH)),
                              err);
}

/* Take loss and so on from the summary of an estimate or eval. */
static int take_measured(struct perta_steps_job *job, unsigned k, int set, const json_t *summary,
                         struct perta_err *err)
{
    struct perta_steps_point *p = &job->points[k];
    p->loss[set] = json_real_value(json_object_get(summary, "loss"));
    p->probability[set] = json_real_value(json_object_get(summary, "probability"));
    p->samples[set] = (uint64_t)json_integer_value(json_object_get(summary, "samples"));
    p->tokens[set] = (uint64_t)json_integer_value(json_object_get(summary, "tokens"));
    if (!k && set == PERTA_FORGET)
        job->spread = json_real_value(json_object_get(summary, "spread"));
    return isfinite(p->loss[set])
               ? 0
               : perta_fail(err, PERTA_EINPUT, "%s: the loss at step %u is not a finite number",
                            data_of(job, set), k);
}

static int measure(struct perta_steps_job *job, unsigned k, enum what what, struct perta_err *err)
{
    struct perta_steps_point *p = &job->points[k];
    int set = what == FORGET ? PERTA_FORGET : PERTA_RETAIN;
    bool knows_loss = !isnan(p->loss[set]);
    json_t *summary = NULL;
    if (what == BATCH ? p->gradients : knows_loss)
        return 0;
    int rc = run_measure(job, k, what, &summary, err);
    if (!rc && !(what == BATCH && knows_loss))
        rc = take_measured(job, k, set, summary, err);
    json_decref(summary);
    if (!rc)
        rc = commit_measured(job, k, what, err);
    p->gradients |= !rc && what == BATCH;
    if (rc && !(what == BATCH && knows_loss))
        p->loss[set] = NAN;
    return rc;
}

int perta_steps_measure(struct perta_steps_job *job, unsigned k, struct perta_err *err)
{
    int rc = measure(job, k, FORGET, err);
    if (!rc && job->steps->survive)
        rc = perta_steps_survive(job, k, err);
    if (!rc && needs_retain_loss(job, k))
        rc = measure(job, k, RETAIN, err);
    if (!rc && job->batched && perta_steps_uses_gradients(job, k, PERTA_RETAIN))
        rc = measure(job, k, BATCH, err);
    return rc;
}
