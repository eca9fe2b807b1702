#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "estimators/backprop/samples.h"
#include "estimators/eval.h"
#include "estimators/steps_job.h"
#include "io/hash.h"
#include "io/publish.h"
#include "stream/journal.h"
#include "stream/naming.h"

/* theta(s) at one step, and how it came there. */
struct point {
    double loss[2]; /* of forget and retain; NAN: not measured yet */
    double moved, mean_scale;
    uint64_t samples[2], tokens[2];
    bool reached; /* its scales are there */
};
enum { FORGET, RETAIN };
static const char *const names[] = {"forget", "retain"};

struct job {
    const struct perta_steps *steps;
    struct perta_run run; /* of what is run within: it always goes on */
    struct perta_weights weights;
    struct perta_journal journal;
    struct perta_publish work;           /* never published: what is kept between steps */
    char *home;                          /* the work folder's name */
    struct point *points;                /* (n_steps + 1) */
    char data_hmac[2][PERTA_SHA256_HEX]; /* "": no key */
    bool finishing;                      /* an earlier run was at the patch */
};

/* ---- names in the work folder ---- */

/* The caller's; NULL without memory. */
static char *name_of(const char *fmt, unsigned step, const char *which)
{
    char *name = NULL;
    return asprintf(&name, fmt, step, which) < 0 ? NULL : name;
}

static char *path_in_work(const struct job *job, const char *fmt, unsigned step,
                          const char *which)
{
    char *name = name_of(fmt, step, which);
    char *path = name ? perta_publish_path(&job->work, name) : NULL;
    free(name);
    return path;
}

#define SCALES "scales-%u%s"
#define GRADIENTS "gradients-%u-%s"
#define MEAN "gradients-%u-%s/mean"

static void forget_folder(const struct job *job, const char *fmt, unsigned step,
                          const char *which)
{
    struct perta_err ignored = {0};
    char *name = name_of(fmt, step, which);
    if (name)
        perta_publish_remove(&job->work, name, &ignored);
    free(name);
}

/* ---- what the run is ---- */

/* A file, for the run's identity; no digest of it, which could be guessed
 * (docs/provenance.md). */
static json_t *file_json(const char *path)
{
    struct stat st;
    return stat(path, &st) ? NULL : perta_journal_file((uint64_t)st.st_size, &st.st_mtim);
}

static json_t *limit(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

/* Every flag that decides where the way leads. */
static json_t *parameters(const struct job *job)
{
    const struct perta_steps *s = job->steps;
    bool bf16 = s->compute == PERTA_COMPUTE_BF16 ||
                (s->compute == PERTA_COMPUTE_AUTO && perta_gemm_has_bf16());
    return json_pack("{s:s, s:I, s:f, s:f, s:f, s:o, s:o, s:s}", "method",
                     s->rule.back_off > 0 ? "signed-backoff" : "signed", "steps",
                     (json_int_t)s->n_steps, "step", s->rule.step, "back_off",
                     s->rule.back_off, "max_scale", s->rule.max_scale, "stop_forget",
                     limit(s->stop_forget), "max_retain_rise", limit(s->max_retain_rise),
                     "compute", bf16 ? "bf16" : "f32");
}

static json_t *globs_json(const char *const *globs, unsigned n)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < n; i++)
        json_array_append_new(list, json_string(globs[i]));
    return list;
}

