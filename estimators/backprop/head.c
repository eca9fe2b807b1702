#include "estimators/backprop/head.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/backprop/ops.h"

/* ---- memory ---- */

/* Of a batch: rows in, rows out, and logits of a block. */
size_t perta_head_work(const struct perta_llm *llm, size_t batch_tokens, size_t block_rows)
{
    return batch_tokens * (3 * (size_t)llm->hidden + block_rows + 1);
}

uint64_t perta_head_bytes(const struct perta_samples *samples, const struct perta_llm *llm)
{
    return samples->n_tokens * 7 * sizeof(float) + samples->n * 4 * sizeof(size_t) +
           llm->hidden * sizeof(float);
}

struct work {
    float *a, *b, *c; /* (batch tokens, H) */
    float *logits;    /* (batch tokens, block_rows) */
    float *rstd;      /* (batch tokens) */
};

static struct work work_of(const struct perta_head *h)
{
    size_t n = h->batches->longest * h->weights->llm.hidden;
    float *logits = h->work + 3 * n;
    return (struct work){h->work, h->work + n, h->work + 2 * n, logits,
                         logits + h->batches->longest * h->block_rows};
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
    for (size_t b = 0; b <= h->batches->n; b++)
        h->batch_starts[b] = h->starts[h->batch_samples[b]];
}

int perta_head_open(struct perta_head *h, struct perta_scratch *scratch, struct perta_err *err)
{
    size_t H = h->weights->llm.hidden;
    for (uint64_t i = 0; i < h->samples->n; i++)
        h->n_labels += h->samples->n_labels[i];
    h->token = calloc(h->n_labels, sizeof *h->token);
    h->target = calloc(h->n_labels, sizeof *h->target);
    h->share = calloc(h->n_labels, sizeof *h->share);
    h->lse = calloc(h->n_labels, sizeof *h->lse);
    h->logit = calloc(h->n_labels, sizeof *h->logit);
    h->best = h->statistic ? NULL : calloc(h->n_labels, sizeof *h->best);
    h->starts = calloc(h->samples->n + 1, sizeof *h->starts);
    h->batch_starts = calloc(h->batches->n + 1, sizeof *h->batch_starts);
    h->norm = calloc(H, sizeof *h->norm);
    if (!h->token || !h->target || !h->share || !h->lse || !h->logit || !h->starts ||
        !h->batch_starts || !h->norm || (!h->statistic && !h->best))
        return perta_fail_sys(err, ENOMEM, "labels");
    collect_labels(h);
    int rc = perta_weights_vector(h->weights, PERTA_FINAL_NORM, H, h->room, h->norm, err);
    if (!rc)
        rc = perta_store_open(&h->normed, scratch, NULL, h->n_labels, H, err);
    return rc || !h->statistic
               ? rc
               : perta_store_open(&h->dnormed, scratch, NULL, h->n_labels, H, err);
}

void perta_head_close(struct perta_head *h, struct perta_scratch *scratch)
{
    free(h->token);
    free(h->target);
    free(h->share);
    free(h->lse);
    free(h->logit);
    free(h->best);
    free(h->starts);
    free(h->batch_starts);
    free(h->norm);
    perta_store_close(&h->normed, scratch);
    perta_store_close(&h->dnormed, scratch);
}

/* ---- embedding ---- */

static float element(const struct perta_linear *l, size_t i)
{
    const uint8_t *data = l->weight;
    const struct perta_operand_matrix row = {data + i * (l->dtype == PERTA_F32 ? 4 : 2), l->dtype,
                                             1, 1};
    return perta_operand_element(&row);
}

