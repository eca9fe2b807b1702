#include "stream/blob.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/text.h"

json_t *perta_blob_json(const void *data, size_t n)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *bytes = data;
    char *text = malloc(2 * n + 1);
    if (!text)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    json_t *json = json_stringn(text, 2 * n);
    free(text);
    return json;
}

size_t perta_blob_bytes(const json_t *blob)
{
    return json_string_length(blob) / 2;
}

static int digit_of(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool perta_blob_get(const json_t *blob, void *data, size_t n)
{
    const char *text = json_string_value(blob);
    uint8_t *bytes = data;
    if (!text || json_string_length(blob) != 2 * n)
        return false;
    for (size_t i = 0; i < n; i++) {
        int high = digit_of(text[2 * i]), low = digit_of(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

json_t *perta_blob_of_digest(const struct perta_digest *digest)
{
    uint8_t state[PERTA_DIGEST_STATE_BYTES];
    perta_digest_save(digest, state);
    return perta_blob_json(state, sizeof state);
}

bool perta_blob_get_digest(const json_t *blob, struct perta_digest *digest)
{
    uint8_t state[PERTA_DIGEST_STATE_BYTES];
    return perta_blob_get(blob, state, sizeof state) && perta_digest_restore(digest, state);
}
