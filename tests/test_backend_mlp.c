/* Activations, with a gate and without, on both backends: against double, every backward pass
 * against its finite differences; and the CPU's against the reference's, within what rounding can
 * do (test_backend.c). */
#include "tests/backends.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

/* ---- in double ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double silu(double x)
{
    return x * sigmoid(x);
}

static double gelu(double x)
{
    return x * 0.5 * (1 + erf(x / sqrt(2)));
}

static double gelu_tanh(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * pow(x, 3))));
}

static double relu(double x)
{
    return fmax(x, 0);
}

static double relu2(double x)
{
    return relu(x) * relu(x);
}

static double quick_gelu(double x)
{
    return x * sigmoid(1.702 * x);
}

#define ALPHA 1.702f
#define LIMIT 7.0f

static double clamped_swiglu(double gate, double up)
{
    double g = fmin(gate, (double)LIMIT), u = fmax(fmin(up, (double)LIMIT), -(double)LIMIT);
    return (u + 1) * g * sigmoid((double)ALPHA * g);
}

/* ---- runs ---- */

struct named_kind {
    const char *name; /* in config.json; NULL: it has none */
    enum perta_activation_kind kind;
    double (*f)(double x);
};

static const struct named_kind kinds[] = {
    {"silu", PERTA_SILU, silu},
    {"gelu", PERTA_GELU, gelu},
    {"gelu_pytorch_tanh", PERTA_GELU_TANH, gelu_tanh},
    {"relu", PERTA_RELU, relu},
    {"relu2", PERTA_RELU2, relu2},
    {"quick_gelu", PERTA_QUICK_GELU, quick_gelu},
    {"sigmoid", PERTA_SIGMOID, sigmoid},
    {NULL, PERTA_CLAMPED_SWIGLU, NULL},
};
#define N_GATED (sizeof kinds / sizeof *kinds)
#define N_PLAIN (N_GATED - 1)

struct mlp {
    struct perta_activation act;
    double (*f)(double x);
    struct pair gate, up, dh;
};

#define N 70001 /* more pieces than one */

static struct mlp make(const struct named_kind *kind)
{
    struct mlp c = {
        {kind->kind, ALPHA, LIMIT}, kind->f, pair(N, 1), pair(N, 2), pair(N, 3),
    };
    for (size_t i = 0; i < N; i++) {
        c.gate.d[i] = (double)(c.gate.f[i] *= 20);
        if (kind->kind == PERTA_CLAMPED_SWIGLU)
            c.up.d[i] = (double)(c.up.f[i] *= 10);
    }
    return c;
}

static void release_mlp(struct mlp *c)
{
    release(c->gate);
    release(c->up);
    release(c->dh);
}

static void glu_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct mlp *c = ctx;
    struct perta_array gate = input(be, o, c->gate.f, N), up = input(be, o, c->up.f, N);
    struct perta_array h = output(be, o, "h", F32, NULL, N);
    struct perta_array dup = output(be, o, "dup", F32, NULL, N);
    struct perta_array dgate = output(be, o, "dgate", F32, c->dh.f, N); /* in place of dh */
    begin(be);
    be->ops->glu_forward(be, &c->act, h, gate, up, N);
    be->ops->glu_backward(be, &c->act, dgate, dup, dgate, gate, up, N);
}

static void plain_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct mlp *c = ctx;
    struct perta_array x = input(be, o, c->gate.f, N), dh = input(be, o, c->dh.f, N);
    struct perta_array h = output(be, o, "h", F32, NULL, N);
    struct perta_array dx = output(be, o, "dx", F32, NULL, N);
    struct perta_array in_place = output(be, o, "in place", F32, c->dh.f, N);
    begin(be);
    be->ops->act_forward(be, &c->act, h, x, N);
    be->ops->act_backward(be, &c->act, dx, dh, x, N);
    be->ops->act_backward(be, &c->act, in_place, in_place, x, N);
}

static double unit_double(const struct mlp *c, size_t i)
{
    double gate = c->gate.d[i], up = c->up.d[i];
    return c->f ? c->f(gate) * up : clamped_swiglu(gate, up);
}

static double glu_value(void *ctx)
{
    const struct mlp *c = ctx;
    double sum = 0;
    for (size_t i = 0; i < N; i++)
        sum += unit_double(c, i) * c->dh.d[i];
    return sum;
}

static double plain_value(void *ctx)
{
    const struct mlp *c = ctx;
    double sum = 0;
    for (size_t i = 0; i < N; i++)
        sum += c->f(c->gate.d[i]) * c->dh.d[i];
    return sum;
}

/* ---- bounds ---- */

/* An exponential is wrong by 3 (test_kernels.c), and by as much again for each unit of its
 * argument, so sigmoid by 5 and 1 - sigmoid by 6, not of itself but of 1. Terms of slopes are
 * relative to 1 and the argument. */
#define OF_EXPONENTIAL 3

/* Magnitudes: of a value at x, x itself (1 for a sigmoid); of its slope, 1 + |x|; ReLU^2's are x
 * times as large. */
static double value_scale(const struct mlp *c, double x)
{
    return c->act.kind == PERTA_SIGMOID ? 1 : c->act.kind == PERTA_RELU2 ? x * x : fabs(x);
}

static double slope_scale(double x)
{
    return 1 + fabs(x);
}

