/* Workers: every piece runs once, the first error in order is returned, and products do not depend
 * on the number of workers. */
#include "stream/workers.h"

#include <stdatomic.h>

#include "tests/unit.h"

static struct perta_err err;

#define N_PIECES 500

struct job {
    atomic_uint runs[N_PIECES]; /* how often each piece ran */
    atomic_uint workers;        /* bit mask of the workers that took part */
    size_t bad;                 /* pieces from this one on fail */
};

static int run_piece(void *ctx, unsigned worker, size_t i, struct perta_err *e)
{
    struct job *job = ctx;
    atomic_fetch_add(&job->runs[i], 1);
    atomic_fetch_or(&job->workers, 1u << worker);
    return i >= job->bad ? perta_fail(e, PERTA_EINPUT, "piece %zu", i) : 0;
}

static const unsigned counts[] = {1, 2, 3, 5, 16};

START_TEST(every_piece_runs_once)
{
    struct perta_workers *workers;
    const size_t sizes[] = {0, 1, 2, 7, N_PIECES};
    uint64_t taken = 0;
    ck_assert_ok(perta_workers_open(counts[_i], &workers, &err));
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct job job = {.bad = SIZE_MAX};
        ck_assert_ok(perta_workers_run(workers, sizes[s], run_piece, &job, &err));
        for (size_t i = 0; i < N_PIECES; i++)
            ck_assert_uint_eq(job.runs[i], i < sizes[s]);
        ck_assert_uint_eq(job.workers >> counts[_i], 0);
    }
    for (unsigned w = 0; w < perta_workers_count(workers); w++)
        taken += perta_workers_taken(workers, w);
    ck_assert_uint_eq(taken, 1 + 2 + 7 + N_PIECES);
    perta_workers_close(workers);
}
END_TEST

START_TEST(the_first_error_is_told)
{
    struct perta_workers *workers;
    ck_assert_ok(perta_workers_open(counts[_i], &workers, &err));
    for (size_t bad = 0; bad < N_PIECES; bad += 61) {
        struct job job = {.bad = bad};
        struct perta_err e = {0};
        char want[32];
        snprintf(want, sizeof want, "piece %zu", bad);
        ck_assert_int_eq(perta_workers_run(workers, N_PIECES, run_piece, &job, &e), PERTA_EINPUT);
        ck_assert_str_eq(e.msg, want);
        for (size_t i = 0; i < N_PIECES; i++) /* all pieces before it were begun */
            ck_assert(i > bad ? job.runs[i] <= 1 : job.runs[i] == 1);
        struct job after = {.bad = SIZE_MAX};
        ck_assert_ok(perta_workers_run(workers, 9, run_piece, &after, &err));
    }
    perta_workers_close(workers);
}
END_TEST

START_TEST(none_need_be_used)
{
    struct perta_workers *workers;
    ck_assert_ok(perta_workers_open(3, &workers, &err));
    perta_workers_close(workers);
    perta_workers_close(NULL);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_loop_test(tests, every_piece_runs_once, 0, sizeof counts / sizeof *counts);
    tcase_add_loop_test(tests, the_first_error_is_told, 0, sizeof counts / sizeof *counts);
    tcase_add_test(tests, none_need_be_used);
    return run_suite("workers", tests);
}
