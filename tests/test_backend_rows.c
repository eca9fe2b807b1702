/* Operations on rows: every backend gives the same bits, and those that plain loops here give. */
#include "tests/backends.h"

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 300, .rows = 300, .longest = 300});
}

#define ROWS_H 33

static const uint32_t gathered[] = {4, 0, 4, 2}, scattered[] = {4, 0, 3, 2},
                      added[] = {4, UINT32_MAX, 4, 2};

static const float by_row[] = {2, 0, -0.3f, 1, 1e-30f};

static void rows_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    size_t n = x->n;
    struct perta_array in = input(be, o, x->f, n);
    struct perta_array zeroed = output(be, o, "zeroed", F32, NULL, n);
    struct perta_array copied = output(be, o, "copied", F32, NULL, n);
    struct perta_array sum = output(be, o, "sum", F32, x->f, n);
    struct perta_array some = output(be, o, "gathered", F32, NULL, 4 * ROWS_H);
    struct perta_array put = output(be, o, "scattered", F32, NULL, n);
    struct perta_array add = output(be, o, "added", F32, x->f, n);
    struct perta_array scaled = output(be, o, "scaled", F32, x->f, n);
    struct perta_array rows = output(be, o, "scaled rows", F32, x->f, n);
    begin(be);
    be->ops->scale(be, scaled, 0.7f, n - 1);
    be->ops->scale_rows(be, rows, by_row, 5, ROWS_H);
    be->ops->zero(be, zeroed, n - 1);
    be->ops->copy(be, perta_array_at(copied, 1), in, n - 1);
    be->ops->add(be, sum, in, n);
    be->ops->gather(be, some, in, gathered, 4, ROWS_H);
    be->ops->scatter(be, put, in, scattered, 4, ROWS_H);
    be->ops->scatter_add(be, add, in, added, 4, ROWS_H);
}

START_TEST(rows_of_arrays)
{
    struct pair x = pair(5 * ROWS_H, 1);
    struct outputs o[N_BACKENDS];
    run_all(rows_run, &x, o);
    for (size_t i = 0; i < o[ONE].n; i++)
        same(o, o[ONE].of[i].name);
    const double *zeroed = values(&o[ONE], "zeroed"), *some = values(&o[ONE], "gathered");
    const double *added_to = values(&o[ONE], "added"), *all = values(&o[ONE], "scaled");
    const double *rows = values(&o[ONE], "scaled rows");
    ck_assert(zeroed[x.n - 2] == 0 && zeroed[x.n - 1] != 0);
    ck_assert(some[2 * ROWS_H] == x.d[4 * ROWS_H]);
    ck_assert(added_to[4 * ROWS_H] == (double)(x.f[4 * ROWS_H] + x.f[0] + x.f[2 * ROWS_H]));
    ck_assert(added_to[0] == x.d[0]);
    for (size_t i = 0; i < x.n; i++) {
        ck_assert(all[i] == (double)(x.f[i] * (i < x.n - 1 ? 0.7f : 1)));
        ck_assert(rows[i] == (double)(x.f[i] * by_row[i / ROWS_H]));
    }
    drop_all(o);
    release(x);
}
END_TEST

/* ---- clamped ---- */

#define LIMIT 0.5f

static void clamp_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    struct perta_array in = input(be, o, x[0].f, x[0].n);
    struct perta_array clamped = output(be, o, "clamped", F32, x[0].f, x[0].n);
    struct perta_array dx = output(be, o, "dx", F32, x[1].f, x[1].n);
    begin(be);
    be->ops->clamp_forward(be, clamped, LIMIT, x[0].n - 1);
    be->ops->clamp_backward(be, dx, in, LIMIT, x[0].n - 1);
}

