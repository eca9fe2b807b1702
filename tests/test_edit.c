/* Compares the edit kernels with the scalar reference, bit for bit, on every instruction set. */
#include "tests/unit.h"

#include <math.h>

#include "estimators/edit/edit.h"

#define N 2077 /* two whole tiles and a part of one */

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
    case PERTA_F16: /* only normal numbers below 2 */
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

/* Values of a model's or a gradient's size; with specials also zeros, subnormals, NaN and Inf. */
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

static char inputs[6][N * 8], outs[2][3][N * 8];
/* The operands in the order of inputs, but for the scale. */
static void set_view(struct perta_edit_in *in, int i, struct perta_view view)
{
    struct perta_view *const views[] = {&in->model, &in->tuned, &in->base, &in->forget,
                                        &in->retain};
    *views[i] = view;
}

static const float alphas[3] = {1.0f, 0.3f, -2.0f};

static void compare(const struct perta_rule *rule, const enum perta_dtype dtype[5], bool specials)
{
    struct perta_view views[5];
    for (int i = 0; i < 5; i++) {
        bool positive = i >= 3 && rule->stat == PERTA_STAT_MEANSQ;
        double scale = i < 3 ? 0.1 : rule->method == PERTA_SCALE ? 6 : 1e-5;
        fill(inputs[i], dtype[i], scale, positive, specials, (uint64_t)i + 7);
        views[i] = (struct perta_view){dtype[i], inputs[i]};
    }
    const struct perta_edit_in in = {views[0], views[1], views[2], views[3], views[4],
                                     N,        12345,    0xabcdef, views[4], 0};
    void *const to[2][3] = {{outs[0][0], outs[0][1], outs[0][2]},
                            {outs[1][0], outs[1][1], outs[1][2]}};
    struct perta_edit_counts want[3], have[3];
    perta_edit_reference(rule, &in, alphas, 3, to[0], want);
    for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
        perta_edit_isa((enum perta_isa)isa, rule, &in, alphas, 3, to[1], have);
        for (int a = 0; a < 3; a++) {
            ck_assert_uint_eq(have[a].n_changed, want[a].n_changed);
            ck_assert_uint_eq(have[a].n_rounded_away, want[a].n_rounded_away);
            ck_assert_uint_eq(have[a].n_zero_forget, want[a].n_zero_forget);
            ck_assert_uint_eq(have[a].n_zero_retain, want[a].n_zero_retain);
            ck_assert_uint_eq(have[a].n_nonfinite, want[a].n_nonfinite);
            ck_assert_mem_eq(&have[a].sum_weight, &want[a].sum_weight, sizeof(double));
            ck_assert_mem_eq(have[a].weights, want[a].weights, sizeof want[a].weights);
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
    compare_all_dtypes((struct perta_rule){.method = PERTA_SCALE, .stat = PERTA_STAT_MEANSQ});
    compare_all_dtypes((struct perta_rule){.method = PERTA_SCALE}); /* including negative ones */
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
        struct perta_edit_in in = {{PERTA_F32, &model},
                                   {PERTA_F32, &tuned},
                                   {PERTA_F32, &base},
                                   {PERTA_F32, &cases[i].f},
                                   {PERTA_F32, &cases[i].r},
                                   1,
                                   0,
                                   0,
                                   {0},
                                   0};
        struct perta_edit_counts counts;
        float out;
        void *to = &out;
        perta_edit(&rule, &in, &alpha, 1, &to, &counts);
        ck_assert_float_eq_tol(-out, cases[i].w, 1e-6f);
    }
}
END_TEST

START_TEST(odd_lengths_and_addresses_give_the_same_bits)
{
    static const uint64_t lengths[] = {1, 2, 3, 7, 15, 16, 17, 31, 33, 1023, 1024, 1025};
    static char moved[5][N * 8 + 1], out[2][N * 8 + 2];
    const float alpha = 0.7f;
    for (size_t d = 0; d < 4; d++)
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
            struct perta_rule rule = {.method = (enum perta_method)(l % 7),
                                      .power = 1.5,
                                      .weight = 0.4,
                                      .seed = l,
                                      .keep_nonfinite = true};
            struct perta_edit_in in[2] = {{.n = lengths[l], .first_elem = 3, .name_hash = 5}};
            in[1] = in[0];
            for (int i = 0; i < 5; i++) {
                fill(inputs[i], dtypes[d], i < 3 ? 0.1 : 1e-5, false, true, l * 5 + (uint64_t)i);
                memcpy(moved[i] + 1, inputs[i], N * 8);
                set_view(&in[0], i, (struct perta_view){dtypes[d], inputs[i]});
                set_view(&in[1], i, (struct perta_view){dtypes[d], moved[i] + 1});
            }
            in[0].scale = in[0].forget;
            in[1].scale = in[1].forget;
            size_t len = lengths[l] * perta_dtype_unit_bytes(dtypes[d]);
            for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
                void *to[2] = {out[0], out[1] + 1};
                struct perta_edit_counts counts[2];
                memset(out, 0x5a, sizeof out);
                perta_edit_reference(&rule, &in[0], &alpha, 1, &to[0], &counts[0]);
                perta_edit_isa((enum perta_isa)isa, &rule, &in[1], &alpha, 1, &to[1], &counts[1]);
                ck_assert_mem_eq(out[0], out[1] + 1, len);
                ck_assert_int_eq(out[1][0], 0x5a); /* it wrote nothing after its room */
                ck_assert_int_eq(out[1][1 + len], 0x5a);
                ck_assert_uint_eq(counts[0].n_changed, counts[1].n_changed);
                ck_assert_uint_eq(counts[0].n_nonfinite, counts[1].n_nonfinite);
                ck_assert_mem_eq(&counts[0].sum_weight, &counts[1].sum_weight, sizeof(double));
                ck_assert_mem_eq(counts[0].weights, counts[1].weights, sizeof counts[0].weights);
            }
        }
}
END_TEST

