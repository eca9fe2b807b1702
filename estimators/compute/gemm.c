#include "estimators/compute/gemm.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/compute/kernels.h"
#include "estimators/compute/onednn.h"
#include "io/pool.h"

/* A product is compiled for its shape. This many are kept (about 100 KB each), and one more for
 * each worker. */
#define KEPT 64

struct shape {
    size_t m, n, k, a_row, a_col, b_row, b_col, ldc, add;
};

struct made {
    struct shape shape;
    dnnl_primitive_t primitive; /* NULL: free */
    dnnl_memory_desc_t desc[4]; /* of a, b, c and the scratchpad */
    size_t pad_bytes;
    unsigned n_users;
};

/* Memory and stream of one worker. */
struct room {
    dnnl_stream_t stream;
    float *floats;
    uint8_t *pad; /* oneDNN's scratchpad */
    size_t pad_bytes;
};

struct perta_gemm {
    dnnl_engine_t engine;
    struct perta_workers *workers;
    bool bf16;
    struct perta_pool pool;
    float *scratch; /* (scratch_floats), of the pool */
    size_t scratch_floats, room_floats;
    struct room *rooms;   /* (workers) */
    pthread_mutex_t lock; /* guards what follows */
    struct made *made;    /* (n_made) */
    size_t n_made, clock; /* clock: where to look for one to replace */
};

static int failed(dnnl_status_t status, struct perta_err *err)
{
    return status == dnnl_out_of_memory
               ? perta_fail_sys(err, ENOMEM, "matrix product")
               : perta_fail(err, PERTA_ESYS, "matrix product: oneDNN says %d", (int)status);
}

/* The number of an instruction set has the bits of those that it includes. oneDNN is asked rather
 * than the CPU, because ONEDNN_MAX_CPU_ISA may restrict it. */
static bool isa_includes(dnnl_cpu_isa_t isa)
{
    return ((int)dnnl_get_effective_cpu_isa() & (int)isa) == (int)isa;
}

bool perta_gemm_has_bf16(void)
{
    return isa_includes(dnnl_cpu_isa_avx512_core_bf16);
}

/* oneDNN supports it from AVX-512 (F, BW, DQ, VL) on. */
bool perta_gemm_can_bf16(void)
{
    return isa_includes(dnnl_cpu_isa_avx512_core);
}

int perta_gemm_isa(void)
{
    return (int)dnnl_get_effective_cpu_isa();
}

const char *perta_gemm_version(char buf[64])
{
    const dnnl_version_t *v = dnnl_version();
    snprintf(buf, 64, "oneDNN %d.%d.%d %.40s", v->major, v->minor, v->patch, v->hash);
    return buf;
}

/* ---- open, close ---- */

int perta_gemm_open(bool bf16, struct perta_workers *workers, size_t scratch_floats,
                    size_t room_floats, struct perta_gemm **out, struct perta_err *err)
{
    const size_t least = (size_t)PERTA_TILE_ROWS * PERTA_TILE_COLS;
    struct perta_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return perta_fail_sys(err, ENOMEM, "matrix products");
    int rc = perta_pool_take(&g->pool, (scratch_floats + 16) * sizeof *g->scratch, err);
    if (rc) {
        free(g);
        return rc;
    }
    g->scratch = (float *)(void *)g->pool.base;
    pthread_mutex_init(&g->lock, NULL);
    g->bf16 = bf16;
    g->workers = workers;
    g->scratch_floats = scratch_floats;
    g->room_floats = room_floats > least ? room_floats : least;
    g->rooms = calloc(perta_workers_count(workers), sizeof *g->rooms);
    g->n_made = KEPT + perta_workers_count(workers);
    g->made = calloc(g->n_made, sizeof *g->made);
    dnnl_status_t status =
        g->rooms && g->made ? dnnl_engine_create(&g->engine, dnnl_cpu, 0) : dnnl_out_of_memory;
    if (status == dnnl_success) /* it would keep a thousand shapes, 25 MiB; made replaces it */
        status = dnnl_set_primitive_cache_capacity(0);
    if (status != dnnl_success) {
        perta_gemm_close(g);
        return failed(status, err);
    }
    *out = g;
    return 0;
}

static void unmake(struct made *made)
{
    if (made->primitive)
        dnnl_primitive_destroy(made->primitive);
    for (int i = 0; i < 4; i++)
        onednn_forget(&made->desc[i]);
    memset(made, 0, sizeof *made);
}

