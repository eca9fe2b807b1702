/* Attention on both backends, compared as test_backend_block.c does: each option of struct
 * perta_attention alone and with others, in every shape. */
#include "tests/backends.h"
#include "tests/llm_double.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

/* ---- options ---- */

struct options {
    const char *name;
    size_t V; /* 0: D */
    uint32_t chunk;
    float scale;   /* 0: 1 / sqrt(D) */
    float softcap; /* 0: none */
    bool slopes, slopes_bf16, sinks;
};

static const struct options options[] = {
    {.name = "none"},
    {.name = "wide values", .V = 11},
    {.name = "narrow values", .V = 1},
    {.name = "scale", .scale = 0.4f},
    {.name = "soft cap", .softcap = 1.5f},
    {.name = "slopes", .slopes = true},
    {.name = "slopes in bf16", .slopes = true, .slopes_bf16 = true},
    {.name = "sinks", .sinks = true},
    {.name = "chunks", .chunk = 8},
    {.name = "chunks of one", .chunk = 1, .sinks = true},
    {.name = "soft cap, sinks", .softcap = 0.8f, .sinks = true, .V = 3},
    {.name = "all",
     .V = 5,
     .chunk = 20,
     .scale = 0.3f,
     .softcap = 2,
     .slopes = true,
     .sinks = true},
};
#define N_OPTIONS (sizeof options / sizeof *options)

#define MOST_HEADS 140
#define SLOPE_MOST 0.3
#define Q_MOST 2.0    /* magnitudes of q; of k, v and dout: 1 */
#define SINK_MOST 2.0 /* and of sinks */

/* From SLOPE_MOST down, and one below 0. Not numbers of few bits. */
static const float *slopes_of(size_t n_heads)
{
    static float slopes[MOST_HEADS];
    for (size_t h = 0; h < n_heads; h++)
        slopes[h] = (float)((h == 1 ? -1.0 : 1.0) * SLOPE_MOST / (1 + 1.1 * (double)h));
    return slopes;
}

static struct perta_attention attention_with(const struct options *o, size_t n_heads,
                                             size_t n_kv_heads, size_t D)
{
    return (struct perta_attention){.n_heads = n_heads,
                                    .n_kv_heads = n_kv_heads,
                                    .D = D,
                                    .V = o->V ? o->V : D,
                                    .window = UINT32_MAX,
                                    .chunk = o->chunk,
                                    .scale = o->scale > 0 ? o->scale : 1 / sqrtf((float)D),
                                    .softcap = o->softcap,
                                    .slopes = o->slopes ? slopes_of(n_heads) : NULL,
                                    .slopes_bf16 = o->slopes_bf16};
}

/* Sinks (n_heads), of which one counts for nothing and one for more than all keys. */
static struct pair sinks_of(size_t n_heads)
{
    struct pair sinks = pair(n_heads, 5);
    for (size_t i = 0; i < n_heads; i++)
        sinks.d[i] = (double)(sinks.f[i] *= (float)SINK_MOST);
    return sinks;
}

static double *scaled(const double *of, size_t n, double by)
{
    double *to = alloc(n * sizeof *to);
    for (size_t i = 0; i < n; i++)
        to[i] = (of ? of[i] : 1) * by;
    return to;
}

/* ---- within sequences ---- */

enum seen { BEFORE, BLOCKS, HOLES };

struct shape {
    size_t n_sequences, lengths[3], n_heads, n_kv_heads, D;
    uint32_t window;
    enum seen seen;
};

struct attention {
    const struct shape *shape;
    const struct options *with;
    struct perta_attention of; /* without arrays */
    size_t starts[4];          /* of a batch that begins at token 5 */
    struct pair q, k, v, dout, sinks;
    bool ones;                  /* dout is */
    size_t only;                /* the sequence that counts; n_sequences: all do */
    struct perta_place *places; /* (tokens) */
};

/* What is before a token; blocks of 30 of it; or every fifth token is hidden, the first two among
 * them: these stand last, and see those before them, or nothing. */
static void place_tokens(struct perta_place *places, uint32_t T, enum seen seen)
{
    uint32_t n = 0, n_seen = 0;
    for (uint32_t t = 0; t < T; t++)
        if (seen != HOLES || (t > 1 && t % 5 != 4)) {
            places[n] = (struct perta_place){t, t, seen == BLOCKS ? t / 30 * 30 : 0, n + 1, false};
            n++;
        }
    for (uint32_t t = 0; seen == HOLES && t < T; t++) {
        bool hidden = t <= 1 || t % 5 == 4;
        n_seen += !hidden;
        if (hidden)
            places[n++] = (struct perta_place){t, t, 0, n_seen, false};
    }
}

