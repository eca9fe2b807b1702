/* behind.h - writes at any place of files, done behind the caller's back by one thread: direct in
 * whole blocks, so that they cost no copy to the page cache and nobody waits for it at the end;
 * ragged ends through the page cache. The caller is one thread; ranges under way at the same time
 * must not overlap. */
#ifndef PERTA_IO_BEHIND_H
#define PERTA_IO_BEHIND_H

#include "io/file.h"

/* Memory that it takes. */
#define PERTA_BEHIND_BYTES (16ull << 20)

struct perta_behind;

/* Start it; *out is closed with perta_behind_close. */
PERTA_API int perta_behind_open(struct perta_behind **out, struct perta_err *err);
/* Write len_bytes at off_bytes. fd is open through the page cache, direct_fd with O_DIRECT on the
 * same file, or -1; both until perta_behind_settle. data is free again at once; name (of the
 * file or tensor, for messages) is borrowed until then. Fails too where an earlier write did. */
PERTA_API int perta_behind_write(struct perta_behind *behind, int fd, int direct_fd,
                                 const void *data, uint64_t len_bytes, uint64_t off_bytes,
                                 const char *name, struct perta_err *err);
/* Wait until all is written (not synced). The first failure stays. */
PERTA_API int perta_behind_settle(struct perta_behind *behind, struct perta_err *err);
/* Wait for what is under way and stop. NULL is allowed. */
PERTA_API void perta_behind_close(struct perta_behind *behind);

#endif