void perta_gemm_close(struct perta_gemm *g)
{
    if (!g)
        return;
    for (size_t i = 0; g->made && i < g->n_made; i++)
        unmake(&g->made[i]);
    for (unsigned i = 0; g->rooms && i < perta_workers_count(g->workers); i++) {
        if (g->rooms[i].stream)
            dnnl_stream_destroy(g->rooms[i].stream);
        free(g->rooms[i].floats);
        free(g->rooms[i].pad);
    }
    if (g->engine)
        dnnl_engine_destroy(g->engine);
    pthread_mutex_destroy(&g->lock);
    free(g->made);
    free(g->rooms);
    perta_pool_give(&g->pool);
    free(g);
}

struct perta_workers *perta_gemm_workers(const struct perta_gemm *g)
{
    return g->workers;
}

/* ---- operands ---- */

enum perta_dtype perta_gemm_dtype(const struct perta_gemm *g)
{
    return g->bf16 ? PERTA_BF16 : PERTA_F32;
}

float *perta_gemm_scratch(const struct perta_gemm *g, size_t at)
{
    return g->scratch + at;
}

struct conversion {
    bool bf16;
    const uint8_t *from;
    enum perta_dtype dtype;
    size_t stride, n_rows, n_cols, rows; /* rows: in a piece */
    uint8_t *to;
};

static int convert_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct conversion *c = ctx;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t from_width = c->dtype == PERTA_F32 ? 4 : 2;
    size_t end = (i + 1) * c->rows < c->n_rows ? (i + 1) * c->rows : c->n_rows;
    (void)worker;
    (void)err;
    for (size_t r = i * c->rows; r < end; r++) {
        const uint8_t *from = c->from + r * c->stride * from_width;
        if (c->bf16)
            k->to_bf16((uint16_t *)(void *)c->to + r * c->n_cols, from, c->dtype, c->n_cols);
        else
            k->to_f32((float *)(void *)c->to + r * c->n_cols, from, c->dtype, c->n_cols);
    }
    return 0;
}

/* Elements that a piece converts, approximately. */
#define PIECE_ELEMS (1u << 16)

/* Make m (rows, cols), which is contiguous along its rows or its columns, an operand of a piece. If
 * its dtype is another it is converted into the scratch, of which *at floats are in use. PERTA_ESYS
 * if it does not fit. */
static int prepare(struct perta_gemm *g, struct perta_operand_matrix *m, size_t rows, size_t cols,
                   size_t *at, struct perta_err *err)
{
    enum perta_dtype want = perta_gemm_dtype(g);
    if (m->dtype == want)
        return 0;
    /* Convert along the contiguous dimension. */
    bool turned = m->col != 1;
    size_t n_rows = turned ? cols : rows, n_cols = turned ? rows : cols;
    size_t need = ((n_rows + PERTA_SLACK_ROWS) * n_cols * (g->bf16 ? 2 : 4) + 3) / 4;
    if (need > g->scratch_floats - *at)
        return perta_fail(err, PERTA_ESYS, "matrix product: no room for %zu x %zu", rows, cols);
    struct conversion c = {g->bf16,
                           m->data,
                           m->dtype,
                           turned ? m->col : m->row,
                           n_rows,
                           n_cols,
                           n_cols < PIECE_ELEMS ? PIECE_ELEMS / n_cols : 1,
                           (uint8_t *)(g->scratch + *at)};
    *at += (need + 15) & ~(size_t)15;
    *at = *at < g->scratch_floats ? *at : g->scratch_floats;
    *m = turned ? (struct perta_operand_matrix){c.to, want, 1, n_cols}
                : (struct perta_operand_matrix){c.to, want, n_cols, 1};
    return perta_workers_run(g->workers, (n_rows + c.rows - 1) / c.rows, convert_rows, &c, err);
}

/* ---- compiled products ---- */

