/* Results do not depend on the host program's floating-point environment, and the library leaves it
 * unchanged. */
#include "tests/unit.h"

#include "estimators/edit/edit.h"
#include "estimators/edit/running.h"
#include "io/format/canonical.h"
#include "tests/strange_fp.h"

#define N 1500 /* a whole tile and a part of one */

/* What the library computes, and where it stores the results. */
struct results {
    float out[N], tau[N], mean[N], meansq[N];
    uint64_t bad;
    struct perta_edit_counts counts;
};

static float model[N], tuned[N], base[N], forget[N], retain[N];

/* Weights and gradients, many of them subnormal, whose differences and products are subnormal
 * too. */
static void fill_inputs(void)
{
    uint64_t seed = 1;
    float *const arrays[] = {model, tuned, base, forget, retain};
    for (int a = 0; a < 5; a++)
        for (size_t i = 0; i < N; i++) {
            uint64_t r = next_random(&seed);
            float size = r % 3 == 0 ? 0x1p-130f : r % 3 == 1 ? 0x1p-70f : 1;
            arrays[a][i] = ((float)(r >> 40) * 0x1p-24f - 0.5f) * size;
        }
}

static void edit(struct results *r, bool reference)
{
    const struct perta_rule rule = {.method = PERTA_FISHER};
    const struct perta_edit_in in = {.model = {PERTA_F32, model},
                                     .tuned = {PERTA_F32, tuned},
                                     .base = {PERTA_F32, base},
                                     .forget = {PERTA_F32, forget},
                                     .retain = {PERTA_F32, retain},
                                     .n = N};
    const float alpha = 0.7f;
    void *const outs[] = {r->out};
    (reference ? perta_edit_reference : perta_edit)(&rule, &in, &alpha, 1, outs, &r->counts);
}

static void lora(struct results *r, bool reference)
{
    const struct perta_lora low = {
        .rows = tuned, .columns = base, .r = 4, .width = N / 4, .scaling = 0.3f};
    (reference ? perta_lora_tau_reference : perta_lora_tau)(&low, 0, N, r->tau);
}

static void running_means(struct results *r)
{
    static float sums[4][N];
    struct perta_running running = {sums[0], sums[1], sums[2], sums[3], N};
    const struct perta_view samples[] = {{PERTA_F32, forget}, {PERTA_F32, retain}};
    perta_running_zero(&running);
    for (int i = 0; i < 6; i++)
        r->bad = perta_running_add(&running, &samples[i % 2]);
    perta_running_finish(&running, 6, r->mean, r->meansq);
}

static void compute(struct results *r, int what)
{
    memset(r, 0, sizeof *r);
    switch (what / 2) {
    case 0:
        edit(r, what % 2);
        break;
    case 1:
        lora(r, what % 2);
        break;
    default:
        running_means(r);
    }
}

START_TEST(kernels_give_the_same_bits_in_every_environment_and_leave_it)
{
    static struct results want, have;
    fill_inputs();
    for (int what = 0; what < 5; what++) {
        compute(&want, what);
        for (unsigned i = 0; i < N_STRANGE_FP; i++) {
            strange_fp_set(i);
            unsigned before = strange_fp_state();
            compute(&have, what);
            unsigned after = strange_fp_state();
            strange_fp_set(0);
            ck_assert_uint_eq(after, before);
            ck_assert_msg(!memcmp(&have, &want, sizeof want), "%d in environment %u", what, i);
        }
    }
}
END_TEST

START_TEST(numbers_are_spelled_the_same_in_every_environment)
{
    for (unsigned i = 0; i < N_STRANGE_FP; i++) {
        json_t *real = json_real(0.30000000000000004), *tiny = json_real(5e-324);
        strange_fp_set(i);
        unsigned before = strange_fp_state();
        char *text = perta_canonical_json(real), *tiny_text = perta_canonical_json(tiny);
        unsigned after = strange_fp_state();
        strange_fp_set(0);
        ck_assert_uint_eq(after, before);
        ck_assert_str_eq(text, "0.30000000000000004");
        ck_assert_str_eq(tiny_text, "5e-324");
        free(text);
        free(tiny_text);
        json_decref(real);
        json_decref(tiny);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("fpenv");
    tcase_add_test(tests, kernels_give_the_same_bits_in_every_environment_and_leave_it);
    tcase_add_test(tests, numbers_are_spelled_the_same_in_every_environment);
    return run_suite("fpenv", tests);
}
