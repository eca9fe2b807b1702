/* Plain text, plain names and JSON: the borderline cases. */
#include "tests/unit.h"

#include <errno.h>
#include <unistd.h>

#include "io/err.h"
#include "io/format/python_json.h"
#include "io/text.h"

START_TEST(text_is_plain_without_control_characters_and_in_utf_8)
{
    static const char *const plain[] = {"",
                                        " ",
                                        "~",
                                        "\xc2\xa0",
                                        "\xdf\xbf",
                                        "\xe0\xa0\x80",
                                        "\xed\x9f\xbf",
                                        "\xee\x80\x80",
                                        "\xef\xbf\xbf",
                                        "\xf0\x90\x80\x80",
                                        "\xf4\x8f\xbf\xbf"};
    static const char *const not[] = {
        "\n",
        "\x1b",
        "\x7f",
        "\xc2\x80",
        "\xc2\x9f", /* control characters */
        "\x80",
        "\xbf",
        "\xc0\x80",
        "\xc1\xbf",
        "\xe0\x9f\xbf",
        "\xf0\x8f\xbf\xbf", /* overlong encodings */
        "\xed\xa0\x80",
        "\xed\xbf\xbf",
        "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80",
        "\xff",
        "\xc2",
        "\xe2\x82",
        "\xf0\x9f\x98",
        "\xe2\x82\x41", /* truncated */
    };
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        ck_assert_msg(perta_text_is_plain(plain[i]), "%zu", i);
    for (size_t i = 0; i < sizeof not / sizeof *not; i++) {
        char text[16];
        snprintf(text, sizeof text, "a%s", not[i]);
        ck_assert_msg(!perta_text_is_plain(text), "%zu", i);
        size_t len = strlen(text);
        perta_text_make_plain(text);
        ck_assert_msg(perta_text_is_plain(text) && strlen(text) == len, "%zu", i);
    }
}
END_TEST

START_TEST(what_is_plain_stays_and_what_is_not_is_a_question_mark)
{
    char text[] = "a\xe2\x82\xac\n\x1b[2J\xe2\x82";
    perta_text_make_plain(text);
    ck_assert_str_eq(text, "a\xe2\x82\xac??[2J??");
}
END_TEST

__attribute__((format(printf, 1, 2))) static char *lines(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    char *text = perta_text_lines(fmt, ap);
    va_end(ap);
    return text;
}

START_TEST(only_the_formats_own_line_breaks_are_some)
{
    char *text = lines("\n%s: %d\n\n  %s\n", "a\nb\xe2\x82\xac", 7, "\x1b[2J\r");
    ck_assert_str_eq(text, "\na?b\xe2\x82\xac: 7\n\n  ?[2J?\n");
    free(text);
    text = lines("%s", "\n");
    ck_assert_str_eq(text, "?");
    free(text);
}
END_TEST

START_TEST(a_name_is_one_of_a_file_in_a_folder)
{
    char longest[PERTA_NAME_MAX_BYTES + 2];
    memset(longest, 'x', sizeof longest);
    longest[PERTA_NAME_MAX_BYTES + 1] = '\0';
    static const char *const not[] = {"",    ".",    "..", ".hidden", "/",
                                      "a/b", "../a", "/a", "a/",      "a\nb"};
    for (size_t i = 0; i < sizeof not / sizeof *not; i++)
        ck_assert_msg(!perta_name_is_plain(not[i]), "%s", not[i]);
    ck_assert(!perta_name_is_plain(longest));
    ck_assert(perta_name_is_plain(longest + 1));
    ck_assert(perta_name_is_plain("model-00001-of-00002.safetensors"));
    ck_assert(perta_name_is_plain("mod\xc3\xa8le.safetensors"));
}
END_TEST

