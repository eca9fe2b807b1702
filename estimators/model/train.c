#include "estimators/model/train.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/ops.h"
#include "estimators/model/weights.h"
#include "io/fpenv.h"

/* ---- memory ---- */

static float *take(float **memory, size_t n)
{
    float *here = *memory;
    *memory += (n + 15) & ~(size_t)15; /* a line of the cache */
    return here;
}

/* Floats of everything that is one allocation. */
static size_t floats_of(const struct perta_trainer *t)
{
    const struct perta_llm *llm = &t->model->llm;
    size_t acts = perta_acts_floats(llm, t->max_tokens);
    size_t labels = t->max_labels * (4 * (size_t)llm->hidden + llm->vocab + 4);
    size_t slack = PERTA_SLACK_ROWS * (size_t)llm->vocab; /* what products read past the end */
    return 3 * t->model->n_floats + llm->n_layers * acts + labels + 16 * (12 + llm->n_layers) +
           slack;
}

static void lay_out(struct perta_trainer *t)
{
    const struct perta_llm *llm = &t->model->llm;
    size_t n = t->model->n_floats, rows = t->max_labels * llm->hidden;
    float *at = t->memory;
    float **const of_model[] = {&t->gradients, &t->first, &t->second};
    float **const of_hidden[] = {&t->last, &t->normed, &t->dnormed, &t->dlast};
    float **const of_labels[] = {&t->rstd, &t->most, &t->share, &t->of_label};
    for (size_t i = 0; i < 3; i++)
        *of_model[i] = take(&at, n);
    for (size_t i = 0; i < 4; i++)
        *of_hidden[i] = take(&at, rows);
    for (size_t i = 0; i < 4; i++)
        *of_labels[i] = take(&at, t->max_labels);
    t->logits = take(&at, t->max_labels * llm->vocab);
    for (uint32_t l = 0; l < llm->n_layers; l++)
        perta_acts_lay_out(&t->acts[l], llm, t->max_tokens,
                           take(&at, perta_acts_floats(llm, t->max_tokens)));
    for (uint32_t l = 1; l < llm->n_layers; l++) {
        t->acts[l].x = t->acts[l - 1].out;
        t->acts[l - 1].dout = t->acts[l].dx;
    }
}

/* Converted operands: never, for everything is float32 where it stands. */
#define GEMM_FLOATS 64

int perta_trainer_open(struct perta_trainer *t, struct perta_model *model,
                       const struct perta_samples *samples, size_t batch, unsigned n_threads,
                       struct perta_err *err)
{
    const struct perta_llm *llm = &model->llm;
    *t = (struct perta_trainer){.model = model};
    if (batch > samples->n)
        batch = samples->n;
    t->max_tokens = t->max_labels = batch * samples->longest;
    t->acts = calloc(llm->n_layers, sizeof *t->acts);
    t->inv_freq = calloc(llm->head_dim, sizeof *t->inv_freq);
    t->memory = aligned_alloc(64, (floats_of(t) * sizeof(float) + 63) & ~(size_t)63);
    t->sums = calloc(t->max_labels, sizeof *t->sums);
    t->token = calloc(t->max_labels, sizeof *t->token);
    t->target = calloc(t->max_labels, sizeof *t->target);
    t->places = calloc(t->max_tokens, sizeof *t->places);
    t->ids = calloc(t->max_tokens, sizeof *t->ids);
    t->starts = calloc(batch + 1, sizeof *t->starts);
    t->tiles = calloc(t->max_tokens / PERTA_TILE_ROWS + 2, sizeof *t->tiles);
    t->label_tiles = calloc(t->max_tokens / PERTA_TILE_ROWS + 2, sizeof *t->label_tiles);
    int rc = 0;
    if (!t->acts || !t->inv_freq || !t->memory || !t->sums || !t->token || !t->target ||
        !t->places || !t->ids || !t->starts || !t->tiles || !t->label_tiles)
        rc = perta_fail_sys(err, ENOMEM, "batches of %zu tokens", t->max_tokens);
    if (!rc)
        rc = perta_workers_open(n_threads, &t->workers, err);
    if (!rc)
        rc = perta_gemm_open(false, t->workers, GEMM_FLOATS, perta_attention_room(samples->longest),
                             &t->gemm, err);
    if (rc) {
        perta_trainer_close(t);
        return rc;
    }
    memset(t->memory, 0, floats_of(t) * sizeof(float));
    lay_out(t);
    perta_rope_frequencies(llm, t->inv_freq);
    return 0;
}

