/* Writes the patches that steps lead to, with the same edit that formed the models on the path. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/steps/steps_job.h"
#include "io/publish/publish.h"
#include "io/text.h"

static json_t *path_json(const struct perta_steps_job *job, unsigned last)
{
    json_t *path = json_array();
    for (unsigned k = 0; k <= last; k++) {
        const struct perta_steps_point *p = &job->points[k];
        json_t *point = json_pack(
            "{s:I, s:f, s:f, s:f, s:f, s:f}", "step", (json_int_t)k, "forget_loss",
            p->loss[PERTA_FORGET], "forget_probability", p->probability[PERTA_FORGET],
            "retain_loss", p->loss[PERTA_RETAIN], "moved", p->moved, "mean_scale", p->mean_scale);
        if (job->batched)
            perta_json_set(&point, "retain_samples",
                           json_integer((json_int_t)p->samples[PERTA_RETAIN]));
        if (job->steps->survive)
            perta_json_set(&point, "survive", perta_steps_survive_point(job, k));
        if (!isnan(p->taught))
            perta_json_set(&point, "taught", json_real(p->taught));
        if (k > job->steps->n_steps)
            perta_json_set(&point, "mean_from",
                           json_integer(perta_steps_first(job, job->steps->n_steps)));
        perta_json_append(&path, point);
    }
    return path;
}

static struct perta_unlearn unlearn_from(const struct perta_steps *s)
{
    return (struct perta_unlearn){.model = s->model,
                                  .tuned = s->tuned,
                                  .base = s->base,
                                  .rule = {.method = PERTA_SCALE},
                                  .alphas = {{1, "1"}},
                                  .n_alphas = 1,
                                  .globs = s->globs,
                                  .missing = PERTA_MISSING_KEEP,
                                  .one_way = s->one_way,
                                  .force = s->force};
}

/* Under the same keys as perta_recipe_json() uses for importances. */
static void add_data(const struct perta_steps_job *job, int set, json_t **recipe)
{
    const struct perta_steps_point *p = &job->points[0];
    const struct {
        const char *what;
        json_t *is;
    } facts[] = {
        {"samples", json_sprintf("%llu", (unsigned long long)p->samples[set])},
        {"tokens", json_sprintf("%llu", (unsigned long long)p->tokens[set])},
        {"data_hmac_sha256", json_string(job->data[set].hmac)},
    };
    size_t n = sizeof facts / sizeof *facts;
    for (size_t i = 0; i < n; i++) {
        char key[64];
        snprintf(key, sizeof key, "%s_%s", perta_sets[set], facts[i].what);
        if (i < n - 1 || *job->data[set].hmac)
            perta_json_set(recipe, key, facts[i].is);
        else
            json_decref(facts[i].is);
    }
}

/* The recipe of the patch of step k, on a path of n_steps that is measured up to last. */
static json_t *recipe_of(const struct perta_steps_job *job, unsigned n_steps, unsigned k,
                         unsigned last)
{
    json_t *recipe = perta_steps_parameters(job, n_steps);
    perta_json_set(&recipe, "path", path_json(job, last));
    perta_json_set(&recipe, "chosen", json_integer(k));
    if (job->steps->survive)
        perta_json_set(&recipe, "conditions", perta_steps_survive_end(job, k));
    for (int i = 0; i < 2; i++)
        add_data(job, i, &recipe);
    return recipe;
}

/* dir, or dir/step-k if there are several. The caller frees it. NULL if dir is NULL or when out of
 * memory. */
static char *output_of(const struct perta_steps *s, const char *dir, unsigned k)
{
    char name[32];
    snprintf(name, sizeof name, "step-%u", k);
    return !dir ? NULL : s->several ? perta_path_join(dir, name) : strdup(dir);
}

/* Run unlearn with the output names of step k. */
static int run_unlearn(const struct perta_steps_job *job, unsigned k, struct perta_unlearn *unlearn,
                       const struct perta_run *run, json_t **summary, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    char *patch = output_of(s, s->patch, k), *out = output_of(s, s->out, k);
    unlearn->patch = patch;
    unlearn->out = out;
    int rc = patch && (out || !s->out) ? perta_unlearn(unlearn, run, summary, err)
                                       : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    free(patch);
    free(out);
    return rc;
}

static int write_patch(const struct perta_steps_job *job, unsigned k, const json_t *recipe,
                       json_t **summary, struct perta_err *err)
{
    char *scales = perta_steps_scales(job, k), *box = perta_steps_box_folder(job);
    struct perta_unlearn unlearn = unlearn_from(job->steps);
    struct perta_run run = job->run;
    unlearn.scale = scales;
    unlearn.box = perta_steps_is_own(job->steps) ? box : NULL;
    unlearn.box_size = job->box;
    run.resume = job->patching == (int)k; /* otherwise a leftover there is from another run */
    unlearn.force |= run.resume;
    unlearn.steps = recipe;
    int rc = scales && box ? run_unlearn(job, k, &unlearn, &run, summary, err)
                           : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    free(scales);
    free(box);
    return rc;
}

