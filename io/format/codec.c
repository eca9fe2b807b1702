#include "io/format/codec.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "io/checked.h"
#include "io/format/codec_payload.h"
#include "io/hash.h"
#include "io/isa.h"
#include "io/pool.h"

/* What zstd allocates to pack and unpack a frame: 1.0 MiB in version 1.5.4. */
#define ZSTD_BYTES (5u << 18)
/* Sections of the payload that are this long get their own Huffman tables. */
#define OWN_TABLES_BYTES 2048

struct perta_codec {
    struct perta_codec_scratch scratch;
    struct perta_pool arena; /* the scratch is in it */
    ZSTD_CCtx *pack;
    ZSTD_DCtx *unpack;
};

/* ---- sizes ---- */

size_t perta_codec_payload_max(size_t n)
{
    return n + n / 8 + 512; /* the case where all bytes change: values, and a bit for each */
}

/* 512: headers of the zstd blocks that end with a section. */
size_t perta_codec_bound(size_t n)
{
    return ZSTD_COMPRESSBOUND(perta_codec_payload_max(n)) + 512;
}

/* ---- zstd ---- */

/* Use zstd as a fast Huffman coder: only entropy coding is left to do. */
static bool set_up(ZSTD_CCtx *pack)
{
    static const struct {
        ZSTD_cParameter name;
        int value;
    } parameters[] = {
        {ZSTD_c_compressionLevel, -5},  {ZSTD_c_strategy, ZSTD_fast},
        {ZSTD_c_windowLog, 17},         {ZSTD_c_hashLog, 6},
        {ZSTD_c_minMatch, 7},           {ZSTD_c_targetLength, 1 << 17},
        {ZSTD_c_experimentalParam5, 1}, /* always compress literals */
        {ZSTD_c_checksumFlag, 1},       {ZSTD_c_contentSizeFlag, 1},
    };
    for (size_t i = 0; i < sizeof parameters / sizeof *parameters; i++)
        if (ZSTD_isError(ZSTD_CCtx_setParameter(pack, parameters[i].name, parameters[i].value)))
            return false;
    return true;
}

/* Compress all sections into one frame. A zstd block ends after each section that deserves its own
 * Huffman tables. */
static size_t pack(ZSTD_CCtx *pack, const struct perta_sections *sections, uint8_t *dst,
                   size_t dst_capacity)
{
    ZSTD_outBuffer out = {dst, dst_capacity, 0};
    size_t rc = ZSTD_CCtx_reset(pack, ZSTD_reset_session_only), pending = 0;
    if (!ZSTD_isError(rc))
        rc = ZSTD_CCtx_setPledgedSrcSize(pack, sections->len_bytes);
    for (unsigned i = 0; i < sections->n && !ZSTD_isError(rc); i++) {
        ZSTD_inBuffer in = {sections->all[i].bytes, sections->all[i].len_bytes, 0};
        pending += in.size;
        bool last = i + 1 == sections->n;
        bool own = last || (pending >= OWN_TABLES_BYTES &&
                            sections->all[i + 1].len_bytes >= OWN_TABLES_BYTES);
        rc = ZSTD_compressStream2(pack, &out, &in,
                                  last  ? ZSTD_e_end
                                  : own ? ZSTD_e_flush
                                        : ZSTD_e_continue);
        pending = own ? 0 : pending;
        if (!ZSTD_isError(rc) && (in.pos < in.size || (own && rc)))
            return 0; /* dst is too small */
    }
    return ZSTD_isError(rc) ? 0 : out.pos;
}

/* ---- making a codec ---- */

static const struct perta_codec_kernels *kernels_of(enum perta_isa isa)
{
    static const struct perta_codec_kernels *const all[PERTA_N_ISAS] = {
        &perta_codec_kernels_v2, &perta_codec_kernels_v3, &perta_codec_kernels_v4};
    bool vbmi2 = isa == PERTA_ISA_V4 && __builtin_cpu_supports("avx512vbmi2");
    return vbmi2 ? &perta_codec_kernels_vbmi2 : all[isa];
}

/* Take the next len_bytes of an arena; with arena NULL only add up the size. */
static uint8_t *carve(uint8_t *arena, size_t *at, size_t len_bytes)
{
    uint8_t *bytes = arena ? arena + *at : NULL;
    *at += (len_bytes + PERTA_KERNEL_SLACK + 63) / 64 * 64;
    return bytes;
}

static size_t lay_out(struct perta_codec_scratch *s, uint8_t *arena)
{
    size_t at = 0, n = s->max_bytes;
    s->planes = carve(arena, &at, n);
    s->grouped = carve(arena, &at, perta_grouped_room(n));
    s->keys = carve(arena, &at, n / 2);
    s->spare = carve(arena, &at, n);
    s->payload = carve(arena, &at, perta_codec_payload_max(n));
    s->counts = (uint32_t (*)[PERTA_WINDOW][256])(void *)carve(arena, &at, 2 * sizeof *s->counts);
    return at + PERTA_TILE + 64; /* readers may run past an end by up to a tile */
}

