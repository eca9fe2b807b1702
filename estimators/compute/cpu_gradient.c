#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

/* A gradient operation: its arrays, and the window of chunks that is being added. */
struct gradient {
    const struct perta_gradient *of;
    struct perta_gemm *gemm;
    double *sums, *squares, *norms; /* NULL: not wanted */
    float *sample;
    const float *x, *dy, *d; /* x NULL: no products */
    size_t first, end;       /* the window of chunks */
    /* The window's operands (perta_gemm_dtype), chunk after chunk: x as (padded, in), dy as (rows,
     * padded). */
    uint8_t *xs, *dys;
    size_t n_row_tiles;
};

static size_t width_of(const struct gradient *g)
{
    return perta_gemm_dtype(g->gemm) == PERTA_BF16 ? 2 : 4;
}

/* Packed rows of chunks first .. end. */
static size_t packed_rows(const struct perta_chunks *chunks, size_t first, size_t end)
{
    const struct perta_chunk *last = &chunks->of[end - 1];
    return last->at + perta_chunk_padded(last->n) - chunks->of[first].at;
}

/* ---- operands, packed ---- */

#define PACK_ROWS 64    /* rows in a piece */
#define GROUP_ROWS 16   /* packed together; all in one chunk or its padding */
#define SLICE_COLS 1024 /* columns packed at a time */

struct packing {
    const struct gradient *gradient;
    const float *from; /* the first column that is packed, in row 0 of the array */
    size_t stride, n_cols;
    bool turned; /* transpose each chunk */
    uint8_t *to;
};

/* Point rows to GROUP_ROWS rows of a chunk, from its row within on, at column col; to zeros past
 * the chunk's end. */
static void find_rows(const struct packing *p, const struct perta_chunk *chunk, size_t within,
                      size_t col, const float *rows[GROUP_ROWS])
{
    static const float zeros[SLICE_COLS];
    size_t row = chunk->first - p->gradient->of->origin + within;
    for (size_t r = 0; r < GROUP_ROWS; r++)
        rows[r] = within + r < chunk->n ? p->from + (row + r) * p->stride + col : zeros;
}

/* Index of element (row, col) of a chunk once it is packed. */
static size_t place_of(const struct packing *p, size_t padded, size_t row, size_t col)
{
    return p->turned ? col * padded + row : row * p->n_cols + col;
}

static void put_f32(const struct packing *p, float *to, size_t padded, size_t within, size_t col,
                    size_t n, const float *const rows[GROUP_ROWS])
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
                     size_t col, size_t n, const float *const rows[GROUP_ROWS])
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

static void pack_group(const struct packing *p, const struct perta_chunk *chunk, size_t within)
{
    const struct gradient *g = p->gradient;
    size_t padded = perta_chunk_padded(chunk->n),
           start = chunk->at - g->of->chunks->of[g->first].at;
    uint8_t *to = p->to + start * p->n_cols * width_of(g);
    for (size_t col = 0; col < p->n_cols; col += SLICE_COLS) {
        size_t n = p->n_cols - col < SLICE_COLS ? p->n_cols - col : SLICE_COLS;
        const float *rows[GROUP_ROWS];
        find_rows(p, chunk, within, col, rows);
        if (width_of(g) == 2)
            put_bf16(p, (uint16_t *)(void *)to, padded, within, col, n, rows);
        else
            put_f32(p, (float *)(void *)to, padded, within, col, n, rows);
    }
}

static int pack_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct packing *p = ctx;
    const struct gradient *g = p->gradient;
    const struct perta_chunk *chunk = &g->of->chunks->of[g->first];
    size_t row = chunk->at + i * PACK_ROWS, end = row + PACK_ROWS;
    size_t last = chunk->at + packed_rows(g->of->chunks, g->first, g->end);
    (void)worker;
    (void)err;
    for (; row < end && row < last; row += GROUP_ROWS) {
        while (row >= chunk->at + perta_chunk_padded(chunk->n))
            chunk++;
        pack_group(p, chunk, row - chunk->at);
    }
    return 0;
}

static void pack(struct packing *p)
{
    const struct gradient *g = p->gradient;
    size_t rows = packed_rows(g->of->chunks, g->first, g->end);
    struct perta_err never = {0};
    perta_workers_run(perta_gemm_workers(g->gemm), (rows + PACK_ROWS - 1) / PACK_ROWS, pack_rows, p,
                      &never);
}

/* Pack both operands of the window; x is in scratch already if x_packed. */
static void pack_window(struct gradient *g, uint8_t *scratch, bool x_packed)
{
    const struct perta_gradient *of = g->of;
    g->xs = scratch;
    g->dys = scratch + packed_rows(of->chunks, g->first, g->end) * of->in * width_of(g);
    struct packing x = {g, g->x, of->in, of->in, false, g->xs};
    struct packing dy = {g, g->dy + of->col, of->dy_width, of->rows, true, g->dys};
    if (!x_packed)
        pack(&x);
    pack(&dy);
}

