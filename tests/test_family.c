/* A family that is not in the table (estimators/model/family.h), added as one would add it: a row
 * with its tensors' names and shapes, and the two operations that no other family has, LayerNorm
 * with a bias and an MLP without a gate. Nothing in estimators/ knows of it; every gradient is
 * compared with finite differences of a forward pass in double, on both backends. */
#include "tests/scratch.h"

#include "estimators/compute/scalar.h"
#include "estimators/model/train.h"
#include "tests/gradient.h"
#include "tests/llm_double.h"

static struct perta_err err;

/* ---- LayerNorm (Ba et al. 2016) ---- */

/* The mean of a row, and 1 / its deviation. */
static double row_stats(const float *x, size_t H, double eps, double *rstd)
{
    double mean = 0, variance = 0;
    for (size_t i = 0; i < H; i++)
        mean += (double)x[i] / (double)H;
    for (size_t i = 0; i < H; i++)
        variance += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)H;
    *rstd = 1 / sqrt(variance + eps);
    return mean;
}

/* n floats of the backend's; the caller's. none: zeros. */
static float *fetch(struct perta_backend *be, struct perta_array from, size_t n)
{
    float *to = alloc(n * sizeof *to);
    memset(to, 0, n * sizeof *to);
    if (perta_array_is(from))
        be->ops->get(be, from, to, n * sizeof *to);
    return to;
}

static void give(struct perta_backend *be, struct perta_array to, float *from, size_t n)
{
    be->ops->put(be, to, from, n * sizeof *from);
    free(from);
}

static void layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                              struct perta_array y, struct perta_array rstd, struct perta_array x,
                              size_t T, size_t H)
{
    float *xs = fetch(be, x, T * H), *rs = alloc(T * sizeof *rs);
    float *w = fetch(be, norm->weight, H), *b = fetch(be, norm->bias, H);
    for (size_t t = 0; t < T; t++) {
        double r, mean = row_stats(xs + t * H, H, (double)norm->eps, &r);
        for (size_t i = 0; i < H; i++)
            xs[t * H + i] =
                (float)(((double)xs[t * H + i] - mean) * r * (double)w[i] + (double)b[i]);
        rs[t] = (float)r;
    }
    give(be, y, xs, T * H);
    give(be, rstd, rs, T);
    free(w);
    free(b);
}

/* dx = r (g - mean(g) - n mean(g n)), g = dy * weight, n = (x - mean) r. */
static void layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                               struct perta_array dx, struct perta_array dy, struct perta_array x,
                               struct perta_array rstd, size_t T, size_t H)
{
    float *dxs = fetch(be, dx, T * H), *dys = fetch(be, dy, T * H), *xs = fetch(be, x, T * H);
    float *w = fetch(be, norm->weight, H);
    (void)rstd;
    for (size_t t = 0; t < T; t++) {
        double r, mean = row_stats(xs + t * H, H, (double)norm->eps, &r), g = 0, gn = 0;
        for (size_t i = 0; i < H; i++) {
            double one = (double)dys[t * H + i] * (double)w[i];
            g += one / (double)H;
            gn += one * ((double)xs[t * H + i] - mean) * r / (double)H;
        }
        for (size_t i = 0; i < H; i++) {
            double n = ((double)xs[t * H + i] - mean) * r;
            dxs[t * H + i] += (float)(r * ((double)dys[t * H + i] * (double)w[i] - g - n * gn));
        }
    }
    give(be, dx, dxs, T * H);
    free(dys);
    free(xs);
    free(w);
}

static void layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                      struct perta_array dweight, struct perta_array dbias,
                                      struct perta_array dy, struct perta_array x,
                                      struct perta_array rstd, size_t T, size_t H)
{
    float *dys = fetch(be, dy, T * H), *xs = fetch(be, x, T * H);
    float *dw = fetch(be, dweight, H), *db = fetch(be, dbias, H);
    (void)rstd;
    for (size_t t = 0; t < T; t++) {
        double r, mean = row_stats(xs + t * H, H, (double)norm->eps, &r);
        for (size_t i = 0; i < H; i++) {
            dw[i] += (float)((double)dys[t * H + i] * ((double)xs[t * H + i] - mean) * r);
            db[i] += dys[t * H + i];
        }
    }
    give(be, dweight, dw, H);
    give(be, dbias, db, H);
    free(dys);
    free(xs);
}

static const struct perta_norm_part layernorm_part = {layernorm_forward, layernorm_backward,
                                                      layernorm_backward_weight};