uint64_t perta_codec_bytes(size_t max_bytes)
{
    struct perta_codec_scratch s = {.max_bytes = max_bytes};
    return perta_align_up(lay_out(&s, NULL), perta_page_bytes()) + ZSTD_BYTES;
}

uint64_t perta_codec_taken(const struct perta_codec *codec)
{
    return codec->arena.len_bytes + ZSTD_sizeof_CCtx(codec->pack) +
           ZSTD_sizeof_DCtx(codec->unpack) + sizeof *codec;
}

struct perta_codec *perta_codec_new(size_t max_bytes)
{
    struct perta_err ignored = {0};
    struct perta_codec *codec = calloc(1, sizeof *codec);
    if (!codec)
        return NULL;
    codec->scratch.kernels = kernels_of(perta_isa_chosen());
    codec->scratch.max_bytes = max_bytes;
    codec->pack = ZSTD_createCCtx();
    codec->unpack = ZSTD_createDCtx();
    if (!codec->pack || !codec->unpack || !set_up(codec->pack) ||
        perta_pool_take(&codec->arena, lay_out(&codec->scratch, NULL), &ignored)) {
        perta_codec_free(codec);
        return NULL;
    }
    lay_out(&codec->scratch, codec->arena.base);
    return codec;
}

void perta_codec_free(struct perta_codec *codec)
{
    if (!codec)
        return;
    ZSTD_freeCCtx(codec->pack);
    ZSTD_freeDCtx(codec->unpack);
    perta_pool_give(&codec->arena);
    free(codec);
}

bool perta_codec_groups(enum perta_dtype dtype)
{
    return perta_codec_exponent(dtype).e_bits != 0;
}

/* ---- encode ---- */

/* Make a frame of the sections, if any unit changes (coded->n_changed). */
static int frame_of(struct perta_codec *codec, const struct perta_sections *sections,
                    enum perta_encoding encoding, size_t n_bytes, uint8_t *dst, size_t dst_capacity,
                    struct perta_coded *coded, struct perta_err *err)
{
    if (!coded->n_changed)
        return 0;
    size_t len_bytes = pack(codec->pack, sections, dst, dst_capacity);
    if (!len_bytes)
        return perta_fail_sys(err, ENOBUFS, "encoding a chunk of %zu bytes into %zu", n_bytes,
                              dst_capacity);
    coded->encoding = encoding;
    coded->frame_bytes = (uint32_t)len_bytes;
    coded->payload_bytes = (uint32_t)sections->len_bytes;
    return 0;
}

int perta_codec_encode(struct perta_codec *codec, enum perta_dtype dtype, const void *before,
                       const void *after, size_t n_bytes, uint8_t *dst, size_t dst_capacity,
                       struct perta_coded *coded, struct perta_err *err)
{
    struct perta_sections sections;
    size_t n = n_bytes / perta_dtype_unit_bytes(dtype);
    *coded = (struct perta_coded){.encoding = PERTA_ENC_ZERO};
    coded->n_changed = perta_payload_write(&codec->scratch, dtype, before, after, n, &sections);
    return frame_of(codec, &sections, PERTA_ENC_DELTA, n_bytes, dst, dst_capacity, coded, err);
}

int perta_codec_encode_values(struct perta_codec *codec, enum perta_dtype dtype, const void *before,
                              const void *after, size_t n_bytes, uint8_t *dst, size_t dst_capacity,
                              struct perta_coded *coded, uint64_t *hash_kept, struct perta_err *err)
{
    struct perta_sections sections;
    size_t n = n_bytes / perta_dtype_unit_bytes(dtype);
    *coded = (struct perta_coded){.encoding = PERTA_ENC_ZERO};
    coded->n_changed = perta_values_write(&codec->scratch, dtype, before, after, n, &sections);
    *hash_kept = perta_hash64(codec->scratch.planes, n_bytes);
    return frame_of(codec, &sections, PERTA_ENC_VALUES, n_bytes, dst, dst_capacity, coded, err);
}

/* ---- decode ---- */

static int damaged(struct perta_err *err, const char *what)
{
    return perta_fail(err, PERTA_ECHECK, "the frame is damaged: %s", what);
}

bool perta_codec_is_frame(const uint8_t *frame, size_t frame_bytes, size_t payload_bytes)
{
    static const uint8_t magic[] = {0x28, 0xb5, 0x2f, 0xfd};
    if (frame_bytes < sizeof magic || memcmp(frame, magic, sizeof magic))
        return false;
    unsigned long long says = ZSTD_getFrameContentSize(frame, frame_bytes);
    return (says == payload_bytes || says == ZSTD_CONTENTSIZE_UNKNOWN) &&
           ZSTD_findFrameCompressedSize(frame, frame_bytes) == frame_bytes;
}