void perta_trainer_close(struct perta_trainer *t)
{
    perta_gemm_close(t->gemm);
    perta_workers_close(t->workers);
    free(t->tiles);
    free(t->label_tiles);
    free(t->acts);
    free(t->inv_freq);
    free(t->memory);
    free(t->sums);
    free(t->token);
    free(t->target);
    free(t->places);
    free(t->ids);
    free(t->starts);
    *t = (struct perta_trainer){0};
}

/* ---- forward ---- */

/* n rows, cut every PERTA_TILE_ROWS; starts is where that is put. */
static struct perta_runs cut(size_t *starts, size_t n)
{
    size_t n_tiles = 0;
    for (size_t row = 0; row < n; row += PERTA_TILE_ROWS)
        starts[n_tiles++] = row;
    starts[n_tiles] = n;
    return (struct perta_runs){n_tiles, starts, 0};
}

/* Pack the samples which (n): their tokens one after another, and where their labels are. */
static struct perta_batch pack(struct perta_trainer *t, const struct perta_samples *s,
                               const uint32_t *which, size_t n, size_t *n_labels)
{
    size_t at = 0, labels = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t from = s->starts[which[i]], to = s->starts[which[i] + 1];
        t->starts[i] = at;
        for (uint64_t k = from; k < to; k++, at++) {
            t->ids[at] = (uint32_t)s->ids[k];
            t->places[at] = s->places[k];
            if (s->targets[k] == PERTA_IGNORED)
                continue;
            t->token[labels] = (uint32_t)at;
            t->target[labels] = s->targets[k];
            t->share[labels++] = 1.0f / ((float)s->n_labels[which[i]] * (float)n);
        }
    }
    t->starts[n] = at;
    *n_labels = labels;
    return (struct perta_batch){at, {n, t->starts, 0}, cut(t->tiles, at), t->places};
}

static struct perta_linear head_of(const struct perta_trainer *t)
{
    const struct perta_model *m = t->model;
    const char *name = m->llm.tied ? PERTA_EMBEDDING : PERTA_HEAD;
    return (struct perta_linear){perta_model_find(m, m->weights, name), PERTA_F32, m->llm.vocab,
                                 m->llm.hidden, NULL};
}

static int forward(struct perta_trainer *t, const struct perta_batch *batch, size_t n_labels,
                   struct perta_err *err)
{
    const struct perta_model *m = t->model;
    size_t H = m->llm.hidden;
    const float *embedding = perta_model_find(m, m->weights, PERTA_EMBEDDING);
    for (size_t i = 0; i < batch->n; i++)
        memcpy(t->acts[0].x + i * H, embedding + t->ids[i] * H, H * sizeof(float));
    int rc = 0;
    for (uint32_t l = 0; l < m->llm.n_layers && !rc; l++) {
        struct perta_block block = {.gemm = t->gemm, .inv_freq = t->inv_freq};
        perta_model_block(m, l, &block);
        rc = perta_block_forward(&block, batch, &t->acts[l], err);
    }
    const float *out = t->acts[m->llm.n_layers - 1].out;
    for (size_t i = 0; i < n_labels && !rc; i++)
        memcpy(t->last + i * H, out + t->token[i] * H, H * sizeof(float));
    perta_rmsnorm_forward(t->workers, t->normed, t->rstd, t->last,
                          perta_model_find(m, m->weights, PERTA_FINAL_NORM), n_labels, H,
                          m->llm.rms_eps);
    struct perta_linear head = head_of(t);
    struct perta_runs tiles = cut(t->label_tiles, n_labels);
    return rc ? rc
              : perta_linear_forward(t->gemm, &head, &tiles, t->normed, t->logits, n_labels, false,
                                     err);
}

