#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/gemm.h"
#include "estimators/model/samples.h"
#include "estimators/steps/steps_job.h"
#include "io/format/naming.h"
#include "io/fpenv.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/journal.h"
#include "stream/memory.h"

const char *const perta_sets[2] = {"forget", "retain"};

/* ---- names in the work folder ---- */

/* The caller frees it. NULL when out of memory. */
static char *name_of(const char *fmt, unsigned step, const char *set)
{
    char *name = NULL;
    return asprintf(&name, fmt, step, set) < 0 ? NULL : name;
}

char *perta_steps_path(const struct perta_steps_job *job, const char *fmt, unsigned k,
                       const char *set)
{
    char *name = name_of(fmt, k, set);
    char *path = name ? perta_publish_path(&job->work, name) : NULL;
    free(name);
    return path;
}

#define SCALES "scales-%u%s"
#define MEAN PERTA_STEPS_GRADIENTS "/mean"

char *perta_steps_scales(const struct perta_steps_job *job, unsigned k)
{
    return perta_steps_path(job, SCALES, k, "");
}

char *perta_steps_box_folder(const struct perta_steps_job *job)
{
    return perta_publish_path(&job->work, "box");
}

static void remove_folder(const struct perta_steps_job *job, const char *fmt, unsigned step,
                          const char *set)
{
    struct perta_err ignored = {0};
    char *name = name_of(fmt, step, set);
    if (name)
        perta_publish_remove(&job->work, name, &ignored);
    free(name);
}

/* ---- identity of the run ---- */

/* Identifies a data file in the journal. Not by a digest: its content could be guessed from one
 * (docs/provenance.md). */
static json_t *file_json(const struct perta_samples_file *file)
{
    return perta_journal_file(file->len_bytes, &file->mtime);
}

json_t *perta_steps_parameters(const struct perta_steps_job *job, unsigned n_steps)
{
    const struct perta_steps *s = job->steps;
    bool bf16 = s->compute == PERTA_COMPUTE_BF16 ||
                (s->compute == PERTA_COMPUTE_AUTO && perta_gemm_has_bf16());
    json_t *flags =
        json_pack("{s:s, s:I, s:f, s:f, s:f, s:o, s:o, s:o, s:s}", "method",
                  s->hold                ? "signed-hold"
                  : s->rule.back_off > 0 ? "signed-backoff"
                                         : "signed",
                  "steps", (json_int_t)n_steps, "step", s->rule.step, "back_off", s->rule.back_off,
                  "max_scale", s->rule.max_scale, "stop_forget", perta_real_json(s->stop_forget),
                  "stop_probability", perta_real_json(s->stop_probability), "max_retain_rise",
                  perta_real_json(s->max_retain_rise), "compute", bf16 ? "bf16" : "f32");
    if (s->survive)
        perta_json_set(&flags, "survive", perta_steps_survive_parameters(job));
    if (s->retain_batch)
        perta_json_set(&flags, "retain_batch", json_integer((json_int_t)s->retain_batch));
    if (s->box > 0 || job->box > 0)
        perta_json_set(&flags, "box", json_real(s->box > 0 ? s->box : job->box));
    return flags;
}

/* Null if there is only one patch. */
static json_t *listed_json(const struct perta_steps *s)
{
    json_t *list = s->several ? json_array() : json_null();
    for (unsigned k = 0; s->several && k <= s->n_steps; k++)
        if (s->listed[k])
            perta_json_append(&list, json_integer(k));
    return list;
}

static json_t *globs_json(const char *const *globs, unsigned n)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < n; i++)
        perta_json_append(&list, perta_text_json("%s", globs[i]));
    return list;
}

/* Null if it is not given. */
static json_t *other_json(const struct perta_checkpoint *ck)
{
    return ck ? perta_journal_checkpoint(ck) : json_null();
}

