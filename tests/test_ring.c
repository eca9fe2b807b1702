/* An io_uring that fails: every request completes in the end, and its buffer stays valid until
 * then. Linked with --wrap, so that entering the ring goes through this file. */
#include "tests/scratch.h"

#include <errno.h>
#include <liburing.h>

#include "io/writer.h"
#include "tests/engines.h"

#define N 24
#define PART 100000u

static struct perta_err err;

static unsigned n_entered, fail_from; /* 0: never */
static int fail_with;
static bool submits; /* when it fails, the kernel still takes the prepared requests */

int __real_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe,
                                            unsigned n, struct __kernel_timespec *timeout,
                                            sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe,
                                            unsigned n, struct __kernel_timespec *timeout,
                                            sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe,
                                            unsigned n, struct __kernel_timespec *timeout,
                                            sigset_t *mask)
{
    if (!fail_from || ++n_entered < fail_from)
        return __real_io_uring_submit_and_wait_timeout(ring, cqe, n, timeout, mask);
    if (submits)
        io_uring_submit(ring);
    return -fail_with;
}

static unsigned n_done;

static void count(struct perta_request *request)
{
    (void)request;
    n_done++;
}

/* Submit more requests than the ring has entries, and drain. Returns how many were read. */
static unsigned read_all(struct perta_engine *engine, struct perta_file *file, const uint8_t *data)
{
    struct perta_request r[N];
    unsigned n_read = 0;
    n_done = n_entered = 0;
    for (unsigned i = 0; i < N; i++) {
        r[i] = (struct perta_request){.file = file,
                                      .off_bytes = i * PART,
                                      .len_bytes = PART,
                                      .buf = pool + i * perta_read_room(PART),
                                      .done = count};
        perta_engine_submit(engine, &r[i]);
    }
    ck_assert_ok(perta_engine_drain(engine, &err));
    ck_assert_uint_eq(engine->n_in_flight, 0);
    ck_assert_uint_eq(n_done, N);
    for (unsigned i = 0; i < N; i++) {
        ck_assert(!r[i].sys_errno || r[i].sys_errno == fail_with);
        if (!r[i].sys_errno)
            ck_assert_mem_eq(r[i].data, data + r[i].off_bytes, PART);
        n_read += !r[i].sys_errno;
        perta_engine_release(engine, &r[i]);
    }
    return n_read;
}

static void breaks(int error, bool taken)
{
    uint8_t *data = make_file("f", N * PART, 1);
    for (unsigned from = 1; from <= 5; from++) {
        struct perta_engine *engine = open_engine(PERTA_IO_DIRECT, 4);
        struct perta_file file;
        ck_assert_ok(perta_file_open(&file, "f", true, &err));
        fail_from = 0;
        ck_assert_uint_eq(read_all(engine, &file, data), N);
        fail_from = from;
        fail_with = error;
        submits = taken;
        unsigned n_read = read_all(engine, &file, data);
        ck_assert_uint_lt(n_read, N);
        if (taken) /* requests that the kernel took were waited for */
            ck_assert_uint_ge(n_read, 4);
        ck_assert_uint_eq(read_all(engine, &file, data), 0); /* the failure is permanent */
        perta_file_close(&file);
        close_engine(engine);
    }
    free(data);
}

START_TEST(what_the_kernel_has_not_taken_fails)
{
    breaks(ENOMEM, false);
}
END_TEST

START_TEST(what_the_kernel_has_taken_is_waited_for)
{
    breaks(EFAULT, true);
}
END_TEST

START_TEST(again_without_end_is_a_failure_too)
{
    breaks(EAGAIN, false);
    breaks(EBUSY, false);
}
END_TEST

START_TEST(a_writer_says_so_and_can_be_given_up)
{
    uint64_t len = 20 * PERTA_WRITER_BUF_BYTES;
    uint8_t *data = alloc(len);
    for (int taken = 0; taken < 2; taken++) {
        struct perta_engine *engine = open_engine(PERTA_IO_DIRECT, 2);
        struct perta_writer writer;
        struct perta_err e = {0};
        struct perta_writer_bufs bufs = {pool, 3};
        n_entered = 0;
        fail_from = 4;
        fail_with = ENOMEM;
        submits = taken;
        ck_assert_ok(perta_writer_open(&writer, engine, "w", 0, bufs, &err));
        int rc = perta_writer_append(&writer, data, len, &e);
        ck_assert_int_eq(rc, PERTA_ESYS);
        ck_assert_int_eq(e.sys_errno, ENOMEM);
        perta_writer_abort(&writer);
        ck_assert_uint_eq(engine->n_in_flight, 0);
        close_engine(engine);
        unlink("w");
    }
    free(data);
}
END_TEST

int main(void)
{
    if (!runs_here(PERTA_IO_DIRECT)) {
        puts("io_uring is refused here");
        return 77;
    }
    TCase *tests = tcase_create("ring");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, what_the_kernel_has_not_taken_fails);
    tcase_add_test(tests, what_the_kernel_has_taken_is_waited_for);
    tcase_add_test(tests, again_without_end_is_a_failure_too);
    tcase_add_test(tests, a_writer_says_so_and_can_be_given_up);
    return run_suite("ring", tests);
}
