#include <string.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

void perta_cpu_zero(struct perta_backend *be, struct perta_array to, uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (cpu)
        memset(perta_cpu_at(cpu, to), 0, n * sizeof(float));
}

void perta_cpu_copy(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (cpu)
        memcpy(perta_cpu_at(cpu, to), perta_cpu_at(cpu, from), n * sizeof(float));
}

/* Arguments of a row operation. */
struct rows {
    float *to;
    const float *from;
    const uint32_t *index;
    size_t H;
};

static void add_elems(const void *args, size_t first, size_t end)
{
    const struct rows *r = args;
    for (size_t i = first; i < end; i++)
        r->to[i] += r->from[i];
}

void perta_cpu_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                   uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct rows r = {perta_cpu_at(cpu, to), perta_cpu_at(cpu, from), NULL, 1};
    perta_cpu_share_out(cpu, n, 1, add_elems, &r);
}

struct factors {
    float *x;
    float by;          /* of every row, if rows is NULL */
    const float *rows; /* one of each */
    size_t H;
};

static void scale_some(const void *args, size_t first, size_t end)
{
    const struct factors *f = args;
    for (size_t i = first; i < end; i++) {
        float by = f->rows ? f->rows[i] : f->by;
        for (size_t k = 0; k < f->H; k++)
            f->x[i * f->H + k] *= by;
    }
}

void perta_cpu_scale(struct perta_backend *be, struct perta_array x, float by, uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct factors f = {perta_cpu_at(cpu, x), by, NULL, 1};
    perta_cpu_share_out(cpu, n, 1, scale_some, &f);
}

struct clamp {
    float *x; /* forward: clamped; backward: the gradient */
    const float *of;
    float limit;
};

static void clamp_some(const void *args, size_t first, size_t end)
{
    const struct clamp *c = args;
    for (size_t i = first; i < end; i++) {
        float x = c->x[i] > c->limit ? c->limit : c->x[i];
        c->x[i] = x < -c->limit ? -c->limit : x;
    }
}

static void clamp_backward_some(const void *args, size_t first, size_t end)
{
    const struct clamp *c = args;
    for (size_t i = first; i < end; i++)
        c->x[i] = c->of[i] >= -c->limit && c->of[i] <= c->limit ? c->x[i] : 0;
}

void perta_cpu_clamp_forward(struct perta_backend *be, struct perta_array x, float limit,
                             uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct clamp c = {perta_cpu_at(cpu, x), NULL, limit};
    perta_cpu_share_out(cpu, n, 1, clamp_some, &c);
}

void perta_cpu_clamp_backward(struct perta_backend *be, struct perta_array dx, struct perta_array x,
                              float limit, uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct clamp c = {perta_cpu_at(cpu, dx), perta_cpu_at(cpu, x), limit};
    perta_cpu_share_out(cpu, n, 1, clamp_backward_some, &c);
}

void perta_cpu_scale_rows(struct perta_backend *be, struct perta_array x, const float *by, size_t n,
                          size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct factors f = {perta_cpu_at(cpu, x), 1, by, H};
    perta_cpu_share_out(cpu, n, H, scale_some, &f);
}

static void gather_rows(const void *args, size_t first, size_t end)
{
    const struct rows *r = args;
    for (size_t i = first; i < end; i++)
        memcpy(r->to + i * r->H, r->from + r->index[i] * r->H, r->H * sizeof *r->to);
}

void perta_cpu_gather(struct perta_backend *be, struct perta_array to, struct perta_array from,
                      const uint32_t *index, size_t n, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct rows r = {perta_cpu_at(cpu, to), perta_cpu_at(cpu, from), index, H};
    perta_cpu_share_out(cpu, n, H, gather_rows, &r);
}

void perta_cpu_scatter(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       const uint32_t *index, size_t n, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    float *rows = perta_cpu_at(cpu, to);
    const float *of = perta_cpu_at(cpu, from);
    for (size_t i = 0; i < n; i++)
        memcpy(rows + index[i] * H, of + i * H, H * sizeof *rows);
}

void perta_cpu_scatter_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                           const uint32_t *index, size_t n, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    float *rows = perta_cpu_at(cpu, to);
    const float *of = perta_cpu_at(cpu, from);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; index[i] != UINT32_MAX && k < H; k++)
            rows[index[i] * H + k] += of[i * H + k];
}

/* ---- with factors ---- */

struct scaled {
    float *to;
    const float *from, *a, *b, *by;
    const uint32_t *index;
    size_t n, width;
    float factor;
};

#define COLUMNS 256 /* columns of rows that a worker adds, in the order of rows */

static void scatter_columns(const void *args, size_t first, size_t end)
{
    const struct scaled *s = args;
    size_t H = s->width, stop = end * COLUMNS < H ? end * COLUMNS : H;
    for (size_t i = 0; i < s->n; i++) {
        float *to = s->to + s->index[i] * H;
        const float *from = s->from + i * H;
        float by = s->by ? s->by[i] : 1;
        for (size_t k = first * COLUMNS; s->index[i] != UINT32_MAX && k < stop; k++)
            to[k] += by * from[k];
    }
}

