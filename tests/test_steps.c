#include <math.h>
#include <string.h>

#include "estimators/steps/steps.h"
#include "io/format/convert.h"
#include "unit.h"

static const struct perta_step_rule rule = {.step = 0.4, .back_off = 0.2, .max_scale = 1};

static float bf16(float x)
{
    return perta_f32_from_bf16(perta_bf16_from_f32(x));
}

START_TEST(a_scale_moves_by_the_signs_of_both_gradients_along_the_task_vector)
{
    static const struct {
        float tau, forget, retain, from, to;
    } cases[] = {
        {1, -1, 1, 0, 0.4f},           /* -g tau: the forget loss rises, the retain loss falls */
        {-1, 1, -1, 0, 0.4f},          /* the same with opposite signs */
        {1, -1, 0, 0, 0.4f},           /* it is enough if the retain loss does not rise */
        {1, -1, -1, 1, 0.8f},          /* both rise: back off */
        {1, 1, -1, 1, 0.8f},           /* only the retain loss rises */
        {1, 1, 1, 0.5f, 0.5f},         /* neither: it stays */
        {1, 0, 0, 0.5f, 0.5f},         /* both gradients are zero */
        {0, -1, -1, 0.5f, 0.5f},       /* the task vector is zero */
        {1, -1, 1, 0.8f, 1},           /* at most max_scale */
        {1, -1, -1, 0.1f, 0},          /* at least zero */
        {1e-30f, -1e-30f, 1, 0, 0.4f}, /* the product of the two would underflow */
        {1e-30f, -1, -1e-30f, 1, 0.8f},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float base = 0, scale = bf16(cases[i].from);
        struct perta_step_in in = {.tuned = {PERTA_F32, &cases[i].tau},
                                   .base = {PERTA_F32, &base},
                                   .forget = {PERTA_F32, &cases[i].forget},
                                   .retain = {PERTA_F32, &cases[i].retain},
                                   .scale = {PERTA_F32, &scale},
                                   .n = 1};
        uint16_t to;
        double sum;
        uint64_t n_moved = perta_step_update(&rule, &in, &to, &sum);
        float have = perta_f32_from_bf16(to); /* rounding to bf16 changes it by up to 2^-9 */
        ck_assert_msg(fabsf(have - cases[i].to) <= 0.004f, "case %zu: %g, not %g", i, (double)have,
                      (double)cases[i].to);
        ck_assert_uint_eq(n_moved, have != scale);
        ck_assert_double_eq(sum, (double)have);
    }
}
END_TEST

/* Every operand in every dtype, more than a tile of them, at unaligned addresses. */
START_TEST(dtypes_and_lengths_do_not_matter)
{
    enum { N = 1025 };
    static const enum perta_dtype dtypes[] = {PERTA_F32, PERTA_F64, PERTA_BF16, PERTA_F16};
    static char bytes[5][N * 8 + 1];
    static uint16_t want[N], have[N];
    double want_sum, sum;
    for (size_t d = 0; d < 4; d++) {
        struct perta_view views[5];
        for (size_t o = 0; o < 5; o++) {
            enum perta_dtype dtype = dtypes[(d + (d ? o : 0)) % 4];
            uint64_t width = perta_dtype_unit_bytes(dtype);
            for (size_t i = 0; i < N; i++) { /* values that all dtypes hold exactly; scales are not
                                              * negative */
                double x = (double)((i * (o + 3)) % 5) / 4 - (o == 4 ? 0 : 0.5);
                float f = (float)x;
                uint16_t half = dtype == PERTA_F16 ? perta_f16_from_f32(f) : perta_bf16_from_f32(f);
                const void *from = width == 8   ? (void *)&x
                                   : width == 4 ? (void *)&f
                                                : (void *)&half;
                memcpy(bytes[o] + 1 + i * width, from, width);
            }
            views[o] = (struct perta_view){dtype, bytes[o] + 1};
        }
        struct perta_step_in in = {views[0], views[1], views[2], views[3], views[4], N};
        perta_step_update(&rule, &in, d ? have : want, d ? &sum : &want_sum);
        if (d) {
            ck_assert_mem_eq(have, want, sizeof have);
            ck_assert_double_eq(sum, want_sum);
        }
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("steps");
    tcase_add_test(tests, a_scale_moves_by_the_signs_of_both_gradients_along_the_task_vector);
    tcase_add_test(tests, dtypes_and_lengths_do_not_matter);
    return run_suite("steps", tests);
}
