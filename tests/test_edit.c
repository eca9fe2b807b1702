/* The edit kernels against the scalar reference, bit for bit, for every instruction set. */
#include "tests/unit.h"

#include <math.h>

#include "estimators/edit.h"
#include "estimators/running.h"

#define N 2077 /* two whole tiles and a part */

static const enum perta_dtype dtypes[] = {PERTA_BF16, PERTA_F16, PERTA_F32, PERTA_F64};

static void put(void *to, enum perta_dtype dtype, size_t i, double x)
{
    float f = (float)x;
    uint32_t u;
    uint16_t h;
    memcpy(&u, &f, 4);
    switch (dtype) {
    case PERTA_BF16:
        h = (uint16_t)(u >> 16);
        memcpy((char *)to + 2 * i, &h, 2);
        break;
    case PERTA_F16: /* normal numbers below 2 alone */
        h = (uint16_t)(((u >> 16) & 0x8000) | (fabs(x) < 1e-4 ? 0 : ((u >> 13) & 0x3fff) | 0));
        memcpy((char *)to + 2 * i, &h, 2);
        break;
    case PERTA_F32:
        memcpy((char *)to + 4 * i, &f, 4);
        break;
    default:
        memcpy((char *)to + 8 * i, &x, 8);
    }
}

/* Values of a model's or a gradient's size; with specials also zeros, subnormals, NaN, Inf. */
static void fill(void *to, enum perta_dtype dtype, double scale, bool positive, bool specials,
                 uint64_t seed)
{
    static const double special[] = {0, -0.0, 1e-40, -1e-42, INFINITY, NAN, 3e38, -1};
    for (size_t i = 0; i < N; i++) {
        uint64_t r = next_random(&seed);
        double x = ((double)(r >> 11) * 0x1p-53 - 0.5) * scale;
        x = positive ? fabs(x) : x;
        if (specials && r % 41 < 8)
            x = special[r % 41];
        else if (r % 41 == 9)
            x = 0;
        put(to, dtype, i, x);
    }
}

static char inputs[5][N * 8], outs[2][3][N * 8];
static const float alphas[3] = {1.0f, 0.3f, -2.0f};

static void compare(const struct perta_rule *rule, const enum perta_dtype dtype[5], bool specials)
{
    struct perta_view views[5];
    for (int i = 0; i < 5; i++) {
        bool positive = i >= 3 && rule->stat == PERTA_STAT_MEANSQ;
        fill(inputs[i], dtype[i], i < 3 ? 0.1 : 1e-5, positive, specials, (uint64_t)(i + 7));
        views[i] = (struct perta_view){dtype[i], inputs[i]};
    }
    const struct perta_edit_in in = {views[0], views[1], views[2], views[3],
                                     views[4], N,        12345,    0xabcdef};
    void *const to[2][3] = {{outs[0][0], outs[0][1], outs[0][2]},
                            {outs[1][0], outs[1][1], outs[1][2]}};
    struct perta_edit_counts want[3], have[3];
    perta_edit_reference(rule, &in, alphas, 3, to[0], want);
    for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
        perta_edit_isa((enum perta_isa)isa, rule, &in, alphas, 3, to[1], have);
        for (int a = 0; a < 3; a++) {
            ck_assert_uint_eq(have[a].n_changed, want[a].n_changed);
            ck_assert_uint_eq(have[a].n_rounded_away, want[a].n_rounded_away);
            ck_assert_uint_eq(have[a].n_nonfinite, want[a].n_nonfinite);
            ck_assert_mem_eq(&have[a].sum_weight, &want[a].sum_weight, sizeof(double));
            if (want[a].n_nonfinite) {
                ck_assert_uint_eq(have[a].bad_elem, want[a].bad_elem);
                ck_assert_int_eq(have[a].bad_operand, want[a].bad_operand);
            }
            ck_assert_mem_eq(outs[1][a], outs[0][a], N * perta_dtype_unit_bytes(dtype[0]));
        }
    }
}

static void compare_all_dtypes(struct perta_rule rule)
{
    rule.keep_nonfinite = true;
    for (int model = 0; model < 4; model++)
        for (int shift = 0; shift < 4; shift++) {
            enum perta_dtype dtype[5];
            for (int i = 0; i < 5; i++)
                dtype[i] = dtypes[(model + i * shift) % 4];
            compare(&rule, dtype, false);
            compare(&rule, dtype, true);
        }
}

