#include "estimators/passes/importance_sink.h"

#include <stdio.h>
#include <string.h>

#include "estimators/model/config.h"

/* ---- sizes ---- */

/* Elements of a layer's vectors before param; with PERTA_N_PARAMS, of all its vectors. */
static size_t vectors_before(const struct perta_llm *llm, enum perta_param param)
{
    size_t n = 0;
    for (int i = 0; i < (int)param; i++) {
        const struct perta_param_row *row =
            perta_llm_param(llm, PERTA_ANY_LAYER, (enum perta_param)i);
        size_t out = 1, in = 0;
        if (row)
            perta_llm_shape(llm, row, &out, &in);
        n += out ? 0 : in;
    }
    return n;
}

uint64_t perta_importance_sink_bytes(const struct perta_llm *llm)
{
    return 2 * vectors_before(llm, PERTA_N_PARAMS) * sizeof(double);
}

uint64_t perta_importance_sink_staging(const struct perta_llm *llm, size_t block_floats,
                                       size_t n_tokens)
{
    size_t most = 0;
    for (int i = 0; i < PERTA_N_PARAMS; i++) {
        const struct perta_param_row *row =
            perta_llm_param(llm, PERTA_ANY_LAYER, (enum perta_param)i);
        size_t out = 0, in = 0, pair;
        if (row)
            perta_llm_stored(llm, row, &out, &in);
        pair = out ? in + perta_statistic_rows(block_floats, out, in) : 0;
        most = pair > most ? pair : most;
    }
    return (uint64_t)most * (n_tokens < PERTA_CHUNK_ROWS ? n_tokens : PERTA_CHUNK_ROWS);
}

/* ---- vectors ---- */

static struct perta_array sums_of(const struct perta_importance_sink *s, enum perta_param param)
{
    return perta_array_at(s->vectors, 2 * vectors_before(s->llm, param));
}

/* No array if squares are not wanted. */
static struct perta_array squares_of(const struct perta_importance_sink *s, enum perta_param param)
{
    size_t all = vectors_before(s->llm, PERTA_N_PARAMS);
    return s->statistic->meansq ? perta_array_at(sums_of(s, param), 2 * all)
                                : (struct perta_array){0};
}

/* The name by which a parameter's gradient is known to the statistic: that of its tensor. Norms of
 * gradients are of the tensors that transformers has in memory, where all experts of a layer are in
 * one for gate and up, and one for down, whatever the files have. */
static const char *name_of(const struct perta_importance_sink *s, struct perta_site site,
                           const struct perta_param_row *row, char name[PERTA_NAME_BYTES])
{
    static const char *const fused[] = {"gate_up", "gate_up bias", "down", "down bias"};
    unsigned i = row->param - PERTA_EXPERT_GATE; /* gate, up, gate_up, down; after each its bias */
    if (!s->statistic->norms || !perta_is_of_expert(row->param))
        return perta_llm_name(s->llm, site, row, name);
    snprintf(name, PERTA_NAME_BYTES, "%s.%u experts %s", s->llm->names.layers, site.layer,
             fused[row->param >= PERTA_EXPERT_DOWN ? 2 + i % 2 : i % 2]);
    return name;
}

static int on_vector(struct perta_gradient_sink *of, struct perta_site site, enum perta_param param,
                     size_t sequence, struct perta_array d, struct perta_err *err)
{
    struct perta_importance_sink *s = (struct perta_importance_sink *)of;
    const struct perta_param_row *row = perta_llm_param(s->llm, site.layer, param);
    char name[PERTA_NAME_BYTES];
    size_t out, in;
    (void)sequence; /* within its batch; sequences are samples, and come in order */
    perta_llm_shape(s->llm, row, &out, &in);
    name_of(s, site, row, name);
    return perta_statistic_add_vector(s->statistic, name, s->n_vectors[param]++, d, in,
                                      sums_of(s, param), squares_of(s, param), err);
}

/* ---- weights ---- */

/* The rows that a parameter's gradient is summed over: those of all tokens, or of the tokens that
 * reach an expert. */
static const struct perta_sink_rows *rows_of(const struct perta_importance_sink *s,
                                             enum perta_param param)
{
    return perta_is_of_expert(param) ? &s->expert : &s->all;
}

/* Operands of a weight's gradient for all rows, as arrays or as stores. */
struct operands {
    const struct perta_sink_rows *rows;
    struct perta_array x, dy;
    const struct perta_store *x_store, *dy_store; /* NULL: the arrays are used */
    size_t in, out;
};

struct staging {
    const struct perta_store *store;
    size_t first, n, col, n_cols; /* the rows and columns to read */
    struct perta_array to;        /* (n, n_cols) */
};

#define STAGE_ROWS 64 /* rows in a piece */

static int stage_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct staging *s = ctx;
    size_t end = (i + 1) * STAGE_ROWS < s->n ? (i + 1) * STAGE_ROWS : s->n;
    int rc = 0;
    (void)worker;
    for (size_t row = i * STAGE_ROWS; row < end && !rc; row++)
        rc = perta_store_read_cols(s->store, s->first + row, s->col, s->n_cols,
                                   perta_array_at(s->to, row * s->n_cols), err);
    return rc;
}

