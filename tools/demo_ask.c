/* What the models of the demo know: asked, in a table, and what it comes to. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "estimators/model/train.h"
#include "tools/demo.h"

/* ---- ask ---- */

static size_t argmax(const float *x, size_t n)
{
    size_t most = 0;
    for (size_t i = 1; i < n; i++)
        most = x[i] > x[most] ? i : most;
    return most;
}

static double softmax_at(const float *x, size_t n, size_t at)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)x[i] - (double)x[at]);
    return 1 / sum;
}

/* An answer is right when greedy writing gives exactly it and then the end: both of a
 * sample's labels are then the likeliest after the right text before them. */
static int ask_part(struct perta_trainer *trainer, const struct perta_samples *samples,
                    double *right, double *probability, struct perta_err *err)
{
    size_t V = trainer->model->llm.vocab, n_labels;
    uint32_t which[DEMO_BATCH];
    int rc = 0;
    *right = *probability = 0;
    for (uint32_t at = 0; at < samples->n && !rc; at += DEMO_BATCH) {
        uint32_t n =
            (uint32_t)samples->n - at < DEMO_BATCH ? (uint32_t)samples->n - at : DEMO_BATCH;
        for (uint32_t i = 0; i < n; i++)
            which[i] = at + i;
        rc = perta_trainer_forward(trainer, samples, which, n, &n_labels, err);
        for (uint32_t i = 0; i < n && !rc; i++) {
            const float *answer = trainer->logits + 2 * (size_t)i * V, *end = answer + V;
            size_t target = (size_t)trainer->target[2 * (size_t)i];
            *right += argmax(answer, V) == target && argmax(end, V) == DEMO_END;
            *probability += softmax_at(answer, V, target);
        }
    }
    *right /= (double)samples->n;
    *probability /= (double)samples->n;
    return rc;
}

static int ask(const struct demo *demo, const char *path, struct demo_score *score,
               struct perta_err *err)
{
    struct perta_model model;
    int rc = path ? perta_model_load(path, &model, err) : demo_no_memory(err);
    if (rc)
        return rc;
    for (int i = 0; i < DEMO_N_ASKED && !rc; i++) {
        struct perta_trainer trainer;
        rc = perta_trainer_open(&trainer, &model, &demo->asked[i], DEMO_BATCH,
                                perta_run_threads(&demo->cli.run), err);
        if (!rc) {
            rc = ask_part(&trainer, &demo->asked[i], &score->right[i], &score->probability[i], err);
            perta_trainer_close(&trainer);
        }
    }
    perta_model_release(&model);
    return rc;
}

int demo_ask_full(struct demo *demo, struct perta_err *err)
{
    char *path = demo_path(demo, "full");
    int rc = ask(demo, path, &demo->full, err);
    free(path);
    return rc;
}

int demo_ask(struct demo *demo, int m, struct perta_err *err)
{
    const struct demo_method *method = &demo_methods[m];
    int rc = 0;
    for (int a = 0; a < method->n_points && !rc; a++) {
        char *path =
            demo_path(demo, "models/%s/%s-%s", method->name, method->axis, method->points[a]);
        rc = ask(demo, path, &demo->unlearned[m][a], err);
        free(path);
    }
    return rc;
}

/* ---- the table ---- */

static void say_row(const struct demo *demo, const char *name, const struct demo_score *s)
{
    cli_say(&demo->cli, "%-30s", name);
    for (int i = 0; i < DEMO_N_ASKED; i++)
        cli_say(&demo->cli, "  %6.1f%%  %6.3f ", 100 * s->right[i], s->probability[i]);
    cli_say(&demo->cli, "\n");
}

static json_t *score_json(const char *method, const char *axis, const char *point,
                          const struct demo_score *s)
{
    return json_pack("{s:s, s:s, s:[f,f,f], s:[f,f,f]}", "method", method, axis, point, "right",
                     s->right[0], s->right[1], s->right[2], "probability", s->probability[0],
                     s->probability[1], s->probability[2]);
}

static void say_head(const struct demo *demo)
{
    const struct cli *cli = &demo->cli;
    cli_say(cli, "\n%30s  facts to forget    facts to retain    held-out retain\n", "");
    cli_say(cli, "%-30s    right   prob.     right   prob.     right   prob.\n", "model");
}

