/* memory.h - the budget of the process and the pool of buffers that it pays for. */
#ifndef PERTA_STREAM_MEMORY_H
#define PERTA_STREAM_MEMORY_H

#include <stdint.h>

#include "io/err.h"
#include "io/pool.h"

/* Resident now, after giving back what malloc keeps for later. */
uint64_t perta_memory_trimmed(void);
/* The same; or, where an earlier job left more than before_bytes (0: there was none) behind, what
 * with later_bytes, which a job counts for that, comes to as much. */
uint64_t perta_memory_before(uint64_t before_bytes, uint64_t later_bytes);

/* A budget is too small "for this job", or what it is; least_bytes would do by what is measured now.
 * The message names more: resident memory differs from run to run, and grows until it is measured
 * for the last time, by code that runs first then and by tables of outputs. What it names is
 * enough. Returns PERTA_EUSAGE. */
int perta_memory_refuse(uint64_t budget_bytes, uint64_t least_bytes, struct perta_err *err,
                        const char *what, ...) __attribute__((format(printf, 4, 5)));

#endif
