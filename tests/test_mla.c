/* Latent attention (estimators/model/mla.c): every gradient is compared with finite differences of
 * a forward pass in double, on both backends. */
#include "tests/scratch.h"

#include "estimators/compute/scalar.h"
#include "estimators/model/train.h"
#include "tests/gradient.h"
#include "tests/llm_double.h"

static struct perta_err err;

extern const struct perta_family perta_deepseek_v3;

/* ---- in double ---- */

static const double latent_eps = 1e-6;

/* y (T, out) = up norm(down x), where only the first width of what down gives are normalised and go
 * up; the others are left in rest (T, down's width - width). */
static void through_latent_double(const struct model_double *m, uint32_t layer,
                                  const enum perta_param params[3], double *y, size_t out,
                                  double *rest, size_t width, size_t n_rest, const double *x,
                                  size_t T)
{
    size_t H = m->model->llm.hidden, W = width + n_rest;
    double *down = alloc(T * (W + width) * sizeof *down), *c = down + T * W;
    project_double(m, layer, params[0], down, x, T, W, H);
    for (size_t t = 0; t < T; t++) {
        memcpy(c + t * width, down + t * W, width * sizeof *c);
        if (n_rest)
            memcpy(rest + t * n_rest, down + t * W + width, n_rest * sizeof *rest);
    }
    rmsnorm_double(c, c, part_double(m, layer, params[1]), T, width, latent_eps);
    project_double(m, layer, params[2], y, c, T, out, width);
    free(down);
}

static void queries_double(const struct model_double *m, uint32_t layer, double *q,
                           const double *norm, size_t T)
{
    static const enum perta_param through[] = {PERTA_Q_A, PERTA_NORM_Q_A, PERTA_Q};
    const struct perta_llm *llm = &m->model->llm;
    size_t Q = (size_t)llm->n_heads * llm->head_dim;
    if (llm->q_lora)
        through_latent_double(m, layer, through, q, Q, NULL, llm->q_lora, 0, norm, T);
    else
        project_double(m, layer, PERTA_Q, q, norm, T, Q, llm->hidden);
}

static void latent_attention_double(const struct model_double *m, uint32_t layer, double *x,
                                    const double *norm, const struct perta_place *places, size_t T)
{
    static const enum perta_param through[] = {PERTA_KV_A, PERTA_NORM_KV_A, PERTA_KV_B};
    const struct perta_llm *llm = &m->model->llm;
    size_t h = llm->n_heads, D = llm->head_dim, V = llm->value_dim, r = llm->rotary_dim, N = D - r;
    size_t n_floats = T * (2 * h * D + 2 * h * V + r + h * (N + V));
    double *q = alloc(n_floats * sizeof *q), *k = q + T * h * D, *v = k + T * h * D;
    double *att = v + T * h * V, *kr = att + T * h * V, *kv = kr + T * r;
    queries_double(m, layer, q, norm, T);
    through_latent_double(m, layer, through, kv, h * (N + V), kr, llm->kv_lora, r, norm, T);
    const struct perta_rotation last = rotation_double(m, layer, N),
                                all = rotation_double(m, layer, 0);
    rope_double(q, places, &last, T, h, D);
    rope_double(kr, places, &all, T, 1, r);
    for (size_t i = 0; i < T * h; i++) {
        memcpy(k + i * D, kv + i * (N + V), N * sizeof *k);
        memcpy(k + i * D + N, kr + i / h * r, r * sizeof *k);
        memcpy(v + i * V, kv + i * (N + V) + N, V * sizeof *v);
    }
    const struct perta_attention a = {.n_heads = h,
                                      .n_kv_heads = h,
                                      .D = D,
                                      .V = V,
                                      .window = UINT32_MAX,
                                      .scale = llm->attention_scale};
    attention_double(att, q, k, v, NULL, &a, places, T);
    project_double(m, layer, PERTA_O, x, att, T, llm->hidden, h * V);
    free(q);
}

/* ---- the models ---- */

/* Sizes that tell all widths apart, values wider and narrower than keys. */
static const struct sizes {
    uint32_t q_lora, kv_lora, nope, rotary, value, options;
    bool interleaved;
} sizes[] = {
    {7, 5, 3, 2, 6, PERTA_Q_LORA | PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS, true},
    {0, 17, 2, 4, 3, PERTA_Q_PLAIN, false},
};

struct lab {
    struct perta_model model;
    struct perta_samples samples;
    struct model_double twin;
    float inv_freq[16];
};

static double loss_of_all(void *ctx)
{
    const struct lab *lab = ctx;
    double sum = 0;
    for (size_t s = 0; s < lab->samples.n; s++)
        sum += loss_double(&lab->twin, &lab->samples, s);
    return sum / (double)lab->samples.n;
}

static void open_lab(struct lab *lab, const struct sizes *of)
{
    const struct perta_rope rope = {
        .rotated = of->rotary, .interleaved = of->interleaved, .scale = 1.25f, .theta = 50};
    struct perta_llm llm = {.family = &perta_deepseek_v3,
                            .n_layers = 2,
                            .hidden = 10,
                            .intermediate = 9,
                            .vocab = 23,
                            .n_heads = 3,
                            .n_kv_heads = 3,
                            .head_dim = of->nope + of->rotary,
                            .value_dim = of->value,
                            .q_lora = of->q_lora,
                            .kv_lora = of->kv_lora,
                            .rotary_dim = of->rotary,
                            .attention_scale = 0.7f,
                            .options = of->options,
                            .layers = {PERTA_LAYER_DENSE, PERTA_LAYER_DENSE},
                            .any_layer = PERTA_LAYER_DENSE,
                            .pad = PERTA_NO_PAD,
                            .norm_eps = 1e-3f,
                            .activation = {.kind = PERTA_SILU},
                            .embedding_multiplier = 1,
                            .residual_multiplier = 1,
                            .logit_multiplier = 1,
                            .ropes = {rope, rope}};
    uint64_t seed = 3;
    perta_llm_set_names(&llm, perta_deepseek_v3.base, "");
    *lab = (struct lab){0};
    ck_assert_ok(perta_model_new(&llm, 1, &lab->model, &err));
    lab->twin = (struct model_double){.model = &lab->model,
                                      .inv_freq = lab->inv_freq,
                                      .weights = alloc(lab->model.n_floats * sizeof(double)),
                                      .attention = latent_attention_double};
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

START_TEST(latent_attention_has_its_gradients)
{
    struct lab lab;
    struct perta_trainer trainer;
    struct perta_backend *scalar;
    open_lab(&lab, &sizes[_i]);
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
    tcase_add_loop_test(tests, latent_attention_has_its_gradients, 0, 2);
    return run_suite("mla", tests);
}
