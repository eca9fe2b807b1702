/* Rotary positions and cross-entropy on both backends: against a forward pass in double
 * (llm_double.h), every backward pass against its finite differences; and the CPU's against the
 * reference's, the same bits where both do the same arithmetic, else within what rounding can do
 * (test_backend.c). */
#include "tests/backends.h"
#include "tests/llm_double.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

/* ---- rotary positions: the reference is float32 too ---- */

#define ROPE_T 31
#define ROPE_HEADS 3
#define ROPE_D 8

static const float inv_freq[ROPE_D / 2] = {1, 0.1f, 0.01f, 0.001f};

/* Whole heads, parts of heads, the end of heads; halves and neighbours; scaled. */
static const float long_inv_freq[ROPE_D / 2] = {0.5f, 0.05f, 0.02f, 0.003f};
static const struct perta_rotation rotations[] = {
    {inv_freq, 0, ROPE_D, false, 1, long_inv_freq, 1.5f},
    {inv_freq, 0, ROPE_D, true, 1, long_inv_freq, 1.5f},
    {inv_freq, 0, 4, false, 1, long_inv_freq, 1.5f},
    {inv_freq, 0, 6, true, 1.25f, long_inv_freq, 1.5f},
    {inv_freq, 2, 6, false, 0.8125f, long_inv_freq, 1.5f},
    {inv_freq, 4, 4, true, 1, long_inv_freq, 1.5f},
    {inv_freq, 3, 2, false, 1, long_inv_freq, 1.5f},
    {inv_freq, 0, ROPE_D, false, 1.1386294f, long_inv_freq, 1.5f},
};

struct rope {
    struct pair x, dy;
    struct perta_place places[ROPE_T];
    const struct perta_rotation *rotation;
};

static void rope_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct rope *c = ctx;
    struct perta_array y = output(be, o, "y", F32, c->x.f, c->x.n);
    struct perta_array dx = output(be, o, "dx", F32, c->dy.f, c->dy.n);
    begin(be);
    be->ops->rope_forward(be, y, c->places, c->rotation, ROPE_T, ROPE_HEADS, ROPE_D);
    be->ops->rope_backward(be, dx, c->places, c->rotation, ROPE_T, ROPE_HEADS, ROPE_D);
}

static double rope_value(void *ctx)
{
    const struct rope *c = ctx;
    double y[ROPE_T * ROPE_HEADS * ROPE_D];
    memcpy(y, c->x.d, sizeof y);
    rope_double(y, c->places, c->rotation, ROPE_T, ROPE_HEADS, ROPE_D);
    return dot(y, c->dy.d, c->dy.n);
}

START_TEST(rope)
{
    const size_t n = ROPE_T * ROPE_HEADS * ROPE_D;
    struct rope c = {pair(n, 1), pair(n, 2), {{0}}, &rotations[_i]};
    struct outputs o[N_BACKENDS];
    double y[ROPE_T * ROPE_HEADS * ROPE_D];
    for (uint32_t t = 0; t < ROPE_T; t++)
        c.places[t] = (struct perta_place){.position = t * t % 41, .is_long = t % 3 == 1};
    run_all(rope_run, &c, o);
    same(o, "y");
    same(o, "dx");
    memcpy(y, c.x.d, sizeof y);
    rope_double(y, c.places, c.rotation, ROPE_T, ROPE_HEADS, ROPE_D);
    both_are(o, "y", y);
    both_gradients(o, "dx", false, c.x.d, rope_value, &c);
    drop_all(o);
    release(c.x);
    release(c.dy);
}
END_TEST

/* ---- soft caps of logits ---- */

#define CAP_N 70001 /* more than a piece of the CPU's */
#define CAP 3.0f

struct softcap {
    struct pair x, dy;
};

static void softcap_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct softcap *c = ctx;
    struct perta_array y = output(be, o, "y", F32, c->x.f, CAP_N);
    struct perta_array dx = output(be, o, "dx", F32, c->dy.f, CAP_N);
    begin(be);
    be->ops->softcap_forward(be, y, CAP, CAP_N);
    be->ops->softcap_backward(be, dx, y, CAP, CAP_N);
}

static double softcap_value(void *ctx)
{
    const struct softcap *c = ctx;
    double sum = 0;
    for (size_t i = 0; i < CAP_N; i++)
        sum += c->dy.d[i] * (double)CAP * tanh(c->x.d[i] / (double)CAP);
    return sum;
}

/* y: a quotient, the hyperbolic tangent's 3 units, a product; dx: y's square and its own, of terms
 * up to 1. */
