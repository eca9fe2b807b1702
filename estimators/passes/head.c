#include "estimators/passes/head_own.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/kernels.h"

/* Labels in a group. */
#define GROUP_ROWS 1024

/* ---- memory ---- */

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t perta_head_rows(const struct perta_samples *samples, size_t tokens)
{
    size_t group = most(GROUP_ROWS, samples->longest);
    return group < samples->n_tokens ? most(group, tokens) : samples->n_tokens;
}

size_t perta_head_work(const struct perta_llm *llm, size_t batch_rows)
{
    size_t logits = llm->logit_softcap > 0 ? 2 * PERTA_VOCABULARY_ROWS : PERTA_VOCABULARY_ROWS;
    return batch_rows * (5 * (size_t)llm->hidden + logits + llm->family->norm->stats) + 16;
}

struct perta_head_arrays perta_head_work_of(const struct perta_head *h)
{
    size_t n = h->batch_rows * h->weights->llm.hidden;
    size_t stats = h->batch_rows * h->weights->llm.family->norm->stats;
    struct perta_array logits = perta_array_at(h->work, 5 * n);
    struct perta_array rstd = perta_array_at(logits, h->batch_rows * PERTA_VOCABULARY_ROWS);
    return (struct perta_head_arrays){
        h->work,
        perta_array_at(h->work, 2 * n),
        perta_array_at(h->work, 3 * n),
        perta_array_at(h->work, 4 * n),
        logits,
        rstd,
        perta_array_at(rstd, stats),
    };
}

uint64_t perta_head_bytes(const struct perta_samples *samples, bool measured)
{
    return samples->n_tokens * (9 * sizeof(float) + (measured ? 2 * sizeof(double) : 0) +
                                sizeof(struct perta_chunk) + sizeof(struct perta_token_row)) +
           samples->n * (8 * sizeof(size_t) + sizeof(struct perta_chunk));
}

/* Floats for each label; vectors: perta_head_norm_vector. */
static uint64_t label_floats(bool measured)
{
    return measured ? 11 : 7;
}
#define NORM_VECTORS 6
/* Floats of a block of the gradient of the head's bias. */
#define BIAS_BLOCK (5 * PERTA_VOCABULARY_ROWS)

static uint64_t aligned(uint64_t n_floats)
{
    return (n_floats + 15) & ~(uint64_t)15;
}

/* Floats before the head's bias. */
static uint64_t floats_before_bias(uint64_t n_labels, const struct perta_llm *llm, bool measured)
{
    return aligned(n_labels * label_floats(measured) + NORM_VECTORS * (uint64_t)llm->hidden);
}

static uint64_t device_bytes(uint64_t n_labels, const struct perta_llm *llm, bool measured)
{
    uint64_t n = floats_before_bias(n_labels, llm, measured);
    return (*llm->names.head_bias ? n + aligned(llm->vocab) + BIAS_BLOCK : n) * sizeof(float);
}

uint64_t perta_head_device_bytes(const struct perta_samples *samples, const struct perta_llm *llm,
                                 bool measured)
{
    return device_bytes(samples->n_tokens, llm, measured);
}

struct perta_array perta_head_norm_vector(const struct perta_head *h, int i)
{
    const struct perta_array start = {h->memory, 0};
    return perta_array_at(start, h->n_labels * label_floats(h->measured) +
                                     (uint64_t)i * h->weights->llm.hidden);
}

struct perta_head_bias_gradient perta_head_bias_gradient_of(const struct perta_head *h)
{
    struct perta_array sums = perta_array_at(h->bias, aligned(h->weights->llm.vocab));
    return (struct perta_head_bias_gradient){sums, perta_array_at(sums, 2 * PERTA_VOCABULARY_ROWS),
                                             perta_array_at(sums, 4 * PERTA_VOCABULARY_ROWS)};
}

/* Floats of the labels' arrays of float64, which come first. */
static uint64_t doubles(const struct perta_head *h)
{
    return h->n_labels * (h->measured ? 6 : 2);
}

