#include "io/ahead.h"

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

/* Integers are the machine's own: a log is read where it was written. */
#define MAGIC "PERTAWAL"
#define VERSION 1u
#define EXTENTS_MAX 2048u
#define PIECE_BYTES (1ull << 20) /* read at a time when a batch is written again */

/* The first block, written once. */
struct head {
    char magic[8];
    uint32_t version, zero;
    char id[PERTA_AHEAD_ID_BYTES];
    char subject[PERTA_AHEAD_PATH_MAX];
    uint64_t hash; /* XXH3-64 of what stands before */
};
_Static_assert(sizeof(struct head) <= PERTA_BLOCK_BYTES, "the head is one block");

/* Then a batch: this, the table, up to a multiple of a block, and its bytes. */
struct batch {
    char magic[8];
    uint32_t n_extents, zero;
    uint64_t len_bytes;
    uint64_t hash_table; /* XXH3-64 */
    char xxh128[40];     /* of the bytes */
    uint64_t hash;       /* of what stands before */
};
#define TABLE_BYTES                                                                                \
    ((sizeof(struct batch) + EXTENTS_MAX * sizeof(struct perta_ahead_extent) + PERTA_BLOCK_BYTES - \
      1) /                                                                                         \
     PERTA_BLOCK_BYTES * PERTA_BLOCK_BYTES)
#define BYTES_AT (PERTA_BLOCK_BYTES + TABLE_BYTES)

/* ---- reading and writing ---- */

static int sync_fd(int fd, const char *path, struct perta_err *err)
{
    return fdatasync(fd) ? perta_fail_sys(err, errno, "%s: fsync", path) : 0;
}

/* One run of bytes of a file: whole blocks as the file is opened, what is left of its end through
 * the page cache. data is block-aligned. */
static int write_extent(struct perta_ahead *a, const struct perta_ahead_extent *e,
                        const uint8_t *data, struct perta_err *err)
{
    const struct perta_file *file = &a->files[e->file];
    uint64_t whole = perta_align_down(e->len_bytes, PERTA_BLOCK_BYTES);
    int rc = perta_pwrite_all(file->fd, data, whole, e->off_bytes, file->path, err);
    return rc ? rc
              : perta_pwrite_all(a->plain[e->file], data + whole, e->len_bytes - whole,
                                 e->off_bytes + whole, file->path, err);
}

/* After a failed fsync a second one may succeed with the data lost: the first is final. */
static int sync_files(struct perta_ahead *a, const struct perta_ahead_extent *extents, uint32_t n,
                      struct perta_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < n && !rc; i++)
        if (!i || extents[i].file != extents[i - 1].file)
            rc = sync_fd(a->plain[extents[i].file], a->files[extents[i].file].path, err);
    return rc;
}

/* ---- what is in a log ---- */

static bool head_is_sound(const struct head *head)
{
    return !memcmp(head->magic, MAGIC, sizeof head->magic) && head->version == VERSION &&
           head->hash == perta_hash64(head, offsetof(struct head, hash)) &&
           memchr(head->subject, 0, sizeof head->subject);
}

/* The subject as a word of a command that people paste into a shell; PATCH where it might be more. */
static const char *word_of(const struct head *head)
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
                        "%s: a damaged journal of an edit in place; the folder is to be verified "
                        "against its patch, or made again",
                        path);
    return rc;
}

/* Extents lie in the files, and their bytes are those of the batch. */
static bool table_is_sound(const struct perta_ahead *a, const struct batch *batch,
                           const struct perta_ahead_extent *extents)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < batch->n_extents; i++) {
        const struct perta_ahead_extent *e = &extents[i];
        uint64_t end;
        if (e->file >= a->n_files || e->off_bytes % PERTA_BLOCK_BYTES ||
            perta_add_overflows(e->off_bytes, e->len_bytes, &end) ||
            end > a->files[e->file].len_bytes)
            return false;
        sum += perta_align_up(e->len_bytes, PERTA_BLOCK_BYTES);
        if (sum > batch->len_bytes)
            return false;
    }
    return sum == batch->len_bytes;
}

