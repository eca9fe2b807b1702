/* The parts of a mixture of experts (estimators/model/mixture.h) on both backends: router, shared
 * expert, and experts with their weights apart, fused, interleaved, transposed and with biases.
 * Every gradient is compared with finite differences of a forward pass in double. And rows that go to
 * experts and come back, in memory and in files. */
#include "tests/scratch.h"

#include "estimators/model/block.h"
#include "estimators/model/mixture.h"
#include "estimators/model/store.h"
#include "estimators/passes/experts.h"
#include "tests/backends.h"

enum { H = 6, INNER = 5, S = 4, E = 3, T = 7 }; /* the shared expert has S, others INNER */

static void open_all(void)
{
    enter();
    open_backends(&(struct perta_cpu_needs){.widest = 64, .rows = 64, .longest = 64});
}

static void close_all(void)
{
    close_backends();
    leave();
}

/* ---- rows of parameters ---- */

#define WHEN PERTA_LAYER_MIXTURE
#define HIDDEN PERTA_WIDTH_HIDDEN
#define EXPERT PERTA_WIDTH_EXPERT
#define BOTH PERTA_WIDTH_EXPERT_GATE_UP
#define SHARED PERTA_WIDTH_SHARED
#define VECTOR PERTA_WIDTH_NONE

static const struct perta_param_row apart[] = {
    {PERTA_EXPERT_GATE, "%u.gate", EXPERT, HIDDEN, WHEN, false},
    {PERTA_EXPERT_UP, "%u.up", EXPERT, HIDDEN, WHEN, false},
    {PERTA_EXPERT_DOWN, "%u.down", HIDDEN, EXPERT, WHEN, false},
};
static const struct perta_param_row apart_with_biases[] = {
    {PERTA_EXPERT_GATE, "%u.gate", EXPERT, HIDDEN, WHEN, false},
    {PERTA_EXPERT_GATE_BIAS, "%u.gate_bias", VECTOR, EXPERT, WHEN, false},
    {PERTA_EXPERT_UP, "%u.up", EXPERT, HIDDEN, WHEN, false},
    {PERTA_EXPERT_UP_BIAS, "%u.up_bias", VECTOR, EXPERT, WHEN, false},
    {PERTA_EXPERT_DOWN, "%u.down", HIDDEN, EXPERT, WHEN, false},
    {PERTA_EXPERT_DOWN_BIAS, "%u.down_bias", VECTOR, HIDDEN, WHEN, false},
};
static const struct perta_param_row fused[] = {
    {PERTA_EXPERT_GATE_UP, "gate_up", BOTH, HIDDEN, WHEN, false},
    {PERTA_EXPERT_DOWN, "down", HIDDEN, EXPERT, WHEN, false},
};
static const struct perta_param_row transposed[] = {
    {PERTA_EXPERT_GATE_UP, "gate_up", BOTH, HIDDEN, WHEN, true},
    {PERTA_EXPERT_GATE_UP_BIAS, "gate_up_bias", VECTOR, BOTH, WHEN, false},
    {PERTA_EXPERT_DOWN, "down", HIDDEN, EXPERT, WHEN, true},
    {PERTA_EXPERT_DOWN_BIAS, "down_bias", VECTOR, HIDDEN, WHEN, false},
};
static const struct perta_param_row shared[] = {
    {PERTA_ROUTER, "router", PERTA_WIDTH_EXPERTS, HIDDEN, WHEN, false},
    {PERTA_ROUTER_BIAS, "router_bias", VECTOR, PERTA_WIDTH_EXPERTS, WHEN, false},
    {PERTA_SHARED_GATE, "shared.gate", SHARED, HIDDEN, WHEN, false},
    {PERTA_SHARED_UP, "shared.up", SHARED, HIDDEN, WHEN, false},
    {PERTA_SHARED_UP_BIAS, "shared.up_bias", VECTOR, SHARED, WHEN, false},
    {PERTA_SHARED_DOWN, "shared.down", HIDDEN, SHARED, WHEN, false},
    {PERTA_SHARED_DOWN_BIAS, "shared.down_bias", VECTOR, HIDDEN, WHEN, false},
    {PERTA_SHARED_SCORE, "score", PERTA_WIDTH_ONE, HIDDEN, WHEN | PERTA_OWN_1, false},
    {PERTA_SHARED_SCORE_BIAS, "score_bias", VECTOR, PERTA_WIDTH_ONE, WHEN | PERTA_OWN_1, false},
};