static int identity_of(const struct job *job, json_t **identity, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    struct perta_checkpoint *others[2] = {NULL, NULL};
    int rc = perta_checkpoint_open(s->tuned, &others[0], err);
    if (!rc)
        rc = perta_checkpoint_open(s->base, &others[1], err);
    if (!rc)
        *identity = json_pack(
            "{s:s, s:s, s:o, s:o, s:o, s:s?, s:b, s:I, s:[ss], s:o, s:o, s:o, s:o, s:o}",
            "tool", "perta " PERTA_VERSION, "verb", "unlearn --steps", "flags",
            parameters(job), "include", globs_json(s->globs.include, s->globs.n_include),
            "exclude", globs_json(s->globs.exclude, s->globs.n_exclude), "out", s->out,
            "one way", (int)s->one_way, "max tokens", (json_int_t)s->max_tokens,
            "data key gives", job->data_hmac[FORGET], job->data_hmac[RETAIN], "forget",
            file_json(s->data_forget), "retain", file_json(s->data_retain), "model",
            perta_journal_checkpoint(job->weights.ck), "tuned",
            perta_journal_checkpoint(others[0]), "base",
            perta_journal_checkpoint(others[1]));
    perta_checkpoint_close(others[0]);
    perta_checkpoint_close(others[1]);
    return rc;
}

/* ---- records ---- */

static int commit(struct job *job, json_t *record, struct perta_err *err)
{
    int rc = record ? perta_journal_commit(&job->journal, record, 0, err)
                    : perta_fail_sys(err, ENOMEM, "%s", job->home);
    json_decref(record);
    return rc;
}

static int replay(void *ctx, json_t *record, struct perta_err *err)
{
    struct job *job = ctx;
    const json_t *step = json_object_get(record, "step");
    json_int_t k = json_integer_value(step);
    if (json_object_get(record, "patch"))
        job->finishing = true;
    if (!step)
        return 0;
    if (k < 0 || k > (json_int_t)job->steps->n_steps)
        return perta_fail(err, PERTA_EINPUT, "%s: no such step; --force starts over",
                          job->journal.path);
    struct point *p = &job->points[k];
    for (int i = 0; i < 2; i++) {
        const json_t *loss = json_object_get(record, names[i]);
        if (loss) {
            p->loss[i] = json_real_value(loss);
            p->samples[i] =
                (uint64_t)json_integer_value(json_object_get(record, "samples"));
            p->tokens[i] = (uint64_t)json_integer_value(json_object_get(record, "tokens"));
        }
    }
    if (json_object_get(record, "moved")) {
        p->reached = true;
        p->moved = json_real_value(json_object_get(record, "moved"));
        p->mean_scale = json_real_value(json_object_get(record, "mean_scale"));
    }
    return 0;
}

/* ---- a point ---- */

/* Gradients and loss, or at the end of the way the loss alone. */
static int run_measure(struct job *job, unsigned k, int which, json_t **summary,
                       struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    const char *data = which == FORGET ? s->data_forget : s->data_retain;
    char *scales = path_in_work(job, SCALES, k, "");
    char *out = path_in_work(job, GRADIENTS, k, names[which]);
    const struct perta_scaled_paths at = {s->tuned, s->base, scales};
    const struct perta_estimate estimate = {.model = s->model,
                                            .at = &at,
                                            .data = data,
                                            .out = out,
                                            .mean = true,
                                            .max_tokens = s->max_tokens,
                                            .compute = s->compute,
                                            .force = true};
    const struct perta_eval eval = {.model = s->model,
                                    .at = &at,
                                    .data = data,
                                    .max_tokens = s->max_tokens,
                                    .compute = s->compute,
                                    .scratch = job->work.partial};
    int rc = !scales || !out  ? perta_fail_sys(err, ENOMEM, "%s", job->home)
             : k < s->n_steps ? perta_estimate(&estimate, &job->run, summary, err)
                              : perta_eval(&eval, &job->run, summary, err);
    free(scales);
    free(out);
    return rc;
}

static int measure(struct job *job, unsigned k, int which, struct perta_err *err)
{
    struct point *p = &job->points[k];
    json_t *summary = NULL;
    if (!isnan(p->loss[which]))
        return 0;
    int rc = run_measure(job, k, which, &summary, err);
    double loss = json_real_value(json_object_get(summary, "loss"));
    if (!rc && !isfinite(loss))
        rc = perta_fail(err, PERTA_EINPUT, "%s: the loss at step %u is not a finite number",
                        which == FORGET ? job->steps->data_forget : job->steps->data_retain,
                        k);
    p->samples[which] = (uint64_t)json_integer_value(json_object_get(summary, "samples"));
    p->tokens[which] = (uint64_t)json_integer_value(json_object_get(summary, "tokens"));
    json_decref(summary);
    if (!rc)
        rc = commit(job,
                    json_pack("{s:I, s:f, s:I, s:I}", "step", (json_int_t)k, names[which],
                              loss, "samples", (json_int_t)p->samples[which], "tokens",
                              (json_int_t)p->tokens[which]),
                    err);
    p->loss[which] = rc ? NAN : loss;
    return rc;
}