/* ---- add ---- */

/* Rows and columns of the matrix that a piece works on. */
struct tile {
    size_t number, row, m, col, n;
    float *to; /* a sample's or a chunk's gradient: (m, n), rows ld apart */
    size_t ld;
};

static struct tile tile_at(const struct gradient *g, size_t i)
{
    size_t row = i % g->n_row_tiles * PERTA_TILE_ROWS, col = i / g->n_row_tiles * PERTA_TILE_COLS;
    size_t m = g->of->rows - row, n = g->of->in - col;
    return (struct tile){.number = i,
                         .row = row,
                         .m = m < PERTA_TILE_ROWS ? m : PERTA_TILE_ROWS,
                         .col = col,
                         .n = n < PERTA_TILE_COLS ? n : PERTA_TILE_COLS};
}

/* Compute the tile (t->m, t->n) of dy^T x from the packed dy (rows, padded) and x (padded, in). */
static int add_product(const struct gradient *g, unsigned worker, const struct tile *t,
                       const struct perta_chunk *chunk, struct perta_err *err)
{
    enum perta_dtype dtype = perta_gemm_dtype(g->gemm);
    size_t at = chunk->at - g->of->chunks->of[g->first].at, width = width_of(g), in = g->of->in;
    size_t padded = perta_chunk_padded(chunk->n);
    const struct perta_operand_matrix dy = {g->dys + (at * g->of->rows + t->row * padded) * width,
                                            dtype, padded, 1};
    const struct perta_operand_matrix x = {g->xs + (at * in + t->col) * width, dtype, in, 1};
    return perta_gemm_tile(g->gemm, worker, t->m, t->n, padded, dy, x, t->to, t->ld, !chunk->begins,
                           err);
}

/* Index of the first token of this sample or a later one. */
static size_t first_token(const struct perta_gradient *of, uint64_t sample)
{
    size_t low = 0, high = of->n_tokens;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (of->tokens[middle].sample < sample)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void clear(const struct tile *t)
{
    for (size_t i = 0; i < t->m; i++)
        memset(t->to + i * t->ld, 0, t->n * sizeof *t->to);
}

/* Add d of the sample's tokens whose rows are in the tile. The tile is cleared first unless *any;
 * *any becomes true if there was such a token. */
static void add_sample_tokens(const struct gradient *g, const struct tile *t, uint64_t sample,
                              bool *any)
{
    const struct perta_gradient *of = g->of;
    for (size_t k = first_token(of, sample); k < of->n_tokens && of->tokens[k].sample == sample;
         k++) {
        size_t row = of->tokens[k].row - t->row;
        if (of->tokens[k].row < t->row || row >= t->m)
            continue;
        if (!*any)
            clear(t);
        for (size_t i = 0; i < t->n; i++)
            t->to[row * t->ld + i] += g->d[k * of->in + t->col + i];
        *any = true;
    }
}

static void add_to_sums(const struct gradient *g, const struct tile *t)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = 0; i < t->m; i++) {
        size_t at = (t->row + i) * g->of->in + t->col;
        if (g->sums)
            k->add(g->sums + at, t->to + i * t->ld, t->n);
        if (g->squares)
            k->add_squares(g->squares + at, t->to + i * t->ld, t->n);
    }
}

static void add_to_norm(const struct gradient *g, const struct tile *t, uint64_t sample)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    double *norm = g->norms + t->number * g->of->n_samples + sample;
    for (size_t i = 0; i < t->m; i++)
        *norm += k->dot(t->to + i * t->ld, t->to + i * t->ld, t->n);
}

/* Add a chunk to a tile; a sample's tokens are added with its last chunk. */
static int add_chunk(const struct gradient *g, unsigned worker, const struct tile *t,
                     const struct perta_chunk *chunk, struct perta_err *err)
{
    bool any = g->x;
    int rc = g->x ? add_product(g, worker, t, chunk, err) : 0;
    if (rc || !chunk->ends)
        return rc;
    if (g->of->chunks->by_sample)
        add_sample_tokens(g, t, chunk->sample, &any);
    if (any)
        add_to_sums(g, t);
    if (any && g->norms)
        add_to_norm(g, t, chunk->sample);
    return 0;
}

static int add_tile(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct gradient *g = ctx;
    struct tile t = tile_at(g, i);
    t.to = g->sample ? g->sample + t.row * g->of->in + t.col : perta_gemm_room(g->gemm, worker);
    t.ld = g->sample ? g->of->in : PERTA_TILE_COLS;
    int rc = t.to ? 0 : perta_fail_sys(err, ENOMEM, "gradients");
    for (size_t c = g->first; c < g->end && !rc; c++)
        rc = add_chunk(g, worker, &t, &g->of->chunks->of[c], err);
    return rc;
}

