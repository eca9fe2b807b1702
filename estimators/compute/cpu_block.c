#include <math.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

/* ---- rotary positions (Su et al. 2021) ---- */

struct rope {
    float *x;
    const struct perta_place *places;
    const struct perta_rotation *rotation;
    size_t n_heads, D;
    float direction;
};

static void rotate_rows(const void *args, size_t from, size_t to)
{
    const struct rope *r = args;
    const struct perta_rotation *how = r->rotation;
    size_t half = how->rotated / 2;
    size_t step = how->interleaved ? 2 : 1, other = how->interleaved ? 1 : half;
    for (size_t t = from; t < to; t++)
        for (size_t i = 0; i < half; i++) {
            const struct perta_place *place = r->places + t;
            const float *inv_freq = place->is_long ? how->long_inv_freq : how->inv_freq;
            float factor = place->is_long ? how->long_factor : how->factor;
            float angle = (float)place->position * inv_freq[i];
            float c = cosf(angle) * factor, s = r->direction * sinf(angle) * factor;
            for (size_t h = 0; h < r->n_heads; h++) {
                float *pair = r->x + (t * r->n_heads + h) * r->D + how->first + step * i;
                float a = pair[0], b = pair[other];
                pair[0] = a * c - b * s;
                pair[other] = b * c + a * s;
            }
        }
}

static void rotate(struct perta_backend *be, struct perta_array x, const struct rope *how, size_t T)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct rope r = *how;
    r.x = perta_cpu_at(cpu, x);
    perta_cpu_share_out(cpu, T, r.n_heads * r.D, rotate_rows, &r);
}

void perta_cpu_rope_forward(struct perta_backend *be, struct perta_array x,
                            const struct perta_place *places, const struct perta_rotation *rotation,
                            size_t T, size_t n_heads, size_t D)
{
    rotate(be, x, &(struct rope){NULL, places, rotation, n_heads, D, 1}, T);
}

void perta_cpu_rope_backward(struct perta_backend *be, struct perta_array dx,
                             const struct perta_place *places,
                             const struct perta_rotation *rotation, size_t T, size_t n_heads,
                             size_t D)
{
    rotate(be, dx, &(struct rope){NULL, places, rotation, n_heads, D, -1}, T);
}

/* ---- soft caps of logits ---- */

struct caps {
    float *x, cap;
    const float *y;
};

static void cap_some(const void *args, size_t from, size_t to)
{
    const struct caps *c = args;
    perta_row_kernels()->softcap(c->x + from, c->cap, to - from);
}

static void cap_backward_some(const void *args, size_t from, size_t to)
{
    const struct caps *c = args;
    perta_row_kernels()->softcap_backward(c->x + from, c->y + from, c->cap, to - from);
}

void perta_cpu_softcap_forward(struct perta_backend *be, struct perta_array x, float cap,
                               uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct caps c = {perta_cpu_at(cpu, x), cap, NULL};
    perta_cpu_share_out(cpu, n, 1, cap_some, &c);
}

void perta_cpu_softcap_backward(struct perta_backend *be, struct perta_array dx,
                                struct perta_array y, float cap, uint64_t n)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct caps c = {perta_cpu_at(cpu, dx), cap, perta_cpu_at(cpu, y)};
    perta_cpu_share_out(cpu, n, 1, cap_backward_some, &c);
}

/* ---- cross-entropy ---- */

struct entropy {
    const float *logits;
    float *dlogits;
    size_t row, n_rows;
    const int32_t *target;
    float *most, *of_target;
    double *sums, *moments;
    int32_t *best;
    const float *share;
};

static void entropy_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = from; i < to; i++) {
        const float *l = e->logits + i * e->n_rows;
        float high = k->largest(l, e->n_rows, e->most[i]);
        e->sums[i] = e->sums[i] * exp((double)e->most[i] - (double)high) +
                     k->sum_exponentials(l, high, e->n_rows);
        e->most[i] = high;
        size_t at = (size_t)e->target[i];
        if (at >= e->row && at < e->row + e->n_rows)
            e->of_target[i] = l[at - e->row];
    }
}

