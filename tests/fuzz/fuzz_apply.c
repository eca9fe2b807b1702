/* A whole .perta file, applied to a model. The digests of head and table are corrected first,
 * because they would stop a fuzzer at once. Bytes that begin with P where a frame should be are a
 * payload and are put into a frame, because a fuzzer would hardly build one. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zstd.h>

#include "io/format/patch.h"
#include "io/hash.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHUNK (1u << 16)

static struct perta_codec *codec;
static uint8_t model[CHUNK], made[CHUNK], back[CHUNK], frame[2 * CHUNK];

static uint64_t get(const uint8_t *from, int bytes)
{
    uint64_t value = 0;
    memcpy(&value, from, (size_t)bytes);
    return value;
}

static void sign(uint8_t *data, size_t size)
{
    uint64_t digest, head = size >= 64 ? get(data + 4, 4) : 0;
    if (head >= 16 && head <= size - 8) {
        digest = perta_hash64(data + 8, head - 8);
        memcpy(data + head, &digest, 8);
    }
    uint64_t n = size >= 24 ? get(data + size - 24, 8) : 0;
    if (n && n <= (size - 24) / 48) {
        digest = perta_hash64(data + size - 24 - 48 * n, 48 * n);
        memcpy(data + size - 16, &digest, 8);
    }
}

static void apply_entry(const uint8_t *file, const struct perta_patch *patch,
                        const struct perta_patch_entry *e)
{
    struct perta_err err = {0};
    enum perta_dtype dtype = patch->after->tensors[e->tensor].dtype;
    size_t n = (size_t)e->n_units * perta_dtype_unit_bytes(dtype), frame_bytes = e->frame_bytes;
    size_t payload = e->payload_bytes;
    const uint8_t *from = file + e->frame_off;
    if (n > CHUNK)
        return;
    if (frame_bytes && *from == 'P' && frame_bytes <= CHUNK) {
        payload = frame_bytes - 1;
        frame_bytes = ZSTD_compress(frame, sizeof frame, from + 1, payload, 1);
        from = frame;
    }
    uint64_t n_changed;
    int rc = perta_codec_apply(codec, dtype, e->encoding, from, frame_bytes, payload, model, made,
                               n, &err);
    struct perta_err ignored = {0};
    int rc2 = perta_codec_count(codec, dtype, e->encoding, from, frame_bytes, payload, n,
                                &n_changed, &ignored);
    if ((rc && (rc != PERTA_ECHECK || !err.msg[0])) || (!rc && (rc2 || n_changed > e->n_units)))
        __builtin_trap();
    struct perta_err way_back = {0};
    if (!rc)
        perta_codec_revert(codec, dtype, e->encoding, from, frame_bytes, payload, made, back, n,
                           &way_back);
    /* If the payload does not depend on the values, reverting must give the model back. */
    if (!rc && e->encoding == PERTA_ENC_DELTA && !perta_codec_groups(dtype) &&
        (way_back.code || memcmp(back, model, n)))
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!codec) {
        codec = perta_codec_new(CHUNK);
        for (uint32_t i = 0; i < CHUNK; i++)
            model[i] = (uint8_t)(i * 37);
    }
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, data, size);
    sign(copy, size);
    int fd = memfd_create("patch", 0);
    if (fd < 0 || write(fd, copy, size) != (ssize_t)size)
        abort();
    struct perta_patch *patch;
    struct perta_err err = {0};
    int rc = perta_patch_read(fd, size, "f", NULL, &patch, &err);
    if (rc && ((rc != PERTA_ECHECK && rc != PERTA_EINPUT) || !err.msg[0]))
        __builtin_trap();
    for (uint64_t i = 0; !rc && i < patch->n_entries; i++)
        apply_entry(copy, patch, &patch->entries[i]);
    if (!rc)
        perta_patch_free(patch);
    free(copy);
    close(fd);
    return 0;
}
