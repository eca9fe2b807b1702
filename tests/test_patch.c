/* The patch container: what was built is parsed; what is damaged or foreign is refused. */
#include "tests/unit.h"

#include <unistd.h>

#include "io/format/patch.h"

static struct perta_err err;

/* A header of n U8 tensors of 5 bytes, with metadata that distinguishes it. */
static struct perta_header *header(unsigned n, const char *mark)
{
    struct perta_tensor tensors[8] = {{0}};
    char names[8][8];
    static uint64_t five = 5;
    for (unsigned i = 0; i < n; i++) {
        snprintf(names[i], sizeof names[i], "t%u", i);
        tensors[i] = (struct perta_tensor){
            .name = names[i], .dtype = PERTA_U8, .n_dims = 1, .shape = &five, .n_elems = 5};
    }
    json_t *metadata = json_pack("{s:s}", "mark", mark);
    uint8_t *bytes;
    uint64_t len;
    struct perta_header *made;
    ck_assert_ok(perta_safetensors_build(tensors, n, metadata, &bytes, &len, &err));
    ck_assert_ok(perta_safetensors_parse(bytes, len, len + 5 * n, "made", &made, &err));
    json_decref(metadata);
    free(bytes);
    return made;
}

/* Build a patch of three tensors, of which the second does not change. Returns its length. */
static uint64_t build(uint8_t **bytes, bool headers_differ)
{
    struct perta_header *before = header(3, "a"), *after = header(3, headers_differ ? "b" : "a");
    uint8_t *head, *table;
    uint64_t head_bytes, table_bytes;
    ck_assert_ok(perta_patch_head_build(before, after, &head, &head_bytes, &err));
    struct perta_patch_entry entries[3] = {
        {head_bytes, 7, 5, 0, 5, PERTA_ENC_DELTA, 1, 2},
        {0, 0, 0, 1, 5, PERTA_ENC_ZERO, 3, 3},
        {head_bytes + 7, 9, 5, 2, 5, PERTA_ENC_DELTA, 4, 5},
    };
    ck_assert_ok(perta_patch_table_build(entries, 3, &table, &table_bytes, &err));
    uint64_t len = head_bytes + 16 + table_bytes;
    *bytes = alloc(len);
    memcpy(*bytes, head, head_bytes);
    memset(*bytes + head_bytes, 'x', 16);
    memcpy(*bytes + head_bytes + 16, table, table_bytes);
    free(head);
    free(table);
    perta_header_free(before);
    perta_header_free(after);
    return len;
}

START_TEST(what_was_built_is_parsed_from_memory_and_from_a_file)
{
    for (int differ = 0; differ < 2; differ++) {
        uint8_t *bytes;
        uint64_t len = build(&bytes, differ);
        FILE *file = tmpfile();
        ck_assert_uint_eq(fwrite(bytes, 1, len, file), len);
        fflush(file);
        struct perta_patch *patches[2];
        ck_assert_ok(perta_patch_parse(bytes, len, "p", &patches[0], &err));
        ck_assert_ok(perta_patch_read(fileno(file), len, "p", NULL, &patches[1], &err));
        for (int i = 0; i < 2; i++) {
            const struct perta_patch *p = patches[i];
            ck_assert_int_eq(p->before == p->after, !differ);
            ck_assert_uint_eq(p->n_entries, 3);
            ck_assert_uint_eq(p->entries[2].frame_off, p->head_bytes + 7);
            ck_assert_uint_eq(p->entries[2].hash_after, 5);
            ck_assert_int_eq(p->entries[1].encoding, PERTA_ENC_ZERO);
            ck_assert_uint_eq(p->table_off, p->head_bytes + 16);
            ck_assert_str_eq(p->after->tensors[2].name, "t2");
            perta_patch_free(patches[i]);
        }
        fclose(file);
        free(bytes);
    }
}
END_TEST

START_TEST(every_flipped_bit_outside_the_frames_is_refused)
{
    uint8_t *bytes;
    uint64_t len = build(&bytes, true);
    struct perta_patch *patch;
    ck_assert_ok(perta_patch_parse(bytes, len, "p", &patch, &err));
    uint64_t frames = patch->head_bytes;
    perta_patch_free(patch);
    for (uint64_t at = 0; at < len; at++)
        for (int bit = 0; bit < 8 && (at < frames || at >= frames + 16); bit++) {
            struct perta_err why = {0};
            bytes[at] ^= (uint8_t)(1 << bit);
            int rc = perta_patch_parse(bytes, len, "p", &patch, &why);
            ck_assert_msg(rc == PERTA_ECHECK || rc == PERTA_EINPUT, "byte %llu, bit %d: %d",
                          (unsigned long long)at, bit, rc);
            ck_assert(strstr(why.msg, "p: "));
            bytes[at] ^= (uint8_t)(1 << bit);
        }
    free(bytes);
}
END_TEST

