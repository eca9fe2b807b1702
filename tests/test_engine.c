/* Engines and files: every engine reads the same bytes, in any range; short and failing reads are
 * reported. */
#include "tests/scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "io/pool.h"
#include "io/thread.h"
#include "io/window.h"
#include "tests/engines.h"

static struct perta_err err;

static void count_down(struct perta_request *request)
{
    --*(unsigned *)request->user;
}

static struct perta_request reading(struct perta_file *file, uint64_t off, uint64_t len,
                                    uint8_t *buf, unsigned *left)
{
    return (struct perta_request){.file = file,
                                  .off_bytes = off,
                                  .len_bytes = len,
                                  .buf = buf,
                                  .done = count_down,
                                  .user = left};
}

static void read_ranges(struct perta_engine *engine, struct perta_file *file, const uint8_t *data,
                        size_t len, uint64_t *seed)
{
    struct perta_request r[16];
    unsigned left = 16;
    for (unsigned i = 0; i < 16; i++) {
        uint64_t off = next_random(seed) % len, most = len - off < 300000 ? len - off : 300000;
        r[i] =
            reading(file, off, 1 + next_random(seed) % most, pool + i * (POOL_BYTES / 16), &left);
        perta_engine_submit(engine, &r[i]);
    }
    ck_assert_ok(perta_engine_drain(engine, &err));
    ck_assert_uint_eq(left, 0);
    ck_assert_uint_eq(engine->n_in_flight, 0);
    for (unsigned i = 0; i < 16; i++) {
        ck_assert_int_eq(r[i].sys_errno, 0);
        ck_assert_mem_eq(r[i].data, data + r[i].off_bytes, r[i].len_bytes);
        perta_engine_release(engine, &r[i]);
    }
}

START_TEST(every_engine_reads_any_range)
{
    size_t len = 1000003;
    uint8_t *data = make_file("f", len, 1);
    uint64_t seed = 2;
    for (unsigned depth = 1; depth <= 32; depth *= 2) /* below and above the number of requests */
        for_each_engine(engine, depth)
        {
            struct perta_file file;
            ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
            for (int round = 0; round < 6; round++)
                read_ranges(engine, &file, data, len, &seed);
            perta_file_close(&file);
        }
    free(data);
}
END_TEST

