/* memory.h - the memory budget of the process. */
#ifndef PERTA_STREAM_MEMORY_H
#define PERTA_STREAM_MEMORY_H

#include <stdint.h>

#include "io/err.h"
#include "io/pool.h"

/* Resident memory now, after malloc has returned what it can to the system. */
uint64_t perta_memory_trimmed(void);
/* The same, corrected for the second and later of several jobs with one budget. Code and caches
 * that an earlier job left beyond before_bytes (0: there was none) are what this job would count in
 * later_bytes, so up to later_bytes of them are not counted twice. */
uint64_t perta_memory_before(uint64_t before_bytes, uint64_t later_bytes);

/* Refuse a budget that is too small. what: "for this job", or the like. least_bytes would be enough
 * by what is resident now. The message asks for more, because resident memory differs from run to
 * run, and grows until it is measured for the last time (by code that then runs for the first time,
 * and by tables of outputs). The budget that it names is enough. Returns PERTA_EUSAGE. */
int perta_memory_refuse(uint64_t budget_bytes, uint64_t least_bytes, struct perta_err *err,
                        const char *what, ...) __attribute__((format(printf, 4, 5)));

#endif