static void attention_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct attention *c = ctx;
    struct perta_attention a = c->of;
    size_t n = c->q.n, m = c->k.n, n_out = c->dout.n, n_v = c->v.n;
    float *ones = alloc(n_out * sizeof *ones);
    for (size_t i = 0; i < n_out; i++)
        ones[i] = 1;
    struct perta_array q = as_is(be, o, c->q.f, n), k = as_is(be, o, c->k.f, m);
    struct perta_array v = input(be, o, c->v.f, n_v);
    struct perta_array dout = input(be, o, c->ones ? ones : c->dout.f, n_out);
    struct perta_array out = output(be, o, "out", F32, NULL, n_out);
    struct perta_array dq = output(be, o, "dq", F32, NULL, n);
    struct perta_array dk = output(be, o, "dk", F32, NULL, m);
    struct perta_array dv = output(be, o, "dv", F32, NULL, n_v);
    const struct perta_array heads[2] = {buffer(be, o, n * 4), buffer(be, o, n_out * 4)};
    if (c->with->sinks) {
        a.sinks = as_is(be, o, c->sinks.f, c->sinks.n);
        a.dsinks = output(be, o, "dsinks", F32, NULL, a.sequences.n * a.n_heads);
    }
    begin(be);
    be->ops->attention_forward(be, &a, out, q, k, v);
    be->ops->attention_backward(be, &a, dq, dk, dv, dout, q, k, v, heads);
    ck_assert_int_eq(be->rc != 0, broken);
    free(ones);
}

static void attention_out(const struct attention *c, double *out)
{
    const struct perta_attention *a = &c->of;
    for (size_t s = 0; s < a->sequences.n; s++) {
        size_t t = c->starts[s] - 5, at = t * a->n_heads, kv = t * a->n_kv_heads;
        if (c->only == a->sequences.n || c->only == s)
            attention_double(out + at * a->V, c->q.d + at * a->D, c->k.d + kv * a->D,
                             c->v.d + kv * a->V, c->with->sinks ? c->sinks.d : NULL, a,
                             c->places + t, c->starts[s + 1] - c->starts[s]);
    }
}

static double attention_value(void *ctx)
{
    const struct attention *c = ctx;
    double *out = scaled(NULL, c->dout.n, 0);
    attention_out(c, out);
    double value = dot(out, c->dout.d, c->dout.n);
    free(out);
    return value;
}

/* Longer than a block of query rows (64), and not; groups of heads; windows that end inside of a
 * block, at one, and beyond the sequence; several sequences. */
