#include "io/hash.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

struct perta_digest {
    XXH3_state_t *xxh;
    EVP_MD_CTX *sha256; /* NULL where not wanted */
    uint64_t len_bytes;
};

uint64_t perta_hash64(const void *data, size_t len_bytes)
{
    return XXH3_64bits(data, len_bytes);
}

struct perta_digest *perta_digest_new(bool with_sha256)
{
    struct perta_digest *digest = calloc(1, sizeof *digest);
    if (!digest)
        return NULL;
    digest->xxh = XXH3_createState();
    if (with_sha256)
        digest->sha256 = EVP_MD_CTX_new();
    if (!digest->xxh || XXH3_128bits_reset(digest->xxh) != XXH_OK ||
        (with_sha256 && (!digest->sha256 ||
                         EVP_DigestInit_ex(digest->sha256, EVP_sha256(), NULL) != 1))) {
        perta_digest_free(digest);
        return NULL;
    }
    return digest;
}

void perta_digest_free(struct perta_digest *digest)
{
    if (!digest)
        return;
    XXH3_freeState(digest->xxh);
    EVP_MD_CTX_free(digest->sha256);
    free(digest);
}

void perta_digest_update(struct perta_digest *digest, const void *data, size_t len_bytes)
{
    XXH3_128bits_update(digest->xxh, data, len_bytes);
    if (digest->sha256)
        EVP_DigestUpdate(digest->sha256, data, len_bytes);
    digest->len_bytes += len_bytes;
}

void perta_digest_finish(struct perta_digest *digest, struct perta_digest_hex *hex)
{
    *hex = (struct perta_digest_hex){.len_bytes = digest->len_bytes};
    XXH128_hash_t xxh = XXH3_128bits_digest(digest->xxh);
    snprintf(hex->xxh128, sizeof hex->xxh128, "%016llx%016llx", (unsigned long long)xxh.high64,
             (unsigned long long)xxh.low64);
    if (!digest->sha256)
        return;
    unsigned char sum[EVP_MAX_MD_SIZE];
    unsigned len = 0;
    EVP_DigestFinal_ex(digest->sha256, sum, &len);
    for (unsigned i = 0; i < len && i < 32; i++)
        snprintf(hex->sha256 + 2 * i, 3, "%02x", sum[i]);
}
