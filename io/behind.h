/* behind.h - write-behind: one thread writes to files at any offset while its caller continues.
 * Whole blocks are written with O_DIRECT, so they are not copied to the page cache and nobody waits
 * for them at the end; partial blocks at both ends go through the page cache. Only one thread may
 * call these functions. Ranges that are being written at the same time must not overlap. */
#ifndef PERTA_IO_BEHIND_H
#define PERTA_IO_BEHIND_H

#include "io/file.h"

/* Size of its buffer. */
#define PERTA_BEHIND_BYTES (16ull << 20)

struct perta_behind;

/* Start the thread. Close *out with perta_behind_close. */
PERTA_API int perta_behind_open(struct perta_behind **out, struct perta_err *err);
/* Queue a write of len_bytes at off_bytes. data is copied, so the caller may reuse it at once. fd
 * goes through the page cache; direct_fd is open with O_DIRECT on the same file, or -1. Both must
 * stay open, and name (the file or tensor, for messages) must live, until perta_behind_settle. Also
 * returns the error of an earlier write. */
PERTA_API int perta_behind_write(struct perta_behind *behind, int fd, int direct_fd,
                                 const void *data, uint64_t len_bytes, uint64_t off_bytes,
                                 const char *name, struct perta_err *err);
/* Wait until everything is written (not synced). Once a write has failed, every call returns that
 * error. */
PERTA_API int perta_behind_settle(struct perta_behind *behind, struct perta_err *err);
/* Wait for queued writes and stop the thread. NULL is allowed. */
PERTA_API void perta_behind_close(struct perta_behind *behind);

#endif
