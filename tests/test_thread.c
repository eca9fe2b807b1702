/* The stacks of threads are small, but several times as large as the deepest call needs. */
#include "tests/unit.h"

#include <sys/mman.h>

#include "io/format/codec.h"
#include "io/hash.h"
#include "io/pool.h"
#include "io/thread.h"

enum { N = 1 << 20 };

/* The stack of this thread: its size, and how much of it has ever been used. */
struct stack {
    uint64_t len_bytes, used_bytes;
};

static struct stack look(void)
{
    static unsigned char in[(PERTA_STACK_BYTES >> 12) + 64];
    pthread_attr_t attr;
    void *base;
    size_t len;
    ck_assert_int_eq(pthread_getattr_np(pthread_self(), &attr), 0);
    ck_assert_int_eq(pthread_attr_getstack(&attr, &base, &len), 0);
    pthread_attr_destroy(&attr);
    size_t page = perta_page_bytes(), n = len / page, untouched = 0;
    ck_assert_uint_le(n, sizeof in);
    ck_assert_int_eq(mincore(base, len, in), 0);
    while (untouched < n && !(in[untouched] & 1))
        untouched++;
    return (struct stack){len, len - untouched * page};
}

/* Encode and decode, with both encodings. */
static void code(struct perta_codec *codec, enum perta_dtype dtype, uint8_t *buf, uint8_t *frame)
{
    struct perta_err err = {0};
    struct perta_coded coded;
    uint64_t hash;
    size_t room = perta_codec_bound(N);
    uint8_t *before = buf, *after = buf + N, *back = buf + 2 * N;
    ck_assert_ok(perta_codec_encode(codec, dtype, before, after, N, frame, room, &coded, &err));
    ck_assert_ok(perta_codec_apply(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                   coded.payload_bytes, before, back, N, &err));
    ck_assert_ok(perta_codec_revert(codec, dtype, coded.encoding, frame, coded.frame_bytes,
                                    coded.payload_bytes, after, back, N, &err));
    ck_assert_ok(perta_codec_encode_values(codec, dtype, before, after, N, frame, room, &coded,
                                           &hash, &err));
    ck_assert_ok(perta_codec_apply_values(codec, dtype, frame, coded.frame_bytes,
                                          coded.payload_bytes, before, back, N, &hash, &err));
}

static void *go_deep(void *arg)
{
    struct perta_codec *codec = perta_codec_new(N);
    uint8_t *buf = alloc(3 * N), *frame = alloc(perta_codec_bound(N));
    struct perta_err err = {0};
    fill_random(buf, N, 1);
    memcpy(buf + N, buf, N);
    for (size_t i = 0; i < N; i += 5)
        buf[N + i] ^= (uint8_t)(i % 4);
    for (int dtype = 0; dtype < PERTA_N_DTYPES; dtype++)
        code(codec, (enum perta_dtype)dtype, buf, frame);
    struct perta_digest *digest = perta_digest_new(true);
    perta_digest_add(digest, buf, N);
    perta_digest_free(digest);
    perta_fail(&err, PERTA_EINPUT, "%200s: tensor %200s, element %d: %g", "a", "b", N, 0.1);
    *(struct stack *)arg = look();
    free(buf);
    free(frame);
    perta_codec_free(codec);
    return NULL;
}

START_TEST(what_goes_deepest_takes_a_part_of_a_stack)
{
    pthread_t thread;
    struct stack stack;
    ck_assert_int_eq(perta_thread_start(&thread, go_deep, &stack), 0);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    ck_assert_uint_le(stack.len_bytes, PERTA_STACK_BYTES + perta_page_bytes());
    ck_assert_uint_gt(stack.used_bytes, 0);
    ck_assert_uint_le(2 * stack.used_bytes, PERTA_STACK_BYTES);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("thread");
    tcase_add_test(tests, what_goes_deepest_takes_a_part_of_a_stack);
    return run_suite("thread", tests);
}
