/* An output folder is published complete or not at all, and what exists there is not lost. */
#include "tests/scratch.h"

#include <sys/stat.h>

#include "io/publish/publish.h"

static struct perta_err err;

#define OLD "{\"old\": 1}" /* a config */

static void begin(struct perta_publish *out, const char *path, bool force)
{
    struct perta_err e = {0};
    ck_assert_msg(!perta_publish_begin(out, path, NULL, force, &e), "%s", e.msg);
}

static void begin_is_refused(const char *path, bool force, int code, const char *says)
{
    struct perta_publish out;
    struct perta_err e = {0};
    ck_assert_int_eq(perta_publish_begin(&out, path, NULL, force, &e), code);
    ck_assert_msg(strstr(e.msg, says), "says: %s", e.msg);
    perta_publish_release(&out);
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
    perta_publish_release(&out); /* releasing twice is allowed */
    ck_assert_uint_eq(count_entries("."), 0);
}
END_TEST

START_TEST(what_was_left_by_an_interrupted_run_is_reported_and_replaced_by_force)
{
    struct perta_publish out;
    mkdir("out.perta-partial", 0777);
    put_text("out.perta-partial/model.safetensors", "");
    begin_is_refused("out", false, PERTA_EUSAGE, "out.perta-partial: left by a run");
    ck_assert(is_there("out.perta-partial/model.safetensors")); /* this process did not make it */
    begin(&out, "out", true);
    ck_assert(!is_there("out.perta-partial/model.safetensors"));
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("out"), 0);
}
END_TEST

