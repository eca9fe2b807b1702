/* Routers of mixtures: choice, weights and gradients. tests/python/test_route.py compares them with
 * the routers of transformers, and ties with PyTorch's. */
#include "tests/unit.h"

#include <float.h>
#include <math.h>

#include "estimators/model/route.h"
#include "estimators/model/topk.h"

static struct perta_err err;

static float uniform(uint64_t *state) /* in [-1, 1) */
{
    return (float)((double)(int64_t)next_random(state) / 0x1p63);
}

/* ---- topk ---- */

START_TEST(the_largest_come_first)
{
    static float x[PERTA_TOPK_MAX];
    static uint32_t which[PERTA_TOPK_MAX];
    uint64_t state = 1;
    for (size_t n = 1; n <= PERTA_TOPK_MAX; n += n < 70 ? 1 : 53) {
        for (size_t i = 0; i < n; i++)
            x[i] = uniform(&state);
        for (size_t k = 0; k <= n; k += 1 + n / 20) {
            perta_topk(x, n, k, which);
            for (size_t i = 0; i < k; i++) {
                size_t n_larger = 0;
                for (size_t j = 0; j < n; j++)
                    n_larger += x[j] > x[which[i]];
                ck_assert_uint_eq(n_larger, i);
            }
        }
    }
}
END_TEST

/* torch.topk(torch.tensor(x), k)[1] of PyTorch 2.13, on a CPU. */
START_TEST(ties_are_broken_as_pytorch_breaks_them)
{
    static const float equal[8] = {0};
    static const float few[12] = {1, 2, 0, 2, 1, 2, 0, 1, 2, 0, 1, 2};
    static float long_row[130];
    uint32_t which[8];
    static const uint32_t of_equal[3] = {6, 5, 4}, of_few[6] = {1, 11, 8, 5, 3, 10},
                          of_long[2] = {9, 4};
    perta_topk(equal, 8, 3, which);
    ck_assert_mem_eq(which, of_equal, sizeof of_equal);
    perta_topk(few, 12, 6, which);
    ck_assert_mem_eq(which, of_few, sizeof of_few);
    for (size_t i = 0; i < 130; i++)
        long_row[i] = (float)(i % 5);
    perta_topk(long_row, 130, 2, which);
    ck_assert_mem_eq(which, of_long, sizeof of_long);
}
END_TEST

START_TEST(nan_is_the_largest)
{
    const float x[] = {1, INFINITY, NAN, 3, -INFINITY};
    uint32_t which[5];
    perta_topk(x, 5, 5, which);
    static const uint32_t expected[] = {2, 1, 3, 0, 4};
    ck_assert_mem_eq(which, expected, sizeof expected);
}
END_TEST

/* ---- routers ---- */

static const struct perta_router routers[] = {
    {.n_experts = 8, .k = 2, .scoring = PERTA_SCORE_SOFTMAX, .scale = 1},
    {.n_experts = 8, .k = 3, .scoring = PERTA_SCORE_SOFTMAX, .scale = 1, .renormalise = true},
    {.n_experts = 8,
     .k = 3,
     .scoring = PERTA_SCORE_SOFTMAX,
     .scale = 1,
     .renormalise = true,
     .norm_min = 0.9},
    {.n_experts = 12,
     .k = 4,
     .scoring = PERTA_SCORE_SIGMOID,
     .scale = 2.5,
     .renormalise = true,
     .norm_eps = 1e-20,
     .grouping = PERTA_GROUP_TOP2,
     .n_groups = 4,
     .k_groups = 2},
    {.n_experts = 12,
     .k = 3,
     .scoring = PERTA_SCORE_SOFTMAX,
     .scale = 16,
     .grouping = PERTA_GROUP_MAX,
     .masked = PERTA_MASKED_SCORE,
     .n_groups = 6,
     .k_groups = 1},
    {.n_experts = 9,
     .k = 3,
     .scoring = PERTA_SCORE_SQRT_SOFTPLUS,
     .scale = 1.5,
     .renormalise = true,
     .norm_eps = 1e-20},
    {.n_experts = 7, .k = 3, .scoring = PERTA_SCORE_CHOSEN_SOFTMAX, .scale = 1},
    {.n_experts = 7, .k = 1, .scoring = PERTA_SCORE_CHOSEN_SIGMOID, .scale = 1},
    {.n_experts = 8,
     .k = 3,
     .scoring = PERTA_SCORE_SIGMOID,
     .scale = 1,
     .grouping = PERTA_GROUP_MAX,
     .masked = PERTA_MASKED_SCORE,
     .n_groups = 4,
     .k_groups = 1},
    {.n_experts = 16, .k = 2, .scoring = PERTA_SCORE_SPARSEMIXER, .scale = 1, .jitter = 0.3},
};
#define N_ROUTERS (int)(sizeof routers / sizeof *routers)
enum { MOST = 16 };

