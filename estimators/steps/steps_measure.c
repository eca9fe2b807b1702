/* What is measured at a point of the path: the losses of both sets, and the gradients that the next
 * step uses. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/passes/eval.h"
#include "estimators/steps/steps_job.h"
#include "io/text.h"

/* Is the loss over the whole retain set needed at point k? Where it is not, that of the batch whose
 * gradients are taken stands in the record. */
static bool needs_retain_loss(const struct perta_steps_job *job, unsigned k)
{
    return !job->batched || !k || k == job->steps->n_steps ||
           isfinite(job->steps->max_retain_rise) || perta_steps_forgets_enough(job, k);
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

static const char *data_of(const struct perta_steps_job *job, int set)
{
    return set == PERTA_FORGET ? job->steps->data_forget : job->steps->data_retain;
}

int perta_steps_eval(struct perta_steps_job *job, int set, const struct perta_scaled_paths *at,
                     json_t **summary, struct perta_err *err)
{
    const struct perta_eval eval = {.model = job->steps->model,
                                    .at = at,
                                    .data = data_of(job, set),
                                    .data_xxh128 = job->data[set].xxh128,
                                    .max_tokens = job->steps->max_tokens,
                                    .compute = job->steps->compute,
                                    .scratch = job->work.partial,
                                    .as_estimate = true};
    return perta_eval(&eval, &job->run, summary, err);
}

/* What is measured at a point. */
enum what {
    FORGET, /* the loss, and the gradients if the next step uses them */
    RETAIN, /* likewise; in a path with batches, the loss alone */
    BATCH,  /* loss and gradients over a batch of the retain set */
};

static int run_measure(struct perta_steps_job *job, unsigned k, enum what what, json_t **summary,
                       struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    int set = what == FORGET ? PERTA_FORGET : PERTA_RETAIN;
    char *scales = perta_steps_scales(job, k), *box = perta_steps_box_folder(job);
    char *out = perta_steps_path(job, PERTA_STEPS_GRADIENTS, k, perta_sets[set]);
    bool own = perta_steps_is_own(s), at_model = own && !k; /* where the box is not formed yet */
    bool loss_alone = k == s->n_steps || (what == RETAIN && job->batched);
    const struct perta_scaled_paths at = {s->tuned, s->base, scales, own ? box : NULL, job->box};
    const struct perta_pick all = {0}, batch = {PERTA_PICK_BATCH, s->retain_batch, 0, k};
    struct measuring measuring = {job, k, set};
    const struct perta_estimate estimate = {.model = s->model,
                                            .at = at_model ? NULL : &at,
                                            .data = data_of(job, set),
                                            .data_xxh128 = job->data[set].xxh128,
                                            .out = out,
                                            .mean = true,
                                            .by_probability = set == PERTA_FORGET,
                                            .takes_gradients =
                                                what == BATCH ? NULL : takes_gradients,
                                            .ctx = &measuring,
                                            .pick = what == BATCH ? batch : all,
                                            .max_tokens = s->max_tokens,
                                            .compute = s->compute,
                                            .force = true};
    int rc = !scales || !box || !out ? perta_fail_sys(err, ENOMEM, "%s", job->work_path)
             : loss_alone ? perta_steps_eval(job, set, at_model ? NULL : &at, summary, err)
                          : perta_estimate(&estimate, &job->run, summary, err);
    free(scales);
    free(box);
    free(out);
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
    if (!rc)
        rc = perta_steps_check_models(job, err);
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
    if (!rc && needs_retain_loss(job, k))
        rc = measure(job, k, RETAIN, err);
    if (!rc && job->batched && perta_steps_uses_gradients(job, k, PERTA_RETAIN))
        rc = measure(job, k, BATCH, err);
    return rc;
}
