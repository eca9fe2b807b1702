/* codec.h - the exact difference of one chunk: from the bytes before and after to a zstd frame, and
 * back. Spec: docs/patch-format.md.
 *
 * Elements are mapped to integers in the order of the floats, subtracted modulo 2^bits, and
 * zigzagged. Apply adds, revert subtracts; both are exact for every bit pattern. Frames are
 * byte-identical on every CPU. Threads: one codec each. */
#ifndef PERTA_IO_FORMAT_CODEC_H
#define PERTA_IO_FORMAT_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/format/dtype.h"

#define PERTA_CHUNK_ELEMS (1u << 20)

enum perta_encoding {
    PERTA_ENC_ZERO = 0,   /* nothing changed: no frame */
    PERTA_ENC_DELTA = 1,  /* zigzagged deltas, grouped by exponent where that saves bytes */
    PERTA_ENC_VALUES = 2, /* which units changed, and their new values: cannot be reverted */
    PERTA_N_ENCODINGS,
};

struct perta_codec;

/* A codec for chunks of at most max_bytes. Its scratch memory, about five times that, becomes
 * resident as it is used. NULL only when out of memory. */
PERTA_API struct perta_codec *perta_codec_new(size_t max_bytes);
/* Upper bound of what such a codec has resident. */
PERTA_API uint64_t perta_codec_bytes(size_t max_bytes);
/* What a codec has allocated so far, resident or not; never above that bound. For tests. */
PERTA_API uint64_t perta_codec_taken(const struct perta_codec *codec);
PERTA_API void perta_codec_free(struct perta_codec *codec);

/* Upper bound of the frame's length for a chunk of n bytes. */
PERTA_API size_t perta_codec_bound(size_t n);

/* Upper bound of the payload's length (the decompressed frame) for a chunk of n bytes. */
PERTA_API size_t perta_codec_payload_max(size_t n);

/* Is it exactly one Zstandard frame whose header gives this payload length, or none? Only headers
 * are read. */
bool perta_codec_is_frame(const uint8_t *frame, size_t frame_bytes, size_t payload_bytes);

/* The result of encoding a chunk. */
struct perta_coded {
    enum perta_encoding encoding;
    uint32_t frame_bytes;   /* written to dst; 0 for PERTA_ENC_ZERO */
    uint32_t payload_bytes; /* what the frame decompresses to */
    uint64_t n_changed;     /* units whose bytes differ */
};

/* Encode the change from before to after (n_bytes each, a multiple of the dtype's unit) into dst,
 * which has room for at least perta_codec_bound(n_bytes). Never fails for lack of room. */
PERTA_API int perta_codec_encode(struct perta_codec *codec, enum perta_dtype dtype,
                                 const void *before, const void *after, size_t n_bytes,
                                 uint8_t *dst, size_t dst_capacity, struct perta_coded *coded,
                                 struct perta_err *err);

/* The same with PERTA_ENC_VALUES or PERTA_ENC_ZERO: the old values cannot be told from the frame.
 * *hash_kept: XXH3-64 of the bytes before, with units that change taken as 0. */
PERTA_API int perta_codec_encode_values(struct perta_codec *codec, enum perta_dtype dtype,
                                        const void *before, const void *after, size_t n_bytes,
                                        uint8_t *dst, size_t dst_capacity,
                                        struct perta_coded *coded, uint64_t *hash_kept,
                                        struct perta_err *err);
/* Apply such a frame: as perta_codec_apply, and *hash_kept as above, computed from before. */
PERTA_API int perta_codec_apply_values(struct perta_codec *codec, enum perta_dtype dtype,
                                       const uint8_t *frame, size_t frame_bytes,
                                       size_t payload_bytes, const void *before, void *after,
                                       size_t n_bytes, uint64_t *hash_kept, struct perta_err *err);

/* Compute the bytes after (n_bytes at after) from the bytes before and the frame. payload_bytes
 * comes from the patch's table. A damaged frame is PERTA_ECHECK; whatever it holds, nothing is read
 * or written out of bounds. before and after must not overlap. */
PERTA_API int perta_codec_apply(struct perta_codec *codec, enum perta_dtype dtype,
                                enum perta_encoding encoding, const uint8_t *frame,
                                size_t frame_bytes, size_t payload_bytes, const void *before,
                                void *after, size_t n_bytes, struct perta_err *err);

/* The inverse: compute the bytes before from the bytes after. PERTA_EUSAGE for PERTA_ENC_VALUES. */
PERTA_API int perta_codec_revert(struct perta_codec *codec, enum perta_dtype dtype,
                                 enum perta_encoding encoding, const uint8_t *frame,
                                 size_t frame_bytes, size_t payload_bytes, const void *after,
                                 void *before, size_t n_bytes, struct perta_err *err);

/* Count the units that a frame changes, from the frame alone. It is checked as perta_codec_apply
 * would, except for what depends on the bytes before (such as whether as many units really
 * change). */
PERTA_API int perta_codec_count(struct perta_codec *codec, enum perta_dtype dtype,
                                enum perta_encoding encoding, const uint8_t *frame,
                                size_t frame_bytes, size_t payload_bytes, size_t n_bytes,
                                uint64_t *n_changed, struct perta_err *err);

/* May units of this dtype be grouped? If not, a frame depends on the deltas alone, and any bytes
 * can stand in for those before. */
PERTA_API bool perta_codec_groups(enum perta_dtype dtype);

#endif