static void layernorm_double(double *y, const double *x, const double *weight, const double *bias,
                             size_t T, size_t H, double eps)
{
    for (size_t t = 0; t < T; t++) {
        const double *row = x + t * H;
        double mean = 0, variance = 0;
        for (size_t i = 0; i < H; i++)
            mean += row[i] / (double)H;
        for (size_t i = 0; i < H; i++)
            variance += (row[i] - mean) * (row[i] - mean) / (double)H;
        for (size_t i = 0; i < H; i++)
            y[t * H + i] = (row[i] - mean) / sqrt(variance + eps) * weight[i] + bias[i];
    }
}

/* ---- an MLP without a gate: out += down(gelu(up n2)) (Hendrycks & Gimpel 2016) ---- */

static double gelu(double x)
{
    return 0.5 * x * (1 + erf(x / sqrt(2)));
}

static double gelu_slope(double x)
{
    return 0.5 * (1 + erf(x / sqrt(2))) + x * exp(-x * x / 2) / sqrt(2 * acos(-1));
}

static void mlp_forward(const struct perta_layer *l, const struct perta_batch *batch,
                        const struct perta_acts *a)
{
    size_t all = batch->n * l->llm->intermediate;
    perta_layer_linear_forward(l, batch, PERTA_UP, a->n2, a->up, false);
    float *h = fetch(l->be, a->up, all);
    for (size_t i = 0; i < all; i++)
        h[i] = (float)gelu((double)h[i]);
    give(l->be, a->h, h, all);
    perta_layer_linear_forward(l, batch, PERTA_DOWN, a->h, a->out, true);
}

static void mlp_backward(const struct perta_layer *l, const struct perta_batch *batch,
                         const struct perta_acts *a)
{
    size_t all = batch->n * l->llm->intermediate;
    perta_layer_linear_backward(l, batch, PERTA_DOWN, a->dout, a->dup, false);
    perta_layer_linear_gradient(l, batch, PERTA_DOWN, a->h, a->dout, a->vector);
    float *dup = fetch(l->be, a->dup, all), *up = fetch(l->be, a->up, all);
    for (size_t i = 0; i < all; i++)
        dup[i] = (float)((double)dup[i] * gelu_slope((double)up[i]));
    give(l->be, a->dup, dup, all);
    free(up);
    perta_layer_linear_backward(l, batch, PERTA_UP, a->dup, a->dn, false);
    perta_layer_linear_gradient(l, batch, PERTA_UP, a->n2, a->dup, a->vector);
}

static const struct perta_mlp_part mlp_part = {mlp_forward, mlp_backward};

static void mlp_double(const struct model_double *m, uint32_t layer, double *x, const double *norm,
                       size_t T)
{
    size_t H = m->model->llm.hidden, I = m->model->llm.intermediate;
    double *h = alloc(T * I * sizeof *h);
    memset(h, 0, T * I * sizeof *h);
    project_double(m, layer, PERTA_UP, h, norm, T, I, H);
    for (size_t i = 0; i < T * I; i++)
        h[i] = gelu(h[i]);
    project_double(m, layer, PERTA_DOWN, x, h, T, H, I);
    free(h);
}

/* ---- the row ---- */

#define HIDDEN PERTA_WIDTH_HIDDEN
#define INNER PERTA_WIDTH_INTERMEDIATE
#define QUERIES PERTA_WIDTH_QUERIES
#define KEYS PERTA_WIDTH_KEYS
#define VECTOR PERTA_WIDTH_NONE

