/* Formats of rounded weights: kernels of every instruction set give the bits of the reference; what
 * cannot be rounded is named. tests/python/test_quantize.py has the same formats in NumPy. */
#include <math.h>

#include "estimators/compute/round.h"
#include "io/format/convert.h"
#include "io/isa.h"
#include "tests/unit.h"

static const enum perta_dtype dtypes[] = {PERTA_F32, PERTA_BF16, PERTA_F16};

/* Two rows to a length: blocks that end with a row and that do not, and rows longer than a tile. */
static const size_t shapes[][2] = {{1, 1},    {3, 5},    {2, 31},   {2, 32},  {3, 33},  {5, 64},
                                   {2, 96},   {3, 127},  {2, 128},  {4, 200}, {2, 576}, {3, 1024},
                                   {2, 1025}, {3, 1536}, {2, 2048}, {3, 2500}};

static float element(enum perta_dtype dtype, const void *w, size_t i)
{
    return dtype == PERTA_F32    ? ((const float *)w)[i]
           : dtype == PERTA_BF16 ? perta_f32_from_bf16(((const uint16_t *)w)[i])
                                 : perta_f32_from_f16(((const uint16_t *)w)[i]);
}

static uint32_t bits_of(enum perta_dtype dtype, const void *w, size_t i)
{
    return perta_f32_bits(element(dtype, w, i));
}

static void put(enum perta_dtype dtype, void *w, size_t i, float x)
{
    if (dtype == PERTA_F32)
        ((float *)w)[i] = x;
    else
        ((uint16_t *)w)[i] = dtype == PERTA_BF16 ? perta_bf16_from_f32(x) : perta_f16_from_f32(x);
}

/* Numbers of many kinds, by seed: like weights; on the borders between two codes; zeros; of one
 * sign; tiny; subnormal in float32; of very different sizes. */
static void fill(enum perta_dtype dtype, void *w, size_t n, uint64_t seed)
{
    uint64_t state = seed;
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = next_random(&state);
        float x = (float)((double)(int32_t)bits / 0x1p31);
        switch (seed % 8) {
        case 0:
            x *= 0.05f;
            break;
        case 1:
            x = (float)((int)(bits % 31) - 15) / 15;
            break;
        case 2:
            x = bits % 3 ? 0.0f : bits % 5 ? -0.0f : x;
            break;
        case 3:
            x = fabsf(x);
            break;
        case 4:
            x *= 0x1p-20f;
            break;
        case 5:
            x *= 0x1p-140f;
            break;
        case 6:
            x = ldexpf(x, (int)(bits >> 40) % 20 - 10);
            break;
        default:
            x = i / 64 % 2 ? 0.0f : (float)((int)(bits % 17) - 8) / 8;
        }
        put(dtype, w, i, x);
    }
}

static void compare(perta_round_fn *round, enum perta_rounding rounding, enum perta_dtype dtype,
                    const size_t shape[2], uint64_t seed)
{
    size_t n = shape[0] * shape[1], len_bytes = n * perta_dtype_unit_bytes(dtype);
    void *w = alloc(len_bytes), *want = alloc(len_bytes);
    fill(dtype, w, n, seed);
    memcpy(want, w, len_bytes);
    ck_assert_uint_eq(perta_round_reference(rounding, dtype, want, shape[0], shape[1]), n);
    ck_assert_uint_eq(round(rounding, dtype, w, shape[0], shape[1]), n);
    size_t i = 0;
    while (i < n && bits_of(dtype, w, i) == bits_of(dtype, want, i))
        i++;
    ck_assert_msg(i == n, "%s of %s (%zu, %zu), seed %d: element %zu",
                  perta_rounding_name(rounding), perta_dtype_name(dtype), shape[0], shape[1],
                  (int)seed, i);
    free(w);
    free(want);
}

