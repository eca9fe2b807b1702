/* The parts of a block and cross-entropy, of the CPU's backend against the reference's: the same bits
 * where both do the same arithmetic, else within what rounding can do (test_backend.c). Formulas are
 * checked in test_ops.c. */
#include "tests/backends.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

/* ---- RMSNorm ---- */

struct norm {
    size_t T, H;
    struct pair x, weight, dy, dx, dweight;
};

#define EPS 1e-2f

static void norm_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct norm *c = ctx;
    size_t T = c->T, H = c->H;
    struct perta_array x = input(be, o, c->x.f, T * H), w = input(be, o, c->weight.f, H);
    struct perta_array dy = input(be, o, c->dy.f, T * H);
    struct perta_array y = output(be, o, "y", F32, NULL, T * H);
    struct perta_array rstd = output(be, o, "rstd", F32, NULL, T);
    struct perta_array dx = output(be, o, "dx", F32, c->dx.f, T * H);
    struct perta_array dweight = output(be, o, "dweight", F32, c->dweight.f, H);
    begin(be);
    be->ops->rmsnorm_forward(be, y, rstd, x, w, T, H, EPS);
    be->ops->rmsnorm_backward(be, dx, dy, x, rstd, w, T, H);
    be->ops->rmsnorm_backward_weight(be, dweight, dy, x, rstd, T, H);
}

/* Magnitudes of the terms of dx: its own, dy w r, and x r^3 / H times the sum of dy w x. */
static double *norm_terms(const struct norm *c, const double *rstd)
{
    size_t H = c->H;
    double *terms = alloc(c->T * H * sizeof *terms);
    for (size_t t = 0; t < c->T; t++) {
        double sum = 0, r = rstd[t];
        for (size_t i = t * H; i < (t + 1) * H; i++)
            sum += fabs(c->dy.d[i] * c->weight.d[i - t * H] * c->x.d[i]);
        for (size_t i = t * H; i < (t + 1) * H; i++)
            terms[i] = fabs(c->dx.d[i]) + fabs(c->dy.d[i] * c->weight.d[i - t * H]) * r +
                       sum * r * r * r * fabs(c->x.d[i]) / (double)H;
    }
    return terms;
}

static const size_t norm_shapes[][2] = {{1, 1}, {1, 33}, {31, 300}, {257, 128}};

/* rstd: the mean, the sum with eps, the root of both (half), the quotient. y: two products more. dx: rstd
 * differs, three times in its third term; that has six roundings besides and the sum two. Each: the
 * reference's. */
START_TEST(rmsnorm)
{
    size_t T = norm_shapes[_i][0], H = norm_shapes[_i][1];
    struct norm c = {T, H, pair(T * H, 1), pair(H, 2), pair(T * H, 3), pair(T * H, 4), pair(H, 5)};
    struct outputs o[N_BACKENDS], most;
    run_all(norm_run, &c, o);
    run_magnitudes(norm_run, &c, &most);
    double *terms = norm_terms(&c, values(&o[REFERENCE], "rstd"));
    within(o, "rstd", 3 + 1, values(&most, "rstd"));
    within(o, "y", 5 + 1, values(&most, "y"));
    within(o, "dx", 3 * 4 + 6 + 2 + 1, terms);
    within(o, "dweight", 4 + 3 + 1, values(&most, "dweight"));
    free(terms);
    drop_all(o);
    drop(&most);
    struct pair all[] = {c.x, c.weight, c.dy, c.dx, c.dweight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}
END_TEST

/* ---- rotary positions: the reference is float32 too ---- */

#define ROPE_T 31
#define ROPE_HEADS 3
#define ROPE_D 8

static void rope_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    static const float inv_freq[ROPE_D / 2] = {1, 0.1f, 0.01f, 0.001f};
    struct perta_place places[ROPE_T];
    for (uint32_t t = 0; t < ROPE_T; t++)
        places[t] = (struct perta_place){.position = t * t};
    struct perta_array there = output(be, o, "there", F32, x->f, x->n);
    struct perta_array back = output(be, o, "back", F32, x->f, x->n);
    begin(be);
    be->ops->rope_forward(be, there, places, inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
    be->ops->rope_backward(be, back, places, inv_freq, ROPE_T, ROPE_HEADS, ROPE_D);
}

START_TEST(rope)
{
    struct pair x = pair(ROPE_T * ROPE_HEADS * ROPE_D, 1);
    struct outputs o[N_BACKENDS];
    run_all(rope_run, &x, o);
    same(o, "there");
    same(o, "back");
    drop_all(o);
    release(x);
}
END_TEST

/* ---- SwiGLU ---- */

struct swiglu {
    struct pair gate, up, dh;
};

static void swiglu_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct swiglu *c = ctx;
    size_t n = c->dh.n;
    struct perta_array gate = input(be, o, c->gate.f, n), up = input(be, o, c->up.f, n);
    struct perta_array h = output(be, o, "h", F32, NULL, n);
    struct perta_array dup = output(be, o, "dup", F32, NULL, n);
    struct perta_array dgate = output(be, o, "dgate", F32, c->dh.f, n); /* in place of dh */
    begin(be);
    be->ops->swiglu_forward(be, h, gate, up, n);
    be->ops->swiglu_backward(be, dgate, dup, dgate, gate, up, n);
}