void perta_cpu_cross_entropy_forward(struct perta_backend *be, struct perta_array logits,
                                     size_t row, size_t n_rows, size_t n, const int32_t *target,
                                     struct perta_array most, struct perta_array sums,
                                     struct perta_array of_target)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct entropy e = {.logits = perta_cpu_at(cpu, logits),
                              .most = perta_cpu_at(cpu, most),
                              .sums = perta_cpu_at(cpu, sums),
                              .of_target = perta_cpu_at(cpu, of_target),
                              .row = row,
                              .n_rows = n_rows,
                              .target = target};
    perta_cpu_share_out(cpu, n, n_rows, entropy_rows, &e);
}

static void best_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    for (size_t i = from; i < to; i++) {
        const float *l = e->logits + i * e->n_rows;
        for (size_t j = 0; j < e->n_rows; j++)
            if (l[j] > e->most[i]) {
                e->most[i] = l[j];
                e->best[i] = (int32_t)(e->row + j);
            }
    }
}

void perta_cpu_best_forward(struct perta_backend *be, struct perta_array logits, size_t row,
                            size_t n_rows, size_t n, struct perta_array most,
                            struct perta_array best)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct entropy e = {.logits = perta_cpu_at(cpu, logits),
                              .most = perta_cpu_at(cpu, most),
                              .best = perta_cpu_at(cpu, best),
                              .row = row,
                              .n_rows = n_rows};
    perta_cpu_share_out(cpu, n, n_rows, best_rows, &e);
}

/* The maximum may grow by g, so that every d shrinks by g: from d to d - g. */
static void moments_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = from; i < to; i++) {
        const float *l = e->logits + i * e->n_rows;
        double *m = e->moments + 2 * i;
        float high = k->largest(l, e->n_rows, e->most[i]);
        double g = (double)high - (double)e->most[i], shrink = exp(-g);
        if (g > 0 && e->sums[i] > 0) {
            m[1] = (m[1] - 2 * g * m[0] + g * g * e->sums[i]) * shrink;
            m[0] = (m[0] - g * e->sums[i]) * shrink;
        }
        k->add_moments(m, l, high, e->n_rows);
    }
}

void perta_cpu_moments_forward(struct perta_backend *be, struct perta_array logits, size_t n_rows,
                               size_t n, struct perta_array most, struct perta_array sums,
                               struct perta_array moments)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct entropy e = {.logits = perta_cpu_at(cpu, logits),
                              .most = perta_cpu_at(cpu, most),
                              .sums = perta_cpu_at(cpu, sums),
                              .moments = perta_cpu_at(cpu, moments),
                              .n_rows = n_rows};
    perta_cpu_share_out(cpu, n, n_rows, moments_rows, &e);
}

static void entropy_backward_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = from; i < to; i++) {
        size_t at = (size_t)e->target[i];
        float share = (float)((double)e->share[i] / e->sums[i]);
        k->scaled_exponentials(e->dlogits + i * e->n_rows, e->most[i], share, e->n_rows);
        if (at >= e->row && at < e->row + e->n_rows)
            e->dlogits[i * e->n_rows + at - e->row] -= e->share[i];
    }
}

void perta_cpu_cross_entropy_backward(struct perta_backend *be, struct perta_array logits,
                                      size_t row, size_t n_rows, size_t n, const int32_t *target,
                                      struct perta_array most, struct perta_array sums,
                                      struct perta_array share)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    const struct entropy e = {.dlogits = perta_cpu_at(cpu, logits),
                              .most = perta_cpu_at(cpu, most),
                              .sums = perta_cpu_at(cpu, sums),
                              .share = perta_cpu_at(cpu, share),
                              .row = row,
                              .n_rows = n_rows,
                              .target = target};
    perta_cpu_share_out(cpu, n, n_rows, entropy_backward_rows, &e);
}
