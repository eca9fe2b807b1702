#include "estimators/passes/statistic.h"

#include <math.h>

/* ---- memory ---- */

uint64_t perta_statistic_bytes(size_t block_floats, bool meansq, bool parts)
{
    return (block_floats * (meansq ? parts ? 5 : 4 : 2) + PERTA_MEANS) * sizeof(float);
}

uint64_t perta_statistic_norms_bytes(size_t block_floats, size_t n_tiles, uint64_t n_samples,
                                     bool parts)
{
    return n_tiles * n_samples * sizeof(double) + (parts ? block_floats * sizeof(float) : 0);
}

/* Without importance there are no sums, squares and means. */
static void lay_out_norms(struct perta_statistic *s, bool parts, struct perta_array memory)
{
    s->partial = memory;
    if (parts)
        s->sample = perta_array_at(memory, 2 * s->n_tiles * s->n_samples);
}

void perta_statistic_lay_out(struct perta_statistic *s, size_t block_floats, bool parts,
                             struct perta_array memory, float *host)
{
    const struct perta_array none = {0};
    bool squares = s->meansq != NULL;
    s->block_floats = block_floats;
    s->host = host;
    if (s->norms) {
        lay_out_norms(s, parts, memory);
        return;
    }
    s->sums = memory;
    s->squares = squares ? perta_array_at(memory, 2 * block_floats) : none;
    memory = perta_array_at(memory, (squares ? 4 : 2) * block_floats);
    s->sample = squares && parts ? memory : none;
    s->means = squares && parts ? perta_array_at(memory, block_floats) : memory;
}

size_t perta_statistic_rows(size_t block_floats, size_t n_rows, size_t n_cols)
{
    size_t rows = block_floats / n_cols;
    return rows < n_rows ? rows : n_rows;
}

/* ---- a block ---- */

void perta_statistic_begin(struct perta_statistic *s, size_t n)
{
    if (s->norms) {
        s->be->ops->zero(s->be, s->partial, 2 * s->n_tiles * s->n_samples);
        return;
    }
    s->be->ops->zero(s->be, s->sums, 2 * n);
    if (perta_array_is(s->squares))
        s->be->ops->zero(s->be, s->squares, 2 * n);
}

struct perta_gradient perta_statistic_gradient(const struct perta_statistic *s, size_t rows,
                                               size_t in)
{
    return (struct perta_gradient){.rows = rows,
                                   .in = in,
                                   .sums = s->sums,
                                   .squares = s->squares,
                                   .norms = s->partial,
                                   .n_samples = s->n_samples,
                                   .sample = s->sample};
}

/* A vector is copied to the host, where its squares are summed. */
static int add_to_norms(struct perta_statistic *s, const char *name, uint64_t sample,
                        struct perta_array d, size_t n, struct perta_err *err)
{
    double *squares = perta_norms_of(s->norms, name) + sample;
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i += PERTA_MEANS) {
        size_t some = n - i < PERTA_MEANS ? n - i : PERTA_MEANS;
        s->be->ops->get(s->be, perta_array_at(d, i), s->host, some * sizeof *s->host);
        rc = perta_backend_wait(s->be, err);
        for (size_t k = 0; k < some && !rc; k++)
            *squares += (double)s->host[k] * (double)s->host[k];
    }
    return rc;
}

int perta_statistic_add_vector(struct perta_statistic *s, const char *name, uint64_t sample,
                               struct perta_array d, size_t n, struct perta_array sums,
                               struct perta_array squares, struct perta_err *err)
{
    if (s->norms)
        return add_to_norms(s, name, sample, d, n, err);
    s->be->ops->accumulate(s->be, sums, squares, d, n);
    return 0;
}

/* Add a block's sums of squares, tile after tile. */
static int add_partial(struct perta_statistic *s, const char *name, struct perta_err *err)
{
    double *squares = perta_norms_of(s->norms, name), *some = s->norms->some;
    uint64_t n = s->n_samples;
    int rc = 0;
    for (size_t tile = 0; tile < s->n_tiles && !rc; tile++) {
        s->be->ops->get(s->be, perta_array_at(s->partial, 2 * tile * n), some, n * sizeof *some);
        rc = perta_backend_wait(s->be, err);
        for (uint64_t i = 0; i < n && !rc; i++)
            squares[i] += some[i];
    }
    return rc;
}

static int not_finite(const struct perta_statistic *s, const char *of, const char *name,
                      uint64_t first, struct perta_err *err)
{
    size_t i = 0;
    while (isfinite(s->host[i]))
        i++;
    return perta_fail(
        err, PERTA_EINPUT,
        "tensor %s, element %llu: the mean %s over all samples is not a finite float32", name,
        (unsigned long long)(first + i), of);
}

/* Write the means of sums (n) over samples as elements first.. of a tensor. */
static int write_means(const struct perta_statistic *s, struct perta_importance_out *out,
                       struct perta_array sums, const char *of, const char *name, uint64_t first,
                       size_t n, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < n && !rc; i += PERTA_MEANS) {
        size_t some = n - i < PERTA_MEANS ? n - i : PERTA_MEANS;
        bool finite = true;
        s->be->ops->mean(s->be, s->means, perta_array_at(sums, 2 * i), (double)s->n_samples, some,
                         &finite);
        s->be->ops->get(s->be, s->means, s->host, some * sizeof *s->host);
        rc = perta_backend_wait(s->be, err);
        if (!rc)
            rc = finite ? perta_importance_write(out, name, first + i, s->host, some, err)
                        : not_finite(s, of, name, first + i, err);
    }
    return rc;
}

int perta_statistic_write(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                          struct perta_array sums, struct perta_array squares,
                          struct perta_err *err)
{
    int rc = s->mean ? write_means(s, s->mean, sums, "gradient", name, first, n, err) : 0;
    if (s->meansq && !rc)
        rc = write_means(s, s->meansq, squares, "squared gradient", name, first, n, err);
    return rc;
}

int perta_statistic_end(struct perta_statistic *s, const char *name, uint64_t first, size_t n,
                        struct perta_err *err)
{
    if (s->norms)
        return add_partial(s, name, err);
    return perta_statistic_write(s, name, first, n, s->sums, s->squares, err);
}
