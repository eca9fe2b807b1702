/* An embedding and a head that config.json ties, when both are stored. */
#include "tests/scratch.h"

#include <sys/stat.h>

#include "io/format/tied.h"

#define EMBED "model.embed_tokens.weight"
#define HEAD "lm_head.weight"
#define N 300000ull /* more than a piece, and not a multiple of one */

static struct perta_err err;

static void put_shard(const char *path, const char *name, enum perta_dtype dtype, uint64_t width,
                      int64_t other)
{
    uint64_t shape[2] = {N / width, width}, len;
    struct perta_tensor tensor = {
        .name = (char *)name, .dtype = dtype, .n_dims = 2, .shape = shape, .n_elems = N};
    uint64_t n_bytes = N * perta_dtype_unit_bytes(dtype);
    uint8_t *bytes = make_header(&tensor, 1, n_bytes, &len);
    fill_random(bytes + len, n_bytes, 7);
    if (other >= 0)
        bytes[len + (uint64_t)other] ^= 1;
    put_file(path, bytes, len + n_bytes);
    free(bytes);
}

/* other: the byte of the head that differs from the embedding's; -1: none. */
static void put_model(const char *config, enum perta_dtype dtype, uint64_t width, int64_t other)
{
    mkdir("m", 0777);
    put_text("m/config.json", config);
    put_shard("m/1.safetensors", EMBED, PERTA_BF16, 100, -1);
    put_shard("m/2.safetensors", HEAD, dtype, width, other);
}

static void check(const char *says)
{
    struct perta_checkpoint *ck;
    struct perta_err e = {0};
    unsigned n_open = count_open_files();
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    int rc = perta_tied_check(ck, &e);
    perta_checkpoint_close(ck);
    ck_assert_uint_eq(count_open_files(), n_open);
    ck_assert_msg(rc == (says ? PERTA_EINPUT : 0), "%d: %s", rc, e.msg);
    ck_assert_msg(!says || (strstr(e.msg, says) && strstr(e.msg, EMBED) && strstr(e.msg, HEAD)),
                  "%s", e.msg);
}

#define TIED "{\"tie_word_embeddings\":true}"

START_TEST(the_same_bytes_are_fine)
{
    put_model(TIED, PERTA_BF16, 100, -1);
    check(NULL);
}
END_TEST

START_TEST(any_byte_that_differs_is_named_with_both_tensors)
{
    const int64_t at[] = {0, 1 << 19, 2 * N - 1};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        put_model(TIED, PERTA_BF16, 100, at[i]);
        check("tie_word_embeddings");
    }
    put_model(TIED, PERTA_F16, 100, -1);
    check("differ");
    put_model(TIED, PERTA_BF16, 50, -1);
    check("differ");
}
END_TEST

START_TEST(where_they_are_not_tied_they_may_differ)
{
    put_model("{\"tie_word_embeddings\":false}", PERTA_BF16, 100, 5);
    check(NULL);
    put_model("{}", PERTA_BF16, 100, 5);
    check(NULL);
    put_model(TIED, PERTA_BF16, 100, 5);
    ck_assert_int_eq(unlink("m/2.safetensors"), 0);
    check(NULL);
}
END_TEST

START_TEST(another_shard_by_now_is_not_compared)
{
    struct perta_checkpoint *ck;
    struct perta_err e = {0};
    put_model(TIED, PERTA_BF16, 100, -1);
    ck_assert_ok(perta_checkpoint_open("m", &ck, &err));
    put_shard("other", HEAD, PERTA_BF16, 100, -1);
    ck_assert_int_eq(rename("other", "m/2.safetensors"), 0);
    ck_assert_int_eq(perta_tied_check(ck, &e), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "m/2.safetensors: changed since"));
    perta_checkpoint_close(ck);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("tied");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, the_same_bytes_are_fine);
    tcase_add_test(tests, any_byte_that_differs_is_named_with_both_tensors);
    tcase_add_test(tests, where_they_are_not_tied_they_may_differ);
    tcase_add_test(tests, another_shard_by_now_is_not_compared);
    return run_suite("tied", tests);
}
