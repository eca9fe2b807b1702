/* writer.h - a new file, written from front to back through the engine: with O_DIRECT, in large
 * aligned blocks. One buffer is filled while the ones before are being written. */
#ifndef PERTA_IO_WRITER_H
#define PERTA_IO_WRITER_H

#include <stdint.h>

#include "io/engine.h"
#include "io/hash.h"

#define PERTA_WRITER_BUFS_MIN 2
#define PERTA_WRITER_BUFS_MAX 16
#define PERTA_WRITER_BUF_BYTES (2ull << 20)

/* Buffers to write from, borrowed: n (MIN to MAX) of them, block-aligned, contiguous. */
struct perta_writer_bufs {
    uint8_t *base; /* (n, PERTA_WRITER_BUF_BYTES) */
    unsigned n;
};

struct perta_writer {
    struct perta_engine *engine;
    struct perta_file file;
    struct perta_digest *digest; /* of everything that was appended; reads the buffers */
    struct perta_writer_bufs bufs;
    struct perta_request requests[PERTA_WRITER_BUFS_MAX];
    bool busy[PERTA_WRITER_BUFS_MAX];
    uint64_t digested[PERTA_WRITER_BUFS_MAX]; /* the hasher's ticket for the buffer's content */
    unsigned filling;
    uint64_t fill_bytes; /* in the buffer that is being filled */
    uint64_t off_bytes;  /* that buffer's offset in the file */
    struct perta_request *failed;
    bool open;
};

/* Create path, which must not exist. If the final size is known, pass it as expected_bytes (else
 * 0): writes within a file's length run in parallel, while writes that extend it are often
 * serialised. bufs is borrowed until the writer is closed. */
PERTA_API int perta_writer_open(struct perta_writer *writer, struct perta_engine *engine,
                                const char *path, uint64_t expected_bytes,
                                struct perta_writer_bufs bufs, struct perta_err *err);
PERTA_API int perta_writer_append(struct perta_writer *writer, const void *data, uint64_t len_bytes,
                                  struct perta_err *err);
/* Bytes appended so far. */
PERTA_API uint64_t perta_writer_tell(const struct perta_writer *writer);
/* Bring everything that was appended to disk (fsync). More can be appended. */
int perta_writer_sync(struct perta_writer *writer, struct perta_err *err);
/* Continue a file that an earlier process synced when digest covered all its bytes. Bytes after
 * those are discarded. The file is read back: PERTA_ECHECK if its digest differs. digest belongs to
 * the writer from now on. */
int perta_writer_reopen(struct perta_writer *writer, struct perta_engine *engine, const char *path,
                        struct perta_digest *digest, struct perta_writer_bufs bufs,
                        struct perta_err *err);
/* Write the rest, truncate to length, fsync, close. *hex (may be NULL) gets the digests. */
PERTA_API int perta_writer_close(struct perta_writer *writer, struct perta_digest_hex *hex,
                                 struct perta_err *err);
/* Give up: wait for writes in flight and close; the file stays. Does nothing if the writer is
 * closed or was never opened. */
PERTA_API void perta_writer_abort(struct perta_writer *writer);

#endif