static json_t *identity_of(const struct perta_steps_job *job)
{
    const struct perta_steps *s = job->steps;
    json_t *identity = json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:b, s:I, s:[ss], s:o, s:o, s:o, s:o, s:o, s:o}",
        "tool", "perta " PERTA_VERSION, "verb", "unlearn --steps", "flags",
        perta_steps_parameters(job, s->n_steps), "patches of", listed_json(s), "include",
        globs_json(s->globs.include, s->globs.n_include), "exclude",
        globs_json(s->globs.exclude, s->globs.n_exclude), "out",
        s->out ? perta_text_json("%s", s->out) : json_null(), "one way", (int)s->one_way,
        "max tokens", (json_int_t)s->max_tokens, "data key gives", job->data[PERTA_FORGET].hmac,
        job->data[PERTA_RETAIN].hmac, "forget", file_json(&job->data[PERTA_FORGET]), "retain",
        file_json(&job->data[PERTA_RETAIN]), "model", perta_journal_checkpoint(job->weights.ck),
        "config.json", perta_journal_config(job->weights.ck), "tuned", other_json(job->others[0]),
        "base", other_json(job->others[1]));
    if (job->adapter)
        perta_json_set(&identity, PERTA_ADAPTER_CONFIG, perta_journal_config(job->others[0]));
    return identity;
}

/* ---- records ---- */

int perta_steps_commit(struct perta_steps_job *job, json_t *record, struct perta_err *err)
{
    int rc = record ? perta_journal_commit(&job->journal, record, 0, err)
                    : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    json_decref(record);
    return rc;
}

static int replay(void *ctx, json_t *record, struct perta_err *err)
{
    struct perta_steps_job *job = ctx;
    const json_t *step = json_object_get(record, "step");
    json_t *patch = json_object_get(record, "patch");
    json_int_t k = json_integer_value(step);
    if (!step)
        return 0;
    if (k < 0 || k > (json_int_t)job->steps->n_steps + 1)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: it names a step that this run does not have; --force starts over",
                          job->journal.path);
    struct perta_steps_point *p = &job->points[k];
    if (patch)
        job->patching = json_is_object(patch) ? -1 : (int)k;
    if (json_is_object(patch)) {
        json_decref(p->patch);
        p->patch = json_incref(patch);
    }
    if (json_object_get(record, "spread"))
        job->spread = json_real_value(json_object_get(record, "spread"));
    if (json_object_get(record, "fall"))
        job->fall = json_real_value(json_object_get(record, "fall"));
    if (json_object_get(record, "box"))
        job->box = json_real_value(json_object_get(record, "box"));
    if (json_object_get(record, "trial") && job->n_trials < PERTA_STEPS_TRIALS)
        job->trials[job->n_trials++] =
            (struct perta_steps_trial){json_real_value(json_object_get(record, "trial")),
                                       json_real_value(json_object_get(record, "probability"))};
    for (int i = 0; i < 2; i++) {
        const json_t *loss = json_object_get(record, perta_sets[i]);
        if (loss) {
            p->loss[i] = json_real_value(loss);
            p->probability[i] = json_real_value(json_object_get(record, "probability"));
            p->samples[i] = (uint64_t)json_integer_value(json_object_get(record, "samples"));
            p->tokens[i] = (uint64_t)json_integer_value(json_object_get(record, "tokens"));
        }
    }
    p->gradients |= json_is_true(json_object_get(record, "batch"));
    perta_steps_survive_replay(p, record);
    p->summed |= json_is_true(json_object_get(record, "summed"));
    if (json_object_get(record, "moved")) {
        p->reached = true;
        p->moved = json_real_value(json_object_get(record, "moved"));
        p->mean_scale = json_real_value(json_object_get(record, "mean_scale"));
    }
    return 0;
}

/* ---- rules that end the path ---- */

