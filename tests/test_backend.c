/* Every operation of the CPU's backend against the reference's: the same bits where both do the
 * same arithmetic, else within what rounding can do. Bounds count roundings: an operation gives its
 * result to UNIT of it, so that a sum of n products, in any order, is wrong by n UNIT times the sum
 * of their magnitudes at most (Higham 2002, section 3.1), and one more where the reference rounds.
 * With bf16 both factors of a product are rounded to 2^-8 first. */
#include "tests/backends.h"

#include "estimators/compute/gemm.h"
#include "io/format/convert.h"

#define BF16_UNITS (2.01 * 0x1p16) /* of a product, in UNITs */

static const struct perta_cpu_needs needs = {.widest = 1100, .rows = 300, .longest = 300};

static void open_all(void)
{
    open_backends(&needs);
}

/* ---- linear layers ---- */

struct linear {
    size_t n, out, in;
    enum perta_dtype dtype;
    bool add, bias, bf16;
    struct pair x, y, dy, dx, b, weights;
    uint8_t *weight; /* (1 + out * in): weights as the checkpoint has them, after one more */
};

static size_t width_of_dtype(enum perta_dtype dtype)
{
    return dtype == PERTA_F32 ? 4 : 2;
}

static void put_weight(struct linear *c)
{
    c->weight = alloc((1 + c->out * c->in) * width_of_dtype(c->dtype));
    for (size_t i = 0; i < c->out * c->in; i++) {
        float w = magnitudes ? fabsf(c->weights.f[i]) : c->weights.f[i];
        uint16_t half = c->dtype == PERTA_F16 ? perta_f16_from_f32(w) : perta_bf16_from_f32(w);
        if (c->dtype == PERTA_F32)
            memcpy(c->weight + (1 + i) * 4, &w, 4);
        else
            memcpy(c->weight + (1 + i) * 2, &half, 2);
    }
}

static struct linear make_linear(size_t n, size_t out, size_t in, enum perta_dtype dtype, bool add,
                                 bool bias)
{
    struct linear c = {n, out, in, dtype, add, bias, .weights = pair(out * in, 1)};
    c.x = pair(n * in, 2);
    c.dx = pair(n * in, 3);
    c.y = pair(n * out, 4);
    c.dy = pair(n * out, 5);
    c.b = pair(out, 6);
    return c;
}

static void release_linear(struct linear *c)
{
    struct pair all[] = {c->x, c->dx, c->y, c->dy, c->b, c->weights};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

/* Tiles of a batch that begins at row 5: whole ones, and ragged. */
static struct perta_runs tiles_of(size_t n, size_t starts[4])
{
    const size_t cuts[] = {0, 32, 200, n};
    size_t n_tiles = 0;
    for (size_t i = 0; i < 4; i++)
        if (cuts[i] < n || i == 3)
            starts[n_tiles++] = 5 + cuts[i];
    return (struct perta_runs){n_tiles - 1, starts, 5};
}

static void linear_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    struct linear c = *(const struct linear *)ctx;
    size_t n = c.n, out = c.out, in = c.in, starts[4], width = width_of_dtype(c.dtype);
    struct perta_runs tiles = tiles_of(n, starts);
    struct perta_linear l = {.dtype = c.dtype, .out = out, .in = in, .weight = {0, width}};
    put_weight(&c);
    ck_assert_ok(be->ops->share(be, c.weight, (1 + out * in) * width, &l.weight.buffer, &err));
    be->ops->uploaded(be, l.weight, out * in * width);
    l.bias = c.bias ? input(be, o, c.b.f, out) : (struct perta_array){0};
    struct perta_array x = input(be, o, c.x.f, n * in), dy = input(be, o, c.dy.f, n * out);
    struct perta_array y = output(be, o, "y", F32, c.add ? c.y.f : NULL, n * out);
    struct perta_array dx = output(be, o, "dx", F32, c.add ? c.dx.f : NULL, n * in);
    struct perta_array dweight = output(be, o, "dweight", F32, c.weights.f, out * in);
    struct perta_array dbias = output(be, o, "dbias", F32, NULL, out);
    begin(be);
    be->ops->linear_forward(be, &l, &tiles, x, y, n, c.add);
    be->ops->linear_backward(be, &l, &tiles, dy, dx, n, c.add);
    be->ops->linear_backward_bias(be, dbias, dy, n / 3, n, out);
    if (!c.bf16)
        be->ops->linear_backward_weight(be, dweight, dy, x, n, out, in);
    be->ops->free(be, l.weight.buffer);
    free(c.weight);
}

