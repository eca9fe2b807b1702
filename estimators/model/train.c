#include "estimators/model/train.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/cpu.h"
#include "io/fpenv.h"

/* ---- memory ---- */

/* Lay out all arrays in one allocation; returns its number of floats. */
static size_t lay_out(struct perta_trainer *t, struct perta_array memory)
{
    const struct perta_llm *llm = &t->model->llm;
    size_t n = t->model->n_floats, rows = t->max_labels * llm->hidden, at = 0;
    struct perta_array *const of_model[] = {&t->gradients, &t->first, &t->second};
    struct perta_array *const of_hidden[] = {&t->last, &t->normed, &t->dnormed, &t->dlast};
    struct perta_array *const of_labels[] = {&t->most, &t->share, &t->of_label};
    for (size_t i = 0; i < 3; i++)
        *of_model[i] = perta_array_take(memory, &at, n);
    for (size_t i = 0; i < 4; i++)
        *of_hidden[i] = perta_array_take(memory, &at, rows);
    t->rstd = perta_array_take(memory, &at, t->max_labels * llm->family->norm->stats);
    for (size_t i = 0; i < 3; i++)
        *of_labels[i] = perta_array_take(memory, &at, t->max_labels);
    t->sums = perta_array_take(memory, &at, 2 * t->max_labels);
    t->device_logits = perta_array_take(memory, &at, t->max_labels * llm->vocab);
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        struct perta_array acts =
            perta_array_take(memory, &at, perta_acts_floats(llm, t->max_tokens));
        perta_acts_lay_out(&t->acts[l], llm, t->max_tokens, acts);
    }
    for (uint32_t l = 1; l < llm->n_layers; l++) {
        t->acts[l].x = t->acts[l - 1].out;
        t->acts[l - 1].dout = t->acts[l].dx;
    }
    return at;
}

static int take_host(struct perta_trainer *t, const struct perta_samples *samples, size_t batch,
                     struct perta_err *err)
{
    const struct perta_llm *llm = &t->model->llm;
    t->max_tokens = t->max_labels = batch * samples->longest;
    t->acts = calloc(llm->n_layers, sizeof *t->acts);
    t->inv_freq = calloc(2 * (size_t)llm->head_dim, sizeof *t->inv_freq);
    t->logits = calloc(t->max_labels, llm->vocab * sizeof *t->logits);
    t->labels = calloc(t->max_labels, 3 * sizeof *t->labels);
    t->exponentials = calloc(t->max_labels, sizeof *t->exponentials);
    t->token = calloc(t->max_labels, sizeof *t->token);
    t->target = calloc(t->max_labels, sizeof *t->target);
    t->places = calloc(t->max_tokens, sizeof *t->places);
    t->ids = calloc(t->max_tokens, sizeof *t->ids);
    t->starts = calloc(batch + 1, sizeof *t->starts);
    t->tiles = calloc(t->max_tokens / PERTA_TILE_ROWS + 2, sizeof *t->tiles);
    t->label_tiles = calloc(t->max_tokens / PERTA_TILE_ROWS + 2, sizeof *t->label_tiles);
    return t->acts && t->inv_freq && t->logits && t->labels && t->exponentials && t->token &&
                   t->target && t->places && t->ids && t->starts && t->tiles && t->label_tiles
               ? 0
               : perta_fail_sys(err, ENOMEM, "batches of %zu tokens", t->max_tokens);
}

/* Take the backend's memory, and share the model's weights with it. */
static int take_device(struct perta_trainer *t, struct perta_err *err)
{
    struct perta_model *m = t->model;
    const struct perta_backend_ops *ops = t->be->ops;
    uint64_t weights_bytes = m->n_floats * sizeof *m->weights;
    uint64_t memory_bytes = lay_out(t, (struct perta_array){0}) * sizeof(float);
    int rc = ops->alloc(t->be, memory_bytes, &t->memory, err);
    if (!rc)
        rc = ops->share(t->be, m->weights, weights_bytes, &t->weights, err);
    if (rc)
        return rc;
    lay_out(t, (struct perta_array){t->memory, 0});
    t->parameters = perta_model_parameters(m, (struct perta_array){t->weights, 0});
    ops->uploaded(t->be, t->parameters.weights, weights_bytes);
    perta_llm_rope_tables(&m->llm, t->inv_freq);
    return 0;
}

