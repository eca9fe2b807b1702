#include "estimators/passes/head.h"

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

struct work {
    struct perta_array c;       /* (batch rows, H) of float64 */
    struct perta_array a, b, d; /* (batch rows, H) */
    struct perta_array logits;  /* (batch rows, PERTA_VOCABULARY_ROWS) */
    struct perta_array rstd;    /* (batch rows) */
};

size_t perta_head_work(const struct perta_llm *llm, size_t batch_rows)
{
    return batch_rows * (5 * (size_t)llm->hidden + PERTA_VOCABULARY_ROWS + 1) + 16;
}

static struct work work_of(const struct perta_head *h)
{
    size_t n = h->batch_rows * h->weights->llm.hidden;
    struct perta_array logits = perta_array_at(h->work, 5 * n);
    return (struct work){
        h->work,
        perta_array_at(h->work, 2 * n),
        perta_array_at(h->work, 3 * n),
        perta_array_at(h->work, 4 * n),
        logits,
        perta_array_at(logits, h->batch_rows * PERTA_VOCABULARY_ROWS),
    };
}

uint64_t perta_head_bytes(const struct perta_samples *samples)
{
    return samples->n_tokens *
               (9 * sizeof(float) + sizeof(struct perta_chunk) + sizeof(struct perta_token_row)) +
           samples->n * (8 * sizeof(size_t) + sizeof(struct perta_chunk));
}

/* Floats for each label; vectors of the final norm: its weight and bias, and a sample's gradients
 * of both. */
#define LABEL_FLOATS 7
#define NORM_VECTORS 4

static uint64_t device_bytes(uint64_t n_labels, const struct perta_llm *llm)
{
    return (n_labels * LABEL_FLOATS + NORM_VECTORS * (uint64_t)llm->hidden) * sizeof(float);
}

uint64_t perta_head_device_bytes(const struct perta_samples *samples, const struct perta_llm *llm)
{
    return device_bytes(samples->n_tokens, llm);
}

/* Vector i of the norm: weight, bias, and the gradients of both. */
static struct perta_array norm_vector(const struct perta_head *h, int i)
{
    const struct perta_array start = {h->memory, 0};
    return perta_array_at(start, h->n_labels * LABEL_FLOATS + (uint64_t)i * h->weights->llm.hidden);
}

static int take_device(struct perta_head *h, struct perta_err *err)
{
    size_t n = h->n_labels;
    int rc = h->be->ops->alloc(h->be, device_bytes(n, &h->weights->llm), &h->memory, err);
    struct perta_array at = {h->memory, 0};
    h->on_device = (struct perta_label_arrays){
        .sums = at,
        .share = perta_array_at(at, 2 * n),
        .most = perta_array_at(at, 3 * n),
        .logit = perta_array_at(at, 4 * n),
        .best = perta_array_at(at, 5 * n),
        .best_logit = perta_array_at(at, 6 * n),
    };
    return rc;
}

/* Load the final norm's weight and bias. */
static int load_norm(struct perta_head *h, struct perta_err *err)
{
    const struct perta_llm *llm = &h->weights->llm;
    const char *const names[] = {llm->family->final_norm, llm->family->final_norm_bias};
    struct perta_array *const to[] = {&h->norm.weight, &h->norm.bias};
    float *host = calloc(llm->hidden, sizeof *host);
    int rc = host ? 0 : perta_fail_sys(err, ENOMEM, "labels");
    h->norm.eps = llm->norm_eps;
    for (int i = 0; i < 2 && !rc; i++) {
        if (!names[i])
            continue;
        rc = perta_weights_vector(h->weights, names[i], llm->hidden, h->room, host, err);
        *to[i] = norm_vector(h, i);
        h->be->ops->put(h->be, *to[i], host, llm->hidden * sizeof *host);
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
                h->share[n++] = 1.0f / (float)s->n_labels[i];
            }
    }
    h->starts[s->n] = n;
}