/* One element of each operand is bad in turn; the others are good. */
START_TEST(the_first_bad_element_and_its_operand_are_named_by_every_instruction_set)
{
    const float alpha = 1;
    for (int operand = 0; operand < PERTA_N_OPERANDS; operand++)
        for (int keep = 0; keep < 2; keep++)
            for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
                struct perta_rule rule = {
                    .method = PERTA_FISHER, .stat = PERTA_STAT_MEANSQ, .keep_nonfinite = keep};
                struct perta_edit_in in = {.n = N, .scale = {PERTA_F32, inputs[PERTA_IN_SCALE]}};
                if (operand == PERTA_IN_SCALE)
                    rule.method = PERTA_SCALE;
                for (int i = 0; i < 6; i++)
                    fill(inputs[i], PERTA_F32, 1, true, false, (uint64_t)i);
                for (int i = 0; i < 5; i++)
                    (&in.model)[i] = (struct perta_view){PERTA_F32, inputs[i]};
                for (size_t at = 1300; at < N; at += 500) { /* 1300 and 1800 */
                    if (operand == PERTA_IN_RESULT) {       /* 3e38 + 3e38 */
                        put(inputs[PERTA_IN_MODEL], PERTA_F32, at, 3e38);
                        put(inputs[PERTA_IN_BASE], PERTA_F32, at, 3e38);
                        put(inputs[PERTA_IN_FORGET], PERTA_F32, at, 1);
                        put(inputs[PERTA_IN_RETAIN], PERTA_F32, at, 0);
                    } else {
                        put(inputs[operand], PERTA_F32, at, operand < 3 ? (double)NAN : -1);
                    }
                }
                struct perta_edit_counts counts;
                void *to = outs[0][0];
                perta_edit_isa((enum perta_isa)isa, &rule, &in, &alpha, 1, &to, &counts);
                ck_assert_uint_eq(counts.n_nonfinite, 2);
                ck_assert_uint_eq(counts.bad_elem, 1300);
                ck_assert_int_eq(counts.bad_operand, operand);
                if (keep) /* the model's bits stay */
                    ck_assert_mem_eq(outs[0][0] + 4 * 1800, inputs[0] + 4 * 1800, 4);
            }
}
END_TEST

START_TEST(importances_are_read_by_the_methods_that_need_them)
{
    const bool needs[] = {true, true, true, false, false, false};
    for (int m = 0; m <= PERTA_RANDOM; m++) {
        struct perta_rule rule = {.method = (enum perta_method)m, .power = 1, .weight = 0.5};
        ck_assert_int_eq(perta_rule_needs_importance(&rule), needs[m]);
        if (needs[m])
            continue;
        const float alpha = 1;
        struct perta_edit_in in = {.n = N}; /* importances are NULL */
        for (int i = 0; i < 3; i++) {
            fill(inputs[i], PERTA_BF16, 0.1, false, false, (uint64_t)i);
            set_view(&in, i, (struct perta_view){PERTA_BF16, inputs[i]});
        }
        struct perta_edit_counts counts;
        void *to = outs[0][0];
        perta_edit(&rule, &in, &alpha, 1, &to, &counts);
        ck_assert_uint_eq(counts.n_nonfinite, 0);
        ck_assert_double_eq_tol(counts.sum_weight / N, m == PERTA_TV ? 1 : 0.5, 0.02);
    }
}
END_TEST