/* Rows that are added to what stood there are a term more, and so are the bias, and each 1024 rows
 * of a weight that must be converted; the reference rounds once. */
static void compare_linear(const struct linear *c)
{
    struct outputs o[N_BACKENDS], most;
    double more = c->bf16 ? BF16_UNITS + 4 : 4;
    size_t steps = c->out / 1024; /* in which a weight is converted, and added up */
    run_all(linear_run, c, o);
    run_magnitudes(linear_run, c, &most);
    within(o, "y", (double)c->in + more, values(&most, "y"));
    within(o, "dx", (double)(c->out + steps) + more, values(&most, "dx"));
    within(o, "dweight", (double)c->n + more, values(&most, "dweight"));
    same(o, "dbias");
    drop_all(o);
    drop(&most);
}

static const enum perta_dtype dtypes[] = {PERTA_F32, PERTA_BF16, PERTA_F16};
static const struct {
    size_t n, out, in;
    bool add, bias;
} linear_shapes[] = {
    {1, 1, 1, false, false},    {1, 33, 31, true, false},    {31, 7, 33, false, true},
    {33, 64, 257, true, true},  {257, 513, 40, false, true}, {257, 1030, 17, true, false},
    {2, 1030, 9, false, false},
};

/* _i: a shape, of a type. */
static void compare_shape(int i, bool bf16)
{
    size_t s = (size_t)i / 3;
    struct linear c = make_linear(linear_shapes[s].n, linear_shapes[s].out, linear_shapes[s].in,
                                  dtypes[i % 3], linear_shapes[s].add, linear_shapes[s].bias);
    c.bf16 = bf16;
    compare_linear(&c);
    release_linear(&c);
}

#define N_LINEARS (3 * sizeof linear_shapes / sizeof *linear_shapes)

START_TEST(linear)
{
    compare_shape(_i, false);
}
END_TEST

START_TEST(linear_in_bf16)
{
    struct perta_cpu_needs in_bf16 = needs;
    in_bf16.bf16 = true;
    if (!perta_gemm_can_bf16())
        return;
    close_backends();
    open_backends(&in_bf16);
    compare_shape(_i, true);
}
END_TEST

/* ---- gradients ---- */

#define G_IN 33
#define G_OUT 300 /* of which two blocks of rows are formed */
#define G_SPLIT 280
#define G_TOKENS 40

static const size_t g_lengths[] = {1, 31, 2500, 33, 1024, 1025, 257};
#define G_SAMPLES (sizeof g_lengths / sizeof *g_lengths)

struct gradient {
    bool by_sample, squares, products;
    enum { NOTHING, LINEAR, NORM } between; /* the operations of the two blocks of rows */
    size_t calls;                           /* chunks of each call */
    struct perta_chunks chunks;
    size_t n_rows;
    struct pair x, dy, d, weight;
    struct perta_token_row tokens[G_TOKENS];
};

/* In order of samples, the last of which has none; rows again and again, at the ends of both tiles.
 */
static void place_gradient_tokens(struct gradient *c, bool tokens)
{
    static const uint32_t rows[] = {0, PERTA_TILE_ROWS - 1, PERTA_TILE_ROWS, G_SPLIT - 1, 100};
    for (size_t k = 0; tokens && k < G_TOKENS; k++)
        c->tokens[k] = (struct perta_token_row){k * (G_SAMPLES - 1) / G_TOKENS,
                                                k % 3 ? rows[k % 5] : (uint32_t)k * 6};
    c->d = pair(tokens ? G_TOKENS * G_IN : 0, 7);
}

