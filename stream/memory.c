/* What the process uses, and the pool that the rest of the budget goes into. */
#include "stream/memory.h"
#include "stream/stream.h"

#include <errno.h>
#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/checked.h"

#define HUGE_PAGE_BYTES (2ull << 20)
/* By how much resident memory may differ, from run to run and from plan to slots. */
#define VARIES_BYTES (8ull << 20)

uint64_t perta_memory_now(void)
{
    unsigned long long size, resident;
    FILE *statm = fopen("/proc/self/statm", "re");
    if (!statm)
        return 0;
    if (fscanf(statm, "%llu %llu", &size, &resident) != 2)
        resident = 0;
    fclose(statm);
    return (uint64_t)resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t perta_memory_trimmed(void)
{
    malloc_trim(0);
    return perta_memory_now();
}

int perta_memory_refuse(uint64_t budget_bytes, uint64_t least_bytes, struct perta_err *err,
                        const char *what, ...)
{
    char words[256];
    va_list args;
    va_start(args, what);
    vsnprintf(words, sizeof words, what, args);
    va_end(args);
    uint64_t enough = perta_align_up(least_bytes + VARIES_BYTES, 1 << 20);
    return perta_fail(err, PERTA_EUSAGE, "--memory %lluM is too small %s: it needs %lluM",
                      (unsigned long long)(budget_bytes >> 20), words,
                      (unsigned long long)(enough >> 20));
}

int perta_pool_take(struct perta_pool *pool, uint64_t len_bytes, struct perta_err *err)
{
    /* Over-map and cut, so that huge pages fit from the first byte on. */
    len_bytes = perta_align_up(len_bytes, HUGE_PAGE_BYTES);
    uint64_t mapped = len_bytes + HUGE_PAGE_BYTES;
    uint8_t *map = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return perta_fail_sys(err, errno, "%llu MiB of buffers",
                              (unsigned long long)(len_bytes >> 20));
    uint64_t skip = perta_align_up((uintptr_t)map, HUGE_PAGE_BYTES) - (uintptr_t)map;
    if (skip)
        munmap(map, skip);
    if (mapped - skip - len_bytes)
        munmap(map + skip + len_bytes, mapped - skip - len_bytes);
    pool->base = map + skip;
    pool->len_bytes = len_bytes;
    madvise(pool->base, len_bytes, MADV_HUGEPAGE);
    return 0;
}

void perta_pool_give(struct perta_pool *pool)
{
    if (pool->base)
        munmap(pool->base, pool->len_bytes);
    pool->base = NULL;
}
