/* A backend's memory and its failures. */
#include "tests/backends.h"

#include <pthread.h>

static void open_all(void)
{
    open_backends(&(struct perta_cpu_needs){.widest = 1100, .rows = 300, .longest = 300});
}

/* ---- memory ---- */

START_TEST(what_the_host_shares_counts_once_it_is_uploaded)
{
    for (int b = 0; b < N_BACKENDS; b++) {
        const struct perta_backend_ops *ops = backends[b]->ops;
        float host[4] = {1, 2, 3, 4}, back[2];
        struct perta_array a = {0};
        ck_assert_ok(ops->share(backends[b], host, sizeof host, &a.buffer, &err));
        host[2] = 5;
        ops->uploaded(backends[b], perta_array_at(a, 1), 2 * sizeof *host);
        ops->get(backends[b], perta_array_at(a, 1), back, sizeof back);
        ck_assert(back[0] == 2 && back[1] == 5);
        ops->get(backends[b], perta_array_at(a, 3), back, sizeof *back);
        ck_assert(b == REFERENCE ? isnan(back[0]) : back[0] == 4);
        ops->free(backends[b], a.buffer);
        ops->free(backends[b], 0);
    }
}
END_TEST

START_TEST(a_new_buffer_is_zeros_whatever_was_freed)
{
    for (int b = 0; b < N_BACKENDS; b++) {
        const struct perta_backend_ops *ops = backends[b]->ops;
        for (size_t i = 0; i < 40; i++) {
            float numbers[100], ones[100];
            struct perta_array a = {0}, kept = {0};
            ck_assert_ok(ops->alloc(backends[b], sizeof numbers, &a.buffer, &err));
            if (i % 3 == 0)
                ck_assert_ok(ops->alloc(backends[b], sizeof numbers, &kept.buffer, &err));
            ops->get(backends[b], a, numbers, sizeof numbers);
            for (size_t k = 0; k < 100; k++) {
                ck_assert(numbers[k] == 0);
                ones[k] = 1;
            }
            ops->put(backends[b], a, ones, sizeof ones);
            ops->free(backends[b], a.buffer);
        }
    }
}
END_TEST

static struct perta_array moved;

/* What a thread that reads ahead does. */
static void *move(void *ctx)
{
    struct perta_backend *be = ctx;
    for (int i = 0; i < 1000; i++) {
        float there = (float)i, back = -1;
        be->ops->put(be, moved, &there, sizeof there);
        be->ops->get(be, moved, &back, sizeof back);
        if (back != there)
            return be;
    }
    return NULL;
}

START_TEST(a_thread_puts_and_gets_while_buffers_come_and_operations_run)
{
    for (int b = 0; b < N_BACKENDS; b++) {
        struct outputs o = {0};
        pthread_t thread;
        void *failed;
        moved = buffer(backends[b], &o, sizeof(float));
        ck_assert_int_eq(pthread_create(&thread, NULL, move, backends[b]), 0);
        while (o.n_buffers < sizeof o.buffers / sizeof *o.buffers)
            backends[b]->ops->zero(backends[b], buffer(backends[b], &o, 4096), 1024);
        pthread_join(thread, &failed);
        ck_assert_ptr_null(failed);
        ck_assert_ok(perta_backend_wait(backends[b], &err));
    }
}
END_TEST

START_TEST(the_reference_poisons_what_is_freed)
{
    const struct perta_backend_ops *ops = backends[REFERENCE]->ops;
    float numbers[3] = {1, 2, 3};
    struct perta_array a = {0};
    ck_assert_ok(ops->alloc(backends[REFERENCE], sizeof numbers, &a.buffer, &err));
    ops->put(backends[REFERENCE], a, numbers, sizeof numbers);
    ops->free(backends[REFERENCE], a.buffer);
    ops->get(backends[REFERENCE], a, numbers, sizeof numbers);
    for (int i = 0; i < 3; i++)
        ck_assert(isnan(numbers[i]));
}
END_TEST

/* ---- failures; that operations do nothing after one, run_all looks at ---- */

static void fail_on_purpose(struct perta_backend *be, struct outputs *o)
{
    const struct perta_runs tiles = {1, (const size_t[]){0, 1}, 0};
    struct perta_array big = buffer(be, o, 3000 * 1024 * sizeof(float));
    const struct perta_linear l = {big,  PERTA_F16, 1024,
                                   3000, {0},       false}; /* wider than any should be */
    be->ops->linear_forward(be, &l, &tiles, big, buffer(be, o, 1024 * sizeof(float)), 1, false);
}

START_TEST(a_failure_is_told_once_with_the_first_message)
{
    for (int b = ONE; b < N_BACKENDS; b++) {
        struct perta_backend *be = backends[b];
        struct outputs o = {0};
        float one = 1, got = 0;
        struct perta_array a = output(be, &o, "a", F32, NULL, 1);
        be->ops->put(be, a, &one, sizeof one);
        fail_on_purpose(be, &o);
        be->ops->add(be, a, a, 1);
        fail_on_purpose(be, &o);
        be->ops->get(be, a, &got, sizeof got); /* undefined, but it returns */
        ck_assert_int_eq(perta_backend_wait(be, &err), PERTA_ESYS);
        ck_assert_ptr_nonnull(strstr(err.msg, "no room"));
        err = (struct perta_err){0};
        ck_assert_ok(perta_backend_wait(be, &err));
        ck_assert_int_eq(err.code, 0);
        be->ops->get(be, a, &got, sizeof got);
        ck_assert(got == 1);
        be->ops->add(be, a, a, 1);
        be->ops->get(be, a, &got, sizeof got);
        ck_assert(got == 2);
        drop(&o);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, open_all, close_backends);
    tcase_add_test(tests, what_the_host_shares_counts_once_it_is_uploaded);
    tcase_add_test(tests, a_new_buffer_is_zeros_whatever_was_freed);
    tcase_add_test(tests, a_thread_puts_and_gets_while_buffers_come_and_operations_run);
    tcase_add_test(tests, the_reference_poisons_what_is_freed);
    tcase_add_test(tests, a_failure_is_told_once_with_the_first_message);
    return run_suite("backend_memory", tests);
}