START_TEST(every_truncation_is_refused)
{
    uint8_t *bytes;
    uint64_t len = build(&bytes, false);
    for (uint64_t n = 0; n < len; n++) {
        struct perta_err why = {0};
        struct perta_patch *patch;
        uint8_t *cut = malloc(n ? n : 1); /* so that the sanitizer sees where it ends */
        memcpy(cut, bytes, n);
        int rc = perta_patch_parse(cut, n, "p", &patch, &why);
        ck_assert(rc == PERTA_ECHECK || rc == PERTA_EINPUT);
        free(cut);
    }
    free(bytes);
}
END_TEST

/* Entries with a correct digest that make no sense. A frame_off of 1 stands for the first frame. */
static void refused(struct perta_patch_entry *entries, uint64_t n, const char *says)
{
    struct perta_header *h = header(2, "a");
    uint8_t *head, *table, *bytes;
    uint64_t head_bytes, table_bytes;
    ck_assert_ok(perta_patch_head_build(h, h, &head, &head_bytes, &err));
    for (uint64_t i = 0; i < n; i++)
        entries[i].frame_off += entries[i].frame_off ? head_bytes - 1 : 0;
    ck_assert_ok(perta_patch_table_build(entries, n, &table, &table_bytes, &err));
    bytes = alloc(head_bytes + 10 + table_bytes);
    memcpy(bytes, head, head_bytes);
    memcpy(bytes + head_bytes + 10, table, table_bytes);
    struct perta_patch *patch;
    struct perta_err why = {0};
    ck_assert_int_eq(perta_patch_parse(bytes, head_bytes + 10 + table_bytes, "p", &patch, &why),
                     PERTA_ECHECK);
    ck_assert_msg(strstr(why.msg, says), "%s, not: %s", why.msg, says);
    perta_header_free(h);
    free(head);
    free(table);
    free(bytes);
}

START_TEST(entries_must_cover_the_tensors_in_order_and_frames_touch)
{
    const struct perta_patch_entry zero = {0, 0, 0, 0, 5, PERTA_ENC_ZERO, 1, 1};
    const struct perta_patch_entry second = {0, 0, 0, 1, 5, PERTA_ENC_ZERO, 1, 1};
    const char *order = "does not cover the tensors in order",
               *follow = "do not follow one another";
    struct {
        struct perta_patch_entry entries[3];
        const char *says;
    } bad[] = {
        {{zero, second}, "frames do not reach to the table"},
        {{second, zero}, order},
        {{{0, 0, 0, 0, 4, PERTA_ENC_ZERO, 1, 1}, second}, order},
        {{{0, 0, 0, 0, 5, PERTA_ENC_ZERO, 1, 2}, second}, "without change has a frame"},
        {{{2, 9, 5, 0, 5, PERTA_ENC_DELTA, 1, 2}, second}, follow},
        {{zero, {0, 0, 0, 1, 5, PERTA_ENC_DELTA, 1, 2}}, follow},
        {{zero, {1, 0, 5, 1, 5, PERTA_ENC_DELTA, 1, 2}}, follow},
        {{zero, {1, 10, 900, 1, 5, PERTA_ENC_DELTA, 1, 2}}, "longer than its chunk can need"},
        {{zero, {1, UINT32_MAX, 5, 1, 5, PERTA_ENC_DELTA, 1, 2}}, "longer than its chunk can need"},
        {{zero, {1, 11, 5, 1, 5, PERTA_ENC_DELTA, 1, 2}}, "frames do not reach to the table"},
        {{zero, {1, 10, 5, 7, 5, PERTA_ENC_DELTA, 1, 2}}, order},
        {{zero, {1, 10, 5, 1, 5, (enum perta_encoding)9, 1, 2}}, "unknown encoding"},
        {{zero, {1, 10, 5, 1, 5, PERTA_ENC_DELTA, 1, 2}, second}, "too many entries"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i].entries, i == 12 ? 3 : 2, bad[i].says);
    struct perta_patch_entry one = zero;
    refused(&one, 1, order); /* too few */
}
END_TEST

