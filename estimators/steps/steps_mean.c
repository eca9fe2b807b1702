/* The mean of the scales of all points from the first on that forgot enough. Under conditions that are
 * drawn anew at every point, a single point may be within its limits by luck; the mean does not hang
 * on one draw. Spec: docs/steps.md */
#include <errno.h>
#include <stdlib.h>

#include "estimators/steps/steps_job.h"
#include "io/format/convert.h"

#define TILE 1024

enum { IN_SUM, IN_SCALE, N_IN };

struct job {
    uint64_t n; /* 0: write sums, float32; else the means of so many scales, bfloat16 */
    struct perta_importance_out out;
    struct perta_step_counts counts;
};

/* A piece's output: this header, then the elements. */
struct result {
    double sum; /* of the means */
    uint16_t to[];
};

static void load_sum(const struct perta_view *view, uint64_t first, size_t n, double *to)
{
    for (size_t i = 0; i < n && !view->data; i++)
        to[i] = 0;
    if (view->data)
        perta_steps_load(view, first, n, to);
}

static void add(void *ctx, const struct perta_steps_piece *piece)
{
    double sum[TILE], scale[TILE];
    float *to = piece->out;
    (void)ctx;
    for (uint64_t first = 0; first < piece->n; first += TILE) {
        size_t n = piece->n - first < TILE ? (size_t)(piece->n - first) : TILE;
        load_sum(&piece->in[IN_SUM], first, n, sum);
        perta_steps_load(&piece->in[IN_SCALE], first, n, scale);
        for (size_t i = 0; i < n; i++)
            to[first + i] = (float)sum[i] + (float)scale[i];
    }
}

static int commit_sum(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    return perta_importance_write(&job->out, piece->scale->name, piece->first, piece->out, piece->n,
                                  err);
}

static void divide(void *ctx, const struct perta_steps_piece *piece)
{
    const struct job *job = ctx;
    struct result *result = piece->out;
    double sum[TILE];
    result->sum = 0;
    for (uint64_t first = 0; first < piece->n; first += TILE) {
        size_t n = piece->n - first < TILE ? (size_t)(piece->n - first) : TILE;
        perta_steps_load(&piece->in[IN_SUM], first, n, sum);
        for (size_t i = 0; i < n; i++) {
            result->to[first + i] = perta_bf16_from_f32((float)sum[i] / (float)job->n);
            result->sum += (double)perta_f32_from_bf16(result->to[first + i]);
        }
    }
}

static int commit_mean(void *ctx, const struct perta_steps_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct result *result = piece->out;
    job->counts.n += piece->n;
    job->counts.sum += result->sum;
    return perta_importance_write(&job->out, piece->scale->name, piece->first, result->to, piece->n,
                                  err);
}

/* sum is NULL for the first one. */
static int run_pass(struct perta_steps_job *steps, struct job *job, const char *sum,
                    const char *scales, const char *to, struct perta_err *err)
{
    const struct perta_steps_input inputs[N_IN] = {[IN_SUM] = {"sums", sum},
                                                   [IN_SCALE] = {"scales", scales}};
    struct perta_steps_pass pass = {.ctx = job,
                                    .head_bytes = job->n ? sizeof(struct result) : 0,
                                    .elem_bytes = job->n ? sizeof(uint16_t) : sizeof(float),
                                    .work = job->n ? divide : add,
                                    .commit = job->n ? commit_mean : commit_sum};
    unsigned n_read = job->n ? IN_SUM + 1 : N_IN; /* means need no scales, but their layout */
    int rc =
        perta_steps_pass_open(&pass, inputs, N_IN, n_read, perta_is_tied(steps->weights.ck), err);
    if (!rc)
        rc = perta_steps_out_begin(&job->out, pass.scales, job->n ? PERTA_BF16 : PERTA_F32,
                                   perta_steps_scale_metadata(), NULL, NULL, to, err);
    if (!rc)
        rc = perta_steps_pass_run(&pass, &steps->run, err);
    if (!rc)
        rc = perta_steps_out_finish(&job->out, err);
    perta_steps_out_release(&job->out);
    perta_steps_pass_close(&pass);
    return rc;
}

int perta_steps_sum(struct perta_steps_job *job, unsigned k, struct perta_err *err)
{
    struct job sum = {0};
    unsigned first = perta_steps_first(job, k);
    if (!job->steps->hold || !job->steps->survive || job->points[k].summed || first > k)
        return 0;
    char *before = k > first ? perta_steps_path(job, PERTA_STEPS_SUM, k - 1, "") : NULL;
    char *scales = perta_steps_scales(job, k), *to = perta_steps_path(job, PERTA_STEPS_SUM, k, "");
    int rc = scales && to && (before || k == first)
                 ? run_pass(job, &sum, before, scales, to, err)
                 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    if (!rc)
        rc = perta_steps_commit(job, json_pack("{s:I, s:b}", "step", (json_int_t)k, "summed", 1),
                                err);
    job->points[k].summed = !rc;
    free(before);
    free(scales);
    free(to);
    return rc;
}

int perta_steps_mean(struct perta_steps_job *job, bool *made, struct perta_err *err)
{
    unsigned last = job->steps->n_steps, first = perta_steps_first(job, last);
    struct perta_steps_point *p = &job->points[last + 1];
    struct job mean = {.n = last + 1 - first};
    *made = job->points[last].summed && mean.n > 1;
    if (!*made || p->reached)
        return 0;
    char *sum = perta_steps_path(job, PERTA_STEPS_SUM, last, "");
    char *scales = perta_steps_scales(job, last), *to = perta_steps_scales(job, last + 1);
    int rc = sum && scales && to ? run_pass(job, &mean, sum, scales, to, err)
                                 : perta_fail_sys(err, ENOMEM, "%s", job->work_path);
    p->mean_scale = mean.counts.n ? mean.counts.sum / (double)mean.counts.n : 0;
    if (!rc)
        rc = perta_steps_commit(job,
                                json_pack("{s:I, s:f, s:f}", "step", (json_int_t)last + 1, "moved",
                                          0.0, "mean_scale", p->mean_scale),
                                err);
    p->reached = !rc;
    free(sum);
    free(scales);
    free(to);
    return rc;
}