void perta_cpu_scatter_add_scaled(struct perta_backend *be, struct perta_array to,
                                  struct perta_array from, const uint32_t *index, const float *by,
                                  size_t n, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct scaled s = {.to = perta_cpu_at(cpu, to),
                             .from = perta_cpu_at(cpu, from),
                             .by = by,
                             .index = index,
                             .n = n,
                             .width = H};
    perta_cpu_share_out(cpu, (H + COLUMNS - 1) / COLUMNS, n * COLUMNS, scatter_columns, &s);
}

static void add_scaled_elems(const void *args, size_t first, size_t end)
{
    const struct scaled *s = args;
    for (size_t i = first; i < end; i++)
        s->to[i] += s->factor * s->from[i];
}

void perta_cpu_add_scaled(struct perta_backend *be, struct perta_array to, struct perta_array from,
                          float by, uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct scaled s = {
        .to = perta_cpu_at(cpu, to), .from = perta_cpu_at(cpu, from), .factor = by};
    perta_cpu_share_out(cpu, n, 1, add_scaled_elems, &s);
}

static void multiply_some(const void *args, size_t first, size_t end)
{
    const struct scaled *s = args;
    for (size_t i = first; i < end; i++)
        for (size_t k = i * s->width; k < (i + 1) * s->width; k++)
            s->to[k] = s->a[k] * s->b[i];
}

void perta_cpu_multiply_rows(struct perta_backend *be, struct perta_array to, struct perta_array a,
                             struct perta_array by, size_t n, size_t H)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct scaled s = {.to = perta_cpu_at(cpu, to),
                             .a = perta_cpu_at(cpu, a),
                             .b = perta_cpu_at(cpu, by),
                             .width = H};
    perta_cpu_share_out(cpu, n, H, multiply_some, &s);
}

static void dot_rows(const void *args, size_t first, size_t end)
{
    const struct scaled *s = args;
    for (size_t i = first; i < end; i++)
        s->to[i] =
            (float)perta_row_kernels()->dot(s->a + i * s->width, s->b + i * s->width, s->width);
}

void perta_cpu_row_dots(struct perta_backend *be, struct perta_array to, struct perta_array a,
                        struct perta_array b, size_t n, size_t width)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct scaled s = {.to = perta_cpu_at(cpu, to),
                             .a = perta_cpu_at(cpu, a),
                             .b = perta_cpu_at(cpu, b),
                             .width = width};
    perta_cpu_share_out(cpu, n, width, dot_rows, &s);
}

/* ---- blocks of columns ---- */

struct columns {
    float *to;
    const float *from;
    size_t width, first, block, stride, n_blocks;
};

static void split_rows(const void *args, size_t first, size_t end)
{
    const struct columns *c = args;
    size_t narrow = c->n_blocks * c->block;
    for (size_t t = first; t < end; t++)
        for (size_t b = 0; b < c->n_blocks; b++) {
            float *to = c->to + t * narrow + b * c->block;
            const float *from = c->from + t * c->width + c->first + b * c->stride;
            for (size_t i = 0; i < c->block; i++)
                to[i] = from[i];
        }
}

static void join_rows(const void *args, size_t first, size_t end)
{
    const struct columns *c = args;
    size_t narrow = c->n_blocks * c->block;
    for (size_t t = first; t < end; t++)
        for (size_t b = 0; b < c->n_blocks; b++) {
            float *to = c->to + t * c->width + c->first + b * c->stride;
            const float *from = c->from + t * narrow + b * c->block;
            for (size_t i = 0; i < c->block; i++)
                to[i] = from[i];
        }
}

/* Share out n rows to some(). */
static void run_columns(struct perta_backend *be, struct perta_array to, struct perta_array from,
                        size_t n, const struct columns *how,
                        void (*some)(const void *args, size_t first, size_t end))
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    struct columns c = *how;
    if (!cpu)
        return;
    c.to = perta_cpu_at(cpu, to);
    c.from = perta_cpu_at(cpu, from);
    perta_cpu_share_out(cpu, n, c.n_blocks * c.block, some, &c);
}

void perta_cpu_split(struct perta_backend *be, struct perta_array to, struct perta_array from,
                     size_t n, size_t width, size_t first, size_t block, size_t stride,
                     size_t n_blocks)
{
    const struct columns how = {NULL, NULL, width, first, block, stride, n_blocks};
    run_columns(be, to, from, n, &how, split_rows);
}

void perta_cpu_join(struct perta_backend *be, struct perta_array to, struct perta_array from,
                    size_t n, size_t width, size_t first, size_t block, size_t stride,
                    size_t n_blocks)
{
    const struct columns how = {NULL, NULL, width, first, block, stride, n_blocks};
    run_columns(be, to, from, n, &how, join_rows);
}