static struct gradient make_gradient(bool by_sample, bool squares, bool products, bool tokens,
                                     size_t calls)
{
    struct gradient c = {
        .by_sample = by_sample, .squares = squares, .products = products, .calls = calls};
    size_t starts[G_SAMPLES + 1] = {0};
    for (size_t i = 0; i < G_SAMPLES; i++)
        starts[i + 1] = starts[i] + g_lengths[i];
    c.n_rows = starts[G_SAMPLES];
    const size_t all[] = {0, c.n_rows};
    ck_assert_ok(by_sample ? perta_chunks_make(starts, G_SAMPLES, true, &c.chunks, &err)
                           : perta_chunks_make(all, 1, false, &c.chunks, &err));
    c.x = pair(c.n_rows * G_IN, 5);
    c.dy = pair(c.n_rows * G_OUT, 6);
    c.weight = pair(1100 * 8, 8);
    place_gradient_tokens(&c, tokens);
    return c;
}

static void release_gradient(struct gradient *c)
{
    perta_chunks_release(&c->chunks);
    struct pair all[] = {c->x, c->dy, c->d, c->weight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

/* Between two operations one that converts a weight, or makes one, which may take memory where x
 * was kept. */
static void disturb(struct perta_backend *be, struct outputs *o, const struct gradient *c)
{
    const struct perta_runs tiles = {1, (const size_t[]){0, 1}, 0};
    struct perta_array weight = input(be, o, c->weight.f, c->weight.n), x = input(be, o, c->x.f, 8);
    struct perta_array y = buffer(be, o, 1100 * 4);
    const struct perta_linear l = {weight, PERTA_F16, 1100, 8, {0}, false};
    const struct perta_norm norm = {.weight = weight, .eps = 1, .plus = 1, .n_weights = 1};
    if (c->between == LINEAR)
        be->ops->linear_forward(be, &l, &tiles, x, y, 1, false);
    else
        be->ops->rmsnorm_forward(be, &norm, y, perta_array_at(y, 8), x, 1, 8);
}

/* Of the tokens, those of samples that end in chunks first .. end; all with the last where chunks
 * are not by sample. */
static void choose_tokens(const struct gradient *c, struct perta_gradient *g, struct perta_array d)
{
    size_t from = 0, n = 0;
    uint64_t first = c->chunks.of[g->first].sample, last = c->chunks.of[g->end - 1].sample;
    for (size_t k = 0; k < c->d.n / G_IN; k++) {
        bool before = c->tokens[k].sample < first;
        from += c->by_sample && before;
        n += c->by_sample ? !before && c->tokens[k].sample <= last : g->end == c->chunks.n;
    }
    g->tokens = c->tokens + from;
    g->d = perta_array_at(d, from * G_IN);
    g->n_tokens = n;
}

/* All chunks' part of rows col .. of the matrix, call by call. */
static void gradient_rows(struct perta_backend *be, const struct gradient *c,
                          struct perta_gradient g, struct perta_array d)
{
    for (g.first = 0; g.first < c->chunks.n; g.first = g.end) {
        g.end = g.first + c->calls < c->chunks.n ? g.first + c->calls : c->chunks.n;
        struct perta_gradient some = g;
        some.origin = g.first ? 7 : 0; /* as if the rows before were not there */
        if (c->products)
            some.x = perta_array_at(g.x, some.origin * G_IN);
        some.dy = perta_array_at(g.dy, some.origin * G_OUT);
        choose_tokens(c, &some, d);
        be->ops->gradient(be, &some);
    }
}

static void gradient_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct gradient *c = ctx;
    double *zeros = alloc(G_SPLIT * G_IN * sizeof *zeros);
    const struct perta_array none = {0};
    struct perta_array x = c->products ? input(be, o, c->x.f, c->x.n) : none;
    struct perta_array dy = input(be, o, c->dy.f, c->dy.n), d = input(be, o, c->d.f, c->d.n);
    static const char *const names[][4] = {{"sums", "squares", "sample", "norms"},
                                           {"sums 2", "squares 2", "sample 2", "norms 2"}};
    struct perta_gradient g[2] = {{.rows = G_SPLIT}, {.rows = G_OUT - G_SPLIT, .col = G_SPLIT}};
    for (size_t i = 0; i < 2; i++) {
        size_t n = g[i].rows * G_IN;
        g[i].in = G_IN;
        g[i].sums = output(be, o, names[i][0], F64, zeros, n);
        g[i].squares = c->squares ? output(be, o, names[i][1], F64, zeros, n) : none;
        size_t n_norms = perta_tiles(g[i].rows, G_IN) * G_SAMPLES;
        g[i].norms = c->by_sample ? output(be, o, names[i][3], F64, zeros, n_norms) : none;
        g[i].n_samples = G_SAMPLES;
        g[i].sample = c->chunks.parts ? output(be, o, names[i][2], F32, NULL, n) : none;
        g[i].chunks = &c->chunks;
        g[i].x = x;
        g[i].dy = dy;
        g[i].dy_width = G_OUT;
        g[i].x_again = i == 1 && c->calls >= c->chunks.n;
    }
    begin(be);
    gradient_rows(be, c, g[0], d);
    if (c->between != NOTHING)
        disturb(be, o, c);
    struct gradient without = *c; /* tokens, whose rows are the first block's */
    without.d.n = 0;
    gradient_rows(be, &without, g[1], d);
    free(zeros);
}

/* Scratch for all chunks at once, and for one or two. */
static const struct perta_cpu_needs g_all = {.widest = 340, .gradient_floats = 6000 * 340},
                                    g_few = {.widest = 340};

/* Other splits into calls, other scratch and other operations between give the same bits. */
static void split_gradient(struct gradient *c, struct outputs want[N_BACKENDS],
                           const struct perta_cpu_needs *scratch)
{
    struct outputs o[N_BACKENDS];
    close_backends();
    open_backends(scratch);
    run_all(gradient_run, c, o);
    for (int b = 0; b < N_BACKENDS; b++)
        for (size_t i = 0; i < o[b].n; i++)
            are_same(&o[b].of[i], &want[b].of[i]);
    drop_all(o);
}

/* Squares of all samples, added up over elements or over tiles. */
static void add_up(const struct outputs *o, const char *squares, const char *norms)
{
    double over_elements = 0, over_tiles = 0;
    for (size_t i = 0; i < named(o, squares)->n; i++)
        over_elements += values(o, squares)[i];
    for (size_t i = 0; i < named(o, norms)->n; i++)
        over_tiles += values(o, norms)[i];
    ck_assert_double_le(fabs(over_tiles - over_elements), 1e-12 * over_elements);
}

/* A sample's terms are its rows, its chunks' and its tokens'; the reference rounds with each of the
 * latter two. Squares of two numbers that differ by e differ by e times their sum. */
static void compare_gradient(struct gradient *c, const struct outputs o[N_BACKENDS], double more)
{
    static const char *const sums[] = {"sums", "sums 2"}, *const squares[] = {"squares",
                                                                              "squares 2"};
    static const char *const norms[] = {"norms", "norms 2"};
    double units = (c->by_sample ? 2500 : PERTA_CHUNK_ROWS) + 2 * (3 + 8) + more;
    struct outputs most;
    run_magnitudes(gradient_run, c, &most);
    for (size_t i = 0; i < 2; i++) {
        within(o, sums[i], units, values(&most, sums[i]));
        if (c->squares)
            within(o, squares[i], 2.1 * units, values(&most, squares[i]));
        if (c->by_sample)
            within(o, norms[i], 2.1 * units, values(&most, norms[i]));
        if (c->squares) {
            add_up(&o[REFERENCE], squares[i], norms[i]);
            add_up(&o[ONE], squares[i], norms[i]);
        }
        if (!c->products) /* tokens alone are added as the reference adds them */
            same(o, sums[i]);
    }
    drop(&most);
}

static const struct {
    bool by_sample, squares, products, tokens;
} gradients[] = {{true, true, true, false},  {true, true, true, true},
                 {true, true, false, true},  {true, false, true, true},
                 {false, false, true, true}, {false, false, true, false},
                 {false, false, false, true}};

static void compare_gradients(int i, struct perta_cpu_needs all, struct perta_cpu_needs few,
                              double more)
{
    struct gradient c = make_gradient(gradients[i].by_sample, gradients[i].squares,
                                      gradients[i].products, gradients[i].tokens, SIZE_MAX / 2);
    struct outputs o[N_BACKENDS];
    close_backends();
    open_backends(&all);
    run_all(gradient_run, &c, o);
    compare_gradient(&c, o, more);
    c.between = NORM;
    split_gradient(&c, o, &all);
    c.between = LINEAR;
    split_gradient(&c, o, &all);
    c.calls = 2;
    split_gradient(&c, o, &all);
    c.calls = 3;
    split_gradient(&c, o, &few);
    drop_all(o);
    release_gradient(&c);
}

START_TEST(gradient)
{
    compare_gradients(_i, g_all, g_few, 0);
}
END_TEST

START_TEST(gradient_in_bf16)
{
    struct perta_cpu_needs all = g_all, few = g_few;
    all.bf16 = few.bf16 = true;
    if (perta_gemm_can_bf16())
        compare_gradients(_i, all, few, BF16_UNITS);
}
END_TEST

/* ---- LoRA ---- */

struct low_rank {
    size_t n, out, in, r;
    struct pair a, b, x, y, dx, dy, da, db;
};

static void low_rank_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct low_rank *c = ctx;
    size_t n = c->n, out = c->out, in = c->in, r = c->r, starts[4];
    struct perta_runs tiles = tiles_of(n, starts);
    struct perta_low_rank l = {
        input(be, o, c->a.f, r * in), input(be, o, c->b.f, out * r), out, in, r, 0.7f};
    struct perta_array x = input(be, o, c->x.f, n * in), dy = input(be, o, c->dy.f, n * out);
    struct perta_array y = output(be, o, "y", F32, c->y.f, n * out);
    struct perta_array dx = output(be, o, "dx", F32, c->dx.f, n * in);
    struct perta_array da = output(be, o, "da", F32, c->da.f, r * in);
    struct perta_array db = output(be, o, "db", F32, c->db.f, out * r);
    struct perta_array da_parts = output(be, o, "da in parts", F32, c->da.f, r * in);
    struct perta_array db_parts = output(be, o, "db in parts", F32, c->db.f, out * r);
    struct perta_array room = buffer(be, o, 2 * n * r * sizeof(float));
    begin(be);
    be->ops->low_rank_forward(be, &l, &tiles, x, y, n, room);
    be->ops->low_rank_backward(be, &l, &tiles, dy, dx, n, room);
    be->ops->low_rank_gradient(be, &l, &tiles, x, dy, da, db, n, room);
    for (size_t tile = 0; tile < tiles.n; tile++) {
        size_t first = starts[tile] - tiles.origin, rows = starts[tile + 1] - starts[tile];
        struct perta_runs one = {1, starts + tile, starts[tile]};
        be->ops->low_rank_gradient(be, &l, &one, perta_array_at(x, first * in),
                                   perta_array_at(dy, first * out), da_parts, db_parts, rows, room);
    }
}