/* From the scales of step k to those of k + 1. */
static int move(struct job *job, unsigned k, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    struct point *p = &job->points[k + 1];
    struct perta_step_counts counts = {0};
    char *forget = path_in_work(job, MEAN, k, names[FORGET]);
    char *retain = path_in_work(job, MEAN, k, names[RETAIN]);
    char *from = path_in_work(job, SCALES, k, ""),
         *to = path_in_work(job, SCALES, k + 1, "");
    const struct perta_step_folders folders = {
        s->tuned, s->base, forget, retain, from, to, perta_is_tied(job->weights.ck)};
    int rc = forget && retain && from && to
                 ? perta_steps_update(&s->rule, &folders, &job->run, &counts, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->home);
    p->moved = counts.n ? (double)counts.n_moved / (double)counts.n : 0;
    p->mean_scale = counts.n ? counts.sum / (double)counts.n : 0;
    if (!rc)
        rc = commit(job,
                    json_pack("{s:I, s:f, s:f}", "step", (json_int_t)(k + 1), "moved",
                              p->moved, "mean_scale", p->mean_scale),
                    err);
    p->reached = !rc;
    free(forget);
    free(retain);
    free(from);
    free(to);
    return rc;
}

/* What no later step needs: one back is kept, for the bound on the retain loss. */
static void tidy(const struct job *job, unsigned k)
{
    for (int which = 0; which < 2; which++)
        forget_folder(job, GRADIENTS, k, names[which]);
    if (k)
        forget_folder(job, SCALES, k - 1, "");
}

/* ---- the way ---- */

/* Until a rule or the number of steps ends it; *chosen is the step that the patch leads to,
 * *last the last that was measured. */
static int walk(struct job *job, unsigned *chosen, unsigned *last, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    int rc = 0;
    for (unsigned k = 0; !rc; k++) {
        const struct point *p = &job->points[k];
        rc = measure(job, k, FORGET, err);
        if (!rc)
            rc = measure(job, k, RETAIN, err);
        *chosen = *last = k;
        if (!rc && k &&
            p->loss[RETAIN] - job->points[0].loss[RETAIN] > s->max_retain_rise) {
            *chosen = k - 1;
            break;
        }
        if (rc || k == s->n_steps || p->loss[FORGET] >= s->stop_forget)
            break;
        if (!job->points[k + 1].reached)
            rc = move(job, k, err);
        if (!rc)
            tidy(job, k);
    }
    return rc;
}

static json_t *path_json(const struct job *job, unsigned last)
{
    json_t *path = json_array();
    for (unsigned k = 0; k <= last; k++) {
        const struct point *p = &job->points[k];
        json_array_append_new(path, json_pack("{s:I, s:f, s:f, s:f, s:f}", "step",
                                              (json_int_t)k, "forget_loss", p->loss[FORGET],
                                              "retain_loss", p->loss[RETAIN], "moved",
                                              p->moved, "mean_scale", p->mean_scale));
    }
    return path;
}

/* ---- the patch, by the same edit as on the way ---- */

static struct perta_unlearn unlearn_from(const struct perta_steps *s, const char *scales)
{
    return (struct perta_unlearn){.model = s->model,
                                  .tuned = s->tuned,
                                  .base = s->base,
                                  .scale = scales,
                                  .rule = {.method = PERTA_SCALE},
                                  .alphas = {{1, "1"}},
                                  .n_alphas = 1,
                                  .patch = s->patch,
                                  .out = s->out,
                                  .globs = s->globs,
                                  .missing = PERTA_MISSING_KEEP,
                                  .one_way = s->one_way,
                                  .force = s->force};
}