/* Refuse what is not computed here: other ends than a product with the embedding and one with the
 * head, and layers whose parameters are not simply products and norms. */
static int check(const struct perta_llm *llm, struct perta_err *err)
{
    bool plain_ends = llm->embedding_multiplier == 1 && llm->logit_multiplier == 1 &&
                      !(llm->logit_softcap > 0) && !*llm->names.head_bias &&
                      *llm->names.final_norm && !(llm->norm_plus > 0) && !*llm->names.positions &&
                      !*llm->names.embedding_norm;
    bool transposed = false;
    for (size_t i = 0; i < llm->family->n_params; i++)
        transposed |= llm->family->params[i].transposed;
    if (plain_ends && !transposed && !llm->n_experts && !llm->alibi)
        return 0;
    return perta_fail(err, PERTA_EINPUT, "%s is not trained in memory; estimate computes it",
                      llm->family->architecture);
}

int perta_trainer_open_on(struct perta_trainer *t, struct perta_model *model,
                          const struct perta_samples *samples, size_t batch,
                          struct perta_backend *be, struct perta_err *err)
{
    *t = (struct perta_trainer){.model = model, .be = be};
    int rc = check(&model->llm, err);
    if (!rc)
        rc = take_host(t, samples, batch < samples->n ? batch : samples->n, err);
    if (!rc)
        rc = take_device(t, err);
    if (rc)
        perta_trainer_close(t);
    return rc;
}

int perta_trainer_open(struct perta_trainer *t, struct perta_model *model,
                       const struct perta_samples *samples, size_t batch, unsigned n_threads,
                       struct perta_err *err)
{
    size_t widest = perta_llm_widest(&model->llm);
    const struct perta_cpu_needs needs = {
        .widest = widest > model->llm.vocab ? widest : model->llm.vocab,
        .rows = batch * samples->longest,
        .longest = samples->longest,
    };
    struct perta_workers *workers = NULL;
    struct perta_backend *be = NULL;
    int rc = perta_workers_open(n_threads, &workers, err);
    if (!rc)
        rc = perta_cpu_open(&needs, workers, &be, err);
    if (!rc)
        rc = perta_trainer_open_on(t, model, samples, batch, be, err);
    if (rc) {
        perta_backend_close(be);
        perta_workers_close(workers);
        return rc;
    }
    t->workers = workers;
    t->own_backend = be;
    return 0;
}

void perta_trainer_close(struct perta_trainer *t)
{
    if (t->be) {
        t->be->ops->free(t->be, t->weights);
        t->be->ops->free(t->be, t->memory);
    }
    perta_backend_close(t->own_backend);
    perta_workers_close(t->workers);
    free(t->tiles);
    free(t->label_tiles);
    free(t->acts);
    free(t->inv_freq);
    free(t->logits);
    free(t->labels);
    free(t->exponentials);
    free(t->token);
    free(t->target);
    free(t->places);
    free(t->ids);
    free(t->starts);
    *t = (struct perta_trainer){0};
}

/* ---- forward ---- */

/* Cut n rows every PERTA_TILE_ROWS; starts is filled. */
static struct perta_runs cut(size_t *starts, size_t n)
{
    size_t n_tiles = 0;
    for (size_t row = 0; row < n; row += PERTA_TILE_ROWS)
        starts[n_tiles++] = row;
    starts[n_tiles] = n;
    return (struct perta_runs){n_tiles, starts, 0};
}

/* Pack the samples which (n): their tokens one after another, and the positions of their labels. */
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
            t->labels[labels++] = 1.0f / ((float)s->n_labels[which[i]] * (float)n);
        }
    }
    t->starts[n] = at;
    *n_labels = labels;
    return (struct perta_batch){at, {n, t->starts, 0}, cut(t->tiles, at), t->places, 0};
}

/* A tensor of the model by its name, in array (n_floats); no array if there is none of that
 * name. */
static struct perta_array find(const struct perta_trainer *t, struct perta_array array,
                               const char *name)
{
    const struct perta_model *m = t->model;
    const float *at = *name ? perta_model_find(m, m->weights, name) : NULL;
    return at ? perta_array_at(array, (uint64_t)(at - m->weights)) : (struct perta_array){0};
}

static const char *head_name(const struct perta_llm *llm)
{
    return llm->tied ? llm->names.embedding : llm->names.head;
}

