/* RMSNorm and LayerNorm on both backends: against a forward pass in double, every backward pass
 * against its finite differences; and the CPU's against the reference's, within what rounding can
 * do (test_backend.c). */
#include "tests/backends.h"
#include "tests/llm_double.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

struct shape {
    size_t T, H, n_weights;
    float plus;
    bool weight, bias;
};

struct norm {
    struct shape of;
    bool mean; /* LayerNorm */
    struct pair x, weight, bias, dy, dx, dweight, dbias;
};

#define EPS 1e-2f /* large enough to count */

static struct norm make(const struct shape *of, bool mean)
{
    size_t n = of->T * of->H, w = of->n_weights * of->H;
    struct norm c = {*of,        mean,       pair(n, 1), pair(w, 2), pair(w, 6),
                     pair(n, 3), pair(n, 4), pair(w, 5), pair(w, 7)};
    for (size_t i = 0; mean && i < n; i++)
        c.x.d[i] = (double)(c.x.f[i] += 0.7f); /* a mean that counts */
    return c;
}

static void release_norm(struct norm *c)
{
    struct pair all[] = {c->x, c->weight, c->bias, c->dy, c->dx, c->dweight, c->dbias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        release(all[i]);
}

static void norm_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct norm *c = ctx;
    const struct perta_array none = {0};
    size_t T = c->of.T, H = c->of.H, n = T * H, w = c->of.n_weights * H;
    struct perta_norm norm = {.weight = c->of.weight ? input(be, o, c->weight.f, w) : none,
                              .bias = c->of.bias ? input(be, o, c->bias.f, w) : none,
                              .eps = EPS,
                              .plus = c->of.plus,
                              .n_weights = c->of.n_weights};
    struct perta_array x = input(be, o, c->x.f, n), dy = input(be, o, c->dy.f, n);
    struct perta_array y = output(be, o, "y", F32, NULL, n);
    struct perta_array stats = output(be, o, "stats", F32, NULL, c->mean ? 2 * T : T);
    struct perta_array dx = output(be, o, "dx", F32, c->dx.f, n);
    struct perta_array dweight =
        c->of.weight ? output(be, o, "dweight", F32, c->dweight.f, w) : none;
    struct perta_array dbias = c->of.bias ? output(be, o, "dbias", F32, c->dbias.f, w) : none;
    begin(be);
    if (c->mean) {
        be->ops->layernorm_forward(be, &norm, y, stats, x, T, H);
        be->ops->layernorm_backward(be, &norm, dx, dy, x, stats, T, H);
        be->ops->layernorm_backward_weight(be, &norm, dweight, dbias, dy, x, stats, T, H);
    } else {
        be->ops->rmsnorm_forward(be, &norm, y, stats, x, T, H);
        be->ops->rmsnorm_backward(be, &norm, dx, dy, x, stats, T, H);
        if (c->of.weight)
            be->ops->rmsnorm_backward_weight(be, &norm, dweight, dy, x, stats, T, H);
    }
}

/* ---- in double ---- */

static double weight_of(const struct norm *c, size_t t, size_t i)
{
    double w = c->weight.d[t % c->of.n_weights * c->of.H + i];
    return c->of.weight ? w + (double)c->of.plus : 1;
}

/* Of row t; *mean is 0 for RMSNorm. */
static double rstd_double(const struct norm *c, size_t t, double *mean)
{
    const double *row = c->x.d + t * c->of.H;
    double H = (double)c->of.H, square = 0;
    *mean = 0;
    for (size_t i = 0; c->mean && i < c->of.H; i++)
        *mean += row[i] / H;
    for (size_t i = 0; i < c->of.H; i++)
        square += (row[i] - *mean) * (row[i] - *mean) / H;
    return 1 / sqrt(square + (double)EPS);
}

static void forward_double(const struct norm *c, double *y)
{
    size_t H = c->of.H;
    for (size_t t = 0; t < c->of.T; t++) {
        double mean, r = rstd_double(c, t, &mean);
        for (size_t i = 0; i < H; i++)
            y[t * H + i] = (c->x.d[t * H + i] - mean) * r * weight_of(c, t, i) +
                           (c->of.bias ? c->bias.d[t % c->of.n_weights * H + i] : 0);
    }
}

static double norm_value(void *ctx)
{
    const struct norm *c = ctx;
    double *y = alloc(c->x.n * sizeof *y);
    forward_double(c, y);
    double value = dot(y, c->dy.d, c->dy.n);
    free(y);
    return value;
}

/* ---- magnitudes of terms: those that bounds are relative to ---- */

struct magnitudes {
    double *y, *stats, *dx, *dweight, *dbias;
};

