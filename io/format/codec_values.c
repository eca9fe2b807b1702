/* A chunk as new values only, for one-way patches. Spec: docs/patch-format.md, "Values" */
#include "io/format/codec_payload.h"
#include "io/hash.h"

static size_t mask_bytes(size_t n)
{
    return (n + 7) / 8;
}

static bool is_set(const uint8_t *mask, size_t i)
{
    return mask[i / 8] >> (i % 8) & 1;
}

/* In planes, byte b of value k is values[b * n_changed + k]. */

uint64_t perta_values_write(struct perta_codec_scratch *s, enum perta_dtype dtype,
                            const uint8_t *before, const uint8_t *after, size_t n,
                            struct perta_sections *sections)
{
    size_t width = perta_dtype_unit_bytes(dtype);
    uint8_t *mask = s->payload, *values = s->grouped;
    uint64_t n_changed = 0, k = 0;
    memcpy(s->planes, before, n * width);
    memset(mask, 0, mask_bytes(n));
    for (size_t i = 0; i < n; i++)
        if (memcmp(before + i * width, after + i * width, width)) {
            mask[i / 8] |= (uint8_t)(1u << (i % 8));
            memset(s->planes + i * width, 0, width);
            n_changed++;
        }
    for (size_t i = 0; i < n; i++)
        if (is_set(mask, i)) {
            for (size_t b = 0; b < width; b++)
                values[b * n_changed + k] = after[i * width + b];
            k++;
        }
    *sections = (struct perta_sections){.all = {{mask, mask_bytes(n)}}, .n = 1 + (unsigned)width};
    for (size_t b = 0; b < width; b++)
        sections->all[1 + b] = (struct perta_section){values + b * n_changed, n_changed};
    sections->len_bytes = mask_bytes(n) + n_changed * width;
    return n_changed;
}

const char *perta_values_count(const struct perta_codec_scratch *s, enum perta_dtype dtype,
                               size_t payload_bytes, size_t n, uint64_t *n_changed)
{
    size_t width = perta_dtype_unit_bytes(dtype);
    *n_changed = 0;
    if (payload_bytes < mask_bytes(n))
        return "its mask is too short";
    for (size_t i = 0; i < mask_bytes(n); i++)
        *n_changed += (unsigned)__builtin_popcount(s->payload[i]);
    for (size_t i = n; i < 8 * mask_bytes(n); i++)
        if (is_set(s->payload, i))
            return "its mask has bits after the last unit";
    return payload_bytes == mask_bytes(n) + *n_changed * width ? NULL
                                                               : "its values do not fit its mask";
}

const char *perta_values_read(const struct perta_codec_scratch *s, enum perta_dtype dtype,
                              size_t payload_bytes, const uint8_t *before, uint8_t *after, size_t n,
                              uint64_t *hash_kept)
{
    size_t width = perta_dtype_unit_bytes(dtype);
    const uint8_t *mask = s->payload, *values = mask + mask_bytes(n);
    uint64_t n_changed, k = 0;
    const char *wrong = perta_values_count(s, dtype, payload_bytes, n, &n_changed);
    if (wrong)
        return wrong;
    memcpy(after, before, n * width);
    for (size_t i = 0; i < n; i++)
        if (is_set(mask, i))
            memset(after + i * width, 0, width);
    *hash_kept = perta_hash64(after, n * width);
    for (size_t i = 0; i < n; i++)
        if (is_set(mask, i)) {
            for (size_t b = 0; b < width; b++)
                after[i * width + b] = values[b * n_changed + k];
            k++;
        }
    return NULL;
}
