/* What a killed run leaves is resumed only by a run with the same identity, and only from whole
 * records. */
#include "tests/scratch.h"

#include <fcntl.h>
#include <jansson.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "stream/journal.h"

#define JOURNAL "deep/out.perta-journal"

static struct perta_err err;
static int to_remove; /* how often the journal is removed just before it is locked */

/* Replaces the system's. */
int flock(int fd, int operation)
{
    if (to_remove) {
        to_remove--;
        ck_assert(!unlink(JOURNAL));
    }
    return (int)syscall(SYS_flock, fd, operation);
}

static json_t *identity_of(int memory)
{
    return json_pack("{s:s, s:{s:i}}", "verb", "test", "flags", "memory", memory);
}

static void begin(struct perta_journal *j, int memory, bool replace, int want, const char *says)
{
    struct perta_err e = {0};
    json_t *identity = identity_of(memory);
    ck_assert_msg(perta_journal_open(j, "deep/out", identity, false, replace, &e) == want, "%s",
                  e.msg);
    ck_assert_msg(strstr(e.msg, says), "says: %s", e.msg);
    json_decref(identity);
}

static void go_on(struct perta_journal *j, int memory, int want, const char *says)
{
    struct perta_err e = {0};
    json_t *identity = identity_of(memory);
    ck_assert_msg(perta_journal_open(j, "deep/out/", identity, true, false, &e) == want, "%s",
                  e.msg);
    ck_assert_msg(strstr(e.msg, says), "says: %s", e.msg);
    json_decref(identity);
}

static void commit(struct perta_journal *j, int n)
{
    json_t *record = json_pack("{s:i}", "n", n);
    ck_assert_ok(perta_journal_commit(j, record, 0, &err));
    json_decref(record);
}

/* Make a journal with that many records, as a killed run leaves it. */
static void leave_journal(int n_records)
{
    struct perta_journal j;
    begin(&j, 1, false, 0, "");
    for (int i = 0; i < n_records; i++)
        commit(&j, i);
    perta_journal_close(&j);
}

static int count(void *ctx, json_t *record, struct perta_err *e)
{
    (void)e;
    int *n = ctx;
    ck_assert(json_is_object(record));
    (*n)++;
    return 0;
}

static int count_records(const struct perta_journal *j)
{
    int n = 0;
    ck_assert_ok(perta_journal_replay(j, count, &n, &err));
    return n;
}

static int last_n(const struct perta_journal *j)
{
    return (int)json_integer_value(json_object_get(perta_journal_last(j), "n"));
}

START_TEST(records_come_back_in_order)
{
    struct perta_journal j;
    ck_assert(!perta_journal_found("deep/out"));
    leave_journal(3);
    ck_assert(perta_journal_found("deep/out"));
    go_on(&j, 1, 0, "");
    ck_assert_int_eq(count_records(&j), 3);
    ck_assert_int_eq(last_n(&j), 2);
    commit(&j, 3);
    perta_journal_close(&j);
    go_on(&j, 1, 0, "");
    ck_assert_int_eq(count_records(&j), 4);
    ck_assert_int_eq(last_n(&j), 3);
    perta_journal_close(&j);
}
END_TEST

START_TEST(commit_points_are_made_by_count_where_the_clock_makes_none)
{
    struct perta_journal j;
    setenv("PERTA_COMMIT_SECONDS", "inf", 1);
    begin(&j, 1, false, 0, "");
    ck_assert(!perta_journal_due(&j, PERTA_COMMIT_BYTES - 1));
    ck_assert(perta_journal_due(&j, PERTA_COMMIT_BYTES));
    setenv("PERTA_COMMIT_BYTES", "100", 1);
    ck_assert(!perta_journal_due(&j, 99));
    ck_assert(perta_journal_due(&j, 100));
    setenv("PERTA_COMMIT_SECONDS", "0", 1);
    ck_assert(perta_journal_due(&j, 0));
    perta_journal_close(&j);
}
END_TEST

START_TEST(another_identity_is_refused_and_nothing_is_lost)
{
    struct perta_journal j;
    leave_journal(2);
    go_on(&j, 5, PERTA_EUSAGE, "flags: memory was 1, is now 5");
    perta_journal_abandon(&j, NULL, 0, PERTA_EUSAGE, &err);
    perta_journal_close(&j);
    begin(&j, 1, false, PERTA_EUSAGE, "--resume continues it, --force starts over");
    perta_journal_abandon(&j, NULL, 0, PERTA_EUSAGE, &err);
    perta_journal_close(&j);
    go_on(&j, 1, 0, "");
    ck_assert_int_eq(last_n(&j), 1);
    perta_journal_close(&j);
    begin(&j, 5, true, 0, "");
    perta_journal_close(&j);
    go_on(&j, 5, 0, "");
    ck_assert_ptr_null(perta_journal_last(&j));
    perta_journal_close(&j);
}
END_TEST

