/* Digests computed in the background equal those computed in place; tickets say how far they have
 * come. */
#include "tests/scratch.h"

#include <stdatomic.h>

#include "io/hasher.h"

enum { N_DIGESTS = 3, BYTES = 1 << 20 };

static struct perta_err err;
static _Atomic int called;

static void note(void *user)
{
    atomic_fetch_add((_Atomic int *)user, 1);
}

/* More pieces than its queue holds, for several digests in turn. */
static void give_all(struct perta_digest **digests, const uint8_t *data)
{
    uint64_t seed = 1, at[N_DIGESTS] = {0};
    for (uint64_t left = (uint64_t)N_DIGESTS * BYTES; left;) {
        uint64_t i = next_random(&seed) % N_DIGESTS, n = next_random(&seed) % 900;
        n = n < BYTES - at[i] ? n : BYTES - at[i];
        perta_digest_update(digests[i], data + at[i], n);
        at[i] += n;
        left -= n;
        ck_assert_uint_eq(perta_digest_bytes(digests[i]), at[i]);
    }
}

static const unsigned n_threads[] = {1, 2, 3, 100};

START_TEST(digests_are_those_taken_in_line)
{
    uint8_t *data = malloc(BYTES);
    uint64_t seed = 2;
    for (uint64_t i = 0; i < BYTES; i++)
        data[i] = (uint8_t)next_random(&seed);
    struct perta_digest_hex want, have;
    struct perta_digest *line = perta_digest_new(true), *digests[N_DIGESTS];
    perta_digest_update(line, data, BYTES);
    perta_digest_finish(line, &want);
    struct perta_hasher *hasher;
    ck_assert_ok(perta_hasher_open(&hasher, n_threads[_i], NULL, NULL, &err));
    for (int i = 0; i < N_DIGESTS; i++) {
        digests[i] = perta_digest_new(true);
        perta_digest_offload(digests[i], hasher);
    }
    give_all(digests, data);
    perta_digest_finish(digests[0], &have); /* it waits itself */
    ck_assert_str_eq(have.sha256, want.sha256);
    perta_hasher_close(hasher); /* hashes the rest */
    for (int i = 0; i < N_DIGESTS; i++) {
        if (i)
            perta_digest_finish(digests[i], &have);
        ck_assert_str_eq(have.sha256, want.sha256);
        ck_assert_str_eq(have.xxh128, want.xxh128);
        perta_digest_free(digests[i]);
    }
    perta_digest_free(line);
    free(data);
}
END_TEST

/* What a commit point records covers all bytes given so far, and can be continued elsewhere. */
START_TEST(a_state_is_that_of_all_that_was_given)
{
    uint8_t *data = calloc(1, BYTES), state[PERTA_DIGEST_STATE_BYTES];
    struct perta_digest *digest = perta_digest_new(true), *on = perta_digest_new(true);
    struct perta_digest_hex want, have;
    struct perta_hasher *hasher;
    ck_assert_ok(perta_hasher_open(&hasher, 2, NULL, NULL, &err));
    perta_digest_offload(digest, hasher);
    perta_digest_offload(on, hasher);
    perta_digest_update(digest, data, BYTES);
    perta_digest_save(digest, state);
    ck_assert(perta_digest_restore(on, state));
    perta_digest_update(digest, data, 100);
    perta_digest_update(on, data, 100);
    perta_digest_finish(digest, &want);
    perta_digest_finish(on, &have);
    ck_assert_uint_eq(have.len_bytes, BYTES + 100);
    ck_assert_str_eq(have.sha256, want.sha256);
    perta_digest_free(digest);
    perta_digest_free(on);
    perta_hasher_close(hasher);
    free(data);
}
END_TEST

START_TEST(who_asks_is_called_when_it_has_passed)
{
    uint8_t *data = calloc(1, 64 * BYTES);
    struct perta_digest *digest = perta_digest_new(true);
    struct perta_hasher *hasher;
    ck_assert(perta_hasher_passed(NULL, perta_hasher_given(NULL)));
    ck_assert_ok(perta_hasher_open(&hasher, 3, note, &called, &err));
    ck_assert(perta_hasher_passed(hasher, perta_hasher_given(hasher)));
    perta_digest_offload(digest, hasher);
    perta_digest_update(digest, data, 64 * BYTES);
    uint64_t ticket = perta_hasher_given(hasher);
    bool has = perta_hasher_passed(hasher, ticket);
    perta_hasher_wait(hasher, ticket);
    perta_hasher_close(hasher);
    ck_assert_int_eq(atomic_load(&called), !has);
    perta_digest_free(digest);
    free(data);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("hasher");
    tcase_add_loop_test(tests, digests_are_those_taken_in_line, 0, 4);
    tcase_add_test(tests, a_state_is_that_of_all_that_was_given);
    tcase_add_test(tests, who_asks_is_called_when_it_has_passed);
    return run_suite("hasher", tests);
}
