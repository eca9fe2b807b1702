#include "estimators/backprop/statistic.h"

#include <math.h>
#include <string.h>

size_t perta_statistic_floats(size_t block_floats, bool meansq)
{
    return block_floats * (meansq ? 3 : 1);
}

void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, float *memory)
{
    s->block_floats = block_floats;
    s->sum = memory;
    s->square = s->meansq ? memory + block_floats : NULL;
    s->one = s->meansq ? memory + 2 * block_floats : NULL;
}

size_t perta_statistic_rows(const struct perta_statistic *s, size_t n_rows, size_t n_cols)
{
    size_t rows = s->block_floats / n_cols;
    return rows < n_rows ? rows : n_rows;
}

void perta_statistic_begin(struct perta_statistic *s, size_t n)
{
    memset(s->sum, 0, n * sizeof *s->sum);
    if (s->square)
        memset(s->square, 0, n * sizeof *s->square);
}

float *perta_statistic_target(struct perta_statistic *s, size_t n)
{
    if (!s->square)
        return s->sum;
    memset(s->one, 0, n * sizeof *s->one);
    return s->one;
}

void perta_statistic_sample(struct perta_statistic *s, size_t n)
{
    if (!s->square)
        return;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        s->sum[i] += s->one[i];
        s->square[i] += s->one[i] * s->one[i];
    }
}

/* False: not all of it is finite. */
static bool divide(float *x, size_t n, float by)
{
    unsigned bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad)
    for (size_t i = 0; i < n; i++) {
        x[i] /= by;
        bad |= (unsigned)!isfinite(x[i]);
    }
    return !bad;
}

/* x (n): the mean, over samples, of what stands at first.. of a tensor. */
static int write_mean(const struct perta_statistic *s, struct perta_importance_out *out, float *x,
                      const char *of, const char *name, uint64_t first, size_t n,
                      struct perta_err *err)
{
    size_t i = 0;
    if (divide(x, n, (float)s->n_samples))
        return perta_importance_write(out, name, first, x, n, err);
    while (isfinite(x[i]))
        i++;
    return perta_fail(err, PERTA_EINPUT,
                      "tensor %s, element %llu: the mean %s over all samples is not a finite float32",
                      name, (unsigned long long)(first + i), of);
}

int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err)
{
    int rc = s->mean ? write_mean(s, s->mean, s->sum, "gradient", name, first, n, err) : 0;
    if (s->meansq && !rc)
        rc = write_mean(s, s->meansq, s->square, "squared gradient", name, first, n, err);
    return rc;
}

int perta_statistic_linear(struct perta_statistic *s, const char *name,
                           const struct perta_store *x, const struct perta_store *dy,
                           const struct perta_segments *segments, float *room,
                           struct perta_err *err)
{
    size_t out = dy->width, in = x->width, block = perta_statistic_rows(s, out, in);
    int rc = 0;
    for (size_t r = 0; r < out && !rc; r += block) {
        size_t rows = out - r < block ? out - r : block;
        if (s->square)
            perta_statistic_begin(s, rows * in);
        for (size_t i = 0; i < segments->n && !rc; i++) {
            size_t first = segments->starts[i], n = segments->starts[i + 1] - first;
            struct perta_rows xs, dys;
            rc = perta_store_get(x, first, n, 0, in, room, &xs, err);
            if (!rc)
                rc = perta_store_get(dy, first, n, r, rows, room + segments->longest * in, &dys,
                                     err);
            if (!rc)
                rc = perta_gemm_run(s->gemm, rows, in, n,
                                    perta_transposed(perta_matrix(dys.data, dys.stride)),
                                    perta_matrix(xs.data, xs.stride),
                                    s->square ? s->one : s->sum, in, !s->square && i, err);
            perta_statistic_sample(s, rows * in);
        }
        if (!rc)
            rc = perta_statistic_end(s, name, r * in, rows * in, err);
    }
    return rc;
}
