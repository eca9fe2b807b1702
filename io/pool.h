/* pool.h - large buffers straight from the kernel, in huge pages where it gives them. */
#ifndef PERTA_IO_POOL_H
#define PERTA_IO_POOL_H

#include <stdint.h>

#include "io/err.h"

/* One mapping of zeros. Nothing of it is resident until it is touched, and never more than
 * len_bytes, whatever the size of huge pages. */
struct perta_pool {
    uint8_t *base; /* on a page; on a huge page where it is as long as one */
    uint64_t len_bytes;
};

/* len_bytes are rounded up to whole pages. Give it back with perta_pool_give(). */
PERTA_API int perta_pool_take(struct perta_pool *pool, uint64_t len_bytes, struct perta_err *err);
/* NULL base: does nothing. */
PERTA_API void perta_pool_give(struct perta_pool *pool);

/* The system's, in bytes; huge: 0 where there are none. 4 KiB and 2 MiB on x86-64; up to 64 KiB and
 * 512 MiB elsewhere. */
PERTA_API uint64_t perta_page_bytes(void);
PERTA_API uint64_t perta_huge_page_bytes(void);
/* perta_pool_take where huge pages have that size, for tests. */
PERTA_API int perta_pool_take_for(struct perta_pool *pool, uint64_t len_bytes, uint64_t huge_bytes,
                                  struct perta_err *err);

#endif
