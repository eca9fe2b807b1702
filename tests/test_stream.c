/* The loop: every byte is seen once and in order, errors arrive in order, and nothing stays in
 * flight. */
#include "tests/scratch.h"

#include <sys/resource.h>

#include "io/pool.h"
#include "io/thread.h"
#include "stream/stream.h"
#include "tests/engines.h"
#include "tests/strange_fp.h"

static struct perta_err err;

/* A job that reads two files side by side in pieces of many sizes, and sums the bytes. */
struct toy {
    struct perta_file files[2];
    const uint8_t *data[2];
    uint64_t len, at, seed;
    uint64_t n_next, n_commit, fail_next, fail_work,
        fail_commit; /* the piece that fails; 0: none */
    unsigned n_threads;
    uint64_t told_bytes, n_told; /* from the progress callback */
    const uint8_t *file_at;      /* position in data, for read_file */
    uint8_t *seen;
    volatile sig_atomic_t *cancel;
    uint64_t cancel_at;
};

static int toy_next(void *ctx, struct perta_piece *piece, struct perta_err *e)
{
    struct toy *t = ctx;
    if (t->at == t->len)
        return 0;
    if (++t->n_next == t->fail_next)
        return perta_fail(e, PERTA_EINPUT, "next %llu", (unsigned long long)t->n_next);
    uint64_t n = next_random(&t->seed) % (t->n_next % 7 ? 5000 : 900000);
    n = n < t->len - t->at ? n : t->len - t->at;
    n = n ? n : 1;
    for (int i = 0; i < 2; i++)
        piece->in[i] =
            (struct perta_range){.file = &t->files[i], .off_bytes = t->at, .len_bytes = n};
    if (t->n_next % 5 == 0)
        piece->in[1] = (struct perta_range){0}; /* a piece without its second input */
    piece->tag = t->n_next;
    piece->first_elem = t->at;
    piece->n_elems = n;
    piece->out_bytes = n;
    t->at += n;
    return 1;
}

static int toy_work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *e)
{
    struct toy *t = ctx;
    ck_assert_uint_lt(worker, t->n_threads);
    ck_assert(strange_fp_is_default());
    if (t->fail_work && piece->tag >= t->fail_work)
        return perta_fail(e, PERTA_EINPUT, "work %llu", (unsigned long long)piece->tag);
    for (uint64_t i = 0; i < piece->n_elems; i++)
        piece->out[i] = piece->in[0].data[i] ^ (piece->in[1].file ? piece->in[1].data[i] : 0);
    return 0;
}

static int toy_commit(void *ctx, struct perta_piece *piece, struct perta_err *e)
{
    struct toy *t = ctx;
    ck_assert_uint_eq(piece->tag, ++t->n_commit); /* in order */
    ck_assert(strange_fp_is_default());
    if (t->n_commit == t->fail_commit)
        return perta_fail(e, PERTA_EINPUT, "commit %llu", (unsigned long long)t->n_commit);
    memcpy(t->seen + piece->first_elem, piece->out, piece->n_elems);
    if (t->cancel && t->n_commit == t->cancel_at)
        *t->cancel = 1;
    return 0;
}

static void toy_progress(void *user, uint64_t done_bytes, uint64_t total_bytes)
{
    struct toy *t = user;
    ck_assert_uint_ge(done_bytes, t->told_bytes);
    ck_assert_uint_eq(total_bytes, 2 * t->len);
    t->told_bytes = done_bytes;
    t->n_told++;
}

static void toy_compare(void *ctx, const uint8_t *data, uint64_t len_bytes)
{
    struct toy *t = ctx;
    ck_assert_mem_eq(t->file_at, data, len_bytes);
    t->file_at += len_bytes;
}

