/* Formats of rounded weights: kernels of every instruction set give the bits of the reference; what
 * cannot be rounded is named. tests/python/test_quantize.py has the same formats in NumPy. */
#include "tests/scratch.h"

#include "estimators/compute/round.h"
#include "estimators/edit/unlearn.h"
#include "estimators/model/model.h"
#include "estimators/passes/eval.h"
#include "io/format/convert.h"
#include "io/isa.h"
#include "tests/gradient.h"

static struct perta_err err;

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

/* The largest number of a block stays, and so do scale and codes. */
START_TEST(rounding_to_nf4_again_changes_nothing)
{
    float w[4 * 64], once[4 * 64];
    fill(PERTA_F32, w, 4 * 64, 8);
    perta_round(PERTA_ROUND_NF4, PERTA_F32, w, 4, 64);
    memcpy(once, w, sizeof w);
    perta_round(PERTA_ROUND_NF4, PERTA_F32, w, 4, 64);
    ck_assert(!memcmp(w, once, sizeof w));
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

/* ---- in a model that is computed as it is read ---- */

static const char config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":32,\"intermediate_size\":64,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":23,"
    "\"num_hidden_layers\":2,\"rms_norm_eps\":1e-3}";

/* Write a checkpoint whose weights are as at first, and noise times this, or all of them scale. */
static void put_model(const char *path, double noise, float scale)
{
    struct perta_llm llm;
    struct perta_model model;
    const struct perta_model_file file = {"config.json", config};
    json_t *json = json_loads(config, 0, NULL);
    uint64_t seed = 15;
    ck_assert_ptr_nonnull(json);
    ck_assert_ok(perta_llm_parse(json, "config.json", &llm, &err));
    ck_assert_ok(perta_model_new(&llm, 1, &model, &err));
    for (size_t i = 0; i < model.n_floats; i++)
        model.weights[i] = scale > 0 ? scale : model.weights[i] + uniform(&seed, -noise, noise);
    ck_assert_ok(perta_model_save(&model, path, &file, 1, false, &err));
    perta_model_release(&model);
    json_decref(json);
}

static double loss_of(const struct perta_eval *eval)
{
    const struct perta_run run = {.memory_bytes = 1 << 30, .n_threads = 2};
    json_t *summary;
    ck_assert_ok(perta_eval(eval, &run, &summary, &err));
    double loss = json_real_value(json_object_get(summary, "loss"));
    json_decref(summary);
    return loss;
}

/* theta - s * tau is rounded, and not theta. */
START_TEST(scales_come_before_rounding)
{
    const struct perta_run run = {.memory_bytes = 1 << 30, .n_threads = 2};
    const struct perta_scaled_paths at = {.tuned = "tuned", .base = "base", .scale = "scale"};
    const struct perta_unlearn unlearn = {.model = "model",
                                          .tuned = at.tuned,
                                          .base = at.base,
                                          .scale = at.scale,
                                          .rule = {.method = PERTA_SCALE},
                                          .alphas = {{.text = "1", .value = 1}},
                                          .n_alphas = 1,
                                          .patch = "patch",
                                          .out = "edited"};
    json_t *summary;
    put_model("model", 0.3, 0);
    put_model("tuned", 0.2, 0);
    put_model("base", 0.1, 0);
    put_model("scale", 0, 0.75f);
    put_text("data.jsonl", "{\"input_ids\":[3,1,4,1,5,9,2,6]}\n{\"input_ids\":[22,0,7]}\n");
    ck_assert_ok(perta_unlearn(&unlearn, &run, &summary, &err));
    json_decref(summary);
    for (int r = PERTA_ROUND_NONE; r < PERTA_N_ROUNDINGS; r++) {
        struct perta_eval eval = {.model = "model",
                                  .at = &at,
                                  .data = "data.jsonl",
                                  .quantize = (enum perta_rounding)r,
                                  .compute = PERTA_COMPUTE_F32};
        double have = loss_of(&eval);
        eval.at = NULL;
        ck_assert_double_ne(loss_of(&eval), have);
        eval.model = "edited";
        ck_assert_double_eq(loss_of(&eval), have);
        eval.model = "model";
        eval.patch = "patch";
        ck_assert_double_eq(loss_of(&eval), have);
        eval.quantize = PERTA_ROUND_NONE;
        ck_assert((loss_of(&eval) == have) == !r);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_test(tests, every_instruction_set_gives_the_bits_of_the_reference);
    tcase_add_test(tests, rounding_to_nf4_again_changes_nothing);
    tcase_add_test(tests, an_element_that_is_not_finite_is_named);
    tcase_add_test(tests, an_element_that_the_format_cannot_hold_is_named);
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, scales_come_before_rounding);
    return run_suite("round", tests);
}