static const size_t low_rank_shapes[][4] = {
    {1, 1, 1, 1}, {31, 7, 33, 2}, {33, 64, 257, 9}, {257, 130, 40, 8}, {201, 9, 300, 40}};

/* Sums of products of sums. */
static void compare_low_rank(const size_t shape[4])
{
    size_t n = shape[0], out = shape[1], in = shape[2], r = shape[3];
    struct low_rank c = {n, out, in, r, .a = pair(r * in, 1), .b = pair(out * r, 2)};
    struct outputs o[N_BACKENDS], most;
    c.x = pair(n * in, 3);
    c.y = pair(n * out, 4);
    c.dx = pair(n * in, 5);
    c.dy = pair(n * out, 6);
    c.da = pair(r * in, 7);
    c.db = pair(out * r, 8);
    run_all(low_rank_run, &c, o);
    run_magnitudes(low_rank_run, &c, &most);
    within(o, "y", (double)(in + r) + 4, values(&most, "y"));
    within(o, "dx", (double)(out + r) + 4, values(&most, "dx"));
    within(o, "da", (double)(out + n) + 4, values(&most, "da"));
    within(o, "db", (double)(in + n) + 4, values(&most, "db"));
    for (int b = ONE; b < N_BACKENDS; b++) {
        ck_assert_mem_eq(named(&o[b], "da in parts")->bytes, named(&o[b], "da")->bytes, r * in * 4);
        ck_assert_mem_eq(named(&o[b], "db in parts")->bytes, named(&o[b], "db")->bytes,
                         out * r * 4);
    }
    drop_all(o);
    drop(&most);
    struct pair all[] = {c.a, c.b, c.x, c.y, c.dx, c.dy, c.da, c.db};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

START_TEST(low_rank)
{
    compare_low_rank(low_rank_shapes[_i]);
}
END_TEST

/* With bfloat16 products, those of LoRA stay float32. */
START_TEST(low_rank_beside_bf16)
{
    struct perta_cpu_needs all = g_all;
    all.bf16 = true;
    if (!perta_gemm_can_bf16())
        return;
    close_backends();
    open_backends(&all);
    compare_low_rank(low_rank_shapes[3]);
}
END_TEST

/* ---- vectors, training ---- */

#define V_N 100003

static void vector_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    bool finite;
    struct perta_array d = input(be, o, x->f, V_N);
    struct perta_array sums = output(be, o, "sums", F64, x->d, V_N);
    struct perta_array squares = output(be, o, "squares", F64, x->d, V_N);
    struct perta_array alone = output(be, o, "alone", F64, x->d, V_N);
    struct perta_array means = output(be, o, "means", F32, NULL, V_N);
    begin(be);
    be->ops->accumulate(be, sums, squares, d, V_N);
    be->ops->accumulate(be, alone, (struct perta_array){0}, d, V_N);
    be->ops->mean(be, means, sums, 3, V_N, &finite);
    if (broken)
        return;
    ck_assert_ok(perta_backend_wait(be, &err));
    ck_assert(finite);
}

