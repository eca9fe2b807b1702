/* unit.h - what the unit tests share: pseudo-random bytes, scratch folders, and running a suite. */
#ifndef PERTA_TESTS_UNIT_H
#define PERTA_TESTS_UNIT_H

#include <check.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* SplitMix64. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline void fill_random(void *to, size_t len_bytes, uint64_t seed)
{
    uint8_t *bytes = to;
    for (size_t i = 0; i < len_bytes; i++)
        bytes[i] = (uint8_t)next_random(&seed);
}

static inline void *alloc(size_t len_bytes)
{
    void *p = calloc(1, len_bytes + 1);
    ck_assert_ptr_nonnull(p);
    return p;
}

#define ck_assert_ok(call) ck_assert_msg(!(call), "%s: %s", #call, err.msg)

/* Run a suite of one test case; returns the exit status of main. */
static inline int run_suite(const char *name, TCase *tests)
{
    Suite *suite = suite_create(name);
    tcase_set_timeout(tests, 1800); /* only stops tests that hang: machines may be busy, sanitizers
                                     * are slow */
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}

#endif
