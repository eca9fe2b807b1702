/* What perta_topk and perta_route_* give, for tests/python/test_route.py: reads jobs from standard
 * input until its end, in the CPU's own byte order, and writes the results to standard output.
 *
 * A job is a struct job, then bias (n; only with has_bias), then for each row logits (n) and, for a
 * router, the gradient that each expert's weight has if it is chosen (n). A row of a router gives
 * the return value (int32), which (k), weights (k) and dlogits (n); of topk, which (k). */
#include <stdio.h>
#include <stdlib.h>

#include "estimators/model/route.h"
#include "estimators/model/topk.h"

struct job {
    uint32_t is_router, rows, n, k;
    uint32_t scoring, grouping, masked, n_groups, k_groups, renormalise, has_bias, unused;
    double norm_eps, norm_min, scale, jitter;
};

static float bias[PERTA_TOPK_MAX], logits[PERTA_TOPK_MAX], dlogits[PERTA_TOPK_MAX];
static float weights[PERTA_TOPK_MAX], gradients[PERTA_TOPK_MAX], dweights[PERTA_TOPK_MAX];
static uint32_t which[PERTA_TOPK_MAX];

static void fail(const char *why)
{
    fprintf(stderr, "route_of: %s\n", why);
    exit(1);
}

static void get(void *to, size_t size, size_t n)
{
    if (fread(to, size, n, stdin) != n)
        fail("a job is too short");
}

static void put(const void *from, size_t size, size_t n)
{
    if (fwrite(from, size, n, stdout) != n)
        fail("cannot write");
}

static void row_of_router(const struct perta_router *r, bool has_bias)
{
    get(logits, sizeof *logits, r->n_experts);
    get(gradients, sizeof *gradients, r->n_experts);
    int32_t rc = perta_route_forward(r, logits, has_bias ? bias : NULL, which, weights);
    for (size_t i = 0; !rc && i < r->k; i++)
        dweights[i] = gradients[which[i]];
    if (!rc)
        perta_route_backward(r, logits, which, weights, dweights, dlogits);
    put(&rc, sizeof rc, 1);
    put(which, sizeof *which, r->k);
    put(weights, sizeof *weights, r->k);
    put(dlogits, sizeof *dlogits, r->n_experts);
}

static void row_of_topk(const struct job *job)
{
    get(logits, sizeof *logits, job->n);
    perta_topk(logits, job->n, job->k, which);
    put(which, sizeof *which, job->k);
}

static void run(const struct job *job)
{
    struct perta_err err = {0};
    struct perta_router r = {
        .n_experts = job->n,
        .k = job->k,
        .scoring = job->scoring,
        .grouping = job->grouping,
        .masked = job->masked,
        .n_groups = job->n_groups,
        .k_groups = job->k_groups,
        .renormalise = job->renormalise,
        .norm_eps = job->norm_eps,
        .norm_min = job->norm_min,
        .scale = job->scale,
        .jitter = job->jitter,
    };
    if (job->is_router && perta_router_check(&r, &err))
        fail(err.msg);
    if (job->has_bias)
        get(bias, sizeof *bias, job->n);
    for (uint32_t row = 0; row < job->rows; row++) {
        if (job->is_router)
            row_of_router(&r, job->has_bias);
        else
            row_of_topk(job);
    }
}

int main(void)
{
    struct job job;
    while (fread(&job, sizeof job, 1, stdin) == 1) {
        if (job.n > PERTA_TOPK_MAX || job.k > job.n)
            fail("a job is too large");
        run(&job);
    }
    return ferror(stdin) || fflush(stdout) ? 1 : 0;
}
