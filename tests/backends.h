/* backends.h - one operation after another on every backend, with the same inputs: what comes out
 * is compared, bit for bit or within a bound. */
#ifndef PERTA_TESTS_BACKENDS_H
#define PERTA_TESTS_BACKENDS_H

#include "estimators/compute/cpu.h"
#include "estimators/compute/scalar.h"
#include "tests/gradient.h"

static struct perta_err err;

/* ---- backends ---- */

enum { REFERENCE, ONE, THREE, N_BACKENDS }; /* THREE: the CPU's with as many workers */
static struct perta_backend *backends[N_BACKENDS];
static struct perta_workers *workers[N_BACKENDS];

static inline void open_backends(const struct perta_cpu_needs *needs)
{
    ck_assert_ok(perta_scalar_open(&backends[REFERENCE], &err));
    for (int i = ONE; i < N_BACKENDS; i++) {
        ck_assert_ok(perta_workers_open(i == ONE ? 1 : 3, &workers[i], &err));
        ck_assert_ok(perta_cpu_open(needs, workers[i], &backends[i], &err));
    }
}

static inline void close_backends(void)
{
    for (int i = 0; i < N_BACKENDS; i++) {
        perta_backend_close(backends[i]);
        perta_workers_close(workers[i]);
    }
}

/* ---- what goes in and comes out ---- */

enum kind { F32, F64, I32 };

struct output {
    const char *name;
    enum kind kind;
    size_t n;
    struct perta_array array;
    uint8_t *before, *bytes; /* what stood there, what stands there now */
    double *values;          /* (n): bytes */
};

struct outputs {
    size_t n, n_buffers;
    struct output of[9];
    uint32_t buffers[32]; /* to be freed */
};

/* Of inputs the magnitudes are put: so terms add up, and bounds are what comes out. */
static bool magnitudes;
/* Operations begin after a failure. */
static bool broken;

static inline size_t width_of(enum kind kind)
{
    return kind == F64 ? 8 : 4;
}

static inline struct perta_array buffer(struct perta_backend *be, struct outputs *o, size_t bytes)
{
    struct perta_array a = {0};
    ck_assert_uint_lt(o->n_buffers, sizeof o->buffers / sizeof *o->buffers);
    ck_assert_ok(be->ops->alloc(be, bytes, &a.buffer, &err));
    o->buffers[o->n_buffers++] = a.buffer;
    return a;
}

/* An input, some way into its buffer. as_is: signs stay. */
static inline struct perta_array as_is(struct perta_backend *be, struct outputs *o,
                                       const float *from, size_t n)
{
    struct perta_array a = perta_array_at(buffer(be, o, (n + 16) * sizeof *from), 16);
    be->ops->put(be, a, from, n * sizeof *from);
    return a;
}

static inline struct perta_array input(struct perta_backend *be, struct outputs *o,
                                       const float *from, size_t n)
{
    float *copy = alloc(n * sizeof *copy);
    for (size_t i = 0; i < n; i++)
        copy[i] = magnitudes ? fabsf(from[i]) : from[i];
    struct perta_array a = as_is(be, o, copy, n);
    free(copy);
    return a;
}

/* An output of n numbers; from: what stands there first, NULL: numbers that must not count. */
static inline struct perta_array output(struct perta_backend *be, struct outputs *o,
                                        const char *name, enum kind kind, const void *from,
                                        size_t n)
{
    struct output *to = &o->of[o->n++];
    size_t bytes = n * width_of(kind);
    ck_assert_uint_le(o->n, sizeof o->of / sizeof *o->of);
    *to = (struct output){name, kind, n, {0}, alloc(bytes), alloc(bytes), alloc(n * 8)};
    to->array = buffer(be, o, bytes);
    if (from)
        memcpy(to->before, from, bytes);
    for (size_t i = 0; !from && i < bytes; i++)
        to->before[i] = (uint8_t)(0x40 + i % 7);
    for (size_t i = 0; from && kind == F32 && magnitudes && i < n; i++)
        ((float *)(void *)to->before)[i] = fabsf(((const float *)from)[i]);
    be->ops->put(be, to->array, to->before, bytes);
    return to->array;
}

static inline double value_of(const struct output *o, size_t i)
{
    const void *at = o->bytes + i * width_of(o->kind);
    if (o->kind == F64)
        return *(const double *)at;
    return o->kind == F32 ? (double)*(const float *)at : *(const int32_t *)at;
}

/* Inputs are there: operations follow. */
static inline void begin(struct perta_backend *be)
{
    if (broken)
        be->rc = perta_fail(&be->err, PERTA_ECHECK, "on purpose");
}

static inline const struct output *named(const struct outputs *o, const char *name)
{
    for (size_t i = 0; i < o->n; i++)
        if (!strcmp(o->of[i].name, name))
            return &o->of[i];
    ck_abort_msg("no output %s", name);
}

static inline const double *values(const struct outputs *o, const char *name)
{
    return named(o, name)->values;
}

/* ---- runs ---- */

/* Puts inputs, calls begin(), then operations. */
typedef void run(struct perta_backend *be, const void *ctx, struct outputs *o);