static int by_id(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* All tokens by id, so that a row is read once, and rows in order: each id << 32 | token. */
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
    size_t H = h->weights->llm.hidden;
    uint64_t *tokens = sorted_tokens(h->samples);
    int rc = tokens ? 0 : perta_fail_sys(err, ENOMEM, "tokens");
    for (uint64_t i = 0; i < h->samples->n_tokens && !rc; i++) {
        struct perta_linear row;
        uint64_t id = tokens[i] >> 32;
        if (!i || id != tokens[i - 1] >> 32) {
            rc = perta_weights_rows(h->weights, PERTA_EMBEDDING, id, 1, h->room, &row, err);
            for (size_t k = 0; k < H && !rc; k++)
                h->work[k] = element(&row, k);
        }
        if (!rc)
            rc = perta_store_put(x, (uint32_t)tokens[i], 1, h->work, err);
    }
    free(tokens);
    return rc;
}

/* ---- forward ---- */

/* Rows of x that predict labels first .. first + n, dense in to. */
static int gather(const struct perta_head *h, const struct perta_store *x, size_t first, size_t n,
                  float *to, struct perta_err *err)
{
    size_t H = x->width;
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i++) {
        struct perta_rows row;
        rc = perta_store_get(x, h->token[first + i], 1, 0, H, to + i * H, &row, err);
        if (!rc && row.data != to + i * H)
            memcpy(to + i * H, row.data, H * sizeof *to);
    }
    return rc;
}

static int normalise(struct perta_head *h, const struct perta_store *x, struct perta_err *err)
{
    struct work w = work_of(h);
    size_t H = x->width;
    int rc = 0;
    for (size_t b = 0; b < h->batches->n && !rc; b++) {
        size_t first = h->batch_starts[b], n = h->batch_starts[b + 1] - first;
        rc = gather(h, x, first, n, w.a, err);
        perta_rmsnorm_forward(w.b, w.rstd, w.a, h->norm, n, H, h->weights->llm.rms_eps);
        if (!rc)
            rc = perta_store_put(&h->normed, first, n, w.b, err);
    }
    return rc;
}

/* Rows of the head's weight from row on. */
static int read_block(struct perta_head *h, size_t row, struct perta_linear *block,
                      struct perta_err *err)
{
    size_t left = h->weights->llm.vocab - row;
    return perta_weights_rows(h->weights, perta_weights_head(h->weights), row,
                              left < h->block_rows ? left : h->block_rows, h->room, block, err);
}

/* logits (n, rows of block) of labels first .. first + n; *x their rows of normed. */
static int logits_of(struct perta_head *h, const struct perta_linear *block, size_t first,
                     size_t n, const struct work *w, const float **x, struct perta_err *err)
{
    struct perta_rows rows;
    int rc = perta_store_get(&h->normed, first, n, 0, block->in, w->a, &rows, err);
    *x = rows.data;
    return rc ? rc : perta_linear_forward(h->gemm, block, rows.data, w->logits, n, false, err);
}

/* share, anew. */
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

int perta_head_forward(struct perta_head *h, const struct perta_store *x,
                       struct perta_head_means *means, struct perta_err *err)
{
    struct work w = work_of(h);
    double *sums = calloc(h->n_labels, sizeof *sums);
    float *most = calloc(h->n_labels, sizeof *most);
    int rc = sums && most ? normalise(h, x, err) : perta_fail_sys(err, ENOMEM, "labels");
    for (size_t i = 0; i < h->n_labels && !rc; i++)
        h->lse[i] = most[i] = -INFINITY;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += h->block_rows) {
        struct perta_linear block;
        rc = read_block(h, row, &block, err);
        for (size_t b = 0; b < h->batches->n && !rc; b++) {
            size_t first = h->batch_starts[b], n = h->batch_starts[b + 1] - first;
            const float *rows;
            rc = logits_of(h, &block, first, n, &w, &rows, err);
            if (rc)
                break;
            perta_cross_entropy_forward(w.logits, row, block.out, n, h->target + first,
                                        h->lse + first, sums + first, h->logit + first);
            if (h->best)
                perta_best_forward(w.logits, row, block.out, n, most + first, h->best + first);
        }
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    for (size_t i = 0; i < h->n_labels && !rc; i++)
        h->lse[i] += (float)log(sums[i]);
    if (!rc)
        *means = means_of(h);
    if (!rc && h->by_probability)
        weigh_by_probability(h);
    free(sums);
    free(most);
    return rc;
}

