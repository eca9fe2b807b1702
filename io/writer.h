/* writer.h - a new file, written from front to back through the engine: direct, in large
 * aligned blocks, the next filling while those before are on their way. */
#ifndef PERTA_IO_WRITER_H
#define PERTA_IO_WRITER_H

#include <stdint.h>

#include "io/engine.h"
#include "io/hash.h"

#define PERTA_WRITER_BUFS_MIN 2
#define PERTA_WRITER_BUFS_MAX 16
#define PERTA_WRITER_BUF_BYTES (2ull << 20)

/* Memory to write from, borrowed: n (MIN to MAX) buffers, block-aligned, one after another. */
struct perta_writer_bufs {
    uint8_t *base; /* (n, PERTA_WRITER_BUF_BYTES) */
    unsigned n;
};

struct perta_writer {
    struct perta_engine *engine;
    struct perta_file file;
    struct perta_digest *digest; /* of all that was appended, taken from the buffers */
    struct perta_writer_bufs bufs;
    struct perta_request requests[PERTA_WRITER_BUFS_MAX];
    bool busy[PERTA_WRITER_BUFS_MAX];
    uint64_t digested[PERTA_WRITER_BUFS_MAX]; /* the hasher's ticket for what is in the buffer */
    unsigned filling;
    uint64_t fill_bytes; /* in the buffer being filled */
    uint64_t off_bytes;  /* where that buffer goes */
    struct perta_request *failed;
    bool open;
};

/* Create path (must not exist), and of expected_bytes at once where that is known (else 0): writes
 * within a file's length go side by side, those that make it longer often in turn.
 * bufs is borrowed until the writer is closed. */
PERTA_API int perta_writer_open(struct perta_writer *writer, struct perta_engine *engine,
                                const char *path, uint64_t expected_bytes,
                                struct perta_writer_bufs bufs, struct perta_err *err);
PERTA_API int perta_writer_append(struct perta_writer *writer, const void *data, uint64_t len_bytes,
                                  struct perta_err *err);
/* Bytes appended so far. */
PERTA_API uint64_t perta_writer_tell(const struct perta_writer *writer);
/* What was appended is on disk; more can be appended. */
int perta_writer_sync(struct perta_writer *writer, struct perta_err *err);
/* Go on with a file that another process synced when digest was of all its bytes; what follows
 * them goes. The bytes are read again: PERTA_ECHECK if they are not those. digest is the
 * writer's from now on. */
int perta_writer_reopen(struct perta_writer *writer, struct perta_engine *engine, const char *path,
                        struct perta_digest *digest, struct perta_writer_bufs bufs,
                        struct perta_err *err);
/* Write the rest, cut to length, fsync, close; *hex (may be NULL) gets the digests. */
PERTA_API int perta_writer_close(struct perta_writer *writer, struct perta_digest_hex *hex,
                                 struct perta_err *err);
/* Give up: wait for what is in flight, close, leave the file. For writers closed or never
 * opened it does nothing. */
PERTA_API void perta_writer_abort(struct perta_writer *writer);

#endif
