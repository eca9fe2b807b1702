/* The demo's methods: their settings, and the models that they make. */
#include <stdlib.h>
#include <string.h>

#include "estimators/passes/estimate.h"
#include "tools/demo.h"
#include "tools/unlearn_steps.h"

#define HELD_STEPS 16

static const char *const alphas[DEMO_N_POINTS] = {"0.25", "0.5", "0.75", "1", "1.25", "1.5"};
static const char *const steps[DEMO_N_POINTS] = {"1", "2", "3", "4", "5", "6"};
static const char *const left[] = {"0.5", "0.1"};
const struct demo_method demo_methods[DEMO_N_METHODS] = {
    [DEMO_OWN_GRADIENT] = {"own-gradient", NULL, DEMO_HELD, 0, "left", left, 2},
    {"tv", NULL, DEMO_AT_ONCE, PERTA_TV, "alpha", alphas, DEMO_N_POINTS},
    {"grad", "mean", DEMO_AT_ONCE, PERTA_GRAD, "alpha", alphas, DEMO_N_POINTS},
    {"fisher", "meansq", DEMO_AT_ONCE, PERTA_FISHER, "alpha", alphas, DEMO_N_POINTS},
    {"signed-backoff", NULL, DEMO_IN_STEPS, 0, "step", steps, DEMO_N_POINTS},
    {"signed-hold", NULL, DEMO_HELD, 0, "left", left, 2},
};

/* Does it take the model alone, without a tuned model and its base? */
static bool is_own(const struct demo_method *method)
{
    return method == &demo_methods[DEMO_OWN_GRADIENT];
}

/* ---- estimate, unlearn ---- */

static struct perta_run quiet_run(const struct demo *demo)
{
    struct perta_run run = demo->cli.run;
    run.progress = NULL; /* every job is short */
    return run;
}

int demo_estimate(const struct demo *demo, const char *set, struct perta_err *err)
{
    char *model = demo_path(demo, "base"), *data = demo_path(demo, "data/%s.jsonl", set);
    char *out = demo_path(demo, "importance/%s", set);
    const struct perta_estimate job = {.model = model,
                                       .data = data,
                                       .out = out,
                                       .mean = true,
                                       .meansq = true,
                                       .force = demo->cli.force};
    const struct perta_run run = quiet_run(demo);
    json_t *summary = NULL;
    int rc = model && data && out ? perta_estimate(&job, &run, &summary, err) : demo_no_memory(err);
    if (!rc)
        cli_say(&demo->cli,
                "$ perta estimate --model base --data data/%s.jsonl --stat mean,meansq --out "
                "importance/%s\n",
                set, set);
    json_decref(summary);
    free(model);
    free(data);
    free(out);
    return rc;
}

/* The folders of perta unlearn; forget and retain are importances, or data files for steps. tuned
 * and base are NULL where the model alone is needed. */
struct sides {
    char *model, *tuned, *base, *patch, *out, *forget, *retain;
};

