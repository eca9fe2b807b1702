#include "estimators/passes/measures.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#define LEAST_VARIANCE 1e-6

static double exact_memorization(const struct perta_head *h, size_t first, size_t end)
{
    size_t right = 0;
    for (size_t i = first; i < end; i++)
        right += h->best[i] == h->target[i];
    return end == first ? (double)NAN : (double)right / (double)(end - first);
}

static double extraction_strength(const struct perta_head *h, size_t first, size_t end)
{
    size_t from = end;
    while (from > first && h->best[from - 1] == h->target[from - 1])
        from--;
    if (from == end && end > first)
        from = end - 1; /* at least 1 / n */
    return end == first ? 0 : 1 - (double)(from - first) / (double)(end - first);
}

/* The log probability of label i. */
static double log_probability(const struct perta_head *h, size_t i)
{
    return (double)h->logit[i] - (double)h->most[i] - log(h->sums[i]);
}

/* The same, less its mean over the model's distribution, and divided by its standard deviation.
 * Mean and variance are those of d = logit - most, of which it differs by the log of the sum. */
static double normalised(const struct perta_head *h, size_t i)
{
    double mean = h->moments[2 * i] / h->sums[i];
    double variance = h->moments[2 * i + 1] / h->sums[i] - mean * mean;
    double d = (double)h->logit[i] - (double)h->most[i];
    return (d - mean) / sqrt(fmax(variance, LEAST_VARIANCE));
}

static int by_value(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Minus the mean of the lowest values (n), which are sorted. */
static double lowest(double *values, size_t n)
{
    size_t share = (size_t)((double)n * PERTA_MIN_K), k = 0;
    double sum = 0;
    qsort(values, n, sizeof *values, by_value);
    while (k < n && (!k || k < share))
        sum -= values[k++];
    return sum / (double)k;
}

int perta_measures_of(const struct perta_head *h, uint64_t sample, struct perta_measures *m,
                      struct perta_err *err)
{
    size_t first = h->starts[sample], end = h->starts[sample + 1] - 1, n = end - first;
    *m = (struct perta_measures){exact_memorization(h, first, end),
                                 extraction_strength(h, first, end), 0, 0};
    if (!n)
        return 0;
    double *values = calloc(n, sizeof *values);
    if (!values)
        return perta_fail_sys(err, ENOMEM, "labels");
    for (size_t i = 0; i < n; i++)
        values[i] = log_probability(h, first + i);
    m->min_k = lowest(values, n);
    for (size_t i = 0; i < n; i++)
        values[i] = normalised(h, first + i);
    m->min_k_plus_plus = lowest(values, n);
    free(values);
    return 0;
}
