#include "estimators/passes/head.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/kernels.h"
#include "estimators/compute/ops.h"

/* Labels of a group. */
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

/* Of a batch: struct work, and what products read past the end. */
size_t perta_head_work(const struct perta_llm *llm, size_t batch_rows)
{
    size_t H = llm->hidden;
    return batch_rows * (5 * H + PERTA_VOCABULARY_ROWS + 1) +
           PERTA_SLACK_ROWS * most(H, PERTA_VOCABULARY_ROWS) + 16;
}

uint64_t perta_head_bytes(const struct perta_samples *samples, const struct perta_llm *llm)
{
    return samples->n_tokens * (9 * sizeof(float) + sizeof(struct perta_chunk)) +
           samples->n * (8 * sizeof(size_t) + sizeof(struct perta_chunk)) +
           llm->hidden * sizeof(float);
}

struct work {
    double *c;        /* (batch rows, H), of twice the width */
    float *a, *b, *d; /* (batch rows, H) */
    float *logits;    /* (batch rows, PERTA_VOCABULARY_ROWS) */
    float *rstd;      /* (batch rows) */
};

static struct work work_of(const struct perta_head *h)
{
    size_t n = h->batch_rows * h->weights->llm.hidden;
    float *logits = h->work + 5 * n;
    return (struct work){
        (double *)(void *)h->work, h->work + 2 * n, h->work + 3 * n,
        h->work + 4 * n,           logits,          logits + h->batch_rows * PERTA_VOCABULARY_ROWS};
}

static struct perta_workers *workers_of(const struct perta_head *h)
{
    return perta_gemm_workers(h->gemm);
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

/* Chunks end where groups do, so that a batch has whole ones. */
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
    h->norm = calloc(H, sizeof *h->norm);
    if (!h->token || !h->target || !h->share || !h->most || !h->sums || !h->logit || !h->starts ||
        !h->norm || (!h->statistic && !h->best))
        return perta_fail_sys(err, ENOMEM, "labels");
    collect_labels(h);
    int rc = cut_labels(h, err);
    if (!rc)
        rc = perta_weights_vector(h->weights, PERTA_FINAL_NORM, H, h->room, h->norm, err);
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
    perta_cut_release(&h->cut);
    perta_chunks_release(&h->chunks);
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
            rc = perta_weights_rows(h->weights, perta_weights_embedding(h->weights), id, 1, h->room,
                                    &row, err);
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
    for (size_t first = 0, n; first < h->n_labels && !rc; first += n) {
        n = h->n_labels - first < h->batch_rows ? h->n_labels - first : h->batch_rows;
        rc = gather(h, x, first, n, w.a, err);
        perta_rmsnorm_forward(workers_of(h), w.b, w.rstd, w.a, h->norm, n, H,
                              h->weights->llm.rms_eps);
        if (!rc)
            rc = perta_store_put(&h->normed, first, n, w.b, err);
    }
    return rc;
}

/* Rows of the vocabulary from row on. */
static struct perta_part part_at(const struct perta_head *h, size_t row)
{
    size_t left = h->weights->llm.vocab - row;
    return (struct perta_part){.name = perta_weights_head(h->weights),
                               .first = row,
                               .n = left < PERTA_VOCABULARY_ROWS ? left : PERTA_VOCABULARY_ROWS};
}

struct perta_part perta_head_first(const struct perta_head *h)
{
    return part_at(h, 0);
}

/* Rows of the head's weight from row on; what follows them is begun, after the last of them
 * next. */
static int load(struct perta_head *h, size_t row, const struct perta_part *next,
                const struct perta_linear **block, struct perta_err *err)
{
    struct perta_part part = part_at(h, row), following;
    const struct perta_loaded *loaded;
    if (row + part.n < h->weights->llm.vocab) {
        following = part_at(h, row + part.n);
        next = &following;
    }
    int rc = perta_weights_load(h->weights, &part, next, &loaded, err);
    *block = &loaded->linear;
    return rc;
}

/* logits (n, rows of block) of a batch's labels; *x their rows of normed. */
static int logits_of(struct perta_head *h, const struct perta_linear *block,
                     const struct perta_cut_batch *batch, const struct work *w, const float **x,
                     struct perta_err *err)
{
    struct perta_rows rows;
    int rc =
        perta_store_get(&h->normed, batch->first_row, batch->n, 0, block->in, w->a, &rows, err);
    *x = rows.data;
    return rc ? rc
              : perta_linear_forward(h->gemm, block, &batch->tiles, rows.data, w->logits, batch->n,
                                     false, err);
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

/* What a block of the vocabulary adds to the losses. */
static int forward_block(struct perta_head *h, size_t row, const struct perta_linear *block,
                         float *best_logit, struct perta_err *err)
{
    struct work w = work_of(h);
    int rc = 0;
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        size_t first = batch.first_row, n = batch.n;
        const float *x;
        rc = logits_of(h, block, &batch, &w, &x, err);
        if (rc)
            break;
        perta_cross_entropy_forward(workers_of(h), w.logits, row, block->out, n, h->target + first,
                                    h->most + first, h->sums + first, h->logit + first);
        if (h->best)
            perta_best_forward(workers_of(h), w.logits, row, block->out, n, best_logit + first,
                               h->best + first);
        g = batch.end;
    }
    return rc;
}

