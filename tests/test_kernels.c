/* Kernels: the same bits for every instruction set; exponentials near libm's. */
#include "estimators/compute/kernels.h"

#include "io/isa.h"
#include "tests/gradient.h"

#define ROW 1000 /* not a whole number of lanes or tiles */

static uint64_t mix(uint64_t sum, const void *data, size_t len_bytes)
{
    for (size_t i = 0; i < len_bytes; i++)
        sum = (sum ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return sum;
}

/* Everything that the kernels make of three rows, as one number. */
static uint64_t digest(const struct perta_row_kernels *k)
{
    struct pair a = pair(ROW, 21), b = pair(ROW, 22), c = pair(ROW, 23);
    float y[ROW], z[ROW];
    uint16_t halves[ROW];
    double sums[ROW] = {0}, numbers[10] = {0};
    for (size_t i = 0; i < ROW; i++)
        a.f[i] *= 40;
    numbers[0] = k->dot(a.f, b.f, ROW);
    numbers[1] = k->dot_of_product(a.f, b.f, c.f, ROW);
    numbers[2] = k->exponentials(y, a.f, 40, ROW);
    numbers[3] = k->sum_exponentials(a.f, k->largest(a.f, ROW, -1), ROW);
    k->add_moments(numbers + 4, a.f, 40, ROW);
    numbers[6] = k->sum(a.f, ROW);
    numbers[7] = k->sum_deviations(a.f, 0.3, ROW);
    k->layernorm_sums(numbers + 8, a.f, b.f, c.f, 0.1f, ROW);
    uint64_t sum = mix(mix(0, numbers, sizeof numbers), y, sizeof y);
    k->add_products(sums, a.f, b.f, 0.1f, 0.3f, ROW);
    k->add(sums, c.f, ROW);
    k->add_squares(sums, a.f, ROW);
    ck_assert(!k->divide(z, sums, 3, ROW));
    sum = mix(sum, z, sizeof z);
    sum = mix(sum, sums, sizeof sums);
    k->softmax_backward(c.f, b.f, 0.1f, ROW);
    memcpy(y, a.f, sizeof y);
    k->softcap(y, 7, ROW);
    k->softcap_backward(z, b.f, 0.3f, ROW);
    sum = mix(mix(sum, y, sizeof y), z, sizeof z);
    k->scaled_exponentials(a.f, 40, 0.7f, ROW);
    sum = mix(mix(sum, b.f, sizeof y), c.f, sizeof y);
    k->to_bf16(halves, a.f, PERTA_F32, ROW);
    k->to_f32(y, halves, PERTA_F16, ROW);
    sum = mix(mix(mix(sum, a.f, sizeof y), halves, sizeof halves), y, sizeof y);
    release(a);
    release(b);
    release(c);
    return sum;
}

/* The same of an activation's kernels. */
static uint64_t activation_digest(const struct perta_activation_kernels *all,
                                  enum perta_activation_kind kind)
{
    const struct perta_activation act = {kind, 1.3f, 11};
    const struct perta_activation_kernels *k = &all[kind];
    struct pair a = pair(ROW, 24), b = pair(ROW, 25);
    float y[ROW], z[ROW];
    for (size_t i = 0; i < ROW; i++)
        a.f[i] *= 40;
    k->glu(&act, y, a.f, b.f, ROW);
    uint64_t sum = mix(0, y, sizeof y);
    k->glu_backward(&act, y, z, y, a.f, b.f, ROW);
    sum = mix(mix(sum, y, sizeof y), z, sizeof z);
    if (k->each) {
        k->each(y, a.f, ROW);
        k->each_backward(z, b.f, a.f, ROW);
        sum = mix(mix(sum, y, sizeof y), z, sizeof z);
        k->each_backward(b.f, b.f, a.f, ROW);
        ck_assert(!memcmp(b.f, z, sizeof z)); /* in place */
    }
    release(a);
    release(b);
    return sum;
}

START_TEST(every_instruction_set_gives_the_same_activations)
{
    enum perta_activation_kind kind = (enum perta_activation_kind)_i;
    uint64_t want = activation_digest(perta_activation_kernels_v2, kind);
    if (perta_isa_best() >= PERTA_ISA_V3)
        ck_assert_uint_eq(activation_digest(perta_activation_kernels_v3, kind), want);
    if (perta_isa_best() >= PERTA_ISA_V4)
        ck_assert_uint_eq(activation_digest(perta_activation_kernels_v4, kind), want);
}
END_TEST

START_TEST(every_instruction_set_gives_the_same_bits)
{
    uint64_t want = digest(&perta_row_kernels_v2);
    if (perta_isa_best() >= PERTA_ISA_V3)
        ck_assert_uint_eq(digest(&perta_row_kernels_v3), want);
    if (perta_isa_best() >= PERTA_ISA_V4)
        ck_assert_uint_eq(digest(&perta_row_kernels_v4), want);
}
END_TEST

START_TEST(exponentials_are_those_of_libm_to_three_units)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (float x = -87; x <= 88; x += 0.0037f) {
        float y = x;
        k->exponentials(&y, &y, 0, 1);
        ck_assert_double_lt(fabs((double)y / exp((double)x) - 1), 3 * 0x1p-24);
    }
    const float ends[] = {-INFINITY, -1e30f, -87.5f, NAN, 0};
    float y[5];
    k->exponentials(y, ends, 0, 5);
    ck_assert(y[0] == 0 && y[1] == 0 && y[2] == 0 && isnan(y[3]) && y[4] == 1);
}
END_TEST

START_TEST(soft_caps_are_those_of_libm)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (float x = -12; x <= 12; x += 0.00037f) {
        float y = x, d = 2;
        k->softcap(&y, 1, 1);
        ck_assert_double_le(fabs((double)y - tanh((double)x)), 3 * 0x1p-24 * fabs((double)y));
        y = x;
        k->softcap(&y, 30, 1);
        ck_assert_double_le(fabs((double)y - 30 * tanh((double)x / 30)),
                            6 * 0x1p-24 * fabs((double)y));
        y = x;
        k->softcap(&y, 1, 1);
        k->softcap_backward(&d, &y, 1, 1);
        ck_assert_double_le(fabs((double)d / 2 - 1 + pow(tanh((double)x), 2)), 8 * 0x1p-24);
    }
    const float ends[] = {-INFINITY, INFINITY, 1e30f, NAN, 0, 1e-30f};
    float y[6], d[6] = {1, 1, 1, 1, 1, 1};
    memcpy(y, ends, sizeof y);
    k->softcap(y, 50, 6);
    k->softcap_backward(d, y, 50, 6);
    ck_assert(y[0] == -50 && y[1] == 50 && y[2] == 50 && isnan(y[3]) && y[4] == 0);
    ck_assert(y[5] == 1e-30f && d[0] == 0 && d[1] == 0 && d[2] == 0 && isnan(d[3]));
    ck_assert(d[4] == 1 && d[5] == 1);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_test(tests, every_instruction_set_gives_the_same_bits);
    tcase_add_loop_test(tests, every_instruction_set_gives_the_same_activations, PERTA_SILU,
                        PERTA_CLAMPED_SWIGLU + 1);
    tcase_add_test(tests, exponentials_are_those_of_libm_to_three_units);
    tcase_add_test(tests, soft_caps_are_those_of_libm);
    return run_suite("kernels", tests);
}
