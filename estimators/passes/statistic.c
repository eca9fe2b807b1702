#include "estimators/passes/statistic.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "estimators/compute/kernels.h"

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
    return perta_fail(
        err, PERTA_EINPUT,
        "tensor %s, element %llu: the mean %s over all samples is not a finite float32", name,
        (unsigned long long)(first + i), of);
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

/* Of the block, tile (t->m, t->n): dy^T, which is there as (rows, padded), times x (padded, in). */
static int add_product(const struct addition *a, unsigned worker, const struct tile *t,
                       const struct perta_chunk *chunk, struct perta_err *err)
{
    const struct perta_terms *terms = a->terms;
    enum perta_dtype dtype = perta_gemm_dtype(a->s->gemm);
    size_t at = chunk->at - terms->chunks->of[terms->first].at, width = dtype == PERTA_F32 ? 4 : 2;
    size_t padded = perta_chunk_padded(chunk->n);
    const struct perta_operand_matrix dy = {
        terms->dy + (at * terms->rows + t->row * padded) * width, dtype, padded, 1};
    const struct perta_operand_matrix x = {terms->x + (at * terms->in + t->col) * width, dtype,
                                           terms->in, 1};
    return perta_gemm_tile(a->s->gemm, worker, t->m, t->n, padded, dy, x, t->to, t->ld,
                           !chunk->begins, err);
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
    float room[PERTA_TILE_COLS];
    int rc = 0;
    for (uint64_t k = s->starts[from]; k < s->starts[to] && !rc; k++) {
        size_t row = (size_t)s->ids[k] - terms->row - t->row;
        struct perta_rows d;
        if ((size_t)s->ids[k] < terms->row + t->row || row >= t->m ||
            (uint32_t)s->ids[k] == terms->pad)
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
    bool any = terms->x;
    int rc = 0;
    if (terms->x)
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
    size_t row = i % a->n_row_tiles * PERTA_TILE_ROWS;
    size_t col = i / a->n_row_tiles * PERTA_TILE_COLS;
    struct tile t = {row,
                     terms->rows - row < PERTA_TILE_ROWS ? terms->rows - row : PERTA_TILE_ROWS,
                     col,
                     terms->in - col < PERTA_TILE_COLS ? terms->in - col : PERTA_TILE_COLS,
                     a->s->one ? a->s->one + row * terms->in + col
                               : perta_gemm_room(a->s->gemm, worker),
                     a->s->one ? terms->in : PERTA_TILE_COLS};
    int rc = t.to ? 0 : perta_fail_sys(err, ENOMEM, "gradients");
    for (size_t c = terms->first; c < terms->end && !rc; c++)
        rc = add_chunk(a, worker, &t, &terms->chunks->of[c], err);
    bool any = false;
    if (!rc && terms->dx && !terms->chunks->by_sample && terms->end == terms->chunks->n)
        rc = add_tokens(terms, &t, 0, terms->samples->n, a->s->sum + row * terms->in + col,
                        terms->in, &any, err);
    return rc;
}

int perta_statistic_add(struct perta_statistic *s, const struct perta_terms *terms,
                        struct perta_err *err)
{
    size_t rows = (terms->rows + PERTA_TILE_ROWS - 1) / PERTA_TILE_ROWS;
    size_t cols = (terms->in + PERTA_TILE_COLS - 1) / PERTA_TILE_COLS;
    struct addition a = {s, terms, rows};
    return perta_workers_run(perta_gemm_workers(s->gemm), rows * cols, add_tile, &a, err);
}

/* ---- operands ---- */

#define PACK_ROWS 64    /* of a piece */
#define GROUP_ROWS 16   /* that lie in one chunk, padding included */
#define SLICE_COLS 1024 /* that are read at a time */

struct packing {
    struct perta_gemm *gemm;
    const struct perta_store *store;
    size_t col, n_cols;
    const struct perta_chunks *chunks;
    size_t first, end, origin;
    bool turned; /* each chunk's rows become columns */
    uint8_t *to;
};

/* Rows that chunks first .. end take. */
static size_t packed_rows(const struct perta_chunks *chunks, size_t first, size_t end)
{
    const struct perta_chunk *last = &chunks->of[end - 1];
    return last->at + perta_chunk_padded(last->n) - chunks->of[first].at;
}

/* GROUP_ROWS rows of a chunk from within on, columns col .. col + n: each to its place in rows; those
 * past the chunk's end are zeros. */
static int read_group(const struct packing *p, const struct perta_chunk *chunk, size_t within,
                      size_t col, size_t n, float rows[GROUP_ROWS][SLICE_COLS],
                      struct perta_err *err)
{
    int rc = 0;
    for (size_t r = 0; r < GROUP_ROWS && !rc; r++) {
        struct perta_rows from;
        if (within + r >= chunk->n) {
            memset(rows[r], 0, n * sizeof *rows[r]);
            continue;
        }
        rc = perta_store_get(p->store, chunk->first + within + r - p->origin, 1, p->col + col, n,
                             rows[r], &from, err);
        if (!rc && from.data != rows[r])
            memcpy(rows[r], from.data, n * sizeof *rows[r]);
    }
    return rc;
}

/* Element (row, col) of what a chunk becomes, counted from its first. */
static size_t place_of(const struct packing *p, size_t padded, size_t row, size_t col)
{
    return p->turned ? col * padded + row : row * p->n_cols + col;
}

static void put_f32(const struct packing *p, float *to, size_t padded, size_t within, size_t col,
                    size_t n, float rows[GROUP_ROWS][SLICE_COLS])
{
    for (size_t c = 0; p->turned && c < n; c++) {
        float *at = to + place_of(p, padded, within, col + c);
        for (size_t r = 0; r < GROUP_ROWS; r++)
            at[r] = rows[r][c];
    }
    for (size_t r = 0; !p->turned && r < GROUP_ROWS; r++)
        memcpy(to + place_of(p, padded, within + r, col), rows[r], n * sizeof *to);
}

static void put_bf16(const struct packing *p, uint16_t *to, size_t padded, size_t within,
                     size_t col, size_t n, float rows[GROUP_ROWS][SLICE_COLS])
{
    uint16_t halves[GROUP_ROWS][SLICE_COLS];
    for (size_t r = 0; r < GROUP_ROWS; r++)
        perta_row_kernels()->to_bf16(p->turned ? halves[r]
                                               : to + place_of(p, padded, within + r, col),
                                     rows[r], PERTA_F32, n);
    for (size_t c = 0; p->turned && c < n; c++) {
        uint16_t *at = to + place_of(p, padded, within, col + c);
        for (size_t r = 0; r < GROUP_ROWS; r++)
            at[r] = halves[r][c];
    }
}

static int pack_group(const struct packing *p, const struct perta_chunk *chunk, size_t within,
                      float rows[GROUP_ROWS][SLICE_COLS], struct perta_err *err)
{
    bool bf16 = perta_gemm_dtype(p->gemm) == PERTA_BF16;
    size_t padded = perta_chunk_padded(chunk->n), start = chunk->at - p->chunks->of[p->first].at;
    uint8_t *to = p->to + start * p->n_cols * (bf16 ? 2 : 4);
    int rc = 0;
    for (size_t col = 0; col < p->n_cols && !rc; col += SLICE_COLS) {
        size_t n = p->n_cols - col < SLICE_COLS ? p->n_cols - col : SLICE_COLS;
        rc = read_group(p, chunk, within, col, n, rows, err);
        if (!rc && bf16)
            put_bf16(p, (uint16_t *)(void *)to, padded, within, col, n, rows);
        else if (!rc)
            put_f32(p, (float *)(void *)to, padded, within, col, n, rows);
    }
    return rc;
}

static int pack_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct packing *p = ctx;
    const struct perta_chunk *chunk = &p->chunks->of[p->first];
    size_t row = chunk->at + i * PACK_ROWS, end = row + PACK_ROWS;
    size_t last = chunk->at + packed_rows(p->chunks, p->first, p->end);
    void *room = perta_gemm_room(p->gemm, worker);
    int rc = room ? 0 : perta_fail_sys(err, ENOMEM, "gradients");
    for (; row < end && row < last && !rc; row += GROUP_ROWS) {
        while (row >= chunk->at + perta_chunk_padded(chunk->n))
            chunk++;
        rc = pack_group(p, chunk, row - chunk->at, room, err);
    }
    return rc;
}

/* Columns col .. col + n_cols of a store's rows, packed to to. */
static int pack(struct perta_gemm *gemm, const struct perta_store *store, size_t origin, size_t col,
                size_t n_cols, const struct perta_chunks *chunks, size_t first, size_t end,
                bool turned, void *to, struct perta_err *err)
{
    struct packing p = {gemm, store, col, n_cols, chunks, first, end, origin, turned, to};
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
            rc = pack(s->gemm, of->x, of->origin, 0, in, terms->chunks, some.first, some.end, false,
                      xs, err);
        if (x_packed)
            *x_packed = some.first == terms->first && some.end == terms->end;
        if (!rc)
            rc = pack(s->gemm, of->dy, of->origin, of->col, rows, terms->chunks, some.first,
                      some.end, true, dys, err);
        some.x = xs;
        some.dy = dys;
        if (!rc)
            rc = perta_statistic_add(s, &some, err);
    }
    return rc;
}

int perta_statistic_linear(struct perta_statistic *s, const char *name, const struct perta_store *x,
                           const struct perta_store *dy, const struct perta_chunks *chunks,
                           const struct perta_packed *packed, struct perta_err *err)
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
