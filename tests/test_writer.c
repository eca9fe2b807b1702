/* A writer writes what was appended, in parts of any size; failures are reported, and no file stays
 * open. */
#include "tests/scratch.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>

#include "io/writer.h"
#include "tests/engines.h"

static struct perta_err err;

static void append_all(struct perta_writer *writer, const uint8_t *data, uint64_t len,
                       uint64_t most, uint64_t *seed)
{
    for (uint64_t at = 0; at < len;) {
        uint64_t n = 1 + next_random(seed) % most;
        n = n < len - at ? n : len - at;
        ck_assert_ok(perta_writer_append(writer, data + at, n, &err));
        at += n;
        ck_assert_uint_eq(perta_writer_tell(writer), at);
    }
}

static void digest_is_that_of(const struct perta_digest_hex *have, const uint8_t *data,
                              uint64_t len)
{
    struct perta_digest_hex want;
    struct perta_digest *digest = perta_digest_new(true);
    perta_digest_update(digest, data, len);
    perta_digest_finish(digest, &want);
    perta_digest_free(digest);
    ck_assert_uint_eq(have->len_bytes, len);
    ck_assert_str_eq(have->xxh128, want.xxh128);
    ck_assert_str_eq(have->sha256, want.sha256);
}

START_TEST(a_writer_writes_what_was_appended)
{
    static const uint64_t around[] = {0, PERTA_BLOCK_BYTES, PERTA_WRITER_BUF_BYTES,
                                      2 * PERTA_WRITER_BUF_BYTES, 5 * PERTA_WRITER_BUF_BYTES + 7};
    uint64_t seed = 3, most = 5 * PERTA_WRITER_BUF_BYTES + 8;
    uint8_t *data = alloc(most);
    fill_random(data, most, 1);
    for (unsigned s = 0; s < 15; s++) {
        uint64_t len = around[s / 3] + s % 3 - (s > 2); /* one less, equal, one more */
        /* preallocated: nothing, exactly the length, too much */
        uint64_t expected = s % 3 == 0 ? 0 : len + (s % 3 - 1) * 1000000u;
        for_each_engine(engine, 4)
        {
            struct perta_writer writer;
            struct perta_digest_hex hex;
            struct perta_writer_bufs bufs = {pool, 2 + s % 3}; /* 4 would use up the pool */
            ck_assert_ok(perta_writer_open(&writer, engine, "w", expected, bufs, &err));
            append_all(&writer, data, len, s % 2 ? 3000000 : 70000, &seed);
            ck_assert_ok(perta_writer_close(&writer, &hex, &err));
            perta_writer_abort(&writer); /* does nothing after closing */
            digest_is_that_of(&hex, data, len);
            ck_assert(holds("w", data, len));
            unlink("w");
        }
    }
    free(data);
}
END_TEST

/* Some file systems refuse direct writes only when they are made, and all of them refuse memory
 * that is not aligned. */
START_TEST(direct_writes_that_are_refused_late_take_the_page_cache)
{
    uint64_t len = 3 * PERTA_WRITER_BUF_BYTES + 4097, seed = 3;
    uint8_t *data = alloc(len);
    fill_random(data, len, 1);
    for_each_engine(engine, 2)
    {
        struct perta_writer writer;
        struct perta_digest_hex hex;
        struct perta_writer_bufs bufs = {pool + 1, 2};
        ck_assert_ok(perta_writer_open(&writer, engine, "w", len, bufs, &err));
        append_all(&writer, data, len / 2, 70000, &seed);
        ck_assert_ok(perta_writer_sync(&writer, &err)); /* the last block is written twice */
        ck_assert_ok(perta_writer_append(&writer, data + len / 2, len - len / 2, &err));
        ck_assert_ok(perta_writer_close(&writer, &hex, &err));
        digest_is_that_of(&hex, data, len);
        ck_assert(holds("w", data, len));
        unlink("w");
    }
    free(data);
}
END_TEST

