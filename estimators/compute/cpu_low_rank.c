/* LoRA beside linear layers: float32 products with a few columns, cut by tiles. */
#include "estimators/compute/cpu_own.h"

#define ROWS 64     /* rows of a tile that are multiplied by a factor at a time */
#define COLUMNS 128 /* columns (or rows) of a factor's gradient in a piece */
#define PARTS (PERTA_TILE_ROWS / ROWS)

struct low_rank {
    const struct perta_runs *tiles;
    size_t out, in, r;
    float scaling;
    const float *a, *b; /* (r, in), (out, r) */
    const float *x, *dy;
    float *y, *dx, *da, *db;
    float *xa, *dyb; /* (n, r): x a^T, dy b */
};

static struct low_rank low_rank_of(struct perta_cpu *cpu, const struct perta_low_rank *l,
                                   const struct perta_runs *tiles, size_t n,
                                   struct perta_array room)
{
    float *scratch = perta_cpu_at(cpu, room);
    cpu->x_packed = false;
    return (struct low_rank){.tiles = tiles,
                             .out = l->out,
                             .in = l->in,
                             .r = l->r,
                             .scaling = l->scaling,
                             .a = perta_cpu_at(cpu, l->a),
                             .b = perta_cpu_at(cpu, l->b),
                             .xa = scratch,
                             .dyb = scratch + n * l->r};
}

/* Rows of a tile, or of a part of it. */
struct span {
    size_t first, n;
};

static struct span tile_rows(const struct low_rank *l, size_t tile)
{
    const struct perta_runs *t = l->tiles;
    return (struct span){t->starts[tile] - t->origin, t->starts[tile + 1] - t->starts[tile]};
}

/* Part number i % PARTS of tile number i / PARTS; n is 0 if the tile has fewer parts. */
static struct span part_rows(const struct low_rank *l, size_t i)
{
    struct span tile = tile_rows(l, i / PARTS);
    size_t at = i % PARTS * ROWS;
    size_t left = at < tile.n ? tile.n - at : 0;
    return (struct span){tile.first + at, left < ROWS ? left : ROWS};
}

/* to (rows, n) = beta * to + alpha * x (rows, k) times factor, or its transpose ('T'), whose rows in
 * memory are ld floats. */
struct product {
    char trans;
    size_t n, k, ld;
    float alpha, beta;
    const float *x, *factor;
    float *to;
};

/* A product for a part of a tile. */
static int multiply(const struct low_rank *l, size_t i, const struct product *p,
                    struct perta_err *err)
{
    struct span rows = part_rows(l, i);
    return rows.n ? perta_gemm_sgemm('N', p->trans, rows.n, p->n, p->k, p->alpha,
                                     p->x + rows.first * p->k, p->k, p->factor, p->ld, p->beta,
                                     p->to + rows.first * p->n, p->n, err)
                  : 0;
}

/* xa = x a^T. */
static int run_xa(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct low_rank *l = ctx;
    const struct product xa = {'T', l->r, l->in, l->in, 1, 0, l->x, l->a, l->xa};
    (void)worker;
    return multiply(l, i, &xa, err);
}

/* dyb = dy b. */
static int run_dyb(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct low_rank *l = ctx;
    const struct product dyb = {'N', l->r, l->out, l->r, 1, 0, l->dy, l->b, l->dyb};
    (void)worker;
    return multiply(l, i, &dyb, err);
}

/* y += scaling * xa b^T. */
static int run_y(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct low_rank *l = ctx;
    const struct product y = {'T', l->out, l->r, l->r, l->scaling, 1, l->xa, l->b, l->y};
    (void)worker;
    return multiply(l, i, &y, err);
}

/* dx += scaling * dyb a. */
static int run_dx(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct low_rank *l = ctx;
    const struct product dx = {'N', l->in, l->r, l->in, l->scaling, 1, l->dyb, l->a, l->dx};
    (void)worker;
    return multiply(l, i, &dx, err);
}

/* Columns of da, then rows of db; each piece adds all tiles, in order. */
static int run_gradient(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct low_rank *l = ctx;
    size_t of_a = (l->in + COLUMNS - 1) / COLUMNS;
    size_t width = i < of_a ? l->in : l->out, at = (i < of_a ? i : i - of_a) * COLUMNS;
    size_t n = width - at < COLUMNS ? width - at : COLUMNS;
    int rc = 0;
    (void)worker;
    for (size_t tile = 0; tile < l->tiles->n && !rc; tile++) {
        struct span rows = tile_rows(l, tile);
        const float *xa = l->xa + rows.first * l->r, *dyb = l->dyb + rows.first * l->r;
        rc = i < of_a ? perta_gemm_sgemm('T', 'N', l->r, n, rows.n, l->scaling, dyb, l->r,
                                         l->x + rows.first * l->in + at, l->in, 1, l->da + at,
                                         l->in, err)
                      : perta_gemm_sgemm('T', 'N', n, l->r, rows.n, l->scaling,
                                         l->dy + rows.first * l->out + at, l->out, xa, l->r, 1,
                                         l->db + at * l->r, l->r, err);
    }
    return rc;
}

static void run(struct perta_cpu *cpu, size_t n, perta_piece_fn *piece, struct low_rank *l)
{
    struct perta_backend *be = &cpu->backend;
    if (!be->rc)
        be->rc = perta_workers_run(cpu->workers, n, piece, l, &be->err);
}

void perta_cpu_low_rank_forward(struct perta_backend *be, const struct perta_low_rank *lora,
                                const struct perta_runs *tiles, struct perta_array x,
                                struct perta_array y, size_t n, struct perta_array room)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct low_rank l = low_rank_of(cpu, lora, tiles, n, room);
    l.x = perta_cpu_at(cpu, x);
    l.y = perta_cpu_at(cpu, y);
    run(cpu, tiles->n * PARTS, run_xa, &l);
    run(cpu, tiles->n * PARTS, run_y, &l);
}

void perta_cpu_low_rank_backward(struct perta_backend *be, const struct perta_low_rank *lora,
                                 const struct perta_runs *tiles, struct perta_array dy,
                                 struct perta_array dx, size_t n, struct perta_array room)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct low_rank l = low_rank_of(cpu, lora, tiles, n, room);
    l.dy = perta_cpu_at(cpu, dy);
    l.dx = perta_cpu_at(cpu, dx);
    run(cpu, tiles->n * PARTS, run_dyb, &l);
    run(cpu, tiles->n * PARTS, run_dx, &l);
}

void perta_cpu_low_rank_gradient(struct perta_backend *be, const struct perta_low_rank *lora,
                                 const struct perta_runs *tiles, struct perta_array x,
                                 struct perta_array dy, struct perta_array da,
                                 struct perta_array db, size_t n, struct perta_array room)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct low_rank l = low_rank_of(cpu, lora, tiles, n, room);
    l.x = perta_cpu_at(cpu, x);
    l.dy = perta_cpu_at(cpu, dy);
    l.da = perta_cpu_at(cpu, da);
    l.db = perta_cpu_at(cpu, db);
    run(cpu, tiles->n * PARTS, run_xa, &l);
    run(cpu, tiles->n * PARTS, run_dyb, &l);
    run(cpu, (l.in + COLUMNS - 1) / COLUMNS + (l.out + COLUMNS - 1) / COLUMNS, run_gradient, &l);
}