/* Sum of weights times dweights, if the choice is still which; NaN otherwise. */
static double loss(const struct perta_router *r, const float *logits, const uint32_t *which,
                   const float *dweights)
{
    uint32_t now[MOST];
    float weights[MOST];
    double sum = 0;
    ck_assert_int_eq(perta_route_forward(r, logits, NULL, now, weights), 0);
    if (memcmp(now, which, r->k * sizeof *now) != 0)
        return NAN;
    for (size_t i = 0; i < r->k; i++)
        sum += (double)weights[i] * (double)dweights[i];
    return sum;
}

START_TEST(gradients_are_finite_differences)
{
    const struct perta_router *r = &routers[_i];
    const float h = 0x1p-9f;
    float logits[MOST], weights[MOST], dweights[MOST], d[MOST];
    uint32_t which[MOST];
    uint64_t state = (uint64_t)_i + 1;
    size_t n_compared = 0;
    ck_assert_ok(perta_router_check(r, &err));
    for (int round = 0; round < 50; round++) {
        for (size_t i = 0; i < r->n_experts; i++)
            logits[i] = 2 * uniform(&state);
        for (size_t i = 0; i < r->k; i++)
            dweights[i] = uniform(&state);
        ck_assert_int_eq(perta_route_forward(r, logits, NULL, which, weights), 0);
        double here = loss(r, logits, which, dweights);
        memset(d, 0xff, sizeof d);
        perta_route_backward(r, logits, which, weights, dweights, d);
        for (size_t i = 0; i < r->n_experts; i++) {
            float x = logits[i];
            logits[i] = x + h;
            double up = loss(r, logits, which, dweights), by = (double)logits[i];
            logits[i] = x - h;
            double down = loss(r, logits, which, dweights);
            by -= (double)logits[i];
            logits[i] = x;
            bool is_step = fabs(up + down - 2 * here) > 1e-4 * r->scale; /* SPARSEMIXER's mask */
            if (isnan(up) || isnan(down) || is_step)
                continue;
            n_compared++;
            ck_assert_double_eq_tol((up - down) / by, (double)d[i], 3e-4 * r->scale);
        }
    }
    ck_assert_uint_gt(n_compared, 25 * (size_t)r->n_experts);
}
END_TEST

START_TEST(a_bias_counts_only_for_the_choice)
{
    struct perta_router r = {.n_experts = 4, .k = 1, .scoring = PERTA_SCORE_SIGMOID, .scale = 1};
    const float logits[] = {2, 1, 0, -1}, bias[] = {0, 0, 0, 1};
    uint32_t which;
    float weight;
    ck_assert_int_eq(perta_route_forward(&r, logits, NULL, &which, &weight), 0);
    ck_assert_uint_eq(which, 0);
    ck_assert_int_eq(perta_route_forward(&r, logits, bias, &which, &weight), 0);
    ck_assert_uint_eq(which, 3);
    ck_assert_double_eq_tol((double)weight, 1 / (1 + exp(1)), 1e-7);
}
END_TEST

START_TEST(experts_of_other_groups_weigh_nothing_where_scores_are_masked)
{
    struct perta_router r = routers[4]; /* groups of 2, of which 1 is chosen, for 3 experts */
    const float logits[12] = {[7] = 3}, dweights[3] = {1, 1, 1};
    uint32_t which[3];
    float weights[3], d[12];
    ck_assert_int_eq(perta_route_forward(&r, logits, NULL, which, weights), 0);
    ck_assert_uint_eq(which[0], 7);
    ck_assert_uint_eq(which[1], 6);
    ck_assert(weights[1] > 0 && weights[2] == 0);
    perta_route_backward(&r, logits, which, weights, dweights, d);
    ck_assert(d[which[2]] == d[0] && d[0] < 0); /* only through the sum of the softmax */
}
END_TEST