#define N(list) (sizeof(list) / sizeof *(list))

static const struct variant {
    const struct perta_param_row *rows;
    size_t n;
    bool interleaved, scales_input;
    uint32_t options;
} variants[] = {
    {apart, N(apart), false, false, 0},
    {apart, N(apart), false, true, 0},
    {apart_with_biases, N(apart_with_biases), false, false, 0},
    {fused, N(fused), false, false, 0},
    {fused, N(fused), false, true, 0},
    {fused, N(fused), true, false, 0},
    {transposed, N(transposed), true, false, 0},
    {transposed, N(transposed), false, true, 0},
};
static const struct variant with_score = {shared, N(shared), false, false, PERTA_OWN_1};
static const struct variant without_score = {shared, N(shared), false, false, 0};

/* ---- a layer whose parameters are here ---- */

struct lab {
    struct perta_parameters parameters; /* first member */
    struct perta_gradient_sink sink;
    struct perta_family family;
    struct perta_llm llm;
    struct perta_backend *be;
    struct pair values[PERTA_N_PARAMS]; /* as stored */
    float *gradients[PERTA_N_PARAMS];   /* what came to the sink */
    struct perta_array on_be[PERTA_N_PARAMS];
    struct pair x, dy, weights, dlogits; /* (T, H), (T, H), (T), (T, E) */
};

static struct lab lab;

static size_t size_of(const struct perta_param_row *row)
{
    size_t out, in;
    perta_llm_shape(&lab.llm, row, &out, &in);
    return (out ? out : 1) * in;
}

static int get(struct perta_parameters *from, struct perta_site site,
               const struct perta_param_row *row, struct perta_value *value, struct perta_err *e)
{
    struct perta_array *at = &lab.on_be[row->param];
    const struct pair *p = &lab.values[row->param];
    (void)from;
    ck_assert_uint_eq(site.expert, perta_is_of_expert(row->param) ? 2 : 0);
    *value = (struct perta_value){.dtype = PERTA_F32, .transposed = row->transposed};
    perta_llm_shape(&lab.llm, row, &value->out, &value->in);
    if (!perta_array_is(*at)) {
        ck_assert_ok(lab.be->ops->alloc(lab.be, p->n * sizeof *p->f, &at->buffer, e));
        lab.be->ops->put(lab.be, *at, p->f, p->n * sizeof *p->f);
    }
    value->data = *at;
    return 0;
}

static int on_linear(struct perta_gradient_sink *sink, struct perta_site site,
                     enum perta_param param, const struct perta_batch *batch, struct perta_array x,
                     struct perta_array dy, struct perta_err *e)
{
    const struct perta_param_row *row = perta_llm_param(&lab.llm, site.layer, param);
    size_t out, in;
    (void)sink;
    perta_llm_shape(&lab.llm, row, &out, &in);
    float *xs = alloc(batch->n * in * sizeof *xs), *dys = alloc(batch->n * out * sizeof *dys);
    lab.be->ops->get(lab.be, x, xs, batch->n * in * sizeof *xs);
    lab.be->ops->get(lab.be, dy, dys, batch->n * out * sizeof *dys);
    ck_assert_ok(perta_backend_wait(lab.be, e));
    for (size_t o = 0; o < out; o++)
        for (size_t i = 0; i < in; i++) {
            double sum = 0;
            for (size_t t = 0; t < batch->n; t++)
                sum += (double)dys[t * out + o] * (double)xs[t * in + i];
            lab.gradients[param][row->transposed ? i * out + o : o * in + i] += (float)sum;
        }
    free(xs);
    free(dys);
    return 0;
}