/* Cut off, or damaged, at every byte of the last two records. */
START_TEST(a_torn_record_and_what_follows_do_not_count)
{
    struct perta_journal j;
    struct stat st;
    leave_journal(3);
    ck_assert_int_eq(stat(JOURNAL, &st), 0);
    size_t len = (size_t)st.st_size;
    char *text = (char *)alloc(len);
    FILE *file = fopen(JOURNAL, "r");
    ck_assert_uint_eq(fread(text, 1, len, file), len);
    fclose(file);
    size_t line = (len - (size_t)((char *)memchr(text, '\n', len) - text) - 1) / 3;
    for (size_t cut = len - 2 * line; cut < len; cut++) {
        put_file(JOURNAL, text, cut);
        go_on(&j, 1, 0, "");
        ck_assert_int_eq(last_n(&j), cut < len - line ? 0 : 1);
        commit(&j, 7); /* continues after the whole records */
        perta_journal_close(&j);
        go_on(&j, 1, 0, "");
        ck_assert_int_eq(last_n(&j), 7);
        perta_journal_close(&j);
        text[cut] ^= 1;
        put_file(JOURNAL, text, len);
        text[cut] ^= 1;
        go_on(&j, 1, 0, "");
        ck_assert_int_eq(count_records(&j), cut < len - line ? 1 : 2);
        perta_journal_close(&j);
    }
    free(text);
}
END_TEST

START_TEST(no_whole_record_is_no_journal)
{
    struct perta_journal j;
    leave_journal(1);
    put_file(JOURNAL, "0123456789abcdef {\"a\":1}\n", 25);
    ck_assert(!perta_journal_found("deep/out"));
    begin(&j, 1, false, 0, ""); /* replacing it loses nothing */
    perta_journal_close(&j);
    go_on(&j, 1, 0, ""); /* nor before the first commit */
    ck_assert(!j.resuming);
    perta_journal_close(&j);
}
END_TEST