START_TEST(a_message_is_plain_wherever_it_is_cut)
{
    char name[4000] = "", pad[4] = "";
    for (int i = 0; i < 1000; i++)
        strcat(name, "\xe2\x82\xac");
    for (int i = 0; i < 3; i++, strcat(pad, "x")) {
        struct perta_err err = {0};
        perta_fail(&err, PERTA_EINPUT, "%s%s", pad, name);
        ck_assert(perta_text_is_plain(err.msg));
        perta_err_context(&err, "%s\n%s", pad, name);
        ck_assert(perta_text_is_plain(err.msg));
        json_t *json = perta_text_json("%.100s\xff\n", name);
        ck_assert_ptr_nonnull(json);
        json_decref(json);
    }
}
END_TEST

START_TEST(a_file_that_cannot_be_read_is_not_called_bad_json)
{
    struct perta_err err = {0};
    json_t *json = (void *)1;
    int fds[2];
    ck_assert_int_eq(pipe(fds), 0);
    ck_assert_int_eq(perta_json_load(fds[1], "f", &json, &err),
                     PERTA_ESYS); /* open for writing only */
    ck_assert_ptr_null(json);
    ck_assert_int_eq(err.sys_errno, EBADF);
    ck_assert_int_eq(write(fds[1], "{\"a\":", 5), 5);
    close(fds[1]);
    err = (struct perta_err){0};
    ck_assert_int_eq(perta_json_load(fds[0], "f", &json, &err), PERTA_EINPUT);
    ck_assert_ptr_null(json);
    ck_assert_msg(strstr(err.msg, "f: byte 5: not valid JSON"), "%s", err.msg);
    close(fds[0]);
}
END_TEST

/* Compare with Python's reading of text. If value is NULL, it is not JSON, and says names the
 * place. */