START_TEST(two_writers_share_an_engine)
{
    uint64_t len = 3 * PERTA_WRITER_BUF_BYTES + 5;
    uint8_t *data = alloc(len);
    fill_random(data, len, 1);
    for_each_engine(engine, 1)
    {
        struct perta_writer a, b;
        struct perta_writer_bufs bufs = {pool, 2}, second = {pool + 2 * PERTA_WRITER_BUF_BYTES, 2};
        ck_assert_ok(perta_writer_open(&a, engine, "a", 0, bufs, &err));
        ck_assert_ok(perta_writer_open(&b, engine, "b", len, second, &err));
        for (uint64_t at = 0; at < len / 5 * 5; at += len / 5) {
            ck_assert_ok(perta_writer_append(&a, data + at, len / 5, &err));
            ck_assert_ok(perta_writer_append(&b, data + at, len / 5, &err));
        }
        ck_assert_ok(perta_writer_close(&b, NULL, &err));
        ck_assert_ok(perta_writer_close(&a, NULL, &err));
        ck_assert(holds("a", data, len / 5 * 5));
        ck_assert(holds("b", data, len / 5 * 5));
        unlink("a");
        unlink("b");
    }
    free(data);
}
END_TEST

START_TEST(a_file_that_stands_there_is_not_overwritten)
{
    put_text("w", "mine");
    for_each_engine(engine, 2)
    {
        struct perta_writer writer;
        struct perta_err e = {0};
        struct perta_writer_bufs bufs = {pool, 2};
        ck_assert_int_eq(perta_writer_open(&writer, engine, "w", 0, bufs, &e), PERTA_ESYS);
        ck_assert_int_eq(e.sys_errno, EEXIST);
        perta_writer_abort(&writer);
    }
    ck_assert(holds("w", "mine", 4));
}
END_TEST

START_TEST(giving_up_waits_and_closes)
{
    uint64_t len = 4 * PERTA_WRITER_BUF_BYTES + 5;
    uint8_t *data = alloc(len);
    unsigned n_open = 0;
    for_each_engine(engine, 2)
    {
        struct perta_writer writer = {0};
        struct perta_writer_bufs bufs = {pool, 3};
        n_open = count_open_files();
        perta_writer_abort(&writer); /* does nothing, because it was never opened */
        ck_assert_ok(perta_writer_open(&writer, engine, "w", len, bufs, &err));
        ck_assert_ok(perta_writer_append(&writer, data, len, &err));
        perta_writer_abort(&writer);
        perta_writer_abort(&writer);
        ck_assert_uint_eq(engine->n_in_flight, 0);
        ck_assert_uint_eq(count_open_files(), n_open);
        ck_assert(is_there("w")); /* the owner of the folder removes it */
        unlink("w");
    }
    free(data);
}
END_TEST

START_TEST(a_write_that_fails_is_said_with_its_byte)
{
    struct rlimit limit = {3 << 20, 3 << 20};
    uint64_t len = 4 * PERTA_WRITER_BUF_BYTES + 5;
    uint8_t *data = alloc(len);
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0); /* limits only this case's process */
    for_each_engine(engine, 2)
    {
        struct perta_writer writer;
        struct perta_err e = {0};
        struct perta_writer_bufs bufs = {pool, 2};
        ck_assert_ok(perta_writer_open(&writer, engine, "w", 0, bufs, &err));
        int rc = perta_writer_append(&writer, data, len, &e);
        if (!rc) /* errors appear at close at the latest */
            rc = perta_writer_close(&writer, NULL, &e);
        ck_assert_int_eq(rc, PERTA_ESYS);
        ck_assert_int_eq(e.sys_errno, EFBIG);
        static const char says[] = "w: write at byte "; /* in either buffer in flight */
        ck_assert_msg(!strncmp(e.msg, says, strlen(says)), "%s", e.msg);
        ck_assert_uint_ge(strtoull(e.msg + strlen(says), NULL, 10), limit.rlim_cur);
        perta_writer_abort(&writer);
        ck_assert_uint_eq(engine->n_in_flight, 0);
        unlink("w");
    }
    free(data);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("writer");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, a_writer_writes_what_was_appended);
    tcase_add_test(tests, direct_writes_that_are_refused_late_take_the_page_cache);
    tcase_add_test(tests, two_writers_share_an_engine);
    tcase_add_test(tests, a_file_that_stands_there_is_not_overwritten);
    tcase_add_test(tests, giving_up_waits_and_closes);
    tcase_add_test(tests, a_write_that_fails_is_said_with_its_byte);
    return run_suite("writer", tests);
}