START_TEST(one_process_at_a_time)
{
    struct perta_journal j;
    begin(&j, 1, false, 0, "");
    commit(&j, 1);
    pid_t child = fork();
    if (!child) {
        struct perta_journal other;
        struct perta_err e = {0};
        json_t *identity = identity_of(1);
        bool refused =
            perta_journal_open(&other, "deep/out", identity, true, false, &e) == PERTA_EUSAGE;
        perta_journal_abandon(&other, NULL, 0, PERTA_EUSAGE, &e);
        perta_journal_close(&other);
        refused = refused &&
                  perta_journal_open(&other, "deep/out", identity, false, true, &e) == PERTA_EUSAGE;
        perta_journal_abandon(&other, NULL, 0, PERTA_EUSAGE, &e);
        _exit(refused && is_there(JOURNAL) ? 0 : 1);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_int_eq(status, 0);
    perta_journal_close(&j);
}
END_TEST

static void abandon(int n_commits, int rc, bool want_kept)
{
    struct perta_journal j;
    struct perta_publish folder;
    struct perta_publish *const folders[] = {&folder};
    struct perta_err e = {0};
    begin(&j, 1, true, 0, "");
    ck_assert_ok(perta_publish_sweep("deep/out", NULL, &err));
    ck_assert_ok(perta_publish_begin(&folder, "deep/out", NULL, false, &err));
    for (int i = 0; i < n_commits; i++)
        commit(&j, i);
    perta_fail(&e, rc, "what happened");
    perta_journal_abandon(&j, folders, 1, rc, &e);
    perta_journal_close(&j);
    perta_publish_release(&folder);
    ck_assert_int_eq(is_there(JOURNAL), want_kept);
    ck_assert_int_eq(is_there("deep/out.perta-partial"), want_kept);
    ck_assert_int_eq(strstr(e.msg, "--resume") != NULL, want_kept);
    ck_assert_ptr_nonnull(strstr(e.msg, "what happened"));
}

START_TEST(what_can_be_gone_on_with_is_kept_and_nothing_else)
{
    abandon(0, PERTA_EINTR, false);
    abandon(1, PERTA_EINTR, true);
    abandon(2, PERTA_ESYS, true);
    abandon(2, PERTA_EINPUT, false); /* a resumed run would meet the same error */
}
END_TEST

/* Publish two folders, killed before or after each step; with or without an older folder that is
 * replaced. */
static void publish_from(int step, bool replace)
{
    struct perta_journal j;
    struct perta_publish a, b;
    struct perta_publish *const folders[] = {&a, &b};
    bool found;
    if (replace) {
        ck_assert_int_eq(mkdir("deep", 0777), 0);
        put_tiny_model("deep/a", "{}");
        put_tiny_model("deep/out", "{}");
    }
    begin(&j, 1, false, 0, "");
    ck_assert_ok(perta_publish_begin(&a, "deep/a", NULL, replace, &err));
    ck_assert_ok(perta_publish_begin(&b, "deep/out", NULL, replace, &err));
    ck_assert_ok(perta_publish_file(&a, "model.safetensors", TINY_SHARD, TINY_SHARD_BYTES, &err));
    ck_assert_ok(
        perta_publish_file(&b, "model-1-of-1.safetensors", TINY_SHARD, TINY_SHARD_BYTES, &err));
    struct stat sa, sb;
    ck_assert_int_eq(stat(a.partial, &sa) | stat(b.partial, &sb), 0);
    json_t *record = json_pack("{s:[I,I], s:{}}", "publish", (json_int_t)sa.st_ino,
                               (json_int_t)sb.st_ino, "summary");
    ck_assert_ok(perta_journal_commit(&j, record, 0, &err));
    json_decref(record);
    perta_journal_close(&j);
    if (step > 0 && replace) { /* swapped, but the replaced folder is not removed yet */
        ck_assert_int_eq(
            renameat2(AT_FDCWD, "deep/a.perta-partial", AT_FDCWD, "deep/a", RENAME_EXCHANGE), 0);
    } else if (step > 0) {
        ck_assert_int_eq(rename("deep/a.perta-partial", "deep/a"), 0);
    }
    if (step > 1)
        ck_assert_ok(perta_publish_commit(&b, &err));
    a.keep = b.keep = true;
    perta_publish_release(&a);
    perta_publish_release(&b);

    go_on(&j, 1, 0, "");
    ck_assert(perta_journal_is_publishing(&j));
    ck_assert_ok(perta_publish_resume(&a, "deep/a", NULL, replace, &found, &err));
    ck_assert_ok(perta_publish_resume(&b, "deep/out", NULL, replace, &found, &err));
    json_t *summary = perta_journal_summary(&j);
    ck_assert_ok(perta_journal_publish(&j, folders, 2, summary, &err));
    json_decref(summary);
    perta_journal_close(&j);
    perta_publish_release(&a);
    perta_publish_release(&b);
    ck_assert(is_there("deep/a/model.safetensors") &&
              is_there("deep/out/model-1-of-1.safetensors"));
    ck_assert_uint_eq(count_entries("deep"), 2);
    ck_assert_uint_eq(count_entries("deep/a") + count_entries("deep/out"), 2);
    ck_assert_int_eq(system("rm -r deep"), 0);
}

START_TEST(a_publish_that_was_killed_is_finished)
{
    publish_from(_i % 3, _i >= 3);
}
END_TEST

START_TEST(a_folder_that_is_gone_is_not_called_published)
{
    struct perta_journal j;
    struct perta_publish a;
    struct perta_publish *const folders[] = {&a};
    bool found;
    begin(&j, 1, false, 0, "");
    json_t *record = json_pack("{s:[i], s:{}}", "publish", 12345, "summary");
    ck_assert_ok(perta_journal_commit(&j, record, 0, &err));
    json_decref(record);
    perta_journal_close(&j);
    go_on(&j, 1, 0, "");
    ck_assert_ok(perta_publish_resume(&a, "deep/out", NULL, false, &found, &err));
    ck_assert(!found);
    struct perta_err e = {0};
    ck_assert_int_eq(perta_journal_publish(&j, folders, 1, NULL, &e), PERTA_ESYS);
    e = (struct perta_err){0};
    json_t *summary = perta_journal_summary(&j);
    ck_assert_int_eq(perta_journal_publish(&j, folders, 1, summary, &e), PERTA_EINPUT);
    json_decref(summary);
    ck_assert_ptr_nonnull(strstr(e.msg, "is gone"));
    perta_publish_release(&a);
    perta_journal_close(&j);
}
END_TEST

START_TEST(a_journal_that_its_owner_removes_just_before_it_is_locked_is_made_anew)
{
    struct perta_journal j;
    struct stat here, there;
    to_remove = 3;
    begin(&j, 1, false, 0, "");
    ck_assert_int_eq(to_remove, 0);
    ck_assert(!fstat(j.fd, &here) && !stat(JOURNAL, &there) && here.st_ino == there.st_ino);
    commit(&j, 1);
    perta_journal_close(&j);
    to_remove = 1; /* resume while the finished run removes the journal */
    go_on(&j, 1, PERTA_ESYS, JOURNAL);
    perta_journal_close(&j);
}
END_TEST

int main(void)
{
    TCase *tc = tcase_create("journal");
    tcase_add_checked_fixture(tc, enter, leave);
    tcase_add_test(tc, records_come_back_in_order);
    tcase_add_test(tc, commit_points_are_made_by_count_where_the_clock_makes_none);
    tcase_add_test(tc, another_identity_is_refused_and_nothing_is_lost);
    tcase_add_test(tc, a_torn_record_and_what_follows_do_not_count);
    tcase_add_test(tc, no_whole_record_is_no_journal);
    tcase_add_test(tc, one_process_at_a_time);
    tcase_add_test(tc, a_journal_that_its_owner_removes_just_before_it_is_locked_is_made_anew);
    tcase_add_test(tc, what_can_be_gone_on_with_is_kept_and_nothing_else);
    tcase_add_loop_test(tc, a_publish_that_was_killed_is_finished, 0, 6);
    tcase_add_test(tc, a_folder_that_is_gone_is_not_called_published);
    return run_suite("journal", tc);
}