static int write_patch(struct job *job, unsigned chosen, const json_t *recipe,
                       json_t **summary, struct perta_err *err)
{
    char *scales = path_in_work(job, SCALES, chosen, "");
    struct perta_unlearn unlearn = unlearn_from(job->steps, scales);
    struct perta_run run = job->run;
    run.resume = job->finishing; /* else what may be there is another's */
    unlearn.force |= job->finishing;
    unlearn.steps = recipe;
    int rc = scales ? commit(job, json_pack("{s:b}", "patch", 1), err)
                    : perta_fail_sys(err, ENOMEM, "%s", job->home);
    if (!rc)
        rc = perta_unlearn(&unlearn, &run, summary, err);
    free(scales);
    return rc;
}

/* As perta_recipe_json has it of importances. */
static void add_data(const struct job *job, int which, json_t *recipe)
{
    const struct point *p = &job->points[0];
    const struct {
        const char *what;
        json_t *is;
    } facts[] = {
        {"samples", json_sprintf("%llu", (unsigned long long)p->samples[which])},
        {"tokens", json_sprintf("%llu", (unsigned long long)p->tokens[which])},
        {"data_hmac_sha256",
         *job->data_hmac[which] ? json_string(job->data_hmac[which]) : NULL},
    };
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        char key[64];
        snprintf(key, sizeof key, "%s_%s", names[which], facts[i].what);
        if (facts[i].is)
            json_object_set_new(recipe, key, facts[i].is);
    }
}

static int finish(struct job *job, unsigned chosen, unsigned last, json_t **summary,
                  struct perta_err *err)
{
    json_t *recipe = parameters(job), *path = path_json(job, last);
    json_object_set(recipe, "path", path);
    json_object_set_new(recipe, "chosen", json_integer(chosen));
    for (int i = 0; i < 2; i++)
        add_data(job, i, recipe);
    int rc = write_patch(job, chosen, recipe, summary, err);
    if (!rc) {
        json_object_set(*summary, "path", path);
        json_object_set_new(*summary, "chosen", json_integer(chosen));
    }
    json_decref(path);
    json_decref(recipe);
    return rc;
}

/* ---- begin ---- */

static int check_outputs(const struct job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    const char *const inputs[] = {s->model,       s->tuned,       s->base,
                                  s->data_forget, s->data_retain, s->data_key};
    const char *outputs[2] = {s->patch, s->out};
    return perta_publish_check(outputs, s->out ? 2 : 1, inputs, 6, s->force, err);
}

static int check_data(const struct job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    const char *const data[] = {s->data_forget, s->data_retain};
    const struct perta_samples_wanted wanted = {.vocab = job->weights.llm.vocab,
                                                .max_tokens = s->max_tokens};
    int rc = 0;
    for (int i = 0; i < 2 && !rc; i++) {
        struct perta_samples samples;
        rc = perta_samples_read(data[i], &wanted, &samples, err);
        if (!rc)
            perta_samples_release(&samples);
    }
    return rc;
}

/* That the folders fit together: what plain task arithmetic asks of them. */
static int check_folders(const struct job *job, struct perta_err *err)
{
    struct perta_unlearn unlearn = unlearn_from(job->steps, NULL);
    struct perta_run dry = job->run;
    json_t *summary = NULL;
    dry.dry_run = true;
    unlearn.rule.method = PERTA_TV;
    int rc = perta_unlearn(&unlearn, &dry, &summary, err);
    json_decref(summary);
    return rc;
}

/* What a run goes on with was checked when it began, and may have its name by now. */
static int check(const struct job *job, struct perta_err *err)
{
    int rc = check_data(job, err);
    if (rc || (job->run.resume && perta_journal_found(job->home)))
        return rc;
    rc = check_outputs(job, err);
    return rc ? rc : check_folders(job, err);
}

