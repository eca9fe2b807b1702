/* An output folder appears whole or not at all; what stands there is safe. */
#include "tests/scratch.h"

#include <sys/stat.h>

#include "io/publish.h"

static struct perta_err err;

static void begin(struct perta_publish *out, const char *path, bool force)
{
    struct perta_err e = {0};
    ck_assert_msg(!perta_publish_begin(out, path, force, &e), "%s", e.msg);
}

static void begin_is_refused(const char *path, bool force, int code, const char *says)
{
    struct perta_publish out;
    struct perta_err e = {0};
    ck_assert_int_eq(perta_publish_begin(&out, path, force, &e), code);
    ck_assert_msg(strstr(e.msg, says), "says: %s", e.msg);
    perta_publish_release(&out);
}

/* A folder that --force may replace. */
static void put_model(const char *path)
{
    char name[128];
    ck_assert_int_eq(mkdir(path, 0777), 0);
    snprintf(name, sizeof name, "%s/config.json", path);
    put_text(name, "old");
}

START_TEST(a_folder_appears_whole_at_commit)
{
    struct perta_publish out;
    uint8_t *data = make_file("from", 200001, 1);
    begin(&out, "deep/er/out/", false);
    ck_assert_str_eq(out.path, "deep/er/out");
    ck_assert_ok(perta_publish_file(&out, "a", "hello", 5, &err));
    ck_assert_ok(perta_publish_file(&out, "empty", NULL, 0, &err));
    ck_assert_ok(perta_publish_copy(&out, "from", "b", &err));
    ck_assert(!is_there("deep/er/out"));
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("deep/er"), 1);
    ck_assert_uint_eq(count_entries("deep/er/out"), 3);
    ck_assert(holds("deep/er/out/a", "hello", 5));
    ck_assert(holds("deep/er/out/empty", "", 0));
    ck_assert(holds("deep/er/out/b", data, 200001));
    free(data);
}
END_TEST

START_TEST(what_is_not_committed_leaves_nothing)
{
    struct perta_publish out;
    begin(&out, "out", false);
    ck_assert_ok(perta_publish_file(&out, "a", "hello", 5, &err));
    perta_publish_release(&out);
    perta_publish_release(&out); /* released twice is fine */
    ck_assert_uint_eq(count_entries("."), 0);
}
END_TEST

START_TEST(what_was_left_by_an_interrupted_run_is_reported_and_replaced_by_force)
{
    struct perta_publish out;
    mkdir("out.perta-partial", 0777);
    put_text("out.perta-partial/half", "x");
    begin_is_refused("out", false, PERTA_EUSAGE, "out.perta-partial: left by a run");
    ck_assert(is_there("out.perta-partial/half")); /* it is not ours to remove */
    begin(&out, "out", true);
    ck_assert(!is_there("out.perta-partial/half"));
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("out"), 0);
}
END_TEST

START_TEST(what_stands_there_is_replaced_by_force_alone_and_at_once)
{
    struct perta_publish out;
    put_model("out");
    begin_is_refused("out", false, PERTA_EUSAGE, "out: exists");
    begin(&out, "out", true);
    ck_assert_ok(perta_publish_file(&out, "new", "n", 1, &err));
    ck_assert(holds("out/config.json", "old", 3)); /* until commit */
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert(holds("out/new", "n", 1));
    ck_assert(!is_there("out/config.json"));
    ck_assert(!is_there("out.perta-partial"));
}
END_TEST