/* An exponential is wrong by 3 (test_ops.c), so sigmoid by 5, and 1 - sigmoid by 6, not of itself but of
 * 1. */
START_TEST(swiglu)
{
    const size_t n = 100003; /* more pieces than one */
    struct swiglu c = {pair(n, 1), pair(n, 2), pair(n, 3)};
    struct outputs o[N_BACKENDS];
    double *h = alloc(n * sizeof *h), *dgate = alloc(n * sizeof *dgate);
    double *dup = alloc(n * sizeof *dup);
    for (size_t i = 0; i < n; i++) {
        c.gate.d[i] = (double)(c.gate.f[i] *= 20);
        h[i] = fabs(c.gate.d[i] / (1 + exp(-c.gate.d[i])) * c.up.d[i]);
        dup[i] = fabs(c.gate.d[i] / (1 + exp(-c.gate.d[i])) * c.dh.d[i]);
        dgate[i] = fabs(c.dh.d[i] * c.up.d[i]) * (1 + fabs(c.gate.d[i]));
    }
    run_all(swiglu_run, &c, o);
    within(o, "h", 5 + 1 + 1, h);
    within(o, "dup", 5 + 2 + 1, dup);
    within(o, "dgate", 16 + 1, dgate);
    drop_all(o);
    double *const mine[] = {h, dup, dgate};
    struct pair all[] = {c.gate, c.up, c.dh};
    for (size_t i = 0; i < 3; i++) {
        free(mine[i]);
        release(all[i]);
    }
}
END_TEST

/* ---- cross-entropy, in blocks of the vocabulary ---- */

#define CE_N 31
#define CE_V 257
#define CE_ROWS 100
#define CE_RANGE 18.0 /* of logits, from the largest */

struct cross_entropy {
    struct pair logits, share;
    int32_t target[CE_N];
};

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
    static const char *const names[] = {"d0", "d1", "d2"};
    float least[CE_N], block[CE_N * CE_ROWS];
    double sums[CE_N] = {0};
    struct perta_array blocks[3];
    size_t rows[3];
    for (size_t i = 0; i < CE_N; i++)
        least[i] = -INFINITY;
    for (size_t b = 0; b < 3; b++) {
        rows[b] = block_of(c, b * CE_ROWS, block);
        blocks[b] = output(be, o, names[b], F32, block, CE_N * rows[b]);
    }
    struct perta_array most = output(be, o, "most", F32, least, CE_N);
    struct perta_array sum = output(be, o, "sums", F64, sums, CE_N);
    struct perta_array of_target = output(be, o, "of_target", F32, NULL, CE_N);
    struct perta_array high = output(be, o, "high", F32, least, CE_N);
    struct perta_array best = output(be, o, "best", I32, NULL, CE_N);
    struct perta_array share = input(be, o, c->share.f, CE_N);
    begin(be);
    for (size_t b = 0; b < 3; b++) {
        be->ops->cross_entropy_forward(be, blocks[b], b * CE_ROWS, rows[b], CE_N, c->target, most,
                                       sum, of_target);
        be->ops->best_forward(be, blocks[b], b * CE_ROWS, rows[b], CE_N, high, best);
    }
    for (size_t b = 0; b < 3; b++)
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