START_TEST(with_a_gate)
{
    struct mlp c = make(&kinds[_i]);
    struct outputs o[N_BACKENDS];
    double *want = alloc(N * sizeof *want), *h = alloc(N * sizeof *h);
    double *dgate = alloc(N * sizeof *dgate), *dup = alloc(N * sizeof *dup);
    for (size_t i = 0; i < N; i++) {
        double up = fabs(c.up.d[i]) + (c.act.kind == PERTA_CLAMPED_SWIGLU);
        want[i] = unit_double(&c, i);
        h[i] = value_scale(&c, c.gate.d[i]) * up;
        dup[i] = value_scale(&c, c.gate.d[i]) * fabs(c.dh.d[i]);
        dgate[i] = slope_scale(c.gate.d[i]) * up * fabs(c.dh.d[i]);
    }
    run_all(glu_run, &c, o);
    within(o, "h", 5 + 1 + 1, h);
    within(o, "dup", 5 + 2 + 1, dup);
    within(o, "dgate", 16 + 1, dgate);
    both_are(o, "h", want);
    both_gradients(o, "dgate", false, c.gate.d, glu_value, &c);
    both_gradients(o, "dup", false, c.up.d, glu_value, &c);
    drop_all(o);
    double *const mine[] = {want, h, dgate, dup};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++)
        free(mine[i]);
    release_mlp(&c);
}
END_TEST

START_TEST(without_a_gate)
{
    struct mlp c = make(&kinds[_i]);
    struct outputs o[N_BACKENDS];
    double *want = alloc(N * sizeof *want), *h = alloc(N * sizeof *h), *dx = alloc(N * sizeof *dx);
    for (size_t i = 0; i < N; i++) {
        want[i] = c.f(c.gate.d[i]);
        h[i] = value_scale(&c, c.gate.d[i]);
        dx[i] = slope_scale(c.gate.d[i]) * fabs(c.dh.d[i]);
    }
    run_all(plain_run, &c, o);
    within(o, "h", 5 + 1, h);
    within(o, "dx", 16 + 1, dx);
    both_are(o, "h", want);
    both_gradients(o, "dx", false, c.gate.d, plain_value, &c);
    for (int b = 0; b < N_BACKENDS; b++)
        ck_assert(!memcmp(named(&o[b], "dx")->bytes, named(&o[b], "in place")->bytes, N * 4));
    drop_all(o);
    free(want);
    free(h);
    free(dx);
    release_mlp(&c);
}
END_TEST

/* ---- corners, and what is no number ---- */

/* PyTorch's: a ReLU has no slope at 0, a clamp has that of its inside at its ends. */
static const float corner_gate[] = {0, -0.0f, LIMIT, LIMIT, 8, 1, 1, NAN};
static const float corner_up[] = {1, 1, LIMIT, -LIMIT, 1, 8, -8, 1};
#define N_CORNERS 8

static void corners_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct perta_activation *act = ctx;
    float one[N_CORNERS];
    for (size_t i = 0; i < N_CORNERS; i++)
        one[i] = 1;
    struct perta_array gate = as_is(be, o, corner_gate, N_CORNERS);
    struct perta_array up = as_is(be, o, corner_up, N_CORNERS);
    struct perta_array h = output(be, o, "h", F32, NULL, N_CORNERS);
    struct perta_array dup = output(be, o, "dup", F32, NULL, N_CORNERS);
    struct perta_array dgate = output(be, o, "dgate", F32, one, N_CORNERS);
    begin(be);
    be->ops->glu_forward(be, act, h, gate, up, N_CORNERS);
    be->ops->glu_backward(be, act, dgate, dup, dgate, gate, up, N_CORNERS);
}

START_TEST(corners)
{
    const struct perta_activation act = {kinds[_i].kind, ALPHA, LIMIT};
    for (int b = 0; b < N_BACKENDS; b++) {
        struct outputs o;
        run_on(backends[b], corners_run, &act, &o);
        const double *dgate = values(&o, "dgate"), *dup = values(&o, "dup");
        ck_assert(isnan(values(&o, "h")[7])); /* nothing makes a number of what is none */
        if (act.kind == PERTA_RELU || act.kind == PERTA_RELU2)
            ck_assert(dgate[0] == 0 && dgate[1] == 0);
        if (act.kind == PERTA_CLAMPED_SWIGLU) {
            ck_assert(dgate[2] > 1 && dup[2] > 1 && dup[3] > 1);
            ck_assert(dgate[4] == 0 && dup[4] > 1 && dup[5] == 0 && dup[6] == 0);
        }
        drop(&o);
    }
}
END_TEST

START_TEST(names)
{
    struct perta_activation act = {.kind = PERTA_SILU};
    for (size_t i = 0; i < N_PLAIN; i++) {
        ck_assert(perta_activation_named(kinds[i].name, &act));
        ck_assert_int_eq(act.kind, kinds[i].kind);
    }
    ck_assert(perta_activation_named("swish", &act) && act.kind == PERTA_SILU);
    ck_assert(perta_activation_named("gelu_new", &act) && act.kind == PERTA_GELU_TANH);
    ck_assert(perta_activation_named("gelu_fast", &act) && act.kind == PERTA_GELU_TANH);
    ck_assert(perta_activation_named("gelu_python", &act) && act.kind == PERTA_GELU);
    const char *const unknown[] = {"gelu_10", "SiLU", "mish", "xielu", "", NULL};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        ck_assert(!perta_activation_named(unknown[i], &act));
    ck_assert_int_eq(act.kind, PERTA_GELU);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_loop_test(tests, with_a_gate, 0, N_GATED);
    tcase_add_loop_test(tests, without_a_gate, 0, N_PLAIN);
    tcase_add_loop_test(tests, corners, 0, N_GATED);
    tcase_add_test(tests, names);
    return run_suite("backend_mlp", tests);
}