START_TEST(vectors)
{
    struct pair x = pair(V_N, 1);
    struct outputs o[N_BACKENDS];
    run_all(vector_run, &x, o);
    for (size_t i = 0; i < o[ONE].n; i++)
        same(o, o[ONE].of[i].name);
    ck_assert(values(&o[ONE], "means")[5] == (double)(float)(2 * x.d[5] / 3));
    ck_assert(values(&o[ONE], "squares")[5] == x.d[5] + x.d[5] * x.d[5]);
    drop_all(o);
    release(x);
}
END_TEST

START_TEST(a_mean_that_no_float32_holds_is_told)
{
    const double bad[] = {1e300, -1e300, NAN, INFINITY};
    for (int b = 0; b < N_BACKENDS; b++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            struct perta_backend *be = backends[b];
            struct outputs o = {0};
            double sums[] = {1, bad[i], 2};
            bool finite = true;
            struct perta_array from = output(be, &o, "sums", F64, sums, 3);
            be->ops->mean(be, output(be, &o, "means", F32, NULL, 3), from, 1, 3, &finite);
            ck_assert_ok(perta_backend_wait(be, &err));
            ck_assert(!finite);
            drop(&o);
        }
}
END_TEST

static void adamw_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    float *zeros = alloc(x->n * sizeof *zeros);
    struct perta_array w = output(be, o, "weight", F32, x->f, x->n);
    struct perta_array m = output(be, o, "first", F32, zeros, x->n);
    struct perta_array v = output(be, o, "second", F32, zeros, x->n);
    struct perta_array g = input(be, o, x->f, x->n);
    begin(be);
    for (uint64_t step = 1; step <= 3; step++)
        be->ops->adamw(be, w, m, v, g, x->n, 1e-2f, 1e-1f, step);
    free(zeros);
}

