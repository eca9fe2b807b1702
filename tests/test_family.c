/* A family that is not in the table (estimators/model/family.h), added as one would add it: a row
 * with its tensors' names and shapes, LayerNorm, of queries and keys too, and an MLP without a gate.
 * Nothing in estimators/ knows of it; every gradient is compared with finite differences of a
 * forward pass in double, on both backends. */
#include "tests/scratch.h"

#include "estimators/compute/scalar.h"
#include "estimators/model/train.h"
#include "tests/gradient.h"
#include "tests/llm_double.h"

static struct perta_err err;

/* ---- LayerNorm (Ba et al. 2016) in double ---- */

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
            y[t * H + i] =
                (row[i] - mean) / sqrt(variance + eps) * weight[i] + (bias ? bias[i] : 0);
    }
}

/* ---- an MLP without a gate: out += down(gelu(up n2)) (Hendrycks & Gimpel 2016) ---- */

static void mlp_double(const struct model_double *m, uint32_t layer, double *x, const double *norm,
                       size_t T)
{
    size_t H = m->model->llm.hidden, I = m->model->llm.intermediate;
    double *h = alloc(T * I * sizeof *h);
    memset(h, 0, T * I * sizeof *h);
    project_double(m, layer, PERTA_UP, h, norm, T, I, H);
    for (size_t i = 0; i < T * I; i++)
        h[i] = 0.5 * h[i] * (1 + erf(h[i] / sqrt(2)));
    project_double(m, layer, PERTA_DOWN, x, h, T, H, I);
    free(h);
}

/* ---- the row ---- */

#define HIDDEN PERTA_WIDTH_HIDDEN
#define INNER PERTA_WIDTH_INTERMEDIATE
#define QUERIES PERTA_WIDTH_QUERIES
#define KEYS PERTA_WIDTH_KEYS
#define HEAD PERTA_WIDTH_HEAD
#define VECTOR PERTA_WIDTH_NONE

/* The norm of keys has no bias: it would move all scores of a query by nearly as much, and its
 * gradient be mostly rounding. */
static const struct perta_param_row params[] = {
    {PERTA_NORM_1, "ln_1.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_1_BIAS, "ln_1.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_Q, "attn.query.weight", QUERIES, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_Q_BIAS, "attn.query.bias", VECTOR, QUERIES, PERTA_ALWAYS, false},
    {PERTA_K, "attn.key.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_V, "attn.value.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_Q, "attn.ln_q.weight", VECTOR, HEAD, PERTA_QK_NORM, false},
    {PERTA_NORM_Q_BIAS, "attn.ln_q.bias", VECTOR, HEAD, PERTA_QK_NORM, false},
    {PERTA_NORM_K, "attn.ln_k.weight", VECTOR, HEAD, PERTA_QK_NORM, false},
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
    .norm = &perta_layernorm_part,
    .attention = &perta_attention_part,
};

/* ---- its gradients ---- */

struct lab {
    struct perta_model model;
    struct perta_samples samples;
    struct model_double twin;
    float inv_freq[8];
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
    const struct perta_rope local = {
        .rotated = 2, .interleaved = true, .scale = 1.25f, .theta = 50};
    struct perta_llm llm = {.family = &novel,
                            .n_layers = 2,
                            .hidden = 12,
                            .intermediate = 10,
                            .vocab = 23,
                            .n_heads = 4,
                            .n_kv_heads = 2,
                            .head_dim = 4,
                            .value_dim = 4,
                            .options = PERTA_QK_NORM,
                            .pad = PERTA_NO_PAD,
                            .norm_eps = 1e-3f,
                            .activation = {.kind = PERTA_GELU},
                            .tied = tied,
                            .embedding_multiplier = 1,
                            .residual_multiplier = 1,
                            .logit_multiplier = 1,
                            .window = 3,
                            .layers = {0, PERTA_LAYER_WINDOW},
                            .any_layer = PERTA_LAYER_WINDOW,
                            .ropes = {rope, local}};
    uint64_t seed = 3;
    perta_llm_set_names(&llm, novel.base, "");
    *lab = (struct lab){0};
    ck_assert_ok(perta_model_new(&llm, 1, &lab->model, &err));
    lab->twin = (struct model_double){
        &lab->model,      lab->inv_freq, alloc(lab->model.n_floats * sizeof(double)),
        layernorm_double, mlp_double,    NULL};
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
    float *gradients = alloc(m->n_floats * sizeof *gradients);
    trainer->be->ops->get(trainer->be, trainer->gradients, gradients,
                          m->n_floats * sizeof *gradients);
    for (size_t p = 0; p < m->n_parameters; p++) {
        const struct perta_parameter *of = &m->parameters[p];
        is_gradient(of->name, gradients + of->at, lab->twin.weights + of->at, of->out * of->in,
                    of->vector ? 1 : 3, loss_of_all, lab);
    }
    free(gradients);
}

/* The trainer's ends know no multipliers, caps and biases. */
START_TEST(what_the_trainer_does_not_compute_is_refused)
{
    struct lab lab;
    struct perta_trainer trainer;
    open_lab(&lab, false);
    struct perta_llm *llm = &lab.model.llm;
    const struct perta_llm plain = *llm;
    for (int i = 0; i < 7; i++) {
        *llm = plain;
        llm->embedding_multiplier = i == 0 ? 2 : 1;
        llm->logit_multiplier = i == 1 ? 0.5f : 1;
        llm->logit_softcap = i == 2 ? 30 : 0;
        llm->norm_plus = i == 3 ? 1 : 0;
        llm->n_experts = i == 4 ? 4 : 0;
        llm->alibi = i == 5;
        if (i == 6)
            strcpy(llm->names.head_bias, "head.bias");
        ck_assert_int_eq(perta_trainer_open(&trainer, &lab.model, &lab.samples, 2, 1, &err),
                         PERTA_EINPUT);
        ck_assert_ptr_nonnull(strstr(err.msg, novel.architecture));
        err = (struct perta_err){0};
    }
    *llm = plain;
    free(lab.twin.weights);
    perta_samples_release(&lab.samples);
    perta_model_release(&lab.model);
}
END_TEST

START_TEST(a_family_that_is_a_row)
{
    struct lab lab;
    struct perta_trainer trainer;
    struct perta_backend *scalar;
    open_lab(&lab, _i);
    /* embedding, 2 layers of 17, the final norm's two, and a head of its own */
    ck_assert_uint_eq(lab.model.n_parameters, 1 + 2 * 17 + 2 + !_i);
    ck_assert_str_eq(lab.model.parameters[18].name, "transformer.h.1.ln_1.weight");
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
    tcase_add_loop_test(tests, a_family_that_is_a_row, 0, 2);
    tcase_add_test(tests, what_the_trainer_does_not_compute_is_refused);
    return run_suite("family", tests);
}
