#include "io/wal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/hash.h"

typedef unsigned long long ull;

/* Integers are in native byte order: a log is read on the machine that wrote it. */
#define MAGIC "PERTAWAL"
#define VERSION 1u
#define EXTENTS_MAX 2048u
#define READ_BYTES (1ull << 20) /* read at once when a batch is replayed */

/* The first block of the log. It is written once. */
struct head {
    char magic[8];
    uint32_t version, zero;
    char id[PERTA_WAL_ID_BYTES];
    char subject[PERTA_WAL_PATH_MAX];
    uint64_t hash; /* XXH3-64 of the fields above */
};
_Static_assert(sizeof(struct head) <= PERTA_BLOCK_BYTES, "the head is one block");

/* A batch follows: this header and the table, padded to a whole block, then the bytes. */
struct batch {
    char magic[8];
    uint32_t n_extents, zero;
    uint64_t len_bytes;
    uint64_t hash_table; /* XXH3-64 */
    char xxh128[40];     /* of the bytes */
    uint64_t hash;       /* of the fields above */
};
#define TABLE_BYTES                                                                              \
    ((sizeof(struct batch) + EXTENTS_MAX * sizeof(struct perta_wal_extent) + PERTA_BLOCK_BYTES - \
      1) /                                                                                       \
     PERTA_BLOCK_BYTES * PERTA_BLOCK_BYTES)
#define BYTES_AT (PERTA_BLOCK_BYTES + TABLE_BYTES)

/* ---- reading and writing ---- */

static int sync_fd(int fd, const char *path, struct perta_err *err)
{
    return fdatasync(fd) ? perta_fail_sys(err, errno, "%s: fsync", path) : 0;
}

/* Write one extent: whole blocks with O_DIRECT where the file is open so, the rest of its end
 * through the page cache. data is block-aligned. */
static int write_extent(struct perta_wal *w, const struct perta_wal_extent *e, const uint8_t *data,
                        struct perta_err *err)
{
    const struct perta_file *file = &w->files[e->file];
    uint64_t whole = perta_align_down(e->len_bytes, PERTA_BLOCK_BYTES);
    int rc = perta_pwrite_all(file->fd, data, whole, e->off_bytes, file->path, err);
    return rc ? rc
              : perta_pwrite_all(w->plain[e->file], data + whole, e->len_bytes - whole,
                                 e->off_bytes + whole, file->path, err);
}

/* A failed fsync is final: a second one may succeed although the data is lost. */
static int sync_files(struct perta_wal *w, const struct perta_wal_extent *extents, uint32_t n,
                      struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < n && !rc; i++)
        if (!i || extents[i].file != extents[i - 1].file)
            rc = sync_fd(w->plain[extents[i].file], w->files[extents[i].file].path, err);
    return rc;
}

/* ---- what is in a log ---- */

static bool head_is_sound(const struct head *head)
{
    return !memcmp(head->magic, MAGIC, sizeof head->magic) && head->version == VERSION &&
           head->hash == perta_hash64(head, offsetof(struct head, hash)) &&
           memchr(head->subject, 0, sizeof head->subject);
}

/* The subject as a word of a shell command that people paste; PATCH if it has characters that the
 * shell would interpret. */
static const char *shell_word(const struct head *head)
{
    static const char special[] = " \t\r\n'\"\\`$&|;<>()*?[]{}!#~^=%";
    const char *s = head->subject;
    return *s == '-' || !*s || s[strcspn(s, special)] ? "PATCH" : s;
}

static int read_head(int fd, const char *path, struct head *head, struct perta_err *err)
{
    int rc = perta_pread_all(fd, head, sizeof *head, 0, path, err);
    if (!rc && !head_is_sound(head))
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: a damaged journal of an edit in place; verify the folder "
                        "against its patch, or make it again",
                        path);
    return rc;
}