/* Any run of elements of a tensor, beginning and ending also within a row. */
START_TEST(the_task_vector_of_a_lora_equals_the_reference)
{
    static const struct {
        uint64_t width, r, first, n;
    } cases[] = {
        {1, 1, 0, 1},          {1, 3, 5, 900},
        {7, 1, 3, 17},         {5, 9, 4, 3},
        {64, 16, 0, 640},      {1024, 4, 0, 4096},
        {1025, 5, 1000, 2000}, {3001, 8, 1, 3000},
        {3001, 7, 2999, 9005}, {100000, 2, 99990, 77777},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t width = cases[i].width, r = cases[i].r, n = cases[i].n;
        uint64_t first_row = cases[i].first / width;
        uint64_t n_rows = (cases[i].first + n - 1) / width - first_row + 1;
        float *rows = alloc(n_rows * r * sizeof *rows);
        float *columns = alloc(r * width * sizeof *columns);
        float *want = alloc(n * sizeof *want), *have = alloc((n + 1) * sizeof *have);
        uint64_t seed = i;
        for (uint64_t k = 0; k < n_rows * r; k++)
            rows[k] = (float)((double)(next_random(&seed) >> 11) * 0x1p-53 - 0.5);
        for (uint64_t k = 0; k < r * width; k++)
            columns[k] = (float)((double)(next_random(&seed) >> 11) * 0x1p-53 - 0.5);
        struct perta_lora lora = {rows, columns, r, width, first_row, 1.7f};
        perta_lora_tau_reference(&lora, cases[i].first, n, want);
        for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
            have[n] = 42;
            perta_lora_tau_isa((enum perta_isa)isa, &lora, cases[i].first, n, have);
            ck_assert_mem_eq(have, want, n * sizeof *want);
            ck_assert(have[n] == 42);
        }
        free(rows);
        free(columns);
        free(want);
        free(have);
    }
}
END_TEST

/* The reference and every instruction set edit to these bytes and counts. */
static void all_give(const struct perta_rule *rule, const struct perta_edit_in *in,
                     const void *wanted, const struct perta_edit_counts *want, size_t width)
{
    for (int isa = -1; isa <= (int)perta_isa_best(); isa++) {
        struct perta_edit_counts have;
        void *to[] = {outs[1][0]};
        memset(outs[1][0], 0x55, sizeof outs[1][0]);
        if (isa < 0)
            perta_edit_reference(rule, in, alphas, 1, to, &have);
        else
            perta_edit_isa((enum perta_isa)isa, rule, in, alphas, 1, to, &have);
        ck_assert_mem_eq(outs[1][0], wanted, N * width);
        ck_assert_uint_eq(have.n_nonfinite, want->n_nonfinite);
        ck_assert_uint_eq(have.n_changed, want->n_changed);
    }
}

/* A given tau edits like tuned - base if base is zero. */
START_TEST(without_a_base_tuned_is_the_task_vector)
{
    static const char zeros[N * 8];
    struct perta_rule rule = {.method = PERTA_CONSTANT, .weight = 0.7, .keep_nonfinite = true};
    for (int model = 0; model < 4; model++) {
        size_t width = perta_dtype_unit_bytes(dtypes[model]);
        fill(inputs[0], dtypes[model], 1, false, true, 1);
        fill(inputs[1], PERTA_F32, 0.1, false, true, 2);
        struct perta_edit_in in = {.model = {dtypes[model], inputs[0]},
                                   .tuned = {PERTA_F32, inputs[1]},
                                   .base = {PERTA_F32, zeros},
                                   .n = N};
        struct perta_edit_counts want;
        void *to[] = {outs[0][0]};
        perta_edit(&rule, &in, alphas, 1, to, &want);
        in.base = (struct perta_view){0};
        all_give(&rule, &in, outs[0][0], &want, width);
    }
}
END_TEST

/* A box edits like the task vector that its signs and its size make. */
START_TEST(a_box_is_a_size_times_signs)
{
    static float tau[N];
    static int8_t signs[N + 1];
    struct perta_rule rule = {.method = PERTA_SCALE, .keep_nonfinite = true};
    for (size_t i = 0; i < N; i++) {
        signs[i + 1] = (int8_t)(i * 7 % 3 - 1);
        tau[i] = 0.037f * (float)signs[i + 1];
    }
    for (int model = 0; model < 4; model++) {
        size_t width = perta_dtype_unit_bytes(dtypes[model]);
        fill(inputs[0], dtypes[model], 1, false, true, 1);
        fill(inputs[5], PERTA_BF16, 3, true, false, 2);
        struct perta_edit_in in = {.model = {dtypes[model], inputs[0]},
                                   .tuned = {PERTA_F32, tau},
                                   .n = N,
                                   .scale = {PERTA_BF16, inputs[5]},
                                   .box = 0.037f};
        struct perta_edit_counts want;
        void *to[] = {outs[0][0]};
        perta_edit_reference(&rule, &in, alphas, 1, to, &want);
        in.tuned = (struct perta_view){PERTA_I8, signs + 1};
        all_give(&rule, &in, outs[0][0], &want, width);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("edit");
    tcase_add_test(tests, every_method_and_dtype_equals_the_reference);
    tcase_add_test(tests, weights_are_what_the_formula_says);
    tcase_add_test(tests, odd_lengths_and_addresses_give_the_same_bits);
    tcase_add_test(tests, the_first_bad_element_and_its_operand_are_named_by_every_instruction_set);
    tcase_add_test(tests, importances_are_read_by_the_methods_that_need_them);
    tcase_add_test(tests, the_task_vector_of_a_lora_equals_the_reference);
    tcase_add_test(tests, without_a_base_tuned_is_the_task_vector);
    tcase_add_test(tests, a_box_is_a_size_times_signs);
    return run_suite("edit", tests);
}
