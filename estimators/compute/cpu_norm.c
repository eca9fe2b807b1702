#include <assert.h>
#include <math.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

struct norm {
    float *y, *stats_out, *dx, *dweight, *dbias;
    const float *dy, *x, *stats; /* stats (T, n_stats): rstd; of LayerNorm the mean and rstd */
    const float *weight, *bias;  /* (n_weights, H) */
    size_t T, H, n_weights, n_stats;
    float eps;
};

/* Weights as rows are multiplied by them. Those that are not an array of the caller's are made in
 * the scratch of products. */
static const float *weights_of(struct perta_cpu *cpu, const struct perta_norm *norm, size_t H)
{
    const float *weight = perta_cpu_at(cpu, norm->weight);
    if (weight && norm->plus == 0)
        return weight;
    float *made = perta_gemm_scratch(cpu->gemm, 0);
    assert(norm->n_weights * H <= cpu->scratch_floats);
    cpu->x_packed = false;
    for (size_t i = 0; i < norm->n_weights * H; i++)
        made[i] = weight ? weight[i] + norm->plus : 1;
    return made;
}

/* Of row t. */
static const float *row_weight(const struct norm *n, size_t t)
{
    return n->weight + t % n->n_weights * n->H;
}

/* ---- RMSNorm (Zhang & Sennrich 2019) ---- */

static void rmsnorm_rows(const void *args, size_t from, size_t to)
{
    const struct norm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H, *w = row_weight(n, t);
        float r = 1.0f / sqrtf((float)(k->dot(row, row, H) / (double)H) + n->eps);
        n->stats_out[t] = r;
        for (size_t i = 0; i < H; i++)
            n->y[t * H + i] = w[i] * (row[i] * r);
    }
}

void perta_cpu_rmsnorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                               struct perta_array y, struct perta_array rstd, struct perta_array x,
                               size_t T, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.y = perta_cpu_at(cpu, y),
                           .stats_out = perta_cpu_at(cpu, rstd),
                           .x = perta_cpu_at(cpu, x),
                           .weight = weights_of(cpu, norm, H),
                           .n_weights = norm->n_weights,
                           .H = H,
                           .eps = norm->eps};
    perta_cpu_share_out(cpu, T, H, rmsnorm_rows, &n);
}

static void rmsnorm_backward_rows(const void *args, size_t from, size_t to)
{
    const struct norm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H, *drow = n->dy + t * H, *w = row_weight(n, t);
        float r = n->stats[t];
        float c = (float)(k->dot_of_product(w, drow, row, H) / (double)H) * r * r * r;
        for (size_t i = 0; i < H; i++)
            n->dx[t * H + i] += r * w[i] * drow[i] - c * row[i];
    }
}

void perta_cpu_rmsnorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                struct perta_array dx, struct perta_array dy, struct perta_array x,
                                struct perta_array rstd, size_t T, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.dx = perta_cpu_at(cpu, dx),
                           .dy = perta_cpu_at(cpu, dy),
                           .x = perta_cpu_at(cpu, x),
                           .stats = perta_cpu_at(cpu, rstd),
                           .weight = weights_of(cpu, norm, H),
                           .n_weights = norm->n_weights,
                           .H = H};
    perta_cpu_share_out(cpu, T, H, rmsnorm_backward_rows, &n);
}

/* ---- LayerNorm (Ba et al. 2016) ---- */

static void layernorm_rows(const void *args, size_t from, size_t to)
{
    const struct norm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H, *w = row_weight(n, t);
        const float *b = n->bias ? n->bias + t % n->n_weights * H : NULL;
        double mean = k->sum(row, H) / (double)H;
        float variance = (float)(k->sum_deviations(row, mean, H) / (double)H);
        float m = (float)mean, r = 1.0f / sqrtf(variance + n->eps);
        n->stats_out[2 * t] = m;
        n->stats_out[2 * t + 1] = r;
        for (size_t i = 0; i < H; i++)
            n->y[t * H + i] = w[i] * ((row[i] - m) * r);
        for (size_t i = 0; b && i < H; i++)
            n->y[t * H + i] += b[i];
    }
}

void perta_cpu_layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                 struct perta_array y, struct perta_array stats,
                                 struct perta_array x, size_t T, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.y = perta_cpu_at(cpu, y),
                           .stats_out = perta_cpu_at(cpu, stats),
                           .x = perta_cpu_at(cpu, x),
                           .weight = weights_of(cpu, norm, H),
                           .bias = perta_cpu_at(cpu, norm->bias),
                           .n_weights = norm->n_weights,
                           .H = H,
                           .eps = norm->eps};
    perta_cpu_share_out(cpu, T, H, layernorm_rows, &n);
}

