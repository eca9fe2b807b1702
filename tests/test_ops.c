/* Every operation's backward pass, and attention's, against finite differences of a forward pass
 * in double (llm_double.h). */
#include "estimators/compute/ops.h"

#include "estimators/compute/kernels.h"
#include "estimators/model/config.h"
#include "io/isa.h"
#include "tests/gradient.h"
#include "tests/llm_double.h"

static struct perta_err err;
static struct perta_workers *workers;
static struct perta_gemm *gemm;

#define LONGEST 131 /* of the sequences below */

static void open_workers(void)
{
    ck_assert_ok(perta_workers_open(3, &workers, &err));
    ck_assert_ok(perta_gemm_open(false, workers, 0, perta_attention_room(LONGEST), &gemm, &err));
}

static void close_workers(void)
{
    perta_gemm_close(gemm);
    perta_workers_close(workers);
}

/* ---- RMSNorm ---- */

#define NORM_T 5
#define NORM_H 12
#define EPS 1e-2f /* large enough to count */

struct norm {
    struct pair x, weight, dy;
};

static double norm_value(void *ctx)
{
    const struct norm *c = ctx;
    double y[NORM_T * NORM_H];
    rmsnorm_double(y, c->x.d, c->weight.d, NORM_T, NORM_H, (double)EPS);
    return dot(y, c->dy.d, c->dy.n);
}

START_TEST(rmsnorm)
{
    size_t n = NORM_T * NORM_H;
    struct norm c = {pair(n, 1), pair(NORM_H, 2), pair(n, 3)};
    float y[NORM_T * NORM_H], rstd[NORM_T], dx[NORM_T * NORM_H], dweight[NORM_H] = {0};
    double want[NORM_T * NORM_H];
    perta_rmsnorm_forward(workers, y, rstd, c.x.f, c.weight.f, NORM_T, NORM_H, EPS);
    rmsnorm_double(want, c.x.d, c.weight.d, NORM_T, NORM_H, (double)EPS);
    are_close("y", y, want, n);
    for (size_t i = 0; i < n; i++)
        dx[i] = 2; /* it adds */
    perta_rmsnorm_backward(workers, dx, c.dy.f, c.x.f, rstd, c.weight.f, NORM_T, NORM_H);
    for (size_t i = 0; i < n; i++)
        dx[i] -= 2;
    is_gradient("dx", dx, c.x.d, n, 1, norm_value, &c);
    perta_rmsnorm_backward_weight(workers, dweight, c.dy.f, c.x.f, rstd, NORM_T, NORM_H);
    is_gradient("dweight", dweight, c.weight.d, NORM_H, 1, norm_value, &c);
    release(c.x);
    release(c.weight);
    release(c.dy);
}
END_TEST

/* ---- rotary positions ---- */

#define ROPE_T 6
#define ROPE_HEADS 3
#define ROPE_D 8

static const struct perta_place rope_places[ROPE_T] = {{.position = 0}, {.position = 1},
                                                       {.position = 2}, {.position = 17},
                                                       {.position = 0}, {.position = 40}};

struct rope {
    struct pair x, dy;
    float inv_freq[ROPE_D / 2];
};