/* An exponential is wrong by 3, its argument by CE_RANGE; share by that and a quotient. */
START_TEST(cross_entropy)
{
    struct cross_entropy c = {pair(CE_N * CE_V, 1), pair(CE_N, 2), {0}};
    struct outputs o[N_BACKENDS];
    for (size_t i = 0; i < CE_N; i++)
        c.target[i] = (int32_t)(i * i % CE_V);
    for (size_t i = 0; i < CE_N * CE_V; i++)
        c.logits.d[i] = (double)(c.logits.f[i] = roundf(c.logits.f[i] * 36) / 4); /* with equals */
    run_all(cross_entropy_run, &c, o);
    same(o, "most");
    same(o, "of_target");
    same(o, "high");
    same(o, "best");
    within(o, "sums", CE_RANGE + 3, values(&o[REFERENCE], "sums"));
    for (size_t b = 0; b < 3; b++) {
        const char *const names[] = {"d0", "d1", "d2"};
        size_t rows = b < 2 ? CE_ROWS : CE_V - 2 * CE_ROWS;
        double *terms = entropy_terms(&c, &o[REFERENCE], b * CE_ROWS, rows);
        within(o, names[b], 2 * (CE_RANGE + 3) + 3 + 1, terms);
        free(terms);
    }
    drop_all(o);
    release(c.logits);
    release(c.share);
}
END_TEST

/* ---- attention ---- */

enum seen { BEFORE, HOLES }; /* HOLES: every fifth token is hidden, the first two among them */

struct attention {
    size_t n_sequences, lengths[3], n_heads, n_kv_heads, D;
    uint32_t window;
    enum seen seen;
    struct pair q, k, v, dout;
    bool ones; /* dout is */
};

/* Hidden tokens stand last, and see those before them, or nothing. */
static void place_tokens(struct perta_place *places, uint32_t T, enum seen seen)
{
    uint32_t n = 0, n_seen = 0;
    for (uint32_t t = 0; t < T; t++)
        if (seen == BEFORE || (t > 1 && t % 5 != 4)) {
            places[n] = (struct perta_place){t, t, 0, n + 1};
            n++;
        }
    for (uint32_t t = 0; seen == HOLES && t < T; t++) {
        bool hidden = t <= 1 || t % 5 == 4;
        n_seen += !hidden;
        if (hidden)
            places[n++] = (struct perta_place){t, t, 0, n_seen};
    }
}

static size_t tokens_of(const struct attention *c)
{
    size_t n = 0;
    for (size_t s = 0; s < c->n_sequences; s++)
        n += c->lengths[s];
    return n;
}

static void attention_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct attention *c = ctx;
    size_t starts[4] = {5}, n = tokens_of(c), m = n * c->n_kv_heads * c->D;
    struct perta_place *places = alloc(n * sizeof *places);
    float *ones = alloc(c->dout.n * sizeof *ones);
    for (size_t s = 0; s < c->n_sequences; s++) {
        place_tokens(places + starts[s] - 5, (uint32_t)c->lengths[s], c->seen);
        starts[s + 1] = starts[s] + c->lengths[s];
    }
    for (size_t i = 0; i < c->dout.n; i++)
        ones[i] = 1;
    n *= c->n_heads * c->D;
    const struct perta_attention a = {
        {c->n_sequences, starts, 5}, places, c->n_heads, c->n_kv_heads, c->D, c->window};
    struct perta_array q = as_is(be, o, c->q.f, n), k = as_is(be, o, c->k.f, m);
    struct perta_array v = input(be, o, c->v.f, m);
    struct perta_array dout = input(be, o, c->ones ? ones : c->dout.f, n);
    struct perta_array out = output(be, o, "out", F32, NULL, n);
    struct perta_array dq = output(be, o, "dq", F32, NULL, n);
    struct perta_array dk = output(be, o, "dk", F32, NULL, m);
    struct perta_array dv = output(be, o, "dv", F32, NULL, m);
    const struct perta_array heads[2] = {buffer(be, o, n * 4), buffer(be, o, n * 4)};
    begin(be);
    be->ops->attention_forward(be, &a, out, q, k, v);
    be->ops->attention_backward(be, &a, dq, dk, dv, dout, q, k, v, heads);
    ck_assert_int_eq(be->rc != 0, broken);
    free(places);
    free(ones);
}

