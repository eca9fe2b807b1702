/* The box from the model's own gradient: tau = (c * rms(W)) * sign(g), where g is the gradient of
 * the forget probability at the model, for matrices. steps_size.c finds c. Spec: docs/steps.md */
#include "estimators/steps/steps_job.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/edit/box.h"

#define TILE 1024

/* ---- the formula ---- */

static double squares_of(const struct perta_view *view, uint64_t n)
{
    double x[TILE], sum = 0;
    for (uint64_t first = 0; first < n; first += TILE) {
        size_t len = n - first < TILE ? (size_t)(n - first) : TILE;
        perta_steps_load(view, first, len, x);
        for (size_t i = 0; i < len; i++)
            sum += x[i] * x[i];
    }
    return sum;
}

/* forget is the gradient of minus the probability. */
static void signs_of(const struct perta_view *forget, uint64_t n, int8_t *to)
{
    double g[TILE];
    for (uint64_t first = 0; first < n; first += TILE) {
        size_t len = n - first < TILE ? (size_t)(n - first) : TILE;
        perta_steps_load(forget, first, len, g);
        for (size_t i = 0; i < len; i++)
            to[first + i] = (int8_t)((g[i] < 0) - (g[i] > 0));
    }
}

/* The sum of |forget| where moving a parameter against the forget set does not raise the retain
 * loss: there the first step raises its scale. */
static double slope_of(const struct perta_view *forget, const struct perta_view *retain, uint64_t n)
{
    double f[TILE], r[TILE], sum = 0;
    for (uint64_t first = 0; first < n; first += TILE) {
        size_t len = n - first < TILE ? (size_t)(n - first) : TILE;
        perta_steps_load(forget, first, len, f);
        perta_steps_load(retain, first, len, r);
        for (size_t i = 0; i < len; i++)
            if (!((f[i] > 0 && r[i] > 0) || (f[i] < 0 && r[i] < 0)))
                sum += fabs(f[i]);
    }
    return sum;
}

/* ---- passes ---- */

enum { IN_MODEL, IN_FORGET, IN_RETAIN };

/* What a chunk adds to its tensor. Chunks come in order, so that sums do not depend on who computed
 * them. */
struct sums {
    double squares, slope;
};

struct job {
    struct sums sums; /* of the current tensor */
    double fall;      /* of all tensors so far */
    float *rms;       /* of all tensors, in the order of their names */
    struct perta_importance_out out;
};

static void add_up(void *ctx, const struct perta_steps_piece *piece)
{
    (void)ctx;
    *(struct sums *)piece->out =
        (struct sums){squares_of(&piece->in[IN_MODEL], piece->n),
                      slope_of(&piece->in[IN_FORGET], &piece->in[IN_RETAIN], piece->n)};
}

static int commit_sums(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct sums *sums = piece->out;
    const struct perta_tensor *tensor = piece->scale;
    if (!piece->first)
        job->sums = (struct sums){0};
    job->sums.squares += sums->squares;
    job->sums.slope += sums->slope;
    if (piece->first + piece->n < tensor->n_elems)
        return 0;
    float rms = (float)sqrt(job->sums.squares / (double)tensor->n_elems);
    if (!isfinite(rms))
        return perta_fail(err, PERTA_EINPUT,
                          "--model: tensor %s: its root mean square is not a finite number",
                          tensor->name);
    job->rms[piece->index] = rms;
    job->fall += (double)rms * job->sums.slope;
    return 0;
}

static void take_signs(void *ctx, const struct perta_steps_piece *piece)
{
    (void)ctx;
    signs_of(&piece->in[0], piece->n, piece->out);
}

static int commit_signs(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    return perta_importance_write(&job->out, piece->scale->name, piece->first, piece->out, piece->n,
                                  err);
}

static int measure(struct job *job, const struct perta_box_folders *f, const struct perta_run *run,
                   struct perta_err *err)
{
    const struct perta_steps_input inputs[] = {{"--model", f->model},
                                               {"forget gradients", f->forget},
                                               {"retain gradients", f->retain},
                                               {"scales", f->scales}};
    struct perta_steps_pass pass = {
        .ctx = job, .head_bytes = sizeof(struct sums), .work = add_up, .commit = commit_sums};
    int rc = perta_steps_pass_open(&pass, inputs, 4, 3, f->tied, err);
    if (!rc && !(job->rms = calloc(pass.scales->n_tensors + 1, sizeof *job->rms)))
        rc = perta_fail_sys(err, ENOMEM, "%s", f->to);
    if (!rc)
        rc = perta_steps_pass_run(&pass, run, err);
    perta_steps_pass_close(&pass);
    return rc;
}

static int write_signs(struct job *job, const struct perta_box_folders *f,
                       const struct perta_run *run, struct perta_err *err)
{
    const struct perta_steps_input inputs[] = {{"forget gradients", f->forget},
                                               {"scales", f->scales}};
    struct perta_steps_pass pass = {
        .ctx = job, .elem_bytes = 1, .work = take_signs, .commit = commit_signs};
    int rc = perta_steps_pass_open(&pass, inputs, 2, 1, f->tied, err);
    if (!rc)
        rc = perta_steps_out_begin(&job->out, pass.scales, PERTA_I8,
                                   perta_box_metadata(job->rms, pass.scales->n_tensors), NULL, NULL,
                                   f->to, err);
    if (!rc)
        rc = perta_steps_pass_run(&pass, run, err);
    if (!rc)
        rc = perta_steps_out_finish(&job->out, err);
    perta_steps_out_release(&job->out);
    perta_steps_pass_close(&pass);
    return rc;
}

int perta_steps_box(const struct perta_box_folders *folders, const struct perta_run *run,
                    double *fall, struct perta_err *err)
{
    struct job job = {0};
    int rc = measure(&job, folders, run, err);
    if (!rc)
        rc = write_signs(&job, folders, run, err);
    *fall = job.fall;
    free(job.rms);
    return rc;
}