START_TEST(every_method_and_dtype_equals_the_reference)
{
    for (int stat = 0; stat < 2; stat++) {
        enum perta_stat s = (enum perta_stat)stat;
        compare_all_dtypes((struct perta_rule){.method = PERTA_GRAD, .stat = s});
        compare_all_dtypes((struct perta_rule){.method = PERTA_FISHER, .stat = s});
        for (double p = 0.5; p < 4; p *= 1.7)
            compare_all_dtypes((struct perta_rule){.method = PERTA_POWER, .stat = s, .power = p});
    }
    compare_all_dtypes((struct perta_rule){.method = PERTA_TV});
    compare_all_dtypes((struct perta_rule){.method = PERTA_CONSTANT, .weight = 0.3});
    compare_all_dtypes((struct perta_rule){.method = PERTA_RANDOM, .seed = 42});
}
END_TEST

START_TEST(weights_are_what_the_formula_says)
{
    const float model = 0, tuned = 1, base = 0, alpha = 1;
    static const struct {
        enum perta_method method;
        enum perta_stat stat;
        float f, r, w;
    } cases[] = {
        {PERTA_GRAD, PERTA_STAT_MEAN, 3, -1, 0.75f},
        {PERTA_FISHER, PERTA_STAT_MEAN, -3, 1, 0.9f},
        {PERTA_GRAD, PERTA_STAT_MEANSQ, 9, 1, 0.75f},
        {PERTA_FISHER, PERTA_STAT_MEANSQ, 9, 1, 0.9f},
        {PERTA_GRAD, PERTA_STAT_MEAN, 0, 0, 0},
        {PERTA_GRAD, PERTA_STAT_MEAN, 0, 1, 0},
        {PERTA_GRAD, PERTA_STAT_MEAN, 1, 0, 1},
        {PERTA_GRAD, PERTA_STAT_MEAN, 1e-30f, 1e-30f, 0.5f},
        {PERTA_FISHER, PERTA_STAT_MEAN, 1e-30f, 1e-30f, 0.5f},
        {PERTA_FISHER, PERTA_STAT_MEAN, 1e-30f, 1, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_rule rule = {.method = cases[i].method, .stat = cases[i].stat};
        struct perta_edit_in in = {{PERTA_F32, &model}, {PERTA_F32, &tuned}, {PERTA_F32, &base},
                                   {PERTA_F32, &cases[i].f}, {PERTA_F32, &cases[i].r}, 1, 0, 0};
        struct perta_edit_counts counts;
        float out;
        void *to = &out;
        perta_edit(&rule, &in, &alpha, 1, &to, &counts);
        ck_assert_float_eq_tol(-out, cases[i].w, 1e-6f);
    }
}
END_TEST

START_TEST(running_means_keep_what_float32_sums_lose)
{
    enum { SAMPLES = 100000 };
    float sums[4];
    struct perta_running r = {&sums[0], &sums[1], &sums[2], &sums[3], 1};
    const float x = 1e-6f; /* its square is 1e-12 */
    const struct perta_view view = {PERTA_F32, &x};
    perta_running_zero(&r);
    for (int i = 0; i < SAMPLES; i++)
        ck_assert_uint_eq(perta_running_add(&r, &view), UINT64_MAX);
    float mean, meansq;
    ck_assert_uint_eq(perta_running_finish(&r, SAMPLES, &mean, &meansq), UINT64_MAX);
    ck_assert_float_eq_tol(mean, x, 2.4e-13f); /* two units in the last place */
    ck_assert_float_eq_tol(meansq, x * x, 2.4e-19f);
}
END_TEST

START_TEST(running_sums_are_the_same_for_every_instruction_set_and_name_what_is_bad)
{
    static float data[N], sums[3][4][N], means[3][2][N];
    for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
        float(*s)[N] = sums[isa];
        struct perta_running r = {s[0], s[1], s[2], s[3], N};
        const struct perta_view view = {PERTA_F32, data};
        perta_running_zero(&r);
        for (uint64_t i = 0; i < 20; i++) {
            fill(data, PERTA_F32, 1e-3, false, false, i);
            ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view), UINT64_MAX);
        }
        perta_running_finish(&r, 20, means[isa][0], means[isa][1]);
        ck_assert_mem_eq(means[isa], means[0], sizeof means[0]);
        data[1500] = NAN;
        data[1700] = INFINITY;
        ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view), 1500);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("edit");
    tcase_add_test(tests, every_method_and_dtype_equals_the_reference);
    tcase_add_test(tests, weights_are_what_the_formula_says);
    tcase_add_test(tests, running_means_keep_what_float32_sums_lose);
    tcase_add_test(tests, running_sums_are_the_same_for_every_instruction_set_and_name_what_is_bad);
    return run_suite("edit", tests);
}
