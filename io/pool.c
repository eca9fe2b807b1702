#include "io/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/checked.h"

uint64_t perta_page_bytes(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t huge_page_bytes;

static void read_size(void)
{
    char text[32] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
    uint64_t bytes = file && fgets(text, sizeof text, file) ? strtoull(text, NULL, 10) : 0;
    if (bytes && !(bytes & (bytes - 1)))
        huge_page_bytes = bytes;
    if (file)
        fclose(file);
}

uint64_t perta_huge_page_bytes(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_size);
    return huge_page_bytes;
}

/* Under the address sanitizer, the unused end of the last page is poisoned too. */
#if defined __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(base, len) ((void)(base), (void)(len))
#define ASAN_UNPOISON_MEMORY_REGION(base, len) ((void)(base), (void)(len))
#endif

static uint8_t *map_pages(uint64_t len_bytes)
{
    void *map = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return map == MAP_FAILED ? NULL : map;
}

/* Map more than needed and unmap both ends, so that the mapping starts on a huge page. NULL if
 * there is not that much address space. */
static uint8_t *map_aligned(uint64_t len_bytes, uint64_t align)
{
    uint64_t more = align - perta_page_bytes(), mapped;
    uint8_t *map = perta_add_overflows(len_bytes, more, &mapped) ? NULL : map_pages(mapped);
    if (!map)
        return NULL;
    uint64_t skip = perta_align_up((uintptr_t)map, align) - (uintptr_t)map;
    if (skip)
        munmap(map, skip);
    if (more - skip)
        munmap(map + skip + len_bytes, more - skip);
    return map + skip;
}

int perta_pool_take_for(struct perta_pool *pool, uint64_t len_bytes, uint64_t huge_bytes,
                        struct perta_err *err)
{
    uint64_t page = perta_page_bytes(), used_bytes = len_bytes;
    len_bytes = perta_align_up(len_bytes ? len_bytes : 1, page);
    uint8_t *base =
        huge_bytes > page && len_bytes >= huge_bytes ? map_aligned(len_bytes, huge_bytes) : NULL;
    if (!base)
        base = map_pages(len_bytes);
    if (!base)
        return perta_fail_sys(err, errno, "%llu MiB of buffers",
                              (unsigned long long)(len_bytes >> 20));
    /* Use huge pages, and at the end whatever smaller ones the kernel has. */
    madvise(base, len_bytes, MADV_HUGEPAGE);
    ASAN_POISON_MEMORY_REGION(base + used_bytes, len_bytes - used_bytes);
    *pool = (struct perta_pool){base, len_bytes};
    return 0;
}

int perta_pool_take(struct perta_pool *pool, uint64_t len_bytes, struct perta_err *err)
{
    return perta_pool_take_for(pool, len_bytes, perta_huge_page_bytes(), err);
}

void perta_pool_give(struct perta_pool *pool)
{
    if (pool->base) {
        ASAN_UNPOISON_MEMORY_REGION(pool->base, pool->len_bytes);
        munmap(pool->base, pool->len_bytes);
    }
    *pool = (struct perta_pool){0};
}