static int take_device(struct perta_head *h, struct perta_err *err)
{
    size_t n = h->n_labels;
    int rc =
        h->be->ops->alloc(h->be, device_bytes(n, &h->weights->llm, h->measured), &h->memory, err);
    const struct perta_array start = {h->memory, 0}, at = perta_array_at(start, doubles(h));
    h->on_device = (struct perta_label_arrays){
        .sums = start,
        .share = at,
        .most = perta_array_at(at, n),
        .logit = perta_array_at(at, 2 * n),
        .best = perta_array_at(at, 3 * n),
        .best_logit = perta_array_at(at, 4 * n),
    };
    if (h->measured)
        h->on_device.moments = perta_array_at(start, 2 * n);
    return rc;
}

/* Load n elements of a tensor to the backend's memory, by way of host (hidden). */
static int load_vector(struct perta_head *h, const char *name, size_t n, struct perta_array to,
                       float *host, struct perta_err *err)
{
    size_t most_floats = h->weights->llm.hidden;
    int rc = 0;
    for (size_t first = 0, some; first < n && !rc; first += some) {
        some = n - first < most_floats ? n - first : most_floats;
        rc = perta_weights_vector(h->weights, name, first, some, h->room, host, err);
        h->be->ops->put(h->be, perta_array_at(to, first), host, some * sizeof *host);
    }
    return rc;
}

/* Load the weights and biases of the final norm and of that after the embedding, and the head's
 * bias. */
static int load_vectors(struct perta_head *h, struct perta_err *err)
{
    const struct perta_llm *llm = &h->weights->llm;
    const char *const names[] = {llm->names.final_norm, llm->names.final_norm_bias,
                                 llm->names.embedding_norm, llm->names.embedding_norm_bias};
    struct perta_array *const to[] = {&h->norm.weight, &h->norm.bias, &h->embedding.weight,
                                      &h->embedding.bias};
    static const int vectors[] = {0, 1, 4, 5};
    float *host = calloc(llm->hidden, sizeof *host);
    int rc = host ? 0 : perta_fail_sys(err, ENOMEM, "labels");
    const struct perta_array start = {h->memory, 0};
    h->norm.eps = llm->norm_eps;
    h->norm.plus = llm->norm_plus;
    h->norm.n_weights = 1;
    h->embedding = h->norm;
    for (int i = 0; i < 4 && !rc; i++) {
        if (!*names[i])
            continue;
        *to[i] = perta_head_norm_vector(h, vectors[i]);
        rc = load_vector(h, names[i], llm->hidden, *to[i], host, err);
    }
    if (*llm->names.head_bias && !rc) {
        h->bias = perta_array_at(start, floats_before_bias(h->n_labels, llm, h->measured));
        rc = load_vector(h, llm->names.head_bias, llm->vocab, h->bias, host, err);
    }
    free(host);
    return rc;
}

/* Tokens whose dx fit into c of struct work; it holds at least one sample. */
static size_t most_tokens(const struct perta_head *h)
{
    size_t room = 2 * h->batch_rows;
    return room < h->samples->n_tokens ? room : h->samples->n_tokens;
}

/* What each label of a sample with so many weighs; or, if the last one is left out, each of the
 * others. */
static float share_of(const struct perta_head *h, uint32_t n_labels)
{
    if (h->without_last)
        return n_labels > 1 ? 1.0f / (float)(n_labels - 1) : 0;
    return 1.0f / (float)(h->pooled ? h->n_labels : n_labels);
}

static void collect_labels(struct perta_head *h)
{
    const struct perta_samples *s = h->samples;
    size_t n = 0;
    for (uint64_t i = 0; i < s->n; i++) {
        h->starts[i] = n;
        for (uint64_t t = s->starts[i]; t < s->starts[i + 1]; t++)
            if (s->targets[t] != PERTA_IGNORED) {
                h->token[n] = (uint32_t)t;
                h->target[n] = s->targets[t];
                h->share[n++] = share_of(h, s->n_labels[i]);
            }
        if (h->without_last)
            h->share[n - 1] = 0;
    }
    h->starts[s->n] = n;
}