/* At the limits themselves, the gradient goes on, as in PyTorch. */
START_TEST(clamped_rows)
{
    struct pair x[2] = {pair(5 * ROWS_H, 1), pair(5 * ROWS_H, 2)};
    struct outputs o[N_BACKENDS];
    x[0].f[0] = LIMIT;
    x[0].f[1] = -LIMIT;
    x[0].f[x[0].n - 1] = 3;
    run_all(clamp_run, x, o);
    same(o, "clamped");
    same(o, "dx");
    const double *clamped = values(&o[ONE], "clamped"), *dx = values(&o[ONE], "dx");
    size_t outside = 0;
    ck_assert(clamped[x[0].n - 1] == 3);
    for (size_t i = 0; i < x[0].n - 1; i++) {
        bool inside = fabsf(x[0].f[i]) <= LIMIT;
        outside += !inside;
        ck_assert(clamped[i] == (double)(inside ? x[0].f[i] : copysignf(LIMIT, x[0].f[i])));
        ck_assert(dx[i] == (double)(inside ? x[1].f[i] : 0));
    }
    ck_assert(outside > 10 && outside < x[0].n - 10);
    drop_all(o);
    release(x[0]);
    release(x[1]);
}
END_TEST

/* ---- with factors ---- */

static const float factors[] = {0.3f, 7, -1.7f, 1e-3f};

static void scaled_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct pair *x = ctx;
    size_t n = 4 * x[0].n / 5;
    struct perta_array a = input(be, o, x[0].f, x[0].n), b = input(be, o, x[1].f, x[1].n);
    struct perta_array add = output(be, o, "added", F32, x[2].f, x[2].n);
    struct perta_array by_1 = output(be, o, "by 1", F32, x[2].f, x[2].n);
    struct perta_array plain = output(be, o, "plain", F32, x[2].f, x[2].n);
    struct perta_array sum = output(be, o, "sum", F32, x[2].f, n);
    struct perta_array product = output(be, o, "product", F32, NULL, n);
    struct perta_array in_place = output(be, o, "in place", F32, x[0].f, n);
    struct perta_array dots = output(be, o, "dots", F32, NULL, 4);
    size_t H = x[0].n / 5;
    begin(be);
    be->ops->scatter_add_scaled(be, add, a, added, factors, 4, H);
    be->ops->scatter_add_scaled(be, by_1, a, added, NULL, 4, H);
    be->ops->scatter_add(be, plain, a, added, 4, H);
    be->ops->add_scaled(be, sum, a, 0.3f, n);
    be->ops->multiply_rows(be, product, a, b, 4, H);
    be->ops->multiply_rows(be, in_place, in_place, b, 4, H);
    be->ops->row_dots(be, dots, a, b, 4, H);
}

/* Rows longer than what a worker adds, and a short one. */
START_TEST(rows_with_factors)
{
    const size_t H = _i ? 1301 : 3;
    const struct pair x[] = {pair(5 * H, 1), pair(5 * H, 2), pair(5 * H, 3)};
    struct outputs o[N_BACKENDS];
    run_all(scaled_run, x, o);
    for (size_t i = 0; i < o[ONE].n; i++)
        if (strcmp(o[ONE].of[i].name, "dots"))
            same(o, o[ONE].of[i].name);
    double magnitude[4] = {0};
    for (size_t k = 0; k < H; k++) {
        float first = x[2].f[4 * H + k] + 0.3f * x[0].f[k];
        ck_assert(floats(&o[ONE], "added")[4 * H + k] == first + -1.7f * x[0].f[2 * H + k]);
        ck_assert(floats(&o[ONE], "added")[k] == x[2].f[k]);
        ck_assert(floats(&o[ONE], "sum")[k] == x[2].f[k] + 0.3f * x[0].f[k]);
        ck_assert(floats(&o[ONE], "product")[k] == x[0].f[k] * x[1].f[0]);
        ck_assert(floats(&o[ONE], "product")[3 * H + k] == x[0].f[3 * H + k] * x[1].f[3]);
    }
    are_same(named(&o[ONE], "by 1"), named(&o[ONE], "plain"));
    are_same(named(&o[ONE], "in place"), named(&o[ONE], "product"));
    for (size_t i = 0; i < 4 * H; i++)
        magnitude[i / H] += 1e-9 * fabs(x[0].d[i] * x[1].d[i]); /* summed in float64 */
    for (size_t i = 0; i < 4; i++) {
        double want = dot(x[0].d + i * H, x[1].d + i * H, H);
        magnitude[i] += fabs(want);
        ck_assert_double_le(fabs(values(&o[ONE], "dots")[i] - want), 1.01 * UNIT * magnitude[i]);
    }
    within(o, "dots", 2, magnitude);
    drop_all(o);
    for (size_t i = 0; i < 3; i++)
        release(x[i]);
}
END_TEST