START_TEST(ranges_at_block_boundaries_and_the_end_are_exact)
{
    static const int steps[] = {-1, 0, 1};
    size_t len = 5 * PERTA_BLOCK_BYTES + 17;
    uint8_t *data = make_file("f", len, 1);
    for_each_engine(engine, 2)
    {
        struct perta_file file;
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        for (uint64_t from = 1; from < 5; from++)
            for (uint64_t to = from + 1; to <= 5; to++)
                for (int s = 0; s < 9; s++) {
                    uint64_t off = from * PERTA_BLOCK_BYTES + (uint64_t)(int64_t)steps[s % 3];
                    uint64_t end = to * PERTA_BLOCK_BYTES + (uint64_t)(int64_t)steps[s / 3];
                    end = to == 5 ? len : end;
                    unsigned left = 1;
                    uint64_t room = perta_read_room(end - off);
                    memset(pool, 0x5a, room + 64);
                    struct perta_request r = reading(&file, off, end - off, pool, &left);
                    perta_engine_submit(engine, &r);
                    ck_assert_ok(perta_engine_drain(engine, &err));
                    ck_assert_int_eq(r.sys_errno, 0);
                    ck_assert_mem_eq(r.data, data + off, end - off);
                    perta_engine_release(engine, &r);
                    for (unsigned i = 0; i < 64; i++) /* it wrote nothing after its room */
                        ck_assert_uint_eq(pool[room + i], 0x5a);
                }
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

START_TEST(buffers_outside_the_pool_will_do)
{
    uint8_t *data = make_file("f", 100000, 1), *own = aligned_alloc(4096, 1 << 20);
    for_each_engine(engine, 2)
    {
        struct perta_file file;
        unsigned left = 1;
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        struct perta_request r = reading(&file, 77, 90000, own, &left);
        perta_engine_submit(engine, &r);
        ck_assert_ok(perta_engine_drain(engine, &err));
        ck_assert_mem_eq(r.data, data + 77, 90000);
        perta_engine_release(engine, &r);
        perta_file_close(&file);
    }
    free(own);
    free(data);
}
END_TEST

START_TEST(files_without_direct_io_are_read_too)
{
    uint8_t *data = make_file("f", 100000, 1);
    uint64_t seed = 3;
    for_each_engine(engine, 4)
    {
        struct perta_file file;
        ck_assert_ok(perta_file_open(&file, "f", false, &err));
        ck_assert(!file.direct);
        read_ranges(engine, &file, data, 100000, &seed);
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

START_TEST(a_file_that_ends_early_is_said_with_its_byte)
{
    static const struct {
        uint64_t len, off, n;
        const char *says;
    } cases[] = {
        {10000, 9000, 5000, "f: ends at byte 10000, 4000 more expected"},
        {8192, 4096, 8192, "f: ends at byte 8192, 4096 more expected"},
        {8192, 100, 8093, "f: ends at byte 8192, 1 more expected"},
        {5000, 6000, 10, "f: ends at byte 6000, 10 more expected"},
        {0, 0, 1, "f: ends at byte 0, 1 more expected"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        free(make_file("f", cases[i].len, 1));
        for_each_engine(engine, 4)
        {
            struct perta_file file;
            unsigned left = 1;
            ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
            struct perta_request r = reading(&file, cases[i].off, cases[i].n, pool, &left);
            perta_engine_submit(engine, &r);
            ck_assert_ok(perta_engine_drain(engine, &err));
            struct perta_err why = {0};
            ck_assert_int_eq(perta_request_error(&r, &why), PERTA_EINPUT);
            ck_assert_str_eq(why.msg, cases[i].says);
            perta_engine_release(engine, &r);
            perta_file_close(&file);
        }
    }
}
END_TEST

START_TEST(a_request_that_fails_says_why_and_others_go_on)
{
    uint8_t *data = make_file("f", 100000, 1);
    for_each_engine(engine, 1)
    {
        struct perta_file file, broken;
        unsigned left = 3;
        struct perta_request r[3];
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        broken = file;
        broken.fd = -1;
        for (unsigned i = 0; i < 3; i++) {
            r[i] = reading(i == 1 ? &broken : &file, 1000 * i, 50000, pool + i * (POOL_BYTES / 4),
                           &left);
            perta_engine_submit(engine, &r[i]);
        }
        ck_assert_ok(perta_engine_drain(engine, &err));
        ck_assert_uint_eq(left, 0);
        ck_assert_int_eq(r[1].sys_errno, EBADF);
        struct perta_err why = {0};
        ck_assert_int_eq(perta_request_error(&r[1], &why), PERTA_ESYS);
        ck_assert_int_eq(why.sys_errno, EBADF);
        ck_assert_ptr_nonnull(strstr(why.msg, "f: read at byte 1000: "));
        ck_assert_mem_eq(r[0].data, data, 50000);
        ck_assert_mem_eq(r[2].data, data + 2000, 50000);
        for (unsigned i = 0; i < 3; i++)
            perta_engine_release(engine, &r[i]);
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

/* A read that submits the next one when it completes. */
struct chain {
    struct perta_engine *engine;
    struct perta_request request;
    const uint8_t *data;
    unsigned n;
};

static void on_link(struct perta_request *request)
{
    struct chain *chain = request->user;
    ck_assert_int_eq(request->sys_errno, 0);
    ck_assert_mem_eq(request->data, chain->data + request->off_bytes, request->len_bytes);
    perta_engine_release(chain->engine, request);
    request->off_bytes += 1001;
    if (--chain->n)
        perta_engine_submit(chain->engine, request);
}

START_TEST(a_request_may_be_sent_from_done)
{
    uint8_t *data = make_file("f", 100000, 1);
    for_each_engine(engine, 1)
    {
        struct perta_file file;
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        struct chain chain = {.engine = engine, .data = data, .n = 50};
        chain.request = (struct perta_request){
            .file = &file, .len_bytes = 3000, .buf = pool, .done = on_link, .user = &chain};
        perta_engine_submit(engine, &chain.request);
        ck_assert_ok(perta_engine_drain(engine, &err));
        ck_assert_uint_eq(chain.n, 0);
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

/* data (16 blocks) into a new file, the last block first, by way of from. */
static void write_back_to_front(struct perta_engine *engine, bool direct, uint8_t *from,
                                const uint8_t *data)
{
    struct perta_file file;
    struct perta_request r[16];
    unsigned left = 16;
    ck_assert_ok(perta_file_create(&file, "w", direct, &err));
    for (unsigned i = 0; i < 16; i++) {
        uint64_t off = (15 - i) * 65536u;
        r[i] = reading(&file, off, 65536, from + off, &left);
        r[i].write = true;
        memcpy(from + off, data + off, 65536);
        perta_engine_submit(engine, &r[i]);
    }
    ck_assert_ok(perta_engine_drain(engine, &err));
    ck_assert_uint_eq(left, 0);
    for (unsigned i = 0; i < 16; i++)
        ck_assert_int_eq(r[i].sys_errno, 0);
    perta_file_close(&file);
    ck_assert(holds("w", data, 16 * 65536));
    unlink("w");
}

START_TEST(what_was_written_is_read_back)
{
    size_t len = 16 * 65536;
    uint8_t *data = aligned_alloc(4096, len);
    fill_random(data, len, 7);
    for (int direct = 0; direct < 2; direct++)
        for_each_engine(engine, 3) write_back_to_front(engine, direct, pool, data);
    free(data);
}
END_TEST

static void *wake_often(void *arg)
{
    for (int i = 0; i < 200; i++)
        perta_engine_wake(arg);
    return NULL;
}

START_TEST(any_thread_may_wake_the_owner)
{
    uint8_t *data = make_file("f", 100000, 1);
    uint64_t seed = 1;
    for_each_engine(engine, 4)
    {
        struct perta_file file;
        pthread_t threads[3];
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        for (int i = 0; i < 3; i++)
            ck_assert_int_eq(perta_thread_start(&threads[i], wake_often, engine), 0);
        for (int i = 0; i < 10; i++)
            read_ranges(engine, &file, data, 100000, &seed);
        for (int i = 0; i < 3; i++)
            pthread_join(threads[i], NULL);
        /* A wake before the wait counts too. Without one, the wait returns by itself; otherwise
         * this case times out. */
        ck_assert_ok(perta_engine_wait(engine, &err));
        perta_engine_wake(engine);
        ck_assert_ok(perta_engine_wait(engine, &err));
        ck_assert_ok(perta_engine_wait(engine, &err));
        ck_assert_ok(perta_engine_wait(engine, &err));
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

START_TEST(the_choice_is_what_was_asked_for_or_suits_the_files)
{
    static const char *const paths[] = {"f", "nowhere"};
    struct perta_io_choice choice;
    free(make_file("f", 100000, 1)); /* just written, so in the page cache */
    ck_assert_ok(perta_engine_choose(PERTA_IO_AUTO, paths, 1, &choice, &err));
    ck_assert_int_eq(choice.mode, PERTA_IO_MMAP);
    ck_assert_ok(perta_engine_choose(PERTA_IO_AUTO, paths, 2, &choice, &err));
    ck_assert_int_eq(choice.mode, PERTA_IO_MMAP);
    ck_assert_ptr_nonnull(strstr(choice.why, "nowhere"));
    ck_assert_ok(perta_engine_choose(PERTA_IO_PREAD, paths, 1, &choice, &err));
    ck_assert_int_eq(choice.mode, PERTA_IO_PREAD);
    struct perta_err e = {0};
    int rc = perta_engine_choose(PERTA_IO_DIRECT, paths, 1, &choice, &e);
    ck_assert_int_eq(rc, runs_here(PERTA_IO_DIRECT) ? 0 : PERTA_ESYS);
}
END_TEST

/* A file of another user that is in the page cache. */
static int as_nobody(const char *path)
{
    struct perta_io_choice choice;
    int status;
    pid_t pid = fork();
    if (!pid) {
        if (!geteuid() && (setgroups(0, NULL) || setresgid(65534, 65534, 65534) ||
                           setresuid(65534, 65534, 65534)))
            _exit(2);
        if (perta_file_cached_share(path) >= 0)
            _exit(3);
        if (perta_engine_choose(PERTA_IO_AUTO, &path, 1, &choice, &err))
            _exit(4);
        _exit(choice.mode == PERTA_IO_MMAP && perta_file_can_direct(path) ? 5 : 0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

START_TEST(what_the_kernel_does_not_tell_is_no_reason_to_map_a_file)
{
    ck_assert_int_eq(chmod(".", 0755), 0);
    free(make_file("f", 100000, 1));
    ck_assert_int_eq(chmod("f", 0644), 0);
    ck_assert(perta_file_cached_share("f") > 0.9);
    ck_assert_int_eq(truncate("f", 0), 0);
    ck_assert(perta_file_cached_share("f") == 0);
    ck_assert(perta_file_cached_share("nowhere") < 0);
    free(make_file("f", 100000, 1));
    ck_assert_int_eq(as_nobody(geteuid() ? "/bin/sh" : "f"), 0);
}
END_TEST

static void is_not_opened(const char *path, int code)
{
    struct perta_file file;
    unsigned n_open = count_open_files();
    for (int direct = 0; direct < 2; direct++) {
        struct perta_err e = {0};
        ck_assert_int_eq(perta_file_open(&file, path, direct, &e), code);
        ck_assert_msg(strstr(e.msg, path), "%s", e.msg);
        perta_file_close(&file);
        perta_file_close(&file); /* closing twice is allowed */
        ck_assert_uint_eq(count_open_files(), n_open);
    }
}

START_TEST(what_is_no_regular_file_is_not_opened_and_not_left_open)
{
    ck_assert_int_eq(mkfifo("fifo", 0600), 0);
    is_not_opened("nowhere", PERTA_ESYS);
    is_not_opened(".", PERTA_EINPUT);
    is_not_opened("fifo", PERTA_EINPUT);
    is_not_opened("/dev/null", PERTA_EINPUT);
    struct perta_file file = {0};
    perta_file_close(&file); /* not file descriptor 0, which belongs to somebody else */
    ck_assert_int_ge(fcntl(0, F_GETFD), 0);
}
END_TEST

START_TEST(a_file_that_stands_there_is_not_created_again)
{
    struct perta_file file;
    put_text("f", "mine");
    for (int direct = 0; direct < 2; direct++) {
        struct perta_err e = {0};
        ck_assert_int_eq(perta_file_create(&file, "f", direct, &e), PERTA_ESYS);
        ck_assert_int_eq(e.sys_errno, EEXIST);
        perta_file_close(&file);
    }
    ck_assert(holds("f", "mine", 4));
}
END_TEST

START_TEST(a_file_that_changed_is_noticed)
{
    struct perta_file file;
    put_text("f", "mine");
    ck_assert_ok(perta_file_open(&file, "f", false, &err));
    ck_assert_ok(perta_file_unchanged(&file, &err));
    put_text("f", "mine!");
    ck_assert_int_eq(perta_file_unchanged(&file, &err), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(err.msg, "f: changed while it was read"));
    perta_file_close(&file);
}
END_TEST

static void is_blocking(int fd)
{
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(fcntl(fd, F_GETFL) & O_NONBLOCK, 0);
}

START_TEST(regular_files_are_not_left_non_blocking)
{
    struct perta_file file;
    struct stat st;
    put_text("f", "mine");
    for (int direct = 0; direct < 2; direct++) {
        ck_assert_ok(perta_file_open(&file, "f", direct, &err));
        is_blocking(file.fd);
        ck_assert_int_eq(!!(fcntl(file.fd, F_GETFL) & O_DIRECT), file.direct);
        perta_file_close(&file);
        ck_assert_ok(perta_file_reopen(&file, "f", direct, &err));
        is_blocking(file.fd);
        perta_file_close(&file);
    }
    int fd = perta_open_regular("f", &st, &err);
    is_blocking(fd);
    close(fd);
}
END_TEST

START_TEST(again_is_tried_a_bounded_number_of_times_and_then_named)
{
    struct perta_file file = {.fd = -1, .path = (char[]){"f"}, .len_bytes = 10000};
    struct perta_request r = {.file = &file, .len_bytes = 10000, .end = 10000};
    for (int part = 0; part < 3; part++) { /* progress resets the count */
        for (int i = 0; i < 90; i++)
            ck_assert(!perta_request_advance(&r, -EAGAIN));
        ck_assert(!perta_request_advance(&r, 1000));
    }
    unsigned n = 0;
    while (!perta_request_advance(&r, n % 2 ? -EAGAIN : -EINTR))
        ck_assert_uint_lt(n++, 1000);
    struct perta_err e = {0};
    ck_assert_int_eq(perta_request_error(&r, &e), PERTA_ESYS);
    ck_assert_int_eq(e.sys_errno, EAGAIN);
    ck_assert_ptr_nonnull(strstr(e.msg, "f: read at byte 3000: "));
    ck_assert_ptr_nonnull(strstr(e.msg, strerror(EAGAIN)));
}
END_TEST

/* A direct transfer to memory that is not aligned fails only when it is made, not when the file is
 * opened. On some file systems, every direct transfer does. */
START_TEST(direct_transfers_that_are_refused_late_take_the_page_cache)
{
    size_t len = 16 * 65536;
    uint8_t *data = make_file("f", len, 1);
    for_each_engine(engine, 3)
    {
        struct perta_file file;
        struct perta_request r[16];
        unsigned left = 16;
        write_back_to_front(engine, true, pool + 1, data);
        memset(pool, 0, POOL_BYTES);
        ck_assert_ok(perta_file_open(&file, "f", engine->wants_direct, &err));
        for (unsigned i = 0; i < 16; i++) {
            r[i] = reading(&file, i * 60000u + i, 50001, pool + 1 + i * 65536u, &left);
            perta_engine_submit(engine, &r[i]);
        }
        ck_assert_ok(perta_engine_drain(engine, &err));
        ck_assert_uint_eq(left, 0);
        for (unsigned i = 0; i < 16; i++) {
            ck_assert_int_eq(r[i].sys_errno, 0);
            ck_assert_mem_eq(r[i].data, data + r[i].off_bytes, r[i].len_bytes);
            perta_engine_release(engine, &r[i]);
        }
        perta_file_close(&file);
    }
    free(data);
}
END_TEST

START_TEST(plain_transfers_that_are_refused_late_take_the_page_cache)
{
    enum { LEN = 3 * 65536 };
    uint8_t *data = make_file("f", LEN, 1), *odd = aligned_alloc(PERTA_BLOCK_BYTES, LEN * 2);
    struct perta_file file;
    ck_assert_ok(perta_file_open(&file, "f", true, &err));
    ck_assert_ok(perta_pread_all(file.fd, odd + 1, LEN, 0, "f", &err));
    ck_assert_mem_eq(odd + 1, data, LEN);
    perta_file_close(&file);
    ck_assert_ok(perta_file_create(&file, "w", true, &err));
    ck_assert_ok(perta_pwrite_all(file.fd, odd + 1, LEN, 0, "w", &err));
    ck_assert(holds("w", data, LEN));
    perta_file_close(&file);
    free(odd);
    free(data);
}
END_TEST

/* Two windows of 16 pages; the file still has 24 pages. */
START_TEST(a_mapped_file_that_shrinks_is_an_error_and_not_a_death)
{
    uint64_t half = 16 * perta_page_bytes();
    free(make_file("f", 2 * half, 1));
    struct perta_engine *engine = open_engine(PERTA_IO_MMAP, 2);
    struct perta_file file;
    struct perta_request r[2];
    unsigned left = 2;
    ck_assert_ok(perta_file_open(&file, "f", false, &err));
    for (unsigned i = 0; i < 2; i++) {
        r[i] = reading(&file, i * half, half, pool, &left);
        perta_engine_submit(engine, &r[i]);
    }
    ck_assert_ok(perta_engine_drain(engine, &err));
    ck_assert_int_eq(truncate("f", (off_t)(half + half / 2)), 0);
    volatile uint8_t sum = 0;
    for (uint64_t i = 0; i < half + half / 2; i++)
        sum = (uint8_t)(sum + r[i / half].data[i % half]);
    ck_assert_ok(perta_engine_check(engine, &err));
    for (uint64_t i = half / 2; i < half; i++)
        ck_assert_uint_eq(r[1].data[i], 0);
    ck_assert_int_eq(perta_engine_check(engine, &err), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(err.msg, "f: changed while it was read"));
    perta_engine_release(engine, &r[0]);
    perta_engine_release(engine, &r[1]);
    perta_file_close(&file);
    close_engine(engine);

    err = (struct perta_err){0}; /* a new one starts over */
    engine = open_engine(PERTA_IO_MMAP, 2);
    ck_assert_ok(perta_engine_check(engine, &err));
    close_engine(engine);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("engine");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, every_engine_reads_any_range);
    tcase_add_test(tests, ranges_at_block_boundaries_and_the_end_are_exact);
    tcase_add_test(tests, buffers_outside_the_pool_will_do);
    tcase_add_test(tests, files_without_direct_io_are_read_too);
    tcase_add_test(tests, a_file_that_ends_early_is_said_with_its_byte);
    tcase_add_test(tests, a_request_that_fails_says_why_and_others_go_on);
    tcase_add_test(tests, a_request_may_be_sent_from_done);
    tcase_add_test(tests, what_was_written_is_read_back);
    tcase_add_test(tests, any_thread_may_wake_the_owner);
    tcase_add_test(tests, the_choice_is_what_was_asked_for_or_suits_the_files);
    tcase_add_test(tests, what_the_kernel_does_not_tell_is_no_reason_to_map_a_file);
    tcase_add_test(tests, what_is_no_regular_file_is_not_opened_and_not_left_open);
    tcase_add_test(tests, a_file_that_stands_there_is_not_created_again);
    tcase_add_test(tests, a_file_that_changed_is_noticed);
    tcase_add_test(tests, regular_files_are_not_left_non_blocking);
    tcase_add_test(tests, again_is_tried_a_bounded_number_of_times_and_then_named);
    tcase_add_test(tests, direct_transfers_that_are_refused_late_take_the_page_cache);
    tcase_add_test(tests, plain_transfers_that_are_refused_late_take_the_page_cache);
    tcase_add_test(tests, a_mapped_file_that_shrinks_is_an_error_and_not_a_death);
    return run_suite("engine", tests);
}