START_TEST(what_stands_there_is_replaced_by_force_alone_and_at_once)
{
    struct perta_publish out;
    put_tiny_model("out", OLD);
    begin_is_refused("out", false, PERTA_EUSAGE, "out: exists");
    begin(&out, "out", true);
    ck_assert_ok(perta_publish_file(&out, "new", "n", 1, &err));
    ck_assert(holds("out/config.json", OLD, sizeof OLD - 1)); /* unchanged until the commit */
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
    put_tiny_model("out", OLD);
    begin(&out, "out", true);
    perta_publish_release(&out);
    ck_assert(holds("out/config.json", OLD, sizeof OLD - 1));
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(force_does_not_replace_what_perta_did_not_write)
{
    mkdir("home", 0777);
    put_text("home/diary", "x");
    put_text("file", "x");
    put_tiny_model("model", OLD);
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

/* What else may be in a folder, and how the message names it. */
static const struct {
    const char *put, *says; /* put ends in / for a folder */
} foreign[] = {
    {"notes.txt", "notes.txt"},
    {".git/", ".git/"},
    {"src/", "src/"},
    {"mean/", "mean/"},
    {"train.py", "train.py"},
    {"manifest.json", "manifest.json"},
    {"lora.safetensors", "lora.safetensors"},
    {"pytorch_model.bin", "pytorch_model.bin"},
    {"data.jsonl", "data.jsonl"},
    {"perta-in-place.journal", "perta-in-place.journal"},
    {"model.safetensors.index.json", "index.json (damaged)"},
    {"adapter_config.json", "adapter_config.json (not a JSON object)"},
};

static void put_in(const char *folder, const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (name[strlen(name) - 1] == '/')
        ck_assert_int_eq(mkdir(path, 0777), 0);
    else
        put_text(path, "mine");
}

START_TEST(a_folder_with_anything_else_in_it_is_not_replaced)
{
    put_tiny_model("out", OLD);
    put_in("out", foreign[_i].put);
    begin_is_refused("out", true, PERTA_EUSAGE, foreign[_i].says);
    begin_is_refused("out", true, PERTA_EUSAGE,
                     "out: exists and holds files that are not part of a checkpoint");
    struct perta_err e = {0};
    const char *out = "out";
    ck_assert_int_eq(perta_publish_check(&out, 1, NULL, 0, true, &e), PERTA_EUSAGE);
    ck_assert_uint_eq(count_entries("out"), 3);
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(a_link_and_a_damaged_shard_are_not_of_a_checkpoint)
{
    put_tiny_model("out", OLD);
    put_text("tokenizer", "{}");
    ck_assert_int_eq(symlink("../tokenizer", "out/tokenizer.json"), 0);
    begin_is_refused("out", true, PERTA_EUSAGE, "tokenizer.json (a link)");
    ck_assert_int_eq(unlink("out/tokenizer.json"), 0);
    put_text("out/model.safetensors", "mine, and longer than a header's length");
    begin_is_refused("out", true, PERTA_EUSAGE, "model.safetensors (damaged)");
    put_file("out/model.safetensors", TINY_SHARD, TINY_SHARD_BYTES);
    put_text("out/config.json", "mine");
    begin_is_refused("out", true, PERTA_EUSAGE, "config.json (not a JSON object)");
}
END_TEST

START_TEST(what_checkpoints_hold_may_be_replaced)
{
    static const char *const beside[] = {
        "generation_config.json", "tokenizer.json",      "README.md",
        "tokenizer_config.json",  "merges.txt",          "LICENSE.txt",
        ".gitattributes",         "chat_template.jinja", "vocab.json"};
    struct perta_publish out;
    put_tiny_model("out", OLD);
    for (size_t i = 0; i < sizeof beside / sizeof *beside; i++)
        put_in("out", beside[i]);
    begin(&out, "out", true);
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("out"), 0);
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(a_patch_is_known_by_its_manifest)
{
    struct perta_publish out;
    mkdir("out", 0777);
    put_text("out/a.perta", "x");
    put_text("out/manifest.json", "{\"manifest_version\": 3}");
    begin_is_refused("out", true, PERTA_EUSAGE,
                     "neither a checkpoint nor a patch (it holds a.perta, "
                     "manifest.json)");
    put_text("out/manifest.json", "{\"format\": \"perta-patch\", "
                                  "\"outputs\": {\"patch\": [{\"name\": \"a.perta\"}]}}");
    put_text("out/b.perta", "x");
    begin_is_refused("out", true, PERTA_EUSAGE,
                     "holds files that are not part of a patch: b.perta");
    ck_assert_int_eq(unlink("out/b.perta"), 0);
    begin(&out, "out", true);
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(a_copy_of_an_input_s_file_may_be_replaced)
{
    struct perta_publish out;
    struct perta_err e = {0};
    const char *path = "out", *inputs[] = {NULL, "in"};
    put_tiny_model("in", OLD);
    put_tiny_model("out", OLD);
    put_in("in", "notes.txt");
    put_in("out", "notes.txt");
    ck_assert_ok(perta_publish_check(&path, 1, inputs, 2, true, &err));
    ck_assert_ok(perta_publish_begin(&out, "out", "in", true, &err));
    ck_assert_ok(perta_publish_copy(&out, "in/notes.txt", "notes.txt", &err));
    ck_assert_ok(perta_publish_commit(&out, &err));
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("out"), 1);
    put_text("out/notes.txt", "more");
    ck_assert_int_eq(perta_publish_check(&path, 1, inputs, 2, true, &e), PERTA_EUSAGE);
    ck_assert_uint_eq(count_entries("."), 2);
}
END_TEST

START_TEST(what_comes_between_check_and_removal_is_put_back)
{
    struct perta_publish out;
    struct perta_err e = {0};
    put_tiny_model("out", OLD);
    begin(&out, "out", true);
    ck_assert_ok(perta_publish_file(&out, "new", "n", 1, &err));
    put_in("out", "diary");
    ck_assert_int_eq(perta_publish_commit(&out, &e), PERTA_ESYS);
    ck_assert_msg(strstr(e.msg, "out: changed, so it is left as it is") && strstr(e.msg, "diary"),
                  "%s", e.msg);
    ck_assert(holds("out/diary", "mine", 4) && holds("out.perta-partial/new", "n", 1));
    ck_assert_uint_eq(count_entries("out"), 3);
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(a_leftover_with_anything_else_in_it_is_not_removed)
{
    struct perta_publish out;
    struct perta_err e = {0};
    bool found;
    mkdir("out.perta-partial", 0777);
    put_text("out.perta-partial/model.safetensors", "");
    static const char *const more[] = {"diary", "src/", "manifest.json"};
    put_in("out.perta-partial", more[_i]);
    if (_i == 2)
        put_text("out.perta-partial/manifest.json", "{\"manifest_version\": 3}");
    begin_is_refused("out", true, PERTA_EUSAGE, more[_i]);
    begin_is_refused("out", true, PERTA_EUSAGE, "holds files that no run of perta left there");
    ck_assert_int_eq(perta_publish_sweep("out", NULL, &e), PERTA_EUSAGE);
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_publish_resume(&out, "out", NULL, true, &found, &e), PERTA_EINPUT);
    perta_publish_release(&out);
    ck_assert_uint_eq(count_entries("out.perta-partial"), 2);
    ck_assert_uint_eq(count_entries("."), 1);
}
END_TEST

START_TEST(work_of_a_run_that_was_killed_is_a_leftover)
{
    mkdir("out.perta-partial", 0777);
    mkdir("out.perta-partial/perta-scratch", 0777);
    put_text("out.perta-partial/perta-scratch/x-3", "x");
    mkdir("out.perta-partial/gradients-1-forget", 0777);
    mkdir("out.perta-partial/gradients-1-forget/mean.perta-partial", 0777);
    put_text("out.perta-partial/gradients-1-forget/mean.perta-journal", "");
    put_text("out.perta-partial/manifest.json", "{\"format\": \"per");
    ck_assert_ok(perta_publish_sweep("out", NULL, &err));
    ck_assert_uint_eq(count_entries("."), 0);
    ck_assert_ok(perta_publish_sweep("out", NULL, &err)); /* there may be nothing */
}
END_TEST

START_TEST(a_single_file_replaces_only_what_has_its_mark)
{
    static const char page[] = "<title>a page</title>more";
    struct perta_err e = {0};
    put_text("page", "mine");
    ck_assert_int_eq(perta_publish_single("page", "a page", page, 25, true, &e), PERTA_EUSAGE);
    ck_assert_ptr_nonnull(strstr(e.msg, "page: exists, and perta did not write it"));
    ck_assert(holds("page", "mine", 4));
    put_text("page", "<title>a page</title>");
    put_text("page.perta-partial", "mine");
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_publish_single("page", "a page", page, 25, true, &e), PERTA_EUSAGE);
    ck_assert(holds("page.perta-partial", "mine", 4));
    e = (struct perta_err){0};
    ck_assert_int_eq(perta_publish_check_mark("page", "a page", &e), PERTA_EUSAGE);
    put_text("page.perta-partial", "");
    ck_assert_int_eq(truncate("page.perta-partial", 5000),
                     0); /* filled with zeros, as after a power cut */
    ck_assert_ok(perta_publish_single("page", "a page", page, 25, true, &err));
    put_text("page.perta-partial", "<title>a page</ti");
    ck_assert_ok(perta_publish_single("page", "a page", page, 25, true, &err));
    ck_assert(holds("page", page, 25));
    ck_assert_uint_eq(count_entries("."), 1);
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
    put_tiny_model("out", OLD);
    ck_assert_int_eq(perta_publish_commit(&out, &err), PERTA_ESYS);
    perta_publish_release(&out);
    ck_assert(holds("out/config.json", OLD, sizeof OLD - 1));
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
    put_tiny_model("m", OLD);
    mkdir("m/sub", 0777);
    ck_assert_int_eq(symlink("m", "alias"), 0);
    static const struct {
        const char *out[2], *in[2];
        bool fine;
    } cases[] = {
        {{"o", NULL}, {"m", NULL}, true},          {{"o", "p"}, {"m", "m"}, true},
        {{"mm", NULL}, {"m", NULL}, true},         {{"m", NULL}, {"m", NULL}, false},
        {{"m/", NULL}, {"./m", NULL}, false},      {{"m/new", NULL}, {"m", NULL}, false},
        {{"alias/new", NULL}, {"m", NULL}, false}, {{"m/sub/../new", NULL}, {"m", NULL}, false},
        {{".", NULL}, {"m", NULL}, false},         {{"/", NULL}, {"m", NULL}, false},
        {{"o", "o"}, {NULL, NULL}, false},         {{"o", "o/p"}, {NULL, NULL}, false},
        {{"o/p", "o"}, {NULL, NULL}, false},       {{"none/../m", NULL}, {"m", NULL}, false},
        {{"none/..m", "..o"}, {"m", NULL}, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct perta_err e = {0};
        int rc =
            perta_publish_check(cases[i].out, cases[i].out[1] ? 2 : 1, cases[i].in, 2, true, &e);
        ck_assert_msg(rc == (cases[i].fine ? 0 : PERTA_EUSAGE), "%s: %d %s", cases[i].out[0], rc,
                      e.msg);
    }
    ck_assert_uint_eq(count_entries("."), 2); /* nothing was touched */
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
    tcase_add_loop_test(tests, a_folder_with_anything_else_in_it_is_not_replaced, 0,
                        sizeof foreign / sizeof *foreign);
    tcase_add_test(tests, a_link_and_a_damaged_shard_are_not_of_a_checkpoint);
    tcase_add_test(tests, what_checkpoints_hold_may_be_replaced);
    tcase_add_test(tests, a_patch_is_known_by_its_manifest);
    tcase_add_test(tests, a_copy_of_an_input_s_file_may_be_replaced);
    tcase_add_test(tests, what_comes_between_check_and_removal_is_put_back);
    tcase_add_loop_test(tests, a_leftover_with_anything_else_in_it_is_not_removed, 0, 3);
    tcase_add_test(tests, work_of_a_run_that_was_killed_is_a_leftover);
    tcase_add_test(tests, a_single_file_replaces_only_what_has_its_mark);
    tcase_add_test(tests, an_empty_folder_may_be_filled_but_not_a_link_to_one);
    tcase_add_test(tests, a_folder_that_was_filled_meanwhile_is_not_overwritten);
    tcase_add_test(tests, a_name_is_used_once_and_what_is_missing_is_not_copied);
    tcase_add_test(tests, outputs_lie_apart_from_inputs_and_each_other);
    return run_suite("publish", tests);
}
