/* Scores, choice and weights of one token, in the order of transformers' routers. */
#include "estimators/model/route.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "estimators/model/topk.h"

#define MAX_EXPERTS PERTA_TOPK_MAX

/* ---- what can be computed ---- */

static int check_groups(const struct perta_router *r, struct perta_err *err)
{
    if (r->n_groups == 0 || r->n_experts % r->n_groups)
        return perta_fail(err, PERTA_EINPUT,
                          "%u experts cannot be divided into %u groups (n_group)", r->n_experts,
                          r->n_groups);
    if (r->k_groups == 0 || r->k_groups > r->n_groups)
        return perta_fail(err, PERTA_EINPUT, "topk_group is %u, of %u groups", r->k_groups,
                          r->n_groups);
    if (r->grouping == PERTA_GROUP_TOP2 && r->n_experts / r->n_groups < 2)
        return perta_fail(err, PERTA_EINPUT,
                          "n_group is %u: groups need two experts or more, of %u in all",
                          r->n_groups, r->n_experts);
    return 0;
}

int perta_router_check(const struct perta_router *r, struct perta_err *err)
{
    if (r->n_experts == 0 || r->n_experts > MAX_EXPERTS)
        return perta_fail(err, PERTA_EINPUT, "%u experts: perta can route to 1 to %u", r->n_experts,
                          MAX_EXPERTS);
    if (r->k == 0 || r->k > r->n_experts)
        return perta_fail(err, PERTA_EINPUT,
                          "%u experts for each token (num_experts_per_tok), of %u", r->k,
                          r->n_experts);
    if (r->scoring == PERTA_SCORE_SPARSEMIXER && r->k != 2)
        return perta_fail(err, PERTA_EINPUT, "this router chooses two experts, not %u", r->k);
    if (r->scoring == PERTA_SCORE_SPARSEMIXER && !(isfinite(r->jitter) && r->jitter >= 0))
        return perta_fail(err, PERTA_EINPUT, "router_jitter_noise is %g", r->jitter);
    if (!isfinite(r->scale))
        return perta_fail(err, PERTA_EINPUT, "routed_scaling_factor is %g", r->scale);
    if (!isfinite(r->norm_min) || !isfinite(r->norm_eps))
        return perta_fail(err, PERTA_EINPUT, "moe_norm_min is %g", r->norm_min);
    return r->grouping ? check_groups(r, err) : 0;
}

/* ---- scores ---- */

/* e (n) = exp(x - the largest of x (n)), of which at least one is not minus infinity; returns their
 * sum. The difference and e are rounded to float32, as in PyTorch. */
static double exponentials(const float *x, size_t n, double *e)
{
    float most = -INFINITY;
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        most = fmaxf(most, x[i]);
    for (size_t i = 0; i < n; i++)
        sum += e[i] = (double)(float)exp((double)(x[i] - most));
    return sum;
}