static double rope_value(void *ctx)
{
    const struct rope *c = ctx;
    double y[ROPE_T * ROPE_HEADS * ROPE_D];
    memcpy(y, c->x.d, sizeof y);
    rope_double(y, rope_places, c->inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
    return dot(y, c->dy.d, c->dy.n);
}

/* Frequencies by the formulas of transformers' modeling_rope_utils. */
static double frequency(const struct perta_rope *r, double i, double D)
{
    double f = pow(r->theta, -2 * i / D), wavelength = 2 * acos(-1) / f;
    if (r->kind == PERTA_ROPE_LINEAR)
        return f / r->factor;
    if (r->kind == PERTA_ROPE_DEFAULT || wavelength < r->original_positions / r->high_freq_factor)
        return f;
    if (wavelength > r->original_positions / r->low_freq_factor)
        return f / r->factor;
    double smooth = (r->original_positions / wavelength - r->low_freq_factor) /
                    (r->high_freq_factor - r->low_freq_factor);
    return (1 - smooth) * f / r->factor + smooth * f;
}

/* The last: frequencies that stay, one between, one that is divided. */
static const struct perta_rope ropes[] = {
    {.kind = PERTA_ROPE_DEFAULT, .theta = 1e4, .factor = 1},
    {.kind = PERTA_ROPE_LINEAR, .theta = 1e4, .factor = 4},
    {PERTA_ROPE_LLAMA3, 500, 8, 1, 4, 64},
};

START_TEST(rope)
{
    size_t n = ROPE_T * ROPE_HEADS * ROPE_D;
    struct rope c = {.x = pair(n, 4), .dy = pair(n, 5)};
    struct perta_llm llm = {.head_dim = ROPE_D, .rope = ropes[_i]};
    perta_rope_frequencies(&llm, c.inv_freq);
    double want[ROPE_D / 2];
    for (int i = 0; i < ROPE_D / 2; i++)
        want[i] = frequency(&llm.rope, i, ROPE_D);
    are_close("frequencies", c.inv_freq, want, ROPE_D / 2);
    for (int i = 0; i < ROPE_D / 2; i++)
        ck_assert_double_lt(fabs((double)c.inv_freq[i] / want[i] - 1), 1e-6);
    perta_rope_backward(workers, c.dy.f, rope_places, c.inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
    is_gradient("dx", c.dy.f, c.x.d, n, 1, rope_value, &c);
    double y[ROPE_T * ROPE_HEADS * ROPE_D];
    memcpy(y, c.x.d, sizeof y);
    rope_double(y, rope_places, c.inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
    perta_rope_forward(workers, c.x.f, rope_places, c.inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
    are_close("y", c.x.f, y, n);
    release(c.x);
    release(c.dy);
}
END_TEST

/* ---- SwiGLU ---- */

#define SWIGLU_N 40

struct swiglu {
    struct pair gate, up, dh;
};

static double swiglu_value(void *ctx)
{
    const struct swiglu *c = ctx;
    double h[SWIGLU_N];
    swiglu_double(h, c->gate.d, c->up.d, SWIGLU_N);
    return dot(h, c->dh.d, SWIGLU_N);
}

START_TEST(swiglu)
{
    struct swiglu c = {pair(SWIGLU_N, 6), pair(SWIGLU_N, 7), pair(SWIGLU_N, 8)};
    float h[SWIGLU_N], dup[SWIGLU_N], *dgate = c.dh.f; /* in place, as block.c does */
    double want[SWIGLU_N];
    for (size_t i = 0; i < SWIGLU_N; i++)
        c.gate.d[i] = (double)(c.gate.f[i] *= 6);
    perta_swiglu_forward(workers, h, c.gate.f, c.up.f, SWIGLU_N);
    swiglu_double(want, c.gate.d, c.up.d, SWIGLU_N);
    are_close("h", h, want, SWIGLU_N);
    perta_swiglu_backward(workers, dgate, dup, c.dh.f, c.gate.f, c.up.f, SWIGLU_N);
    is_gradient("dgate", dgate, c.gate.d, SWIGLU_N, 1, swiglu_value, &c);
    is_gradient("dup", dup, c.up.d, SWIGLU_N, 1, swiglu_value, &c);
    release(c.gate);
    release(c.up);
    release(c.dh);
}
END_TEST

/* ---- cross-entropy, in blocks of the vocabulary ---- */

#define CE_N 7
#define CE_V 37
#define CE_ROWS 10

/* In every block, at its ends too; one twice. */
static const int32_t ce_targets[CE_N] = {0, 9, 10, 25, 29, 36, 25};

struct cross_entropy {
    struct pair logits, share;
};

static double cross_entropy_value(void *ctx)
{
    const struct cross_entropy *c = ctx;
    double sum = 0;
    for (size_t i = 0; i < CE_N; i++)
        sum += c->share.d[i] *
               cross_entropy_double(c->logits.d + i * CE_V, CE_V, (size_t)ce_targets[i]);
    return sum;
}

static size_t copy_block(const struct cross_entropy *c, size_t row, float *to)
{
    size_t rows = CE_V - row < CE_ROWS ? CE_V - row : CE_ROWS;
    for (size_t i = 0; i < CE_N; i++)
        memcpy(to + i * rows, c->logits.f + i * CE_V + row, rows * sizeof *to);
    return rows;
}

/* Nearly certain, with large logits: what is left of its gradient is not lost. */
START_TEST(cross_entropy_of_what_is_known)
{
    const float begin[] = {1000.3f, 991.1f, 990.7f, -3}, share = 0.5f;
    float logits[4], most = -INFINITY, of_target;
    double sum = 0, rest = 0, want[4];
    const int32_t target = 0;
    memcpy(logits, begin, sizeof logits);
    perta_cross_entropy_forward(workers, logits, 0, 4, 1, &target, &most, &sum, &of_target);
    perta_cross_entropy_backward(workers, logits, 0, 4, 1, &target, &most, &sum, &share);
    for (int i = 1; i < 4; i++)
        rest += want[i] = exp((double)begin[i] - (double)begin[0]);
    want[0] = -rest;
    for (int i = 0; i < 4; i++)
        ck_assert_double_lt(fabs((double)logits[i] - 0.5 * want[i] / (1 + rest)), 2e-3 * rest);
}
END_TEST

START_TEST(cross_entropy)
{
    struct cross_entropy c = {pair(CE_N * CE_V, 9), pair(CE_N, 10)};
    float block[CE_N * CE_ROWS], most[CE_N], of_target[CE_N], d[CE_N * CE_V];
    double sums[CE_N] = {0}, loss = 0;
    for (size_t i = 0; i < CE_N * CE_V; i++)
        c.logits.d[i] = (double)(c.logits.f[i] *= 9); /* so that the maximum moves */
    for (size_t i = 0; i < CE_N; i++)
        most[i] = -INFINITY;
    for (size_t row = 0; row < CE_V; row += CE_ROWS) {
        size_t rows = copy_block(&c, row, block);
        perta_cross_entropy_forward(workers, block, row, rows, CE_N, ce_targets, most, sums,
                                    of_target);
    }
    for (size_t i = 0; i < CE_N; i++)
        loss += c.share.d[i] * ((double)(most[i] - of_target[i]) + log(sums[i]));
    ck_assert_double_lt(fabs(loss / cross_entropy_value(&c) - 1), TOLERANCE);
    for (size_t row = 0; row < CE_V; row += CE_ROWS) {
        size_t rows = copy_block(&c, row, block);
        perta_cross_entropy_backward(workers, block, row, rows, CE_N, ce_targets, most, sums,
                                     c.share.f);
        for (size_t i = 0; i < CE_N; i++)
            memcpy(d + i * CE_V + row, block + i * rows, rows * sizeof *d);
    }
    is_gradient("dlogits", d, c.logits.d, CE_N * CE_V, 1, cross_entropy_value, &c);
    release(c.logits);
    release(c.share);
}
END_TEST

/* ---- attention ---- */

enum seen { BEFORE, BLOCKS, HOLES };

struct shape {
    size_t T, n_heads, n_kv_heads, D;
    uint32_t window;
    enum seen seen;
};

struct attention {
    struct shape shape;
    struct perta_place places[LONGEST];
    struct pair q, k, v, dout;
};

/* Blocks of 30; or every fifth token is hidden, the first two among them, and stands last. */
static void place_tokens(const struct shape *s, struct perta_place *places)
{
    uint32_t n = 0, first = 0, n_seen = 0;
    for (uint32_t t = 0; t < s->T; t++) {
        first = s->seen == BLOCKS && t % 30 == 0 ? t : first;
        if (s->seen != HOLES || (t > 1 && t % 5 != 4)) {
            n++;
            places[n - 1] = (struct perta_place){t, t, first, n};
        }
    }
    for (uint32_t t = 0; s->seen == HOLES && t < s->T; t++) {
        bool hidden = t <= 1 || t % 5 == 4;
        n_seen += !hidden;
        if (hidden)
            places[n++] = (struct perta_place){t, t, 0, n_seen};
    }
}

static void attention_out(const struct attention *c, double *out)
{
    const struct shape *s = &c->shape;
    attention_double(out, c->q.d, c->k.d, c->v.d, c->places, s->T, s->n_heads, s->n_kv_heads, s->D,
                     s->window);
}

static double attention_value(void *ctx)
{
    const struct attention *c = ctx;
    double *out = alloc(c->dout.n * sizeof *out);
    attention_out(c, out);
    double value = dot(out, c->dout.d, c->dout.n);
    free(out);
    return value;
}

/* Longer than a block of query rows (64), and not; groups of 1 and 4 heads; windows that end
 * inside of a block, at one, and beyond the sequence. */
static const struct shape shapes[] = {
    {1, 4, 1, 4, UINT32_MAX, BEFORE},
    {9, 8, 2, 6, UINT32_MAX, BEFORE},
    {9, 2, 2, 4, 3, BEFORE},
    {70, 4, 1, 4, UINT32_MAX, BEFORE},
    {70, 4, 2, 2, 7, BEFORE},
    {LONGEST, 2, 1, 2, 64, BEFORE},
    {70, 2, 1, 2, 1, BEFORE},
    {70, 2, 1, 2, 100, BEFORE},
    {100, 4, 2, 2, UINT32_MAX, BLOCKS},
    {100, 2, 1, 2, 7, BLOCKS},
    {100, 4, 2, 2, UINT32_MAX, HOLES},
    {100, 2, 1, 2, 7, HOLES},
    {9, 4, 1, 2, 2, HOLES},
};

START_TEST(attention)
{
    const struct shape *s = &shapes[_i];
    size_t n = s->T * s->n_heads * s->D, m = s->T * s->n_kv_heads * s->D;
    size_t every = s->T < 20 ? 1 : 7;
    struct attention c = {*s, {{0}}, pair(n, 11), pair(m, 12), pair(m, 13), pair(n, 14)};
    for (size_t i = 0; i < n; i++)
        c.q.d[i] = (double)(c.q.f[i] *= 4); /* so that some keys count more than others */
    place_tokens(s, c.places);
    const size_t starts[] = {5, 5 + s->T}; /* of a batch that begins at token 5 */
    const struct perta_attention of = {{1, starts, 5}, c.places, s->n_heads,
                                       s->n_kv_heads,  s->D,     s->window};
    float *heads[] = {alloc(n * sizeof(float)), alloc(n * sizeof(float))};
    float *out = alloc(n * sizeof *out);
    float *dq = alloc(n * sizeof *dq), *dk = alloc(m * sizeof *dk), *dv = alloc(m * sizeof *dv);
    double *want = alloc(n * sizeof *want);
    ck_assert_ok(perta_attention_forward(gemm, &of, out, c.q.f, c.k.f, c.v.f, &err));
    attention_out(&c, want);
    are_close("out", out, want, n);
    memset(dk, 1, m * sizeof *dk); /* what stood there does not count */
    ck_assert_ok(perta_attention_backward(gemm, &of, dq, dk, dv, c.dout.f, c.q.f, c.k.f, c.v.f,
                                          heads, &err));
    if (s->T > 1 && s->window > 1) {
        is_gradient("dq", dq, c.q.d, n, every, attention_value, &c);
        is_gradient("dk", dk, c.k.d, m, every, attention_value, &c);
    } else /* a token that sees one: weight 1, whatever q and k */
        for (size_t i = 0; i < n; i++)
            ck_assert(dq[i] == 0 && dk[i % m] == 0);
    is_gradient("dv", dv, c.v.d, m, every, attention_value, &c);
    float *const mine[] = {heads[0], heads[1], out, dq, dk, dv};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        free(mine[i]);
    free(want);
    release(c.q);
    release(c.k);
    release(c.v);
    release(c.dout);
}
END_TEST

/* ---- kernels: the same bits for every instruction set; exponentials near libm's ---- */

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
    double sums[ROW] = {0}, numbers[4];
    for (size_t i = 0; i < ROW; i++)
        a.f[i] *= 40;
    numbers[0] = k->dot(a.f, b.f, ROW);
    numbers[1] = k->dot_of_product(a.f, b.f, c.f, ROW);
    numbers[2] = k->exponentials(y, a.f, 40, ROW);
    numbers[3] = k->sum_exponentials(a.f, k->largest(a.f, ROW, -1), ROW);
    uint64_t sum = mix(mix(0, numbers, sizeof numbers), y, sizeof y);
    k->add_products(sums, a.f, b.f, 0.3f, ROW);
    k->add(sums, c.f, ROW);
    k->add_squares(sums, a.f, ROW);
    ck_assert(!k->divide(z, sums, 3, ROW));
    sum = mix(sum, z, sizeof z);
    k->swiglu(y, a.f, b.f, ROW);
    sum = mix(mix(sum, sums, sizeof sums), y, sizeof y);
    k->swiglu_backward(y, z, y, a.f, b.f, ROW);
    sum = mix(mix(sum, y, sizeof y), z, sizeof z);
    k->softmax_backward(c.f, b.f, 0.1f, ROW);
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

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_workers, close_workers);
    tcase_add_test(tests, rmsnorm);
    tcase_add_loop_test(tests, rope, 0, sizeof ropes / sizeof *ropes);
    tcase_add_test(tests, swiglu);
    tcase_add_test(tests, cross_entropy);
    tcase_add_test(tests, cross_entropy_of_what_is_known);
    tcase_add_loop_test(tests, attention, 0, sizeof shapes / sizeof *shapes);
    tcase_add_test(tests, every_instruction_set_gives_the_same_bits);
    tcase_add_test(tests, exponentials_are_those_of_libm_to_three_units);
    return run_suite("ops", tests);
}
