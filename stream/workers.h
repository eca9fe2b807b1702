/* workers.h - a pool of threads that run the pieces of one job after another.
 *
 * A job here is n independent pieces of computation, numbered; they are not the pieces that
 * stream.h reads. They may run in any order and at the same time. The caller is worker 0 and takes
 * pieces too; the others are threads, started when there is a piece for them. What a piece computes
 * must not depend on the worker, so results do not depend on the number of workers. Threads: one
 * caller at a time. */
#ifndef PERTA_STREAM_WORKERS_H
#define PERTA_STREAM_WORKERS_H

#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

struct perta_workers;

/* A pool of n workers, at least 1, counting the caller. Close *out with perta_workers_close. */
PERTA_API int perta_workers_open(unsigned n, struct perta_workers **out, struct perta_err *err);
/* NULL is allowed. */
PERTA_API void perta_workers_close(struct perta_workers *workers);
PERTA_API unsigned perta_workers_count(const struct perta_workers *workers);
/* How many pieces a worker has taken so far. */
PERTA_API uint64_t perta_workers_taken(struct perta_workers *workers, unsigned worker);

/* Run piece i of a job, on a worker. */
typedef int perta_piece_fn(void *ctx, unsigned worker, size_t i, struct perta_err *err);
/* Run pieces 0 .. n - 1 and wait for all of them. After a failure no further piece is started; the
 * error is that of the lowest-numbered piece that failed. */
PERTA_API int perta_workers_run(struct perta_workers *workers, size_t n, perta_piece_fn *piece,
                                void *ctx, struct perta_err *err);

#endif