double perta_head_loss(const struct perta_head *h, uint64_t sample)
{
    size_t first = h->starts[sample], end = h->starts[sample + 1];
    double sum = 0;
    for (size_t i = first; i < end; i++)
        sum += (double)h->lse[i] - (double)h->logit[i];
    return sum / (double)(end - first);
}

/* ---- backward ---- */

/* From logits to the gradient of the loss by them. */
static void logits_backward(const struct perta_head *h, size_t row, size_t n_rows, size_t first,
                            size_t n, float *logits)
{
    perta_cross_entropy_backward(logits, row, n_rows, n, h->target + first, h->lse + first,
                                 h->share + first);
}

/* Labels of samples where squares are wanted, else of batches. */
static struct perta_segments segments_of(const struct perta_head *h)
{
    if (h->statistic->meansq)
        return (struct perta_segments){h->samples->n, h->batches->longest, h->starts};
    return (struct perta_segments){h->batches->n, h->batches->longest, h->batch_starts};
}

static int add_to_dnormed(struct perta_head *h, const struct perta_linear *block, size_t first,
                          size_t n, const struct work *w, struct perta_err *err)
{
    struct perta_rows rows;
    int rc = perta_store_get(&h->dnormed, first, n, 0, block->in, w->b, &rows, err);
    if (!rc && rows.data != w->b)
        memcpy(w->b, rows.data, n * block->in * sizeof *w->b);
    if (!rc)
        rc = perta_linear_backward(h->gemm, block, w->logits, w->b, n, true, err);
    return rc ? rc : perta_store_put(&h->dnormed, first, n, w->b, err);
}

/* Gradient of the block's rows, of labels first .. first + n: dlogits^T normed. */
static int add_to_rows(struct perta_head *h, const struct perta_linear *block, size_t n,
                       const float *x, const float *dlogits, float *to, struct perta_err *err)
{
    return perta_gemm_run(h->gemm, block->out, block->in, n,
                          perta_transposed(perta_matrix(dlogits, block->out)),
                          perta_matrix(x, block->in), to, block->in, true, err);
}

static int backward_block(struct perta_head *h, size_t row, struct perta_err *err)
{
    struct perta_segments segments = segments_of(h);
    struct work w = work_of(h);
    struct perta_linear block;
    int rc = read_block(h, row, &block, err);
    size_t n_floats = block.out * block.in;
    bool own = !h->weights->llm.tied;
    if (!rc && own)
        perta_statistic_begin(h->statistic, n_floats);
    for (size_t i = 0; i < segments.n && !rc; i++) {
        size_t first = segments.starts[i], n = segments.starts[i + 1] - first;
        const float *x;
        rc = logits_of(h, &block, first, n, &w, &x, err);
        logits_backward(h, row, block.out, first, n, w.logits);
        if (!rc)
            rc = add_to_dnormed(h, &block, first, n, &w, err);
        if (rc || !own)
            continue;
        rc = add_to_rows(h, &block, n, x, w.logits,
                         perta_statistic_target(h->statistic, n_floats), err);
        perta_statistic_sample(h->statistic, n_floats);
    }
    return rc || !own ? rc
                      : perta_statistic_end(h->statistic, PERTA_HEAD, row * block.in, n_floats,
                                            err);
}

/* Through the final norm, and to the tokens that the labels were predicted from. */
static int norm_backward(struct perta_head *h, const struct perta_store *x,
                         struct perta_store *dx, struct perta_err *err)
{
    struct work w = work_of(h);
    size_t H = x->width;
    int rc = 0;
    perta_statistic_begin(h->statistic, H);
    for (uint64_t s = 0; s < h->samples->n && !rc; s++) {
        size_t first = h->starts[s], n = h->starts[s + 1] - first;
        struct perta_rows d;
        rc = gather(h, x, first, n, w.a, err);
        if (!rc)
            rc = perta_store_get(&h->dnormed, first, n, 0, H, w.c, &d, err);
        if (rc)
            break;
        perta_rmsnorm_forward(w.b, w.rstd, w.a, h->norm, n, H, h->weights->llm.rms_eps);
        perta_rmsnorm_backward_weight(perta_statistic_target(h->statistic, H), d.data, w.a, w.rstd,
                                      n, H);
        perta_statistic_sample(h->statistic, H);
        memset(w.b, 0, n * H * sizeof *w.b);
        perta_rmsnorm_backward(w.b, d.data, w.a, w.rstd, h->norm, n, H);
        for (size_t i = 0; i < n && !rc; i++)
            rc = perta_store_put(dx, h->token[first + i], 1, w.b + i * H, err);
    }
    return rc ? rc : perta_statistic_end(h->statistic, PERTA_FINAL_NORM, 0, H, err);
}