static bool forgets_as_it_is(const struct perta_steps_job *job, unsigned k)
{
    const struct perta_steps_point *p = &job->points[k];
    double loss = job->steps->stop_forget, probability = job->steps->stop_probability;
    return (isfinite(loss) || isfinite(probability)) &&
           (!isfinite(loss) || p->loss[PERTA_FORGET] >= loss) &&
           (!isfinite(probability) || p->probability[PERTA_FORGET] <= probability);
}

bool perta_steps_forgets_enough(const struct perta_steps_job *job, unsigned k)
{
    return forgets_as_it_is(job, k) && perta_steps_survives(job, k, true);
}

unsigned perta_steps_first(const struct perta_steps_job *job, unsigned k)
{
    unsigned first = 0;
    while (first <= k && !perta_steps_forgets_enough(job, first))
        first++;
    return first;
}

static bool rises_too_much(const struct perta_steps_job *job, unsigned k)
{
    const struct perta_steps_point *p = job->points;
    return k && p[k].loss[PERTA_RETAIN] - p[0].loss[PERTA_RETAIN] > job->steps->max_retain_rise;
}

/* Does the path end at point k, which has been measured? */
static bool ends_at(const struct perta_steps_job *job, unsigned k)
{
    bool holds = job->steps->hold && k; /* where nothing has moved, there is nothing to give back */
    return k >= job->steps->n_steps || rises_too_much(job, k) ||
           (!holds && perta_steps_forgets_enough(job, k));
}

/* Does the step from point k, where the set has been measured, use its gradients? While enough is
 * forgotten no scale grows. A box of the model's own is formed from those of point 0. */
bool perta_steps_uses_gradients(const struct perta_steps_job *job, unsigned k, int set)
{
    if (!k && perta_steps_is_own(job->steps))
        return true;
    return set == PERTA_FORGET ? !perta_steps_forgets_enough(job, k) : !ends_at(job, k);
}

/* ---- the models, the box ---- */

/* Every step reads the models again; they must be those that the path began with. */
int perta_steps_check_models(const struct perta_steps_job *job, struct perta_err *err)
{
    int rc = perta_checkpoint_unchanged(job->weights.ck, err);
    for (int i = 0; i < 2 && !rc; i++)
        if (job->others[i])
            rc = perta_checkpoint_unchanged(job->others[i], err);
    return rc;
}