static int unpack(struct perta_codec *codec, const uint8_t *frame, size_t frame_bytes,
                  size_t payload_bytes, size_t n_bytes, struct perta_err *err)
{
    struct perta_codec_scratch *s = &codec->scratch;
    if (n_bytes > s->max_bytes || payload_bytes > perta_codec_payload_max(n_bytes))
        return damaged(err, "it is too large");
    if (!perta_codec_is_frame(frame, frame_bytes, payload_bytes))
        return damaged(err, "it is not one frame of the payload's length");
    size_t n = ZSTD_decompressDCtx(codec->unpack, s->payload, payload_bytes, frame, frame_bytes);
    if (ZSTD_isError(n))
        return damaged(err, ZSTD_getErrorName(n));
    if (n != payload_bytes)
        return damaged(err, "it is too short");
    return 0;
}

static int read_payload(struct perta_codec *codec, enum perta_dtype dtype, const uint8_t *frame,
                        size_t frame_bytes, size_t payload_bytes, size_t n_bytes,
                        struct perta_layout *layout, struct perta_err *err)
{
    int rc = unpack(codec, frame, frame_bytes, payload_bytes, n_bytes, err);
    if (rc)
        return rc;
    const char *wrong = perta_payload_read(&codec->scratch, dtype, payload_bytes,
                                           n_bytes / perta_dtype_unit_bytes(dtype), layout);
    return wrong ? damaged(err, wrong) : 0;
}

static int move(struct perta_codec *codec, enum perta_dtype dtype, enum perta_encoding encoding,
                const uint8_t *frame, size_t frame_bytes, size_t payload_bytes, const void *from,
                bool minus, void *to, size_t n_bytes, struct perta_err *err)
{
    if (encoding == PERTA_ENC_ZERO) {
        memcpy(to, from, n_bytes);
        return 0;
    }
    struct perta_layout layout;
    int rc = read_payload(codec, dtype, frame, frame_bytes, payload_bytes, n_bytes, &layout, err);
    if (rc)
        return rc;
    const char *wrong = perta_payload_move(&codec->scratch, dtype, &layout, from, minus, to,
                                           n_bytes / layout.width);
    return wrong ? damaged(err, wrong) : 0;
}

int perta_codec_apply_values(struct perta_codec *codec, enum perta_dtype dtype,
                             const uint8_t *frame, size_t frame_bytes, size_t payload_bytes,
                             const void *before, void *after, size_t n_bytes, uint64_t *hash_kept,
                             struct perta_err *err)
{
    int rc = unpack(codec, frame, frame_bytes, payload_bytes, n_bytes, err);
    if (rc)
        return rc;
    const char *wrong = perta_values_read(&codec->scratch, dtype, payload_bytes, before, after,
                                          n_bytes / perta_dtype_unit_bytes(dtype), hash_kept);
    return wrong ? damaged(err, wrong) : 0;
}

int perta_codec_apply(struct perta_codec *codec, enum perta_dtype dtype,
                      enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                      size_t payload_bytes, const void *before, void *after, size_t n_bytes,
                      struct perta_err *err)
{
    uint64_t ignored;
    if (encoding == PERTA_ENC_VALUES)
        return perta_codec_apply_values(codec, dtype, frame, frame_bytes, payload_bytes, before,
                                        after, n_bytes, &ignored, err);
    return move(codec, dtype, encoding, frame, frame_bytes, payload_bytes, before, false, after,
                n_bytes, err);
}

int perta_codec_revert(struct perta_codec *codec, enum perta_dtype dtype,
                       enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                       size_t payload_bytes, const void *after, void *before, size_t n_bytes,
                       struct perta_err *err)
{
    if (encoding == PERTA_ENC_VALUES)
        return perta_fail(err, PERTA_EUSAGE, "one-way: it does not hold the old values");
    return move(codec, dtype, encoding, frame, frame_bytes, payload_bytes, after, true, before,
                n_bytes, err);
}

int perta_codec_count(struct perta_codec *codec, enum perta_dtype dtype,
                      enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                      size_t payload_bytes, size_t n_bytes, uint64_t *n_changed,
                      struct perta_err *err)
{
    struct perta_layout layout;
    *n_changed = 0;
    if (encoding == PERTA_ENC_ZERO)
        return 0;
    if (encoding == PERTA_ENC_VALUES) {
        int rc = unpack(codec, frame, frame_bytes, payload_bytes, n_bytes, err);
        const char *wrong =
            rc ? NULL
               : perta_values_count(&codec->scratch, dtype, payload_bytes,
                                    n_bytes / perta_dtype_unit_bytes(dtype), n_changed);
        return wrong ? damaged(err, wrong) : rc;
    }
    int rc = read_payload(codec, dtype, frame, frame_bytes, payload_bytes, n_bytes, &layout, err);
    if (!rc)
        *n_changed = layout.n_changed;
    return rc;
}