/* Chunks end where groups end, so that a batch has whole chunks. */
static int cut_labels(struct perta_head *h, struct perta_err *err)
{
    bool by_sample = h->statistic && (h->statistic->meansq || h->statistic->norms);
    int rc = perta_cut_make(h->starts, h->samples->n, GROUP_ROWS, &h->cut, err);
    if (rc)
        return rc;
    return by_sample ? perta_chunks_make(h->starts, h->samples->n, true, &h->chunks, err)
                     : perta_chunks_make(h->cut.groups, h->cut.n_groups, false, &h->chunks, err);
}

int perta_head_open(struct perta_head *h, struct perta_scratch *scratch, struct perta_err *err)
{
    size_t H = h->weights->llm.hidden;
    bool backward = h->statistic || h->backward;
    h->scratch = scratch;
    for (uint64_t i = 0; i < h->samples->n; i++)
        h->n_labels += h->samples->n_labels[i];
    h->token = calloc(h->n_labels, sizeof *h->token);
    h->target = calloc(h->n_labels, sizeof *h->target);
    h->share = calloc(h->n_labels, sizeof *h->share);
    h->most = calloc(h->n_labels, sizeof *h->most);
    h->sums = calloc(h->n_labels, sizeof *h->sums);
    h->logit = calloc(h->n_labels, sizeof *h->logit);
    bool best = h->measured || !backward;
    h->best = best ? calloc(h->n_labels, sizeof *h->best) : NULL;
    h->moments = h->measured ? calloc(2 * h->n_labels, sizeof *h->moments) : NULL;
    h->starts = calloc(h->samples->n + 1, sizeof *h->starts);
    h->max_tokens = most_tokens(h);
    h->tokens = calloc(h->max_tokens, sizeof *h->tokens);
    if (!h->token || !h->target || !h->share || !h->most || !h->sums || !h->logit || !h->starts ||
        !h->tokens || (best && !h->best) || (h->measured && !h->moments))
        return perta_fail_sys(err, ENOMEM, "labels");
    collect_labels(h);
    int rc = cut_labels(h, err);
    if (!rc)
        rc = take_device(h, err);
    if (!rc)
        rc = load_vectors(h, err);
    if (!rc)
        rc = perta_store_open(&h->normed, scratch, NULL, h->n_labels, H, err);
    return rc || !backward ? rc
                           : perta_store_open(&h->dnormed, scratch, NULL, h->n_labels, 2 * H, err);
}

void perta_head_close(struct perta_head *h, struct perta_scratch *scratch)
{
    free(h->token);
    free(h->target);
    free(h->share);
    free(h->most);
    free(h->sums);
    free(h->logit);
    free(h->best);
    free(h->moments);
    free(h->starts);
    free(h->tokens);
    perta_cut_release(&h->cut);
    perta_chunks_release(&h->chunks);
    if (h->be)
        h->be->ops->free(h->be, h->memory);
    perta_store_close(&h->normed, scratch);
    perta_store_close(&h->dnormed, scratch);
}

/* ---- embedding ---- */

