/* Decoding a chunk. The input gives the dtype, the encoding, the claimed payload size and the
 * payload. The payload is put into a frame here, because a fuzzer would hardly build one; and once
 * it is used as the frame itself. */
#include "io/format/codec.h"

#include <stdlib.h>
#include <string.h>
#include <zstd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHUNK 4096

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct perta_codec *codec;
    static uint8_t before[CHUNK], after[CHUNK], frame[1 << 17];
    if (!codec) {
        codec = perta_codec_new(CHUNK);
        for (int i = 0; i < CHUNK; i++)
            before[i] = (uint8_t)(i * 37);
    }
    if (size < 4 || size > 1 << 16)
        return 0;
    enum perta_dtype dtype = (enum perta_dtype)(data[0] % PERTA_N_DTYPES);
    enum perta_encoding encoding = (enum perta_encoding)(data[1] % PERTA_N_ENCODINGS);
    size_t width = perta_dtype_unit_bytes(dtype), len = (data[2] * 16u) / width * width;
    const uint8_t *payload = data + 4;
    size_t n = size - 4;
    struct perta_err err = {0};
    size_t frame_bytes = ZSTD_compress(frame, sizeof frame, payload, n, 1);
    int rc =
        perta_codec_apply(codec, dtype, encoding, frame, frame_bytes, n, before, after, len, &err);
    err.code = 0;
    int rc2 = perta_codec_revert(codec, dtype, encoding, payload, n, len + data[3], before, after,
                                 len, &err);
    uint64_t n_changed;
    err.code = 0;
    int rc3 =
        perta_codec_count(codec, dtype, encoding, frame, frame_bytes, n, len, &n_changed, &err);
    if (rc3 && rc3 != rc) /* counting may succeed although the values do not fit */
        __builtin_trap();
    int wrong =
        encoding == PERTA_ENC_VALUES ? PERTA_EUSAGE : PERTA_ECHECK; /* these cannot be reverted */
    if ((rc && rc != PERTA_ECHECK) || (rc2 && rc2 != wrong))
        __builtin_trap();
    return 0;
}
