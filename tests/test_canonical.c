/* Canonical JSON: every value has exactly one spelling. */
#include "tests/unit.h"

#include <float.h>
#include <locale.h>

#include "io/format/canonical.h"

static void spells(json_t *value, const char *wanted)
{
    char *text = perta_canonical_json(value);
    ck_assert_str_eq(text, wanted);
    free(text);
    json_decref(value);
}

START_TEST(reals_are_spelled_with_the_fewest_digits_that_read_back)
{
    static const struct {
        double value;
        const char *wanted;
    } cases[] = {
        {0, "0.0"},
        {-0.0, "-0.0"},
        {1, "1.0"},
        {-1.5, "-1.5"},
        {0.1, "0.1"},
        {100, "100.0"},
        {0.30000000000000004, "0.30000000000000004"},
        {(double)0.3f, "0.30000001192092896"},
        {1e-4, "0.0001"},
        {1.25e-5, "1.25e-05"},
        {1e-5, "1e-05"},
        {123456789.125, "123456789.125"},
        {1e15, "1000000000000000.0"},
        {9007199254740993.0, "9007199254740992.0"},
        {1e16, "1e+16"},
        {1.7e100, "1.7e+100"},
        {DBL_MAX, "1.7976931348623157e+308"},
        {5e-324, "5e-324"},
        {0x1p-24, "5.960464477539063e-08"},
        {-0x1p-44, "-5.684341886080802e-14"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        spells(json_real(cases[i].value), cases[i].wanted);
}
END_TEST

START_TEST(any_real_reads_back)
{
    uint64_t state = 1;
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = next_random(&state) & 0xbfffffffffffffffu; /* finite */
        double value;
        memcpy(&value, &bits, sizeof value);
        json_t *real = json_real(value);
        char *text = perta_canonical_json(real);
        ck_assert_msg(strtod(text, NULL) == value, "%s", text);
        free(text);
        json_decref(real);
    }
}
END_TEST

START_TEST(a_locale_with_a_decimal_comma_changes_nothing)
{
    if (!setlocale(LC_ALL, "de_DE.UTF-8"))
        return; /* the locale is not installed */
    spells(json_real(0.25), "0.25");
}
END_TEST

START_TEST(strings_escape_what_json_must_and_no_more)
{
    spells(json_string("a/b \"c\" \\ \b\f\n\r\t \x01\x1f \x7f \xc3\xa4\xf0\x9f\x98\x80"),
           "\"a/b \\\"c\\\" \\\\ \\b\\f\\n\\r\\t \\u0001\\u001f \x7f \xc3\xa4\xf0\x9f\x98\x80\"");
    spells(json_stringn("x\0y", 3), "\"x\\u0000y\"");
}
END_TEST

START_TEST(keys_are_sorted_and_what_is_empty_stays_on_its_line)
{
    spells(json_pack("{s:i, s:[i,b,b,n], s:{}, s:[], s:{s:[[]]}}", "b", 1, "B", -7, 1, 0, "a", "ab",
                     "\xc3\xa4", "k"),
           "{\n \"B\": [\n  -7,\n  true,\n  false,\n  null\n ],\n \"a\": {},\n \"ab\": [],\n"
           " \"b\": 1,\n \"\xc3\xa4\": {\n  \"k\": [\n   []\n  ]\n }\n}");
}
END_TEST

static json_t *square(const void *ctx, uint64_t i)
{
    return json_pack("{s:I, s:I}", "of", (json_int_t)i, "is",
                     (json_int_t)i * (json_int_t)i * *(const json_int_t *)ctx);
}

START_TEST(items_made_one_at_a_time_are_written_as_those_of_a_tree)
{
    for (uint64_t n = 0; n < 4; n++) {
        uint64_t times = 3;
        json_t *whole = json_pack("{s:i, s:n, s:{s:i}}", "a", 1, "b", "c", "b", 2),
               *all = json_array();
        struct perta_canonical_rows rows = {.key = "b", .n = n, .row = square, .ctx = &times};
        char *text = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&text, &len);
        ck_assert(perta_canonical_print(out, whole, &rows));
        ck_assert_int_eq(fclose(out), 0);
        for (uint64_t i = 0; i < n; i++)
            json_array_append_new(all, square(&times, i));
        json_object_set_new(whole, "b", all);
        spells(whole, text);
        free(text);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("canonical");
    tcase_add_test(tests, reals_are_spelled_with_the_fewest_digits_that_read_back);
    tcase_add_test(tests, any_real_reads_back);
    tcase_add_test(tests, a_locale_with_a_decimal_comma_changes_nothing);
    tcase_add_test(tests, strings_escape_what_json_must_and_no_more);
    tcase_add_test(tests, keys_are_sorted_and_what_is_empty_stays_on_its_line);
    tcase_add_test(tests, items_made_one_at_a_time_are_written_as_those_of_a_tree);
    return run_suite("canonical", tests);
}