/* Head and table of the batch in the log. *whole: they are. */
static int read_table(struct perta_ahead *a, int fd, struct batch *batch, bool *whole,
                      struct perta_err *err)
{
    int rc = perta_pread_all(fd, batch, sizeof *batch, PERTA_BLOCK_BYTES, a->path, err);
    *whole = !rc && !memcmp(batch->magic, MAGIC, sizeof batch->magic) &&
             batch->n_extents <= EXTENTS_MAX &&
             batch->hash == perta_hash64(batch, offsetof(struct batch, hash));
    if (!*whole)
        return rc;
    uint64_t table_bytes = batch->n_extents * sizeof *a->extents;
    rc = perta_pread_all(fd, a->extents, table_bytes, PERTA_BLOCK_BYTES + sizeof *batch, a->path,
                         err);
    *whole = !rc && batch->hash_table == perta_hash64(a->extents, table_bytes) &&
             table_is_sound(a, batch, a->extents);
    return rc;
}

/* Are its bytes there? */
static int check_bytes(struct perta_ahead *a, int fd, const struct batch *batch, bool *whole,
                       struct perta_err *err)
{
    struct perta_digest *digest = perta_digest_new(false);
    char xxh128[PERTA_XXH128_HEX] = "";
    int rc = digest ? 0 : perta_fail_sys(err, ENOMEM, "%s", a->path);
    for (uint64_t at = 0; !rc && at < batch->len_bytes; at += PIECE_BYTES) {
        uint64_t left = batch->len_bytes - at, n = left < PIECE_BYTES ? left : PIECE_BYTES;
        rc = perta_pread_all(fd, a->buf, n, BYTES_AT + at, a->path, err);
        if (!rc)
            perta_digest_update(digest, a->buf, n);
    }
    if (!rc)
        perta_digest_xxh128(digest, xxh128);
    perta_digest_free(digest);
    *whole = !rc && !strncmp(xxh128, batch->xxh128, sizeof xxh128);
    return rc;
}

/* The batch in the log, *whole if all of it is there: else nothing of it was written to the files.
 * What cannot be read may be there: an error, for the next batch would be written over it. */
static int read_batch(struct perta_ahead *a, int fd, struct batch *batch, bool *whole,
                      struct perta_err *err)
{
    struct perta_err why = {0};
    int rc = read_table(a, fd, batch, whole, &why);
    if (*whole)
        rc = check_bytes(a, fd, batch, whole, &why);
    if (rc != PERTA_ESYS)
        return 0; /* it ends too early */
    *err = why;
    return rc;
}

/* Write the batch of a log again: where it was written already, it is the same bytes. */
static int write_again(struct perta_ahead *a, int fd, struct perta_err *err)
{
    struct batch batch;
    bool whole;
    int rc = read_batch(a, fd, &batch, &whole, err);
    if (!whole)
        return rc;
    uint64_t at = BYTES_AT;
    for (uint32_t i = 0; i < batch.n_extents && !rc; i++) {
        const struct perta_ahead_extent *e = &a->extents[i];
        for (uint64_t done = 0; done < e->len_bytes && !rc; done += PIECE_BYTES) {
            uint64_t left = e->len_bytes - done, n = left < PIECE_BYTES ? left : PIECE_BYTES;
            struct perta_ahead_extent piece = {e->file, 0, e->off_bytes + done, n};
            rc = perta_pread_all(fd, a->buf, n, at + done, a->path, err);
            if (!rc)
                rc = write_extent(a, &piece, a->buf, err);
        }
        at += perta_align_up(e->len_bytes, PERTA_BLOCK_BYTES);
    }
    return rc ? rc : sync_files(a, a->extents, batch.n_extents, err);
}

/* ---- open ---- */

