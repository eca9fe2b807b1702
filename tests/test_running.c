/* Running means and means of squares, compared with long double on every instruction set. */
#include "tests/unit.h"

#include <float.h>
#include <math.h>

#include "estimators/edit/running.h"

#define N 2077 /* two whole tiles and a part of one */
#define SAMPLES 400

static float sums[4][N + 1];

static struct perta_running running(uint64_t n)
{
    struct perta_running r = {sums[0], sums[1], sums[2], sums[3], n};
    perta_running_zero(&r);
    return r;
}

/* A gradient whose elements span many magnitudes and mostly cancel over samples. */
static float gradient(uint64_t sample, uint64_t i)
{
    uint64_t state = sample * 1000003 + i, r = next_random(&state);
    double size = pow(2, -20 - (double)(i % 60)) * (sample % 7 == 0 ? 1e4 : 1);
    return (float)((((double)(r >> 11) * 0x1p-53) - 0.5) * size);
}

static void is_near(float have, long double want, long double total)
{
    long double one_ulp = (long double)nextafterf(fabsf(have), INFINITY) - fabsl(have);
    /* the carry is a float32 sum itself, whose rounding is of second order */
    long double allowed = one_ulp + total * SAMPLES * 0x1p-46L;
    ck_assert_msg(fabsl(have - want) <= allowed, "%.9g, not %.9Lg", (double)have, want);
}

START_TEST(means_are_those_of_long_double_sums)
{
    static float data[N], mean[N], meansq[N];
    static long double sum[N], sq[N], total[N];
    struct perta_running r = running(N);
    const struct perta_view view = {PERTA_F32, data};
    for (uint64_t s = 0; s < SAMPLES; s++) {
        for (uint64_t i = 0; i < N; i++) {
            float x = data[i] = gradient(s, i);
            sum[i] += x;
            total[i] += fabsl(x);
            sq[i] += x * x; /* one float32 product, as documented */
        }
        ck_assert_uint_eq(perta_running_add(&r, &view), UINT64_MAX);
    }
    ck_assert_uint_eq(perta_running_finish(&r, SAMPLES, mean, meansq), UINT64_MAX);
    for (uint64_t i = 0; i < N; i++) {
        is_near(mean[i], sum[i] / SAMPLES, total[i] / SAMPLES);
        is_near(meansq[i], sq[i] / SAMPLES, sq[i] / SAMPLES);
    }
}
END_TEST

START_TEST(means_keep_what_float32_sums_lose)
{
    enum { MANY = 100000 };
    const float x = 1e-6f; /* its square is 1e-12, and the sum of all squares 1e-7 */
    const struct perta_view view = {PERTA_F32, &x};
    struct perta_running r = running(1);
    for (int i = 0; i < MANY; i++)
        ck_assert_uint_eq(perta_running_add(&r, &view), UINT64_MAX);
    float mean, meansq, square = x * x;
    ck_assert_uint_eq(perta_running_finish(&r, MANY, &mean, &meansq), UINT64_MAX);
    /* two units in the last place */
    ck_assert_float_le(fabsf(mean - x), 2 * (nextafterf(x, 1) - x));
    ck_assert_float_le(fabsf(meansq - square), 2 * (nextafterf(square, 1) - square));
    float plain = 0;
    for (int i = 0; i < MANY; i++)
        plain += square;
    ck_assert_float_gt(fabsf(plain / (float)MANY - square), 100 * (nextafterf(square, 1) - square));
}
END_TEST

START_TEST(sums_are_the_same_bits_for_every_instruction_set_length_and_dtype)
{
    static const enum perta_dtype dtypes[] = {PERTA_BF16, PERTA_F16, PERTA_F32, PERTA_F64};
    static const uint64_t lengths[] = {1, 7, 15, 16, 17, 1023, 1024, 1025, N};
    static uint8_t data[N * 8 + 1];
    static float first[4][N + 1];
    for (size_t d = 0; d < 4; d++)
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
            for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
                struct perta_running r = running(lengths[l]);
                unsigned width = perta_dtype_unit_bytes(dtypes[d]);
                const struct perta_view view = {dtypes[d], data + (isa & 1)}; /* at any address */
                sums[0][lengths[l]] = 7; /* elements after them stay unchanged */
                for (uint64_t s = 0; s < 9; s++) {
                    fill_random(data + (isa & 1), lengths[l] * width, s);
                    for (uint64_t i = 0; i < lengths[l]; i++) /* no NaN, no Inf */
                        data[(isa & 1) + i * width + width - 1] &= 0x8f | 0x30;
                    ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view),
                                      UINT64_MAX);
                }
                ck_assert_float_eq(sums[0][lengths[l]], 7);
                if (!isa)
                    memcpy(first, sums, sizeof first);
                for (int k = 0; k < 4; k++)
                    ck_assert_mem_eq(sums[k], first[k], lengths[l] * sizeof(float));
            }
}
END_TEST

START_TEST(what_is_not_wanted_is_not_summed)
{
    static float data[N], both[2][N], alone[N];
    const struct perta_view view = {PERTA_F32, data};
    for (int squares = 0; squares < 2; squares++) {
        struct perta_running r = running(N), half = r;
        for (uint64_t s = 0; s < 5; s++) {
            for (uint64_t i = 0; i < N; i++)
                data[i] = gradient(s, i);
            perta_running_add(&r, &view);
        }
        perta_running_finish(&r, 5, both[0], both[1]);
        if (squares)
            half.sum = half.carry = NULL;
        else
            half.sq_sum = half.sq_carry = NULL;
        perta_running_zero(&half);
        for (uint64_t s = 0; s < 5; s++) {
            for (uint64_t i = 0; i < N; i++)
                data[i] = gradient(s, i);
            perta_running_add(&half, &view);
        }
        perta_running_finish(&half, 5, squares ? NULL : alone, squares ? alone : NULL);
        ck_assert_mem_eq(alone, both[squares], sizeof alone);
    }
}
END_TEST

START_TEST(what_is_not_finite_is_named)
{
    static float data[N], mean[N];
    static double wide[N];
    const struct perta_view view = {PERTA_F32, data}, wide_view = {PERTA_F64, wide};
    for (int isa = 0; isa <= (int)perta_isa_best(); isa++) {
        struct perta_running r = running(N);
        memset(data, 0, sizeof data);
        data[1500] = NAN;
        data[1700] = INFINITY;
        ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view), 1500);
        data[1500] = 0;
        ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view), 1700);
        data[0] = -INFINITY;
        ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &view), 0);
        wide[2076] = 1e39; /* finite, but not in float32 */
        ck_assert_uint_eq(perta_running_add_isa((enum perta_isa)isa, &r, &wide_view), 2076);
    }
    /* the gradients are finite, but their sum or square is not */
    struct perta_running r = running(N);
    memset(data, 0, sizeof data);
    data[3] = FLT_MAX;
    data[2] = 1e20f;
    for (int i = 0; i < 2; i++)
        ck_assert_uint_eq(perta_running_add(&r, &view), UINT64_MAX);
    ck_assert_uint_eq(perta_running_finish(&r, 2, mean, NULL), 3);
    ck_assert_uint_eq(perta_running_finish(&r, 2, mean, mean), 2);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("running");
    tcase_add_test(tests, means_are_those_of_long_double_sums);
    tcase_add_test(tests, means_keep_what_float32_sums_lose);
    tcase_add_test(tests, sums_are_the_same_bits_for_every_instruction_set_length_and_dtype);
    tcase_add_test(tests, what_is_not_wanted_is_not_summed);
    tcase_add_test(tests, what_is_not_finite_is_named);
    return run_suite("running", tests);
}