static const struct shape shapes[] = {
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
#define N_SHAPES (sizeof shapes / sizeof *shapes)

/* The largest scale * q k. */
static double largest_product(const struct perta_attention *a)
{
    return (double)a->scale * Q_MOST * (double)a->D;
}

/* What ALiBi adds to the score of one of T keys, at most. */
static double largest_bias(const struct perta_attention *a, double T)
{
    return a->slopes ? SLOPE_MOST * T * (a->slopes_bf16 ? (double)a->scale : 1) : 0;
}

/* A score's D products, its factor and its root: wrong by D + 4 times the largest; its cap's
 * quotient, hyperbolic tangent and product by 8; the slope's product and sum by 3 times both. Less
 * the largest, of a range of twice the largest, of the slopes and of sinks, it is rounded once
 * more. A probability by twice a score (its own and the sum's), exponentials, the quotient's
 * two: */
static double probability_units(const struct attention *c, double T)
{
    double most = largest_product(&c->of), bias = largest_bias(&c->of, T);
    double score = ((double)c->of.D + 4) * most + (c->of.softcap > 0 ? 8 * most : 0) +
                   (c->of.slopes ? 3 * (most + bias) : 0);
    double range = 2 * most + bias + (c->with->sinks ? SINK_MOST : 0);
    return 2 * (score + range) + 2 * 3 + 2;
}

/* dp is wrong by V + 1 times M, the largest sum of |dout v|, V at most; its mean by that, by p's
 * error, and two; their difference is at most 2 M. The cap's derivative is 1 - t^2, whose t is wrong
 * by a score's error over the cap, and 5. So ds is wrong by p M times so much: */
static double score_units(const struct attention *c, double T)
{
    double cap = (double)c->of.softcap, D = (double)c->of.D;
    double t = cap > 0 ? (D + 4) * largest_product(&c->of) / cap + 5 : 0;
    return 3 * probability_units(c, T) + 2 * (double)c->of.V + 7 + (cap > 0 ? 2 * (2 * t + 3) : 0);
}

static struct attention make_attention(const struct shape *shape, const struct options *with)
{
    struct attention c = {.shape = shape, .with = with, .starts = {5}};
    c.of = attention_with(with, shape->n_heads, shape->n_kv_heads, shape->D);
    c.of.window = shape->window;
    c.only = shape->n_sequences;
    for (size_t s = 0; s < shape->n_sequences; s++)
        c.starts[s + 1] = c.starts[s] + shape->lengths[s];
    size_t tokens = c.starts[shape->n_sequences] - 5;
    c.places = alloc(tokens * sizeof *c.places);
    for (size_t s = 0; s < shape->n_sequences; s++)
        place_tokens(c.places + c.starts[s] - 5, (uint32_t)shape->lengths[s], shape->seen);
    c.q = pair(tokens * shape->n_heads * c.of.D, 1);
    c.k = pair(tokens * shape->n_kv_heads * c.of.D, 2);
    c.v = pair(tokens * shape->n_kv_heads * c.of.V, 3);
    c.dout = pair(tokens * shape->n_heads * c.of.V, 4);
    c.sinks = sinks_of(shape->n_heads);
    for (size_t i = 0; i < c.q.n; i++) /* some keys count more than others */
        c.q.d[i] = (double)(c.q.f[i] *= (float)Q_MOST);
    return c;
}

/* The starts that c.of points to are its own, so it is told where c is. */
static void settle(struct attention *c)
{
    c->of.sequences = (struct perta_runs){c->shape->n_sequences, c->starts, 5};
    c->of.places = c->places;
}

static void release_attention(struct attention *c)
{
    struct pair all[] = {c->q, c->k, c->v, c->dout, c->sinks};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
    free(c->places);
}

static double longest(const struct attention *c)
{
    size_t T = 0;
    for (size_t s = 0; s < c->shape->n_sequences; s++)
        T = c->shape->lengths[s] > T ? c->shape->lengths[s] : T;
    return (double)T;
}

static void compare_attention(const struct attention *c, const struct outputs o[N_BACKENDS])
{
    struct attention ones = *c;
    struct outputs most, weights;
    double T = longest(c), p = probability_units(c, T), ds = score_units(c, T);
    double M = (double)c->of.V, scale = (double)c->of.scale;
    double rows = T * (double)c->of.n_heads / (double)c->of.n_kv_heads; /* that see a key */
    ones.ones = true;
    run_magnitudes(attention_run, c, &most);
    run_magnitudes(attention_run, &ones, &weights); /* its dv: of a key, the sum of p */
    double *dq = scaled(NULL, c->q.n, M * scale), *dk = alloc(c->k.n * sizeof *dk);
    for (size_t i = 0; i < c->k.n; i++)
        dk[i] = values(&weights, "dv")[i / c->of.D * c->of.V] * Q_MOST * M * scale;
    within(o, "out", p + T + 1, values(&most, "out"));
    within(o, "dv", p + rows + 2, values(&most, "dv"));
    within(o, "dq", ds + 2 * (T + 3) + 2, dq);
    within(o, "dk", ds + 2 * (rows + 3) + 2, dk);
    double *dsinks = scaled(NULL, c->shape->n_sequences * c->of.n_heads, T * M);
    if (c->with->sinks)
        within(o, "dsinks", 2 * p + M + 6, dsinks);
    free(dsinks);
    free(dq);
    free(dk);
    drop(&most);
    drop(&weights);
}

/* Of each sequence. */
static void sinks_have_gradients(struct attention *c, const struct outputs o[N_BACKENDS])
{
    size_t n = c->of.n_heads;
    for (int b = REFERENCE; b <= ONE; b++)
        for (c->only = 0; c->only < c->of.sequences.n; c->only++) {
            const float *d = floats(&o[b], "dsinks") + c->only * n;
            const struct perta_place *places = c->places + c->starts[c->only] - 5;
            if (places[0].end > 0) /* tokens of a sequence see something, or none does */
                is_gradient("dsinks", d, c->sinks.d, n, 1, attention_value, c);
            else
                for (size_t h = 0; h < n; h++)
                    ck_assert(d[h] == 0);
        }
}

/* Does each token see itself alone, so that its weight is 1, whatever q and k? */
static bool is_certain(const struct attention *c)
{
    return (longest(c) <= 1 || c->of.window == 1 || c->of.chunk == 1) && !c->with->sinks;
}

/* Finite differences take long if there are many tokens; then only without options and with all. */
static void are_gradients(struct attention *c, const struct outputs o[N_BACKENDS])
{
    size_t n = c->starts[c->shape->n_sequences] - 5;
    if (n > 70 && c->with != &options[0] && c->with != &options[N_OPTIONS - 1])
        return;
    both_gradients(o, "dv", false, c->v.d, attention_value, c);
    if (!is_certain(c)) {
        both_gradients(o, "dq", false, c->q.d, attention_value, c);
        both_gradients(o, "dk", false, c->k.d, attention_value, c);
    }
    if (c->with->sinks)
        sinks_have_gradients(c, o);
}

START_TEST(attention)
{
    struct attention c =
        make_attention(&shapes[(size_t)_i / N_OPTIONS], &options[(size_t)_i % N_OPTIONS]);
    struct outputs o[N_BACKENDS];
    settle(&c);
    double *out = scaled(NULL, c.dout.n, 0);
    run_all(attention_run, &c, o);
    compare_attention(&c, o);
    attention_out(&c, out);
    both_are(o, "out", out);
    are_gradients(&c, o);
    for (size_t i = 0; i < c.q.n && is_certain(&c); i++)
        for (int b = REFERENCE; b <= ONE; b++)
            ck_assert(values(&o[b], "dq")[i] == 0 && values(&o[b], "dk")[i % c.k.n] == 0);
    free(out);
    drop_all(o);
    release_attention(&c);
}
END_TEST

START_TEST(a_token_that_sees_nothing_gets_zeros)
{
    const struct shape shape = {1, {9}, 2, 1, 4, UINT32_MAX, .seen = HOLES};
    struct attention c = make_attention(&shape, &options[_i]);
    struct outputs o[N_BACKENDS];
    size_t Q = 2 * c.of.D, V = 2 * c.of.V;
    settle(&c);
    run_all(attention_run, &c, o);
    for (int b = REFERENCE; b <= ONE; b++) { /* hidden are 0, 1, 4: the first is row 6 of 9 */
        for (size_t i = 6 * V; i < 7 * V; i++)
            ck_assert(values(&o[b], "out")[i] == 0);
        for (size_t i = 6 * Q; i < 7 * Q; i++)
            ck_assert(values(&o[b], "dq")[i] == 0);
    }
    drop_all(o);
    release_attention(&c);
}
END_TEST

/* Scores that a cap cannot tell apart, and a sink that outweighs all keys by far. */
START_TEST(what_is_too_large_stays_finite)
{
    const struct options with = {.softcap = 0.5f, .scale = 1e6f, .sinks = true};
    const struct shape shape = {1, {70}, 2, 1, 4, UINT32_MAX, .seen = BEFORE};
    struct attention c = make_attention(&shape, &with);
    struct outputs o[N_BACKENDS];
    settle(&c);
    c.sinks.f[1] = 1e30f;
    run_all(attention_run, &c, o);
    for (int b = REFERENCE; b <= ONE; b++)
        for (size_t i = 0; i < o[b].n; i++)
            for (size_t k = 0; k < o[b].of[i].n; k++)
                ck_assert_msg(isfinite(o[b].of[i].values[k]), "%s[%zu]", o[b].of[i].name, k);
    for (int b = REFERENCE; b <= ONE; b++)
        for (size_t i = 0; i < c.dout.n; i++)
            ck_assert((values(&o[b], "out")[i] == 0) == (i / c.of.V % 2 == 1));
    drop_all(o);
    release_attention(&c);
}
END_TEST

/* ---- one token of each sequence over what came before it ---- */

struct past {
    size_t n, seen[3]; /* keys that each token sees */
    size_t n_heads, n_kv_heads, D;
    struct perta_attention of;
    struct pair q, kv, sinks;
    bool with_sinks;
};

/* Groups of one head, of several, and of more than a block of rows; one key, and many. */
static const struct past pasts[] = {{1, {1}, 4, 1, .D = 4},
                                    {3, {1, 70, 257}, 8, 2, .D = 6},
                                    {2, {31, 9}, 2, 2, .D = 4},
                                    {2, {5, 40}, 140, 2, .D = 4}};
#define N_PASTS (sizeof pasts / sizeof *pasts)

/* Keys and values lie apart, in no order: token t's values before its keys. Some tokens of its
 * sequence are not seen. */
#define PAST_ROWS 300
static struct perta_past past_at(const struct past *c, size_t t)
{
    size_t K = c->n_kv_heads * c->D, V = c->n_kv_heads * c->of.V;
    size_t start = PAST_ROWS * t * (K + V) + 3;
    return (struct perta_past){
        .keys = start + PAST_ROWS * V, .values = start, .first = 40 * t, .n = c->seen[t]};
}

static void past_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct past *c = ctx;
    struct perta_past all[3];
    struct perta_attention_past a = {.of = c->of, .pasts = all, .n = c->n};
    for (size_t t = 0; t < c->n; t++)
        all[t] = past_at(c, t);
    struct perta_array q = as_is(be, o, c->q.f, c->q.n), kv = as_is(be, o, c->kv.f, c->kv.n);
    struct perta_array out = output(be, o, "out", F32, NULL, c->n * c->n_heads * c->of.V);
    if (c->with_sinks)
        a.of.sinks = as_is(be, o, c->sinks.f, c->sinks.n);
    begin(be);
    be->ops->attention_past_forward(be, &a, out, q, kv);
    ck_assert_int_eq(be->rc != 0, broken);
}

