/* The foundations: errors, dtypes, sizes that overflow, instruction sets. */
#include "tests/unit.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/format/dtype.h"
#include "io/hash.h"
#include "io/isa.h"

START_TEST(the_first_error_stays)
{
    struct perta_err e = {0};
    ck_assert_int_eq(perta_fail(&e, PERTA_EINPUT, "byte %d", 7), PERTA_EINPUT);
    int line = __LINE__ - 1;
    ck_assert_int_eq(perta_fail_sys(&e, ENOENT, "later"), PERTA_EINPUT);
    ck_assert_str_eq(e.msg, "byte 7");
    ck_assert_int_eq(e.code, PERTA_EINPUT);
    ck_assert_int_eq(e.sys_errno, 0);
    ck_assert_int_eq(e.line, line);
    ck_assert_ptr_nonnull(strstr(e.file, "test_err.c"));
    ck_assert_int_eq(perta_err_context(&e, "shard %d", 3), PERTA_EINPUT);
    ck_assert_str_eq(e.msg, "shard 3: byte 7");
}
END_TEST

START_TEST(a_refusal_of_the_system_has_its_text)
{
    struct perta_err e = {0};
    ck_assert_int_eq(perta_fail_sys(&e, ENOENT, "x"), PERTA_ESYS);
    ck_assert_int_eq(e.sys_errno, ENOENT);
    ck_assert_str_eq(e.msg, "x: No such file or directory");
}
END_TEST

START_TEST(a_message_too_long_is_cut)
{
    struct perta_err e = {0};
    char text[2 * sizeof e.msg];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    perta_fail_sys(&e, ENOENT, "%s", text);
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
    perta_err_context(&e, "context");
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
    ck_assert_int_eq(strncmp(e.msg, "context: xxx", 12), 0);
    perta_err_context(&e, "%s", text);
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
}
END_TEST

START_TEST(every_dtype_has_a_name_and_a_width)
{
    for (int d = 0; d < PERTA_N_DTYPES; d++) {
        enum perta_dtype dtype = (enum perta_dtype)d, parsed;
        unsigned bits = perta_dtype_bits(dtype), unit = perta_dtype_unit_bytes(dtype);
        ck_assert(perta_dtype_parse(perta_dtype_name(dtype), &parsed));
        ck_assert_int_eq(parsed, d);
        ck_assert(bits == 4 || bits == 6 || bits % 8 == 0);
        ck_assert_uint_eq(unit, dtype == PERTA_C64 ? 4 : bits < 8 ? 1 : bits / 8);
    }
    enum perta_dtype parsed;
    static const char *const unknown[] = {"", "bf16", "F", "F128", "BF16 "};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        ck_assert(!perta_dtype_parse(unknown[i], &parsed));
}
END_TEST

START_TEST(sizes_that_overflow_are_noticed)
{
    uint64_t n;
    ck_assert(!perta_add_overflows(UINT64_MAX - 1, 1, &n) && n == UINT64_MAX);
    ck_assert(perta_add_overflows(UINT64_MAX, 1, &n));
    ck_assert(!perta_mul_overflows(1ull << 32, (1ull << 32) - 1, &n));
    ck_assert(perta_mul_overflows(1ull << 32, 1ull << 32, &n));
    ck_assert_uint_eq(perta_align_up(4097, 4096), 8192);
    ck_assert_uint_eq(perta_align_up(4096, 4096), 4096);
    ck_assert_uint_eq(perta_align_down(4095, 4096), 0);
}
END_TEST

/* The values that xxhsum -H3, xxhsum -H2 and sha256sum print. */
START_TEST(digests_are_those_of_other_tools)
{
    struct perta_digest_hex hex;
    ck_assert_uint_eq(perta_hash64("", 0), 0x2d06800538d394c2u);
    for (int with_sha256 = 0; with_sha256 < 2; with_sha256++) {
        struct perta_digest *digest = perta_digest_new(with_sha256);
        perta_digest_update(digest, "a", 1);
        perta_digest_update(digest, "", 0);
        perta_digest_update(digest, "bc", 2);
        perta_digest_finish(digest, &hex);
        perta_digest_free(digest);
        ck_assert_uint_eq(hex.len_bytes, 3);
        ck_assert_str_eq(hex.xxh128, "06b05ab6733a618578af5f94892f3950");
        ck_assert_str_eq(hex.sha256, with_sha256 ? "ba7816bf8f01cfea414140de5dae2223"
                                                   "b00361a396177a9cb410ff61f20015ad"
                                                 : "");
    }
}
END_TEST

/* In a separate process, because the choice is made once. */
static enum perta_isa chosen_with(const char *asked)
{
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (!child) {
        setenv("PERTA_ISA", asked, 1);
        _exit((int)perta_isa_chosen());
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFEXITED(status));
    return (enum perta_isa)WEXITSTATUS(status);
}

START_TEST(an_instruction_set_is_chosen_by_hand_but_never_one_the_cpu_lacks)
{
    enum perta_isa isas[PERTA_N_ISAS + 1];
    for (int i = 0; i < PERTA_N_ISAS; i++)
        isas[i] = chosen_with(perta_isa_name((enum perta_isa)i));
    isas[PERTA_N_ISAS] = chosen_with("v9");
    enum perta_isa best = perta_isa_best();
    for (int i = 0; i < PERTA_N_ISAS; i++)
        ck_assert_int_eq(isas[i], i < (int)best ? i : (int)best);
    ck_assert_int_eq(isas[PERTA_N_ISAS], best);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("err");
    tcase_add_test(tests, the_first_error_stays);
    tcase_add_test(tests, a_refusal_of_the_system_has_its_text);
    tcase_add_test(tests, a_message_too_long_is_cut);
    tcase_add_test(tests, every_dtype_has_a_name_and_a_width);
    tcase_add_test(tests, sizes_that_overflow_are_noticed);
    tcase_add_test(tests, digests_are_those_of_other_tools);
    tcase_add_test(tests, an_instruction_set_is_chosen_by_hand_but_never_one_the_cpu_lacks);
    return run_suite("err", tests);
}
