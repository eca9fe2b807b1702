/* Gradients of the two ends of the model. */
#include "estimators/passes/head_own.h"

/* ---- logits ---- */

/* Replace logits by the gradients of what the head's product and bias give. */
static void logits_backward(const struct perta_head *h, size_t row, size_t n_rows,
                            const struct perta_cut_batch *batch, const struct perta_head_arrays *w)
{
    const struct perta_llm *llm = &h->weights->llm;
    const struct perta_label_arrays *l = &h->on_device;
    const struct perta_backend_ops *ops = h->be->ops;
    size_t first = batch->first_row, n = batch->n * n_rows;
    if (llm->logit_softcap > 0)
        ops->copy(h->be, w->capped, w->logits, n);
    ops->cross_entropy_backward(h->be, w->logits, row, n_rows, batch->n, h->target + first,
                                perta_array_at(l->most, first), perta_array_at(l->sums, 2 * first),
                                perta_array_at(l->share, first));
    if (llm->logit_softcap > 0)
        ops->softcap_backward(h->be, w->logits, w->capped, llm->logit_softcap, n);
    if (llm->logit_multiplier != 1)
        ops->scale(h->be, w->logits, llm->logit_multiplier, n);
}

/* dnormed += dlogits weight. */
static int add_to_dnormed(struct perta_head *h, const struct perta_linear *block,
                          const struct perta_cut_batch *batch, const struct perta_head_arrays *w,
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

/* ---- the head's bias ---- */

static bool has_bias_gradient(const struct perta_head *h)
{
    return h->statistic && perta_array_is(h->bias);
}

static void bias_begin(const struct perta_head *h)
{
    const struct perta_head_bias_gradient g = perta_head_bias_gradient_of(h);
    h->be->ops->zero(h->be, g.sums, 2 * PERTA_VOCABULARY_ROWS);
    h->be->ops->zero(h->be, g.squares, 2 * PERTA_VOCABULARY_ROWS);
}

/* Add the gradients dlogits (n, n_rows) of a batch's labels, sample by sample. */
static int bias_add(const struct perta_head *h, const struct perta_cut_batch *batch, size_t n_rows,
                    struct perta_array dlogits, struct perta_err *err)
{
    const struct perta_head_bias_gradient g = perta_head_bias_gradient_of(h);
    const struct perta_array none = {0};
    struct perta_statistic *s = h->statistic;
    int rc = 0;
    for (uint64_t i = 0; i < batch->n_samples && !rc; i++) {
        uint64_t sample = batch->first_sample + i;
        h->be->ops->linear_backward_bias(h->be, g.of_sample, dlogits,
                                         h->starts[sample] - batch->first_row,
                                         h->starts[sample + 1] - batch->first_row, n_rows);
        rc = perta_statistic_add_vector(s, h->weights->llm.names.head_bias, sample, g.of_sample,
                                        n_rows, g.sums, s->meansq ? g.squares : none, err);
    }
    return rc;
}

static int bias_end(const struct perta_head *h, size_t row, size_t n_rows, struct perta_err *err)
{
    const struct perta_head_bias_gradient g = perta_head_bias_gradient_of(h);
    return perta_statistic_write(h->statistic, h->weights->llm.names.head_bias, row, n_rows, g.sums,
                                 g.squares, err);
}

/* ---- gradients of the vocabulary's rows ---- */

/* Gradients of what tokens took from a table. */
struct token_gradients {
    struct perta_head_table table;
    const struct perta_store *dx; /* (tokens, H) */
};

/* The row of the table that gets a token's gradient, or SIZE_MAX: none. */
static size_t row_with_gradient(const struct perta_head *h, const struct perta_head_table *table,
                                uint64_t token)
{
    size_t row = perta_head_row_of(h, table, token);
    return !table->positions && (uint32_t)row == h->weights->llm.pad ? SIZE_MAX : row;
}

/* From the gradients of embedded tokens to those of their rows: d (n, in) of g. */
static void tokens_backward(const struct perta_head *h, const struct token_gradients *of,
                            const struct perta_gradient *g)
{
    float by = h->weights->llm.embedding_multiplier;
    if (by != 1 && g->n_tokens && !of->table.positions)
        h->be->ops->scale(h->be, g->d, by, g->n_tokens * g->in);
}

/* Append dx of those tokens of a sample whose rows are row .. row + n_rows to the *n rows that
 * are in to. */
static int take_tokens(const struct perta_head *h, const struct token_gradients *tokens, size_t row,
                       size_t n_rows, uint64_t sample, struct perta_array to, size_t *n,
                       struct perta_err *err)
{
    const struct perta_samples *s = h->samples;
    const struct perta_store *dx = tokens->dx;
    int rc = 0;
    for (uint64_t k = s->starts[sample]; k < s->starts[sample + 1] && !rc; k++) {
        size_t id = row_with_gradient(h, &tokens->table, k);
        if (id < row || id >= row + n_rows)
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

/* Add chunks first .. end to the block of rows from row on: their products, if g has x; with
 * dx, also the tokens of samples whose last chunk is among them. Each call adds as many chunks as there
 * is room for tokens. */
static int add_chunks(const struct perta_head *h, struct perta_gradient *g, size_t first,
                      size_t end, const struct token_gradients *dx, size_t row,
                      struct perta_err *err)
{
    const struct perta_chunk *of = h->chunks.of;
    bool tokens = dx && h->chunks.by_sample;
    int rc = 0;
    g->chunks = &h->chunks;
    g->tokens = h->tokens;
    g->d = perta_head_work_of(h).c;
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
        tokens_backward(h, dx, g);
        if (!rc)
            h->be->ops->gradient(h->be, g);
    }
    return rc;
}

/* Add all tokens, after all chunks, if chunks are not by sample. */
static int add_tokens(const struct perta_head *h, struct perta_gradient *g,
                      const struct token_gradients *dx, size_t row, struct perta_err *err)
{
    int rc = 0;
    *g = perta_statistic_gradient(h->statistic, g->rows, g->in);
    g->chunks = &h->chunks;
    g->first = g->end = h->chunks.n;
    g->tokens = h->tokens;
    g->d = perta_head_work_of(h).c;
    for (uint64_t i = 0; i < h->samples->n && !rc;) {
        rc = perta_backend_wait(h->be, err); /* the operation before may still read tokens */
        for (g->n_tokens = 0; i < h->samples->n && has_room(h, g->n_tokens, i) && !rc; i++)
            rc = take_tokens(h, dx, row, g->rows, i, g->d, &g->n_tokens, err);
        tokens_backward(h, dx, g);
        if (!rc && g->n_tokens)
            h->be->ops->gradient(h->be, g);
    }
    return rc;
}

/* Add the chunks of a batch, from *chunk on: dlogits^T x and, with dx, the tokens. */
static int add_batch(const struct perta_head *h, const struct perta_linear *block, size_t row,
                     const struct perta_cut_batch *batch, struct perta_array x,
                     struct perta_array dlogits, const struct token_gradients *dx, size_t *chunk,
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

/* What labels add to dnormed, if that is asked for, and to the gradients of a block of rows and of
 * its bias, if those are; with dx, also the tokens of their samples. */
struct label_gradients {
    bool dnormed, rows, bias;
    const struct token_gradients *dx;
};

/* Go through all labels, batch by batch: logits, their gradients, and what these add. */
static int add_labels(struct perta_head *h, size_t row, const struct perta_linear *block,
                      const struct label_gradients *wanted, struct perta_err *err)
{
    struct perta_head_arrays w = perta_head_work_of(h);
    size_t chunk = 0;
    int rc = 0;
    for (size_t g = 0; g < h->cut.n_groups && !rc;) {
        struct perta_cut_batch batch = perta_cut_batch(&h->cut, g, h->batch_rows);
        struct perta_array x;
        rc = perta_head_logits(h, block, &batch, &w, &x, err);
        if (rc)
            break;
        logits_backward(h, row, block->out, &batch, &w);
        if (wanted->dnormed)
            rc = add_to_dnormed(h, block, &batch, &w, err);
        if (!rc && wanted->bias)
            rc = bias_add(h, &batch, block->out, w.logits, err);
        if (!rc && wanted->rows)
            rc = add_batch(h, block, row, &batch, x, w.logits, wanted->dx, &chunk, err);
        g = batch.end;
    }
    return rc;
}

/* dnormed and, if gradients are wanted, the bias's and, unless they are the embedding's too, the
 * rows'. */
static int backward_block(struct perta_head *h, size_t row, const struct perta_linear *block,
                          struct perta_err *err)
{
    size_t n_floats = block->out * block->in;
    const struct label_gradients wanted = {.dnormed = true,
                                           .rows = h->statistic && !h->weights->llm.tied,
                                           .bias = has_bias_gradient(h)};
    if (wanted.rows)
        perta_statistic_begin(h->statistic, n_floats);
    if (wanted.bias)
        bias_begin(h);
    int rc = add_labels(h, row, block, &wanted, err);
    if (!rc && wanted.bias)
        rc = bias_end(h, row, block->out, err);
    if (!rc && wanted.rows)
        return perta_statistic_end(h->statistic, perta_weights_head(h->weights), row * block->in,
                                   n_floats, err);
    return rc ? rc : perta_backend_wait(h->be, err);
}

/* ---- the final norm ---- */

/* w->d (n, H) = dnormed of labels first .. first + n, rounded to float32. */
static int take_dnormed(const struct perta_head *h, size_t first, size_t n, size_t H,
                        const struct perta_head_arrays *w, struct perta_err *err)
{
    struct perta_array rows;
    bool finite; /* ignored: the means that are written are checked */
    int rc = perta_store_rows(&h->dnormed, first, n, w->c, &rows, err);
    if (!rc)
        h->be->ops->mean(h->be, w->d, rows, 1, n * H, &finite);
    return rc ? rc : perta_backend_wait(h->be, err);
}

/* A norm outside the layers, and the names of its weight and bias ("": none). */
struct outer_norm {
    const struct perta_norm *norm;
    const char *weight, *bias;
};

/* Compute and add a sample's gradients of a norm's weight and bias, from dy, x and rstd of n rows. */
static int add_norm_vectors(const struct perta_head *h, const struct outer_norm *of,
                            uint64_t sample, const struct perta_head_arrays *w, size_t n, size_t H,
                            struct perta_err *err)
{
    const struct perta_norm_part *part = h->weights->llm.family->norm;
    struct perta_statistic *s = h->statistic;
    struct perta_array dweight = perta_head_norm_vector(h, 2), dbias = {0};
    const struct perta_array none = {0};
    bool squares = perta_array_is(s->squares);
    if (*of->bias)
        dbias = perta_head_norm_vector(h, 3);
    h->be->ops->zero(h->be, dweight, 2 * H);
    part->backward_weight(h->be, of->norm, dweight, dbias, w->d, w->a, w->rstd, n, H);
    int rc =
        perta_statistic_add_vector(s, of->weight, sample, dweight, H, s->sums, s->squares, err);
    if (rc || !*of->bias)
        return rc;
    return perta_statistic_add_vector(s, of->bias, sample, dbias, H, perta_array_at(s->sums, 2 * H),
                                      squares ? perta_array_at(s->squares, 2 * H) : none, err);
}

/* Write the means of what was added. */
static int write_norm_vectors(const struct perta_head *h, const struct outer_norm *of, size_t H,
                              struct perta_err *err)
{
    struct perta_statistic *s = h->statistic;
    const struct perta_array none = {0};
    int rc = perta_statistic_write(s, of->weight, 0, H, s->sums, s->squares, err);
    if (rc || !*of->bias)
        return rc;
    return perta_statistic_write(s, of->bias, 0, H, perta_array_at(s->sums, 2 * H),
                                 s->meansq ? perta_array_at(s->squares, 2 * H) : none, err);
}

static struct outer_norm final_norm_of(const struct perta_head *h)
{
    const struct perta_llm_names *names = &h->weights->llm.names;
    return (struct outer_norm){&h->norm, names->final_norm, names->final_norm_bias};
}

/* Backward through the final norm, from the labels of one sample to the tokens that predict
 * them. */
static int norm_backward_sample(struct perta_head *h, uint64_t s, const struct perta_store *x,
                                struct perta_store *dx, struct perta_err *err)
{
    const struct perta_norm_part *norm = h->weights->llm.family->norm;
    const struct perta_backend_ops *ops = h->be->ops;
    const struct outer_norm of = final_norm_of(h);
    struct perta_head_arrays w = perta_head_work_of(h);
    size_t H = x->width, first = h->starts[s], n = h->starts[s + 1] - first;
    int rc = perta_head_gather(h, x, first, n, w.a, err);
    if (!rc)
        rc = take_dnormed(h, first, n, H, &w, err);
    perta_head_norm_forward(h, &w, n);
    if (h->statistic && *of.weight && !rc)
        rc = add_norm_vectors(h, &of, s, &w, n, H, err);
    ops->zero(h->be, w.b, n * H);
    norm->backward(h->be, &h->norm, w.b, w.d, w.a, w.rstd, n, H);
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_store_set(dx, h->token[first + i], 1, perta_array_at(w.b, i * H), err);
    return rc;
}

static int norm_backward(struct perta_head *h, const struct perta_store *x, struct perta_store *dx,
                         struct perta_err *err)
{
    const struct outer_norm of = final_norm_of(h);
    bool wanted = h->statistic && *of.weight;
    int rc = 0;
    if (wanted)
        perta_statistic_begin(h->statistic, 2 * x->width);
    for (uint64_t i = 0; i < h->samples->n && !rc; i++)
        rc = norm_backward_sample(h, i, x, dx, err);
    return rc || !wanted ? rc : write_norm_vectors(h, &of, x->width, err);
}

int perta_head_backward(struct perta_head *h, const struct perta_store *x,
                        const struct perta_span *next, struct perta_store *dx,
                        struct perta_err *err)
{
    int rc = 0;
    for (size_t row = 0; row < h->weights->llm.vocab && !rc; row += PERTA_VOCABULARY_ROWS) {
        struct perta_linear block;
        rc = perta_head_load(h, row, next, &block, err);
        if (!rc)
            rc = backward_block(h, row, &block, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc ? rc : norm_backward(h, x, dx, err);
}

/* ---- the embedding's gradient ---- */

static bool has_tokens(const struct perta_head *h, const struct perta_head_table *table, size_t row,
                       size_t n_rows)
{
    for (uint64_t t = 0; t < h->samples->n_tokens; t++) {
        size_t id = perta_head_row_of(h, table, t);
        if (id >= row && id < row + n_rows)
            return true;
    }
    return false;
}

/* A block of rows that are the head's too: add the gradients of labels and of tokens. */
static int tied_block_backward(struct perta_head *h, const struct token_gradients *dx, size_t row,
                               struct perta_err *err)
{
    const struct label_gradients wanted = {.rows = true, .dx = dx};
    struct perta_linear block;
    int rc = perta_head_load(h, row, NULL, &block, err);
    return rc ? rc : add_labels(h, row, &block, &wanted, err);
}

static bool is_tied(const struct perta_head *h, const struct perta_head_table *table)
{
    return h->weights->llm.tied && !table->positions;
}

static int table_block_backward(struct perta_head *h, const struct token_gradients *dx, size_t row,
                                size_t n_rows, struct perta_err *err)
{
    size_t H = dx->dx->width;
    struct perta_gradient g = perta_statistic_gradient(h->statistic, n_rows, H);
    int rc = 0;
    perta_statistic_begin(h->statistic, n_rows * H);
    if (is_tied(h, &dx->table))
        rc = tied_block_backward(h, dx, row, err);
    else if (h->chunks.by_sample)
        rc = add_chunks(h, &g, 0, h->chunks.n, dx, row, err);
    if (!rc && !h->chunks.by_sample)
        rc = add_tokens(h, &g, dx, row, err);
    return rc ? rc : perta_statistic_end(h->statistic, dx->table.name, row * H, n_rows * H, err);
}

static int table_backward(struct perta_head *h, const struct token_gradients *dx,
                          struct perta_err *err)
{
    const struct perta_head_table *table = &dx->table;
    int rc = 0;
    for (size_t row = 0, n_rows; row < table->n_rows && !rc; row += n_rows) {
        size_t left = table->n_rows - row;
        n_rows = left < PERTA_VOCABULARY_ROWS ? left : PERTA_VOCABULARY_ROWS;
        /* Rows without tokens are not written: holes of the file read as zeros. */
        if (is_tied(h, table) || has_tokens(h, table, row, n_rows))
            rc = table_block_backward(h, dx, row, n_rows, err);
        if (!rc)
            rc = h->advance(h->ctx, err);
    }
    return rc;
}

/* Backward through the norm after the embedding, for one sample: its rows of d, which are the norm's
 * input, become the gradients of that. */
static int embedding_norm_sample(struct perta_head *h, const struct outer_norm *of, uint64_t s,
                                 const struct perta_store *dx, struct perta_store *d,
                                 struct perta_err *err)
{
    const struct perta_norm_part *norm = h->weights->llm.family->norm;
    struct perta_head_arrays w = perta_head_work_of(h);
    size_t first = h->samples->starts[s], n = h->samples->starts[s + 1] - first, H = dx->width;
    int rc = perta_store_load(d, first, n, w.a, err);
    if (!rc)
        rc = perta_store_load(dx, first, n, w.d, err);
    norm->forward(h->be, of->norm, w.b, w.rstd, w.a, n, H);
    if (!rc)
        rc = add_norm_vectors(h, of, s, &w, n, H, err);
    h->be->ops->zero(h->be, w.b, n * H);
    norm->backward(h->be, of->norm, w.b, w.d, w.a, w.rstd, n, H);
    if (!rc)
        rc = perta_store_set(d, first, n, w.b, err);
    return rc ? rc : perta_backend_wait(h->be, err);
}

/* d (tokens, H) = the gradients of the norm's input. Writes the importance of the norm. */
static int embedding_norm_backward(struct perta_head *h, const struct perta_store *dx,
                                   struct perta_store *d, struct perta_err *err)
{
    const struct perta_llm_names *names = &h->weights->llm.names;
    const struct outer_norm of = {&h->embedding, names->embedding_norm, names->embedding_norm_bias};
    int rc = perta_head_look_up(h, d, err);
    perta_statistic_begin(h->statistic, 2 * dx->width);
    for (uint64_t i = 0; i < h->samples->n && !rc; i++)
        rc = embedding_norm_sample(h, &of, i, dx, d, err);
    return rc ? rc : write_norm_vectors(h, &of, dx->width, err);
}

int perta_embed_backward(struct perta_head *h, const struct perta_store *dx, struct perta_err *err)
{
    struct perta_head_table tables[2];
    struct perta_store d = {.fd = -1};
    bool normed = *h->weights->llm.names.embedding_norm;
    size_t n = perta_head_tables(h, tables);
    int rc = 0;
    if (normed)
        rc = perta_store_open(&d, h->scratch, NULL, h->samples->n_tokens, dx->width, err);
    if (normed && !rc)
        rc = embedding_norm_backward(h, dx, &d, err);
    for (size_t i = 0; i < 2 && i < n && !rc; i++) {
        const struct token_gradients of = {tables[i], normed ? &d : dx};
        rc = table_backward(h, &of, err);
    }
    perta_store_close(&d, h->scratch);
    return rc;
}