static void say_rows(const struct demo *demo, int m)
{
    const struct demo_method *method = &demo_methods[m];
    for (int a = 0; a < method->n_points; a++) {
        char name[64];
        snprintf(name, sizeof name, "models/%s/%s-%s", method->name, method->axis,
                 method->points[a]);
        say_row(demo, name, &demo->unlearned[m][a]);
    }
}

/* What is left of the rest when no more than left of what is to be forgotten is right:
 * between the two models around it, by a straight line. False: it never comes to that. */
static bool when_left(const struct demo *demo, int m, double left, double *retain, double *held_out)
{
    const struct demo_score *before = &demo->full;
    for (int a = 0; a < demo_methods[m].n_points; a++) {
        const struct demo_score *after = &demo->unlearned[m][a];
        if (before->right[0] > left && after->right[0] <= left) {
            double t = (before->right[0] - left) / (before->right[0] - after->right[0]);
            *retain = before->right[1] + t * (after->right[1] - before->right[1]);
            *held_out = before->right[2] + t * (after->right[2] - before->right[2]);
            return true;
        }
        before = after;
    }
    return false;
}

static void say_when_left(const struct demo *demo, double left)
{
    const struct cli *cli = &demo->cli;
    cli_say(cli, "\nWhen the model has %.0f%% of the facts to forget left, it still answers:\n",
            100 * left);
    for (int m = 0; m < DEMO_N_METHODS; m++) {
        double retain, held_out;
        if (when_left(demo, m, left, &retain, &held_out))
            cli_say(cli, "  %-14s  %5.1f%% of those to retain, %5.1f%% of those held out\n",
                    demo_methods[m].name, 100 * retain, 100 * held_out);
        else
            cli_say(cli, "  %-14s  (it never came to that)\n", demo_methods[m].name);
    }
}

void demo_say_own(const struct demo *demo)
{
    static const char *const sets[DEMO_N_ASKED] = {
        "to forget", "to retain, which the steps were shown", "to retain, which they never saw"};
    const struct demo_method *own = &demo_methods[DEMO_OWN_GRADIENT];
    const struct demo_score *after = &demo->unlearned[DEMO_OWN_GRADIENT][own->n_points - 1];
    say_head(demo);
    say_row(demo, "full", &demo->full);
    say_rows(demo, DEMO_OWN_GRADIENT);
    cli_say(&demo->cli, "\nRight answers, before and after (the last of these models):\n");
    for (int i = 0; i < DEMO_N_ASKED; i++) {
        double n = (double)demo->asked[i].n;
        cli_say(&demo->cli, "  %4.0f -> %4.0f of %4.0f %s\n", n * demo->full.right[i],
                n * after->right[i], n, sets[i]);
    }
}

void demo_say_all(const struct demo *demo)
{
    say_head(demo);
    for (int m = DEMO_OWN_GRADIENT + 1; m < DEMO_N_METHODS; m++)
        say_rows(demo, m);
    say_when_left(demo, 0.5);
    say_when_left(demo, 0.1);
    cli_say(&demo->cli,
            "\nIn %s/: base, full, tuned (models; transformers loads them), data, importance,\n"
            "patches (perta verify, apply, revert), models (unlearned). It took %.0f s.\n",
            demo->dir, cli_seconds(&demo->cli));
}

json_t *demo_summary(const struct demo *demo)
{
    json_t *scores = json_array();
    perta_json_append(&scores, score_json("full", "alpha", "0", &demo->full));
    for (int m = 0; m < DEMO_N_METHODS; m++)
        for (int a = 0; a < demo_methods[m].n_points; a++)
            perta_json_append(&scores,
                              score_json(demo_methods[m].name, demo_methods[m].axis,
                                         demo_methods[m].points[a], &demo->unlearned[m][a]));
    return json_pack("{s:o, s:[s,s,s], s:o, s:f}", "folder", perta_text_json("%s", demo->dir),
                     "parts", "forget", "retain", "held-out", "scores", scores, "seconds",
                     cli_seconds(&demo->cli));
}
