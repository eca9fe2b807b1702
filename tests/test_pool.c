/* Large buffers take whole pages and no more, whatever the size of huge pages. */
#include "tests/unit.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include "io/checked.h"
#include "io/pool.h"

#define MIB (1ull << 20)

/* The huge pages of x86-64; none; those of aarch64 with pages of 16 and 64 KiB. */
static const uint64_t huge[] = {2 * MIB, 0, 32 * MIB, 512 * MIB};

/* How many bytes of the pool are resident. */
static uint64_t resident(const struct perta_pool *pool)
{
    uint64_t page = perta_page_bytes(), n = pool->len_bytes / page, found = 0;
    unsigned char *in = alloc(n);
    ck_assert_int_eq(mincore(pool->base, pool->len_bytes, in), 0);
    for (uint64_t i = 0; i < n; i++)
        found += in[i] & 1;
    free(in);
    return found * page;
}

START_TEST(a_pool_is_as_long_as_asked_for)
{
    static const uint64_t lengths[] = {0, 1, 100000, 2 * MIB, 3 * MIB + 1, 33 * MIB, 513 * MIB};
    struct perta_err err = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct perta_pool pool;
        ck_assert_ok(perta_pool_take_for(&pool, lengths[i], huge[_i], &err));
        uint64_t wanted = lengths[i] ? lengths[i] : 1;
        ck_assert_uint_eq(pool.len_bytes, perta_align_up(wanted, perta_page_bytes()));
        bool fills_one = huge[_i] && pool.len_bytes >= huge[_i];
        uint64_t unit = fills_one ? huge[_i] : perta_page_bytes();
        ck_assert_uint_eq((uintptr_t)pool.base % unit, 0);
        ck_assert_uint_eq(resident(&pool), 0);
        if (lengths[i]) {
            pool.base[0] = pool.base[lengths[i] - 1] = 1;
            ck_assert_uint_gt(resident(&pool), 0);
        }
        perta_pool_give(&pool);
        ck_assert_ptr_null(pool.base);
        perta_pool_give(&pool);
    }
}
END_TEST

START_TEST(where_address_space_is_short_alignment_is_done_without)
{
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    return; /* sanitizers reserve terabytes of it */
#endif
    struct perta_err err = {0};
    struct perta_pool pool;
    struct rlimit limit = {1100 * MIB, 1100 * MIB};
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &limit), 0);
    ck_assert_ok(perta_pool_take_for(&pool, 600 * MIB, 512 * MIB, &err));
    perta_pool_give(&pool);
    ck_assert_int_eq(perta_pool_take_for(&pool, 1200 * MIB, 512 * MIB, &err), PERTA_ESYS);
    ck_assert_msg(strstr(err.msg, "1200 MiB of buffers"), "%s", err.msg);
}
END_TEST

START_TEST(sizes_of_pages_are_powers_of_two)
{
    uint64_t page = perta_page_bytes(), large = perta_huge_page_bytes();
    ck_assert_uint_ge(page, 4096);
    ck_assert_uint_eq(page & (page - 1), 0);
    ck_assert(!large || (large > page && !(large & (large - 1))));
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("pool");
    tcase_add_loop_test(tests, a_pool_is_as_long_as_asked_for, 0, sizeof huge / sizeof *huge);
    tcase_add_test(tests, where_address_space_is_short_alignment_is_done_without);
    tcase_add_test(tests, sizes_of_pages_are_powers_of_two);
    return run_suite("pool", tests);
}
