#include "estimators/backprop/statistic.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "estimators/backprop/kernels.h"

/* ---- memory ---- */

size_t perta_statistic_floats(size_t block_floats, bool meansq, bool parts)
{
    return block_floats * (meansq ? parts ? 5 : 4 : 2) + PERTA_MEANS;
}

void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, bool parts,
                             float *memory)
{
    s->block_floats = block_floats;
    s->sum = (double *)(void *)memory;
    s->square = s->meansq ? s->sum + block_floats : NULL;
    memory += (s->meansq ? 4 : 2) * block_floats;
    s->one = s->meansq && parts ? memory : NULL;
    s->means = s->one ? memory + block_floats : memory;
}

size_t perta_statistic_rows(size_t block_floats, size_t n_rows, size_t n_cols)
{
    size_t rows = block_floats / n_cols;
    return rows < n_rows ? rows : n_rows;
}

/* ---- begin, end ---- */

void perta_statistic_begin(struct perta_statistic *s, size_t n)
{
    memset(s->sum, 0, n * sizeof *s->sum);
    if (s->square)
        memset(s->square, 0, n * sizeof *s->square);
}

void perta_statistic_vector(struct perta_statistic *s, const float *gradient, size_t n)
{
    perta_row_kernels()->add(s->sum, gradient, n);
    if (s->square)
        perta_row_kernels()->add_squares(s->square, gradient, n);
}

struct division {
    float *means;
    const double *sums;
    double of;
    size_t n;
};

#define PIECE_ELEMS (1u << 16)

static int divide(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct division *d = ctx;
    size_t from = i * PIECE_ELEMS, n = d->n - from < PIECE_ELEMS ? d->n - from : PIECE_ELEMS;
    (void)worker;
    if (!perta_row_kernels()->divide(d->means + from, d->sums + from, d->of, n))
        return 0;
    return perta_fail(err, PERTA_EINPUT, "not finite");
}

static int not_finite(const struct division *d, const char *of, const char *name, uint64_t first,
                      struct perta_err *err)
{
    size_t i = 0;
    while (isfinite((float)(d->sums[i] / d->of)))
        i++;
    return perta_fail(err, PERTA_EINPUT,
                      "tensor %s, element %llu: the mean %s over all samples is not a finite float32",
                      name, (unsigned long long)(first + i), of);
}

/* sums (n), of samples, of what stands at first.. of a tensor: their means. */
static int write_means(const struct perta_statistic *s, struct perta_importance_out *out,
                       const double *sums, const char *of, const char *name, uint64_t first,
                       size_t n, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i += PERTA_MEANS) {
        struct division d = {s->means, sums + i, (double)s->n_samples,
                             n - i < PERTA_MEANS ? n - i : PERTA_MEANS};
        struct perta_err bad = {0};
        rc = perta_workers_run(perta_gemm_workers(s->gemm), (d.n + PIECE_ELEMS - 1) / PIECE_ELEMS,
                               divide, &d, &bad)
                 ? not_finite(&d, of, name, first + i, err)
                 : perta_importance_write(out, name, first + i, s->means, d.n, err);
    }
    return rc;
}

int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err)
{
    int rc = s->mean ? write_means(s, s->mean, s->sum, "gradient", name, first, n, err) : 0;
    if (s->meansq && !rc)
        rc = write_means(s, s->meansq, s->square, "squared gradient", name, first, n, err);
    return rc;
}

/* ---- add ---- */

/* Rows and columns of a block that a piece goes through. */
struct tile {
    size_t row, m, col, n;
    float *to; /* one sample's gradient, or a chunk's: (m, n), rows ld apart */
    size_t ld;
};

struct addition {
    struct perta_statistic *s;
    const struct perta_terms *terms;
    size_t n_row_tiles;
};

static struct perta_operand_matrix part(struct perta_operand_matrix m, size_t i, size_t j)
{
    m.data = (const uint8_t *)m.data + (i * m.row + j * m.col) * (m.dtype == PERTA_F32 ? 4 : 2);
    return m;
}

static int add_product(const struct addition *a, unsigned worker, const struct tile *t,
                       const struct perta_chunk *chunk, struct perta_err *err)
{
    const struct perta_terms *terms = a->terms;
    size_t at = chunk->at - terms->chunks->of[terms->first].at;
    return perta_gemm_tile(a->s->gemm, worker, t->m, t->n, perta_chunk_padded(chunk->n),
                           perta_transposed(part(terms->dy, at, t->row)),
                           part(terms->x, at, t->col), t->to, t->ld, !chunk->begins, err);
}

static void clear(const struct tile *t)
{
    for (size_t i = 0; i < t->m; i++)
        memset(t->to + i * t->ld, 0, t->n * sizeof *t->to);
}