START_TEST(softcap)
{
    struct softcap c = {pair(CAP_N, 1), pair(CAP_N, 2)};
    struct outputs o[N_BACKENDS];
    double *want = alloc(CAP_N * sizeof *want), *size = alloc(CAP_N * sizeof *size);
    for (size_t i = 0; i < CAP_N; i++) {
        c.x.d[i] = (double)(c.x.f[i] *= 9);
        want[i] = (double)CAP * tanh(c.x.d[i] / (double)CAP);
    }
    run_all(softcap_run, &c, o);
    for (size_t i = 0; i < CAP_N; i++)
        size[i] = fabs(want[i]);
    within(o, "y", 6, size);
    for (size_t i = 0; i < CAP_N; i++)
        size[i] = fabs(c.dy.d[i]);
    within(o, "dx", 2 * 6 + 5, size);
    both_are(o, "y", want);
    both_gradients(o, "dx", false, c.x.d, softcap_value, &c);
    free(want);
    free(size);
    drop_all(o);
    release(c.x);
    release(c.dy);
}
END_TEST

/* ---- cross-entropy, in blocks of the vocabulary ---- */

#define CE_N 31
#define CE_V 257
#define CE_ROWS 100
#define CE_BLOCKS 3
#define CE_RANGE 18.0 /* of logits, from the largest */

struct cross_entropy {
    struct pair logits, share;
    int32_t target[CE_N];
};

static const char *const ce_names[CE_BLOCKS] = {"d0", "d1", "d2"};

/* Columns row .. of all logits. */
static size_t block_of(const struct cross_entropy *c, size_t row, float *to)
{
    size_t rows = CE_V - row < CE_ROWS ? CE_V - row : CE_ROWS;
    for (size_t i = 0; i < CE_N; i++)
        memcpy(to + i * rows, c->logits.f + i * CE_V + row, rows * sizeof *to);
    return rows;
}

static void cross_entropy_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct cross_entropy *c = ctx;
    float least[CE_N], block[CE_N * CE_ROWS];
    double sums[CE_N] = {0}, none[2 * CE_N] = {0};
    struct perta_array blocks[CE_BLOCKS];
    size_t rows[CE_BLOCKS];
    for (size_t i = 0; i < CE_N; i++)
        least[i] = -INFINITY;
    for (size_t b = 0; b < CE_BLOCKS; b++) {
        rows[b] = block_of(c, b * CE_ROWS, block);
        blocks[b] = output(be, o, ce_names[b], F32, block, CE_N * rows[b]);
    }
    struct perta_array most = output(be, o, "most", F32, least, CE_N);
    struct perta_array sum = output(be, o, "sums", F64, sums, CE_N);
    struct perta_array of_target = output(be, o, "of_target", F32, NULL, CE_N);
    struct perta_array high = output(be, o, "high", F32, least, CE_N);
    struct perta_array best = output(be, o, "best", I32, NULL, CE_N);
    struct perta_array share = input(be, o, c->share.f, CE_N);
    struct perta_array moments = output(be, o, "moments", F64, none, 2 * CE_N);
    begin(be);
    for (size_t b = 0; b < CE_BLOCKS; b++) {
        be->ops->moments_forward(be, blocks[b], rows[b], CE_N, most, sum, moments);
        be->ops->cross_entropy_forward(be, blocks[b], b * CE_ROWS, rows[b], CE_N, c->target, most,
                                       sum, of_target);
        be->ops->best_forward(be, blocks[b], b * CE_ROWS, rows[b], CE_N, high, best);
    }
    for (size_t b = 0; b < CE_BLOCKS; b++)
        be->ops->cross_entropy_backward(be, blocks[b], b * CE_ROWS, rows[b], CE_N, c->target, most,
                                        sum, share);
}

/* Magnitudes of the two terms of a block's gradients. */
static double *entropy_terms(const struct cross_entropy *c, const struct outputs *o, size_t row,
                             size_t rows)
{
    double *terms = alloc(CE_N * rows * sizeof *terms);
    for (size_t i = 0; i < CE_N; i++)
        for (size_t j = 0; j < rows; j++) {
            double p =
                exp(c->logits.d[i * CE_V + row + j] - values(o, "most")[i]) / values(o, "sums")[i];
            terms[i * rows + j] = fabs(c->share.d[i]) * (p + (row + j == (size_t)c->target[i]));
        }
    return terms;
}

static double cross_entropy_value(void *ctx)
{
    const struct cross_entropy *c = ctx;
    double sum = 0;
    for (size_t i = 0; i < CE_N; i++)
        sum += c->share.d[i] *
               cross_entropy_double(c->logits.d + i * CE_V, CE_V, (size_t)c->target[i]);
    return sum;
}

/* Of one backend: the sums of e^d d and e^d d^2. */
static void check_moments(const struct cross_entropy *c, const struct outputs *o)
{
    for (size_t i = 0; i < CE_N; i++) {
        double want[2] = {0};
        for (size_t v = 0; v < CE_V; v++) {
            double d = c->logits.d[i * CE_V + v] - values(o, "most")[i];
            want[0] += exp(d) * d;
            want[1] += exp(d) * d * d;
        }
        for (size_t k = 0; k < 2; k++)
            ck_assert_double_lt(fabs(values(o, "moments")[2 * i + k] / want[k] - 1), 1e-6);
    }
}

