/* codec.h - one chunk's exact difference, from the bytes before and after to a zstd frame and
 * back. Spec: docs/patch-format.md.
 *
 * Elements are mapped to integers whose order is the order of the floats, subtracted modulo
 * 2^bits and zigzagged. apply adds, revert subtracts; both are exact for every bit pattern.
 * Same bytes out for every CPU. Threads: one codec each. */
#ifndef PERTA_IO_FORMAT_CODEC_H
#define PERTA_IO_FORMAT_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/format/dtype.h"

#define PERTA_CHUNK_ELEMS (1u << 20)

enum perta_encoding {
    PERTA_ENC_ZERO = 0,  /* nothing changed: no frame at all */
    PERTA_ENC_DELTA = 1, /* zigzagged deltas, grouped by exponent where that saves (see the spec) */
    PERTA_ENC_VALUES = 2, /* which units changed, and their new values: leads forward only */
    PERTA_N_ENCODINGS,
};

struct perta_codec;

/* A codec for chunks of at most max_bytes bytes; NULL without memory. Its scratch, about five
 * times that, becomes resident as it is used. */
PERTA_API struct perta_codec *perta_codec_new(size_t max_bytes);
/* The most bytes that such a codec ever has resident. */
PERTA_API uint64_t perta_codec_bytes(size_t max_bytes);
/* What a codec has taken so far, resident or not: never more than that. For tests. */
PERTA_API uint64_t perta_codec_taken(const struct perta_codec *codec);
PERTA_API void perta_codec_free(struct perta_codec *codec);

/* The most bytes that the frame of a chunk of n bytes can take. */
PERTA_API size_t perta_codec_bound(size_t n);

/* The most bytes that the frame of a chunk of n bytes can decompress to. */
PERTA_API size_t perta_codec_payload_max(size_t n);

/* Is that one Zstandard frame and no more (neither several nor of another format), which says that
 * it decompresses to so many bytes, or does not say to how many? Told from its headers. */
bool perta_codec_is_frame(const uint8_t *frame, size_t frame_bytes, size_t payload_bytes);

/* What encoding made of a chunk. */
struct perta_coded {
    enum perta_encoding encoding;
    uint32_t frame_bytes;   /* written to dst; 0 for PERTA_ENC_ZERO */
    uint32_t payload_bytes; /* what the frame decompresses to */
    uint64_t n_changed;     /* units whose bytes differ */
};

/* Encode the change from before to after (n_bytes each, a multiple of the dtype's unit) into
 * dst, which holds at least perta_codec_bound(n_bytes) bytes. Never fails for lack of room. */
PERTA_API int perta_codec_encode(struct perta_codec *codec, enum perta_dtype dtype,
                                 const void *before, const void *after, size_t n_bytes,
                                 uint8_t *dst, size_t dst_capacity, struct perta_coded *coded,
                                 struct perta_err *err);

/* The same as PERTA_ENC_VALUES, or PERTA_ENC_ZERO: nothing of what was before can be told from it.
 * *hash_kept: XXH3-64 of the bytes before, those of units that change taken as 0. */
PERTA_API int perta_codec_encode_values(struct perta_codec *codec, enum perta_dtype dtype,
                                        const void *before, const void *after, size_t n_bytes,
                                        uint8_t *dst, size_t dst_capacity,
                                        struct perta_coded *coded, uint64_t *hash_kept,
                                        struct perta_err *err);
/* Such a frame applied: as perta_codec_apply, and *hash_kept of what before was. */
PERTA_API int perta_codec_apply_values(struct perta_codec *codec, enum perta_dtype dtype,
                                       const uint8_t *frame, size_t frame_bytes,
                                       size_t payload_bytes, const void *before, void *after,
                                       size_t n_bytes, uint64_t *hash_kept, struct perta_err *err);

/* From the bytes before and the frame (frame_bytes at frame) to the bytes after, n_bytes at
 * after. payload_bytes is the table's. A damaged frame is PERTA_ECHECK; never reads or writes
 * out of bounds, whatever the frame holds. before and after may not overlap. */
PERTA_API int perta_codec_apply(struct perta_codec *codec, enum perta_dtype dtype,
                                enum perta_encoding encoding, const uint8_t *frame,
                                size_t frame_bytes, size_t payload_bytes, const void *before,
                                void *after, size_t n_bytes, struct perta_err *err);

/* The way back: from the bytes after to the bytes before. PERTA_EUSAGE for PERTA_ENC_VALUES. */
PERTA_API int perta_codec_revert(struct perta_codec *codec, enum perta_dtype dtype,
                                 enum perta_encoding encoding, const uint8_t *frame,
                                 size_t frame_bytes, size_t payload_bytes, const void *after,
                                 void *before, size_t n_bytes, struct perta_err *err);

/* How many units a frame changes, from the frame alone; checks it as perta_codec_apply would, but
 * for what depends on the bytes before (that as many change, too). */
PERTA_API int perta_codec_count(struct perta_codec *codec, enum perta_dtype dtype,
                                enum perta_encoding encoding, const uint8_t *frame,
                                size_t frame_bytes, size_t payload_bytes, size_t n_bytes,
                                uint64_t *n_changed, struct perta_err *err);

/* May units of this dtype be grouped? If not, a frame depends on nothing but the deltas, and any
 * bytes can stand for those before. */
PERTA_API bool perta_codec_groups(enum perta_dtype dtype);

#endif