int perta_head_backward(struct perta_head *h, const struct perta_store *x, struct perta_store *dx,
                        struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += h->block_rows) {
        rc = backward_block(h, row, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc ? rc : norm_backward(h, x, dx, err);
}

/* ---- the embedding's gradient ---- */

/* Add dx of a sample's tokens whose ids are in rows row .. row + n_rows. */
static int add_tokens(struct perta_head *h, const struct perta_store *dx, uint64_t sample,
                      size_t row, size_t n_rows, float *to, struct perta_err *err)
{
    const struct perta_samples *s = h->samples;
    size_t H = dx->width;
    int rc = 0;
    for (uint64_t t = s->starts[sample]; t < s->starts[sample + 1] && !rc; t++) {
        size_t id = (size_t)s->ids[t];
        if (id < row || id >= row + n_rows)
            continue;
        struct perta_rows d;
        rc = perta_store_get(dx, t, 1, 0, H, h->work, &d, err);
        for (size_t i = 0; i < H && !rc; i++)
            to[(id - row) * H + i] += d.data[i];
    }
    return rc;
}

static bool has_tokens(const struct perta_samples *s, uint64_t from, uint64_t to, size_t row,
                       size_t n_rows)
{
    for (uint64_t t = s->starts[from]; t < s->starts[to]; t++)
        if ((size_t)s->ids[t] >= row && (size_t)s->ids[t] < row + n_rows)
            return true;
    return false;
}

static int embed_block_backward(struct perta_head *h, const struct perta_store *dx, size_t row,
                                struct perta_err *err)
{
    struct work w = work_of(h);
    size_t left = h->weights->llm.vocab - row;
    bool tied = h->weights->llm.tied;
    struct perta_linear block = {.out = left < h->block_rows ? left : h->block_rows,
                                 .in = dx->width};
    size_t n_floats = block.out * block.in;
    int rc = tied ? read_block(h, row, &block, err) : 0;
    perta_statistic_begin(h->statistic, n_floats);
    for (uint64_t s = 0; s < h->samples->n && !rc; s++) {
        if (!tied && !has_tokens(h->samples, s, s + 1, row, block.out))
            continue;
        size_t first = h->starts[s], n = h->starts[s + 1] - first;
        float *to = perta_statistic_target(h->statistic, n_floats);
        const float *x;
        if (tied && !(rc = logits_of(h, &block, first, n, &w, &x, err))) {
            logits_backward(h, row, block.out, first, n, w.logits);
            rc = add_to_rows(h, &block, n, x, w.logits, to, err);
        }
        if (!rc)
            rc = add_tokens(h, dx, s, row, block.out, to, err);
        perta_statistic_sample(h->statistic, n_floats);
    }
    return rc ? rc
              : perta_statistic_end(h->statistic, PERTA_EMBEDDING, row * block.in, n_floats, err);
}

int perta_embed_backward(struct perta_head *h, const struct perta_store *dx, struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += h->block_rows) {
        size_t left = h->weights->llm.vocab - row;
        size_t n_rows = left < h->block_rows ? left : h->block_rows;
        /* Rows that nothing touches stay holes: zero. */
        if (h->weights->llm.tied || has_tokens(h->samples, 0, h->samples->n, row, n_rows))
            rc = embed_block_backward(h, dx, row, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc;
}