static int run_toy(struct toy *t, enum perta_io_mode mode, unsigned n_threads, uint64_t memory,
                   struct perta_err *e)
{
    static const char *const paths[] = {"a", "b"};
    struct perta_run run = {.memory_bytes = memory,
                            .n_threads = n_threads,
                            .io = mode,
                            .cancel = t->cancel,
                            .progress = toy_progress,
                            .progress_user = t};
    struct perta_job job = {.ctx = t,
                            .n_in = 2,
                            .in_bytes_max = 2 * 900000,
                            .total_bytes = 2 * t->len,
                            .out_bytes_max = 900000,
                            .next = toy_next,
                            .work = toy_work,
                            .commit = toy_commit};
    struct perta_stream *stream;
    t->n_threads = n_threads;
    ck_assert_ok(perta_stream_open(&run, &job, paths, 2, 0, &stream, &err));
    for (int i = 0; i < 2; i++)
        ck_assert_ok(perta_file_open(&t->files[i], paths[i],
                                     perta_stream_engine(stream)->wants_direct, &err));
    int rc = perta_stream_run(stream, e);
    ck_assert_uint_eq(perta_stream_engine(stream)->n_in_flight, 0);
    ck_assert_uint_eq(perta_stream_read_bytes(stream), t->told_bytes);
    perta_stream_close(stream);
    perta_file_close(&t->files[0]);
    perta_file_close(&t->files[1]);
    return rc;
}

#define TOY_BYTES 6000011u

static void with_toys(void (*use)(struct toy *toy, enum perta_io_mode mode, unsigned n_threads))
{
    uint8_t *a = make_file("a", TOY_BYTES, 1), *b = make_file("b", TOY_BYTES, 2);
    uint8_t *seen = alloc(TOY_BYTES);
    for (unsigned m = 0; m < N_MODES; m++)
        for (unsigned threads = 1; runs_here(modes[m]) && threads <= 4; threads *= 2) {
            struct toy toy = {.data = {a, b}, .len = TOY_BYTES, .seed = 5, .seen = seen};
            memset(seen, 0, TOY_BYTES);
            use(&toy, modes[m], threads);
        }
    free(a);
    free(b);
    free(seen);
}

static void all_is_seen(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    struct perta_err e = {0};
    /* enough for a few slots, for more under a sanitizer */
    ck_assert_msg(!run_toy(toy, mode, n_threads, 512u << 20, &e), "%s", e.msg);
    ck_assert_uint_eq(toy->n_commit, toy->n_next);
    uint64_t at = 0, seed = 5;
    for (uint64_t piece = 1; at < TOY_BYTES; piece++) {
        uint64_t n = next_random(&seed) % (piece % 7 ? 5000 : 900000);
        n = n < TOY_BYTES - at ? n : TOY_BYTES - at;
        n = n ? n : 1;
        for (uint64_t i = at; i < at + n; i++)
            if (toy->seen[i] != (toy->data[0][i] ^ (piece % 5 ? toy->data[1][i] : 0)))
                ck_abort_msg("byte %llu", (unsigned long long)i);
        at += n;
    }
}

START_TEST(the_loop_commits_every_byte_once_in_order)
{
    with_toys(all_is_seen);
}
END_TEST

static void computes_as_always(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    strange_fp_set(N_STRANGE_FP - 1);
    unsigned before = strange_fp_state();
    all_is_seen(toy, mode, n_threads); /* toy_work and toy_commit check the environment on their
                                        * threads */
    unsigned after = strange_fp_state();
    strange_fp_set(0);
    ck_assert_uint_eq(after, before);
}

START_TEST(work_and_commit_have_the_default_floating_point_environment)
{
    with_toys(computes_as_always);
}
END_TEST

static void errors_come_in_order(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    struct toy at_next = *toy, at_work = *toy, at_commit = *toy;
    struct perta_err e = {0};
    at_next.fail_next = 40;
    ck_assert_int_eq(run_toy(&at_next, mode, n_threads, 512u << 20, &e), PERTA_EINPUT);
    ck_assert_str_eq(e.msg, "next 40");
    e = (struct perta_err){0};
    at_work.fail_work = 23;
    ck_assert_int_eq(run_toy(&at_work, mode, n_threads, 512u << 20, &e), PERTA_EINPUT);
    ck_assert_str_eq(e.msg, "work 23");
    e = (struct perta_err){0};
    at_commit.fail_commit = 31;
    ck_assert_int_eq(run_toy(&at_commit, mode, n_threads, 512u << 20, &e), PERTA_EINPUT);
    ck_assert_str_eq(e.msg, "commit 31");
}

static void earlier_errors_win(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    static const struct {
        uint64_t next, work, commit;
        const char *first;
    } cases[] = {{40, 23, 31, "work 23"}, {23, 40, 31, "next 23"}, {40, 31, 23, "commit 23"}};
    for (size_t i = 0; i < 3; i++) {
        struct toy t = *toy;
        struct perta_err e = {0};
        t.fail_next = cases[i].next;
        t.fail_work = cases[i].work;
        t.fail_commit = cases[i].commit;
        ck_assert_int_eq(run_toy(&t, mode, n_threads, 512u << 20, &e), PERTA_EINPUT);
        ck_assert_str_eq(e.msg, cases[i].first);
    }
}

