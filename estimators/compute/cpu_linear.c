#include "estimators/compute/cpu_own.h"

/* ---- products with a weight ---- */

/* Rows of the weight in one product: all of them, or fewer if they must be converted. */
static size_t rows_at_a_time(const struct perta_cpu *cpu, const struct perta_linear *l)
{
    return l->dtype == perta_gemm_dtype(cpu->gemm) ? l->out : PERTA_CPU_WEIGHT_ROWS;
}

/* Rows of the weight (out, in), from row first on. */
static struct perta_operand_matrix rows_of(const struct perta_linear *l, const uint8_t *weight,
                                           size_t first)
{
    size_t width = l->dtype == PERTA_F32 ? 4 : 2;
    if (l->transposed)
        return (struct perta_operand_matrix){weight + first * width, l->dtype, 1, l->out};
    return (struct perta_operand_matrix){weight + first * l->in * width, l->dtype, l->in, 1};
}

struct biased {
    float *y;
    const float *bias;
    size_t out;
};

static void add_bias_rows(const void *args, size_t from, size_t to)
{
    const struct biased *b = args;
    for (size_t t = from; t < to; t++)
        for (size_t k = 0; k < b->out; k++)
            b->y[t * b->out + k] += b->bias[k];
}

void perta_cpu_linear_forward(struct perta_backend *be, const struct perta_linear *l,
                              const struct perta_runs *tiles, struct perta_array x,
                              struct perta_array y, size_t n, bool add)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct biased b = {perta_cpu_at(cpu, y), perta_cpu_at(cpu, l->bias), l->out};
    const struct perta_operand_matrix xs = perta_matrix(perta_cpu_at(cpu, x), l->in);
    const uint8_t *weight = perta_cpu_at(cpu, l->weight);
    size_t step = rows_at_a_time(cpu, l);
    cpu->x_packed = false; /* converted operands overwrite it */
    for (size_t r = 0; r < l->out && !be->rc; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        be->rc =
            perta_gemm_run(cpu->gemm, tiles, n, rows, l->in, xs,
                           perta_transposed(rows_of(l, weight, r)), b.y + r, l->out, add, &be->err);
    }
    if (!be->rc && b.bias)
        perta_cpu_share_out(cpu, n, l->out, add_bias_rows, &b);
}

void perta_cpu_linear_backward(struct perta_backend *be, const struct perta_linear *l,
                               const struct perta_runs *tiles, struct perta_array dy,
                               struct perta_array dx, size_t n, bool add)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const float *dys = perta_cpu_at(cpu, dy);
    const uint8_t *weight = perta_cpu_at(cpu, l->weight);
    size_t step = rows_at_a_time(cpu, l);
    cpu->x_packed = false;
    for (size_t r = 0; r < l->out && !be->rc; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        be->rc =
            perta_gemm_run(cpu->gemm, tiles, n, l->in, rows, perta_matrix(dys + r, l->out),
                           rows_of(l, weight, r), perta_cpu_at(cpu, dx), l->in, add || r, &be->err);
    }
}

/* ---- gradients of a batch ---- */

void perta_cpu_linear_backward_weight(struct perta_backend *be, struct perta_array dweight,
                                      struct perta_array dy, struct perta_array x, size_t n,
                                      size_t out, size_t in)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    if (cpu->needs.bf16) {
        be->rc = perta_fail(&be->err, PERTA_EUSAGE, "training is in float32, not in bfloat16");
        return;
    }
    be->rc = perta_gemm_run(
        cpu->gemm, NULL, out, in, n, perta_transposed(perta_matrix(perta_cpu_at(cpu, dy), out)),
        perta_matrix(perta_cpu_at(cpu, x), in), perta_cpu_at(cpu, dweight), in, true, &be->err);
}

struct bias_sum {
    const float *dy;
    size_t first, end, out;
    float *sums;
};

#define BIAS_COLUMNS 256 /* columns that are summed at a time */

/* Columns from * BIAS_COLUMNS .. to * BIAS_COLUMNS. */
static void sum_columns(const void *args, size_t from, size_t to)
{
    const struct bias_sum *b = args;
    for (size_t at = from * BIAS_COLUMNS; at < to * BIAS_COLUMNS && at < b->out;
         at += BIAS_COLUMNS) {
        size_t n = b->out - at < BIAS_COLUMNS ? b->out - at : BIAS_COLUMNS;
        double sums[BIAS_COLUMNS] = {0};
        for (size_t t = b->first; t < b->end; t++)
            for (size_t k = 0; k < n; k++)
                sums[k] += (double)b->dy[t * b->out + at + k];
        for (size_t k = 0; k < n; k++)
            b->sums[at + k] = (float)sums[k];
    }
}

void perta_cpu_linear_backward_bias(struct perta_backend *be, struct perta_array dbias,
                                    struct perta_array dy, size_t first, size_t end, size_t out)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct bias_sum b = {perta_cpu_at(cpu, dy), first, end, out, perta_cpu_at(cpu, dbias)};
    perta_cpu_share_out(cpu, (out + BIAS_COLUMNS - 1) / BIAS_COLUMNS, (end - first) * BIAS_COLUMNS,
                        sum_columns, &b);
}
