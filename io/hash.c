#include "io/hash.h"
#include "io/hasher.h"

/* The state is saved for a resumed run. EVP contexts cannot be saved; the older interface's can. */
#define OPENSSL_SUPPRESS_DEPRECATED
#define XXH_STATIC_LINKING_ONLY
#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/sha.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#ifdef __x86_64__
#include <xxh_x86dispatch.h> /* the same digests, computed with AVX2 or AVX-512 */
#endif

struct perta_digest {
    XXH3_state_t xxh;
    SHA256_CTX sha256;
    bool with_sha256;
    uint64_t len_bytes;
    struct perta_hasher *hasher; /* NULL: the caller's thread computes it */
    _Atomic uint64_t n_pending;  /* bytes that the hasher has not digested yet */
};

uint64_t perta_hash64(const void *data, size_t len_bytes)
{
    return XXH3_64bits(data, len_bytes);
}

struct perta_digest *perta_digest_new(bool with_sha256)
{
    struct perta_digest *digest = aligned_alloc(64, (sizeof *digest + 63) & ~(size_t)63);
    if (!digest)
        return NULL;
    memset(digest, 0, sizeof *digest);
    digest->with_sha256 = with_sha256;
    XXH3_128bits_reset(&digest->xxh);
    SHA256_Init(&digest->sha256);
    return digest;
}

/* Wait for the hasher. A closed one has digested everything. */
static void catch_up(const struct perta_digest *digest)
{
    if (atomic_load(&digest->n_pending))
        perta_hasher_wait(digest->hasher, perta_hasher_given(digest->hasher));
}

void perta_digest_offload(struct perta_digest *digest, struct perta_hasher *hasher)
{
    catch_up(digest);
    digest->hasher = hasher;
}

void perta_digest_free(struct perta_digest *digest)
{
    if (digest)
        catch_up(digest);
    free(digest);
}

static void add(struct perta_digest *digest, const void *data, size_t len_bytes)
{
    XXH3_128bits_update(&digest->xxh, data, len_bytes);
    if (digest->with_sha256)
        SHA256_Update(&digest->sha256, data, len_bytes);
}

void perta_digest_add(struct perta_digest *digest, const void *data, size_t len_bytes)
{
    add(digest, data, len_bytes);
    atomic_fetch_sub(&digest->n_pending, len_bytes);
}

void perta_digest_update(struct perta_digest *digest, const void *data, size_t len_bytes)
{
    if (!len_bytes)
        return;
    digest->len_bytes += len_bytes;
    if (!digest->hasher) {
        add(digest, data, len_bytes);
        return;
    }
    atomic_fetch_add(&digest->n_pending, len_bytes);
    perta_hasher_give(digest->hasher, digest, data, len_bytes);
}

void perta_digest_save(const struct perta_digest *digest, uint8_t state[PERTA_DIGEST_STATE_BYTES])
{
    catch_up(digest);
    struct perta_digest kept = *digest;
    kept.xxh.extSecret = NULL; /* addresses in this process */
    kept.hasher = NULL;
    _Static_assert(sizeof kept <= PERTA_DIGEST_STATE_BYTES, "room");
    memset(state, 0, PERTA_DIGEST_STATE_BYTES);
    memcpy(state, &kept, sizeof kept);
}

bool perta_digest_restore(struct perta_digest *digest,
                          const uint8_t state[PERTA_DIGEST_STATE_BYTES])
{
    struct perta_digest kept;
    XXH3_state_t fresh;
    uint8_t with_sha256; /* a byte, because not every byte value is a bool */
    catch_up(digest);
    memcpy(&kept, state, sizeof kept);
    memcpy(&with_sha256, state + offsetof(struct perta_digest, with_sha256), 1);
    XXH3_128bits_reset(&fresh);
    /* Check whatever the libraries use as an index or an address. */
    bool sound = kept.xxh.bufferedSize <= sizeof kept.xxh.buffer &&
                 kept.xxh.nbStripesSoFar <= fresh.nbStripesPerBlock &&
                 kept.xxh.nbStripesPerBlock == fresh.nbStripesPerBlock &&
                 kept.xxh.secretLimit == fresh.secretLimit && kept.xxh.seed == fresh.seed &&
                 kept.sha256.num < SHA256_CBLOCK && kept.sha256.md_len == SHA256_DIGEST_LENGTH &&
                 with_sha256 == digest->with_sha256;
    kept.xxh.extSecret = fresh.extSecret;
    kept.hasher = digest->hasher;
    kept.n_pending = 0;
    if (sound)
        *digest = kept;
    return sound;
}