static struct perta_linear head_of(const struct perta_trainer *t)
{
    const struct perta_llm *llm = &t->model->llm;
    return (struct perta_linear){find(t, t->parameters.weights, head_name(llm)),
                                 PERTA_F32,
                                 llm->vocab,
                                 llm->hidden,
                                 {0},
                                 false};
}

static struct perta_norm final_norm(const struct perta_trainer *t, struct perta_array array)
{
    const struct perta_llm *llm = &t->model->llm;
    return (struct perta_norm){.weight = find(t, array, llm->names.final_norm),
                               .bias = find(t, array, llm->names.final_norm_bias),
                               .eps = llm->norm_eps,
                               .n_weights = 1};
}

static struct perta_layer layer_of(struct perta_trainer *t, uint32_t number,
                                   struct perta_gradient_sink *sink)
{
    return (struct perta_layer){.llm = &t->model->llm,
                                .be = t->be,
                                .from = &t->parameters.parameters,
                                .sink = sink,
                                .inv_freq =
                                    perta_llm_rope_table(&t->model->llm, number, t->inv_freq),
                                .site = perta_site_of(number)};
}

/* From the tokens to the logits of the labels. */
static void forward(struct perta_trainer *t, const struct perta_batch *batch, size_t n_labels)
{
    const struct perta_llm *llm = &t->model->llm;
    const struct perta_backend_ops *ops = t->be->ops;
    size_t H = llm->hidden;
    ops->gather(t->be, t->acts[0].x, find(t, t->parameters.weights, llm->names.embedding), t->ids,
                batch->n, H);
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        struct perta_layer layer = layer_of(t, l, NULL);
        perta_block_forward(&layer, batch, &t->acts[l]);
    }
    ops->gather(t->be, t->last, t->acts[llm->n_layers - 1].out, t->token, n_labels, H);
    struct perta_norm norm = final_norm(t, t->parameters.weights);
    llm->family->norm->forward(t->be, &norm, t->normed, t->rstd, t->last, n_labels, H);
    struct perta_linear head = head_of(t);
    struct perta_runs tiles = cut(t->label_tiles, n_labels);
    ops->linear_forward(t->be, &head, &tiles, t->normed, t->device_logits, n_labels, false);
}

int perta_trainer_forward(struct perta_trainer *t, const struct perta_samples *samples,
                          const uint32_t *which, size_t n, size_t *n_labels, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    struct perta_batch batch = pack(t, samples, which, n, n_labels);
    forward(t, &batch, *n_labels);
    t->be->ops->get(t->be, t->device_logits, t->logits,
                    *n_labels * t->model->llm.vocab * sizeof *t->logits);
    return perta_backend_wait(t->be, err);
}

/* ---- backward ---- */

/* The sink of training: gradients are summed over all samples of a batch, at the parameter's place
 * in gradients. */
struct sink {
    struct perta_gradient_sink sink;
    struct perta_trainer *trainer;
};

static const struct perta_parameter *param_of(const struct sink *sink, struct perta_site site,
                                              enum perta_param param)
{
    const struct perta_model *m = sink->trainer->model;
    return perta_model_param(m, site, perta_llm_param(&m->llm, site.layer, param));
}

static int on_linear(struct perta_gradient_sink *of, struct perta_site site, enum perta_param param,
                     const struct perta_batch *batch, struct perta_array x, struct perta_array dy,
                     struct perta_err *err)
{
    const struct sink *sink = (const struct sink *)(const void *)of;
    struct perta_trainer *t = sink->trainer;
    const struct perta_parameter *p = param_of(sink, site, param);
    (void)err;
    t->be->ops->linear_backward_weight(t->be, perta_array_at(t->gradients, p->at), dy, x, batch->n,
                                       p->out, p->in);
    return 0;
}

static int on_vector(struct perta_gradient_sink *of, struct perta_site site, enum perta_param param,
                     size_t sequence, struct perta_array d, struct perta_err *err)
{
    const struct sink *sink = (const struct sink *)(const void *)of;
    struct perta_trainer *t = sink->trainer;
    const struct perta_parameter *p = param_of(sink, site, param);
    (void)sequence;
    (void)err;
    t->be->ops->add(t->be, perta_array_at(t->gradients, p->at), d, p->in);
    return 0;
}

