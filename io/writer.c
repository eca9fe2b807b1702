#include "io/writer.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/hasher.h"

static void on_written(struct perta_request *request)
{
    struct perta_writer *writer = request->user;
    writer->busy[request - writer->requests] = false;
    if (request->sys_errno && !writer->failed)
        writer->failed = request;
}

int perta_writer_open(struct perta_writer *writer, struct perta_engine *engine, const char *path,
                      uint64_t expected_bytes, struct perta_writer_bufs bufs, struct perta_err *err)
{
    *writer = (struct perta_writer){.engine = engine, .bufs = bufs, .open = true};
    int rc = perta_file_create(&writer->file, path, true, err);
    if (rc)
        return rc;
    writer->digest = perta_digest_new(true);
    if (!writer->digest)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    perta_digest_offload(writer->digest, engine->hasher);
    if (expected_bytes && fallocate(writer->file.fd, 0, 0, (off_t)expected_bytes) &&
        errno == ENOSPC)
        return perta_fail_sys(err, ENOSPC, "%s: needs %llu bytes", path,
                              (unsigned long long)expected_bytes);
    return 0;
}

static uint8_t *buf_of(const struct perta_writer *writer, unsigned i)
{
    return writer->bufs.base + (uint64_t)i * PERTA_WRITER_BUF_BYTES;
}

static int wait_for(struct perta_writer *writer, unsigned i, struct perta_err *err)
{
    while (writer->busy[i]) {
        int rc = perta_engine_wait(writer->engine, err);
        if (rc)
            return rc;
    }
    return writer->failed ? perta_request_error(writer->failed, err) : 0;
}

/* Write the buffer that is being filled, as far as it is full; whole blocks with O_DIRECT. */
static void submit(struct perta_writer *writer, unsigned i)
{
    uint8_t *buf = buf_of(writer, i);
    uint64_t whole = perta_align_up(writer->fill_bytes, PERTA_BLOCK_BYTES);
    memset(buf + writer->fill_bytes, 0, whole - writer->fill_bytes);
    writer->requests[i] = (struct perta_request){
        .file = &writer->file,
        .write = true,
        .off_bytes = writer->off_bytes,
        .len_bytes = writer->file.direct ? whole : writer->fill_bytes,
        .buf = buf,
        .done = on_written,
        .user = writer,
    };
    writer->busy[i] = true;
    perta_engine_submit(writer->engine, &writer->requests[i]);
}

/* Write the buffer and move on to the next one. Only the last buffer of a file is not full. */
static int send(struct perta_writer *writer, struct perta_err *err)
{
    unsigned i = writer->filling;
    submit(writer, i);
    writer->digested[i] = perta_hasher_given(writer->engine->hasher);
    writer->off_bytes += writer->fill_bytes;
    writer->fill_bytes = 0;
    writer->filling = (i + 1) % writer->bufs.n;
    int rc = wait_for(writer, writer->filling, err);
    perta_hasher_wait(writer->engine->hasher, writer->digested[writer->filling]);
    return rc;
}

static int settle(struct perta_writer *writer, struct perta_err *err)
{
    int rc = 0;
    for (unsigned i = 0; !rc && i < writer->bufs.n; i++)
        rc = wait_for(writer, i, err);
    return rc;
}

/* A failed fsync is final: a second one may succeed although the data is lost. */
static int sync_file(const struct perta_writer *writer, struct perta_err *err)
{
    return fsync(writer->file.fd) ? perta_fail_sys(err, errno, "%s: fsync", writer->file.path) : 0;
}

int perta_writer_sync(struct perta_writer *writer, struct perta_err *err)
{
    if (writer->fill_bytes) /* it is filled further and written again */
        submit(writer, writer->filling);
    int rc = settle(writer, err);
    return rc ? rc : sync_file(writer, err);
}

