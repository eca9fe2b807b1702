/* Attention on both backends, compared as test_backend_block.c does. */
#include "tests/backends.h"
#include "tests/llm_double.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

enum seen { BEFORE, BLOCKS, HOLES };

struct attention {
    size_t n_sequences, lengths[3], n_heads, n_kv_heads, D;
    uint32_t window;
    enum seen seen;
    struct pair q, k, v, dout;
    bool ones;                  /* dout is */
    struct perta_place *places; /* (tokens) */
};

/* What is before a token; blocks of 30 of it; or every fifth token is hidden, the first two among
 * them: these stand last, and see those before them, or nothing. */
static void place_tokens(struct perta_place *places, uint32_t T, enum seen seen)
{
    uint32_t n = 0, n_seen = 0;
    for (uint32_t t = 0; t < T; t++)
        if (seen != HOLES || (t > 1 && t % 5 != 4)) {
            places[n] = (struct perta_place){t, t, seen == BLOCKS ? t / 30 * 30 : 0, n + 1};
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
    size_t starts[4] = {5}, n = c->q.n, m = c->k.n; /* of a batch that begins at token 5 */
    float *ones = alloc(n * sizeof *ones);
    for (size_t s = 0; s < c->n_sequences; s++)
        starts[s + 1] = starts[s] + c->lengths[s];
    for (size_t i = 0; i < n; i++)
        ones[i] = 1;
    const struct perta_attention a = {
        {c->n_sequences, starts, 5}, c->places, c->n_heads, c->n_kv_heads, c->D, c->window};
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
    free(ones);
}

static void attention_out(const struct attention *c, double *out)
{
    size_t t = 0;
    for (size_t s = 0; s < c->n_sequences; t += c->lengths[s++]) {
        size_t q = t * c->n_heads * c->D, k = t * c->n_kv_heads * c->D;
        attention_double(out + q, c->q.d + q, c->k.d + k, c->v.d + k, c->places + t, c->lengths[s],
                         c->n_heads, c->n_kv_heads, c->D, c->window);
    }
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

/* Longer than a block of query rows (64), and not; groups of heads; windows that end inside of a
 * block, at one, and beyond the sequence; several sequences. */
static const struct attention attentions[] = {
    {1, {1}, 4, 1, 4, UINT32_MAX, .seen = BEFORE},
    {1, {31}, 8, 2, 6, UINT32_MAX, .seen = BEFORE},
    {1, {9}, 2, 2, 4, 3, .seen = BEFORE},
    {1, {70}, 2, 1, 2, 1, .seen = BEFORE},
    {1, {70}, 2, 1, 2, 100, .seen = BEFORE},
    {2, {33, 1}, 4, 4, 8, 7, .seen = BEFORE},
    {1, {257}, 2, 1, 4, 64, .seen = BEFORE},
    {1, {100}, 4, 2, 2, UINT32_MAX, .seen = BLOCKS},
    {2, {100, 31}, 2, 1, 2, 7, .seen = BLOCKS},
    {3, {65, 31, 131}, 4, 1, 8, UINT32_MAX, .seen = HOLES},
    {3, {2, 100, 9}, 4, 2, 4, 5, .seen = HOLES},
};

#define Q_MOST 2.0 /* magnitudes of q; of k, v and dout: 1 */

/* A score's D products, its factor and its root: wrong by D + 4 times the sum of magnitudes, Q_MOST
 * sqrt(D); less the largest, of a range of twice that, once more. A probability by twice a score
 * (its own and the sum's), exponentials, the quotient's two: */
static double probability_units(double D)
{
    return 2 * ((D + 4) * Q_MOST * sqrt(D) + 2 * Q_MOST * sqrt(D)) + 2 * 3 + 2;
}

/* dp is wrong by D + 1 times M, the largest sum of |dout v|, D at most; its mean by that, by p's
 * error, and two; their difference is at most 2 M. So ds is wrong by p M times so much: */
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

static struct attention make_attention(const struct attention *shape)
{
    struct attention c = *shape;
    size_t tokens = tokens_of(&c), n = tokens * c.n_heads * c.D, m = tokens * c.n_kv_heads * c.D;
    c.places = alloc(tokens * sizeof *c.places);
    for (size_t s = 0, t = 0; s < c.n_sequences; t += c.lengths[s++])
        place_tokens(c.places + t, (uint32_t)c.lengths[s], c.seen);
    c.q = pair(n, 1);
    c.k = pair(m, 2);
    c.v = pair(m, 3);
    c.dout = pair(n, 4);
    ck_assert(c.q.f && c.q.d);
    for (size_t i = 0; i < n; i++) /* some keys count more than others */
        c.q.d[i] = (double)(c.q.f[i] *= (float)Q_MOST);
    return c;
}

static void release_attention(struct attention *c)
{
    struct pair all[] = {c->q, c->k, c->v, c->dout};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
    free(c->places);
}

static void compare_attention(const struct attention *c, const struct outputs o[N_BACKENDS])
{
    struct attention ones = *c;
    struct outputs most, weights;
    double D = (double)c->D, p = probability_units(D), ds = score_units(D), T = 0, M = D;
    for (size_t s = 0; s < c->n_sequences; s++)
        T = fmax(T, (double)c->lengths[s]);
    size_t group = c->n_heads / c->n_kv_heads;
    double rows = T * (double)group; /* that see a key */
    ones.ones = true;
    run_magnitudes(attention_run, c, &most);
    run_magnitudes(attention_run, &ones, &weights); /* its dv: of a key, the sum of p */
    double *dq = scaled(NULL, c->q.n, M / sqrt(D));
    double *dk = scaled(values(&weights, "dv"), c->k.n, Q_MOST * M / sqrt(D));
    within(o, "out", p + T + 1, values(&most, "out"));
    within(o, "dv", p + rows + 2, values(&most, "dv"));
    within(o, "dq", ds + 2 * (T + 3) + 2, dq);
    within(o, "dk", ds + 2 * (rows + 3) + 2, dk);
    free(dq);
    free(dk);
    drop(&most);
    drop(&weights);
}

START_TEST(attention)
{
    struct attention c = make_attention(&attentions[_i]);
    struct outputs o[N_BACKENDS];
    double *out = alloc(c.q.n * sizeof *out);
    run_all(attention_run, &c, o);
    compare_attention(&c, o);
    attention_out(&c, out);
    both_are(o, "out", out);
    both_gradients(o, "dv", false, c.v.d, attention_value, &c);
    if (tokens_of(&c) > 1 && c.window > 1) {
        both_gradients(o, "dq", false, c.q.d, attention_value, &c);
        both_gradients(o, "dk", false, c.k.d, attention_value, &c);
    } else /* a token that sees one: weight 1, whatever q and k */
        for (size_t i = 0; i < c.q.n; i++)
            for (int b = REFERENCE; b <= ONE; b++)
                ck_assert(values(&o[b], "dq")[i] == 0 && values(&o[b], "dk")[i % c.k.n] == 0);
    free(out);
    drop_all(o);
    release_attention(&c);
}
END_TEST

START_TEST(a_token_that_sees_nothing_gets_zeros)
{
    struct attention c =
        make_attention(&(struct attention){1, {9}, 2, 1, 4, UINT32_MAX, .seen = HOLES});
    struct outputs o[N_BACKENDS];
    run_all(attention_run, &c, o);
    for (int b = REFERENCE; b <= ONE;
         b++) /* hidden are 0, 1 and 4: the first of them is row 6 of 9 */
        for (size_t i = 6 * 8; i < 7 * 8; i++)
            ck_assert(values(&o[b], "out")[i] == 0 && values(&o[b], "dq")[i] == 0);
    drop_all(o);
    release_attention(&c);
}
END_TEST

/* ---- one token of each sequence over what came before it ---- */

struct past {
    size_t n, seen[3]; /* keys that each token sees */
    size_t n_heads, n_kv_heads, D;
    struct pair q, kv;
};

/* Groups of one head, of several, and of more than a block of rows; one key, and many. */
static const struct past pasts[] = {{1, {1}, 4, 1, .D = 4},
                                    {3, {1, 70, 257}, 8, 2, .D = 6},
                                    {2, {31, 9}, 2, 2, .D = 4},
                                    {2, {5, 40}, 140, 2, .D = 4}};

/* Keys and values lie apart, in no order: those of token t begin at row 3 + 600 t, and 280 on. */
#define PAST_ROWS 1800
static struct perta_past past_at(const struct past *c, size_t t)
{
    return (struct perta_past){.keys = 600 * t + 283, .values = 600 * t + 3, .n = c->seen[t]};
}

static void past_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct past *c = ctx;
    struct perta_past all[3];
    for (size_t t = 0; t < c->n; t++)
        all[t] = past_at(c, t);
    const struct perta_attention_past a = {all, c->n, c->n_heads, c->n_kv_heads, c->D};
    struct perta_array q = as_is(be, o, c->q.f, c->q.n), kv = as_is(be, o, c->kv.f, c->kv.n);
    struct perta_array out = output(be, o, "out", F32, NULL, c->q.n);
    begin(be);
    be->ops->attention_past_forward(be, &a, out, q, kv);
    ck_assert_int_eq(be->rc != 0, broken);
}

/* As the last token of a sequence whose other tokens have any queries. */
static void past_out(const struct past *c, double *out)
{
    size_t ldq = c->n_heads * c->D, ldk = c->n_kv_heads * c->D;
    for (size_t t = 0; t < c->n; t++) {
        struct perta_past past = past_at(c, t);
        struct perta_place *places = alloc(past.n * sizeof *places);
        double *q = scaled(NULL, past.n * ldq, 1), *all = alloc(past.n * ldq * sizeof *all);
        double *last = q + (past.n - 1) * ldq;
        place_tokens(places, (uint32_t)past.n, BEFORE);
        memcpy(last, c->q.d + t * ldq, ldq * sizeof *last);
        attention_double(all, q, c->kv.d + past.keys * ldk, c->kv.d + past.values * ldk, places,
                         past.n, c->n_heads, c->n_kv_heads, c->D, UINT32_MAX);
        memcpy(out + t * ldq, all + (past.n - 1) * ldq, ldq * sizeof *out);
        free(places);
        free(q);
        free(all);
    }
}

START_TEST(tokens_see_what_is_kept)
{
    struct past c = pasts[_i];
    struct outputs o[N_BACKENDS];
    c.q = pair(c.n * c.n_heads * c.D, 1);
    c.kv = pair(PAST_ROWS * c.n_kv_heads * c.D, 2);
    double *out = alloc(c.q.n * sizeof *out);
    run_all(past_run, &c, o);
    past_out(&c, out);
    both_are(o, "out", out);
    free(out);
    drop_all(o);
    release(c.q);
    release(c.kv);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, attention, 0, sizeof attentions / sizeof *attentions);
    tcase_add_test(tests, a_token_that_sees_nothing_gets_zeros);
    tcase_add_loop_test(tests, tokens_see_what_is_kept, 0, sizeof pasts / sizeof *pasts);
    return run_suite("backend_attention", tests);
}