int perta_trainer_forward(struct perta_trainer *t, const struct perta_samples *samples,
                          const uint32_t *which, size_t n, size_t *n_labels, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    struct perta_batch batch = pack(t, samples, which, n, n_labels);
    return forward(t, &batch, *n_labels, err);
}

/* ---- backward ---- */

struct sink {
    struct perta_trainer *trainer;
    uint32_t layer;
};

static void add_vector(const struct sink *sink, const char *part, const char *kind, const float *d,
                       size_t n)
{
    char name[128];
    perta_weights_name(name, sink->layer, part, kind);
    float *to = perta_model_find(sink->trainer->model, sink->trainer->gradients, name);
    for (size_t i = 0; i < n; i++)
        to[i] += d[i];
}

static void on_norm(void *ctx, size_t sequence, enum perta_norm_name name, const float *d, size_t n)
{
    (void)sequence;
    add_vector(ctx, perta_norm_names[name], "weight", d, n);
}

static void on_bias(void *ctx, size_t sequence, enum perta_linear_name name, const float *d,
                    size_t n)
{
    (void)sequence;
    add_vector(ctx, perta_linear_names[name], "bias", d, n);
}

/* gradient (out, in) += dy (n, out)^T x (n, in). */
static int add_matrix(struct perta_trainer *t, const char *name, const float *dy, const float *x,
                      size_t n, size_t out, size_t in, struct perta_err *err)
{
    return perta_gemm_run(t->gemm, NULL, out, in, n, perta_transposed(perta_matrix(dy, out)),
                          perta_matrix(x, in), perta_model_find(t->model, t->gradients, name), in,
                          true, err);
}

/* From the loss to the gradient of what the last block gives. */
static int head_backward(struct perta_trainer *t, size_t n, float *dout, size_t n_tokens,
                         double *loss, struct perta_err *err)
{
    const struct perta_model *m = t->model;
    struct perta_linear head = head_of(t);
    size_t H = head.in, V = head.out;
    for (size_t i = 0; i < n; i++) {
        t->most[i] = -INFINITY;
        t->sums[i] = 0;
    }
    perta_cross_entropy_forward(t->workers, t->logits, 0, V, n, t->target, t->most, t->sums,
                                t->of_label);
    *loss = 0;
    for (size_t i = 0; i < n; i++)
        *loss +=
            (double)t->share[i] * ((double)t->most[i] - (double)t->of_label[i] + log(t->sums[i]));
    perta_cross_entropy_backward(t->workers, t->logits, 0, V, n, t->target, t->most, t->sums,
                                 t->share);
    struct perta_runs tiles = cut(t->label_tiles, n);
    int rc = perta_linear_backward(t->gemm, &head, &tiles, t->logits, t->dnormed, n, false, err);
    if (!rc)
        rc = add_matrix(t, m->llm.tied ? PERTA_EMBEDDING : PERTA_HEAD, t->logits, t->normed, n, V,
                        H, err);
    perta_rmsnorm_backward_weight(t->workers, perta_model_find(m, t->gradients, PERTA_FINAL_NORM),
                                  t->dnormed, t->last, t->rstd, n, H);
    memset(t->dlast, 0, n * H * sizeof(float));
    perta_rmsnorm_backward(t->workers, t->dlast, t->dnormed, t->last, t->rstd,
                           perta_model_find(m, m->weights, PERTA_FINAL_NORM), n, H);
    memset(dout, 0, n_tokens * H * sizeof(float));
    for (size_t i = 0; i < n; i++)
        memcpy(dout + t->token[i] * H, t->dlast + i * H, H * sizeof(float));
    return rc;
}

