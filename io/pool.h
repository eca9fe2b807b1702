/* pool.h - large buffers mapped from the kernel, in huge pages if it provides them. */
#ifndef PERTA_IO_POOL_H
#define PERTA_IO_POOL_H

#include <stdint.h>

#include "io/err.h"

/* One zeroed mapping. Its pages become resident when they are touched, never more than len_bytes,
 * whatever the size of huge pages. */
struct perta_pool {
    uint8_t *base; /* page-aligned; aligned to a huge page if it is as long as one */
    uint64_t len_bytes;
};

/* len_bytes is rounded up to whole pages. Release it with perta_pool_give(). */
PERTA_API int perta_pool_take(struct perta_pool *pool, uint64_t len_bytes, struct perta_err *err);
/* Does nothing if base is NULL. */
PERTA_API void perta_pool_give(struct perta_pool *pool);

/* The system's page sizes, in bytes: 4 KiB and 2 MiB on x86-64, up to 64 KiB and 512 MiB elsewhere.
 * perta_huge_page_bytes is 0 if there are no huge pages. */
PERTA_API uint64_t perta_page_bytes(void);
PERTA_API uint64_t perta_huge_page_bytes(void);
/* perta_pool_take for huge pages of huge_bytes, for tests. */
PERTA_API int perta_pool_take_for(struct perta_pool *pool, uint64_t len_bytes, uint64_t huge_bytes,
                                  struct perta_err *err);

#endif