/* Form the box, once, from the gradients at the model. */
static int form_box(struct perta_steps_job *job, struct perta_err *err)
{
    if (!perta_steps_is_own(job->steps) || job->fall >= 0)
        return 0;
    char *forget = perta_steps_path(job, MEAN, 0, perta_sets[PERTA_FORGET]);
    char *retain = perta_steps_path(job, MEAN, 0, perta_sets[PERTA_RETAIN]);
    char *scales = perta_steps_scales(job, 0), *to = perta_steps_box_folder(job);
    const struct perta_box_folders folders = {
        job->steps->model, forget, retain, scales, to, perta_is_tied(job->weights.ck)};
    int rc = forget && retain && scales && to
                 ? perta_steps_box(&folders, &job->run, &job->fall, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    if (!rc)
        rc = perta_steps_check_models(job, err);
    if (!rc)
        rc = perta_steps_commit(job, json_pack("{s:i, s:f}", "step", 0, "fall", job->fall), err);
    free(forget);
    free(retain);
    free(scales);
    free(to);
    return rc;
}

/* ---- a step ---- */

/* The rule for the step from k to k + 1. */
static struct perta_step_rule rule_at(const struct perta_steps_job *job, unsigned k)
{
    struct perta_step_rule rule = job->steps->rule;
    if (!job->steps->hold)
        return rule;
    unsigned first = perta_steps_first(job, k);
    first = first < k ? first : k;
    double share = 1 - (double)(k - first) / (job->steps->n_steps - first);
    rule.step = perta_steps_forgets_enough(job, k) ? 0 : rule.step * share;
    rule.back_off *= share;
    return rule;
}

/* Compute the scales of step k + 1 from those of step k. */
static int move(struct perta_steps_job *job, unsigned k, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    struct perta_steps_point *p = &job->points[k + 1];
    const struct perta_step_rule rule = rule_at(job, k);
    struct perta_step_counts counts = {0};
    char *forget = perta_steps_path(job, MEAN, k, perta_sets[PERTA_FORGET]);
    char *retain = perta_steps_path(job, MEAN, k, perta_sets[PERTA_RETAIN]);
    char *from = perta_steps_scales(job, k), *to = perta_steps_scales(job, k + 1);
    char *box = perta_steps_box_folder(job);
    const struct perta_step_folders folders = {
        .tuned = s->tuned,
        .base = s->base,
        .box = perta_steps_is_own(s) ? box : NULL,
        .forget = perta_steps_uses_gradients(job, k, PERTA_FORGET) ? forget : NULL,
        .retain = retain,
        .from = from,
        .to = to,
        .model = job->weights.ck,
        .tied = perta_is_tied(job->weights.ck)};
    int rc = forget && retain && from && to && box
                 ? perta_steps_update(&rule, &folders, &job->run, &counts, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    if (!rc)
        rc = perta_steps_check_models(job, err);
    p->moved = counts.n ? (double)counts.n_moved / (double)counts.n : 0;
    p->mean_scale = counts.n ? counts.sum / (double)counts.n : 0;
    if (!rc)
        rc = perta_steps_commit(job,
                                json_pack("{s:I, s:f, s:f}", "step", (json_int_t)k + 1, "moved",
                                          p->moved, "mean_scale", p->mean_scale),
                                err);
    p->reached = !rc;
    free(forget);
    free(retain);
    free(from);
    free(to);
    free(box);
    return rc;
}

/* The step where a path that is measured up to last ends. */
static unsigned end_of(const struct perta_steps_job *job, unsigned last)
{
    const struct perta_steps_point *p = job->points;
    unsigned end = rises_too_much(job, last) ? last - 1 : last;
    bool found = false;
    for (unsigned k = 0; job->steps->hold && k <= last; k++)
        if (perta_steps_forgets_enough(job, k) && !rises_too_much(job, k) &&
            (!found || p[k].loss[PERTA_RETAIN] <= p[end].loss[PERTA_RETAIN])) {
            end = k;
            found = true;
        }
    return end;
}

/* Remove what no later step needs. Two folders of scales are kept: of the step before, for the
 * limit on the retain loss, and of the step where the path would end. */
static void tidy(const struct perta_steps_job *job, unsigned k)
{
    for (int set = 0; set < 2; set++)
        remove_folder(job, PERTA_STEPS_GRADIENTS, k, perta_sets[set]);
    if (job->steps->survive)
        remove_folder(job, PERTA_STEPS_TAUGHT, k, "");
    if (job->points[k].summed && k)
        remove_folder(job, PERTA_STEPS_SUM, k - 1, "");
    if (!k)
        return;
    const unsigned old[] = {k - 1, end_of(job, k - 1)};
    for (int i = 0; i < 2; i++)
        if (old[i] != end_of(job, k))
            remove_folder(job, SCALES, old[i], "");
}

/* ---- the path ---- */

/* At the end of a path that held the level under conditions: measure the mean. It is the end if it
 * forgets enough as far as no draw decides; of single points, the one that is chosen was lucky in
 * its draw. */
static int end_in_mean(struct perta_steps_job *job, unsigned *chosen, unsigned *last,
                       struct perta_err *err)
{
    unsigned k = job->steps->n_steps + 1;
    bool made = false;
    int rc = 0;
    if (*last == job->steps->n_steps && !rises_too_much(job, *last))
        rc = perta_steps_mean(job, &made, err);
    if (rc || !made)
        return rc;
    rc = perta_steps_measure(job, k, err);
    *last = k;
    if (!rc && forgets_as_it_is(job, k) && perta_steps_survives(job, k, false) &&
        !rises_too_much(job, k))
        *chosen = k;
    return rc;
}

/* A path that ends where it began. */
static int note_nothing_to_do(struct perta_steps_job *job, struct perta_err *err)
{
    json_t *note = perta_text_json("%s: the model is at or below the level that is asked for, "
                                   "before any step; there is nothing to forget",
                                   job->steps->data_forget);
    return json_array_append_new(job->notes, note) ? perta_fail_sys(err, ENOMEM, "notes") : 0;
}

/* Take steps until a rule or the number of steps ends the path. *chosen is the step that the last
 * patch leads to, *last the last step that was measured. */
static int take_steps(struct perta_steps_job *job, unsigned *chosen, unsigned *last,
                      struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    int rc = 0;
    for (unsigned k = 0; !rc; k++) {
        rc = perta_steps_measure(job, k, err);
        if (!rc && !k)
            rc = form_box(job, err);
        if (rc)
            break;
        *chosen = end_of(job, k);
        *last = k;
        rc = perta_steps_sum(job, k, err);
        if (rc)
            break;
        if (!k && perta_steps_forgets_enough(job, k))
            rc = note_nothing_to_do(job, err);
        if (rc || ends_at(job, k))
            break;
        if (s->listed[k])
            rc = perta_steps_patch(job, k, k, k, err);
        if (!rc && !job->points[k + 1].reached)
            rc = move(job, k, err);
        if (!rc && !k)
            rc = perta_steps_find_size(job, err);
        if (!rc)
            tidy(job, k);
    }
    return rc ? rc : end_in_mean(job, chosen, last, err);
}

/* ---- begin ---- */

/* Skipped if an interrupted run left a journal: its checks were made when it began, and its outputs
 * may be published by now. That run is resumed, or refused because of its journal. */
static int check(const struct perta_steps_job *job, struct perta_err *err)
{
    if ((job->run.resume || !job->steps->force) && perta_journal_found(job->work_path))
        return 0;
    int rc = perta_publish_check((const char *const *)&job->work_path, 1, NULL, 0,
                                 job->steps->force, err);
    return rc ? rc : perta_steps_patch_check(job, err);
}

/* A checkpoint or an adapter. */
static int open_tuned(struct perta_steps_job *job, struct perta_err *err)
{
    const char *path = job->steps->tuned;
    struct perta_checkpoint **tuned = &job->others[0];
    if (!perta_checkpoint_is_adapter(path))
        return perta_checkpoint_open(path, tuned, err);
    int rc = perta_checkpoint_open_adapter(path, tuned, err);
    if (!rc)
        rc = perta_adapter_open(*tuned, job->weights.ck, &job->adapter, NULL, err);
    return rc ? perta_err_context(err, "--tuned") : 0;
}

static struct perta_steps_point point_not_measured(void)
{
    struct perta_steps_point p = {.loss = {NAN, NAN}, .taught = NAN, .gradients_under = -1};
    for (int c = 0; c < PERTA_N_CONDITIONS; c++)
        p.under[c] = NAN;
    return p;
}

static int prepare(struct perta_steps_job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    size_t len = strlen(s->patch);
    while (len > 1 && s->patch[len - 1] == '/')
        len--;
    job->points = calloc(s->n_steps + 2, sizeof *job->points);
    if (!job->points || asprintf(&job->work_path, "%.*s.steps", (int)len, s->patch) < 0)
        return perta_fail_sys(err, ENOMEM, "%s", s->patch);
    for (unsigned k = 0; k <= s->n_steps + 1; k++)
        job->points[k] = point_not_measured();
    int rc = perta_weights_open(&job->weights, s->model, err);
    if (!rc && s->tuned)
        rc = open_tuned(job, err);
    if (!rc && s->base)
        rc = perta_checkpoint_open(s->base, &job->others[1], err);
    if (!rc)
        rc = perta_steps_read_data(job, err);
    if (!rc)
        rc = perta_steps_any(job, err);
    if (!rc)
        rc = perta_steps_survive_check(job, err);
    return rc ? rc : check(job, err);
}

static int begin_scales(struct perta_steps_job *job, struct perta_err *err)
{
    char *zero = perta_steps_scales(job, 0);
    int rc =
        zero ? perta_steps_zero(job, zero, err) : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    free(zero);
    if (!rc)
        rc = perta_publish_sync(&job->work, err);
    return rc ? rc
              : perta_steps_commit(
                    job, json_pack("{s:i, s:f, s:f}", "step", 0, "moved", 0.0, "mean_scale", 0.0),
                    err);
}

static int begin(struct perta_steps_job *job, struct perta_err *err)
{
    json_t *identity = identity_of(job);
    int rc = perta_journal_open(&job->journal, job->work_path, identity, job->run.resume,
                                job->steps->force, err);
    json_decref(identity);
    if (!rc)
        rc = perta_journal_folder(&job->journal, &job->work, job->work_path, NULL,
                                  job->steps->force, err);
    if (!rc)
        rc = perta_journal_replay(&job->journal, replay, job, err);
    return rc;
}

/* Everything is published; remove the work folder, and then the journal. */
static int clean(struct perta_steps_job *job, json_t *summary, struct perta_err *err)
{
    int rc = perta_journal_complete(&job->journal, NULL, 0, summary, err);
    if (rc)
        return rc;
    rc = perta_publish_discard(&job->work, err);
    return rc ? rc : perta_journal_publish(&job->journal, NULL, 0, summary, err);
}

static void abandon(struct perta_steps_job *job, int rc, struct perta_err *err)
{
    struct perta_publish *work = &job->work;
    /* Steps are expensive: once the first losses are measured, they are kept after any error. */
    job->journal.keep |= !isnan(job->points[0].loss[PERTA_RETAIN]);
    perta_journal_abandon(&job->journal, &work, 1, rc, err);
}

static int run_all(struct perta_steps_job *job, json_t **summary, struct perta_err *err)
{
    unsigned chosen = 0, last = 0;
    int rc = begin(job, err);
    if (!rc && perta_journal_is_publishing(&job->journal)) {
        *summary = perta_journal_summary(&job->journal);
        return clean(job, *summary, err);
    }
    job->run.resume = true;
    if (!rc && !job->points[0].reached)
        rc = begin_scales(job, err);
    if (!rc)
        rc = take_steps(job, &chosen, &last, err);
    if (!rc)
        rc = perta_steps_finish(job, chosen, last, summary, err);
    return rc ? rc : clean(job, *summary, err);
}

int perta_steps(const struct perta_steps *steps, const struct perta_run *run, json_t **summary,
                struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(steps, run, summary, err);
    if (!rc)
        rc = perta_steps_arguments(steps, err);
    if (rc)
        return rc;
    struct perta_steps_job job = {.steps = steps,
                                  .run = *run,
                                  .box = steps->box,
                                  .fall = -1,
                                  .journal = {.fd = -1},
                                  .patching = -1};
    job.run.before_bytes = perta_memory_trimmed();
    rc = prepare(&job, err);
    if (!rc && run->dry_run) {
        *summary = json_pack("{s:[]}", "path");
        rc = *summary ? 0 : perta_fail_sys(err, ENOMEM, "steps");
    } else if (!rc) {
        rc = run_all(&job, summary, err);
        if (rc)
            abandon(&job, rc, err);
    }
    if (rc) {
        json_decref(*summary);
        *summary = NULL;
    }
    perta_journal_close(&job.journal);
    perta_publish_release(&job.work);
    perta_weights_close(&job.weights);
    perta_adapter_close(job.adapter);
    perta_checkpoint_close(job.others[0]);
    perta_checkpoint_close(job.others[1]);
    json_decref(job.notes);
    for (unsigned k = 0; job.points && k <= steps->n_steps + 1; k++)
        json_decref(job.points[k].patch);
    free(job.points);
    free(job.work_path);
    return rc;
}