/* Do all extents lie within the files, and do they add up to the batch's bytes? */
static bool table_is_sound(const struct perta_wal *w, const struct batch *batch,
                           const struct perta_wal_extent *extents)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < batch->n_extents; i++) {
        const struct perta_wal_extent *e = &extents[i];
        uint64_t end;
        if (e->file >= w->n_files || e->off_bytes % PERTA_BLOCK_BYTES ||
            perta_add_overflows(e->off_bytes, e->len_bytes, &end) ||
            end > w->files[e->file].len_bytes)
            return false;
        sum += perta_align_up(e->len_bytes, PERTA_BLOCK_BYTES);
        if (sum > batch->len_bytes)
            return false;
    }
    return sum == batch->len_bytes;
}

/* Read header and table of the batch. *whole: both are complete and sound. */
static int read_table(struct perta_wal *w, int fd, struct batch *batch, bool *whole,
                      struct perta_err *err)
{
    int rc = perta_pread_all(fd, batch, sizeof *batch, PERTA_BLOCK_BYTES, w->path, err);
    *whole = !rc && !memcmp(batch->magic, MAGIC, sizeof batch->magic) &&
             batch->n_extents <= EXTENTS_MAX &&
             batch->hash == perta_hash64(batch, offsetof(struct batch, hash));
    if (!*whole)
        return rc;
    uint64_t table_bytes = batch->n_extents * sizeof *w->extents;
    rc = perta_pread_all(fd, w->extents, table_bytes, PERTA_BLOCK_BYTES + sizeof *batch, w->path,
                         err);
    *whole = !rc && batch->hash_table == perta_hash64(w->extents, table_bytes) &&
             table_is_sound(w, batch, w->extents);
    return rc;
}

/* *whole: all bytes of the batch are there, with the right digest. */
static int check_bytes(struct perta_wal *w, int fd, const struct batch *batch, bool *whole,
                       struct perta_err *err)
{
    struct perta_digest *digest = perta_digest_new(false);
    char xxh128[PERTA_XXH128_HEX] = "";
    int rc = digest ? 0 : perta_fail_sys(err, ENOMEM, "%s", w->path);
    for (uint64_t at = 0; !rc && at < batch->len_bytes; at += READ_BYTES) {
        uint64_t left = batch->len_bytes - at, n = left < READ_BYTES ? left : READ_BYTES;
        rc = perta_pread_all(fd, w->buf, n, BYTES_AT + at, w->path, err);
        if (!rc)
            perta_digest_update(digest, w->buf, n);
    }
    if (!rc)
        perta_digest_xxh128(digest, xxh128);
    perta_digest_free(digest);
    *whole = !rc && !strncmp(xxh128, batch->xxh128, sizeof xxh128);
    return rc;
}

/* Read and check the batch. If it is not *whole, none of it was written to the files yet. A read
 * error is passed on: the batch may be good, and the next one would overwrite it. */
static int read_batch(struct perta_wal *w, int fd, struct batch *batch, bool *whole,
                      struct perta_err *err)
{
    struct perta_err why = {0};
    int rc = read_table(w, fd, batch, whole, &why);
    if (*whole)
        rc = check_bytes(w, fd, batch, whole, &why);
    if (rc != PERTA_ESYS)
        return 0; /* the log ends early: the batch is not whole */
    *err = why;
    return rc;
}

/* Replay the batch. Writing it a second time does no harm: the bytes are the same. */
static int write_again(struct perta_wal *w, int fd, struct perta_err *err)
{
    struct batch batch;
    bool whole;
    int rc = read_batch(w, fd, &batch, &whole, err);
    if (!whole)
        return rc;
    uint64_t at = BYTES_AT;
    for (uint32_t i = 0; i < batch.n_extents && !rc; i++) {
        const struct perta_wal_extent *e = &w->extents[i];
        for (uint64_t done = 0; done < e->len_bytes && !rc; done += READ_BYTES) {
            uint64_t left = e->len_bytes - done, n = left < READ_BYTES ? left : READ_BYTES;
            struct perta_wal_extent part = {e->file, 0, e->off_bytes + done, n};
            rc = perta_pread_all(fd, w->buf, n, at + done, w->path, err);
            if (!rc)
                rc = write_extent(w, &part, w->buf, err);
        }
        at += perta_align_up(e->len_bytes, PERTA_BLOCK_BYTES);
    }
    return rc ? rc : sync_files(w, w->extents, batch.n_extents, err);
}

