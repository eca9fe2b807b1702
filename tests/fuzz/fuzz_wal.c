/* The journal of an edit in place. The input describes a batch's extents and bytes, whose digests
 * are corrected here; or, if its first byte is odd, it is everything after the head of the journal.
 * Whatever it says, files keep their sizes, and only bytes that a whole batch names are written. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/hash.h"
#include "io/wal.h"
#include "tests/fuzz/folder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* As in docs/resume.md; the room of the table ends at a block. */
struct batch {
    char magic[8];
    uint32_t n_extents, zero;
    uint64_t len_bytes, hash_table;
    char xxh128[40];
    uint64_t hash;
};

enum { N_FILES = 2, FILE_BYTES = 3 * 4096 + 100, LOG_BYTES = 1 << 18, BATCH_AT = 4096 };
static const char *const names[N_FILES] = {"a", "b"};
static const char id[PERTA_WAL_ID_BYTES + 1] =
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
static uint8_t head[4096];
static size_t bytes_at; /* offset of a batch's bytes in the log */

static void open_files(struct perta_file *files)
{
    struct perta_err err = {0};
    for (int i = 0; i < N_FILES; i++)
        if (perta_file_reopen(&files[i], names[i], false, &err))
            abort();
}

/* Make a log as perta does, and keep its head; its size shows where the bytes begin. */
static void enter(void)
{
    struct perta_err err = {0};
    struct perta_wal wal;
    struct perta_file files[N_FILES];
    struct stat st;
    make_folder();
    if (chdir(dir))
        abort();
    for (int i = 0; i < N_FILES; i++) {
        int fd = open(names[i], O_CREAT | O_RDWR, 0666);
        if (fd < 0 || ftruncate(fd, FILE_BYTES))
            abort();
        close(fd);
    }
    open_files(files);
    if (perta_wal_open(&wal, ".", id, files, N_FILES, 1, &err) ||
        perta_wal_begin(&wal, id, "patch", &err) || stat(PERTA_WAL_NAME, &st))
        abort();
    int log = open(PERTA_WAL_NAME, O_RDONLY);
    if (log < 0 || read(log, head, sizeof head) != sizeof head)
        abort();
    close(log);
    bytes_at = (size_t)st.st_size - wal.room_bytes;
    perta_wal_close(&wal);
    for (int i = 0; i < N_FILES; i++)
        perta_file_close(&files[i]);
}

/* Build a batch from the input: the number of extents, seven bytes for each, and then its bytes. */
static size_t build(const uint8_t *data, size_t size, uint8_t *log)
{
    struct batch batch = {.magic = "PERTAWAL"};
    uint32_t n = size ? data[0] % 16 : 0;
    struct perta_wal_extent *extents = (void *)(log + BATCH_AT + sizeof batch);
    if (size < 1 + 7 * (size_t)n)
        return BATCH_AT;
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *e = data + 1 + 7 * (size_t)i;
        extents[i] = (struct perta_wal_extent){
            .file = e[0], .off_bytes = e[1] * 4096u + e[2], .len_bytes = e[3] + 256u * e[4]};
        batch.len_bytes += (extents[i].len_bytes + 4095) / 4096 * 4096;
        if (e[5] & 1) /* digests that are wrong */
            batch.len_bytes += e[6];
        if (e[5] & 2)
            extents[i].off_bytes -= 4096u * e[6];
    }
    size_t rest = size - 1 - 7 * (size_t)n;
    size_t len = batch.len_bytes < LOG_BYTES - bytes_at ? batch.len_bytes : LOG_BYTES - bytes_at;
    memcpy(log + bytes_at, data + size - rest, rest < len ? rest : len);
    batch.n_extents = n;
    batch.hash_table = perta_hash64(extents, n * sizeof *extents);
    struct perta_digest *digest = perta_digest_new(false);
    perta_digest_update(digest, log + bytes_at, len);
    perta_digest_xxh128(digest, batch.xxh128);
    perta_digest_free(digest);
    batch.hash = perta_hash64(&batch, offsetof(struct batch, hash));
    memcpy(log + BATCH_AT, &batch, sizeof batch);
    return bytes_at + len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t log[LOG_BYTES];
    struct perta_wal wal;
    struct perta_file files[N_FILES];
    struct perta_err err = {0};
    struct stat st;
    if (!*dir)
        enter();
    if (size < 2 || size > 1 << 16)
        return 0;
    memset(log, 0, sizeof log);
    memcpy(log, head, sizeof head);
    size_t len = BATCH_AT + size - 1;
    if (data[0] & 1)
        memcpy(log + BATCH_AT, data + 1, size - 1);
    else
        len = build(data + 1, size - 1, log);
    FILE *file = fopen(PERTA_WAL_NAME, "w");
    if (!file || fwrite(log, 1, len, file) != len || fclose(file))
        abort();
    open_files(files);
    int rc = perta_wal_open(&wal, ".", id, files, N_FILES, 1, &err);
    if (rc && !*err.msg)
        __builtin_trap();
    perta_wal_close(&wal);
    for (int i = 0; i < N_FILES; i++) {
        if (fstat(files[i].fd, &st) || st.st_size != FILE_BYTES)
            __builtin_trap();
        perta_file_close(&files[i]);
    }
    return 0;
}