static void sides_release(struct sides *s)
{
    char *all[] = {s->model, s->tuned, s->base, s->patch, s->out, s->forget, s->retain};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static int sides_of(const struct demo *demo, const struct demo_method *method, struct sides *s,
                    struct perta_err *err)
{
    const char *from = method->way ? "data/%s.jsonl" : "importance/%s/%s";
    const char *stat = method->stat ? method->stat : "";
    *s = (struct sides){demo_path(demo, "full"),
                        is_own(method) ? NULL : demo_path(demo, "tuned"),
                        is_own(method) ? NULL : demo_path(demo, "base"),
                        demo_path(demo, "patches/%s", method->name),
                        demo_path(demo, "models/%s", method->name),
                        demo_path(demo, from, "forget", stat),
                        demo_path(demo, from, "retain", stat)};
    bool all = s->model && s->patch && s->out && s->forget && s->retain &&
               (is_own(method) || (s->tuned && s->base));
    return all ? 0 : demo_no_memory(err);
}

/* The settings that both kinds of methods share. */
static struct perta_unlearn edit_of(const struct demo *demo, const struct sides *s)
{
    return (struct perta_unlearn){.model = s->model,
                                  .tuned = s->tuned,
                                  .base = s->base,
                                  .patch = s->patch,
                                  .out = s->out,
                                  .force = demo->cli.force};
}

static int unlearn_at_once(const struct demo *demo, const struct demo_method *method,
                           const struct sides *s, struct perta_err *err)
{
    struct perta_unlearn job = edit_of(demo, s);
    const struct perta_run run = quiet_run(demo);
    json_t *summary = NULL;
    job.forget = method->stat ? s->forget : NULL;
    job.retain = method->stat ? s->retain : NULL;
    job.rule.method = method->method;
    job.n_alphas = DEMO_N_POINTS;
    for (int a = 0; a < DEMO_N_POINTS; a++)
        job.alphas[a] = (struct perta_alpha){strtof(alphas[a], NULL), alphas[a]};
    int rc = perta_unlearn(&job, &run, &summary, err);
    json_decref(summary);
    return rc;
}

static void steps_init(const struct demo *demo, const struct sides *s, struct unlearn_steps *own)
{
    const struct perta_unlearn edit = edit_of(demo, s);
    unlearn_steps_init(own);
    unlearn_steps_take(&own->steps, &edit);
    own->steps.data_forget = s->forget;
    own->steps.data_retain = s->retain;
}

static int run_steps(const struct demo *demo, const struct perta_steps *job, struct perta_err *err)
{
    const struct perta_run run = quiet_run(demo);
    json_t *summary = NULL;
    int rc = perta_steps(job, &run, &summary, err);
    json_decref(summary);
    return rc;
}

static int unlearn_in_steps(const struct demo *demo, const struct sides *s, struct perta_err *err)
{
    struct unlearn_steps own;
    steps_init(demo, s, &own);
    own.steps.several = true;
    own.steps.n_steps = DEMO_N_POINTS;
    memset(own.steps.listed + 1, true, DEMO_N_POINTS);
    return run_steps(demo, &own.steps, err);
}

static int unlearn_held(const struct demo *demo, const struct demo_method *method,
                        const struct sides *s, struct perta_err *err)
{
    int rc = 0;
    for (int a = 0; a < method->n_points && !rc; a++) {
        const char *name = method->points[a];
        char *patch = demo_path(demo, "patches/%s/%s-%s", method->name, method->axis, name);
        char *out = demo_path(demo, "models/%s/%s-%s", method->name, method->axis, name);
        struct unlearn_steps own;
        steps_init(demo, s, &own);
        own.steps.hold = true;
        own.steps.n_steps = HELD_STEPS;
        own.steps.stop_probability = strtod(name, NULL);
        own.steps.patch = patch;
        own.steps.out = out;
        rc = patch && out ? run_steps(demo, &own.steps, err) : demo_no_memory(err);
        free(patch);
        free(out);
    }
    return rc;
}

/* Print the command that made the points from first on. */
static void say_unlearn(const struct demo *demo, const struct demo_method *method, int first)
{
    const struct cli *cli = &demo->cli;
    const char *const axes[] = {"alpha", "steps", "stop-probability"};
    cli_say(cli, "$ perta unlearn --model full%s --method %s",
            is_own(method) ? "" : " --tuned tuned --base base",
            method->way == DEMO_HELD ? "signed-hold" : method->name);
    if (method->stat)
        cli_say(cli, " \\\n    --forget importance/forget/%s --retain importance/retain/%s",
                method->stat, method->stat);
    if (method->way)
        cli_say(cli, " \\\n    --data-forget data/forget.jsonl --data-retain data/retain.jsonl");
    cli_say(cli, " \\\n    ");
    if (method->way == DEMO_HELD)
        cli_say(cli, "--steps %d ", HELD_STEPS);
    cli_say(cli, "--%s %s", axes[method->way], method->points[first]);
    if (method->way == DEMO_HELD) {
        cli_say(cli, " --patch patches/%s/%s-%s --out models/%s/%s-%s\n", method->name,
                method->axis, method->points[first], method->name, method->axis,
                method->points[first]);
        return;
    }
    for (int a = first + 1; a < method->n_points; a++)
        cli_say(cli, ",%s", method->points[a]);
    cli_say(cli, " --patch patches/%s --out models/%s\n", method->name, method->name);
}

int demo_unlearn(const struct demo *demo, int m, struct perta_err *err)
{
    const struct demo_method *method = &demo_methods[m];
    struct sides sides;
    int rc = sides_of(demo, method, &sides, err);
    if (!rc)
        rc = method->way == DEMO_IN_STEPS ? unlearn_in_steps(demo, &sides, err)
             : method->way == DEMO_HELD   ? unlearn_held(demo, method, &sides, err)
                                          : unlearn_at_once(demo, method, &sides, err);
    for (int a = 0; a < (method->way == DEMO_HELD ? method->n_points : 1) && !rc; a++)
        say_unlearn(demo, method, a);
    sides_release(&sides);
    return rc;
}