static dnnl_status_t compile(const struct perta_gemm *g, struct made *made)
{
    const struct shape *s = &made->shape;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t sum = NULL;
    dnnl_primitive_desc_t desc = NULL;
    dnnl_status_t status = onednn_describe(&made->desc[0], s->m, s->k, s->a_row, s->a_col, g->bf16);
    if (status == dnnl_success)
        status = onednn_describe(&made->desc[1], s->k, s->n, s->b_row, s->b_col, g->bf16);
    if (status == dnnl_success)
        status = onednn_describe(&made->desc[2], s->m, s->n, s->ldc, 1, false);
    if (status == dnnl_success)
        status = dnnl_primitive_attr_create(&attr);
    if (status == dnnl_success)
        status = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    if (status == dnnl_success && s->add)
        status = dnnl_post_ops_create(&sum);
    if (status == dnnl_success && sum)
        status = onednn_sum(sum);
    if (status == dnnl_success && sum)
        status = dnnl_primitive_attr_set_post_ops(attr, sum);
    if (status == dnnl_success)
        status = onednn_matmul(&desc, g->engine, made->desc, attr);
    if (status == dnnl_success)
        status = onednn_scratchpad(&made->desc[3], &made->pad_bytes, desc);
    if (status == dnnl_success)
        status = dnnl_primitive_create(&made->primitive, desc);
    if (desc)
        dnnl_primitive_desc_destroy(desc);
    if (sum)
        dnnl_post_ops_destroy(sum);
    if (attr)
        dnnl_primitive_attr_destroy(attr);
    return status;
}

/* Clear a place that is not in use. There is one, since places outnumber workers. */
static struct made *free_place(struct perta_gemm *g)
{
    struct made *made;
    assert(g->n_made);
    do
        made = &g->made[g->clock++ % g->n_made];
    while (made->n_users);
    unmake(made);
    return made;
}

static dnnl_status_t take_made(struct perta_gemm *g, const struct shape *shape, struct made **out)
{
    dnnl_status_t status = dnnl_success;
    struct made *made = NULL;
    pthread_mutex_lock(&g->lock);
    for (size_t i = 0; i < g->n_made && !made; i++)
        if (g->made[i].primitive && !memcmp(&g->made[i].shape, shape, sizeof *shape))
            made = &g->made[i];
    if (!made) {
        made = free_place(g);
        made->shape = *shape;
        status = compile(g, made);
        if (status != dnnl_success)
            unmake(made);
    }
    made->n_users += status == dnnl_success;
    pthread_mutex_unlock(&g->lock);
    *out = made;
    return status;
}

static void give_made(struct perta_gemm *g, struct made *made)
{
    pthread_mutex_lock(&g->lock);
    made->n_users--;
    pthread_mutex_unlock(&g->lock);
}

/* ---- on a worker ---- */

float *perta_gemm_room(struct perta_gemm *g, unsigned worker)
{
    struct room *room = &g->rooms[worker];
    if (!room->floats)
        room->floats = aligned_alloc(64, (g->room_floats * sizeof(float) + 63) & ~(size_t)63);
    return room->floats;
}

static dnnl_status_t make_ready(struct perta_gemm *g, struct room *room, size_t pad_bytes)
{
    if (room->pad_bytes < pad_bytes) {
        free(room->pad);
        room->pad_bytes = (pad_bytes + 4095) & ~(size_t)4095;
        room->pad = aligned_alloc(4096, room->pad_bytes);
        room->pad_bytes = room->pad ? room->pad_bytes : 0;
        if (!room->pad)
            return dnnl_out_of_memory;
    }
    return room->stream ? dnnl_success
                        : dnnl_stream_create(&room->stream, g->engine, dnnl_stream_default_flags);
}

static dnnl_status_t execute(const struct perta_gemm *g, const struct made *made,
                             const struct room *room, const void *a, const void *b, float *c)
{
    static const int names[4] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST, DNNL_ARG_SCRATCHPAD};
    void *const data[4] = {(void *)(uintptr_t)a, (void *)(uintptr_t)b, c, room->pad};
    dnnl_exec_arg_t args[4] = {0};
    dnnl_status_t status = dnnl_success;
    int n = made->pad_bytes ? 4 : 3;
    for (int i = 0; i < n && status == dnnl_success; i++) {
        args[i].arg = names[i];
        status = onednn_memory(&args[i].memory, &made->desc[i], g->engine, data[i]);
    }
    if (status == dnnl_success)
        status = dnnl_primitive_execute(made->primitive, room->stream, n, args);
    if (status == dnnl_success)
        status = dnnl_stream_wait(room->stream);
    for (int i = 0; i < n; i++)
        if (args[i].memory)
            dnnl_memory_destroy(args[i].memory);
    return status;
}

int perta_gemm_tile(struct perta_gemm *g, unsigned worker, size_t m, size_t n, size_t k,
                    struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                    size_t ldc, bool add, struct perta_err *err)
{
    const struct shape shape = {m, n, k, a.row, a.col, b.row, b.col, ldc, add};
    struct room *room = &g->rooms[worker];
    struct made *made;
    int before = onednn_alone();
    dnnl_status_t status = take_made(g, &shape, &made);
    if (status == dnnl_success) {
        status = make_ready(g, room, made->pad_bytes);
        if (status == dnnl_success)
            status = execute(g, made, room, a.data, b.data, c);
        give_made(g, made);
    }
    onednn_as_before(before);
    return status == dnnl_success ? 0 : failed(status, err);
}