/* dx of the tokens of samples from .. to whose rows are in the tile, to sums (rows stride apart) if
 * it is given, else to the tile, which is cleared first unless *any. *any: there were some. */
static int add_tokens(const struct perta_terms *terms, const struct tile *t, uint64_t from,
                      uint64_t to, double *sums, size_t stride, bool *any, struct perta_err *err)
{
    const struct perta_samples *s = terms->samples;
    float room[PERTA_TILE];
    int rc = 0;
    for (uint64_t k = s->starts[from]; k < s->starts[to] && !rc; k++) {
        size_t row = (size_t)s->ids[k] - terms->row - t->row;
        struct perta_rows d;
        if ((size_t)s->ids[k] < terms->row + t->row || row >= t->m)
            continue;
        if (!sums && !*any)
            clear(t);
        rc = perta_store_get(terms->dx, k, 1, t->col, t->n, room, &d, err);
        for (size_t i = 0; i < t->n && !rc; i++) {
            if (sums)
                sums[row * stride + i] += (double)d.data[i];
            else
                t->to[row * t->ld + i] += d.data[i];
        }
        *any = true;
    }
    return rc;
}

static void add_to_sums(const struct addition *a, const struct tile *t)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = 0; i < t->m; i++) {
        size_t at = (t->row + i) * a->terms->in + t->col;
        k->add(a->s->sum + at, t->to + i * t->ld, t->n);
        if (a->s->square)
            k->add_squares(a->s->square + at, t->to + i * t->ld, t->n);
    }
}

/* One chunk's part of a tile; its sample's tokens come with its last chunk. */
static int add_chunk(const struct addition *a, unsigned worker, const struct tile *t,
                     const struct perta_chunk *chunk, struct perta_err *err)
{
    const struct perta_terms *terms = a->terms;
    bool any = terms->x.data;
    int rc = 0;
    if (terms->x.data)
        rc = add_product(a, worker, t, chunk, err);
    if (!rc && terms->dx && terms->chunks->by_sample && chunk->ends)
        rc = add_tokens(terms, t, chunk->sample, chunk->sample + 1, NULL, 0, &any, err);
    if (!rc && any && chunk->ends)
        add_to_sums(a, t);
    return rc;
}

static int add_tile(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct addition *a = ctx;
    const struct perta_terms *terms = a->terms;
    size_t row = i % a->n_row_tiles * PERTA_TILE, col = i / a->n_row_tiles * PERTA_TILE;
    struct tile t = {row, terms->rows - row < PERTA_TILE ? terms->rows - row : PERTA_TILE,
                     col, terms->in - col < PERTA_TILE ? terms->in - col : PERTA_TILE,
                     a->s->one ? a->s->one + row * terms->in + col
                               : perta_gemm_room(a->s->gemm, worker),
                     a->s->one ? terms->in : PERTA_TILE};
    int rc = t.to ? 0 : perta_fail_sys(err, ENOMEM, "gradients");
    for (size_t c = terms->first; c < terms->end && !rc; c++)
        rc = add_chunk(a, worker, &t, &terms->chunks->of[c], err);
    bool any = false;
    if (!rc && terms->dx && !terms->chunks->by_sample && terms->end == terms->chunks->n)
        rc = add_tokens(terms, &t, 0, terms->samples->n,
                        a->s->sum + row * terms->in + col, terms->in, &any, err);
    return rc;
}

int perta_statistic_add(struct perta_statistic *s, const struct perta_terms *terms,
                        struct perta_err *err)
{
    size_t rows = (terms->rows + PERTA_TILE - 1) / PERTA_TILE;
    size_t cols = (terms->in + PERTA_TILE - 1) / PERTA_TILE;
    struct addition a = {s, terms, rows};
    return perta_workers_run(perta_gemm_workers(s->gemm), rows * cols, add_tile, &a, err);
}

/* ---- operands ---- */

#define PACK_ROWS 64 /* of a piece */

struct packing {
    struct perta_gemm *gemm;
    const struct perta_store *store;
    size_t col, n_cols;
    const struct perta_chunks *chunks;
    size_t first, end, origin;
    uint8_t *to;
};

/* Rows that chunks first .. end take. */
static size_t packed_rows(const struct perta_chunks *chunks, size_t first, size_t end)
{
    const struct perta_chunk *last = &chunks->of[end - 1];
    return last->at + perta_chunk_padded(last->n) - chunks->of[first].at;
}