/* Add the window's chunks. */
static int add_window(struct gradient *g, struct perta_err *err)
{
    size_t cols = (g->of->in + PERTA_TILE_COLS - 1) / PERTA_TILE_COLS;
    g->n_row_tiles = (g->of->rows + PERTA_TILE_ROWS - 1) / PERTA_TILE_ROWS;
    return perta_workers_run(perta_gemm_workers(g->gemm), g->n_row_tiles * cols, add_tile, g, err);
}

/* Add d of every token to columns from .. to of its row of the sums. */
static void add_tokens(const void *args, size_t from, size_t to)
{
    const struct gradient *g = args;
    size_t in = g->of->in;
    for (size_t k = 0; k < g->of->n_tokens; k++)
        perta_row_kernels()->add(g->sums + g->of->tokens[k].row * in + from, g->d + k * in + from,
                                 to - from);
}

/* ---- the operation ---- */

/* The end of the longest window from first on whose operands fit into the scratch. */
static size_t window_end(const struct perta_cpu *cpu, const struct gradient *g, size_t first)
{
    const struct perta_gradient *of = g->of;
    size_t of_row = (of->in + of->rows) * width_of(g), end = first + 1;
    while (end < of->end &&
           packed_rows(of->chunks, first, end + 1) * of_row <= cpu->scratch_floats * sizeof(float))
        end++;
    return end;
}

static bool fits(const struct perta_cpu *cpu, const struct gradient *g)
{
    size_t rows = packed_rows(g->of->chunks, g->first, g->end);
    return rows * (g->of->in + g->of->rows) * width_of(g) <= cpu->scratch_floats * sizeof(float);
}

/* Add the products of all chunks, window after window. */
static int add_windows(struct perta_cpu *cpu, struct gradient *g, struct perta_err *err)
{
    const struct perta_gradient *of = g->of;
    bool x_packed = of->x_again && cpu->x_packed;
    int rc = 0;
    cpu->x_packed = false;
    for (g->first = of->first; g->first < of->end && !rc; g->first = g->end, x_packed = false) {
        g->end = window_end(cpu, g, g->first);
        if (!fits(cpu, g))
            return perta_fail(err, PERTA_ESYS, "gradients: no room for %zu rows",
                              packed_rows(of->chunks, g->first, g->end));
        pack_window(g, (uint8_t *)perta_gemm_scratch(cpu->gemm, 0), x_packed);
        rc = add_window(g, err);
        cpu->x_packed = g->first == of->first && g->end == of->end;
    }
    return rc;
}

void perta_cpu_gradient(struct perta_backend *be, const struct perta_gradient *of)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct gradient g = {.of = of,
                         .gemm = cpu->gemm,
                         .sums = perta_cpu_at(cpu, of->sums),
                         .squares = perta_cpu_at(cpu, of->squares),
                         .norms = perta_cpu_at(cpu, of->norms),
                         .sample = perta_cpu_at(cpu, of->sample),
                         .x = perta_cpu_at(cpu, of->x),
                         .dy = perta_cpu_at(cpu, of->dy),
                         .d = perta_cpu_at(cpu, of->d),
                         .first = of->first,
                         .end = of->end};
    be->rc = g.x ? add_windows(cpu, &g, &be->err) : add_window(&g, &be->err);
    if (!be->rc && !of->chunks->by_sample && of->n_tokens)
        perta_cpu_share_out(cpu, of->in, of->n_tokens, add_tokens, &g);
}

/* ---- vectors, means ---- */

struct addition {
    double *sums, *squares;
    const float *d;
};

static void accumulate(const void *args, size_t from, size_t to)
{
    const struct addition *a = args;
    perta_row_kernels()->add(a->sums + from, a->d + from, to - from);
    if (a->squares)
        perta_row_kernels()->add_squares(a->squares + from, a->d + from, to - from);
}

void perta_cpu_accumulate(struct perta_backend *be, struct perta_array sums,
                          struct perta_array squares, struct perta_array d, size_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct addition a = {perta_cpu_at(cpu, sums), perta_cpu_at(cpu, squares),
                               perta_cpu_at(cpu, d)};
    perta_cpu_share_out(cpu, n, 1, accumulate, &a);
}

struct division {
    float *means;
    const double *sums;
    double of;
    atomic_uint *bad;
};

static void divide(const void *args, size_t from, size_t to)
{
    const struct division *d = args;
    if (perta_row_kernels()->divide(d->means + from, d->sums + from, d->of, to - from))
        atomic_store(d->bad, 1);
}

void perta_cpu_mean(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    double of, size_t n, bool *finite)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    atomic_uint bad = 0;
    const struct division d = {perta_cpu_at(cpu, to), perta_cpu_at(cpu, from), of, &bad};
    perta_cpu_share_out(cpu, n, 1, divide, &d);
    *finite = !atomic_load(&bad);
}
