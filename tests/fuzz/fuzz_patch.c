/* The patch container. Digests would stop a fuzzer at once, so they are corrected in the input
 * first. */
#include "io/format/patch.h"

#include <stdlib.h>
#include <string.h>

#include "io/hash.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void put64(uint8_t *to, uint64_t value)
{
    for (int i = 0; i < 8; i++)
        to[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get(const uint8_t *from, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)from[i] << (8 * i);
    return value;
}

static void sign(uint8_t *data, size_t size)
{
    uint64_t head = size >= 64 ? get(data + 4, 4) : 0;
    if (head >= 16 && head <= size - 8)
        put64(data + head, perta_hash64(data + 8, head - 8));
    uint64_t n = size >= 24 ? get(data + size - 24, 8) : 0;
    if (n && n <= (size - 24) / 48)
        put64(data + size - 16, perta_hash64(data + size - 24 - 48 * n, 48 * n));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, data, size);
    for (int signed_too = 0; signed_too < 2; signed_too++) {
        struct perta_patch *patch;
        struct perta_err err = {0};
        if (signed_too)
            sign(copy, size);
        int rc = perta_patch_parse(copy, size, "f", &patch, &err);
        if (!rc)
            perta_patch_free(patch);
        else if (rc != PERTA_ECHECK && rc != PERTA_EINPUT)
            __builtin_trap();
    }
    free(copy);
    return 0;
}
