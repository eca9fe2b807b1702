/* gradient.h - compares gradients in float32 with central differences of functions in double. */
#ifndef PERTA_TESTS_GRADIENT_H
#define PERTA_TESTS_GRADIENT_H

#include <math.h>

#include "tests/unit.h"

/* Relative to the array's norm. Most of it is float32 rounding; the central differences add
 * less. */
#define TOLERANCE 1e-5
#define STEP 1e-4

/* ---- numbers ---- */

static inline float uniform(uint64_t *seed, double from, double to)
{
    return (float)(from + (to - from) * (double)(next_random(seed) >> 11) * 0x1p-53);
}

/* n floats from -1 to 1, and the same values as double. */
struct pair {
    float *f;
    double *d;
    size_t n;
};

static inline struct pair pair(size_t n, uint64_t seed)
{
    struct pair p = {alloc(n * sizeof(float)), alloc(n * sizeof(double)), n};
    for (size_t i = 0; i < n; i++)
        p.d[i] = (double)(p.f[i] = uniform(&seed, -1, 1));
    return p;
}

static inline void release(struct pair p)
{
    free(p.f);
    free(p.d);
}

static inline void are_close(const char *what, const float *have, const double *want, size_t n)
{
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)have[i] - want[i]) * ((double)have[i] - want[i]);
        norm += want[i] * want[i];
    }
    ck_assert_msg(norm > 0, "%s: all zero", what);
    ck_assert_msg(sqrt(error / norm) < TOLERANCE, "%s: error %g", what, sqrt(error / norm));
}

/* A function to differentiate: it computes a number from ctx, which contains x. */
typedef double function(void *ctx);

static inline double slope(double *x, function *f, void *ctx)
{
    double at = *x;
    *x = at + STEP;
    double above = f(ctx);
    *x = at - STEP;
    double below = f(ctx);
    *x = at;
    return (above - below) / (2 * STEP);
}

/* The gradient of f by x (n), of every so many elements; the caller frees it. */
static inline double *slopes(double *x, size_t n, size_t every, function *f, void *ctx)
{
    double *of = alloc(((n + every - 1) / every) * sizeof *of);
    for (size_t i = 0; i < n; i += every)
        of[i / every] = slope(&x[i], f, ctx);
    return of;
}

/* Compare d (n) with want, what slopes() gives. */
static inline void has_slopes(const char *what, const float *d, const double *want, size_t n,
                              size_t every)
{
    float *have = alloc(((n + every - 1) / every) * sizeof *have);
    for (size_t i = 0; i < n; i += every)
        have[i / every] = d[i];
    are_close(what, have, want, (n + every - 1) / every);
    free(have);
}

/* Compare the gradient d (n) of f by x (n), every so many elements. */
static inline void is_gradient(const char *what, const float *d, double *x, size_t n, size_t every,
                               function *f, void *ctx)
{
    double *want = slopes(x, n, every, f, ctx);
    has_slopes(what, d, want, n, every);
    free(want);
}

static inline double dot(const double *a, const double *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

#endif
