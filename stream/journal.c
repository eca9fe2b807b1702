#include "stream/journal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "io/file.h"
#include "io/hash.h"
#include "io/text.h"

#define PREFIX_BYTES 17 /* 16 hexadecimal digits and a blank */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- lines ---- */

/* Make the line of a record; the caller frees it. It is printed in place, because a record of very
 * many tensors takes megabytes. */
static char *line_of(const json_t *record)
{
    const size_t flags = JSON_COMPACT | JSON_SORT_KEYS;
    size_t n = json_dumpb(record, NULL, 0, flags);
    char *line = n ? malloc(PREFIX_BYTES + n + 2) : NULL;
    if (!line)
        return NULL;
    char hex[PREFIX_BYTES + 1], *text = line + PREFIX_BYTES;
    if (json_dumpb(record, text, n, flags) != n) {
        free(line);
        return NULL;
    }
    snprintf(hex, sizeof hex, "%016llx ", (unsigned long long)perta_hash64(text, n));
    memcpy(line, hex, PREFIX_BYTES);
    strcpy(text + n, "\n");
    return line;
}

/* Parse the line at text (len bytes). *record is the caller's; NULL if the line is not a complete
 * record. */
static int record_of(const char *text, size_t len, const char *path, json_t **record,
                     struct perta_err *err)
{
    char hex[PREFIX_BYTES + 1];
    json_error_t why;
    *record = NULL;
    if (len <= PREFIX_BYTES || text[--len] != '\n')
        return 0;
    uint64_t hash = perta_hash64(text + PREFIX_BYTES, len - PREFIX_BYTES);
    snprintf(hex, sizeof hex, "%016llx ", (unsigned long long)hash);
    if (memcmp(hex, text, PREFIX_BYTES) != 0)
        return 0;
    *record = json_loadb(text + PREFIX_BYTES, len - PREFIX_BYTES, JSON_REJECT_DUPLICATES, &why);
    return *record || json_error_code(&why) != json_error_out_of_memory
               ? 0
               : perta_fail_sys(err, ENOMEM, "%s", path);
}

/* Call use for every complete record from the start of the file, which may keep it. *good: their
 * length in bytes; an incomplete record may follow. */
static int read_records(int fd, const char *path, perta_journal_use use, void *ctx, size_t *good,
                        struct perta_err *err)
{
    char *line = NULL;
    size_t room = 0;
    ssize_t len = 0;
    int copy = dup(fd), rc = 0;
    FILE *file = copy < 0 || lseek(copy, 0, SEEK_SET) < 0 ? NULL : fdopen(copy, "r");
    *good = 0;
    if (!file)
        rc = perta_fail_sys(err, errno, "%s", path);
    while (!rc && (len = getline(&line, &room, file)) > 0) {
        json_t *record;
        rc = record_of(line, (size_t)len, path, &record, err);
        if (!record)
            break;
        *good += (size_t)len;
        rc = use(ctx, record, err);
        json_decref(record);
    }
    if (!rc && len < 0 && !feof(file)) /* a read error, or out of memory */
        rc = perta_fail_sys(err, errno, "%s", path);
    free(line);
    if (file)
        fclose(file);
    else if (copy >= 0)
        close(copy);
    return rc;
}