static void compare_all(perta_round_fn *round)
{
    for (int r = PERTA_ROUND_NONE + 1; r < PERTA_N_ROUNDINGS; r++)
        for (size_t d = 0; d < 3; d++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
                for (uint64_t seed = 0; seed < 16; seed++)
                    if (perta_rounding_fits((enum perta_rounding)r, shapes[s][1]))
                        compare(round, (enum perta_rounding)r, dtypes[d], shapes[s], seed);
}

START_TEST(every_instruction_set_gives_the_bits_of_the_reference)
{
    compare_all(perta_round_v2);
    if (perta_isa_best() >= PERTA_ISA_V3)
        compare_all(perta_round_v3);
    if (perta_isa_best() >= PERTA_ISA_V4)
        compare_all(perta_round_v4);
}
END_TEST

START_TEST(rounding_again_changes_nothing_that_matters)
{
    /* The largest number of a block is kept, so scale and codes stay: formats whose largest code is
     * exactly the largest number. */
    static const enum perta_rounding exact[] = {PERTA_ROUND_NF4, PERTA_ROUND_FP8};
    for (size_t r = 0; r < 2; r++) {
        float w[4 * 64], once[4 * 64];
        fill(PERTA_F32, w, 4 * 64, 8);
        perta_round(exact[r], PERTA_F32, w, 4, 64);
        memcpy(once, w, sizeof w);
        perta_round(exact[r], PERTA_F32, w, 4, 64);
        ck_assert(!memcmp(w, once, sizeof w));
    }
}
END_TEST

/* In a matrix (3, 1536) whose element at is x, element bad is named, and stays as it is. */
static void check_bad(enum perta_rounding rounding, enum perta_dtype dtype, float x, size_t at,
                      size_t bad)
{
    size_t n = (size_t)3 * 1536;
    void *w = alloc(n * perta_dtype_unit_bytes(dtype)), *copy = alloc(n * sizeof(float));
    fill(dtype, w, n, 8);
    put(dtype, w, at, x);
    memcpy(copy, w, n * perta_dtype_unit_bytes(dtype));
    uint32_t before = bits_of(dtype, w, bad);
    ck_assert_uint_eq(perta_round(rounding, dtype, w, 3, 1536), bad);
    ck_assert_uint_eq(perta_round_reference(rounding, dtype, copy, 3, 1536), bad);
    ck_assert_uint_eq(bits_of(dtype, w, bad), before);
    free(w);
    free(copy);
}

START_TEST(an_element_that_is_not_finite_is_named)
{
    static const size_t places[] = {0, 31, 1023, 1024, 1535, 1536, 3 * 1536 - 1};
    for (int r = PERTA_ROUND_NONE + 1; r < PERTA_N_ROUNDINGS; r++)
        for (size_t d = 0; d < 3; d++)
            for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
                check_bad((enum perta_rounding)r, dtypes[d], NAN, places[p], places[p]);
                check_bad((enum perta_rounding)r, dtypes[d], -INFINITY, places[p], places[p]);
            }
}
END_TEST

START_TEST(an_element_that_the_format_cannot_hold_is_named)
{
    check_bad(PERTA_ROUND_INT8, PERTA_F32, 1e5f, 1700, 1700); /* float16 ends at 65504 */
    check_bad(PERTA_ROUND_INT8, PERTA_BF16, -1e5f, 1700, 1700);
    check_bad(PERTA_ROUND_Q4_0, PERTA_F32, 1e6f, 1700, 1700 / 32 * 32); /* as does its scale */
    check_bad(PERTA_ROUND_INT4, PERTA_F32, 3e38f, 1700, 1700 / 128 * 128);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_test(tests, every_instruction_set_gives_the_bits_of_the_reference);
    tcase_add_test(tests, rounding_again_changes_nothing_that_matters);
    tcase_add_test(tests, an_element_that_is_not_finite_is_named);
    tcase_add_test(tests, an_element_that_the_format_cannot_hold_is_named);
    return run_suite("round", tests);
}