/* As the last token of a sequence whose other tokens have any queries, and whose first ones, which
 * are not seen, have any keys. */
static void past_out(const struct past *c, double *out)
{
    const struct perta_attention *a = &c->of;
    size_t Q = a->n_heads * a->D, O = a->n_heads * a->V;
    size_t K = a->n_kv_heads * a->D, V = a->n_kv_heads * a->V;
    for (size_t t = 0; t < c->n; t++) {
        struct perta_past past = past_at(c, t);
        size_t T = past.first + past.n;
        struct perta_place *places = alloc(T * sizeof *places);
        double *q = scaled(NULL, T * Q, 1), *k = scaled(NULL, T * K, 1),
               *v = scaled(NULL, T * V, 1);
        double *all = alloc(T * O * sizeof *all);
        place_tokens(places, (uint32_t)T, BEFORE);
        places[T - 1].first = (uint32_t)past.first;
        memcpy(q + (T - 1) * Q, c->q.d + t * Q, Q * sizeof *q);
        memcpy(k + past.first * K, c->kv.d + past.keys, past.n * K * sizeof *k);
        memcpy(v + past.first * V, c->kv.d + past.values, past.n * V * sizeof *v);
        attention_double(all, q, k, v, c->with_sinks ? c->sinks.d : NULL, a, places, T);
        memcpy(out + t * O, all + (T - 1) * O, O * sizeof *out);
        free(places);
        free(q);
        free(k);
        free(v);
        free(all);
    }
}