static const struct perta_param_row params[] = {
    {PERTA_NORM_1, "ln_1.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_1_BIAS, "ln_1.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_Q, "attn.query.weight", QUERIES, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_Q_BIAS, "attn.query.bias", VECTOR, QUERIES, PERTA_ALWAYS, false},
    {PERTA_K, "attn.key.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_V, "attn.value.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_O, "attn.out.weight", HIDDEN, QUERIES, PERTA_ALWAYS, false},
    {PERTA_O_BIAS, "attn.out.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_2, "ln_2.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_2_BIAS, "ln_2.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_UP, "mlp.c_fc.weight", INNER, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_UP_BIAS, "mlp.c_fc.bias", VECTOR, INNER, PERTA_ALWAYS, false},
    {PERTA_DOWN, "mlp.c_proj.weight", HIDDEN, INNER, PERTA_ALWAYS, false},
    {PERTA_DOWN_BIAS, "mlp.c_proj.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
};

static const struct perta_family novel = {
    .model_type = "novel",
    .architecture = "NovelForCausalLM",
    .base = "transformer",
    .layers = "h",
    .params = params,
    .n_params = sizeof params / sizeof *params,
    .embedding = "wte.weight",
    .head = "output.weight",
    .final_norm = "ln_f.weight",
    .final_norm_bias = "ln_f.bias",
    .norm = &layernorm_part,
    .attention = &perta_attention_part,
    .mlp = &mlp_part,
};

/* ---- its gradients ---- */

struct lab {
    struct perta_model model;
    struct perta_samples samples;
    struct model_double twin;
    float inv_freq[4];
};

static double loss_of_all(void *ctx)
{
    const struct lab *lab = ctx;
    double sum = 0;
    for (size_t s = 0; s < lab->samples.n; s++)
        sum += loss_double(&lab->twin, &lab->samples, s);
    return sum / (double)lab->samples.n;
}

static void open_lab(struct lab *lab, bool tied)
{
    const struct perta_rope rope = {.rotated = 4, .scale = 1, .theta = 10000};
    struct perta_llm llm = {.family = &novel,
                            .n_layers = 2,
                            .hidden = 12,
                            .intermediate = 10,
                            .vocab = 23,
                            .n_heads = 4,
                            .n_kv_heads = 2,
                            .head_dim = 4,
                            .value_dim = 4,
                            .pad = PERTA_NO_PAD,
                            .norm_eps = 1e-3f,
                            .tied = tied,
                            .ropes = {rope, rope}};
    uint64_t seed = 3;
    perta_llm_set_names(&llm, novel.base, "");
    *lab = (struct lab){0};
    ck_assert_ok(perta_model_new(&llm, 1, &lab->model, &err));
    lab->twin = (struct model_double){&lab->model, lab->inv_freq,
                                      alloc(lab->model.n_floats * sizeof(double)), layernorm_double,
                                      mlp_double};
    for (size_t i = 0; i < lab->model.n_floats; i++) {
        lab->model.weights[i] += uniform(&seed, -0.4, 0.4);
        lab->twin.weights[i] = (double)lab->model.weights[i];
    }
    perta_llm_rope_tables(&llm, lab->inv_freq);
    put_text("data.jsonl", "{\"input_ids\":[3,1,4,1,5,9,2,6]}\n{\"input_ids\":[22,0,7]}\n");
    const struct perta_samples_wanted wanted = {.vocab = llm.vocab};
    ck_assert_ok(perta_samples_read("data.jsonl", &wanted, &lab->samples, &err));
}

static void are_gradients(struct lab *lab, struct perta_trainer *trainer)
{
    const struct perta_model *m = &lab->model;
    const uint32_t which[] = {0, 1};
    double loss;
    ck_assert_ok(perta_trainer_gradients(trainer, &lab->samples, which, 2, &loss, &err));
    ck_assert_double_lt(fabs(loss / loss_of_all(lab) - 1), TOLERANCE);
    float *gradients = fetch(trainer->be, trainer->gradients, m->n_floats);
    for (size_t p = 0; p < m->n_parameters; p++) {
        const struct perta_parameter *of = &m->parameters[p];
        is_gradient(of->name, gradients + of->at, lab->twin.weights + of->at, of->out * of->in,
                    of->vector ? 1 : 3, loss_of_all, lab);
    }
    free(gradients);
}

START_TEST(a_family_of_a_row_and_two_operations)
{
    struct lab lab;
    struct perta_trainer trainer;
    struct perta_backend *scalar;
    open_lab(&lab, _i);
    /* embedding, 2 layers of 14, the final norm's two, and a head of its own */
    ck_assert_uint_eq(lab.model.n_parameters, 1 + 2 * 14 + 2 + !_i);
    ck_assert_str_eq(lab.model.parameters[15].name, "transformer.h.1.ln_1.weight");
    ck_assert_ok(perta_trainer_open(&trainer, &lab.model, &lab.samples, 2, 2, &err));
    are_gradients(&lab, &trainer);
    perta_trainer_close(&trainer);
    ck_assert_ok(perta_scalar_open(&scalar, &err));
    ck_assert_ok(perta_trainer_open_on(&trainer, &lab.model, &lab.samples, 2, scalar, &err));
    are_gradients(&lab, &trainer);
    perta_trainer_close(&trainer);
    perta_backend_close(scalar);
    free(lab.twin.weights);
    perta_samples_release(&lab.samples);
    perta_model_release(&lab.model);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_loop_test(tests, a_family_of_a_row_and_two_operations, 0, 2);
    return run_suite("family", tests);
}