START_TEST(of_several_errors_the_first_in_order_is_returned)
{
    with_toys(earlier_errors_win);
}
END_TEST

START_TEST(the_first_error_in_order_stops_the_loop)
{
    with_toys(errors_come_in_order);
}
END_TEST

static void stops_when_told(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    volatile sig_atomic_t cancel = 0;
    struct perta_err e = {0};
    toy->cancel = &cancel;
    toy->cancel_at = 10;
    ck_assert_int_eq(run_toy(toy, mode, n_threads, 512u << 20, &e), PERTA_EINTR);
    ck_assert_uint_ge(toy->n_commit, 10);
    ck_assert_uint_lt(toy->at, toy->len + 1);
}

START_TEST(the_loop_stops_when_told)
{
    with_toys(stops_when_told);
}
END_TEST

static void cut_short(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    struct perta_err e = {0};
    ck_assert_int_eq(truncate("b", TOY_BYTES / 2), 0);
    ck_assert_int_eq(run_toy(toy, mode, n_threads, 512u << 20, &e), PERTA_EINPUT);
    ck_assert_msg(!strncmp(e.msg, "b: ends at byte 3000005, ", 25), "%s", e.msg);
    ck_assert_uint_gt(toy->n_commit, 0); /* pieces before the failure were committed */
    put_file("b", toy->data[1], TOY_BYTES);
}

START_TEST(a_file_cut_short_stops_the_loop)
{
    with_toys(cut_short);
}
END_TEST

static void does_not_start(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    volatile sig_atomic_t cancel = 1;
    struct perta_err e = {0};
    toy->cancel = &cancel;
    ck_assert_int_eq(run_toy(toy, mode, n_threads, 512u << 20, &e), PERTA_EINTR);
    ck_assert_uint_eq(toy->n_next, 0);
    ck_assert_uint_eq(toy->n_commit, 0);
}

START_TEST(the_loop_does_not_start_when_told_before)
{
    with_toys(does_not_start);
}
END_TEST

static void there_is_nothing(struct toy *toy, enum perta_io_mode mode, unsigned n_threads)
{
    struct perta_err e = {0};
    toy->len = 0;
    ck_assert_int_eq(run_toy(toy, mode, n_threads, 512u << 20, &e), 0);
    ck_assert_uint_eq(toy->n_commit, 0);
}

START_TEST(a_job_without_pieces_is_done)
{
    with_toys(there_is_nothing);
}
END_TEST

/* A job whose pieces read nothing, many in a slot. */
static int idle_next(void *ctx, struct perta_piece *piece, struct perta_err *e)
{
    (void)e;
    uint64_t *n = ctx;
    piece->tag = n[0];
    piece->out_bytes = sizeof(uint64_t);
    return n[0]++ < 10000;
}

static int idle_work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *e)
{
    (void)ctx;
    (void)worker;
    (void)e;
    ck_assert_uint_eq((uintptr_t)piece->out % 64, 0);
    *(uint64_t *)(void *)piece->out = piece->tag * piece->tag;
    return 0;
}

static int idle_commit(void *ctx, struct perta_piece *piece, struct perta_err *e)
{
    (void)e;
    uint64_t *n = ctx;
    ck_assert_uint_eq(piece->tag, n[1]++);
    ck_assert_uint_eq(*(uint64_t *)(void *)piece->out, piece->tag * piece->tag);
    return 0;
}

START_TEST(pieces_that_read_nothing_are_worked_on_too)
{
    uint64_t n[2] = {0};
    struct perta_run run = {.memory_bytes = 512u << 20, .n_threads = 2, .io = PERTA_IO_PREAD};
    struct perta_job job = {.ctx = n,
                            .n_in = 1,
                            .out_bytes_max = 4096,
                            .next = idle_next,
                            .work = idle_work,
                            .commit = idle_commit};
    struct perta_stream *stream;
    ck_assert_ok(perta_stream_open(&run, &job, NULL, 0, 0, &stream, &err));
    ck_assert_ok(perta_stream_run(stream, &err));
    perta_stream_close(stream);
    ck_assert_uint_eq(n[1], 10000);
}
END_TEST