static int by_id(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

size_t perta_head_tables(const struct perta_head *h, struct perta_head_table tables[2])
{
    const struct perta_llm *llm = &h->weights->llm;
    tables[0] = (struct perta_head_table){perta_weights_embedding(h->weights), llm->vocab, false};
    tables[1] = (struct perta_head_table){llm->names.positions,
                                          llm->n_positions + llm->position_offset, true};
    return llm->n_positions ? 2 : 1;
}

size_t perta_head_row_of(const struct perta_head *h, const struct perta_head_table *table,
                         uint64_t token)
{
    const struct perta_samples *s = h->samples;
    return table->positions ? s->places[token].position + h->weights->llm.position_offset
                            : (size_t)s->ids[token];
}

/* All tokens as row << 32 | token, sorted, so that rows are read in order and each only once. */
static uint64_t *sorted_tokens(const struct perta_head *h, const struct perta_head_table *table)
{
    uint64_t n = h->samples->n_tokens, *tokens = calloc(n, sizeof *tokens);
    for (uint64_t t = 0; tokens && t < n; t++)
        tokens[t] = (uint64_t)perta_head_row_of(h, table, t) << 32 | t;
    if (tokens)
        qsort(tokens, n, sizeof *tokens, by_id);
    return tokens;
}

static void multiply(float *row, float by, size_t n)
{
    for (size_t i = 0; by != 1 && i < n; i++)
        row[i] *= by;
}

/* x (tokens, H) = all tokens' rows of a table. */
static int take_rows(struct perta_head *h, const struct perta_head_table *table,
                     struct perta_store *x, struct perta_err *err)
{
    enum perta_dtype dtype = perta_checkpoint_find(h->weights->ck, table->name)->tensor->dtype;
    size_t H = h->weights->llm.hidden;
    uint64_t *tokens = sorted_tokens(h, table);
    float *row = calloc(H, sizeof *row);
    int rc = tokens && row ? 0 : perta_fail_sys(err, ENOMEM, "tokens");
    for (uint64_t i = 0; i < h->samples->n_tokens && !rc; i++) {
        const void *data;
        uint64_t id = tokens[i] >> 32;
        if (!i || id != tokens[i - 1] >> 32) {
            rc = perta_weights_rows(h->weights, table->name, id, 1, h->room, &data, err);
            if (!rc) {
                perta_row_kernels()->to_f32(row, data, dtype, H);
                if (!table->positions)
                    multiply(row, h->weights->llm.embedding_multiplier, H);
            }
        }
        if (!rc)
            rc = perta_store_put(x, (uint32_t)tokens[i], 1, row, err);
    }
    free(row);
    free(tokens);
    return rc;
}

/* Tokens of a batch, from first on. */
static size_t rows_at(const struct perta_head *h, size_t first)
{
    size_t left = h->samples->n_tokens - first;
    return left < h->batch_rows ? left : h->batch_rows;
}

/* x (tokens, H) += y. */
static int add_store(struct perta_head *h, struct perta_store *x, const struct perta_store *y,
                     struct perta_err *err)
{
    struct perta_head_arrays w = perta_head_work_of(h);
    int rc = 0;
    for (size_t first = 0, n; first < h->samples->n_tokens && !rc; first += n) {
        n = rows_at(h, first);
        rc = perta_store_load(x, first, n, w.a, err);
        if (!rc)
            rc = perta_store_load(y, first, n, w.b, err);
        h->be->ops->add(h->be, w.a, w.b, n * x->width);
        if (!rc)
            rc = perta_store_set(x, first, n, w.a, err);
    }
    return rc ? rc : perta_backend_wait(h->be, err);
}

int perta_head_look_up(struct perta_head *h, struct perta_store *x, struct perta_err *err)
{
    struct perta_head_table tables[2];
    struct perta_store positions = {.fd = -1};
    size_t n = perta_head_tables(h, tables);
    int rc = take_rows(h, &tables[0], x, err);
    if (rc || n == 1)
        return rc;
    rc = perta_store_open(&positions, h->scratch, NULL, h->samples->n_tokens, x->width, err);
    if (!rc)
        rc = take_rows(h, &tables[1], &positions, err);
    if (!rc)
        rc = add_store(h, x, &positions, err);
    perta_store_close(&positions, h->scratch);
    return rc;
}

/* x = norm(x), with the norm after the embedding. */
static int normalise_embedded(struct perta_head *h, struct perta_store *x, struct perta_err *err)
{
    const struct perta_norm_part *norm = h->weights->llm.family->norm;
    struct perta_head_arrays w = perta_head_work_of(h);
    int rc = 0;
    for (size_t first = 0, n; first < h->samples->n_tokens && !rc; first += n) {
        n = rows_at(h, first);
        rc = perta_store_load(x, first, n, w.a, err);
        norm->forward(h->be, &h->embedding, w.b, w.rstd, w.a, n, x->width);
        if (!rc)
            rc = perta_store_set(x, first, n, w.b, err);
    }
    return rc ? rc : perta_backend_wait(h->be, err);
}

int perta_embed(struct perta_head *h, struct perta_store *x, struct perta_err *err)
{
    int rc = perta_head_look_up(h, x, err);
    return rc || !*h->weights->llm.names.embedding_norm ? rc : normalise_embedded(h, x, err);
}

/* ---- forward ---- */

int perta_head_gather(const struct perta_head *h, const struct perta_store *x, size_t first,
                      size_t n, struct perta_array to, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_store_load(x, h->token[first + i], 1, perta_array_at(to, i * x->width), err);
    return rc;
}

void perta_head_norm_forward(const struct perta_head *h, const struct perta_head_arrays *w,
                             size_t n)
{
    const struct perta_llm *llm = &h->weights->llm;
    llm->family->norm->forward(h->be, &h->norm, w->b, w->rstd, w->a, n, llm->hidden);
}

static int normalise(struct perta_head *h, const struct perta_store *x, struct perta_err *err)
{
    struct perta_head_arrays w = perta_head_work_of(h);
    int rc = 0;
    for (size_t first = 0, n; first < h->n_labels && !rc; first += n) {
        n = h->n_labels - first < h->batch_rows ? h->n_labels - first : h->batch_rows;
        rc = perta_head_gather(h, x, first, n, w.a, err);
        perta_head_norm_forward(h, &w, n);
        if (!rc)
            rc = perta_store_set(&h->normed, first, n, w.b, err);
    }
    return rc;
}

struct perta_span perta_head_span(const struct perta_head *h, size_t row)
{
    size_t left = h->weights->llm.vocab - row;
    return (struct perta_span){.name = perta_weights_head(h->weights),
                               .first = row,
                               .n = left < PERTA_VOCABULARY_ROWS ? left : PERTA_VOCABULARY_ROWS};
}

struct perta_span perta_head_first(const struct perta_head *h)
{
    return perta_head_span(h, 0);
}

int perta_head_load(struct perta_head *h, size_t row, const struct perta_span *next,
                    struct perta_linear *block, struct perta_err *err)
{
    struct perta_span span = perta_head_span(h, row), following;
    if (row + span.n < h->weights->llm.vocab) {
        following = perta_head_span(h, row + span.n);
        next = &following;
    }
    int rc = perta_weights_matrix(h->weights, &span, next, block, err);
    if (perta_array_is(h->bias))
        block->bias = perta_array_at(h->bias, row);
    return rc;
}

int perta_head_logits(struct perta_head *h, const struct perta_linear *block,
                      const struct perta_cut_batch *batch, const struct perta_head_arrays *w,
                      struct perta_array *x, struct perta_err *err)
{
    const struct perta_llm *llm = &h->weights->llm;
    const struct perta_backend_ops *ops = h->be->ops;
    size_t n = batch->n * block->out;
    int rc = perta_store_rows(&h->normed, batch->first_row, batch->n, w->a, x, err);
    if (rc)
        return rc;
    ops->linear_forward(h->be, block, &batch->tiles, *x, w->logits, batch->n, false);
    if (llm->logit_multiplier != 1)
        ops->scale(h->be, w->logits, llm->logit_multiplier, n);
    if (llm->logit_softcap > 0)
        ops->softcap_forward(h->be, w->logits, llm->logit_softcap, n);
    return 0;
}

static double least_loss(const struct perta_head *h)
{
    double least = INFINITY;
    for (uint64_t i = 0; i < h->samples->n; i++)
        least = fmin(least, perta_head_loss(h, i));
    return least;
}

/* Set share again, with the weights of samples. */
static void weigh_by_probability(struct perta_head *h)
{
    const struct perta_samples *s = h->samples;
    double least = least_loss(h);
    for (uint64_t i = 0; i < s->n; i++) {
        double weight = exp(least - perta_head_loss(h, i));
        for (size_t k = h->starts[i]; k < h->starts[i + 1]; k++)
            h->share[k] = (float)(weight / (double)s->n_labels[i]);
    }
}

static struct perta_head_means means_of(const struct perta_head *h)
{
    struct perta_head_means sum = {0};
    double n = (double)h->samples->n, least = least_loss(h);
    for (uint64_t i = 0; i < h->samples->n; i++) {
        double loss = perta_head_loss(h, i);
        sum.loss += loss;
        sum.probability += exp(-loss);
        sum.spread += exp(least - loss) * -expm1(-loss);
    }
    return (struct perta_head_means){sum.loss / n, sum.probability / n, sum.spread / n};
}

/* Add a block of the vocabulary to the losses. */
static int forward_block(struct perta_head *h, size_t row, const struct perta_linear *block,
                         struct perta_err *err)
{
    const struct perta_label_arrays *l = &h->on_device;
    struct perta_head_arrays w = perta_head_work_of(h);
    int rc = 0;
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        size_t first = batch.first_row, n = batch.n;
        struct perta_array x;
        rc = perta_head_logits(h, block, &batch, &w, &x, err);
        if (h->measured)
            h->be->ops->moments_forward(
                h->be, w.logits, block->out, n, perta_array_at(l->most, first),
                perta_array_at(l->sums, 2 * first), perta_array_at(l->moments, 4 * first));
        h->be->ops->cross_entropy_forward(
            h->be, w.logits, row, block->out, n, h->target + first, perta_array_at(l->most, first),
            perta_array_at(l->sums, 2 * first), perta_array_at(l->logit, first));
        if (h->best)
            h->be->ops->best_forward(h->be, w.logits, row, block->out, n,
                                     perta_array_at(l->best_logit, first),
                                     perta_array_at(l->best, first));
        g = batch.end;
    }
    return rc ? rc : perta_backend_wait(h->be, err);
}

