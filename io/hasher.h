/* hasher.h - threads that compute digests while their owner continues. The bytes of one digest are
 * taken in order, different digests in parallel. SHA-256 runs at 1 to 2 GB/s: on the thread that
 * owns the engine it would delay reads and writes. perta_digest_offload (io/hash.h) attaches a
 * digest to a hasher. */
#ifndef PERTA_IO_HASHER_H
#define PERTA_IO_HASHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/hash.h"

struct perta_hasher;

#define PERTA_HASHER_THREADS_MAX 8

/* Start n_threads threads, at most PERTA_HASHER_THREADS_MAX. passed(user) is called on one of them
 * when the ticket that perta_hasher_passed was last asked about has passed. NULL if that is never
 * asked. */
PERTA_API int perta_hasher_open(struct perta_hasher **out, unsigned n_threads,
                                void (*passed)(void *user), void *user, struct perta_err *err);
/* Digest everything that was given, then stop. NULL is allowed. */
PERTA_API void perta_hasher_close(struct perta_hasher *hasher);

/* Give it bytes for a digest. data must stay unchanged until they have passed. They may be held
 * back until the next ticket is taken, to be digested together with bytes that follow them in
 * memory. Waits while too many are queued. For io/hash.c. */
void perta_hasher_give(struct perta_hasher *hasher, struct perta_digest *digest, const void *data,
                       size_t len_bytes);
/* A ticket for everything given so far: it has passed once all of that is digested. With NULL as
 * the hasher, everything has passed. */
PERTA_API uint64_t perta_hasher_given(struct perta_hasher *hasher);
/* Has the ticket passed? If not, passed() is called when it has. Only the last question is answered
 * so. */
PERTA_API bool perta_hasher_passed(struct perta_hasher *hasher, uint64_t ticket);
/* Wait until the ticket has passed. */
PERTA_API void perta_hasher_wait(struct perta_hasher *hasher, uint64_t ticket);

#endif
