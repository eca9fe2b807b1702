/* hasher.h - threads that digest behind the owner's back: bytes of one digest in the order given,
 * different digests side by side. SHA-256 runs at 1 to 2 GB/s: on the thread that owns the ring it
 * would hold up reads and writes.
 * A digest is given to it with perta_digest_behind (io/hash.h). */
#ifndef PERTA_IO_HASHER_H
#define PERTA_IO_HASHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/hash.h"

struct perta_hasher;

#define PERTA_HASHER_THREADS_MAX 8

/* Start n_threads (more than MAX are not). passed(user), on one of them, says that what
 * perta_hasher_passed asked for has come; NULL: nobody asks. */
PERTA_API int perta_hasher_open(struct perta_hasher **out, unsigned n_threads,
                                void (*passed)(void *user), void *user, struct perta_err *err);
/* Digest all that was given, then stop. NULL is allowed. */
PERTA_API void perta_hasher_close(struct perta_hasher *hasher);

/* Give it bytes for a digest; data stays as it is until they have passed. They may be held until a
 * ticket is asked for, to be digested as one with more that follows them in memory. Waits where
 * many are given already. For io/hash.c. */
void perta_hasher_give(struct perta_hasher *hasher, struct perta_digest *digest, const void *data,
                       size_t len_bytes);
/* A ticket for all that was given so far. Without a hasher (NULL) everything has passed. */
PERTA_API uint64_t perta_hasher_given(struct perta_hasher *hasher);
/* Has it come that far? If not, passed() will be called when it has; a later question takes the
 * place of an earlier one. */
PERTA_API bool perta_hasher_passed(struct perta_hasher *hasher, uint64_t ticket);
/* Wait until it has. */
PERTA_API void perta_hasher_wait(struct perta_hasher *hasher, uint64_t ticket);

#endif