static void row_magnitudes(const struct norm *c, size_t t, const struct magnitudes *m)
{
    size_t H = c->of.H, n_stats = c->mean ? 2 : 1, w = t % c->of.n_weights * H;
    double mean, r = rstd_double(c, t, &mean), g = 0, gx = 0;
    m->stats[t * n_stats] = fabs(mean) + 1e-9;
    m->stats[(t + 1) * n_stats - 1] = r;
    for (size_t i = 0; i < H; i++) {
        double one = fabs(weight_of(c, t, i) * c->dy.d[t * H + i]) / (double)H;
        g += one;
        gx += one * (fabs(c->x.d[t * H + i] - mean) + fabs(mean));
    }
    for (size_t i = 0, k = t * H; i < H; i++, k++) {
        double x = fabs(c->x.d[k] - mean) + fabs(mean), wi = fabs(weight_of(c, t, i));
        m->y[k] = wi * r * x + (c->of.bias ? fabs(c->bias.d[w + i]) : 0);
        m->dx[k] = fabs(c->dx.d[k]) + wi * fabs(c->dy.d[k]) * r + gx * r * r * r * x +
                   (c->mean ? g * r : 0);
        m->dweight[w + i] += fabs(c->dy.d[k]) * x * r;
        m->dbias[w + i] += fabs(c->dy.d[k]);
    }
}

static double *zeros(size_t n)
{
    double *of = alloc(n * sizeof *of);
    memset(of, 0, n * sizeof *of);
    return of;
}

static struct magnitudes magnitudes_of(const struct norm *c)
{
    size_t n = c->x.n, w = c->weight.n;
    struct magnitudes m = {zeros(n), zeros(2 * c->of.T), zeros(n), zeros(w), zeros(w)};
    for (size_t t = 0; t < c->of.T; t++)
        row_magnitudes(c, t, &m);
    for (size_t i = 0; i < w; i++) {
        m.dweight[i] += fabs(c->dweight.d[i]);
        m.dbias[i] += fabs(c->dbias.d[i]);
    }
    return m;
}

/* rstd: the mean square, the sum with eps, the root of both (half), the quotient. y: LayerNorm's
 * mean, the difference, two products, the sum with a bias. dx: rstd differs, three times in its
 * third term; that has six roundings besides, LayerNorm's with its mean eight, and sums two. Each:
 * the reference's. */
static void check(struct norm *c)
{
    double units = c->mean ? 3 : 0, *y = alloc(c->x.n * sizeof *y);
    struct magnitudes m = magnitudes_of(c);
    struct outputs o[N_BACKENDS];
    run_all(norm_run, c, o);
    within(o, "stats", 3 + 1, m.stats);
    within(o, "y", 5 + units + 1, m.y);
    within(o, "dx", 3 * 4 + 6 + units + 2 + 1, m.dx);
    forward_double(c, y);
    both_are(o, "y", y);
    both_gradients(o, "dx", true, c->x.d, norm_value, c);
    if (c->of.weight) {
        within(o, "dweight", 4 + 3 + units + 1, m.dweight);
        both_gradients(o, "dweight", true, c->weight.d, norm_value, c);
    }
    if (c->of.bias) {
        within(o, "dbias", 2 + 1, m.dbias);
        both_gradients(o, "dbias", true, c->bias.d, norm_value, c);
    }
    drop_all(o);
    double *const mine[] = {y, m.y, m.stats, m.dx, m.dweight, m.dbias};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        free(mine[i]);
    release_norm(c);
}

static const struct shape rms_shapes[] = {
    {1, 1, 1, 0, true, false},     {1, 33, 1, 0, true, false},  {31, 300, 1, 0, true, false},
    {257, 128, 1, 0, true, false}, {31, 33, 1, 1, true, false}, {257, 5, 1, 0, false, false},
    {93, 20, 3, 0, true, false},   {7, 130, 3, 1, true, false}, {2, 9, 4, 0, true, false},
};

START_TEST(rmsnorm)
{
    struct norm c = make(&rms_shapes[_i], false);
    check(&c);
}
END_TEST

static const struct shape layer_shapes[] = {
    {1, 2, 1, 0, true, true},     {1, 33, 1, 0, true, false}, {31, 300, 1, 0, true, true},
    {257, 128, 1, 0, true, true}, {31, 33, 1, 1, true, true}, {257, 5, 1, 0, false, false},
    {93, 20, 3, 0, true, false},  {7, 130, 3, 0, true, true}, {5, 17, 1, 0, false, true},
};

START_TEST(layernorm)
{
    struct norm c = make(&layer_shapes[_i], true);
    check(&c);
}
END_TEST

/* A row of equal numbers: its variance is 0, and what is left is the bias. */
START_TEST(layernorm_of_a_constant)
{
    struct norm c = make(&(struct shape){3, 37, 1, 0, true, true}, true);
    struct outputs o[N_BACKENDS];
    for (size_t i = 0; i < c.x.n; i++)
        c.x.f[i] = 0.1f;
    run_all(norm_run, &c, o);
    for (size_t i = 0; i < c.x.n; i++)
        for (int b = 0; b < N_BACKENDS; b++)
            ck_assert_double_lt(fabs(values(&o[b], "y")[i] - c.bias.d[i % 37]), 1e-6);
    drop_all(o);
    release_norm(&c);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, rmsnorm, 0, sizeof rms_shapes / sizeof *rms_shapes);
    tcase_add_loop_test(tests, layernorm, 0, sizeof layer_shapes / sizeof *layer_shapes);
    tcase_add_test(tests, layernorm_of_a_constant);
    return run_suite("backend_norm", tests);
}
