/* The box from the model's own gradient: tau = (c * rms(W)) * sign(g), where g is the gradient of
 * the forget probability at the model, for matrices. Spec: docs/steps.md */
#include "estimators/steps/steps_job.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static float size_of(double c, double squares, uint64_t n)
{
    float rms = (float)sqrt(squares / (double)n);
    return (float)c * rms;
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

/* ---- the passes ---- */

struct job {
    double c;
    double sum;   /* of the current tensor's squares */
    float *sizes; /* of all tensors, in the order of their names */
    struct perta_importance_out out;
};

static void add_squares(void *ctx, const struct perta_steps_piece *piece)
{
    (void)ctx;
    *(double *)piece->out = squares_of(&piece->in[0], piece->n);
}

/* Chunks come in order, so that the sum does not depend on who computed them. */
static int commit_squares(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_tensor *tensor = piece->scale;
    job->sum = (piece->first ? job->sum : 0) + *(const double *)piece->out;
    if (piece->first + piece->n < tensor->n_elems)
        return 0;
    float size = size_of(job->c, job->sum, tensor->n_elems);
    if (!isfinite(size))
        return perta_fail(err, PERTA_EINPUT,
                          "--model: tensor %s: its root mean square, times --box %g, is not a "
                          "finite number",
                          tensor->name, job->c);
    job->sizes[piece->index] = size;
    return 0;
}

static void take_signs(void *ctx, const struct perta_steps_piece *piece)
{
    const struct job *job = ctx;
    if (job->sizes[piece->index] > 0)
        signs_of(&piece->in[0], piece->n, piece->out);
    else
        memset(piece->out, 0, piece->n); /* tau is zero */
}

static int commit_signs(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    return perta_importance_write(&job->out, piece->scale->name, piece->first, piece->out, piece->n,
                                  err);
}

static int measure_sizes(struct job *job, const struct perta_box_folders *f,
                         const struct perta_run *run, struct perta_err *err)
{
    const struct perta_steps_input inputs[] = {{"--model", f->model}, {"scales", f->scales}};
    struct perta_steps_pass pass = {
        .ctx = job, .head_bytes = sizeof(double), .work = add_squares, .commit = commit_squares};
    int rc = perta_steps_pass_open(&pass, inputs, 2, 1, f->tied, err);
    if (!rc && !(job->sizes = calloc(pass.scales->n_tensors + 1, sizeof *job->sizes)))
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
                                   perta_box_metadata(job->sizes, pass.scales->n_tensors), NULL,
                                   NULL, f->to, err);
    if (!rc)
        rc = perta_steps_pass_run(&pass, run, err);
    if (!rc)
        rc = perta_steps_out_finish(&job->out, err);
    perta_steps_out_release(&job->out);
    perta_steps_pass_close(&pass);
    return rc;
}

int perta_steps_box(double c, const struct perta_box_folders *folders, const struct perta_run *run,
                    struct perta_err *err)
{
    struct job job = {.c = c};
    int rc = measure_sizes(&job, folders, run, err);
    if (!rc)
        rc = write_signs(&job, folders, run, err);
    free(job.sizes);
    return rc;
}