/* Read rows of a store in a file into the backend's memory, with the workers. */
static int stage(const struct perta_importance_sink *s, const struct perta_store *store,
                 size_t first, size_t n, size_t col, size_t n_cols, struct perta_array to,
                 struct perta_err *err)
{
    struct staging staging = {store, first, n, col, n_cols, to};
    return perta_workers_run(s->workers, (n + STAGE_ROWS - 1) / STAGE_ROWS, stage_rows, &staging,
                             err);
}

/* The end of the longest window of chunks from first on whose *n_rows rows, width wide, fit into
 * staging. */
static size_t window_end(const struct perta_importance_sink *s, const struct perta_chunks *chunks,
                         size_t first, size_t width, size_t *n_rows)
{
    const struct perta_chunk *of = chunks->of;
    size_t end = first;
    do {
        *n_rows = of[end].first + of[end].n - of[first].first;
        end++;
    } while (end < chunks->n &&
             (of[end].first + of[end].n - of[first].first) * width <= s->staging_floats);
    return end;
}

/* Add the gradient of a block of rows of the weight, one window of chunks at a time. Stores in
 * memory are used where they are; those in files are read into staging. *all_x: all of x is in
 * staging (or in memory), read for this block or the one before. */
static int add_kept(const struct perta_importance_sink *s, const struct operands *o,
                    struct perta_gradient *g, bool *all_x, struct perta_err *err)
{
    struct perta_backend *be = s->statistic->be;
    const struct perta_chunks *chunks = o->rows->chunks;
    const struct perta_array dy_all = {o->dy_store->buffer, 0};
    size_t x_staged = o->x_store->buffer ? 0 : o->in, dy_staged = o->dy_store->buffer ? 0 : g->rows;
    size_t col = g->col;
    int rc = 0;
    for (size_t n; g->end < chunks->n && !rc;) {
        g->first = g->end;
        g->end = window_end(s, chunks, g->first, x_staged + dy_staged, &n);
        g->origin = chunks->of[g->first].first;
        g->x_again = *all_x;
        g->x = s->staging;
        if (o->x_store->buffer)
            rc = perta_store_rows(o->x_store, g->origin, n, s->staging, &g->x, err);
        else if (!*all_x)
            rc = stage(s, o->x_store, g->origin, n, 0, o->in, g->x, err);
        *all_x = !g->first && g->end == chunks->n;
        g->dy = perta_array_at(s->staging, n * x_staged);
        g->dy_width = g->rows;
        g->col = 0;
        if (o->dy_store->buffer) {
            g->dy = perta_array_at(dy_all, (uint64_t)g->origin * o->out);
            g->dy_width = o->out;
            g->col = col;
        } else if (!rc) {
            rc = stage(s, o->dy_store, g->origin, n, col, g->rows, g->dy, err);
        }
        if (!rc)
            be->ops->gradient(be, g);
    }
    return rc;
}

/* Compute and write the gradient of a weight as it is stored, by blocks of rows. */
static int write_weight(const struct perta_importance_sink *s, struct perta_site site,
                        enum perta_param param, const struct operands *o, struct perta_err *err)
{
    const struct perta_param_row *row = perta_llm_param(s->llm, site.layer, param);
    uint64_t first = perta_llm_first(s->llm, site, row);
    struct perta_backend *be = s->statistic->be;
    size_t block = perta_statistic_rows(s->statistic->block_floats, o->out, o->in);
    char name[PERTA_NAME_BYTES];
    bool all_x = false;
    int rc = 0;
    name_of(s, site, row, name);
    for (size_t r = 0; r < o->out && !rc; r += block) {
        size_t rows = o->out - r < block ? o->out - r : block;
        struct perta_gradient g = perta_statistic_gradient(s->statistic, rows, o->in);
        g.chunks = o->rows->chunks;
        g.col = r;
        perta_statistic_begin(s->statistic, rows * o->in);
        if (o->x_store) {
            rc = add_kept(s, o, &g, &all_x, err);
        } else {
            g.x = o->x;
            g.dy = o->dy;
            g.dy_width = o->out;
            g.end = g.chunks->n;
            g.x_again = r;
            be->ops->gradient(be, &g);
        }
        if (!rc)
            rc = perta_statistic_end(s->statistic, name, first + r * o->in, rows * o->in, err);
    }
    return rc ? rc : s->advance(s->ctx, err);
}

/* Keep a batch's rows of an operand in its store, of n_rows. */
static int keep(struct perta_importance_sink *s, struct perta_store *store, size_t n_rows,
                size_t width, const struct perta_batch *batch, struct perta_array rows,
                struct perta_err *err)
{
    int rc = store->width ? 0 : perta_store_open(store, s->scratch, NULL, n_rows, width, err);
    return rc ? rc : perta_store_set(store, batch->first, batch->n, rows, err);
}