int perta_head_forward(struct perta_head *h, const struct perta_store *x,
                       const struct perta_part *next, struct perta_head_means *means,
                       struct perta_err *err)
{
    float *best_logit = calloc(h->n_labels, sizeof *best_logit);
    int rc = best_logit ? normalise(h, x, err) : perta_fail_sys(err, ENOMEM, "labels");
    for (size_t i = 0; i < h->n_labels && !rc; i++) {
        h->most[i] = best_logit[i] = -INFINITY;
        h->sums[i] = 0;
    }
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        const struct perta_linear *block;
        rc = load(h, row, next, &block, err);
        if (!rc)
            rc = forward_block(h, row, block, best_logit, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    if (!rc)
        *means = means_of(h);
    if (!rc && h->by_probability)
        weigh_by_probability(h);
    free(best_logit);
    return rc;
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

/* From logits to the gradient of the loss by them. */
static void logits_backward(const struct perta_head *h, size_t row, size_t n_rows,
                            const struct perta_cut_batch *batch, float *logits)
{
    size_t first = batch->first_row;
    perta_cross_entropy_backward(workers_of(h), logits, row, n_rows, batch->n, h->target + first,
                                 h->most + first, h->sums + first, h->share + first);
}

struct sum {
    double *to;
    const float *from;
    size_t n, H;
};

#define SUM_ROWS 64 /* of a piece */

static int add_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct sum *s = ctx;
    size_t from = i * SUM_ROWS, n = s->n - from < SUM_ROWS ? s->n - from : SUM_ROWS;
    (void)worker;
    (void)err;
    perta_row_kernels()->add(s->to + from * s->H, s->from + from * s->H, n * s->H);
    return 0;
}

/* dnormed += dlogits weight. */
static int add_to_dnormed(struct perta_head *h, const struct perta_linear *block,
                          const struct perta_cut_batch *batch, const struct work *w,
                          struct perta_err *err)
{
    size_t first = batch->first_row, n = batch->n, H = block->in;
    struct perta_store *store = &h->dnormed;
    struct perta_rows rows = {0};
    int rc = perta_linear_backward(h->gemm, block, &batch->tiles, w->logits, w->b, n, false, err);
    if (!rc)
        rc = perta_store_get(store, first, n, 0, 2 * H, (float *)w->c, &rows, err);
    struct sum sum = {(double *)(uintptr_t)rows.data, w->b, n, H};
    if (!rc)
        rc = perta_workers_run(workers_of(h), (n + SUM_ROWS - 1) / SUM_ROWS, add_rows, &sum, err);
    return rc || store->memory ? rc : perta_store_put(store, first, n, (float *)w->c, err);
}

/* A store of a batch's rows in memory. */
static struct perta_store rows_in(const float *memory, size_t n, size_t width)
{
    return (struct perta_store){
        .n_rows = n, .width = width, .memory = (float *)(uintptr_t)memory, .fd = -1};
}

/* Gradient of the block's rows: dlogits^T normed, over a batch; chunks from *chunk on. With dx the
 * gradient of the embedding's rows too. */
static int add_to_rows(struct perta_head *h, const struct perta_linear *block, size_t row,
                       const struct perta_cut_batch *batch, const float *x, const float *dlogits,
                       const struct perta_store *dx, size_t *chunk, struct perta_err *err)
{
    struct perta_store xs = rows_in(x, batch->n, block->in);
    struct perta_store dys = rows_in(dlogits, batch->n, block->out);
    const struct perta_operands operands = {&xs, &dys, batch->first_row, 0};
    struct perta_terms terms = {.rows = block->out,
                                .in = block->in,
                                .chunks = &h->chunks,
                                .first = *chunk,
                                .samples = h->samples,
                                .dx = dx,
                                .row = row,
                                .pad = h->weights->llm.pad};
    while (*chunk < h->chunks.n && h->chunks.of[*chunk].first < batch->first_row + batch->n)
        ++*chunk;
    terms.end = *chunk;
    return perta_statistic_products(h->statistic, &terms, &operands, &h->packed, NULL, err);
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
        const float *x;
        rc = logits_of(h, block, &batch, &w, &x, err);
        if (rc)
            break;
        logits_backward(h, row, block->out, &batch, w.logits);
        rc = add_to_dnormed(h, block, &batch, &w, err);
        if (!rc && own)
            rc = add_to_rows(h, block, row, &batch, x, w.logits, NULL, &chunk, err);
        g = batch.end;
    }
    return rc || !own
               ? rc
               : perta_statistic_end(h->statistic, PERTA_HEAD, row * block->in, n_floats, err);
}