/* ---- open ---- */

/* Remove what a run left that was killed while it created the log: a file that begins with zeros,
 * or with the head. */
static int remove_partial(const struct perta_wal *w, struct perta_err *err)
{
    static const char zeros[sizeof MAGIC - 1] = "";
    char start[sizeof zeros] = "";
    struct stat st;
    int fd = perta_open_any(w->partial, O_RDONLY | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", w->partial);
    int rc = perta_check_left(fd, w->partial, &st, err);
    if (!rc && st.st_size)
        rc = perta_pread_all(fd, start, sizeof start, 0, w->partial, err);
    close(fd);
    if (!rc && memcmp(start, zeros, sizeof zeros) && memcmp(start, MAGIC, sizeof start))
        rc = perta_fail(err, PERTA_EUSAGE, "%s: exists and is not a journal of perta; move it away",
                        w->partial);
    if (!rc && unlink(w->partial))
        rc = perta_fail_sys(err, errno, "%s", w->partial);
    return rc;
}

static int resume(struct perta_wal *w, const char *id, struct perta_err *err)
{
    struct head head;
    struct stat st;
    int removed = remove_partial(w, err);
    if (removed)
        return removed;
    int fd = perta_open_any(w->path, O_RDONLY | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", w->path);
    int rc = perta_check_left(fd, w->path, &st, err);
    if (!rc)
        rc = read_head(fd, w->path, &head, err);
    if (!rc && memcmp(head.id, id, sizeof head.id))
        rc = perta_fail(err, PERTA_EUSAGE,
                        "%s: an edit by the patch %s was interrupted here; apply or revert that "
                        "one with --in-place first",
                        w->path, shell_word(&head));
    if (!rc)
        rc = write_again(w, fd, err);
    close(fd);
    if (!rc)
        rc = perta_file_reopen(&w->log, w->path, true, err);
    w->resuming = !rc;
    return rc;
}

static int open_plain(struct perta_wal *w, struct perta_err *err)
{
    for (uint32_t i = 0; i < w->n_files; i++) {
        w->plain[i] = open(w->files[i].path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
        if (w->plain[i] < 0)
            return perta_fail_sys(err, errno, "%s", w->files[i].path);
    }
    return 0;
}

int perta_wal_open(struct perta_wal *w, const char *folder, const char *id,
                   struct perta_file *files, uint32_t n_files, uint64_t room_bytes,
                   struct perta_err *err)
{
    *w = (struct perta_wal){
        .log.fd = -1,
        .files = files,
        .n_files = n_files,
        .room_bytes =
            perta_align_up(room_bytes < READ_BYTES ? READ_BYTES : room_bytes, PERTA_BLOCK_BYTES),
        .plain = malloc((n_files + 1) * sizeof *w->plain),
        .extents = calloc(EXTENTS_MAX, sizeof *w->extents),
    };
    for (uint32_t i = 0; w->plain && i < n_files; i++)
        w->plain[i] = -1;
    uint64_t memory = TABLE_BYTES + w->room_bytes;
    if (!w->plain || !w->extents || asprintf(&w->path, "%s/" PERTA_WAL_NAME, folder) < 0 ||
        asprintf(&w->partial, "%s" PERTA_PARTIAL_SUFFIX, w->path) < 0 ||
        posix_memalign((void **)&w->buf, PERTA_BLOCK_BYTES, memory))
        return perta_fail_sys(err, ENOMEM, "%s", folder);
    memset(w->buf, 0, memory); /* resident from now on */
    int rc = open_plain(w, err);
    return rc ? rc : resume(w, id, err);
}

int perta_wal_begin(struct perta_wal *w, const char *id, const char *subject, struct perta_err *err)
{
    struct head head = {.magic = MAGIC, .version = VERSION};
    memcpy(head.id, id, sizeof head.id);
    strncpy(head.subject, subject, sizeof head.subject - 1);
    head.hash = perta_hash64(&head, offsetof(struct head, hash));
    memset(w->buf, 0, PERTA_BLOCK_BYTES);
    memcpy(w->buf, &head, sizeof head);
    int rc = perta_file_create(&w->log, w->partial, true, err);
    if (rc)
        return rc; /* a file of that name is not ours */
    /* Reserve room for a batch now: if the disk is full, the files are still unchanged. */
    int full = posix_fallocate(w->log.fd, 0, (off_t)(BYTES_AT + w->room_bytes));
    if (full && full != EINVAL && full != EOPNOTSUPP) /* not supported by some file systems */
        rc = perta_fail_sys(err, full, "%s: no room for its %llu MiB", w->path,
                            (ull)((BYTES_AT + w->room_bytes) >> 20) + 1);
    if (!rc)
        rc = perta_pwrite_all(w->log.fd, w->buf, PERTA_BLOCK_BYTES, 0, w->path, err);
    if (!rc && fsync(w->log.fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", w->path);
    if (!rc && rename(w->partial, w->path))
        rc = perta_fail_sys(err, errno, "%s", w->path);
    if (!rc)
        rc = perta_name_sync(w->path, err);
    if (rc) {
        unlink(w->partial);
        unlink(w->path);
    }
    return rc;
}

/* ---- put ---- */

static struct perta_wal_extent *last_of(struct perta_wal *w)
{
    return w->n_extents ? &w->extents[w->n_extents - 1] : NULL;
}

/* Extend the last extent up to end with the bytes that the file has there. */
static int fill_to(struct perta_wal *w, struct perta_wal_extent *e, uint64_t end,
                   struct perta_err *err)
{
    uint64_t at = e->off_bytes + e->len_bytes;
    if (end <= at)
        return 0;
    int rc = perta_pread_all(w->plain[e->file], w->buf + TABLE_BYTES + w->used_bytes, end - at, at,
                             w->files[e->file].path, err);
    w->used_bytes += end - at;
    e->len_bytes += end - at;
    return rc;
}

/* Pad the last extent to a whole block, or to the end of its file. */
static int end_extent(struct perta_wal *w, struct perta_err *err)
{
    struct perta_wal_extent *e = last_of(w);
    if (!e)
        return 0;
    uint64_t end = perta_align_up(e->off_bytes + e->len_bytes, PERTA_BLOCK_BYTES);
    uint64_t whole = w->files[e->file].len_bytes;
    int rc = fill_to(w, e, end < whole ? end : whole, err);
    uint64_t used = perta_align_up(w->used_bytes, PERTA_BLOCK_BYTES);
    memset(w->buf + TABLE_BYTES + w->used_bytes, 0, used - w->used_bytes);
    w->used_bytes = used;
    return rc;
}

static int write_log(struct perta_wal *w, struct perta_err *err)
{
    struct batch batch = {.magic = MAGIC, .n_extents = w->n_extents, .len_bytes = w->used_bytes};
    uint64_t table_bytes = w->n_extents * sizeof *w->extents;
    batch.hash_table = perta_hash64(w->extents, table_bytes);
    struct perta_digest *digest = perta_digest_new(false);
    if (!digest)
        return perta_fail_sys(err, ENOMEM, "%s", w->path);
    perta_digest_update(digest, w->buf + TABLE_BYTES, w->used_bytes);
    perta_digest_xxh128(digest, batch.xxh128);
    perta_digest_free(digest);
    batch.hash = perta_hash64(&batch, offsetof(struct batch, hash));
    memset(w->buf, 0, TABLE_BYTES);
    memcpy(w->buf, &batch, sizeof batch);
    memcpy(w->buf + sizeof batch, w->extents, table_bytes);
    int rc = perta_pwrite_all(w->log.fd, w->buf, TABLE_BYTES + w->used_bytes, PERTA_BLOCK_BYTES,
                              w->path, err);
    return rc ? rc : sync_fd(w->log.fd, w->path, err);
}

static int flush(struct perta_wal *w, struct perta_err *err)
{
    int rc = end_extent(w, err);
    if (rc || !w->n_extents)
        return rc;
    rc = write_log(w, err);
    uint64_t at = TABLE_BYTES;
    for (uint32_t i = 0; i < w->n_extents && !rc; i++) {
        rc = write_extent(w, &w->extents[i], w->buf + at, err);
        at += perta_align_up(w->extents[i].len_bytes, PERTA_BLOCK_BYTES);
        w->written_bytes += w->extents[i].len_bytes;
    }
    if (!rc)
        rc = sync_files(w, w->extents, w->n_extents, err);
    w->n_extents = 0;
    w->used_bytes = 0;
    return rc;
}

/* Start a new extent at a block boundary, and copy what the file holds up to off_bytes. */
static int begin_extent(struct perta_wal *w, uint32_t file, uint64_t off_bytes,
                        struct perta_err *err)
{
    int rc = end_extent(w, err);
    if (rc)
        return rc;
    assert(w->extents && w->n_extents < EXTENTS_MAX);
    w->extents[w->n_extents++] = (struct perta_wal_extent){
        .file = file, .off_bytes = perta_align_down(off_bytes, PERTA_BLOCK_BYTES)};
    return fill_to(w, last_of(w), off_bytes, err);
}

int perta_wal_put(struct perta_wal *w, uint32_t file, uint64_t off_bytes, const void *data,
                  uint64_t len_bytes, struct perta_err *err)
{
    int rc = 0;
    if (w->n_extents == EXTENTS_MAX ||
        w->used_bytes + len_bytes + 3 * PERTA_BLOCK_BYTES > w->room_bytes)
        rc = flush(w, err);
    const struct perta_wal_extent *e = last_of(w);
    /* A put into the block where the last extent ends joins that extent, because blocks are written
     * whole. */
    bool joins = e && e->file == file &&
                 perta_align_down(off_bytes, PERTA_BLOCK_BYTES) <=
                     perta_align_down(e->off_bytes + e->len_bytes, PERTA_BLOCK_BYTES);
    if (!rc)
        rc = joins ? fill_to(w, last_of(w), off_bytes, err) : begin_extent(w, file, off_bytes, err);
    if (rc)
        return rc;
    memcpy(w->buf + TABLE_BYTES + w->used_bytes, data, len_bytes);
    w->used_bytes += len_bytes;
    last_of(w)->len_bytes += len_bytes;
    return 0;
}

/* ---- the end ---- */

int perta_wal_finish(struct perta_wal *w, struct perta_err *err)
{
    int rc = flush(w, err);
    if (!rc && unlink(w->path) && errno != ENOENT)
        rc = perta_fail_sys(err, errno, "%s", w->path);
    return rc ? rc : perta_name_sync(w->path, err);
}

void perta_wal_close(struct perta_wal *w)
{
    for (uint32_t i = 0; w->plain && i < w->n_files; i++)
        if (w->plain[i] >= 0)
            close(w->plain[i]);
    perta_file_close(&w->log);
    free(w->plain);
    free(w->extents);
    free(w->buf);
    free(w->path);
    free(w->partial);
    *w = (struct perta_wal){.log.fd = -1};
}

static char *path_in(const char *folder)
{
    char *path = NULL;
    return asprintf(&path, "%s/" PERTA_WAL_NAME, folder) < 0 ? NULL : path;
}

bool perta_wal_found(const char *folder)
{
    char *path = path_in(folder);
    bool found = path && !access(path, F_OK);
    free(path);
    return found;
}

int perta_wal_refuse(const char *folder, struct perta_err *err)
{
    struct head head;
    char *path = path_in(folder);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", folder);
    int fd = perta_open_any(path, O_RDONLY | O_NOFOLLOW), rc = 0;
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR)
        rc = perta_fail_sys(err, errno, "%s", path);
    if (fd >= 0) {
        rc = read_head(fd, path, &head, err);
        if (!rc)
            rc = perta_fail(err, PERTA_EINPUT,
                            "%s: an edit in place is under way here, or was interrupted: `perta "
                            "apply %s %s --in-place' completes it, revert instead of apply "
                            "reverts it",
                            folder, folder, shell_word(&head));
        close(fd);
    }
    free(path);
    return rc;
}