int perta_gemm_sgemm(char ta, char tb, size_t m, size_t n, size_t k, float scale, const float *a,
                     size_t lda, const float *b, size_t ldb, float beta, float *c, size_t ldc,
                     struct perta_err *err)
{
    int before = onednn_alone();
    dnnl_status_t status =
        dnnl_sgemm(ta, tb, (dnnl_dim_t)m, (dnnl_dim_t)n, (dnnl_dim_t)k, scale, a, (dnnl_dim_t)lda,
                   b, (dnnl_dim_t)ldb, beta, c, (dnnl_dim_t)ldc);
    onednn_as_before(before);
    return status == dnnl_success ? 0 : failed(status, err);
}

/* ---- the product ---- */

struct product {
    struct perta_gemm *gemm;
    const struct perta_runs *rows; /* NULL: every PERTA_TILE_ROWS of m */
    size_t m, n, k, n_row_tiles;
    struct perta_operand_matrix a, b;
    float *c;
    size_t ldc;
    bool add;
};

static struct perta_operand_matrix part(struct perta_operand_matrix m, size_t i, size_t j)
{
    m.data = (const uint8_t *)m.data + (i * m.row + j * m.col) * (m.dtype == PERTA_F32 ? 4 : 2);
    return m;
}

/* A tile whose number of rows is not a multiple of PERTA_SLACK_ROWS + 1 is rounded up to one,
 * computed into the worker's room, and copied. */
static int run_ragged(const struct product *p, unsigned worker, size_t m, size_t n,
                      struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                      struct perta_err *err)
{
    size_t whole = (m + PERTA_SLACK_ROWS) & ~(size_t)PERTA_SLACK_ROWS;
    float *room = perta_gemm_room(p->gemm, worker);
    if (!room)
        return perta_fail_sys(err, ENOMEM, "matrix product");
    int rc =
        perta_gemm_tile(p->gemm, worker, whole, n, p->k, a, b, room, PERTA_TILE_COLS, false, err);
    for (size_t i = 0; i < m && !rc; i++)
        for (size_t j = 0; j < n; j++)
            c[i * p->ldc + j] = room[i * PERTA_TILE_COLS + j] + (p->add ? c[i * p->ldc + j] : 0);
    return rc;
}

/* Piece i is a tile of rows and columns. Rows vary faster, because tiles of the same columns share
 * b. */
static int run_piece(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct product *p = ctx;
    size_t tile = i % p->n_row_tiles, col = i / p->n_row_tiles * PERTA_TILE_COLS;
    size_t row = p->rows ? p->rows->starts[tile] - p->rows->origin : tile * PERTA_TILE_ROWS;
    size_t end = p->rows ? p->rows->starts[tile + 1] - p->rows->origin : row + PERTA_TILE_ROWS;
    size_t m = (end < p->m ? end : p->m) - row;
    size_t n = p->n - col < PERTA_TILE_COLS ? p->n - col : PERTA_TILE_COLS;
    struct perta_operand_matrix a = part(p->a, row, 0), b = part(p->b, 0, col);
    float *c = p->c + row * p->ldc + col;
    if (p->rows && m % (PERTA_SLACK_ROWS + 1))
        return run_ragged(p, worker, m, n, a, b, c, err);
    return perta_gemm_tile(p->gemm, worker, m, n, p->k, a, b, c, p->ldc, p->add, err);
}

int perta_gemm_run(struct perta_gemm *g, const struct perta_runs *rows, size_t m, size_t n,
                   size_t k, struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                   size_t ldc, bool add, struct perta_err *err)
{
    struct product p = {
        g, rows, m, n,   k,  rows ? rows->n : (m + PERTA_TILE_ROWS - 1) / PERTA_TILE_ROWS,
        a, b,    c, ldc, add};
    size_t at = 0;
    if (!m || !n)
        return 0;
    int rc = prepare(g, &p.a, m, k, &at, err);
    if (!rc)
        rc = prepare(g, &p.b, k, n, &at, err);
    return rc ? rc
              : perta_workers_run(g->workers,
                                  p.n_row_tiles * ((n + PERTA_TILE_COLS - 1) / PERTA_TILE_COLS),
                                  run_piece, &p, err);
}