/* Row number row of all chunks' becomes one of the packed rows; padding becomes zeros. */
static int pack_row(const struct packing *p, const struct perta_chunk *chunk, size_t row,
                    float *room, struct perta_err *err)
{
    bool bf16 = perta_gemm_dtype(p->gemm) == PERTA_BF16;
    size_t width = bf16 ? 2 : 4, within = row - chunk->at;
    uint8_t *to = p->to + (row - p->chunks->of[p->first].at) * p->n_cols * width;
    struct perta_rows rows;
    if (within >= chunk->n) {
        memset(to, 0, p->n_cols * width);
        return 0;
    }
    if (!bf16)
        room = (float *)(void *)to;
    int rc = perta_store_get(p->store, chunk->first + within - p->origin, 1, p->col, p->n_cols,
                             room, &rows, err);
    if (!rc && bf16)
        perta_row_kernels()->to_bf16((uint16_t *)(void *)to, rows.data, PERTA_F32, p->n_cols);
    else if (!rc && rows.data != room)
        memcpy(to, rows.data, p->n_cols * width);
    return rc;
}

static int pack_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct packing *p = ctx;
    const struct perta_chunk *chunk = &p->chunks->of[p->first];
    size_t row = chunk->at + i * PACK_ROWS, end = row + PACK_ROWS;
    size_t last = chunk->at + packed_rows(p->chunks, p->first, p->end);
    float *room = perta_gemm_room(p->gemm, worker);
    int rc = room ? 0 : perta_fail_sys(err, ENOMEM, "gradients");
    for (; row < end && row < last && !rc; row++) {
        while (row >= chunk->at + perta_chunk_padded(chunk->n))
            chunk++;
        rc = pack_row(p, chunk, row, room, err);
    }
    return rc;
}

/* Columns col .. col + n_cols of a store's rows, packed to to. */
static int pack(struct perta_gemm *gemm, const struct perta_store *store, size_t origin, size_t col,
                size_t n_cols, const struct perta_chunks *chunks, size_t first, size_t end,
                void *to, struct perta_err *err)
{
    struct packing p = {gemm, store, col, n_cols, chunks, first, end, origin, to};
    size_t rows = packed_rows(chunks, first, end);
    return perta_workers_run(perta_gemm_workers(gemm), (rows + PACK_ROWS - 1) / PACK_ROWS,
                             pack_rows, &p, err);
}

/* The chunks from first on whose operands fit, cols wide together. */
static size_t window_end(const struct perta_statistic *s, const struct perta_terms *terms,
                         size_t first, size_t cols, const struct perta_packed *packed)
{
    size_t width = perta_gemm_dtype(s->gemm) == PERTA_BF16 ? 2 : 4, end = first + 1;
    while (end < terms->end && packed_rows(terms->chunks, first, end + 1) * cols * width <=
                                   packed->n_floats * sizeof(float))
        end++;
    return end;
}

int perta_statistic_products(struct perta_statistic *s, const struct perta_terms *terms,
                             const struct perta_operands *of, const struct perta_packed *packed,
                             bool *x_packed, struct perta_err *err)
{
    enum perta_dtype dtype = perta_gemm_dtype(s->gemm);
    size_t in = terms->in, rows = terms->rows, width = dtype == PERTA_BF16 ? 2 : 4;
    struct perta_terms some = *terms;
    int rc = 0;
    for (; some.first < terms->end && !rc; some.first = some.end) {
        some.end = window_end(s, terms, some.first, in + rows, packed);
        uint8_t *xs = (uint8_t *)packed->floats;
        uint8_t *dys = xs + packed_rows(terms->chunks, some.first, some.end) * in * width;
        if (!x_packed || !*x_packed)
            rc = pack(s->gemm, of->x, of->origin, 0, in, terms->chunks, some.first, some.end, xs,
                      err);
        if (x_packed)
            *x_packed = some.first == terms->first && some.end == terms->end;
        if (!rc)
            rc = pack(s->gemm, of->dy, of->origin, of->col, rows, terms->chunks, some.first,
                      some.end, dys, err);
        some.x = (struct perta_operand_matrix){xs, dtype, in, 1};
        some.dy = (struct perta_operand_matrix){dys, dtype, rows, 1};
        if (!rc)
            rc = perta_statistic_add(s, &some, err);
    }
    return rc;
}

int perta_statistic_linear(struct perta_statistic *s, const char *name,
                           const struct perta_store *x, const struct perta_store *dy,
                           const struct perta_chunks *chunks, const struct perta_packed *packed,
                           struct perta_err *err)
{
    size_t out = dy->width, in = x->width, block = perta_statistic_rows(s->block_floats, out, in);
    bool x_packed = false;
    int rc = 0;
    for (size_t r = 0; r < out && !rc; r += block) {
        size_t rows = out - r < block ? out - r : block;
        const struct perta_operands operands = {x, dy, 0, r};
        const struct perta_terms terms = {
            .rows = rows, .in = in, .chunks = chunks, .end = chunks->n};
        perta_statistic_begin(s, rows * in);
        rc = perta_statistic_products(s, &terms, &operands, packed, &x_packed, err);
        if (!rc)
            rc = perta_statistic_end(s, name, r * in, rows * in, err);
    }
    return rc;
}
