#include "estimators/steps/steps_job.h"

#include <string.h>

#include "io/format/convert.h"
#include "io/fpenv.h"

/* ---- the rule ---- */

#define TILE 1024

/* Does -g * tau raise the loss? Compares signs, so that no product underflows. */
static bool raises(double g, double tau)
{
    return (g < 0 && tau > 0) || (g > 0 && tau < 0);
}

static float moved(const struct perta_step_rule *rule, double tau, double forget, double retain,
                   float s)
{
    if (raises(retain, tau))
        s -= (float)rule->back_off;
    else if (raises(forget, tau))
        s += (float)rule->step;
    float most = (float)rule->max_scale;
    return s < 0 ? 0 : s > most ? most : s;
}

/* Where there is no such input, to is zero. */
static void load(const struct perta_view *view, uint64_t first, size_t n, double *to)
{
    if (view->data)
        perta_steps_load(view, first, n, to);
    else
        memset(to, 0, n * sizeof *to);
}

uint64_t perta_step_update(const struct perta_step_rule *rule, const struct perta_step_in *in,
                           uint16_t *to, double *sum)
{
    PERTA_FP_SCOPE;
    double tuned[TILE], base[TILE], forget[TILE], retain[TILE], scale[TILE];
    uint64_t n_moved = 0;
    *sum = 0;
    for (uint64_t first = 0; first < in->n; first += TILE) {
        size_t n = in->n - first < TILE ? (size_t)(in->n - first) : TILE;
        perta_steps_load(&in->tuned, first, n, tuned);
        load(&in->base, first, n, base);
        load(&in->forget, first, n, forget);
        perta_steps_load(&in->retain, first, n, retain);
        perta_steps_load(&in->scale, first, n, scale);
        for (size_t i = 0; i < n; i++) {
            float s = moved(rule, tuned[i] - base[i], forget[i], retain[i], (float)scale[i]);
            to[first + i] = perta_bf16_from_f32(s);
            s = perta_f32_from_bf16(to[first + i]);
            n_moved += s != (float)scale[i];
            *sum += (double)s;
        }
    }
    return n_moved;
}

/* ---- a step over all parameters ---- */

enum { IN_TUNED, IN_BASE, IN_FORGET, IN_RETAIN, IN_SCALE, N_IN };

struct job {
    struct perta_step_rule rule;
    struct perta_importance_out out;
    struct perta_step_counts *counts;
};

/* A piece's output: this header, then the new scales. */
struct result {
    uint64_t n_moved;
    double sum;
    uint16_t to[];
};

static void work(void *ctx, const struct perta_steps_piece *piece)
{
    const struct job *job = ctx;
    struct result *result = piece->out;
    const struct perta_step_in in = {.tuned = piece->in[IN_TUNED],
                                     .base = piece->in[IN_BASE],
                                     .forget = piece->in[IN_FORGET],
                                     .retain = piece->in[IN_RETAIN],
                                     .scale = piece->in[IN_SCALE],
                                     .n = piece->n};
    result->n_moved = perta_step_update(&job->rule, &in, result->to, &result->sum);
}

static int commit(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct result *result = piece->out;
    job->counts->n += piece->n;
    job->counts->n_moved += result->n_moved;
    job->counts->sum += result->sum;
    return perta_importance_write(&job->out, piece->scale->name, piece->first, result->to, piece->n,
                                  err);
}

int perta_steps_update(const struct perta_step_rule *rule, const struct perta_step_folders *folders,
                       const struct perta_run *run, struct perta_step_counts *counts,
                       struct perta_err *err)
{
    struct job job = {.rule = *rule, .counts = counts};
    const struct perta_steps_input inputs[N_IN] = {
        [IN_TUNED] = {"--tuned", folders->box ? folders->box : folders->tuned},
        [IN_BASE] = {"--base", folders->base},
        [IN_FORGET] = {"forget gradients", folders->forget},
        [IN_RETAIN] = {"retain gradients", folders->retain},
        [IN_SCALE] = {"scales", folders->from},
    };
    struct perta_steps_pass pass = {.ctx = &job,
                                    .head_bytes = sizeof(struct result),
                                    .elem_bytes = sizeof(uint16_t),
                                    .model = folders->box ? NULL : folders->model,
                                    .work = work,
                                    .commit = commit};
    *counts = (struct perta_step_counts){0};
    int rc = perta_steps_pass_open(&pass, inputs, N_IN, N_IN, folders->tied, err);
    if (!rc)
        rc = perta_steps_out_begin(&job.out, pass.scales, PERTA_BF16, perta_steps_scale_metadata(),
                                   NULL, NULL, folders->to, err);
    rc = rc ? rc : perta_steps_pass_run(&pass, run, err);
    if (!rc)
        rc = perta_steps_out_finish(&job.out, err);
    perta_steps_out_release(&job.out);
    perta_steps_pass_close(&pass);
    return rc;
}