static inline void run_on(struct perta_backend *be, run *f, const void *ctx, struct outputs *o)
{
    *o = (struct outputs){0};
    f(be, ctx, o);
    for (size_t i = 0; i < o->n; i++)
        be->ops->get(be, o->of[i].array, o->of[i].bytes, o->of[i].n * width_of(o->of[i].kind));
    int rc = perta_backend_wait(be, &err);
    ck_assert_msg(rc == (broken ? PERTA_ECHECK : 0), "%s: %s", be->ops->name, err.msg);
    err = (struct perta_err){0};
    for (size_t i = 0; i < o->n; i++)
        for (size_t k = 0; k < o->of[i].n; k++)
            o->of[i].values[k] = value_of(&o->of[i], k);
    for (size_t i = 0; i < o->n_buffers; i++)
        be->ops->free(be, o->buffers[i]);
}

static inline void drop(struct outputs *o)
{
    for (size_t i = 0; i < o->n; i++) {
        free(o->of[i].before);
        free(o->of[i].bytes);
        free(o->of[i].values);
    }
    *o = (struct outputs){0};
}

/* Check writes to a pipe for each of its asserts, so elements are compared without. */
static inline void are_same(const struct output *a, const struct output *b)
{
    size_t width = width_of(a->kind);
    for (size_t i = 0; i < a->n; i++)
        if (memcmp(a->bytes + i * width, b->bytes + i * width, width))
            ck_abort_msg("%s[%zu]: %.17g, not %.17g", a->name, i, a->values[i], b->values[i]);
}

/* After a failure nothing is written. */
static inline void run_broken(run *f, const void *ctx)
{
    broken = true;
    for (int i = 0; i < N_BACKENDS; i++) {
        struct outputs o;
        run_on(backends[i], f, ctx, &o);
        for (size_t k = 0; k < o.n; k++)
            ck_assert_msg(
                !memcmp(o.of[k].bytes, o.of[k].before, o.of[k].n * width_of(o.of[k].kind)),
                "%s: %s is written after a failure", backends[i]->ops->name, o.of[k].name);
        drop(&o);
    }
    broken = false;
}

/* On the reference, and the CPU's with one worker and three, which give the same bits. */
static inline void run_all(run *f, const void *ctx, struct outputs o[N_BACKENDS])
{
    run_broken(f, ctx);
    for (int i = 0; i < N_BACKENDS; i++)
        run_on(backends[i], f, ctx, &o[i]);
    for (size_t i = 0; i < o[ONE].n; i++)
        are_same(&o[THREE].of[i], &o[ONE].of[i]);
}

static inline void drop_all(struct outputs o[N_BACKENDS])
{
    for (int i = 0; i < N_BACKENDS; i++)
        drop(&o[i]);
}

/* What the reference makes of the inputs' magnitudes. */
static inline void run_magnitudes(run *f, const void *ctx, struct outputs *o)
{
    magnitudes = true;
    run_on(backends[REFERENCE], f, ctx, o);
    magnitudes = false;
}

/* ---- comparisons of the CPU's with the reference's ---- */

static inline void same(const struct outputs o[N_BACKENDS], const char *name)
{
    are_same(named(&o[ONE], name), named(&o[REFERENCE], name));
}

#define UNIT 0x1p-24 /* a float32 operation rounds by so much of its result */

/* |difference| of element i <= units * UNIT * scale[i]. 1.01: for products of errors. */
static inline void within(const struct outputs o[N_BACKENDS], const char *name, double units,
                          const double *scale)
{
    const struct output *have = named(&o[ONE], name), *want = named(&o[REFERENCE], name);
    for (size_t i = 0; i < have->n; i++) {
        double bound = 1.01 * units * UNIT * scale[i];
        if (!(fabs(have->values[i] - want->values[i]) <= bound))
            ck_abort_msg("%s[%zu]: %.9g, not %.9g to %.3g", name, i, have->values[i],
                         want->values[i], bound);
    }
}

/* ---- both backends against double ---- */

static inline const float *floats(const struct outputs *o, const char *name)
{
    return (const float *)(const void *)named(o, name)->bytes;
}

static inline void both_are(const struct outputs o[N_BACKENDS], const char *name,
                            const double *want)
{
    are_close(name, floats(&o[REFERENCE], name), want, named(&o[ONE], name)->n);
    are_close(name, floats(&o[ONE], name), want, named(&o[ONE], name)->n);
}

/* What name has become, less what stood there: the gradient of f by x. So many elements are looked
 * at, about. */
#define LOOKED_AT 100

static inline void both_gradients(const struct outputs o[N_BACKENDS], const char *name, bool adds,
                                  double *x, function *f, void *ctx)
{
    size_t n = named(&o[ONE], name)->n, every = n / LOOKED_AT + 1;
    double *want = slopes(x, n, every, f, ctx);
    for (int b = REFERENCE; b <= ONE; b++) {
        const struct output *d = named(&o[b], name);
        const float *after = floats(&o[b], name), *before = (const float *)(const void *)d->before;
        float *difference = alloc(d->n * sizeof *difference);
        for (size_t i = 0; i < d->n; i++)
            difference[i] = after[i] - (adds ? before[i] : 0);
        has_slopes(name, difference, want, n, every);
        free(difference);
    }
    free(want);
}

#endif
