/* hash.h - digests of files and chunks. XXH3 is for speed, SHA-256 for authenticity. */
#ifndef PERTA_IO_HASH_H
#define PERTA_IO_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

#define PERTA_XXH128_HEX 33 /* characters with the final NUL */
#define PERTA_SHA256_HEX 65

/* XXH3-64, seed 0. */
PERTA_API uint64_t perta_hash64(const void *data, size_t len_bytes);

/* Running digests of a stream of bytes. */
struct perta_digest;

/* with_sha256: XXH3-128 and SHA-256; else XXH3-128 alone. NULL without memory. */
PERTA_API struct perta_digest *perta_digest_new(bool with_sha256);
PERTA_API void perta_digest_free(struct perta_digest *digest);
PERTA_API void perta_digest_update(struct perta_digest *digest, const void *data, size_t len_bytes);
/* From now on have it done by hasher's thread (io/hasher.h; NULL: by the caller's): what
 * perta_digest_update is given must then stay as it is until it has passed there. All other
 * functions wait for what was given. */
struct perta_hasher;
PERTA_API void perta_digest_behind(struct perta_digest *digest, struct perta_hasher *hasher);
/* The work itself, for io/hasher.c. */
void perta_digest_add(struct perta_digest *digest, const void *data, size_t len_bytes);

/* The state of a digest, as bytes that a later process on the same machine, with the same
 * libraries, can go on from. restore keeps nothing of what digest held before; false: the bytes
 * are no such state. */
#define PERTA_DIGEST_STATE_BYTES 832
void perta_digest_save(const struct perta_digest *digest, uint8_t state[PERTA_DIGEST_STATE_BYTES]);
bool perta_digest_restore(struct perta_digest *digest,
                          const uint8_t state[PERTA_DIGEST_STATE_BYTES]);
/* How many bytes were added, and their XXH3-128; more can be added afterwards. */
uint64_t perta_digest_bytes(const struct perta_digest *digest);
void perta_digest_xxh128(const struct perta_digest *digest, char hex[PERTA_XXH128_HEX]);

/* A running HMAC-SHA-256; the key is the bytes of a file, PERTA_KEY_BYTES_MIN at least. A digest of
 * a short text without a key can be guessed. Errors name the key's file. */
#define PERTA_KEY_BYTES_MIN 16
#define PERTA_KEY_BYTES_MAX 4096
struct perta_hmac;
int perta_hmac_new(const char *key_path, struct perta_hmac **out, struct perta_err *err);
void perta_hmac_free(struct perta_hmac *hmac);
void perta_hmac_update(struct perta_hmac *hmac, const void *data, size_t len_bytes);
/* Of what was added. Ends it: it can only be freed afterwards. */
int perta_hmac_finish(struct perta_hmac *hmac, char hex[PERTA_SHA256_HEX], struct perta_err *err);

struct perta_digest_hex {
    uint64_t len_bytes;
    char xxh128[PERTA_XXH128_HEX]; /* canonical, as xxhsum -H2 prints it */
    char sha256[PERTA_SHA256_HEX]; /* empty where it was not asked for */
};
/* The digest of what was added. Ends the digest: it can only be freed afterwards. */
PERTA_API void perta_digest_finish(struct perta_digest *digest, struct perta_digest_hex *hex);

#endif