static const struct attention attentions[] = {
    {1, {1}, 2, 1, 4, UINT32_MAX, BEFORE, .ones = false},
    {1, {31}, 8, 2, 6, UINT32_MAX, BEFORE, .ones = false},
    {2, {33, 1}, 4, 4, 8, 7, BEFORE, .ones = false},
    {3, {65, 31, 131}, 4, 1, 8, UINT32_MAX, HOLES, .ones = false},
    {1, {257}, 2, 1, 4, 64, BEFORE, .ones = false},
    {3, {2, 100, 9}, 4, 2, 4, 5, HOLES, .ones = false},
};

#define Q_MOST 2.0 /* magnitudes of q; of k, v and dout: 1 */

/* A score's D products, its factor and its root: wrong by D + 4 times the sum of magnitudes, Q_MOST
 * sqrt(D); less the largest, of a range of twice that, once more. A probability by twice a score (its
 * own and the sum's), exponentials, the quotient's two: */
static double probability_units(double D)
{
    return 2 * ((D + 4) * Q_MOST * sqrt(D) + 2 * Q_MOST * sqrt(D)) + 2 * 3 + 2;
}

/* dp is wrong by D + 1 times M, the largest sum of |dout v|, D at most; its mean by that, by p's error,
 * and two; their difference is at most 2 M. So ds is wrong by p M times so much: */
static double score_units(double D)
{
    return 3 * probability_units(D) + 2 * D + 7;
}

static double *scaled(const double *of, size_t n, double by)
{
    double *to = alloc(n * sizeof *to);
    for (size_t i = 0; i < n; i++)
        to[i] = (of ? of[i] : 1) * by;
    return to;
}

START_TEST(attention)
{
    struct attention c = attentions[_i], ones;
    struct outputs o[N_BACKENDS], most, weights;
    size_t tokens = tokens_of(&c), n = tokens * c.n_heads * c.D, m = tokens * c.n_kv_heads * c.D;
    double D = (double)c.D, p = probability_units(D), ds = score_units(D), T = 0, M = D;
    for (size_t s = 0; s < c.n_sequences; s++)
        T = fmax(T, (double)c.lengths[s]);
    double rows = T * (double)(c.n_heads / c.n_kv_heads); /* that see a key */
    c.q = pair(n, 1);
    c.k = pair(m, 2);
    c.v = pair(m, 3);
    c.dout = pair(n, 4);
    for (size_t i = 0; i < n; i++)
        c.q.f[i] *= (float)Q_MOST;
    ones = c;
    ones.ones = true;
    run_all(attention_run, &c, o);
    run_magnitudes(attention_run, &c, &most);
    run_magnitudes(attention_run, &ones, &weights); /* its dv: of a key, the sum of p */
    double *dq = scaled(NULL, n, M / sqrt(D));
    double *dk = scaled(values(&weights, "dv"), m, Q_MOST * M / sqrt(D));
    within(o, "out", p + T + 1, values(&most, "out"));
    within(o, "dv", p + rows + 2, values(&most, "dv"));
    within(o, "dq", ds + 2 * (T + 3) + 2, dq);
    within(o, "dk", ds + 2 * (rows + 3) + 2, dk);
    free(dq);
    free(dk);
    drop_all(o);
    drop(&most);
    drop(&weights);
    struct pair all[] = {c.q, c.k, c.v, c.dout};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}
END_TEST

START_TEST(a_token_that_sees_nothing_gets_zeros)
{
    struct attention c = {1, {9}, 2, 1, 4, UINT32_MAX, HOLES, .ones = false};
    struct outputs o[N_BACKENDS];
    c.q = pair(72, 1);
    c.k = pair(36, 2);
    c.v = pair(36, 3);
    c.dout = pair(72, 4);
    run_all(attention_run, &c, o);
    for (int b = REFERENCE; b <= ONE; b++) /* the first hidden one is row 6 of 9 */
        for (size_t i = 48; i < 56; i++)
            ck_assert(values(&o[b], "out")[i] == 0 && values(&o[b], "dq")[i] == 0);
    drop_all(o);
    struct pair all[] = {c.q, c.k, c.v, c.dout};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, rmsnorm, 0, sizeof norm_shapes / sizeof *norm_shapes);
    tcase_add_test(tests, rope);
    tcase_add_test(tests, swiglu);
    tcase_add_test(tests, cross_entropy);
    tcase_add_loop_test(tests, attention, 0, sizeof attentions / sizeof *attentions);
    tcase_add_test(tests, a_token_that_sees_nothing_gets_zeros);
    return run_suite("backend_block", tests);
}
