/* The header parser and builder: what was built is parsed; every violation is named. */
#include "tests/unit.h"

#include <endian.h>
#include <unistd.h>

#include "io/format/safetensors.h"

static struct perta_err err;

/* A file: the length prefix, the JSON, and n_data zero bytes. The caller frees it. */
static uint8_t *file_of(const char *json, uint64_t n_data, uint64_t *header_bytes)
{
    uint64_t n = strlen(json), prefix = htole64(n);
    uint8_t *bytes = alloc(8 + n + n_data);
    memcpy(bytes, &prefix, 8);
    memcpy(bytes + 8, json, n);
    *header_bytes = 8 + n;
    return bytes;
}

static int parse(const char *json, uint64_t n_data, struct perta_header **header,
                 struct perta_err *e)
{
    uint64_t len;
    uint8_t *bytes = file_of(json, n_data, &len);
    int rc = perta_safetensors_parse(bytes, len, len + n_data, "f", header, e);
    free(bytes);
    return rc;
}

START_TEST(what_was_built_is_parsed)
{
    uint64_t shapes[PERTA_N_DTYPES][2];
    char names[PERTA_N_DTYPES][32];
    struct perta_tensor tensors[PERTA_N_DTYPES];
    uint64_t data_bytes = 0;
    for (int d = 0; d < PERTA_N_DTYPES; d++) {
        shapes[d][0] = 4;
        shapes[d][1] = (uint64_t)d;
        snprintf(names[d], sizeof names[d], "t.\"%d\".\xc3\xa4\n", d);
        tensors[d] = (struct perta_tensor){.name = names[d],
                                           .dtype = (enum perta_dtype)d,
                                           .n_dims = 2,
                                           .shape = shapes[d],
                                           .n_elems = 4 * (uint64_t)d};
        data_bytes += tensors[d].n_elems * perta_dtype_bits(tensors[d].dtype) / 8;
    }
    json_t *metadata = json_pack("{s:s, s:s}", "format", "pt", "a", "\xe2\x82\xac");
    uint8_t *bytes;
    uint64_t len;
    struct perta_header *h;
    ck_assert_ok(perta_safetensors_build(tensors, PERTA_N_DTYPES, metadata, &bytes, &len, &err));
    ck_assert_uint_eq(len % 8, 0);
    ck_assert_ok(perta_safetensors_parse(bytes, len, len + data_bytes, "f", &h, &err));
    ck_assert_uint_eq(h->n_tensors, PERTA_N_DTYPES);
    ck_assert(json_equal(h->metadata, metadata));
    ck_assert_uint_eq(h->len_bytes, len);
    ck_assert_mem_eq(h->bytes, bytes, len);
    for (int d = 0; d < PERTA_N_DTYPES; d++) {
        const struct perta_tensor *t = &h->tensors[d];
        ck_assert_str_eq(t->name, names[d]);
        ck_assert_int_eq(t->dtype, d);
        ck_assert_uint_eq(t->n_dims, 2);
        ck_assert_uint_eq(t->shape[1], (uint64_t)d);
        ck_assert_uint_eq(t->n_elems, 4 * (uint64_t)d);
        ck_assert_uint_eq(t->off_bytes, tensors[d].off_bytes);
        ck_assert_uint_eq(t->len_bytes, tensors[d].len_bytes);
    }
    perta_header_free(h);
    json_decref(metadata);
    free(bytes);
}
END_TEST

START_TEST(a_header_is_read_from_a_file_as_from_memory)
{
    uint64_t len;
    uint8_t *bytes =
        file_of("{\"a\":{\"dtype\":\"I16\",\"shape\":[3],\"data_offsets\":[0,6]}}", 6, &len);
    FILE *file = tmpfile();
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(bytes, 1, len + 6, file), len + 6);
    fflush(file);
    struct perta_header *h;
    ck_assert_ok(perta_safetensors_read(fileno(file), len + 6, "f", &h, &err));
    ck_assert_uint_eq(h->n_tensors, 1);
    ck_assert_uint_eq(h->tensors[0].off_bytes, len);
    perta_header_free(h);
    /* the file became shorter after its length was asked for */
    ck_assert_int_eq(ftruncate(fileno(file), 20), 0);
    ck_assert_int_eq(perta_safetensors_read(fileno(file), len + 6, "f", &h, &err), PERTA_EINPUT);
    ck_assert_ptr_null(h);
    ck_assert_ptr_nonnull(strstr(err.msg, "f: ends at byte 20"));
    fclose(file);
    free(bytes);
}
END_TEST