static void python_has(const char *text, const char *value, const char *says)
{
    struct perta_err err = {0};
    json_t *json = (void *)1;
    int rc = perta_python_json_parse(text, strlen(text), "c", &json, &err);
    ck_assert_msg(rc == (value ? 0 : PERTA_EINPUT), "%s: %d %s", text, rc, err.msg);
    char *dumped = json ? json_dumps(json, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    ck_assert_msg(value ? dumped && !strcmp(dumped, value) : !dumped, "%s: %s", text, dumped);
    ck_assert_msg(!says || strstr(err.msg, says), "%s: %s", text, err.msg);
    free(dumped);
    json_decref(json);
}

START_TEST(what_python_takes_beyond_json_is_taken)
{
    python_has("{\"a\":[NaN,-Infinity,Infinity]}",
               "{\"a\":[{\"__float__\":\"NaN\"},{\"__float__\":\"-Infinity\"},"
               "{\"__float__\":\"Infinity\"}]}",
               NULL);
    python_has("{\"a\":\"NaN \\\" -Infinity\\\\\",\"NaN\":1}",
               "{\"a\":\"NaN \\\" -Infinity\\\\\",\"NaN\":1}", NULL);
    python_has("{\"a\":1,\"b\":2,\"a\":3}", "{\"a\":3,\"b\":2}", NULL);
    python_has("\xef\xbb\xbf[1]", "[1]", NULL);
    python_has("[9223372036854775807,-5,1e3]", "[9.2233720368547758e18,-5,1000.0]", NULL);
    python_has("[123456789012345678]", "[123456789012345678]", NULL);
    python_has("", NULL, "c: byte 0: ");
    python_has("[NaN, Infinity, -Infinity, ]", NULL, "c: byte 28: not valid JSON");
    python_has("[1, \"", NULL, "not valid JSON");
    python_has("\"\\", NULL, "not valid JSON");
    python_has("[NaNs]", NULL, "not valid JSON");
    python_has("[\"\xff\"]", NULL, "not valid JSON");
    python_has("\xef\xbb", NULL, "not valid JSON");
}
END_TEST

/* ---- out of memory ---- */

static uint64_t n_taken, fails_at; /* counted from 1 */

static void *take(size_t n)
{
    return ++n_taken == fails_at ? NULL : malloc(n);
}

enum { N_NOTES = 20 }; /* more than the initial size of an array */

static json_t *make_notes(void)
{
    json_t *notes = json_array();
    for (int i = 0; i < N_NOTES; i++)
        perta_note(notes, "%d\xff", i);
    return perta_notes_whole(notes);
}

static json_t *make_object(void)
{
    json_t *list = json_array(), *object = json_object();
    for (int i = 0; i < N_NOTES; i++)
        perta_json_append(&list, json_integer(i));
    json_t *other = json_pack("{s:O}", "other", list);
    perta_json_extend(&list, json_object_get(other, "other"));
    perta_json_update(&object, other);
    perta_json_set(&object, "list", list);
    json_decref(other);
    return object;
}

START_TEST(what_lacks_a_part_is_nothing)
{
    json_t *(*const makers[])(void) = {make_notes, make_object};
    json_set_alloc_funcs(take, free);
    for (size_t m = 0; m < 2; m++) {
        fails_at = 0;
        json_t *whole = makers[m](), *found;
        ck_assert_ptr_nonnull(whole);
        for (uint64_t n = 1;; n++) {
            n_taken = 0;
            fails_at = n;
            found = makers[m]();
            ck_assert(n_taken < n ? json_equal(found, whole) : !found);
            json_decref(found);
            if (n_taken < n)
                break;
        }
        json_decref(whole);
    }
}
END_TEST

START_TEST(a_text_of_json_has_all_its_keys_or_is_none)
{
    json_set_alloc_funcs(take, free);
    fails_at = 0;
    json_t *whole = json_pack("{s:{s:i, s:i}, s:[n]}", "a", "b", 1, "c", 2, "d");
    char *want = perta_json_text(whole, JSON_INDENT(1) | JSON_SORT_KEYS);
    ck_assert_str_eq(want, "{\n \"a\": {\n  \"b\": 1,\n  \"c\": 2\n },\n \"d\": [\n  null\n ]\n}");
    for (uint64_t n = 1;; n++) {
        n_taken = 0;
        fails_at = n;
        char *text = perta_json_text(whole, JSON_INDENT(1) | JSON_SORT_KEYS);
        ck_assert(!text || !strcmp(text, want));
        free(text);
        if (n_taken < n)
            break;
    }
    free(want);
    json_decref(whole);
    ck_assert_ptr_null(perta_json_text(NULL, 0));
}
END_TEST

static bool print(FILE *to, void *ctx)
{
    for (int i = 0; i < 3000; i++)
        fprintf(to, "%d\n", i);
    return ctx;
}

START_TEST(what_is_printed_is_there_to_the_last)
{
    size_t len = 0;
    char *text = perta_text_print(print, &len, &len);
    ck_assert_ptr_nonnull(text);
    ck_assert_uint_eq(len, 10 * 2 + 90 * 3 + 900 * 4 + 2000 * 5);
    ck_assert_uint_eq(strlen(text), len);
    ck_assert_str_eq(text + len - 5, "2999\n");
    free(text);
    ck_assert_ptr_null(perta_text_print(print, NULL, &len));
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("text");
    tcase_add_test(tests, text_is_plain_without_control_characters_and_in_utf_8);
    tcase_add_test(tests, what_is_plain_stays_and_what_is_not_is_a_question_mark);
    tcase_add_test(tests, only_the_formats_own_line_breaks_are_some);
    tcase_add_test(tests, a_name_is_one_of_a_file_in_a_folder);
    tcase_add_test(tests, a_message_is_plain_wherever_it_is_cut);
    tcase_add_test(tests, a_file_that_cannot_be_read_is_not_called_bad_json);
    tcase_add_test(tests, what_python_takes_beyond_json_is_taken);
    tcase_add_test(tests, what_lacks_a_part_is_nothing);
    tcase_add_test(tests, a_text_of_json_has_all_its_keys_or_is_none);
    tcase_add_test(tests, what_is_printed_is_there_to_the_last);
    return run_suite("text", tests);
}