/* Digest the bytes of the file, one buffer at a time. The last, partial one stays in the buffer. */
static int read_back(struct perta_writer *writer, const char *path, uint64_t len_bytes,
                     struct perta_digest *found, struct perta_err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return perta_fail_sys(err, errno, "%s", path);
    int rc = 0;
    for (uint64_t at = 0; at < len_bytes && !rc; at += PERTA_WRITER_BUF_BYTES) {
        uint64_t left = len_bytes - at;
        uint64_t n = left < PERTA_WRITER_BUF_BYTES ? left : PERTA_WRITER_BUF_BYTES;
        rc = perta_pread_all(fd, writer->bufs.base, n, at, path, err);
        perta_digest_update(found, writer->bufs.base, n);
        writer->fill_bytes = n == PERTA_WRITER_BUF_BYTES ? 0 : n;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    writer->off_bytes = len_bytes - writer->fill_bytes;
    return rc;
}

static int check_back(const struct perta_writer *writer, const struct perta_digest *found,
                      const char *path, struct perta_err *err)
{
    char have[PERTA_XXH128_HEX], want[PERTA_XXH128_HEX];
    perta_digest_xxh128(found, have);
    perta_digest_xxh128(writer->digest, want);
    if (perta_digest_bytes(found) == perta_digest_bytes(writer->digest) && !strcmp(have, want))
        return 0;
    return perta_fail(err, PERTA_ECHECK,
                      "%s: the first %llu bytes are not those that were synced (XXH3 %s, not %s); "
                      "is the disk sound? --force starts over",
                      path, (unsigned long long)perta_digest_bytes(writer->digest), have, want);
}

int perta_writer_reopen(struct perta_writer *writer, struct perta_engine *engine, const char *path,
                        struct perta_digest *digest, struct perta_writer_bufs bufs,
                        struct perta_err *err)
{
    *writer = (struct perta_writer){
        .engine = engine, .bufs = bufs, .open = true, .digest = digest, .file.fd = -1};
    perta_digest_offload(digest, engine->hasher);
    struct perta_digest *found = perta_digest_new(false);
    int rc = found ? perta_file_reopen(&writer->file, path, true, err)
                   : perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        rc = read_back(writer, path, perta_digest_bytes(digest), found, err);
    if (!rc)
        rc = check_back(writer, found, path, err);
    perta_digest_free(found);
    return rc;
}

int perta_writer_append(struct perta_writer *writer, const void *data, uint64_t len_bytes,
                        struct perta_err *err)
{
    const uint8_t *from = data;
    while (len_bytes) {
        uint64_t room = PERTA_WRITER_BUF_BYTES - writer->fill_bytes;
        uint64_t n = len_bytes < room ? len_bytes : room;
        uint8_t *buf = buf_of(writer, writer->filling);
        memcpy(buf + writer->fill_bytes, from, n);
        perta_digest_update(writer->digest, buf + writer->fill_bytes, n);
        writer->fill_bytes += n;
        from += n;
        len_bytes -= n;
        if (writer->fill_bytes == PERTA_WRITER_BUF_BYTES) {
            int rc = send(writer, err);
            if (rc)
                return rc;
        }
    }
    return 0;
}

uint64_t perta_writer_tell(const struct perta_writer *writer)
{
    return writer->off_bytes + writer->fill_bytes;
}

int perta_writer_close(struct perta_writer *writer, struct perta_digest_hex *hex,
                       struct perta_err *err)
{
    int rc = 0;
    uint64_t len_bytes = perta_writer_tell(writer);
    if (writer->fill_bytes)
        rc = send(writer, err);
    if (!rc)
        rc = settle(writer, err);
    if (rc)
        return rc;
    if (ftruncate(writer->file.fd, (off_t)len_bytes))
        return perta_fail_sys(err, errno, "%s", writer->file.path);
    rc = sync_file(writer, err);
    if (rc)
        return rc;
    struct perta_digest_hex sink;
    perta_digest_finish(writer->digest, hex ? hex : &sink);
    perta_writer_abort(writer);
    return 0;
}

void perta_writer_abort(struct perta_writer *writer)
{
    struct perta_err ignored = {0};
    if (!writer->open)
        return;
    for (unsigned i = 0; i < writer->bufs.n; i++)
        while (writer->busy[i]) /* the kernel may still read from the buffer */
            perta_engine_wait(writer->engine, &ignored);
    perta_file_close(&writer->file);
    perta_digest_free(writer->digest);
    writer->digest = NULL;
    writer->open = false;
}