static int block_backward(struct perta_trainer *t, const struct perta_batch *batch, uint32_t layer,
                          struct perta_err *err)
{
    struct perta_block block = {.gemm = t->gemm, .inv_freq = t->inv_freq};
    struct sink to = {t, layer};
    const struct perta_vector_sink sink = {&to, on_norm, on_bias};
    perta_model_block(t->model, layer, &block);
    int rc = perta_block_backward(&block, batch, &t->acts[layer], &sink, err);
    for (int i = 0; i < PERTA_N_LINEARS && !rc; i++) {
        const float *x, *dy;
        char name[128];
        perta_block_operands(&t->acts[layer], (enum perta_linear_name)i, &x, &dy);
        rc = add_matrix(t, perta_weights_name(name, layer, perta_linear_names[i], "weight"), dy, x,
                        batch->n, block.linear[i].out, block.linear[i].in, err);
    }
    return rc;
}

int perta_trainer_gradients(struct perta_trainer *t, const struct perta_samples *samples,
                            const uint32_t *which, size_t n, double *loss, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_model *m = t->model;
    size_t n_labels, H = m->llm.hidden;
    struct perta_batch batch = pack(t, samples, which, n, &n_labels);
    memset(t->gradients, 0, m->n_floats * sizeof(float));
    int rc = forward(t, &batch, n_labels, err);
    if (!rc)
        rc = head_backward(t, n_labels, t->acts[m->llm.n_layers - 1].dout, batch.n, loss, err);
    for (uint32_t l = m->llm.n_layers; l-- > 0 && !rc;)
        rc = block_backward(t, &batch, l, err);
    float *embedding = perta_model_find(m, t->gradients, PERTA_EMBEDDING);
    for (size_t i = 0; i < batch.n && !rc; i++)
        for (size_t k = 0; t->ids[i] != m->llm.pad && k < H; k++)
            embedding[t->ids[i] * H + k] += t->acts[0].dx[i * H + k];
    return rc;
}

/* ---- AdamW ---- */

struct adamw {
    float *w, *m, *v;
    const float *g;
    size_t n;
    float rate, decay, c1, c2;
};

#define PIECE_ELEMS (1u << 16)

static int adamw_elems(void *ctx, unsigned worker, size_t piece, struct perta_err *err)
{
    const struct adamw *a = ctx;
    const float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
    size_t end = (piece + 1) * PIECE_ELEMS < a->n ? (piece + 1) * PIECE_ELEMS : a->n;
    (void)worker;
    (void)err;
    for (size_t i = piece * PIECE_ELEMS; i < end; i++) {
        a->m[i] = beta1 * a->m[i] + (1 - beta1) * a->g[i];
        a->v[i] = beta2 * a->v[i] + (1 - beta2) * a->g[i] * a->g[i];
        a->w[i] -= a->rate * a->decay * a->w[i];
        a->w[i] -= a->rate * (a->m[i] / a->c1) / (sqrtf(a->v[i] / a->c2) + eps);
    }
    return 0;
}

void perta_trainer_step(struct perta_trainer *t, float learning_rate, float weight_decay)
{
    PERTA_FP_SCOPE;
    struct perta_err never = {0};
    t->n_steps++;
    struct adamw a = {t->model->weights,
                      t->first,
                      t->second,
                      t->gradients,
                      t->model->n_floats,
                      learning_rate,
                      weight_decay,
                      (float)(1 - pow(0.9, (double)t->n_steps)),
                      (float)(1 - pow(0.999, (double)t->n_steps))};
    perta_workers_run(t->workers, (a.n + PIECE_ELEMS - 1) / PIECE_ELEMS, adamw_elems, &a, &never);
}