static int on_vector(struct perta_gradient_sink *sink, struct perta_site site,
                     enum perta_param param, size_t sequence, struct perta_array d,
                     struct perta_err *e)
{
    size_t n = size_of(perta_llm_param(&lab.llm, site.layer, param));
    float *some = alloc(n * sizeof *some);
    (void)sink;
    (void)sequence;
    lab.be->ops->get(lab.be, d, some, n * sizeof *some);
    ck_assert_ok(perta_backend_wait(lab.be, e));
    for (size_t i = 0; i < n; i++)
        lab.gradients[param][i] += some[i];
    free(some);
    return 0;
}

static void open_lab(const struct variant *v)
{
    lab = (struct lab){.parameters = {get},
                       .sink = {on_linear, on_vector, NULL, NULL},
                       .family = {.params = v->rows,
                                  .n_params = v->n,
                                  .norm = &perta_rmsnorm_part,
                                  .attention = &perta_attention_part},
                       .llm = {.n_layers = 1,
                               .hidden = H,
                               .n_heads = 1,
                               .n_kv_heads = 1,
                               .head_dim = 2,
                               .value_dim = 2,
                               .options = v->options,
                               .layers = {PERTA_LAYER_MIXTURE},
                               .any_layer = PERTA_LAYER_MIXTURE,
                               .activation = {.kind = PERTA_SILU},
                               .residual_multiplier = 1,
                               .gate_up_interleaved = v->interleaved,
                               .n_experts = E,
                               .expert_intermediate = INNER,
                               .shared_intermediate = S,
                               .router = {.n_experts = E, .scales_input = v->scales_input}},
                       .x = pair(T * H, 1),
                       .dy = pair(T * H, 2),
                       .weights = pair(T, 3),
                       .dlogits = pair(T * E, 4)};
    lab.llm.family = &lab.family;
    for (int p = 0; p < PERTA_N_PARAMS; p++) {
        const struct perta_param_row *row = perta_llm_param(&lab.llm, 0, (enum perta_param)p);
        lab.values[p] = row ? pair(size_of(row), (uint64_t)p + 10) : (struct pair){0};
        lab.gradients[p] = row ? alloc(size_of(row) * sizeof(float)) : NULL;
    }
}

static void close_lab(void)
{
    release(lab.x);
    release(lab.dy);
    release(lab.weights);
    release(lab.dlogits);
    for (int p = 0; p < PERTA_N_PARAMS; p++) {
        release(lab.values[p]);
        free(lab.gradients[p]);
    }
}

/* On a backend, nothing of which is left afterwards. */
static struct perta_layer begin_on(struct perta_backend *be, struct perta_site site)
{
    lab.be = be;
    memset(lab.on_be, 0, sizeof lab.on_be);
    for (int p = 0; p < PERTA_N_PARAMS; p++)
        if (lab.gradients[p])
            memset(lab.gradients[p], 0, lab.values[p].n * sizeof(float));
    return (struct perta_layer){
        .llm = &lab.llm, .be = be, .from = &lab.parameters, .sink = &lab.sink, .site = site};
}

static void end_on(struct perta_backend *be, uint32_t work)
{
    for (int p = 0; p < PERTA_N_PARAMS; p++)
        if (perta_array_is(lab.on_be[p]))
            be->ops->free(be, lab.on_be[p].buffer);
    be->ops->free(be, work);
}

static const size_t sequences[] = {0, 3, T}, tiles[] = {0, T};
static const struct perta_batch batch = {
    .n = T, .sequences = {2, sequences, 0}, .tiles = {1, tiles, 0}};

static void put(struct perta_array to, const struct pair *p)
{
    lab.be->ops->put(lab.be, to, p->f, p->n * sizeof *p->f);
}