int perta_steps_patch(struct perta_steps_job *job, unsigned n_steps, unsigned k, unsigned last,
                      struct perta_err *err)
{
    json_t **summary = &job->points[k].patch;
    if (*summary)
        return 0;
    int rc =
        perta_steps_commit(job, json_pack("{s:I, s:b}", "step", (json_int_t)k, "patch", 1), err);
    json_t *recipe = recipe_of(job, n_steps, k, last);
    if (!rc && !recipe)
        rc = perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    if (!rc)
        rc = write_patch(job, k, recipe, summary, err);
    json_decref(recipe);
    if (!rc && json_object_set_new(json_array_get(json_object_get(*summary, "results"), 0), "step",
                                   json_integer(k)))
        rc = perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    return rc ? rc
              : perta_steps_commit(
                    job, json_pack("{s:I, s:O}", "step", (json_int_t)k, "patch", *summary), err);
}

int perta_steps_finish(struct perta_steps_job *job, unsigned chosen, unsigned last,
                       json_t **summary, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    bool own = !s->survive && s->listed[chosen]; /* a path of its own ends there */
    int rc = own ? perta_steps_patch(job, chosen, chosen, chosen, err)
                 : perta_steps_patch(job, s->n_steps, chosen, last, err);
    if (!rc)
        rc = perta_steps_survive_note(job, chosen, err);
    if (rc)
        return rc;
    json_t *results = json_array();
    for (unsigned k = 0; k <= chosen; k++)
        if (job->points[k].patch)
            perta_json_extend(&results, json_object_get(job->points[k].patch, "results"));
    *summary = json_incref(job->points[chosen].patch);
    perta_json_set(summary, "results", results);
    perta_json_set(summary, "path", path_json(job, last));
    perta_json_set(summary, "chosen", json_integer(chosen));
    if (job->box > 0)
        perta_json_set(summary, "box", json_real(job->box));
    if (isfinite(s->stop_forget) || isfinite(s->stop_probability))
        perta_json_set(summary, "reached", json_boolean(perta_steps_forgets_enough(job, chosen)));
    if (s->survive)
        perta_json_set(summary, "conditions", perta_steps_survive_end(job, chosen));
    json_t *notes = json_incref(json_object_get(*summary, "notes"));
    perta_json_extend(&notes, job->notes);
    perta_json_set(summary, "notes", notes);
    return *summary ? 0 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
}

/* ---- before the first step ---- */

/* Check the outputs of every step that the path may end at. */
static int check_outputs(const struct perta_steps_job *job, struct perta_err *err)
{
    const struct perta_steps *s = job->steps;
    const char *const inputs[] = {s->model,       s->tuned,       s->base,
                                  s->data_forget, s->data_retain, s->data_key};
    bool rules =
        isfinite(s->stop_forget) || isfinite(s->stop_probability) || isfinite(s->max_retain_rise);
    int rc = 0;
    for (unsigned k = 0; k <= s->n_steps && !rc; k++) {
        if (k < s->n_steps && !s->listed[k] && !(s->several && rules))
            continue;
        char *outputs[2] = {output_of(s, s->patch, k), output_of(s, s->out, k)};
        rc = outputs[0] && (outputs[1] || !s->out)
                 ? perta_publish_check((const char *const *)outputs, s->out ? 2 : 1, inputs, 6,
                                       s->force, err)
                 : perta_fail_sys(err, ENOMEM, "%s", s->patch);
        free(outputs[0]);
        free(outputs[1]);
    }
    return rc;
}

/* Check that the folders match: the same checks as for plain task arithmetic. With a box there is
 * only the model, which then is in the place of the others too. */
static int check_folders(const struct perta_steps_job *job, struct perta_err *err)
{
    struct perta_unlearn unlearn = unlearn_from(job->steps);
    struct perta_run dry = job->run;
    json_t *summary = NULL;
    dry.dry_run = true;
    unlearn.rule.method = PERTA_TV;
    if (perta_steps_is_own(job->steps))
        unlearn.tuned = unlearn.base = job->steps->model;
    int rc = run_unlearn(job, job->steps->n_steps, &unlearn, &dry, &summary, err);
    json_decref(summary);
    return rc;
}

int perta_steps_patch_check(const struct perta_steps_job *job, struct perta_err *err)
{
    int rc = check_outputs(job, err);
    return rc ? rc : check_folders(job, err);
}