static void softmax(const float *x, size_t n, double *p)
{
    double sum = exponentials(x, n, p);
    for (size_t i = 0; i < n; i++)
        p[i] /= sum;
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double softplus(double x)
{
    return x > 20 ? x : log1p(exp(x)); /* as in PyTorch */
}

/* Float32, with the intermediate results of PyTorch: above 17, sigmoids are all 1. */
static float sigmoid_float(float x)
{
    return 1 / (1 + (float)exp(-(double)x));
}

/* What experts are chosen by, before the bias (n_experts). */
static void score(const struct perta_router *r, const float *logits, float *scores)
{
    double e[MAX_EXPERTS];
    float by = 0; /* 1 / sum of e: PyTorch multiplies by it */
    if (r->scoring == PERTA_SCORE_SOFTMAX)
        by = 1 / (float)exponentials(logits, r->n_experts, e);
    for (size_t i = 0; i < r->n_experts; i++) {
        switch (r->scoring) {
        case PERTA_SCORE_SOFTMAX:
            scores[i] = (float)e[i] * by;
            break;
        case PERTA_SCORE_SIGMOID:
            scores[i] = sigmoid_float(logits[i]);
            break;
        case PERTA_SCORE_SQRT_SOFTPLUS:
            scores[i] = sqrtf((float)softplus((double)logits[i]));
            break;
        default: /* the logits themselves */
            scores[i] = logits[i];
        }
    }
}

/* ---- choice ---- */

static float group_score(const struct perta_router *r, const float *x, size_t n)
{
    uint32_t top[2];
    perta_topk(x, n, r->grouping == PERTA_GROUP_TOP2 ? 2 : 1, top);
    return r->grouping == PERTA_GROUP_TOP2 ? x[top[0]] + x[top[1]] : x[top[0]];
}

/* x (n_experts), by which experts are chosen, and scores, if they are masked, too. */
static void mask_groups(const struct perta_router *r, float *x, float *scores)
{
    float by[MAX_EXPERTS];
    uint32_t chosen[MAX_EXPERTS];
    bool is_chosen[MAX_EXPERTS] = {0};
    size_t n = r->n_experts / r->n_groups;
    for (size_t g = 0; g < r->n_groups; g++)
        by[g] = group_score(r, x + g * n, n);
    perta_topk(by, r->n_groups, r->k_groups, chosen);
    for (size_t i = 0; i < r->k_groups; i++)
        is_chosen[chosen[i]] = true;
    for (size_t i = 0; i < r->n_experts; i++) {
        if (is_chosen[i / n])
            continue;
        x[i] = r->masked == PERTA_MASKED_OUT ? -INFINITY : 0;
        if (r->masked == PERTA_MASKED_SCORE)
            scores[i] = 0;
    }
}

static int choose(const struct perta_router *r, float *scores, const float *bias, uint32_t *which)
{
    float by[MAX_EXPERTS];
    for (size_t i = 0; i < r->n_experts; i++) {
        by[i] = bias ? scores[i] + bias[i] : scores[i];
        if (!isfinite(by[i]))
            return PERTA_EINPUT;
    }
    if (r->grouping)
        mask_groups(r, by, scores);
    perta_topk(by, r->n_experts, r->k, which);
    return 0;
}

/* ---- SparseMixer ---- */

/* Without the expert other (n_experts: none): logits within the distance of the largest stay, all
 * others are minus infinity. Returns the expert of the largest, the first if there are several. */
static uint32_t sparse_mask(const struct perta_router *r, const float *logits, uint32_t other,
                            float *masked)
{
    uint32_t first = other == 0 ? 1 : 0;
    for (uint32_t i = 0; i < r->n_experts; i++)
        if (i != other && logits[i] > logits[first])
            first = i;
    float most = logits[first];
    for (uint32_t i = 0; i < r->n_experts; i++) {
        bool is_far = (most - logits[i]) / fmaxf(fabsf(logits[i]), most) > (float)(2 * r->jitter);
        masked[i] = i == other || is_far ? -INFINITY : logits[i];
    }
    return first;
}

static void sparsemixer(const struct perta_router *r, const float *logits, uint32_t *which,
                        float *weights)
{
    float masked[MAX_EXPERTS];
    double p[MAX_EXPERTS];
    for (size_t i = 0; i < 2; i++) {
        which[i] = sparse_mask(r, logits, i ? which[0] : r->n_experts, masked);
        softmax(masked, r->n_experts, p);
        weights[i] = (float)p[which[i]];
    }
}

static void sparsemixer_backward(const struct perta_router *r, const float *logits,
                                 const uint32_t *which, const float *dweights, double *d)
{
    float masked[MAX_EXPERTS];
    double p[MAX_EXPERTS];
    for (size_t i = 0; i < 2; i++) {
        sparse_mask(r, logits, i ? which[0] : r->n_experts, masked);
        softmax(masked, r->n_experts, p);
        double g = (double)dweights[i] * p[which[i]];
        for (size_t j = 0; j < r->n_experts; j++)
            d[j] -= g * p[j];
        d[which[i]] += g;
    }
}

/* ---- weights ---- */

/* s (k): what the chosen experts' weights are made of, before it is renormalised. */
static void chosen_scores(const struct perta_router *r, const float *logits, const float *scores,
                          const uint32_t *which, double *s)
{
    float chosen[MAX_EXPERTS] = {0}; /* compilers do not see that k is at least 1 */
    for (size_t i = 0; i < r->k; i++) {
        chosen[i] = logits[which[i]];
        s[i] = r->scoring == PERTA_SCORE_CHOSEN_SIGMOID ? sigmoid((double)chosen[i])
                                                        : (double)scores[which[i]];
    }
    if (r->scoring == PERTA_SCORE_CHOSEN_SOFTMAX)
        softmax(chosen, r->k, s);
}

/* By what s (k) is divided; *is_sum: whether that depends on s. */
static double divisor(const struct perta_router *r, const double *s, bool *is_sum)
{
    double sum = 0;
    for (size_t i = 0; i < r->k; i++)
        sum += s[i];
    *is_sum = r->renormalise && sum >= r->norm_min;
    return r->renormalise ? fmax(sum, r->norm_min) + r->norm_eps : 1;
}

static int weigh(const struct perta_router *r, const float *logits, const float *scores,
                 const uint32_t *which, float *weights)
{
    double s[MAX_EXPERTS];
    bool is_sum;
    chosen_scores(r, logits, scores, which, s);
    double by = divisor(r, s, &is_sum);
    for (size_t i = 0; i < r->k; i++) {
        weights[i] = (float)(s[i] / by * r->scale);
        if (!isfinite(weights[i]))
            return PERTA_EINPUT;
    }
    return 0;
}

int perta_route_forward(const struct perta_router *r, const float *logits, const float *bias,
                        uint32_t *which, float *weights)
{
    float scores[MAX_EXPERTS];
    assert(r->n_experts <= MAX_EXPERTS);
    for (size_t i = 0; i < r->n_experts; i++)
        if (!isfinite(logits[i]))
            return PERTA_EINPUT;
    if (r->scoring == PERTA_SCORE_SPARSEMIXER) {
        sparsemixer(r, logits, which, weights);
        return 0;
    }
    score(r, logits, scores);
    int rc = choose(r, scores, bias, which);
    return rc ? rc : weigh(r, logits, scores, which, weights);
}

/* ---- gradients ---- */

/* ds (k), the gradient of s (k). */
static void weights_backward(const struct perta_router *r, const double *s, const float *dweights,
                             double *ds)
{
    bool is_sum;
    double by = divisor(r, s, &is_sum), dot = 0;
    for (size_t i = 0; i < r->k; i++)
        dot += (double)dweights[i] * r->scale * s[i];
    for (size_t i = 0; i < r->k; i++)
        ds[i] = (double)dweights[i] * r->scale / by - (is_sum ? dot / (by * by) : 0);
}

/* d (n_experts) += what ds (k) gives through a softmax p over all experts, or over the chosen ones
 * alone, which p (k) then is. */
static void softmax_backward(const struct perta_router *r, const uint32_t *which, const double *s,
                             const double *ds, const double *all, double *d)
{
    double dot = 0;
    for (size_t i = 0; i < r->k; i++)
        dot += ds[i] * s[i];
    for (size_t i = 0; i < r->k; i++)
        d[which[i]] += s[i] * (ds[i] - (all ? 0 : dot));
    for (size_t j = 0; all && j < r->n_experts; j++)
        d[j] -= all[j] * dot;
}

static void scores_backward(const struct perta_router *r, const float *logits,
                            const uint32_t *which, const double *s, const double *ds, double *d)
{
    double all[MAX_EXPERTS];
    if (r->scoring == PERTA_SCORE_SOFTMAX) {
        softmax(logits, r->n_experts, all);
        softmax_backward(r, which, s, ds, all, d);
        return;
    }
    if (r->scoring == PERTA_SCORE_CHOSEN_SOFTMAX) {
        softmax_backward(r, which, s, ds, NULL, d);
        return;
    }
    for (size_t i = 0; i < r->k; i++) {
        double x = (double)logits[which[i]], y = sigmoid(x);
        bool is_root = r->scoring == PERTA_SCORE_SQRT_SOFTPLUS;
        d[which[i]] = ds[i] * (is_root ? y / (2 * sqrt(softplus(x))) : y * (1 - y));
    }
}

/* Its score was set to 0, or was 0 already: it has no gradient. */
static bool is_masked(const struct perta_router *r, float weight)
{
    return r->masked == PERTA_MASKED_SCORE && weight == 0;
}

static void chosen_backward(const struct perta_router *r, const float *logits,
                            const uint32_t *which, const float *weights, const float *dweights,
                            double *d)
{
    float scores[MAX_EXPERTS];
    double s[MAX_EXPERTS], ds[MAX_EXPERTS];
    score(r, logits, scores);
    for (size_t i = 0; i < r->k; i++)
        if (is_masked(r, weights[i]))
            scores[which[i]] = 0;
    chosen_scores(r, logits, scores, which, s);
    weights_backward(r, s, dweights, ds);
    for (size_t i = 0; i < r->k; i++)
        if (is_masked(r, weights[i]))
            ds[i] = 0;
    scores_backward(r, logits, which, s, ds, d);
}

void perta_route_backward(const struct perta_router *r, const float *logits, const uint32_t *which,
                          const float *weights, const float *dweights, float *dlogits)
{
    double d[MAX_EXPERTS];
    memset(d, 0, r->n_experts * sizeof *d);
    if (r->scoring == PERTA_SCORE_SPARSEMIXER)
        sparsemixer_backward(r, logits, which, dweights, d);
    else
        chosen_backward(r, logits, which, weights, dweights, d);
    for (size_t i = 0; i < r->n_experts; i++)
        dlogits[i] = (float)d[i];
}