/* The caller frees it. */
static float *taken(struct perta_array from, size_t n)
{
    float *to = alloc(n * sizeof *to);
    lab.be->ops->get(lab.be, from, to, n * sizeof *to);
    ck_assert_ok(perta_backend_wait(lab.be, &err));
    return to;
}

static void check(const char *what, struct perta_array d, struct pair *x, function *f)
{
    float *have = taken(d, x->n);
    is_gradient(what, have, x->d, x->n, 1, f, NULL);
    free(have);
}

static void check_parameters(function *f)
{
    for (size_t i = 0; i < lab.family.n_params; i++) {
        const struct perta_param_row *row = &lab.family.params[i];
        struct pair *p = &lab.values[row->param];
        if (p->n)
            is_gradient(row->name, lab.gradients[row->param], p->d, p->n, 1, f, NULL);
    }
}

/* ---- in double ---- */

/* Output o of a linear of x (in). */
static double linear(enum perta_param param, size_t o, const double *x)
{
    const struct perta_param_row *row = perta_llm_param(&lab.llm, 0, param);
    size_t out, in;
    perta_llm_shape(&lab.llm, row, &out, &in);
    double sum = lab.values[param + 1].n ? lab.values[param + 1].d[o] : 0;
    for (size_t i = 0; i < in; i++)
        sum += lab.values[param].d[row->transposed ? i * out + o : o * in + i] * x[i];
    return sum;
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* y (H) = down(silu(gate x) * up x), of an MLP of that width. */
static void mlp(const struct perta_mlp_roles *roles, size_t width, const double *x, double *y)
{
    double h[INNER];
    bool by_two = lab.llm.gate_up_interleaved, is_fused = lab.values[roles->gate_up].n;
    for (size_t i = 0; i < width; i++) {
        double gate =
            is_fused ? linear(roles->gate_up, by_two ? 2 * i : i, x) : linear(roles->gate, i, x);
        double up = is_fused ? linear(roles->gate_up, by_two ? 2 * i + 1 : width + i, x)
                             : linear(roles->up, i, x);
        h[i] = silu(gate) * up;
    }
    for (size_t o = 0; o < H; o++)
        y[o] = linear(roles->down, o, h);
}

/* What is to be added for token t: y (H). */
static void expert_double(size_t t, double *y)
{
    double x[H], weight = lab.weights.d[t];
    bool first = lab.llm.router.scales_input;
    for (size_t i = 0; i < H; i++)
        x[i] = lab.x.d[t * H + i] * (first ? weight : 1);
    mlp(&perta_expert_roles, INNER, x, y);
    for (size_t i = 0; i < H; i++)
        y[i] *= first ? 1 : weight;
}

static void shared_double(size_t t, double *y)
{
    const double *x = lab.x.d + t * H;
    mlp(&perta_shared_roles, S, x, y);
    double score = lab.values[PERTA_SHARED_SCORE].n ? linear(PERTA_SHARED_SCORE, 0, x) : INFINITY;
    for (size_t i = 0; i < H; i++)
        y[i] /= 1 + exp(-score);
}

static double of_expert(void *ctx)
{
    double sum = 0, y[H];
    (void)ctx;
    for (size_t t = 0; t < T; t++) {
        expert_double(t, y);
        sum += dot(y, lab.dy.d + t * H, H);
    }
    return sum;
}

static double of_shared_and_router(void *ctx)
{
    double sum = 0, y[H];
    (void)ctx;
    for (size_t t = 0; t < T; t++) {
        shared_double(t, y);
        sum += dot(y, lab.dy.d + t * H, H);
        for (size_t e = 0; e < E; e++)
            sum += lab.dlogits.d[t * E + e] * linear(PERTA_ROUTER, e, lab.x.d + t * H);
    }
    return sum;
}

/* ---- tests ---- */

static void is_forward(const char *what, struct perta_array y, void (*f)(size_t t, double *y),
                       bool unweighted)
{
    float *have = taken(y, T * H);
    double want[T * H];
    for (size_t t = 0; t < T; t++) {
        f(t, want + t * H);
        for (size_t i = 0; unweighted && i < H; i++)
            want[t * H + i] /= lab.weights.d[t];
    }
    are_close(what, have, want, T * H);
    free(have);
}

static void an_expert(struct perta_backend *be)
{
    struct perta_layer layer = begin_on(be, perta_site_of_expert(0, 1));
    struct perta_array work = {0};
    struct perta_expert_acts acts;
    ck_assert_ok(
        be->ops->alloc(be, perta_expert_floats(&lab.llm, T) * sizeof(float), &work.buffer, &err));
    perta_expert_lay_out(&acts, &lab.llm, T, work);
    put(acts.mlp.x, &lab.x);
    perta_expert_forward(&layer, &batch, &acts, lab.weights.f);
    is_forward("y", acts.y, expert_double, !lab.llm.router.scales_input);
    put(acts.mlp.x, &lab.x);
    put(acts.dy, &lab.dy);
    perta_expert_backward(&layer, &batch, &acts, lab.weights.f);
    check("dx", acts.mlp.dx, &lab.x, of_expert);
    check("dweights", acts.dweights, &lab.weights, of_expert);
    check_parameters(of_expert);
    end_on(be, work.buffer);
}

START_TEST(an_expert_of_every_layout)
{
    open_lab(&variants[_i]);
    an_expert(backends[REFERENCE]);
    an_expert(backends[ONE]);
    close_lab();
}
END_TEST

static void shared_and_router(struct perta_backend *be)
{
    struct perta_layer layer = begin_on(be, perta_site_of(0));
    struct perta_array work = {0};
    struct perta_acts acts;
    ck_assert_ok(
        be->ops->alloc(be, perta_acts_floats(&lab.llm, T) * sizeof(float), &work.buffer, &err));
    perta_acts_lay_out(&acts, &lab.llm, T, work);
    put(acts.n2, &lab.x);
    perta_router_forward(&layer, &batch, &acts);
    float *logits = taken(acts.router, T * E);
    double want[T * E];
    for (size_t i = 0; i < T * E; i++)
        want[i] = linear(PERTA_ROUTER, i % E, lab.x.d + i / E * H);
    are_close("logits", logits, want, T * E);
    free(logits);
    perta_shared_forward(&layer, &batch, &acts);
    is_forward("shared", acts.branch_2, shared_double, false);
    put(acts.router, &lab.dlogits);
    put(acts.dbranch, &lab.dy);
    be->ops->zero(be, acts.dn, T * H);
    perta_shared_backward(&layer, &batch, &acts, acts.dbranch);
    perta_router_backward(&layer, &batch, &acts);
    check("dn", acts.dn, &lab.x, of_shared_and_router);
    check_parameters(of_shared_and_router);
    end_on(be, work.buffer);
}

START_TEST(a_shared_expert_and_the_router)
{
    open_lab(_i ? &with_score : &without_score);
    shared_and_router(backends[REFERENCE]);
    shared_and_router(backends[ONE]);
    close_lab();
}
END_TEST

/* ---- rows on their way ---- */

enum { ROWS = 40, WIDTH = 7, SOME = 9 };

static const uint32_t some_rows[SOME] = {39, 0, 17, 3, 4, 5, 38, 20, 11};

/* What gather takes, and what scatter_add leaves: taken (SOME, WIDTH), left (ROWS, WIDTH). */
static void go_and_return(struct perta_backend *be, uint64_t free_bytes, const float *by,
                          float *gathered, float *left)
{
    char dir[] = "scratch";
    struct perta_scratch scratch = {.be = be, .dir = dir, .free_bytes = free_bytes};
    struct perta_store store = {.fd = -1};
    struct pair rows = pair(ROWS * WIDTH, 5), more = pair(SOME * WIDTH, 6);
    struct outputs o = {0};
    struct perta_array to = buffer(be, &o, sizeof(float) * SOME * WIDTH);
    struct perta_array from = buffer(be, &o, sizeof(float) * SOME * WIDTH);
    struct perta_array room = buffer(be, &o, sizeof(float) * SOME * WIDTH);
    struct perta_array all = buffer(be, &o, sizeof(float) * ROWS * WIDTH);
    ck_assert_ok(perta_store_open(&store, &scratch, NULL, ROWS, WIDTH, &err));
    ck_assert_int_eq(store.buffer == 0, free_bytes == 0);
    ck_assert_ok(perta_store_put(&store, 0, ROWS, rows.f, &err));
    ck_assert_ok(perta_store_gather(&store, some_rows, SOME, to, &err));
    be->ops->get(be, to, gathered, sizeof(float) * SOME * WIDTH);
    be->ops->put(be, from, more.f, sizeof(float) * SOME * WIDTH);
    ck_assert_ok(perta_store_scatter_add(&store, some_rows, by, SOME, from, room, &err));
    ck_assert_ok(perta_backend_wait(be, &err));
    ck_assert_ok(perta_store_load(&store, 0, ROWS, all, &err));
    be->ops->get(be, all, left, sizeof(float) * ROWS * WIDTH);
    ck_assert_ok(perta_backend_wait(be, &err));
    for (size_t i = 0; i < SOME * WIDTH; i++)
        ck_assert(gathered[i] == rows.f[some_rows[i / WIDTH] * WIDTH + i % WIDTH]);
    for (size_t i = 0; i < SOME * WIDTH; i++)
        rows.f[some_rows[i / WIDTH] * WIDTH + i % WIDTH] += (by ? by[i / WIDTH] : 1) * more.f[i];
    for (size_t i = 0; i < ROWS * WIDTH; i++)
        ck_assert(left[i] == rows.f[i]);
    perta_store_close(&store, &scratch);
    for (size_t i = 0; i < o.n_buffers; i++)
        be->ops->free(be, o.buffers[i]);
    release(rows);
    release(more);
}

START_TEST(rows_in_memory_and_in_a_file_are_the_same_bits)
{
    struct pair by = pair(SOME, 7);
    float gathered[2][SOME * WIDTH], left[2][ROWS * WIDTH];
    ck_assert_int_eq(mkdir("scratch", 0700), 0);
    for (int b = 0; b < N_BACKENDS; b++) {
        const float *weights = _i ? by.f : NULL;
        go_and_return(backends[b], 1 << 20, weights, gathered[0], left[0]);
        go_and_return(backends[b], 0, weights, gathered[1], left[1]);
        ck_assert(!memcmp(gathered[0], gathered[1], sizeof *gathered));
        ck_assert(!memcmp(left[0], left[1], sizeof *left));
    }
    release(by);
}
END_TEST

/* Entries have numbers of 32 bits: one more would be taken for another. */
START_TEST(more_entries_than_have_numbers_are_refused)
{
    const struct perta_llm llm = {
        .any_layer = PERTA_LAYER_MIXTURE, .n_experts = 16, .router = {.k = 8, .n_experts = 16}};
    const struct perta_samples samples = {.n = 1, .n_tokens = 1ull << 29};
    struct perta_experts experts;
    struct perta_err failed = {0};
    ck_assert_int_eq(perta_experts_open(&experts, &llm, &samples, 1, &failed), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(failed.msg, "536870912 tokens"));
    perta_experts_close(&experts);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_all);
    tcase_add_loop_test(tests, an_expert_of_every_layout, 0, (int)N(variants));
    tcase_add_loop_test(tests, a_shared_expert_and_the_router, 0, 2);
    tcase_add_loop_test(tests, rows_in_memory_and_in_a_file_are_the_same_bits, 0, 2);
    tcase_add_test(tests, more_entries_than_have_numbers_are_refused);
    return run_suite("mixture", tests);
}