/* dx += r (g - mean(g) - z mean(g z)), g = w dy, z = (x - mean) r. */
static void layernorm_backward_rows(const void *args, size_t from, size_t to)
{
    const struct norm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H, *drow = n->dy + t * H, *w = row_weight(n, t);
        float mean = n->stats[2 * t], r = n->stats[2 * t + 1];
        double sums[2];
        k->layernorm_sums(sums, w, drow, row, mean, H);
        float g = (float)(sums[0] / (double)H), c = (float)(sums[1] / (double)H) * r * r;
        for (size_t i = 0; i < H; i++)
            n->dx[t * H + i] += r * (w[i] * drow[i] - g - c * (row[i] - mean));
    }
}

void perta_cpu_layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                  struct perta_array dx, struct perta_array dy,
                                  struct perta_array x, struct perta_array stats, size_t T,
                                  size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.dx = perta_cpu_at(cpu, dx),
                           .dy = perta_cpu_at(cpu, dy),
                           .x = perta_cpu_at(cpu, x),
                           .stats = perta_cpu_at(cpu, stats),
                           .weight = weights_of(cpu, norm, H),
                           .n_weights = norm->n_weights,
                           .H = H};
    perta_cpu_share_out(cpu, T, H, layernorm_backward_rows, &n);
}

/* ---- their weights ---- */

#define COLUMNS 128 /* columns that are summed at a time */

static size_t blocks_of(const struct norm *n)
{
    return (n->H + COLUMNS - 1) / COLUMNS;
}

/* Gradients of a block of columns of a weight and a bias, summed over the rows that have them. */
static void add_block(const struct norm *n, size_t weight, size_t column)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H, width = H - column < COLUMNS ? H - column : COLUMNS;
    size_t at = weight * H + column;
    double weights[COLUMNS] = {0}, biases[COLUMNS] = {0};
    for (size_t t = weight; t < n->T; t += n->n_weights) {
        const float *dy = n->dy + t * H + column, *x = n->x + t * H + column;
        const float *stats = n->stats + t * n->n_stats;
        if (n->dweight)
            k->add_products(weights, dy, x, n->n_stats == 2 ? stats[0] : 0, stats[n->n_stats - 1],
                            width);
        if (n->dbias)
            k->add(biases, dy, width);
    }
    for (size_t c = 0; n->dweight && c < width; c++)
        n->dweight[at + c] += (float)weights[c];
    for (size_t c = 0; n->dbias && c < width; c++)
        n->dbias[at + c] += (float)biases[c];
}

static void add_blocks(const void *args, size_t from, size_t to)
{
    const struct norm *n = args;
    for (size_t i = from; i < to; i++)
        add_block(n, i / blocks_of(n), i % blocks_of(n) * COLUMNS);
}

void perta_cpu_rmsnorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                       struct perta_array dweight, struct perta_array dy,
                                       struct perta_array x, struct perta_array rstd, size_t T,
                                       size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.dweight = perta_cpu_at(cpu, dweight),
                           .dy = perta_cpu_at(cpu, dy),
                           .x = perta_cpu_at(cpu, x),
                           .stats = perta_cpu_at(cpu, rstd),
                           .n_stats = 1,
                           .n_weights = norm->n_weights,
                           .T = T,
                           .H = H};
    perta_cpu_share_out(cpu, n.n_weights * blocks_of(&n), T / n.n_weights * COLUMNS, add_blocks,
                        &n);
}

void perta_cpu_layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                         struct perta_array dweight, struct perta_array dbias,
                                         struct perta_array dy, struct perta_array x,
                                         struct perta_array stats, size_t T, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct norm n = {.dweight = perta_cpu_at(cpu, dweight),
                           .dbias = perta_cpu_at(cpu, dbias),
                           .dy = perta_cpu_at(cpu, dy),
                           .x = perta_cpu_at(cpu, x),
                           .stats = perta_cpu_at(cpu, stats),
                           .n_stats = 2,
                           .n_weights = norm->n_weights,
                           .T = T,
                           .H = H};
    perta_cpu_share_out(cpu, n.n_weights * blocks_of(&n), T / n.n_weights * COLUMNS, add_blocks,
                        &n);
}
