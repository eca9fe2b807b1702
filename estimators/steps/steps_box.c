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

static float rms_of(double squares, uint64_t n)
{
    return (float)sqrt(squares / (double)n);
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
    double c;
    struct sums sums; /* of the current tensor */
    double fall;      /* of the tensors before it */
    float *sizes;     /* of all tensors, in the order of their names */
    struct perta_importance_out out;
};

static void add_up(void *ctx, const struct perta_steps_piece *piece)
{
    (void)ctx;
    struct sums *sums = piece->out;
    *sums = (struct sums){.squares = squares_of(&piece->in[IN_MODEL], piece->n)};
    if (piece->in[IN_FORGET].data)
        sums->slope = slope_of(&piece->in[IN_FORGET], &piece->in[IN_RETAIN], piece->n);
}

/* Returns whether the tensor is complete. */
static bool take_sums(struct job *job, const struct perta_steps_piece *piece)
{
    const struct sums *sums = piece->out;
    if (!piece->first)
        job->sums = (struct sums){0};
    job->sums.squares += sums->squares;
    job->sums.slope += sums->slope;
    return piece->first + piece->n == piece->scale->n_elems;
}

static int commit_fall(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    (void)err;
    if (take_sums(job, piece))
        job->fall += (double)rms_of(job->sums.squares, piece->scale->n_elems) * job->sums.slope;
    return 0;
}

static int commit_size(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_tensor *tensor = piece->scale;
    if (!take_sums(job, piece))
        return 0;
    float size = (float)job->c * rms_of(job->sums.squares, tensor->n_elems);
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

int perta_steps_box_fall(const struct perta_box_folders *f, const struct perta_run *run,
                         double *fall, struct perta_err *err)
{
    struct job job = {0};
    const struct perta_steps_input inputs[] = {{"--model", f->model},
                                               {"forget gradients", f->forget},
                                               {"retain gradients", f->retain},
                                               {"scales", f->scales}};
    struct perta_steps_pass pass = {
        .ctx = &job, .head_bytes = sizeof(struct sums), .work = add_up, .commit = commit_fall};
    int rc = perta_steps_pass_open(&pass, inputs, 4, 3, f->tied, err);
    if (!rc)
        rc = perta_steps_pass_run(&pass, run, err);
    perta_steps_pass_close(&pass);
    *fall = job.fall;
    return rc;
}

static int measure_sizes(struct job *job, const struct perta_box_folders *f,
                         const struct perta_run *run, struct perta_err *err)
{
    const struct perta_steps_input inputs[] = {{"--model", f->model}, {"scales", f->scales}};
    struct perta_steps_pass pass = {
        .ctx = job, .head_bytes = sizeof(struct sums), .work = add_up, .commit = commit_size};
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