START_TEST(adamw)
{
    struct pair x = pair(V_N, 1);
    struct outputs o[N_BACKENDS];
    run_all(adamw_run, &x, o);
    for (size_t i = 0; i < o[ONE].n; i++)
        same(o, o[ONE].of[i].name);
    /* gradients that do not change: steps of the learning rate, beside the decay */
    double w = x.d[3];
    for (int step = 0; step < 3; step++)
        w = w * (1 - 1e-3) - 1e-2 * (x.d[3] > 0 ? 1 : -1);
    ck_assert_double_lt(fabs(values(&o[ONE], "weight")[3] - w), 1e-6);
    drop_all(o);
    release(x);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, linear, 0, N_LINEARS);
    tcase_add_loop_test(tests, linear_in_bf16, 0, N_LINEARS);
    tcase_add_loop_test(tests, gradient, 0, sizeof gradients / sizeof *gradients);
    tcase_add_loop_test(tests, gradient_in_bf16, 0, sizeof gradients / sizeof *gradients);
    tcase_add_loop_test(tests, low_rank, 0, sizeof low_rank_shapes / sizeof *low_rank_shapes);
    tcase_add_test(tests, low_rank_beside_bf16);
    tcase_add_test(tests, vectors);
    tcase_add_test(tests, a_mean_that_no_float32_holds_is_told);
    tcase_add_test(tests, adamw);
    return run_suite("backend", tests);
}