static int prepare(struct job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    size_t len = strlen(s->patch);
    if (perta_checkpoint_is_adapter(s->tuned))
        return perta_fail(
            err, PERTA_EUSAGE,
            "%s: is a LoRA adapter; steps need the tuned model itself: merge the "
            "adapter into its base first",
            s->tuned);
    while (len > 1 && s->patch[len - 1] == '/')
        len--;
    job->points = calloc(s->n_steps + 1, sizeof *job->points);
    if (!job->points || asprintf(&job->home, "%.*s.steps", (int)len, s->patch) < 0)
        return perta_fail_sys(err, ENOMEM, "%s", s->patch);
    for (unsigned k = 0; k <= s->n_steps; k++)
        job->points[k].loss[FORGET] = job->points[k].loss[RETAIN] = NAN;
    int rc = perta_weights_open(&job->weights, s->model, err);
    if (!rc && s->data_key)
        rc = perta_hmac_file(s->data_forget, s->data_key, job->data_hmac[FORGET], err);
    if (!rc && s->data_key)
        rc = perta_hmac_file(s->data_retain, s->data_key, job->data_hmac[RETAIN], err);
    return rc ? rc : check(job, err);
}

static int begin_scales(struct job *job, struct perta_err *err)
{
    char *zero = path_in_work(job, SCALES, 0, "");
    int rc = zero ? perta_steps_zero(&job->weights, &job->steps->globs, zero, err)
                  : perta_fail_sys(err, ENOMEM, "%s", job->home);
    free(zero);
    if (!rc)
        rc = perta_publish_sync(&job->work, err);
    return rc ? rc
              : commit(job,
                       json_pack("{s:i, s:f, s:f}", "step", 0, "moved", 0.0, "mean_scale",
                                 0.0),
                       err);
}

static int begin(struct job *job, struct perta_err *err)
{
    json_t *identity = NULL;
    int rc = identity_of(job, &identity, err);
    if (!rc)
        rc = perta_journal_open(&job->journal, job->home, identity, job->run.resume,
                                job->steps->force, err);
    json_decref(identity);
    if (!rc)
        rc = perta_journal_folder(&job->journal, &job->work, job->home, job->steps->force,
                                  err);
    if (!rc)
        rc = perta_journal_replay(&job->journal, replay, job, err);
    return rc;
}

/* All is done: what was kept on the way goes, and then the journal. */
static int clean(struct job *job, json_t *summary, struct perta_err *err)
{
    int rc = perta_journal_complete(&job->journal, NULL, 0, summary, err);
    if (rc)
        return rc;
    job->work.keep = false;
    perta_publish_release(&job->work);
    return perta_journal_publish(&job->journal, NULL, 0, summary, err);
}

static void abandon(struct job *job, int rc, struct perta_err *err)
{
    struct perta_publish *work = &job->work;
    struct perta_err ignored = {0};
    bool said = strstr(err->msg, "--resume goes on"); /* by what was run within */
    /* Steps are dear: once there is one point, they are kept whatever goes wrong. */
    job->journal.going_on |= !isnan(job->points[0].loss[RETAIN]);
    perta_journal_abandon(&job->journal, &work, 1, rc, said ? &ignored : err);
}

static int run_all(struct job *job, json_t **summary, struct perta_err *err)
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
        rc = walk(job, &chosen, &last, err);
    if (!rc)
        rc = finish(job, chosen, last, summary, err);
    return rc ? rc : clean(job, *summary, err);
}

int perta_steps(const struct perta_steps *steps, const struct perta_run *run,
                json_t **summary, struct perta_err *err)
{
    struct job job = {.steps = steps, .run = *run, .journal = {.fd = -1}};
    *summary = NULL;
    int rc = prepare(&job, err);
    if (!rc && run->dry_run) {
        *summary = json_pack("{s:[]}", "path");
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
    free(job.points);
    free(job.home);
    return rc;
}
