/* How much memory the process uses, and the error for a budget that is too small. */
#include "stream/memory.h"
#include "stream/stream.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"

/* By how much resident memory may differ from run to run, and grow from the plan to the slots. */
#define VARIES_BYTES (8ull << 20)

uint64_t perta_memory_now(void)
{
    char text[128], *resident; /* the second number, after the size */
    FILE *statm = fopen("/proc/self/statm", "re");
    if (!statm)
        return 0;
    bool there = fgets(text, sizeof text, statm) && (resident = strchr(text, ' '));
    fclose(statm);
    return there ? strtoull(resident, NULL, 10) * perta_page_bytes() : 0;
}

uint64_t perta_memory_trimmed(void)
{
    malloc_trim(0);
    return perta_memory_now();
}

uint64_t perta_memory_before(uint64_t before_bytes, uint64_t later_bytes)
{
    uint64_t now = perta_memory_trimmed();
    if (!before_bytes || now < before_bytes)
        return now;
    return now - before_bytes < later_bytes ? before_bytes : now - later_bytes;
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
