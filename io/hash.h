/* hash.h - digests of files and chunks. XXH3 finds damage, fast; SHA-256 also stands against
 * forgery. */
#ifndef PERTA_IO_HASH_H
#define PERTA_IO_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

#define PERTA_XXH128_HEX 33 /* characters, with the final NUL */
#define PERTA_SHA256_HEX 65

/* XXH3-64, seed 0. */
PERTA_API uint64_t perta_hash64(const void *data, size_t len_bytes);

/* Running digests of a stream of bytes. */
struct perta_digest;

/* with_sha256: XXH3-128 and SHA-256, else XXH3-128 alone. NULL only when out of memory. */
PERTA_API struct perta_digest *perta_digest_new(bool with_sha256);
PERTA_API void perta_digest_free(struct perta_digest *digest);
PERTA_API void perta_digest_update(struct perta_digest *digest, const void *data, size_t len_bytes);
/* From now on compute the digest on the threads of hasher (io/hasher.h; NULL: on the caller's).
 * Data given to perta_digest_update must then stay unchanged until it has been digested. All other
 * functions wait for that. */
struct perta_hasher;
PERTA_API void perta_digest_offload(struct perta_digest *digest, struct perta_hasher *hasher);
/* Add bytes at once, on this thread. For io/hasher.c. */
void perta_digest_add(struct perta_digest *digest, const void *data, size_t len_bytes);

/* The state of a running digest, as bytes from which a later process can continue, on the same
 * machine with the same libraries. restore replaces whatever digest held; false if the bytes are
 * not such a state. */
#define PERTA_DIGEST_STATE_BYTES 832
void perta_digest_save(const struct perta_digest *digest, uint8_t state[PERTA_DIGEST_STATE_BYTES]);
bool perta_digest_restore(struct perta_digest *digest,
                          const uint8_t state[PERTA_DIGEST_STATE_BYTES]);
/* How many bytes were added, and their XXH3-128. More can be added afterwards. */
uint64_t perta_digest_bytes(const struct perta_digest *digest);
void perta_digest_xxh128(const struct perta_digest *digest, char hex[PERTA_XXH128_HEX]);

/* A running HMAC-SHA-256. Its key is the content of a file of at least PERTA_KEY_BYTES_MIN bytes.
 * Without a key, whoever guesses a short text could confirm the guess by its digest. Errors name
 * the key file. */
#define PERTA_KEY_BYTES_MIN 16
#define PERTA_KEY_BYTES_MAX 4096
struct perta_hmac;
int perta_hmac_new(const char *key_path, struct perta_hmac **out, struct perta_err *err);
void perta_hmac_free(struct perta_hmac *hmac);
void perta_hmac_update(struct perta_hmac *hmac, const void *data, size_t len_bytes);
/* The HMAC of what was added. Afterwards it can only be freed. */
int perta_hmac_finish(struct perta_hmac *hmac, char hex[PERTA_SHA256_HEX], struct perta_err *err);

struct perta_digest_hex {
    uint64_t len_bytes;
    char xxh128[PERTA_XXH128_HEX]; /* canonical, as xxhsum -H2 prints it */
    char sha256[PERTA_SHA256_HEX]; /* empty if it was not asked for */
};
/* The digests of what was added. Afterwards digest can only be freed. */
PERTA_API void perta_digest_finish(struct perta_digest *digest, struct perta_digest_hex *hex);

#endif