/* A log that a run was killed while it made: its head was not written, or it is. */
static int remove_partial(const struct perta_ahead *a, struct perta_err *err)
{
    static const char zeros[sizeof MAGIC - 1] = "";
    char start[sizeof zeros] = "";
    struct stat st;
    int fd = perta_open_any(a->partial, O_RDONLY | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", a->partial);
    int rc = perta_check_left(fd, a->partial, &st, err);
    if (!rc && st.st_size)
        rc = perta_pread_all(fd, start, sizeof start, 0, a->partial, err);
    close(fd);
    if (!rc && memcmp(start, zeros, sizeof zeros) && memcmp(start, MAGIC, sizeof start))
        rc = perta_fail(err, PERTA_EUSAGE, "%s: exists and is no journal of perta; move it away",
                        a->partial);
    if (!rc && unlink(a->partial))
        rc = perta_fail_sys(err, errno, "%s", a->partial);
    return rc;
}

static int go_on(struct perta_ahead *a, const char *id, struct perta_err *err)
{
    struct head head;
    struct stat st;
    int removed = remove_partial(a, err);
    if (removed)
        return removed;
    int fd = perta_open_any(a->path, O_RDONLY | O_NOFOLLOW);
    if (fd < 0)
        return errno == ENOENT ? 0 : perta_fail_sys(err, errno, "%s", a->path);
    int rc = perta_check_left(fd, a->path, &st, err);
    if (!rc)
        rc = read_head(fd, a->path, &head, err);
    if (!rc && memcmp(head.id, id, sizeof head.id))
        rc = perta_fail(err, PERTA_EUSAGE,
                        "%s: an edit by the patch %s was interrupted here; apply or revert that "
                        "one with --in-place first",
                        a->path, word_of(&head));
    if (!rc)
        rc = write_again(a, fd, err);
    close(fd);
    if (!rc)
        rc = perta_file_reopen(&a->log, a->path, true, err);
    a->going_on = !rc;
    return rc;
}

static int open_plain(struct perta_ahead *a, struct perta_err *err)
{
    for (uint32_t i = 0; i < a->n_files; i++) {
        a->plain[i] = open(a->files[i].path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
        if (a->plain[i] < 0)
            return perta_fail_sys(err, errno, "%s", a->files[i].path);
    }
    return 0;
}

int perta_ahead_open(struct perta_ahead *a, const char *folder, const char *id,
                     struct perta_file *files, uint32_t n_files, uint64_t room_bytes,
                     struct perta_err *err)
{
    *a = (struct perta_ahead){
        .log.fd = -1,
        .files = files,
        .n_files = n_files,
        .room_bytes =
            perta_align_up(room_bytes < PIECE_BYTES ? PIECE_BYTES : room_bytes, PERTA_BLOCK_BYTES),
        .plain = malloc((n_files + 1) * sizeof *a->plain),
        .extents = calloc(EXTENTS_MAX, sizeof *a->extents),
    };
    for (uint32_t i = 0; a->plain && i < n_files; i++)
        a->plain[i] = -1;
    uint64_t memory = TABLE_BYTES + a->room_bytes;
    if (!a->plain || !a->extents || asprintf(&a->path, "%s/" PERTA_AHEAD_NAME, folder) < 0 ||
        asprintf(&a->partial, "%s" PERTA_PARTIAL_SUFFIX, a->path) < 0 ||
        posix_memalign((void **)&a->buf, PERTA_BLOCK_BYTES, memory))
        return perta_fail_sys(err, ENOMEM, "%s", folder);
    memset(a->buf, 0, memory); /* resident from now on */
    int rc = open_plain(a, err);
    return rc ? rc : go_on(a, id, err);
}

int perta_ahead_begin(struct perta_ahead *a, const char *id, const char *subject,
                      struct perta_err *err)
{
    struct head head = {.magic = MAGIC, .version = VERSION};
    memcpy(head.id, id, sizeof head.id);
    strncpy(head.subject, subject, sizeof head.subject - 1);
    head.hash = perta_hash64(&head, offsetof(struct head, hash));
    memset(a->buf, 0, PERTA_BLOCK_BYTES);
    memcpy(a->buf, &head, sizeof head);
    int rc = perta_file_create(&a->log, a->partial, true, err);
    if (rc)
        return rc; /* what is there is not ours */
    /* Room for a batch now, not in the middle: a full disk then leaves the files as they are. */
    int full = posix_fallocate(a->log.fd, 0, (off_t)(BYTES_AT + a->room_bytes));
    if (full && full != EINVAL && full != EOPNOTSUPP) /* some file systems have no such call */
        rc = perta_fail_sys(err, full, "%s: no room for %llu MiB of it", a->path,
                            (ull)((BYTES_AT + a->room_bytes) >> 20) + 1);
    if (!rc)
        rc = perta_pwrite_all(a->log.fd, a->buf, PERTA_BLOCK_BYTES, 0, a->path, err);
    if (!rc && fsync(a->log.fd))
        rc = perta_fail_sys(err, errno, "%s: fsync", a->path);
    if (!rc && rename(a->partial, a->path))
        rc = perta_fail_sys(err, errno, "%s", a->path);
    if (!rc)
        rc = perta_name_sync(a->path, err);
    if (rc) {
        unlink(a->partial);
        unlink(a->path);
    }
    return rc;
}

/* ---- put ---- */

static struct perta_ahead_extent *last_of(struct perta_ahead *a)
{
    return a->n_extents ? &a->extents[a->n_extents - 1] : NULL;
}

/* Bytes of the file as they are, up to end. */
static int fill_to(struct perta_ahead *a, struct perta_ahead_extent *e, uint64_t end,
                   struct perta_err *err)
{
    uint64_t at = e->off_bytes + e->len_bytes;
    if (end <= at)
        return 0;
    int rc = perta_pread_all(a->plain[e->file], a->buf + TABLE_BYTES + a->used_bytes, end - at, at,
                             a->files[e->file].path, err);
    a->used_bytes += end - at;
    e->len_bytes += end - at;
    return rc;
}

/* The last extent ends with a whole block, or with its file. */
static int end_extent(struct perta_ahead *a, struct perta_err *err)
{
    struct perta_ahead_extent *e = last_of(a);
    if (!e)
        return 0;
    uint64_t end = perta_align_up(e->off_bytes + e->len_bytes, PERTA_BLOCK_BYTES);
    uint64_t whole = a->files[e->file].len_bytes;
    int rc = fill_to(a, e, end < whole ? end : whole, err);
    uint64_t used = perta_align_up(a->used_bytes, PERTA_BLOCK_BYTES);
    memset(a->buf + TABLE_BYTES + a->used_bytes, 0, used - a->used_bytes);
    a->used_bytes = used;
    return rc;
}

static int write_log(struct perta_ahead *a, struct perta_err *err)
{
    struct batch batch = {.magic = MAGIC, .n_extents = a->n_extents, .len_bytes = a->used_bytes};
    uint64_t table_bytes = a->n_extents * sizeof *a->extents;
    batch.hash_table = perta_hash64(a->extents, table_bytes);
    struct perta_digest *digest = perta_digest_new(false);
    if (!digest)
        return perta_fail_sys(err, ENOMEM, "%s", a->path);
    perta_digest_update(digest, a->buf + TABLE_BYTES, a->used_bytes);
    perta_digest_xxh128(digest, batch.xxh128);
    perta_digest_free(digest);
    batch.hash = perta_hash64(&batch, offsetof(struct batch, hash));
    memset(a->buf, 0, TABLE_BYTES);
    memcpy(a->buf, &batch, sizeof batch);
    memcpy(a->buf + sizeof batch, a->extents, table_bytes);
    int rc = perta_pwrite_all(a->log.fd, a->buf, TABLE_BYTES + a->used_bytes, PERTA_BLOCK_BYTES,
                              a->path, err);
    return rc ? rc : sync_fd(a->log.fd, a->path, err);
}

static int flush(struct perta_ahead *a, struct perta_err *err)
{
    int rc = end_extent(a, err);
    if (rc || !a->n_extents)
        return rc;
    rc = write_log(a, err);
    uint64_t at = TABLE_BYTES;
    for (uint32_t i = 0; i < a->n_extents && !rc; i++) {
        rc = write_extent(a, &a->extents[i], a->buf + at, err);
        at += perta_align_up(a->extents[i].len_bytes, PERTA_BLOCK_BYTES);
        a->written_bytes += a->extents[i].len_bytes;
    }
    if (!rc)
        rc = sync_files(a, a->extents, a->n_extents, err);
    a->n_extents = 0;
    a->used_bytes = 0;
    return rc;
}

/* Begin at the start of a block, with what the file holds up to off. */
static int begin_extent(struct perta_ahead *a, uint32_t file, uint64_t off_bytes,
                        struct perta_err *err)
{
    int rc = end_extent(a, err);
    if (rc)
        return rc;
    assert(a->extents && a->n_extents < EXTENTS_MAX);
    a->extents[a->n_extents++] = (struct perta_ahead_extent){
        .file = file, .off_bytes = perta_align_down(off_bytes, PERTA_BLOCK_BYTES)};
    return fill_to(a, last_of(a), off_bytes, err);
}

int perta_ahead_put(struct perta_ahead *a, uint32_t file, uint64_t off_bytes, const void *data,
                    uint64_t len_bytes, struct perta_err *err)
{
    int rc = 0;
    if (a->n_extents == EXTENTS_MAX ||
        a->used_bytes + len_bytes + 3 * PERTA_BLOCK_BYTES > a->room_bytes)
        rc = flush(a, err);
    const struct perta_ahead_extent *e = last_of(a);
    /* In a block that the last extent ends in: the same extent, for it is written whole. */
    bool goes_on = e && e->file == file &&
                   perta_align_down(off_bytes, PERTA_BLOCK_BYTES) <=
                       perta_align_down(e->off_bytes + e->len_bytes, PERTA_BLOCK_BYTES);
    if (!rc)
        rc = goes_on ? fill_to(a, last_of(a), off_bytes, err)
                     : begin_extent(a, file, off_bytes, err);
    if (rc)
        return rc;
    memcpy(a->buf + TABLE_BYTES + a->used_bytes, data, len_bytes);
    a->used_bytes += len_bytes;
    last_of(a)->len_bytes += len_bytes;
    return 0;
}

/* ---- the end ---- */

int perta_ahead_finish(struct perta_ahead *a, struct perta_err *err)
{
    int rc = flush(a, err);
    if (!rc && unlink(a->path) && errno != ENOENT)
        rc = perta_fail_sys(err, errno, "%s", a->path);
    return rc ? rc : perta_name_sync(a->path, err);
}

void perta_ahead_close(struct perta_ahead *a)
{
    for (uint32_t i = 0; a->plain && i < a->n_files; i++)
        if (a->plain[i] >= 0)
            close(a->plain[i]);
    perta_file_close(&a->log);
    free(a->plain);
    free(a->extents);
    free(a->buf);
    free(a->path);
    free(a->partial);
    *a = (struct perta_ahead){.log.fd = -1};
}

static char *path_in(const char *folder)
{
    char *path = NULL;
    return asprintf(&path, "%s/" PERTA_AHEAD_NAME, folder) < 0 ? NULL : path;
}

bool perta_ahead_found(const char *folder)
{
    char *path = path_in(folder);
    bool found = path && !access(path, F_OK);
    free(path);
    return found;
}

int perta_ahead_refuse(const char *folder, struct perta_err *err)
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
                            "apply %s %s --in-place' completes it, revert instead of apply takes "
                            "it back",
                            folder, folder, word_of(&head));
        close(fd);
    }
    free(path);
    return rc;
}