static int append(const struct perta_journal *journal, const json_t *record, struct perta_err *err)
{
    char *line = line_of(record);
    int rc = line ? perta_write_all(journal->fd, line, strlen(line), journal->path, err)
                  : perta_fail_sys(err, ENOMEM, "%s", journal->path);
    if (!rc && fdatasync(journal->fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", journal->path);
    free(line);
    return rc;
}

/* ---- identity ---- */

static const char *text_of(const json_t *value, char **text)
{
    *text = value ? perta_json_text(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    return *text ? *text : "nothing";
}

/* Describe the first difference between two values: "flags: alpha was 1, is now 2". */
static void describe_difference(const json_t *was, const json_t *is, const char *at, char *buf,
                                size_t len)
{
    const char *key;
    json_t *value;
    if (json_is_object(was) && json_is_object(is)) {
        char inner[256];
        json_object_foreach ((json_t *)(uintptr_t)was, key, value)
            if (!json_equal(value, json_object_get(is, key))) {
                snprintf(inner, sizeof inner, "%s%s%s", at, *at ? ": " : "", key);
                describe_difference(value, json_object_get(is, key), inner, buf, len);
                return;
            }
        json_object_foreach ((json_t *)(uintptr_t)is, key, value)
            if (!json_object_get(was, key)) {
                snprintf(inner, sizeof inner, "%s%s%s", at, *at ? ": " : "", key);
                describe_difference(NULL, value, inner, buf, len);
                return;
            }
    }
    char *a, *b;
    const char *from = text_of(was, &a), *to = text_of(is, &b);
    snprintf(buf, len, "%s was %.200s, is now %.200s", at, from, to);
    free(a);
    free(b);
}

json_t *perta_journal_file(uint64_t len_bytes, const struct timespec *mtime)
{
    return json_pack("{s:I, s:I, s:I}", "bytes", (json_int_t)len_bytes, "seconds",
                     (json_int_t)mtime->tv_sec, "nanoseconds", (json_int_t)mtime->tv_nsec);
}

json_t *perta_journal_checkpoint(const struct perta_checkpoint *ck)
{
    json_t *files = json_object();
    for (uint32_t i = 0; i < ck->n_shards; i++)
        perta_json_set(&files, ck->shards[i].name,
                       perta_journal_file(ck->shards[i].size_bytes, &ck->shards[i].mtime));
    return files;
}

json_t *perta_journal_config(const struct perta_checkpoint *ck)
{
    if (!ck->config)
        return json_null();
    char *text = perta_json_text(ck->config, JSON_COMPACT | JSON_SORT_KEYS);
    json_t *hash =
        text ? perta_text_json("%016llx", (unsigned long long)perta_hash64(text, strlen(text)))
             : NULL;
    free(text);
    return hash;
}

json_t *perta_journal_own(const struct perta_checkpoint *ck)
{
    json_t *files = json_object();
    for (uint32_t i = 0; i < ck->n_shards; i++)
        perta_json_set(&files, ck->shards[i].name,
                       json_integer((json_int_t)ck->shards[i].size_bytes));
    return files;
}

/* ---- begin, resume ---- */

/* OUT.perta-journal for the output at path. NULL only when out of memory. */
static char *path_beside(const char *path)
{
    char *beside = NULL;
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/')
        len--;
    return asprintf(&beside, "%.*s" PERTA_JOURNAL_SUFFIX, (int)len, path) < 0 ? NULL : beside;
}

/* Does the locked file still have its name? The process that held it may have removed it after it
 * was opened here. */
static bool is_named(const struct perta_journal *journal)
{
    struct stat here, there;
    return !fstat(journal->fd, &here) && !lstat(journal->path, &there) &&
           here.st_ino == there.st_ino && here.st_dev == there.st_dev;
}

/* Open and lock the journal. 1: it was removed meanwhile; try again. */
static int try_lock(struct perta_journal *journal, const char *path, int flags,
                    struct perta_err *err)
{
    struct stat st;
    journal->fd = perta_open_any(journal->path, O_RDWR | O_NOFOLLOW | flags);
    if (journal->fd < 0)
        return perta_fail_sys(err, errno, "%s", journal->path);
    if (perta_check_left(journal->fd, journal->path, &st, err)) {
        close(journal->fd);
        journal->fd = -1;
        return err->code;
    }
    if (flock(journal->fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
        close(journal->fd); /* it is not ours to write or remove */
        journal->fd = -1;
        return perta_fail(err, PERTA_EUSAGE, "%s: another process is working on it", path);
    }
    if (is_named(journal))
        return 0;
    close(journal->fd);
    journal->fd = -1;
    return 1;
}

static int open_locked(struct perta_journal *journal, const char *path, int flags,
                       struct perta_err *err)
{
    *journal = (struct perta_journal){
        .fd = -1, .path = path_beside(path), .last_time = now(), .started = time(NULL)};
    int rc = journal->path ? 1 : perta_fail_sys(err, ENOMEM, "%s", path);
    while (rc == 1)
        rc = try_lock(journal, path, flags, err);
    return rc;
}

static int append_identity(struct perta_journal *journal, const json_t *identity,
                           struct perta_err *err)
{
    json_t *first = json_copy((json_t *)(uintptr_t)identity);
    int rc = json_object_set_new(first, "started", json_integer(journal->started))
                 ? perta_fail_sys(err, ENOMEM, "%s", journal->path)
                 : append(journal, first, err);
    json_decref(first);
    return rc;
}

/* The first record, which is the identity, and the last of the others. */
struct first_and_last {
    json_t *first, *last;
};

static int keep_ends(void *ctx, json_t *record, struct perta_err *err)
{
    (void)err;
    struct first_and_last *ends = ctx;
    if (!ends->first) {
        ends->first = json_incref(record);
        return 0;
    }
    json_decref(ends->last);
    ends->last = json_incref(record);
    return 0;
}

/* Is there a journal to resume from? 1, 0, or PERTA_ESYS if that cannot be told. Before its first
 * commit point, a run has left nothing to resume from. */
static int find_journal(const char *path, struct perta_err *err)
{
    struct perta_err why = {0};
    struct first_and_last ends = {0};
    size_t good;
    char *beside = path_beside(path);
    int fd = beside ? perta_open_any(beside, O_RDONLY | O_NOFOLLOW) : -1;
    struct stat st;
    if (!beside || (fd < 0 && (errno == ENOMEM || errno == EMFILE || errno == ENFILE)))
        perta_fail_sys(&why, errno, "%s" PERTA_JOURNAL_SUFFIX, path);
    if (fd >= 0 && !perta_check_left(fd, beside, &st, &why))
        read_records(fd, beside, keep_ends, &ends, &good, &why);
    if (fd >= 0)
        close(fd);
    int found = why.code == PERTA_ESYS ? PERTA_ESYS : ends.last != NULL;
    if (found < 0)
        *err = why;
    free(beside);
    json_decref(ends.first);
    json_decref(ends.last);
    return found;
}

/* The file is about to be overwritten: is it a journal, or the incomplete beginning of one? */
static int check_own(const struct perta_journal *journal, struct perta_err *err)
{
    char start[PREFIX_BYTES + 2] = "";
    struct stat st;
    assert(journal->fd >= 0);
    if (fstat(journal->fd, &st))
        return perta_fail_sys(err, errno, "%s", journal->path);
    size_t n = st.st_size < PREFIX_BYTES + 1 ? (size_t)st.st_size : PREFIX_BYTES + 1;
    int rc = perta_pread_all(journal->fd, start, n, 0, journal->path, err);
    bool torn = strspn(start, "0123456789abcdef") == strlen(start),
         whole = start[PREFIX_BYTES] == '{';
    if (rc || torn || (whole && start[PREFIX_BYTES - 1] == ' '))
        return rc;
    return perta_fail(err, PERTA_EUSAGE,
                      "%s: exists and is not a journal of perta; move it away, or "
                      "choose another output",
                      journal->path);
}

static int begin(struct perta_journal *journal, const char *path, const json_t *identity,
                 bool replace, struct perta_err *err)
{
    *journal = (struct perta_journal){.fd = -1};
    int found = replace ? 0 : find_journal(path, err);
    if (found < 0)
        return found;
    if (found) {
        err->resumable = true;
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: a run that was interrupted or is still running left a journal "
                          "beside it; --resume continues it, --force starts over",
                          path);
    }
    int rc = perta_make_parents(path, err);
    if (!rc)
        rc = open_locked(journal, path, O_CREAT, err);
    if (!rc && (rc = check_own(journal, err))) {
        close(journal->fd); /* it is not ours to write or remove */
        journal->fd = -1;
    }
    if (!rc && ftruncate(journal->fd, 0))
        rc = perta_fail_sys(err, errno, "%s", journal->path);
    if (!rc)
        rc = append_identity(journal, identity, err);
    return rc ? rc : perta_name_sync(journal->path, err);
}

static int check_identity(const char *path, const json_t *was, const json_t *is,
                          struct perta_err *err)
{
    char difference[600];
    if (json_equal(was, is))
        return 0;
    describe_difference(was, is, "", difference, sizeof difference);
    return perta_fail(
        err, PERTA_EUSAGE,
        "%s: --resume cannot continue: %s; resume with what the run was started with, or "
        "start over with --force",
        path, difference);
}

static int resume_run(struct perta_journal *journal, const char *path, const json_t *identity,
                      struct perta_err *err)
{
    struct first_and_last ends = {0};
    size_t good = 0;
    int rc = open_locked(journal, path, 0, err);
    journal->resuming = journal->committed = true;
    journal->keep = true; /* if this run fails, too, what is there stays */
    if (!rc)
        rc = read_records(journal->fd, journal->path, keep_ends, &ends, &good, err);
    journal->last = ends.last;
    if (!rc && !ends.last)
        rc = perta_fail(err, PERTA_EINPUT, "%s: no record in it", journal->path);
    if (!rc && json_object_get(ends.last, "publish") &&
        !json_is_object(json_object_get(ends.last, "summary")))
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: damaged; --force starts over: there is no summary in its last "
                        "record",
                        journal->path);
    const json_t *started = json_object_get(ends.first, "started");
    if (json_is_integer(started))
        journal->started = json_integer_value(started);
    json_object_del(ends.first, "started");
    if (!rc)
        rc = check_identity(path, ends.first, identity, err);
    /* Cut off an incomplete record, so that the next one follows the last complete one. */
    if (!rc && (ftruncate(journal->fd, (off_t)good) || lseek(journal->fd, 0, SEEK_END) < 0))
        rc = perta_fail_sys(err, errno, "%s", journal->path);
    json_decref(ends.first);
    return rc;
}

/* True also if the journal cannot be read: opening it then reports that, instead of starting
 * over. */
bool perta_journal_found(const char *path)
{
    struct perta_err ignored = {0};
    return find_journal(path, &ignored) != 0;
}

int perta_journal_open(struct perta_journal *journal, const char *path, const json_t *identity,
                       bool resume, bool force, struct perta_err *err)
{
    *journal = (struct perta_journal){.fd = -1};
    int rc = !identity ? perta_fail_sys(err, ENOMEM, "%s", path)
             : resume && perta_journal_found(path)
                 ? resume_run(journal, path, identity, err)
                 : begin(journal, path, identity, resume || force, err);
    journal->resume = resume;
    return rc;
}

int perta_journal_folder(const struct perta_journal *journal, struct perta_publish *folder,
                         const char *path, const char *like, bool force, struct perta_err *err)
{
    bool found;
    if (!journal->resuming) {
        int rc =
            journal->resume ? perta_publish_sweep(path, like, err) : 0; /* nothing to resume from */
        return rc ? rc : perta_publish_begin(folder, path, like, force, err);
    }
    int rc = perta_publish_resume(folder, path, like, force, &found, err);
    if (!rc && !found && !perta_journal_is_publishing(journal))
        rc = perta_fail(err, PERTA_EINPUT, "%s: is gone; --force starts over", folder->partial);
    return rc;
}

struct replay {
    perta_journal_use use;
    void *ctx;
    bool begun;
};

static int replay_one(void *ctx, json_t *record, struct perta_err *err)
{
    struct replay *replay = ctx;
    bool is_identity = !replay->begun;
    replay->begun = true;
    return is_identity ? 0 : replay->use(replay->ctx, record, err);
}

int perta_journal_replay(const struct perta_journal *journal, perta_journal_use use, void *ctx,
                         struct perta_err *err)
{
    struct replay replay = {use, ctx, false};
    size_t good;
    int rc = journal->resuming
                 ? read_records(journal->fd, journal->path, replay_one, &replay, &good, err)
                 : 0;
    if (!rc && journal->resuming && lseek(journal->fd, 0, SEEK_END) < 0)
        rc = perta_fail_sys(err, errno, "%s", journal->path);
    return rc;
}

const json_t *perta_journal_last(const struct perta_journal *journal)
{
    return journal->last;
}

void perta_journal_close(struct perta_journal *journal)
{
    if (journal->path && journal->fd >= 0)
        close(journal->fd);
    free(journal->path);
    json_decref(journal->last);
    *journal = (struct perta_journal){.fd = -1};
}

/* ---- commit ---- */

bool perta_journal_due(const struct perta_journal *journal, uint64_t bytes)
{
    const char *seconds = getenv("PERTA_COMMIT_SECONDS"), *most = getenv("PERTA_COMMIT_BYTES");
    return now() - journal->last_time >= (seconds ? strtod(seconds, NULL) : PERTA_COMMIT_SECONDS) ||
           bytes - journal->bytes >= (most ? strtoull(most, NULL, 10) : PERTA_COMMIT_BYTES);
}

int perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                         struct perta_err *err)
{
    int rc = append(journal, record, err);
    if (rc)
        return rc;
    journal->last_time = now();
    journal->bytes = bytes;
    journal->committed = true;
    return 0;
}

/* ---- the end ---- */

static int add_inode(json_t **inodes, const struct perta_publish *folder, struct perta_err *err)
{
    struct stat st;
    if (stat(folder->partial, &st))
        return perta_fail_sys(err, errno, "%s", folder->partial);
    perta_json_append(inodes, json_integer((json_int_t)st.st_ino));
    return 0;
}

bool perta_journal_is_publishing(const struct perta_journal *journal)
{
    return json_object_get(perta_journal_last(journal), "publish") != NULL;
}

json_t *perta_journal_summary(const struct perta_journal *journal)
{
    return json_deep_copy(json_object_get(perta_journal_last(journal), "summary"));
}

/* Does the folder at path have that inode? */
static bool is_inode(const char *path, const json_t *inode)
{
    struct stat st;
    return !lstat(path, &st) && (json_int_t)st.st_ino == json_integer_value(inode);
}

static int publish(struct perta_publish *folder, const json_t *inode, struct perta_err *err)
{
    if (!is_inode(folder->path, inode))
        return folder->made && is_inode(folder->partial, inode)
                   ? perta_publish_commit(folder, err)
                   : perta_fail(err, PERTA_EINPUT, "%s: is gone, or is another folder",
                                folder->partial);
    int rc = folder->made ? perta_publish_sweep(folder->path, folder->path, err)
                          : 0; /* the output that it replaced */
    folder->made = false;
    return rc;
}

int perta_journal_complete(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, json_t *summary, struct perta_err *err)
{
    int rc = summary ? 0 : perta_fail_sys(err, ENOMEM, "%s", journal->path);
    if (rc || perta_journal_is_publishing(journal))
        return rc;
    for (size_t i = 0; i < n && !rc; i++)
        rc = perta_publish_sync(folders[i], err);
    json_t *inodes = json_array();
    for (size_t i = 0; i < n && !rc; i++)
        rc = add_inode(&inodes, folders[i], err);
    if (!rc && json_object_set_new(summary, "started", json_integer(journal->started)))
        rc = perta_fail_sys(err, ENOMEM, "%s", journal->path);
    json_t *record = json_pack("{s:o, s:O}", "publish", inodes, "summary", summary);
    if (!rc)
        rc = record ? perta_journal_commit(journal, record, journal->bytes, err)
                    : perta_fail_sys(err, ENOMEM, "%s", journal->path);
    json_decref(journal->last);
    journal->last = record;
    return rc;
}

int perta_journal_publish(struct perta_journal *journal, struct perta_publish *const *folders,
                          size_t n, json_t *summary, struct perta_err *err)
{
    int rc = perta_journal_complete(journal, folders, n, summary, err);
    const json_t *inodes = json_object_get(perta_journal_last(journal), "publish");
    for (size_t i = 0; i < n && !rc; i++)
        rc = publish(folders[i], json_array_get(inodes, i), err);
    if (!rc && unlink(journal->path))
        rc = perta_fail_sys(err, errno, "%s", journal->path);
    /* Everything is done and on disk. If a power cut brings the journal back, it says so too. */
    if (!rc)
        perta_name_sync(journal->path, &(struct perta_err){0});
    return rc;
}

int perta_journal_remove(struct perta_journal *journal, struct perta_err *err)
{
    if (!unlink(journal->path))
        return 0;
    return perta_fail_sys(err, errno, "%s: remove", journal->path);
}

void perta_journal_abandon(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, int rc, struct perta_err *err)
{
    bool can_continue = rc == PERTA_EINTR || rc == PERTA_ESYS;
    bool keep = journal->committed && (can_continue || journal->keep);
    if (!journal->path || journal->fd < 0 || !rc)
        return;
    for (size_t i = 0; i < n; i++)
        folders[i]->keep = keep;
    if (!keep) {
        unlink(journal->path);
    } else if (can_continue && !err->resumable) {
        err->resumable = true;
        perta_err_context(err, "finished work is kept; --resume continues it");
    }
}