/* The weighted sum of the labels' losses. */
static double loss_of(struct perta_trainer *t, size_t n)
{
    float *most = t->labels + t->max_labels, *of_label = most + t->max_labels;
    double loss = 0;
    t->be->ops->get(t->be, t->most, most, n * sizeof *most);
    t->be->ops->get(t->be, t->of_label, of_label, n * sizeof *of_label);
    t->be->ops->get(t->be, t->sums, t->exponentials, n * sizeof *t->exponentials);
    for (size_t i = 0; i < n; i++)
        loss += (double)t->labels[i] *
                ((double)most[i] - (double)of_label[i] + log(t->exponentials[i]));
    return loss;
}

/* Backward from the loss to the result of the last block. */
static double head_backward(struct perta_trainer *t, size_t n, struct perta_array dout,
                            size_t n_tokens)
{
    const struct perta_llm *llm = &t->model->llm;
    const struct perta_backend_ops *ops = t->be->ops;
    struct perta_linear head = head_of(t);
    size_t H = head.in, V = head.out;
    float *most = t->labels + t->max_labels;
    for (size_t i = 0; i < n; i++)
        most[i] = -INFINITY;
    ops->put(t->be, t->share, t->labels, n * sizeof *t->labels);
    ops->put(t->be, t->most, most, n * sizeof *most);
    ops->zero(t->be, t->sums, 2 * n);
    ops->cross_entropy_forward(t->be, t->device_logits, 0, V, n, t->target, t->most, t->sums,
                               t->of_label);
    double loss = loss_of(t, n);
    ops->cross_entropy_backward(t->be, t->device_logits, 0, V, n, t->target, t->most, t->sums,
                                t->share);
    struct perta_runs tiles = cut(t->label_tiles, n);
    ops->linear_backward(t->be, &head, &tiles, t->device_logits, t->dnormed, n, false);
    ops->linear_backward_weight(t->be, find(t, t->gradients, head_name(llm)), t->device_logits,
                                t->normed, n, V, H);
    struct perta_norm norm = final_norm(t, t->parameters.weights);
    struct perta_norm dnorm = final_norm(t, t->gradients);
    llm->family->norm->backward_weight(t->be, &norm, dnorm.weight, dnorm.bias, t->dnormed, t->last,
                                       t->rstd, n, H);
    ops->zero(t->be, t->dlast, n * H);
    llm->family->norm->backward(t->be, &norm, t->dlast, t->dnormed, t->last, t->rstd, n, H);
    ops->zero(t->be, dout, n_tokens * H);
    ops->scatter(t->be, dout, t->dlast, t->token, n, H);
    return loss;
}

/* Add the gradient of each token to its row of the embedding, except for the padding token. */
static void embedding_backward(struct perta_trainer *t, size_t n)
{
    const struct perta_llm *llm = &t->model->llm;
    for (size_t i = 0; i < n; i++)
        t->ids[i] = t->ids[i] == llm->pad ? UINT32_MAX : t->ids[i];
    t->be->ops->scatter_add(t->be, find(t, t->gradients, llm->names.embedding), t->acts[0].dx,
                            t->ids, n, llm->hidden);
}

int perta_trainer_gradients(struct perta_trainer *t, const struct perta_samples *samples,
                            const uint32_t *which, size_t n, double *loss, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_model *m = t->model;
    struct sink sink = {{on_linear, on_vector, NULL, NULL}, t};
    size_t n_labels;
    struct perta_batch batch = pack(t, samples, which, n, &n_labels);
    t->be->ops->zero(t->be, t->gradients, m->n_floats);
    forward(t, &batch, n_labels);
    *loss = head_backward(t, n_labels, t->acts[m->llm.n_layers - 1].dout, batch.n);
    for (uint32_t l = m->llm.n_layers; l-- > 0;) {
        struct perta_layer layer = layer_of(t, l, &sink.sink);
        perta_block_backward(&layer, &batch, &t->acts[l]);
    }
    embedding_backward(t, batch.n);
    return perta_backend_wait(t->be, err);
}

int perta_trainer_step(struct perta_trainer *t, float learning_rate, float weight_decay,
                       struct perta_err *err)
{
    PERTA_FP_SCOPE;
    struct perta_model *m = t->model;
    t->n_steps++;
    t->be->ops->adamw(t->be, t->parameters.weights, t->first, t->second, t->gradients, m->n_floats,
                      learning_rate, weight_decay, t->n_steps);
    t->be->ops->get(t->be, t->parameters.weights, m->weights, m->n_floats * sizeof *m->weights);
    return perta_backend_wait(t->be, err);
}