START_TEST(giving_up_leaves_what_stood_there)
{
    struct perta_publish out;
    put_model("out");
    begin(&out, "out", true);
    perta_publish_release(&out);
    ck_assert(holds("out/config.json", "old", 3));
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(force_does_not_replace_what_perta_did_not_write)
{
    mkdir("home", 0777);
    put_text("home/diary", "x");
    put_text("file", "x");
    put_model("model");
    ck_assert_int_eq(symlink("model", "link"), 0);
    for (int force = 0; force < 2; force++) {
        begin_is_refused("home", force, PERTA_EUSAGE, "home: exists");
        begin_is_refused("file", force, PERTA_EUSAGE, "file: exists");
        begin_is_refused("link", force, PERTA_EUSAGE, "link: exists");
    }
    begin_is_refused("file/out", false, PERTA_ESYS, "file/out");
    begin_is_refused("", false, PERTA_EUSAGE, "needs a name");
    ck_assert_uint_eq(count_entries("."), 4);
    ck_assert(is_there("home/diary"));
}
END_TEST

START_TEST(an_empty_folder_may_be_filled_but_not_a_link_to_one)
{
    struct perta_publish out;
    mkdir("out", 0777);
    ck_assert_int_eq(symlink("out", "link"), 0);
    begin_is_refused("link", false, PERTA_EUSAGE, "link: exists");
    begin(&out, "out", false);
    ck_assert_ok(perta_publish_file(&out, "a", "hello", 5, &err));
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert(holds("out/a", "hello", 5));
}
END_TEST

START_TEST(a_folder_that_was_filled_meanwhile_is_not_overwritten)
{
    struct perta_publish out;
    begin(&out, "out", false);
    ck_assert_ok(perta_publish_file(&out, "a", "hello", 5, &err));
    put_model("out");
    ck_assert_int_eq(perta_publish_commit(&out, &err), PERTA_ESYS);
    perta_publish_release(&out);
    ck_assert(holds("out/config.json", "old", 3));
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(a_name_is_used_once_and_what_is_missing_is_not_copied)
{
    struct perta_publish out;
    unsigned n_open = count_open_files();
    begin(&out, "out", false);
    ck_assert_ok(perta_publish_file(&out, "a", "hello", 5, &err));
    struct perta_err e = {0};
    ck_assert_int_eq(perta_publish_file(&out, "a", "x", 1, &e), PERTA_ESYS);
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_publish_copy(&out, "nowhere", "b", &e), PERTA_ESYS);
    ck_assert_ptr_nonnull(strstr(e.msg, "nowhere"));
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_publish_file(&out, "no/b", "x", 1, &e), PERTA_ESYS);
    ck_assert(holds("out.perta-partial/a", "hello", 5));
    ck_assert_uint_eq(count_entries("out.perta-partial"), 1);
    perta_publish_release(&out);
    ck_assert_uint_eq(count_open_files(), n_open);
}
END_TEST

START_TEST(outputs_lie_apart_from_inputs_and_each_other)
{
    put_model("m");
    mkdir("m/sub", 0777);
    ck_assert_int_eq(symlink("m", "alias"), 0);
    static const struct {
        const char *out[2], *in[2];
        bool fine;
    } cases[] = {
        {{"o", NULL}, {"m", NULL}, true},
        {{"o", "p"}, {"m", "m"}, true},
        {{"mm", NULL}, {"m", NULL}, true},
        {{"m", NULL}, {"m", NULL}, false},
        {{"m/", NULL}, {"./m", NULL}, false},
        {{"m/new", NULL}, {"m", NULL}, false},
        {{"alias/new", NULL}, {"m", NULL}, false},
        {{"m/sub/../new", NULL}, {"m", NULL}, false},
        {{".", NULL}, {"m", NULL}, false},
        {{"/", NULL}, {"m", NULL}, false},
        {{"o", "o"}, {NULL, NULL}, false},
        {{"o", "o/p"}, {NULL, NULL}, false},
        {{"o/p", "o"}, {NULL, NULL}, false},
        {{"none/../m", NULL}, {"m", NULL}, false},
        {{"none/..m", "..o"}, {"m", NULL}, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_err e = {0};
        int rc = perta_publish_check(cases[i].out, cases[i].out[1] ? 2 : 1, cases[i].in, 2, true,
                                     &e);
        ck_assert_msg(rc == (cases[i].fine ? 0 : PERTA_EUSAGE), "%s: %d %s", cases[i].out[0], rc,
                      e.msg);
    }
    ck_assert_uint_eq(count_entries("."), 2); /* it touches nothing */
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("publish");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, a_folder_appears_whole_at_commit);
    tcase_add_test(tests, what_is_not_committed_leaves_nothing);
    tcase_add_test(tests, what_was_left_by_an_interrupted_run_is_reported_and_replaced_by_force);
    tcase_add_test(tests, what_stands_there_is_replaced_by_force_alone_and_at_once);
    tcase_add_test(tests, giving_up_leaves_what_stood_there);
    tcase_add_test(tests, force_does_not_replace_what_perta_did_not_write);
    tcase_add_test(tests, an_empty_folder_may_be_filled_but_not_a_link_to_one);
    tcase_add_test(tests, a_folder_that_was_filled_meanwhile_is_not_overwritten);
    tcase_add_test(tests, a_name_is_used_once_and_what_is_missing_is_not_copied);
    tcase_add_test(tests, outputs_lie_apart_from_inputs_and_each_other);
    return run_suite("publish", tests);
}