START_TEST(tokens_see_what_is_kept)
{
    const struct options *with = &options[(size_t)_i % N_OPTIONS];
    struct past c = pasts[(size_t)_i / N_OPTIONS];
    struct outputs o[N_BACKENDS];
    c.of = attention_with(with, c.n_heads, c.n_kv_heads, c.D);
    c.of.chunk = 0; /* pasts say what is seen */
    c.with_sinks = with->sinks;
    c.q = pair(c.n * c.n_heads * c.D, 1);
    c.kv = pair(PAST_ROWS * 3 * c.n_kv_heads * (c.D + c.of.V) + 3, 2);
    c.sinks = sinks_of(c.n_heads);
    double *out = alloc(c.n * c.n_heads * c.of.V * sizeof *out);
    run_all(past_run, &c, o);
    past_out(&c, out);
    both_are(o, "out", out);
    free(out);
    drop_all(o);
    release(c.q);
    release(c.kv);
    release(c.sinks);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, attention, 0, N_SHAPES * N_OPTIONS);
    tcase_add_loop_test(tests, a_token_that_sees_nothing_gets_zeros, 0, N_OPTIONS);
    tcase_add_test(tests, what_is_too_large_stays_finite);
    tcase_add_loop_test(tests, tokens_see_what_is_kept, 0, N_PASTS * N_OPTIONS);
    return run_suite("backend_attention", tests);
}