/* ---- blocks of columns ---- */

struct columns {
    size_t n, width, first, block, stride, n_blocks;
};

static const struct columns cuts[] = {
    {31, 40, 8, 12, 12, 1},  /* a linear's rows in the middle */
    {257, 12, 1, 1, 2, 6},   /* every other one, to the last */
    {1, 7, 0, 7, 7, 1},      /* all */
    {5, 300, 3, 20, 60, 5},  /* of groups: query, key and value of each */
    {1001, 97, 90, 7, 7, 1}, /* the last ones */
};

static void columns_run(struct perta_backend *be, const void *ctx, struct outputs *o)
{
    const struct columns *c = ctx;
    size_t whole = c->n * c->width, part = c->n * c->n_blocks * c->block;
    struct pair x = pair(whole, 1), y = pair(part, 2), z = pair(whole, 3);
    struct perta_array from = input(be, o, x.f, whole), narrow = input(be, o, y.f, part);
    struct perta_array some = output(be, o, "some", F32, NULL, part);
    struct perta_array joined = output(be, o, "joined", F32, z.f, whole);
    struct perta_array again = output(be, o, "again", F32, NULL, part);
    begin(be);
    be->ops->split(be, some, from, c->n, c->width, c->first, c->block, c->stride, c->n_blocks);
    be->ops->join(be, joined, narrow, c->n, c->width, c->first, c->block, c->stride, c->n_blocks);
    be->ops->split(be, again, joined, c->n, c->width, c->first, c->block, c->stride, c->n_blocks);
    release(x);
    release(y);
    release(z);
}

START_TEST(columns)
{
    const struct columns *c = &cuts[_i];
    size_t whole = c->n * c->width, part = c->n * c->n_blocks * c->block, at = 0;
    struct pair x = pair(whole, 1), y = pair(part, 2), z = pair(whole, 3);
    struct outputs o[N_BACKENDS];
    run_all(columns_run, c, o);
    same(o, "some");
    same(o, "joined");
    same(o, "again");
    for (size_t t = 0; t < c->n; t++)
        for (size_t b = 0; b < c->n_blocks; b++)
            for (size_t i = 0; i < c->block; i++, at++) {
                size_t in_whole = t * c->width + c->first + b * c->stride + i;
                if (values(&o[ONE], "some")[at] != x.d[in_whole] ||
                    values(&o[ONE], "joined")[in_whole] != y.d[at] ||
                    values(&o[ONE], "again")[at] != y.d[at])
                    ck_abort_msg("block %zu, column %zu of row %zu", b, i, t);
                z.d[in_whole] = y.d[at];
            }
    for (size_t i = 0; i < whole; i++) /* the others stay */
        if (values(&o[ONE], "joined")[i] != z.d[i])
            ck_abort_msg("element %zu is overwritten", i);
    drop_all(o);
    release(x);
    release(y);
    release(z);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_test(tests, rows_of_arrays);
    tcase_add_test(tests, clamped_rows);
    tcase_add_loop_test(tests, rows_with_factors, 0, 2);
    tcase_add_loop_test(tests, columns, 0, sizeof cuts / sizeof *cuts);
    return run_suite("backend_rows", tests);
}