/* The operands of a weight's gradient; those of one that is stored as (in, out) change places:
 * (dy^T x)^T is x^T dy. */
static struct operands operands_of(const struct perta_importance_sink *s,
                                   const struct perta_param_row *row)
{
    struct operands o = {.rows = rows_of(s, row->param)};
    perta_llm_stored(s->llm, row, &o.out, &o.in);
    return o;
}

static int on_linear(struct perta_gradient_sink *of, struct perta_site site, enum perta_param param,
                     const struct perta_batch *batch, struct perta_array x, struct perta_array dy,
                     struct perta_err *err)
{
    struct perta_importance_sink *s = (struct perta_importance_sink *)of;
    const struct perta_param_row *row = perta_llm_param(s->llm, site.layer, param);
    struct operands o = operands_of(s, row);
    o.x = row->transposed ? dy : x;
    o.dy = row->transposed ? x : dy;
    if (o.rows->single)
        return write_weight(s, site, param, &o, err);
    int rc = keep(s, &s->x[param], o.rows->n, o.in, batch, o.x, err);
    return rc ? rc : keep(s, &s->dy[param], o.rows->n, o.out, batch, o.dy, err);
}

/* ---- a layer, an expert ---- */

void perta_importance_sink_begin(struct perta_importance_sink *s)
{
    struct perta_backend *be = s->statistic->be;
    be->ops->zero(be, s->vectors, 4 * vectors_before(s->llm, PERTA_N_PARAMS));
    memset(s->n_vectors, 0, sizeof s->n_vectors);
}

/* What is not trained has no gradient. */
static bool has_gradient(const struct perta_param_row *row)
{
    return row && row->param != PERTA_ROUTER_CORRECTION;
}

static int write_param(struct perta_importance_sink *s, struct perta_site site,
                       const struct perta_param_row *row, struct perta_err *err)
{
    char name[PERTA_NAME_BYTES];
    struct operands o = operands_of(s, row);
    o.x_store = &s->x[row->param];
    o.dy_store = &s->dy[row->param];
    if (o.out && (o.rows->single || !o.rows->n))
        return 0;
    if (o.out) {
        int rc = write_weight(s, site, row->param, &o, err);
        /* the next expert has another number of rows */
        if (perta_is_of_expert(row->param)) {
            perta_store_close(&s->x[row->param], s->scratch);
            perta_store_close(&s->dy[row->param], s->scratch);
        }
        return rc;
    }
    perta_llm_name(s->llm, site, row, name);
    return perta_statistic_write(s->statistic, name, perta_llm_first(s->llm, site, row), o.in,
                                 sums_of(s, row->param), squares_of(s, row->param), err);
}

/* Write what the site has of its own. */
static int write_site(struct perta_importance_sink *s, struct perta_site site,
                      struct perta_err *err)
{
    int rc = 0;
    for (int i = 0; i < PERTA_N_PARAMS && !rc; i++) {
        const struct perta_param_row *row =
            perta_llm_param(s->llm, site.layer, (enum perta_param)i);
        if (has_gradient(row) && perta_is_of_expert(row->param) == (site.expert != 0))
            rc = write_param(s, site, row, err);
    }
    return rc;
}

static int on_begin_expert(struct perta_gradient_sink *of, const struct perta_sink_rows *rows,
                           struct perta_err *err)
{
    struct perta_importance_sink *s = (struct perta_importance_sink *)of;
    struct perta_backend *be = s->statistic->be;
    size_t first = vectors_before(s->llm, PERTA_EXPERT_GATE);
    size_t n = vectors_before(s->llm, PERTA_EXPERT_DOWN_BIAS + 1) - first;
    s->expert = *rows;
    (void)err;
    if (!n)
        return 0;
    be->ops->zero(be, sums_of(s, PERTA_EXPERT_GATE), 2 * n);
    if (s->statistic->meansq)
        be->ops->zero(be, squares_of(s, PERTA_EXPERT_GATE), 2 * n);
    for (int i = PERTA_EXPERT_GATE; i <= PERTA_EXPERT_DOWN_BIAS; i++)
        s->n_vectors[i] = 0;
    return 0;
}

static int on_end_expert(struct perta_gradient_sink *of, struct perta_site site,
                         struct perta_err *err)
{
    return write_site((struct perta_importance_sink *)of, site, err);
}

const struct perta_gradient_sink perta_importance_sink_functions = {on_linear, on_vector,
                                                                    on_begin_expert, on_end_expert};

int perta_importance_sink_end(struct perta_importance_sink *s, uint32_t layer,
                              struct perta_err *err)
{
    int rc = write_site(s, perta_site_of(layer), err);
    if (s->statistic->norms)
        perta_norms_complete(s->statistic->norms);
    return rc;
}

void perta_importance_sink_release(struct perta_importance_sink *s)
{
    for (int i = 0; i < PERTA_N_PARAMS && s->scratch; i++) {
        perta_store_close(&s->x[i], s->scratch);
        perta_store_close(&s->dy[i], s->scratch);
    }
}