uint64_t perta_digest_bytes(const struct perta_digest *digest)
{
    return digest->len_bytes;
}

void perta_digest_xxh128(const struct perta_digest *digest, char hex[PERTA_XXH128_HEX])
{
    catch_up(digest);
    XXH128_hash_t xxh = XXH3_128bits_digest(&digest->xxh);
    snprintf(hex, PERTA_XXH128_HEX, "%016llx%016llx", (unsigned long long)xxh.high64,
             (unsigned long long)xxh.low64);
}

void perta_digest_finish(struct perta_digest *digest, struct perta_digest_hex *hex)
{
    *hex = (struct perta_digest_hex){.len_bytes = digest->len_bytes};
    perta_digest_xxh128(digest, hex->xxh128);
    if (!digest->with_sha256)
        return;
    unsigned char sum[SHA256_DIGEST_LENGTH];
    SHA256_Final(sum, &digest->sha256);
    for (size_t i = 0; i < sizeof sum; i++)
        snprintf(hex->sha256 + 2 * i, 3, "%02x", sum[i]);
}

/* ---- keyed ---- */

static int read_key(const char *path, uint8_t *key, size_t *len_bytes, struct perta_err *err)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return perta_fail_sys(err, errno, "%s", path);
    *len_bytes = fread(key, 1, PERTA_KEY_BYTES_MAX + 1, file);
    int rc = ferror(file) ? perta_fail_sys(err, errno, "%s", path) : 0;
    fclose(file);
    if (!rc && (*len_bytes < PERTA_KEY_BYTES_MIN || *len_bytes > PERTA_KEY_BYTES_MAX))
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: a key has %d to %d bytes; `openssl rand -out %s 32' makes one", path,
                        PERTA_KEY_BYTES_MIN, PERTA_KEY_BYTES_MAX, path);
    return rc;
}

struct perta_hmac {
    EVP_MAC *algorithm;
    EVP_MAC_CTX *mac;
    bool failed;
};

int perta_hmac_new(const char *key_path, struct perta_hmac **out, struct perta_err *err)
{
    uint8_t key[PERTA_KEY_BYTES_MAX + 1];
    size_t key_bytes = 0;
    char name[] = "SHA256";
    const OSSL_PARAM params[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, name, 0),
                                 OSSL_PARAM_construct_end()};
    *out = NULL;
    int rc = read_key(key_path, key, &key_bytes, err);
    if (rc)
        return rc;
    struct perta_hmac *hmac = calloc(1, sizeof *hmac);
    if (hmac)
        hmac->algorithm = EVP_MAC_fetch(NULL, "HMAC", NULL);
    if (hmac && hmac->algorithm)
        hmac->mac = EVP_MAC_CTX_new(hmac->algorithm);
    bool ready = hmac && hmac->mac && EVP_MAC_init(hmac->mac, key, key_bytes, params);
    OPENSSL_cleanse(key, sizeof key);
    if (!ready) {
        perta_hmac_free(hmac);
        return perta_fail_sys(err, ENOMEM, "%s", key_path);
    }
    *out = hmac;
    return 0;
}

void perta_hmac_free(struct perta_hmac *hmac)
{
    if (!hmac)
        return;
    EVP_MAC_CTX_free(hmac->mac);
    EVP_MAC_free(hmac->algorithm);
    free(hmac);
}

void perta_hmac_update(struct perta_hmac *hmac, const void *data, size_t len_bytes)
{
    hmac->failed |= !EVP_MAC_update(hmac->mac, data, len_bytes);
}

int perta_hmac_finish(struct perta_hmac *hmac, char hex[PERTA_SHA256_HEX], struct perta_err *err)
{
    uint8_t sum[EVP_MAX_MD_SIZE];
    size_t len = 0;
    if (hmac->failed || !EVP_MAC_final(hmac->mac, sum, &len, sizeof sum))
        return perta_fail_sys(err, ENOMEM, "HMAC");
    for (size_t i = 0; i < len; i++)
        snprintf(hex + 2 * i, 3, "%02x", sum[i]);
    return 0;
}