/* Of one backend: the loss, and its gradient. */
static void check_entropy(struct cross_entropy *c, const struct outputs *o)
{
    float *d = alloc(CE_N * CE_V * sizeof *d);
    double loss = 0;
    for (size_t i = 0; i < CE_N; i++) {
        loss += c->share.d[i] *
                (values(o, "most")[i] - values(o, "of_target")[i] + log(values(o, "sums")[i]));
        for (size_t v = 0; v < CE_V; v++) {
            size_t b = v / CE_ROWS, rows = named(o, ce_names[b])->n / CE_N;
            d[i * CE_V + v] = floats(o, ce_names[b])[i * rows + v % CE_ROWS];
        }
    }
    ck_assert_double_lt(fabs(loss / cross_entropy_value(c) - 1), TOLERANCE);
    is_gradient("dlogits", d, c->logits.d, CE_N * CE_V, CE_N * CE_V / LOOKED_AT + 1,
                cross_entropy_value, c);
    free(d);
}

/* An exponential is wrong by 3, its argument by CE_RANGE; share by that and a quotient; moments by
 * that and twice the argument's rounding. */
START_TEST(cross_entropy)
{
    struct cross_entropy c = {pair(CE_N * CE_V, 1), pair(CE_N, 2), {0}};
    struct outputs o[N_BACKENDS];
    double magnitude[2 * CE_N];
    for (size_t i = 0; i < CE_N; i++) /* in every block, at their ends too */
        c.target[i] = (int32_t)(i < 3 ? i * CE_ROWS : i < 5 ? (i - 2) * CE_ROWS - 1 : i * i % CE_V);
    for (size_t i = 0; i < CE_N * CE_V; i++)
        c.logits.d[i] = (double)(c.logits.f[i] = roundf(c.logits.f[i] * 36) / 4); /* with equals */
    run_all(cross_entropy_run, &c, o);
    same(o, "most");
    same(o, "of_target");
    same(o, "high");
    same(o, "best");
    within(o, "sums", CE_RANGE + 3, values(&o[REFERENCE], "sums"));
    for (size_t b = 0; b < CE_BLOCKS; b++) {
        double *terms =
            entropy_terms(&c, &o[REFERENCE], b * CE_ROWS, named(&o[ONE], ce_names[b])->n / CE_N);
        within(o, ce_names[b], 2 * (CE_RANGE + 3) + 3 + 1, terms);
        free(terms);
    }
    for (size_t i = 0; i < 2 * CE_N; i++)
        magnitude[i] = fabs(values(&o[REFERENCE], "moments")[i]);
    within(o, "moments", CE_RANGE + 3 + 2, magnitude);
    check_moments(&c, &o[REFERENCE]);
    check_moments(&c, &o[ONE]);
    check_entropy(&c, &o[REFERENCE]);
    check_entropy(&c, &o[ONE]);
    drop_all(o);
    release(c.logits);
    release(c.share);
}
END_TEST

static const float known[] = {1000.3f, 991.1f, 990.7f, -3};

static void known_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const float least = -INFINITY, half = 0.5f;
    const double none = 0;
    static const int32_t target[] = {0};
    struct perta_array most = output(be, o, "most", F32, &least, 1);
    struct perta_array sum = output(be, o, "sums", F64, &none, 1);
    struct perta_array of_target = output(be, o, "of_target", F32, NULL, 1);
    struct perta_array d = output(be, o, "d", F32, known, 4);
    (void)ctx;
    be->ops->cross_entropy_forward(be, d, 0, 4, 1, target, most, sum, of_target);
    be->ops->cross_entropy_backward(be, d, 0, 4, 1, target, most, sum, input(be, o, &half, 1));
}

/* Nearly certain, with large logits: what is left of its gradient is not lost. */
START_TEST(cross_entropy_of_what_is_known)
{
    double rest = 0, want[4];
    for (int i = 1; i < 4; i++)
        rest += want[i] = exp((double)known[i] - (double)known[0]);
    want[0] = -rest;
    for (int b = 0; b < N_BACKENDS; b++) {
        struct outputs o;
        run_on(backends[b], known_run, NULL, &o);
        for (int i = 0; i < 4; i++)
            ck_assert_double_lt(fabs(values(&o, "d")[i] - 0.5 * want[i] / (1 + rest)), 2e-3 * rest);
        drop(&o);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, rope, 0, sizeof rotations / sizeof *rotations);
    tcase_add_test(tests, softcap);
    tcase_add_test(tests, cross_entropy);
    tcase_add_test(tests, cross_entropy_of_what_is_known);
    return run_suite("backend_block", tests);
}
