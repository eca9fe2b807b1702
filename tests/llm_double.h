/* llm_double.h - the forward passes of docs/estimate.md in double, as plainly as they can be
 * written: what finite differences are taken of. Shapes as in backend.h and part.h. */
#ifndef PERTA_TESTS_LLM_DOUBLE_H
#define PERTA_TESTS_LLM_DOUBLE_H

#include <math.h>

#include "estimators/model/family.h"
#include "estimators/model/model.h"
#include "estimators/model/samples.h"
#include "io/format/convert.h"
#include "tests/unit.h"

static inline void rmsnorm_double(double *y, const double *x, const double *weight, size_t T,
                                  size_t H, double eps)
{
    for (size_t t = 0; t < T; t++) {
        double sum = 0;
        for (size_t i = 0; i < H; i++)
            sum += x[t * H + i] * x[t * H + i];
        for (size_t i = 0; i < H; i++)
            y[t * H + i] = x[t * H + i] / sqrt(sum / (double)H + eps) * weight[i];
    }
}

static inline void rope_double(double *x, const struct perta_place *places,
                               const struct perta_rotation *r, size_t T, size_t n_heads, size_t D)
{
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < n_heads; h++)
            for (size_t i = 0; i < r->rotated / 2; i++) {
                double *head = x + (t * n_heads + h) * D + r->first;
                double *one = head + (r->interleaved ? 2 * i : i);
                double *other = head + (r->interleaved ? 2 * i + 1 : i + r->rotated / 2);
                const float *inv_freq = places[t].is_long ? r->long_inv_freq : r->inv_freq;
                double angle = (double)places[t].position * (double)inv_freq[i];
                double a = *one, b = *other;
                double factor = (double)(places[t].is_long ? r->long_factor : r->factor);
                *one = factor * (a * cos(angle) - b * sin(angle));
                *other = factor * (b * cos(angle) + a * sin(angle));
            }
}

static inline void swiglu_double(double *h, const double *gate, const double *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
}

static inline bool sees_double(const struct perta_attention *a, const struct perta_place *places,
                               size_t t, size_t j)
{
    uint32_t hidden = places[0].at; /* that stand before all tokens that are seen */
    if (j < places[t].first || j >= places[t].end ||
        (uint64_t)places[j].at + a->window <= places[t].at)
        return false;
    return !a->chunk || (places[j].at - hidden) / a->chunk == (places[t].at - hidden) / a->chunk;
}

static inline double bf16_double(double x)
{
    return (double)perta_f32_from_bf16(perta_bf16_from_f32((float)x));
}

/* The score of query q and key k, which is the sequence's number j, as transformers computes it,
 * where the last one that is seen has number last: transformers subtracts nothing, which only
 * counts if there are sinks, too. */
static inline double score_double(const struct perta_attention *a, const double *q, const double *k,
                                  size_t head, size_t j, size_t last)
{
    double dot = 0, cap = (double)a->softcap, scale = (double)a->scale;
    double slope = a->slopes ? (double)a->slopes[head] : 0;
    for (size_t d = 0; d < a->D; d++)
        dot += q[d] * k[d];
    if (a->slopes_bf16) /* not with sinks */
        return (dot + bf16_double(slope * bf16_double((double)j))) * scale;
    return (cap > 0 ? cap * tanh(dot * scale / cap) : dot * scale) +
           slope * ((double)j - (double)last);
}

/* One sequence, whose places are given; sinks (n_heads), or NULL. */
static inline void attention_double(double *out, const double *q, const double *k, const double *v,
                                    const double *sinks, const struct perta_attention *a,
                                    const struct perta_place *places, size_t T)
{
    double *p = alloc(T * sizeof *p);
    size_t n_kv = a->n_kv_heads, D = a->D, V = a->V;
    for (size_t h = 0; h < a->n_heads; h++)
        for (size_t t = 0; t < T; t++) {
            size_t kv = h / (a->n_heads / n_kv);
            double sum = sinks ? exp(sinks[h]) : 0, *row = out + (t * a->n_heads + h) * V;
            for (size_t j = 0; j < T; j++) {
                p[j] = sees_double(a, places, t, j)
                           ? exp(score_double(a, q + (t * a->n_heads + h) * D,
                                              k + (j * n_kv + kv) * D, h, j, places[t].end - 1))
                           : 0;
                sum += p[j];
            }
            for (size_t d = 0; d < V; d++) {
                row[d] = 0;
                for (size_t j = 0; j < T; j++)
                    row[d] += p[j] > 0 ? p[j] / sum * v[(j * n_kv + kv) * V + d] : 0;
            }
        }
    free(p);
}