START_TEST(a_file_is_read_in_order_in_the_room_of_the_slots)
{
    static const uint64_t lengths[] = {0, 1, 4096, 2u << 20, (2u << 20) + 1, 20000003};
    static const uint64_t rooms[] = {1, 100000, 8u << 20};
    for (unsigned m = 0; m < N_MODES; m++)
        for (unsigned i = 0; runs_here(modes[m]) && i < 6 * 3; i++) {
            uint64_t n[2] = {10000}; /* nothing is left to do */
            uint8_t *data = make_file("f", lengths[i % 6], i);
            struct perta_run run = {.memory_bytes = 512u << 20, .n_threads = 1, .io = modes[m]};
            struct perta_job job = {.ctx = n,
                                    .n_in = 1,
                                    .in_bytes_max = rooms[i / 6],
                                    .next = idle_next,
                                    .work = idle_work,
                                    .commit = idle_commit};
            struct perta_stream *stream;
            struct perta_file file;
            struct toy toy = {.file_at = data};
            ck_assert_ok(perta_stream_open(&run, &job, NULL, 0, 0, &stream, &err));
            ck_assert_ok(
                perta_file_open(&file, "f", perta_stream_engine(stream)->wants_direct, &err));
            ck_assert_ok(perta_stream_run(stream, &err));
            ck_assert_ok(perta_stream_read_file(stream, &file, toy_compare, &toy, &err));
            ck_assert_ptr_eq(toy.file_at, data + lengths[i % 6]);
            ck_assert_uint_eq(perta_stream_read_bytes(stream), lengths[i % 6]);
            file.len_bytes += 5; /* as if it had become shorter */
            struct perta_err e = {0};
            toy.file_at = data;
            ck_assert_int_eq(perta_stream_read_file(stream, &file, toy_compare, &toy, &e),
                             PERTA_EINPUT);
            ck_assert_ptr_nonnull(strstr(e.msg, "f: ends at byte "));
            ck_assert_uint_eq(perta_stream_engine(stream)->n_in_flight, 0);
            perta_file_close(&file);
            perta_stream_close(stream);
            free(data);
        }
}
END_TEST

START_TEST(a_budget_too_small_is_refused_with_what_is_enough)
{
    struct perta_run run = {.memory_bytes = 1 << 20, .n_threads = 1, .io = PERTA_IO_PREAD};
    struct perta_job job = {.n_in = 2, .in_bytes_max = 8 << 20, .out_bytes_max = 1 << 20};
    struct perta_stream *stream;
    struct perta_err e = {0};
    ck_assert_int_eq(perta_stream_open(&run, &job, NULL, 0, 1, &stream, &e), PERTA_EUSAGE);
    ck_assert_ptr_nonnull(strstr(e.msg, "it needs "));
}
END_TEST

/* The budget that the refusal for this number of threads names. */
static uint64_t enough_for(const struct perta_job *job, unsigned n_threads)
{
    struct perta_run run = {.memory_bytes = 1 << 20, .n_threads = n_threads, .io = PERTA_IO_PREAD};
    struct perta_stream *stream;
    struct perta_err e = {0};
    ck_assert_int_eq(perta_stream_open(&run, job, NULL, 0, 1, &stream, &e), PERTA_EUSAGE);
    const char *says = strstr(e.msg, "it needs ");
    ck_assert_ptr_nonnull(says);
    return strtoull(says + strlen("it needs "), NULL, 10) << 20;
}

/* The number of workers with that budget; the job runs to its end. */
static unsigned workers_for(struct perta_job *job, unsigned n_threads, uint64_t memory_bytes)
{
    uint64_t n[2] = {0};
    struct perta_run run = {
        .memory_bytes = memory_bytes, .n_threads = n_threads, .io = PERTA_IO_PREAD};
    struct perta_stream *stream;
    job->ctx = n;
    ck_assert_ok(perta_stream_open(&run, job, NULL, 0, 1, &stream, &err));
    unsigned n_workers = perta_stream_workers(stream);
    ck_assert_ok(perta_stream_run(stream, &err));
    perta_stream_close(stream);
    ck_assert_uint_eq(n[1], 10000);
    return n_workers;
}