static void losses_begin(struct perta_head *h)
{
    const struct perta_label_arrays *l = &h->on_device;
    uint64_t n = h->n_labels, len_bytes = n * sizeof *h->most;
    for (uint64_t i = 0; i < n; i++)
        h->most[i] = -INFINITY;
    h->be->ops->zero(h->be, l->sums, 2 * n);
    if (h->measured)
        h->be->ops->zero(h->be, l->moments, 4 * n);
    h->be->ops->put(h->be, l->most, h->most, len_bytes);
    h->be->ops->put(h->be, l->best_logit, h->most, len_bytes);
}

/* Get the losses from the backend, and compute means and shares. */
static int losses_end(struct perta_head *h, struct perta_head_means *means, struct perta_err *err)
{
    const struct perta_label_arrays *l = &h->on_device;
    uint64_t n = h->n_labels;
    h->be->ops->get(h->be, l->sums, h->sums, n * sizeof *h->sums);
    h->be->ops->get(h->be, l->most, h->most, n * sizeof *h->most);
    h->be->ops->get(h->be, l->logit, h->logit, n * sizeof *h->logit);
    if (h->best)
        h->be->ops->get(h->be, l->best, h->best, n * sizeof *h->best);
    if (h->measured)
        h->be->ops->get(h->be, l->moments, h->moments, 2 * n * sizeof *h->moments);
    int rc = perta_backend_wait(h->be, err);
    if (rc)
        return rc;
    *means = means_of(h);
    if (h->by_probability)
        weigh_by_probability(h);
    h->be->ops->put(h->be, l->share, h->share, n * sizeof *h->share);
    return 0;
}

int perta_head_forward(struct perta_head *h, const struct perta_store *x,
                       const struct perta_span *next, struct perta_head_means *means,
                       struct perta_err *err)
{
    int rc = normalise(h, x, err);
    losses_begin(h);
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        struct perta_linear block;
        rc = perta_head_load(h, row, next, &block, err);
        if (!rc)
            rc = forward_block(h, row, &block, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc ? rc : losses_end(h, means, err);
}

double perta_head_loss(const struct perta_head *h, uint64_t sample)
{
    size_t first = h->starts[sample], end = h->starts[sample + 1];
    double sum = 0;
    for (size_t i = first; i < end; i++)
        sum += (double)h->most[i] - (double)h->logit[i] + log(h->sums[i]);
    return sum / (double)(end - first);
}