/* d (n, H) = dnormed of labels first .. first + n. */
static int take_dnormed(const struct perta_head *h, size_t first, size_t n, size_t H, double *room,
                        float *d, struct perta_err *err)
{
    struct perta_rows rows = {0};
    int rc = perta_store_get(&h->dnormed, first, n, 0, 2 * H, (float *)room, &rows, err);
    const double *from = (const double *)(uintptr_t)rows.data;
    for (size_t i = 0; i < n * H && !rc; i++)
        d[i] = (float)from[i];
    return rc;
}

/* Through the final norm, and to the tokens that the labels were predicted from. */
static int norm_backward(struct perta_head *h, const struct perta_store *x, struct perta_store *dx,
                         struct perta_err *err)
{
    struct work w = work_of(h);
    struct perta_workers *workers = workers_of(h);
    size_t H = x->width;
    float *vector = calloc(H, sizeof *vector);
    int rc = vector ? 0 : perta_fail_sys(err, ENOMEM, "labels");
    perta_statistic_begin(h->statistic, H);
    for (uint64_t s = 0; s < h->samples->n && !rc; s++) {
        size_t first = h->starts[s], n = h->starts[s + 1] - first;
        rc = gather(h, x, first, n, w.a, err);
        if (!rc)
            rc = take_dnormed(h, first, n, H, w.c, w.d, err);
        if (rc)
            break;
        memset(vector, 0, H * sizeof *vector);
        perta_rmsnorm_forward(workers, w.b, w.rstd, w.a, h->norm, n, H, h->weights->llm.rms_eps);
        perta_rmsnorm_backward_weight(workers, vector, w.d, w.a, w.rstd, n, H);
        perta_statistic_vector(h->statistic, vector, H);
        memset(w.b, 0, n * H * sizeof *w.b);
        perta_rmsnorm_backward(workers, w.b, w.d, w.a, w.rstd, h->norm, n, H);
        for (size_t i = 0; i < n && !rc; i++)
            rc = perta_store_put(dx, h->token[first + i], 1, w.b + i * H, err);
    }
    free(vector);
    return rc ? rc : perta_statistic_end(h->statistic, PERTA_FINAL_NORM, 0, H, err);
}

int perta_head_backward(struct perta_head *h, const struct perta_store *x,
                        const struct perta_part *next, struct perta_store *dx,
                        struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        const struct perta_linear *block;
        rc = load(h, row, next, &block, err);
        if (!rc)
            rc = backward_block(h, row, block, err);
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

/* Rows that are the head's too: what labels and what tokens add to them. */
static int tied_block_backward(struct perta_head *h, const struct perta_store *dx, size_t row,
                               const struct perta_linear *block, struct perta_err *err)
{
    struct work w = work_of(h);
    size_t chunk = 0;
    int rc = 0;
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        const float *x;
        rc = logits_of(h, block, &batch, &w, &x, err);
        if (rc)
            break;
        logits_backward(h, row, block->out, &batch, w.logits);
        rc = add_to_rows(h, block, row, &batch, x, w.logits, dx, &chunk, err);
        g = batch.end;
    }
    return rc;
}

static int embed_block_backward(struct perta_head *h, const struct perta_store *dx, size_t row,
                                size_t n_rows, struct perta_err *err)
{
    size_t H = dx->width;
    const struct perta_linear *block;
    const struct perta_terms tokens = {.rows = n_rows,
                                       .in = H,
                                       .chunks = &h->chunks,
                                       .end = h->chunks.n,
                                       .samples = h->samples,
                                       .dx = dx,
                                       .row = row,
                                       .pad = h->weights->llm.pad};
    int rc = h->weights->llm.tied ? load(h, row, NULL, &block, err) : 0;
    perta_statistic_begin(h->statistic, n_rows * H);
    if (!rc)
        rc = h->weights->llm.tied ? tied_block_backward(h, dx, row, block, err)
                                  : perta_statistic_add(h->statistic, &tokens, err);
    return rc ? rc
              : perta_statistic_end(h->statistic, perta_weights_embedding(h->weights), row * H,
                                    n_rows * H, err);
}

int perta_embed_backward(struct perta_head *h, const struct perta_store *dx, struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        size_t n_rows = part_at(h, row).n;
        /* Rows that nothing touches stay holes: zero. */
        if (h->weights->llm.tied || has_tokens(h->samples, row, n_rows))
            rc = embed_block_backward(h, dx, row, n_rows, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc;
}