/* y (n, out) += x (n, in) weight^T + bias. */
static inline void linear_double(double *y, const double *x, const double *weight,
                                 const double *bias, size_t n, size_t out, size_t in)
{
    for (size_t t = 0; t < n; t++)
        for (size_t o = 0; o < out; o++) {
            double sum = bias ? bias[o] : 0;
            for (size_t i = 0; i < in; i++)
                sum += x[t * in + i] * weight[o * in + i];
            y[t * out + o] += sum;
        }
}

/* A model's weights in double, laid out as perta_model lays out its own; and the parts of its
 * family, NULL: Llama's. */
struct model_double {
    const struct perta_model *model;
    const float *inv_freq; /* tables of llm->ropes */
    double *weights;       /* (n_floats) */
    /* y (T, H) from x (T, H); bias may be NULL. */
    void (*norm)(double *y, const double *x, const double *weight, const double *bias, size_t T,
                 size_t H, double eps);
    /* x (T, H) += what the MLP makes of norm (T, H). */
    void (*mlp)(const struct model_double *m, uint32_t layer, double *x, const double *norm,
                size_t T);
    /* x (T, H) += what attention makes of norm (T, H), of one sequence. */
    void (*attention)(const struct model_double *m, uint32_t layer, double *x, const double *norm,
                      const struct perta_place *places, size_t T);
};

static inline double *part_double(const struct model_double *m, uint32_t layer,
                                  enum perta_param param)
{
    const struct perta_param_row *row = perta_llm_param(&m->model->llm, layer, param);
    return row ? m->weights + perta_model_param(m->model, perta_site_of(layer), row)->at : NULL;
}

static inline void project_double(const struct model_double *m, uint32_t layer,
                                  enum perta_param weight, double *y, const double *x, size_t n,
                                  size_t out, size_t in)
{
    linear_double(y, x, part_double(m, layer, weight), part_double(m, layer, weight + 1), n, out,
                  in);
}

static inline void norm_double(const struct model_double *m, double *y, const double *x,
                               const double *weight, const double *bias, size_t T, size_t H)
{
    double eps = (double)m->model->llm.norm_eps;
    if (m->norm)
        m->norm(y, x, weight, bias, T, H, eps);
    else
        rmsnorm_double(y, x, weight, T, H, eps);
}

static inline void gated_mlp_double(const struct model_double *m, uint32_t layer, double *x,
                                    const double *norm, size_t T)
{
    size_t H = m->model->llm.hidden, I = m->model->llm.intermediate;
    double *gate = alloc(T * 3 * I * sizeof *gate), *up = gate + T * I, *h = up + T * I;
    project_double(m, layer, PERTA_GATE, gate, norm, T, I, H);
    project_double(m, layer, PERTA_UP, up, norm, T, I, H);
    swiglu_double(h, gate, up, T * I);
    project_double(m, layer, PERTA_DOWN, x, h, T, H, I);
    free(gate);
}

static inline struct perta_rotation rotation_double(const struct model_double *m, uint32_t layer,
                                                    size_t first)
{
    const float *table = perta_llm_rope_table(&m->model->llm, layer, m->inv_freq);
    return perta_llm_rotation(&m->model->llm, layer, table, first);
}