/* Far more than resident memory varies between runs. */
#define SCRATCH_BYTES (256ull << 20)

START_TEST(there_are_as_many_workers_as_fit_the_budget)
{
    struct perta_job job = {.n_in = 1,
                            .out_bytes_max = 4096,
                            .worker_bytes = SCRATCH_BYTES,
                            .next = idle_next,
                            .work = idle_work,
                            .commit = idle_commit};
    uint64_t least = enough_for(&job, 1), at_128 = enough_for(&job, 128), part = SCRATCH_BYTES / 2;
    ck_assert_uint_le(at_128, least + part);
    ck_assert_uint_le(least, at_128 + part);
    ck_assert_uint_eq(workers_for(&job, 128, least), 1);
    for (unsigned i = 1; i <= 4; i++) { /* scratch, a stack, and a slot of some MiB */
        uint64_t budget = least + i * (SCRATCH_BYTES + (16 << 20));
        ck_assert_uint_eq(workers_for(&job, 128, budget), i + 1);
    }
    ck_assert_uint_eq(workers_for(&job, 3, 64ull << 30), 3);
    ck_assert_uint_gt(workers_for(&job, 128, 64ull << 30), 32);
}
END_TEST

START_TEST(scratch_without_end_is_refused)
{
    struct perta_run run = {.memory_bytes = INT64_MAX - 1, .n_threads = 1, .io = PERTA_IO_PREAD};
    static const uint64_t scratch[] = {UINT64_MAX, UINT64_MAX - (1 << 20), INT64_MAX};
    struct perta_stream *stream;
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) {
        struct perta_job job = {.n_in = 1, .worker_bytes = scratch[i]};
        struct perta_err e = {0};
        ck_assert_int_eq(perta_stream_open(&run, &job, NULL, 0, 0, &stream, &e), PERTA_EUSAGE);
        ck_assert_uint_eq(perta_stream_memory(&job, 0, 1, 1), INT64_MAX);
    }
}
END_TEST

START_TEST(fewer_threads_do_where_the_system_has_no_more)
{
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    return; /* sanitizers reserve terabytes of the address space that is limited here */
#endif
    char text[128]; /* begins with pages */
    uint64_t n[2] = {0};
    struct perta_run run = {.memory_bytes = 512u << 20, .n_threads = 32, .io = PERTA_IO_PREAD};
    struct perta_job job = {.ctx = n,
                            .n_in = 1,
                            .out_bytes_max = 4096,
                            .next = idle_next,
                            .work = idle_work,
                            .commit = idle_commit};
    struct perta_stream *stream;
    ck_assert_ok(perta_stream_open(&run, &job, NULL, 0, 0, &stream, &err));
    ck_assert_uint_eq(perta_stream_workers(stream), 32);
    FILE *statm = fopen("/proc/self/statm", "r");
    ck_assert(statm && fgets(text, sizeof text, statm));
    fclose(statm);
    rlim_t room = strtoull(text, NULL, 10) * (rlim_t)perta_page_bytes() + 4 * PERTA_STACK_BYTES;
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &(struct rlimit){room, room}), 0);
    ck_assert_ok(perta_stream_run(stream, &err));
    perta_stream_close(stream);
    ck_assert_uint_eq(n[1], 10000);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("stream");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, the_loop_commits_every_byte_once_in_order);
    tcase_add_test(tests, work_and_commit_have_the_default_floating_point_environment);
    tcase_add_test(tests, the_first_error_in_order_stops_the_loop);
    tcase_add_test(tests, of_several_errors_the_first_in_order_is_returned);
    tcase_add_test(tests, the_loop_stops_when_told);
    tcase_add_test(tests, a_file_cut_short_stops_the_loop);
    tcase_add_test(tests, the_loop_does_not_start_when_told_before);
    tcase_add_test(tests, a_job_without_pieces_is_done);
    tcase_add_test(tests, pieces_that_read_nothing_are_worked_on_too);
    tcase_add_test(tests, a_file_is_read_in_order_in_the_room_of_the_slots);
    tcase_add_test(tests, a_budget_too_small_is_refused_with_what_is_enough);
    tcase_add_test(tests, there_are_as_many_workers_as_fit_the_budget);
    tcase_add_test(tests, scratch_without_end_is_refused);
    tcase_add_test(tests, fewer_threads_do_where_the_system_has_no_more);
    return run_suite("stream", tests);
}