START_TEST(numbers_that_are_not_finite_are_an_error)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const struct perta_router *r = &routers[_i];
    float logits[MOST] = {0}, bias[MOST] = {0}, weights[MOST];
    uint32_t which[MOST];
    bool has_bias = r->scoring != PERTA_SCORE_SPARSEMIXER;
    for (size_t i = 0; i < 3; i++) {
        logits[3] = bad[i];
        ck_assert_int_eq(perta_route_forward(r, logits, NULL, which, weights), PERTA_EINPUT);
        logits[3] = 0;
        bias[r->n_experts - 1] = bad[i];
        if (has_bias)
            ck_assert_int_eq(perta_route_forward(r, logits, bias, which, weights), PERTA_EINPUT);
    }
    ck_assert_int_eq(perta_route_forward(r, logits, NULL, which, weights), 0);
}
END_TEST

START_TEST(weights_that_sum_to_nothing_are_an_error)
{
    struct perta_router r = {
        .n_experts = 3, .k = 2, .scoring = PERTA_SCORE_SIGMOID, .renormalise = true, .scale = 1};
    const float logits[] = {-200, -200, -200};
    uint32_t which[2];
    float weights[2];
    ck_assert_int_eq(perta_route_forward(&r, logits, NULL, which, weights), PERTA_EINPUT);
    r.norm_eps = 1e-20;
    ck_assert_int_eq(perta_route_forward(&r, logits, NULL, which, weights), 0);
    ck_assert(weights[0] == 0 && weights[1] == 0);
}
END_TEST

static void refused(struct perta_router r, const char *why)
{
    err = (struct perta_err){0};
    ck_assert_int_eq(perta_router_check(&r, &err), PERTA_EINPUT);
    ck_assert_msg(strstr(err.msg, why), "%s", err.msg);
}

START_TEST(routers_that_make_no_sense_are_refused)
{
    struct perta_router r = routers[0], grouped = routers[3], sparse = routers[N_ROUTERS - 1];
    r.n_experts = 0;
    refused(r, "0 experts");
    r.n_experts = PERTA_TOPK_MAX + 1;
    refused(r, "1025 experts");
    r = routers[0], r.k = 0;
    refused(r, "num_experts_per_tok");
    r.k = 9;
    refused(r, "9 experts for each token");
    r = routers[0], r.scale = NAN;
    refused(r, "routed_scaling_factor");
    r = routers[0], r.norm_min = INFINITY;
    refused(r, "moe_norm_min");
    grouped.n_groups = 5;
    refused(grouped, "12 experts cannot be divided into 5 groups");
    grouped.n_groups = 0;
    refused(grouped, "0 groups");
    grouped.n_groups = 12;
    refused(grouped, "two experts or more");
    grouped.n_groups = 3, grouped.k_groups = 4;
    refused(grouped, "topk_group is 4, of 3");
    sparse.k = 3;
    refused(sparse, "two experts");
    sparse = routers[N_ROUTERS - 1], sparse.jitter = -1;
    refused(sparse, "router_jitter_noise");
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("route");
    tcase_add_test(tests, the_largest_come_first);
    tcase_add_test(tests, ties_are_broken_as_pytorch_breaks_them);
    tcase_add_test(tests, nan_is_the_largest);
    tcase_add_loop_test(tests, gradients_are_finite_differences, 0, N_ROUTERS);
    tcase_add_test(tests, a_bias_counts_only_for_the_choice);
    tcase_add_test(tests, experts_of_other_groups_weigh_nothing_where_scores_are_masked);
    tcase_add_loop_test(tests, numbers_that_are_not_finite_are_an_error, 0, N_ROUTERS);
    tcase_add_test(tests, weights_that_sum_to_nothing_are_an_error);
    tcase_add_test(tests, routers_that_make_no_sense_are_refused);
    return run_suite("route", tests);
}