static inline void grouped_attention_double(const struct model_double *m, uint32_t layer, double *x,
                                            const double *norm, const struct perta_place *places,
                                            size_t T)
{
    const struct perta_llm *llm = &m->model->llm;
    size_t H = llm->hidden, D = llm->head_dim;
    size_t Q = llm->n_heads * D, K = llm->n_kv_heads * D;
    double *q = alloc(T * 2 * (Q + K) * sizeof *q), *k = q + T * Q, *v = k + T * K,
           *att = v + T * K;
    project_double(m, layer, PERTA_Q, q, norm, T, Q, H);
    project_double(m, layer, PERTA_K, k, norm, T, K, H);
    project_double(m, layer, PERTA_V, v, norm, T, K, H);
    if (llm->options & PERTA_QK_NORM) {
        norm_double(m, q, q, part_double(m, layer, PERTA_NORM_Q),
                    part_double(m, layer, PERTA_NORM_Q_BIAS), T * llm->n_heads, D);
        norm_double(m, k, k, part_double(m, layer, PERTA_NORM_K),
                    part_double(m, layer, PERTA_NORM_K_BIAS), T * llm->n_kv_heads, D);
    }
    const struct perta_rotation rotation = rotation_double(m, layer, 0);
    rope_double(q, places, &rotation, T, llm->n_heads, D);
    rope_double(k, places, &rotation, T, llm->n_kv_heads, D);
    const struct perta_attention a = {.n_heads = llm->n_heads,
                                      .n_kv_heads = llm->n_kv_heads,
                                      .D = D,
                                      .V = D,
                                      .window = perta_llm_window(llm, layer),
                                      .scale = (float)(1 / sqrt((double)D))};
    attention_double(att, q, k, v, NULL, &a, places, T);
    project_double(m, layer, PERTA_O, x, att, T, H, Q);
    free(q);
}

/* x (T, H) of one sequence becomes what the block makes of it. */
static inline void block_double(const struct model_double *m, uint32_t layer, double *x,
                                const struct perta_place *places, size_t T)
{
    size_t H = m->model->llm.hidden;
    double *norm = alloc(T * H * sizeof *norm);
    norm_double(m, norm, x, part_double(m, layer, PERTA_NORM_1),
                part_double(m, layer, PERTA_NORM_1_BIAS), T, H);
    (m->attention ? m->attention : grouped_attention_double)(m, layer, x, norm, places, T);
    norm_double(m, norm, x, part_double(m, layer, PERTA_NORM_2),
                part_double(m, layer, PERTA_NORM_2_BIAS), T, H);
    (m->mlp ? m->mlp : gated_mlp_double)(m, layer, x, norm, T);
    free(norm);
}

/* log(sum of exponentials) - the target's, of one row of logits. */
static inline double cross_entropy_double(const double *logits, size_t V, size_t target)
{
    double sum = 0;
    for (size_t i = 0; i < V; i++)
        sum += exp(logits[i]);
    return log(sum) - logits[target];
}

/* A tensor by its name, which may be empty; NULL where there is none. */
static inline const double *named_double(const struct model_double *m, const char *name)
{
    const struct perta_model *model = m->model;
    const float *at = *name ? perta_model_find(model, model->weights, name) : NULL;
    return at ? m->weights + (at - model->weights) : NULL;
}

/* The loss of one sample: the mean over its labels. */
static inline double loss_double(const struct model_double *m, const struct perta_samples *s,
                                 size_t sample)
{
    const struct perta_model *model = m->model;
    size_t first = s->starts[sample], T = s->starts[sample + 1] - first;
    size_t H = model->llm.hidden, V = model->llm.vocab, n_labels = 0;
    double *x = alloc(T * H * sizeof *x), *row = alloc(H * sizeof *row), loss = 0;
    double *logits = alloc(V * sizeof *logits);
    const struct perta_llm_names *names = &model->llm.names;
    const double *embedding = named_double(m, names->embedding);
    const double *head = model->llm.tied ? embedding : named_double(m, names->head);
    const double *norm = named_double(m, names->final_norm);
    const double *bias = named_double(m, names->final_norm_bias);
    for (size_t t = 0; t < T; t++)
        memcpy(x + t * H, embedding + (size_t)s->ids[first + t] * H, H * sizeof *x);
    for (uint32_t l = 0; l < model->llm.n_layers; l++)
        block_double(m, l, x, s->places + first, T);
    for (size_t t = 0; t < T; t++) {
        if (s->targets[first + t] == PERTA_IGNORED)
            continue;
        norm_double(m, row, x + t * H, norm, bias, 1, H);
        memset(logits, 0, V * sizeof *logits);
        linear_double(logits, row, head, NULL, 1, V, H);
        loss += cross_entropy_double(logits, V, (size_t)s->targets[first + t]);
        n_labels++;
    }
    free(x);
    free(row);
    free(logits);
    return loss / (double)n_labels;
}

#endif
