/* Writes in the background: every byte reaches its place, and no failure is lost. */
#include "tests/scratch.h"

#include <errno.h>
#include <fcntl.h>

#include "io/behind.h"

#define SIZE ((23u << 20) + 777) /* more than all pieces take */

static struct perta_err err;

/* Write data in ranges of all sizes, out of order, each once; with direct_fd if it is a file. */
static void write_all(struct perta_behind *behind, int fd, int direct_fd, const uint8_t *data)
{
    uint64_t starts[64] = {0}, seed = 1;
    size_t n = 1;
    for (; n < 60; n++)
        starts[n] = starts[n - 1] + 1 + next_random(&seed) % (n % 3 ? 5000 : 900000);
    starts[n] = SIZE;
    for (size_t i = 0; i < n; i++) {
        size_t at = (i * 37) % n; /* 37 and 60 have no common factor */
        uint64_t len = starts[at + 1] - starts[at];
        uint8_t *copy = alloc(len);
        memcpy(copy, data + starts[at], len);
        ck_assert_ok(perta_behind_write(behind, fd, direct_fd, copy, len, starts[at], "f", &err));
        memset(copy, 0, len); /* the caller may reuse it */
        free(copy);
    }
}

static void bytes_are_in_place(const char *path, int direct)
{
    struct perta_behind *behind;
    uint8_t *data = alloc(SIZE);
    fill_random(data, SIZE, 2);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    int direct_fd = direct ? open(path, O_WRONLY | direct) : -1;
    ck_assert_int_ge(fd, 0);
    ck_assert_ok(perta_behind_open(&behind, &err));
    write_all(behind, fd, direct_fd, data);
    ck_assert_ok(perta_behind_settle(behind, &err));
    ck_assert(holds(path, data, SIZE));
    perta_behind_close(behind);
    close(fd);
    if (direct_fd >= 0)
        close(direct_fd);
    free(data);
}

START_TEST(every_byte_is_where_it_belongs)
{
    bytes_are_in_place("f", O_DIRECT);
    bytes_are_in_place("f", 0);
}
END_TEST

START_TEST(a_failure_is_told_by_what_comes_after)
{
    struct perta_behind *behind;
    uint8_t *data = alloc(SIZE);
    put_text("f", "");
    int fd = open("f", O_RDONLY); /* a write to it fails */
    ck_assert_ok(perta_behind_open(&behind, &err));
    struct perta_err e = {0};
    perta_behind_write(behind, fd, -1, data, 5, 70, "tensor w", &e);
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_behind_settle(behind, &e), PERTA_ESYS);
    ck_assert_int_eq(e.sys_errno, EBADF);
    ck_assert_ptr_nonnull(strstr(e.msg, "tensor w: byte 70"));
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_behind_write(behind, fd, -1, data, 5, 0, "other", &e), PERTA_ESYS);
    ck_assert_ptr_nonnull(strstr(e.msg, "tensor w: byte 70"));
    perta_behind_close(behind);
    close(fd);
    free(data);
}
END_TEST

START_TEST(a_file_without_direct_writes_is_written_all_the_same)
{
    bytes_are_in_place("/dev/shm/perta-test-behind", 0);
    unlink("/dev/shm/perta-test-behind");
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tests");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, every_byte_is_where_it_belongs);
    tcase_add_test(tests, a_failure_is_told_by_what_comes_after);
    tcase_add_test(tests, a_file_without_direct_writes_is_written_all_the_same);
    return run_suite("behind", tests);
}