START_TEST(another_version_or_another_file_is_not_called_damaged)
{
    static const struct {
        unsigned at, value;
        int code;
        const char *says;
    } cases[] = {
        {16, 2, PERTA_EINPUT, "p: byte 16: patch format 2"},
        {20, 1, PERTA_EINPUT, "p: byte 16: patch format 1, flags 1"},
        {0, 0x28, PERTA_EINPUT, "p: byte 0: not a perta patch"},
        {8, 'p', PERTA_EINPUT, "p: byte 0: not a perta patch"},
        {4, 0xff, PERTA_ECHECK, "p: byte 4: the patch is damaged"},
        {60, 0xff, PERTA_ECHECK, "p: byte 8: the patch is damaged: the digest of its head"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *bytes;
        uint64_t len = build(&bytes, false);
        struct perta_patch *patch = (void *)1;
        struct perta_err why = {0};
        bytes[cases[i].at] = (uint8_t)cases[i].value;
        ck_assert_int_eq(perta_patch_parse(bytes, len, "p", &patch, &why), cases[i].code);
        ck_assert_msg(!strncmp(why.msg, cases[i].says, strlen(cases[i].says)), "%s", why.msg);
        ck_assert_ptr_null(patch);
        free(bytes);
    }
}
END_TEST

START_TEST(a_file_shorter_than_it_was_is_refused)
{
    uint8_t *bytes;
    uint64_t len = build(&bytes, false);
    for (uint64_t n = 0; n < len; n += 7) {
        FILE *file = tmpfile();
        struct perta_patch *patch;
        struct perta_err why = {0};
        ck_assert_uint_eq(fwrite(bytes, 1, n, file), n);
        fflush(file);
        ck_assert_int_eq(perta_patch_read(fileno(file), len, "p", NULL, &patch, &why),
                         PERTA_EINPUT);
        ck_assert_ptr_nonnull(strstr(why.msg, "p: ends at byte "));
        fclose(file);
    }
    free(bytes);
}
END_TEST

START_TEST(a_tensor_of_many_chunks_has_as_many_entries)
{
    uint64_t n = 2 * PERTA_CHUNK_ELEMS + 1, len, head_bytes, table_bytes;
    struct perta_tensor tensor = {
        .name = (char *)"t", .dtype = PERTA_BF16, .n_dims = 1, .shape = &n, .n_elems = n};
    uint8_t *bytes, *head, *table;
    struct perta_header *h;
    ck_assert_ok(perta_safetensors_build(&tensor, 1, NULL, &bytes, &len, &err));
    ck_assert_ok(perta_safetensors_parse(bytes, len, len + 2 * n, "made", &h, &err));
    ck_assert_ok(perta_patch_head_build(h, h, &head, &head_bytes, &err));
    struct perta_patch_entry entries[3] = {
        {.n_units = PERTA_CHUNK_ELEMS}, {.n_units = PERTA_CHUNK_ELEMS}, {.n_units = 1}};
    for (int wrong = 0; wrong < 2; wrong++) {
        struct perta_patch *patch;
        struct perta_err why = {0};
        entries[1].n_units -= (uint32_t)wrong; /* the same sum, divided differently */
        entries[2].n_units += (uint32_t)wrong;
        ck_assert_ok(perta_patch_table_build(entries, 3, &table, &table_bytes, &err));
        uint8_t *whole = alloc(head_bytes + table_bytes);
        memcpy(whole, head, head_bytes);
        memcpy(whole + head_bytes, table, table_bytes);
        ck_assert_int_eq(perta_patch_parse(whole, head_bytes + table_bytes, "p", &patch, &why),
                         wrong ? PERTA_ECHECK : 0);
        perta_patch_free(patch);
        free(whole);
        free(table);
    }
    perta_header_free(h);
    free(head);
    free(bytes);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("patch");
    tcase_add_test(tests, what_was_built_is_parsed_from_memory_and_from_a_file);
    tcase_add_test(tests, every_flipped_bit_outside_the_frames_is_refused);
    tcase_add_test(tests, every_truncation_is_refused);
    tcase_add_test(tests, entries_must_cover_the_tensors_in_order_and_frames_touch);
    tcase_add_test(tests, another_version_or_another_file_is_not_called_damaged);
    tcase_add_test(tests, a_file_shorter_than_it_was_is_refused);
    tcase_add_test(tests, a_tensor_of_many_chunks_has_as_many_entries);
    return run_suite("patch", tests);
}