/* Chunks end where groups end, so that a batch has whole chunks. */
static int cut_labels(struct perta_head *h, struct perta_err *err)
{
    bool by_sample = h->statistic && h->statistic->meansq;
    int rc = perta_cut_make(h->starts, h->samples->n, GROUP_ROWS, &h->cut, err);
    if (rc)
        return rc;
    return by_sample ? perta_chunks_make(h->starts, h->samples->n, true, &h->chunks, err)
                     : perta_chunks_make(h->cut.groups, h->cut.n_groups, false, &h->chunks, err);
}

int perta_head_open(struct perta_head *h, struct perta_scratch *scratch, struct perta_err *err)
{
    size_t H = h->weights->llm.hidden;
    for (uint64_t i = 0; i < h->samples->n; i++)
        h->n_labels += h->samples->n_labels[i];
    h->token = calloc(h->n_labels, sizeof *h->token);
    h->target = calloc(h->n_labels, sizeof *h->target);
    h->share = calloc(h->n_labels, sizeof *h->share);
    h->most = calloc(h->n_labels, sizeof *h->most);
    h->sums = calloc(h->n_labels, sizeof *h->sums);
    h->logit = calloc(h->n_labels, sizeof *h->logit);
    h->best = h->statistic ? NULL : calloc(h->n_labels, sizeof *h->best);
    h->starts = calloc(h->samples->n + 1, sizeof *h->starts);
    h->max_tokens = most_tokens(h);
    h->tokens = calloc(h->max_tokens, sizeof *h->tokens);
    if (!h->token || !h->target || !h->share || !h->most || !h->sums || !h->logit || !h->starts ||
        !h->tokens || (!h->statistic && !h->best))
        return perta_fail_sys(err, ENOMEM, "labels");
    collect_labels(h);
    int rc = cut_labels(h, err);
    if (!rc)
        rc = take_device(h, err);
    if (!rc)
        rc = load_norm(h, err);
    if (!rc)
        rc = perta_store_open(&h->normed, scratch, NULL, h->n_labels, H, err);
    return rc || !h->statistic
               ? rc
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

/* All tokens as id << 32 | token, sorted, so that rows are read in order and each only once. */
static uint64_t *sorted_tokens(const struct perta_samples *s)
{
    uint64_t *tokens = calloc(s->n_tokens, sizeof *tokens);
    for (uint64_t t = 0; tokens && t < s->n_tokens; t++)
        tokens[t] = (uint64_t)s->ids[t] << 32 | t;
    if (tokens)
        qsort(tokens, s->n_tokens, sizeof *tokens, by_id);
    return tokens;
}

int perta_embed(struct perta_head *h, struct perta_store *x, struct perta_err *err)
{
    const char *name = perta_weights_embedding(h->weights);
    enum perta_dtype dtype = perta_checkpoint_find(h->weights->ck, name)->tensor->dtype;
    size_t H = h->weights->llm.hidden;
    uint64_t *tokens = sorted_tokens(h->samples);
    float *row = calloc(H, sizeof *row);
    int rc = tokens && row ? 0 : perta_fail_sys(err, ENOMEM, "tokens");
    for (uint64_t i = 0; i < h->samples->n_tokens && !rc; i++) {
        const void *data;
        uint64_t id = tokens[i] >> 32;
        if (!i || id != tokens[i - 1] >> 32) {
            rc = perta_weights_rows(h->weights, name, id, 1, h->room, &data, err);
            if (!rc)
                perta_row_kernels()->to_f32(row, data, dtype, H);
        }
        if (!rc)
            rc = perta_store_put(x, (uint32_t)tokens[i], 1, row, err);
    }
    free(row);
    free(tokens);
    return rc;
}

/* ---- forward ---- */

/* Gather the rows of x that predict labels first .. first + n in to. */
static int gather(const struct perta_head *h, const struct perta_store *x, size_t first, size_t n,
                  struct perta_array to, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_store_load(x, h->token[first + i], 1, perta_array_at(to, i * x->width), err);
    return rc;
}

static void norm_forward(const struct perta_head *h, const struct work *w, size_t n)
{
    const struct perta_llm *llm = &h->weights->llm;
    llm->family->norm->forward(h->be, &h->norm, w->b, w->rstd, w->a, n, llm->hidden);
}

static int normalise(struct perta_head *h, const struct perta_store *x, struct perta_err *err)
{
    struct work w = work_of(h);
    int rc = 0;
    for (size_t first = 0, n; first < h->n_labels && !rc; first += n) {
        n = h->n_labels - first < h->batch_rows ? h->n_labels - first : h->batch_rows;
        rc = gather(h, x, first, n, w.a, err);
        norm_forward(h, &w, n);
        if (!rc)
            rc = perta_store_set(&h->normed, first, n, w.b, err);
    }
    return rc;
}

/* The span of a block of the vocabulary, from row on. */
static struct perta_span span_at(const struct perta_head *h, size_t row)
{
    size_t left = h->weights->llm.vocab - row;
    return (struct perta_span){.name = perta_weights_head(h->weights),
                               .first = row,
                               .n = left < PERTA_VOCABULARY_ROWS ? left : PERTA_VOCABULARY_ROWS};
}

struct perta_span perta_head_first(const struct perta_head *h)
{
    return span_at(h, 0);
}

/* Load a block of the head's weight, from row on, and read ahead the next block, or next after the
 * last one. */
static int load(struct perta_head *h, size_t row, const struct perta_span *next,
                struct perta_linear *block, struct perta_err *err)
{
    struct perta_span span = span_at(h, row), following;
    if (row + span.n < h->weights->llm.vocab) {
        following = span_at(h, row + span.n);
        next = &following;
    }
    return perta_weights_matrix(h->weights, &span, next, block, err);
}

/* Compute w->logits (n, rows of block) of a batch's labels; *x is their rows of normed. */
static int logits_of(struct perta_head *h, const struct perta_linear *block,
                     const struct perta_cut_batch *batch, const struct work *w,
                     struct perta_array *x, struct perta_err *err)
{
    int rc = perta_store_rows(&h->normed, batch->first_row, batch->n, w->a, x, err);
    if (!rc)
        h->be->ops->linear_forward(h->be, block, &batch->tiles, *x, w->logits, batch->n, false);
    return rc;
}

/* Set share again, with the weights of samples. */
static void weigh_by_probability(struct perta_head *h)
{
    const struct perta_samples *s = h->samples;
    double least = INFINITY;
    for (uint64_t i = 0; i < s->n; i++)
        least = fmin(least, perta_head_loss(h, i));
    for (uint64_t i = 0; i < s->n; i++) {
        double weight = exp(least - perta_head_loss(h, i));
        for (size_t k = h->starts[i]; k < h->starts[i + 1]; k++)
            h->share[k] = (float)(weight / (double)s->n_labels[i]);
    }
}

static struct perta_head_means means_of(const struct perta_head *h)
{
    struct perta_head_means sum = {0};
    double n = (double)h->samples->n;
    for (uint64_t i = 0; i < h->samples->n; i++) {
        double loss = perta_head_loss(h, i);
        sum.loss += loss;
        sum.probability += exp(-loss);
    }
    return (struct perta_head_means){sum.loss / n, sum.probability / n};
}

/* Add a block of the vocabulary to the losses. */
static int forward_block(struct perta_head *h, size_t row, const struct perta_linear *block,
                         struct perta_err *err)
{
    const struct perta_label_arrays *l = &h->on_device;
    struct work w = work_of(h);
    int rc = 0;
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        size_t first = batch.first_row, n = batch.n;
        struct perta_array x;
        rc = logits_of(h, block, &batch, &w, &x, err);
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
        rc = load(h, row, next, &block, err);
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

/* ---- backward ---- */

/* Replace logits by their gradients. */
static void logits_backward(const struct perta_head *h, size_t row, size_t n_rows,
                            const struct perta_cut_batch *batch, struct perta_array logits)
{
    const struct perta_label_arrays *l = &h->on_device;
    size_t first = batch->first_row;
    h->be->ops->cross_entropy_backward(
        h->be, logits, row, n_rows, batch->n, h->target + first, perta_array_at(l->most, first),
        perta_array_at(l->sums, 2 * first), perta_array_at(l->share, first));
}

/* dnormed += dlogits weight. */
static int add_to_dnormed(struct perta_head *h, const struct perta_linear *block,
                          const struct perta_cut_batch *batch, const struct work *w,
                          struct perta_err *err)
{
    const struct perta_array none = {0};
    size_t first = batch->first_row, n = batch->n, H = block->in;
    struct perta_store *store = &h->dnormed;
    struct perta_array rows;
    h->be->ops->linear_backward(h->be, block, &batch->tiles, w->logits, w->b, n, false);
    int rc = perta_store_rows(store, first, n, w->c, &rows, err);
    if (rc)
        return rc;
    h->be->ops->accumulate(h->be, rows, none, w->b, n * H);
    return store->buffer ? 0 : perta_store_set(store, first, n, rows, err);
}

/* ---- gradients of the vocabulary's rows ---- */

/* Append dx of those tokens of a sample whose ids are in row .. row + n_rows to the *n rows that
 * are in to. */
static int take_tokens(const struct perta_head *h, const struct perta_store *dx, size_t row,
                       size_t n_rows, uint64_t sample, struct perta_array to, size_t *n,
                       struct perta_err *err)
{
    const struct perta_samples *s = h->samples;
    int rc = 0;
    for (uint64_t k = s->starts[sample]; k < s->starts[sample + 1] && !rc; k++) {
        size_t id = (size_t)s->ids[k];
        if (id < row || id >= row + n_rows || (uint32_t)id == h->weights->llm.pad)
            continue;
        rc = perta_store_load(dx, k, 1, perta_array_at(to, *n * dx->width), err);
        h->tokens[(*n)++] = (struct perta_token_row){sample, (uint32_t)(id - row)};
    }
    return rc;
}

static bool has_room(const struct perta_head *h, size_t n, uint64_t sample)
{
    const struct perta_samples *s = h->samples;
    return n + (s->starts[sample + 1] - s->starts[sample]) <= h->max_tokens;
}

/* Add chunks first .. end to the block of rows from row on: their products, if g has x; with dx,
 * also the tokens of samples whose last chunk is among them. Each call adds as many chunks as there
 * is room for tokens. */
static int add_chunks(const struct perta_head *h, struct perta_gradient *g, size_t first,
                      size_t end, const struct perta_store *dx, size_t row, struct perta_err *err)
{
    const struct perta_chunk *of = h->chunks.of;
    bool tokens = dx && h->chunks.by_sample;
    int rc = 0;
    g->chunks = &h->chunks;
    g->tokens = h->tokens;
    g->d = work_of(h).c;
    for (size_t c = first; first < end && !rc; first = c) {
        rc = perta_backend_wait(h->be, err); /* the operation before may still read tokens */
        g->n_tokens = 0;
        for (; c < end && !rc; c++) {
            if (!tokens || !of[c].ends)
                continue;
            if (!has_room(h, g->n_tokens, of[c].sample))
                break;
            rc = take_tokens(h, dx, row, g->rows, of[c].sample, g->d, &g->n_tokens, err);
        }
        g->first = first;
        g->end = c;
        if (!rc)
            h->be->ops->gradient(h->be, g);
    }
    return rc;
}

/* Add all tokens, after all chunks, if chunks are not by sample. */
static int add_tokens(const struct perta_head *h, struct perta_gradient *g,
                      const struct perta_store *dx, size_t row, struct perta_err *err)
{
    int rc = 0;
    *g = perta_statistic_gradient(h->statistic, g->rows, g->in);
    g->chunks = &h->chunks;
    g->first = g->end = h->chunks.n;
    g->tokens = h->tokens;
    g->d = work_of(h).c;
    for (uint64_t i = 0; i < h->samples->n && !rc;) {
        rc = perta_backend_wait(h->be, err); /* the operation before may still read tokens */
        for (g->n_tokens = 0; i < h->samples->n && has_room(h, g->n_tokens, i) && !rc; i++)
            rc = take_tokens(h, dx, row, g->rows, i, g->d, &g->n_tokens, err);
        if (!rc && g->n_tokens)
            h->be->ops->gradient(h->be, g);
    }
    return rc;
}

/* Add the chunks of a batch, from *chunk on: dlogits^T x and, with dx, the tokens. */
static int add_batch(const struct perta_head *h, const struct perta_linear *block, size_t row,
                     const struct perta_cut_batch *batch, struct perta_array x,
                     struct perta_array dlogits, const struct perta_store *dx, size_t *chunk,
                     struct perta_err *err)
{
    struct perta_gradient g = perta_statistic_gradient(h->statistic, block->out, block->in);
    size_t first = *chunk;
    g.x = x;
    g.dy = dlogits;
    g.dy_width = block->out;
    g.origin = batch->first_row;
    while (*chunk < h->chunks.n && h->chunks.of[*chunk].first < batch->first_row + batch->n)
        ++*chunk;
    return add_chunks(h, &g, first, *chunk, dx, row, err);
}

static int backward_block(struct perta_head *h, size_t row, const struct perta_linear *block,
                          struct perta_err *err)
{
    struct work w = work_of(h);
    size_t n_floats = block->out * block->in, chunk = 0;
    bool own = !h->weights->llm.tied;
    int rc = 0;
    if (own)
        perta_statistic_begin(h->statistic, n_floats);
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        struct perta_array x;
        rc = logits_of(h, block, &batch, &w, &x, err);
        if (rc)
            break;
        logits_backward(h, row, block->out, &batch, w.logits);
        rc = add_to_dnormed(h, block, &batch, &w, err);
        if (!rc && own)
            rc = add_batch(h, block, row, &batch, x, w.logits, NULL, &chunk, err);
        g = batch.end;
    }
    if (!rc && own)
        return perta_statistic_end(h->statistic, perta_weights_head(h->weights), row * block->in,
                                   n_floats, err);
    return rc ? rc : perta_backend_wait(h->be, err);
}

/* ---- the final norm ---- */

/* w->d (n, H) = dnormed of labels first .. first + n, rounded to float32. */
static int take_dnormed(const struct perta_head *h, size_t first, size_t n, size_t H,
                        const struct work *w, struct perta_err *err)
{
    struct perta_array rows;
    bool finite; /* ignored: the means that are written are checked */
    int rc = perta_store_rows(&h->dnormed, first, n, w->c, &rows, err);
    if (!rc)
        h->be->ops->mean(h->be, w->d, rows, 1, n * H, &finite);
    return rc ? rc : perta_backend_wait(h->be, err);
}

/* Backward through the final norm, from the labels of one sample to the tokens that predict
 * them. */
static int norm_backward_sample(struct perta_head *h, uint64_t s, const struct perta_store *x,
                                struct perta_store *dx, struct perta_err *err)
{
    const struct perta_norm_part *norm = h->weights->llm.family->norm;
    const struct perta_backend_ops *ops = h->be->ops;
    struct perta_array dweight = norm_vector(h, 2), dbias = {0};
    struct work w = work_of(h);
    size_t H = x->width, first = h->starts[s], n = h->starts[s + 1] - first;
    int rc = gather(h, x, first, n, w.a, err);
    if (!rc)
        rc = take_dnormed(h, first, n, H, &w, err);
    if (perta_array_is(h->norm.bias))
        dbias = norm_vector(h, 3);
    ops->zero(h->be, dweight, 2 * H);
    norm_forward(h, &w, n);
    norm->backward_weight(h->be, &h->norm, dweight, dbias, w.d, w.a, w.rstd, n, H);
    ops->accumulate(h->be, h->statistic->sums, h->statistic->squares, dweight,
                    perta_array_is(dbias) ? 2 * H : H);
    ops->zero(h->be, w.b, n * H);
    norm->backward(h->be, &h->norm, w.b, w.d, w.a, w.rstd, n, H);
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_store_set(dx, h->token[first + i], 1, perta_array_at(w.b, i * H), err);
    return rc;
}

static int norm_backward(struct perta_head *h, const struct perta_store *x, struct perta_store *dx,
                         struct perta_err *err)
{
    const struct perta_family *family = h->weights->llm.family;
    struct perta_statistic *s = h->statistic;
    const struct perta_array none = {0};
    size_t H = x->width;
    int rc = 0;
    perta_statistic_begin(s, 2 * H);
    for (uint64_t i = 0; i < h->samples->n && !rc; i++)
        rc = norm_backward_sample(h, i, x, dx, err);
    if (!rc)
        rc = perta_statistic_end(s, family->final_norm, 0, H, err);
    if (rc || !family->final_norm_bias)
        return rc;
    return perta_statistic_write(s, family->final_norm_bias, 0, H, perta_array_at(s->sums, 2 * H),
                                 s->meansq ? perta_array_at(s->squares, 2 * H) : none, err);
}

int perta_head_backward(struct perta_head *h, const struct perta_store *x,
                        const struct perta_span *next, struct perta_store *dx,
                        struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        struct perta_linear block;
        rc = load(h, row, next, &block, err);
        if (!rc)
            rc = backward_block(h, row, &block, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc ? rc : norm_backward(h, x, dx, err);
}

/* ---- the embedding's gradient ---- */

static bool has_tokens(const struct perta_samples *s, size_t row, size_t n_rows)
{
    for (uint64_t t = 0; t < s->n_tokens; t++)
        if ((size_t)s->ids[t] >= row && (size_t)s->ids[t] < row + n_rows)
            return true;
    return false;
}

/* A block of rows that are the head's too: add the gradients of labels and of tokens. */
static int tied_block_backward(struct perta_head *h, const struct perta_store *dx, size_t row,
                               struct perta_err *err)
{
    struct work w = work_of(h);
    struct perta_linear block;
    size_t chunk = 0;
    int rc = load(h, row, NULL, &block, err);
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        struct perta_array x;
        rc = logits_of(h, &block, &batch, &w, &x, err);
        if (rc)
            break;
        logits_backward(h, row, block.out, &batch, w.logits);
        rc = add_batch(h, &block, row, &batch, x, w.logits, dx, &chunk, err);
        g = batch.end;
    }
    return rc;
}

static int embed_block_backward(struct perta_head *h, const struct perta_store *dx, size_t row,
                                size_t n_rows, struct perta_err *err)
{
    size_t H = dx->width;
    struct perta_gradient g = perta_statistic_gradient(h->statistic, n_rows, H);
    int rc = 0;
    perta_statistic_begin(h->statistic, n_rows * H);
    if (h->weights->llm.tied)
        rc = tied_block_backward(h, dx, row, err);
    else if (h->chunks.by_sample)
        rc = add_chunks(h, &g, 0, h->chunks.n, dx, row, err);
    if (!rc && !h->chunks.by_sample)
        rc = add_tokens(h, &g, dx, row, err);
    return rc ? rc
              : perta_statistic_end(h->statistic, perta_weights_embedding(h->weights), row * H,
                                    n_rows * H, err);
}

int perta_embed_backward(struct perta_head *h, const struct perta_store *dx, struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        size_t n_rows = span_at(h, row).n;
        /* Rows without tokens are not written: holes of the file read as zeros. */
        if (h->weights->llm.tied || has_tokens(h->samples, row, n_rows))
            rc = embed_block_backward(h, dx, row, n_rows, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc;
}