#define T(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

START_TEST(what_the_format_allows_is_accepted)
{
    static const struct {
        const char *json;
        uint64_t n_data, n_tensors;
    } cases[] = {
        {"{}", 0, 0},
        {" \n{} \t ", 0, 0},
        {"{\"__metadata__\":null}", 0, 0},
        {"{\"__metadata__\":{}}", 0, 0},
        {"{" T("s", "F64", "[]", "[0,8]") "}", 8, 1},
        {"{" T("s", "F4", "[2]", "[0,1]") "}", 1, 1},
        {"{" T("s", "F6_E2M3", "[4]", "[0,3]") "}", 3, 1},
        {"{" T("e", "F32", "[0,5]", "[0,0]") "}", 0, 1},
        {"{" T("e", "F32", "[0,9223372036854775807]", "[0,0]") "}", 0, 1},
        {"{" T("b", "U8", "[1]", "[1,2]") "," T("a", "U8", "[1]", "[0,1]") "}", 2, 2},
        {"{" T("b", "U8", "[2]", "[0,2]") "," T("e", "U8", "[0]", "[0,0]") "}", 2, 2},
        {"{\"a\":{\"x\":[{}],\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_header *h = NULL;
        struct perta_err e = {0};
        ck_assert_msg(!parse(cases[i].json, cases[i].n_data, &h, &e), "%s: %s", cases[i].json,
                      e.msg);
        ck_assert_uint_eq(h->n_tensors, cases[i].n_tensors);
        for (uint64_t t = 1; t < h->n_tensors; t++)
            ck_assert_uint_ge(h->tensors[t].off_bytes,
                              h->tensors[t - 1].off_bytes + h->tensors[t - 1].len_bytes);
        perta_header_free(h);
    }
}
END_TEST

START_TEST(each_breach_of_the_format_is_named_with_its_tensor_and_byte)
{
    static const struct {
        const char *json;
        uint64_t n_data;
        const char *says;
    } cases[] = {
        {"", 0, "f: byte 8: the header is not valid JSON"},
        {"[]", 0, "f: byte 8: the header is not a JSON object"},
        {"{\"a\":", 0, "f: byte 13: the header is not valid JSON"},
        {"{} x", 0, "the header is not valid JSON"},
        {"{\"\xff\":1}", 0, "the header is not valid JSON"},
        {"{\"a\\u0000b\":1}", 0, "the header is not valid JSON"},
        {"{" T("a", "U8", "[1]", "[0,1]") "," T("a", "U8", "[1]", "[0,1]") "}", 1, "duplicate"},
        {"{" T("a", "U8", "[1]", "[0,1]") "," T("\\u0061", "U8", "[1]", "[0,1]") "}", 1,
         "duplicate"},
        {"{\"__metadata__\":[]}", 0, "\"__metadata__\" is not an object"},
        {"{\"__metadata__\":{\"k\":1}}", 0, "the value of \"k\" is not a string"},
        {"{\"a\":7}", 0, "f: tensor a: its entry is not an object"},
        {"{\"a\":{}}", 0, "f: tensor a: no string \"dtype\""},
        {"{" T("a", "F31", "[1]", "[0,1]") "}", 1, "f: tensor a: unknown dtype \"F31\""},
        {"{\"a\":{\"dtype\":\"U8\"}}", 0, "f: tensor a: no array \"shape\""},
        {"{" T("a", "U8", "[-1]", "[0,1]") "}", 1, "f: tensor a: dimension 0"},
        {"{" T("a", "U8", "[1,1.0]", "[0,1]") "}", 1, "f: tensor a: dimension 1"},
        {"{" T("a", "U8", "[4294967296,4294967296]", "[0,1]") "}", 1, "product overflows"},
        {"{" T("a", "U8", "[0,4294967296,4294967296]", "[0,0]") "}", 0, "product overflows"},
        {"{" T("a", "F64", "[1152921504606846976]", "[0,0]") "}", 0, "size in bits overflows"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "\"data_offsets\" is not"},
        {"{" T("a", "U8", "[1]", "[0]") "}", 1, "\"data_offsets\" is not"},
        {"{" T("a", "U8", "[1]", "[1,0]") "}", 1, "\"data_offsets\" is not"},
        {"{" T("a", "U8", "[1]", "[-1,0]") "}", 1, "\"data_offsets\" is not"},
        {"{" T("a", "U8", "[1]", "[0,1.5]") "}", 1, "\"data_offsets\" is not"},
        {"{" T("a", "F4", "[3]", "[0,1]") "}", 1, "not a whole number of bytes"},
        {"{" T("a", "F32", "[1]", "[0,3]") "}", 3, "3 bytes, but its dtype F32 and shape take 4"},
        {"{" T("a", "U8", "[2]", "[0,2]") "}", 1,
         "f: tensor a ends at byte 63, beyond the file's end at byte 62"},
        {"{" T("a", "U8", "[1]", "[0,9223372036854775807]") "}", 1, "beyond the file's end"},
        {"{" T("a", "U8", "[1]", "[1,2]") "}", 2, "f: byte 61: a hole of 1 bytes before tensor a"},
        {"{" T("a", "U8", "[2]", "[0,2]") "," T("b", "U8", "[2]", "[1,3]") "}", 3,
         "tensor b overlaps tensor a"},
        {"{" T("a", "U8", "[1]", "[0,1]") "}", 5, "f: byte 62: 4 bytes after the last tensor"},
        {"{}", 1, "1 bytes after the last tensor belong to none"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_header *h = (void *)1;
        struct perta_err e = {0};
        ck_assert_msg(parse(cases[i].json, cases[i].n_data, &h, &e) == PERTA_EINPUT, "accepted: %s",
                      cases[i].json);
        ck_assert_ptr_null(h);
        ck_assert_int_eq(e.code, PERTA_EINPUT);
        ck_assert_msg(!strncmp(e.msg, "f: ", 3) && strstr(e.msg, cases[i].says),
                      "%s\n  says: %s\n  not: %s", cases[i].json, e.msg, cases[i].says);
    }
}
END_TEST

/* The header is read in two ways: as all writers write it, or with an escape in it. */
START_TEST(a_header_says_the_same_however_it_is_spelled)
{
    static const char *const spelled[] = {
        "{" T("b", "BF16", "[2,3]", "[0,12]") "," T("a", "U8", "[]", "[12,13]") "}",
        "{" T("b", "BF16", "[2,3]", "[0,12]") "," T("\\u0061", "U8", "[]", "[12,13]") "}",
        " { \"a\" :\n{ \"dtype\" : \"U8\" , \"shape\" : [ ] , \"data_offsets\" : [ 12 , 13 ] } , "
        "\"b\": {\"dtype\": \"BF16\", \"shape\": [2, 3], \"data_offsets\": [0, 12]}}\t\r ",
        "{" T("a", "U8", "[]",
              "[12,13]") ",\"__metadata__\":{\"k\":\"[{\"},\"b\":"
                         "{\"data_offsets\":[0,12],\"x\":1e5,\"shape\":[2,3],\"dtype\":\"BF16\"}}",
    };
    for (size_t i = 0; i < sizeof spelled / sizeof *spelled; i++) {
        struct perta_header *h = NULL;
        struct perta_err e = {0};
        ck_assert_msg(!parse(spelled[i], 13, &h, &e), "%s: %s", spelled[i], e.msg);
        ck_assert_uint_eq(h->n_tensors, 2);
        const struct perta_tensor *b = &h->tensors[0], *a = &h->tensors[1];
        ck_assert_str_eq(b->name, "b");
        ck_assert_uint_eq(b->n_dims, 2);
        ck_assert_uint_eq(b->shape[0] * 10 + b->shape[1], 23);
        ck_assert_uint_eq(b->off_bytes, h->len_bytes);
        ck_assert_int_eq(b->dtype, PERTA_BF16);
        ck_assert_str_eq(a->name, "a");
        ck_assert_uint_eq(a->n_dims, 0);
        ck_assert_uint_eq(a->off_bytes, h->len_bytes + 12);
        ck_assert_int_eq(a->dtype, PERTA_U8);
        perta_header_free(h);
    }
}
END_TEST

START_TEST(a_length_prefix_that_lies_is_refused_before_any_memory_is_taken)
{
    static const struct {
        const char *bytes;
        uint64_t len, file_len;
        const char *says;
    } cases[] = {
        {"", 0, 0, "too short for a safetensors file: 0 bytes"},
        {"\2\0\0\0\0\0\0", 7, 7, "too short for a safetensors file: 7 bytes"},
        {"\3\0\0\0\0\0\0\0{}", 10, 10, "byte 0: header of 3 bytes reaches beyond the file's end"},
        {"\1\341\365\5\0\0\0\0{}", 10, 1ull << 40, "byte 0: not a safetensors file"},
        {"\377\377\377\377\377\377\377\377{}", 10, 10, "byte 0: not a safetensors file"},
        {"\0\341\365\5\0\0\0\0{}", 10, 1ull << 40, "takes 100000008 bytes, only 10 are there"},
        {"version https://git-lfs", 23, 23, "git lfs pull"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_header *h;
        struct perta_err e = {0};
        uint8_t *exact = malloc(cases[i].len + !cases[i].len); /* so that ASan sees where it ends */
        memcpy(exact, cases[i].bytes, cases[i].len);
        ck_assert_int_eq(
            perta_safetensors_parse(exact, cases[i].len, cases[i].file_len, "f", &h, &e),
            PERTA_EINPUT);
        ck_assert_msg(strstr(e.msg, cases[i].says), "says: %s", e.msg);
        free(exact);
    }
}
END_TEST

START_TEST(every_truncation_is_refused)
{
    uint64_t len;
    uint8_t *bytes =
        file_of("{" T("a", "U8", "[2]", "[0,2]") "," T("b", "F16", "[]", "[2,4]") "}", 4, &len);
    for (uint64_t n = 0; n < len + 4; n++) {
        struct perta_header *h;
        struct perta_err e = {0};
        uint8_t *cut = malloc(n + !n);
        memcpy(cut, bytes, n);
        ck_assert_int_eq(perta_safetensors_parse(cut, n, n, "f", &h, &e), PERTA_EINPUT);
        free(cut);
    }
    free(bytes);
}
END_TEST

START_TEST(what_cannot_be_written_is_not_built)
{
    uint64_t huge = 1ull << 60, three = 3;
    struct perta_tensor one = {
        .name = "a", .dtype = PERTA_U8, .n_dims = 1, .shape = &three, .n_elems = 3};
    struct perta_tensor twice[2] = {one, one}, large = one, odd = one, bad_name = one;
    large.shape = &huge;
    large.n_elems = huge;
    odd.dtype = PERTA_F4;
    bad_name.name = (char *)"\xff";
    struct perta_tensor many[8]; /* 2^63 bytes in total */
    char names[8][2];
    for (int i = 0; i < 8; i++) {
        names[i][0] = (char)('a' + i);
        names[i][1] = '\0';
        many[i] = large;
        many[i].name = names[i];
    }
    const struct {
        struct perta_tensor *tensors;
        uint64_t n;
        const char *says;
    } cases[] = {
        {twice, 2, "tensor a: twice in one file"},
        {&odd, 1, "tensor a: its size cannot be written"},
        {&bad_name, 1, "its name cannot be written"},
        {many, 8, "tensor h: its size cannot be written"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t *bytes;
        uint64_t len;
        struct perta_err e = {0};
        ck_assert_int_eq(
            perta_safetensors_build(cases[i].tensors, cases[i].n, NULL, &bytes, &len, &e),
            PERTA_EINPUT);
        ck_assert_msg(strstr(e.msg, cases[i].says), "says: %s", e.msg);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("safetensors");
    tcase_add_test(tests, what_was_built_is_parsed);
    tcase_add_test(tests, a_header_is_read_from_a_file_as_from_memory);
    tcase_add_test(tests, what_the_format_allows_is_accepted);
    tcase_add_test(tests, each_breach_of_the_format_is_named_with_its_tensor_and_byte);
    tcase_add_test(tests, a_header_says_the_same_however_it_is_spelled);
    tcase_add_test(tests, a_length_prefix_that_lies_is_refused_before_any_memory_is_taken);
    tcase_add_test(tests, every_truncation_is_refused);
    tcase_add_test(tests, what_cannot_be_written_is_not_built);
    return run_suite("safetensors", tests);
}
