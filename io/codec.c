#include "io/codec.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "io/codec_kernels.h"
#include "io/isa.h"

#define MAX_KEYS 2048u        /* F64 has 11 bits of exponent */
#define GROUPED_HEAD_BYTES 10 /* floor u16, crossers u32, length of the gaps u32 */
/* More crossers than one in so many are not worth listing. */
#define CROSSER_SHARE 32

struct perta_codec {
    const struct perta_codec_kernels *kernels;
    ZSTD_CCtx *pack;
    ZSTD_DCtx *unpack;
    size_t max_bytes;
    uint8_t *z;       /* (max_bytes) zigzagged deltas in order of the elements */
    uint8_t *grouped; /* (max_bytes) the same, by group, crossers last */
    uint8_t *payload; /* (perta_codec_payload_max(max_bytes)) */
    uint8_t *frame;   /* (perta_codec_bound(max_bytes)) the second candidate */
};

/* ---- sizes ---- */

size_t perta_codec_bound(size_t n)
{
    return ZSTD_COMPRESSBOUND(n);
}

size_t perta_codec_payload_max(size_t n)
{
    return n + n / 16 + 64;
}

/* ---- making ---- */

/* zstd as a fast Huffman coder, which is what is left to do once planes are split. */
static bool set_up(ZSTD_CCtx *pack)
{
    static const struct {
        ZSTD_cParameter name;
        int value;
    } parameters[] = {
        {ZSTD_c_compressionLevel, -5},
        {ZSTD_c_strategy, ZSTD_fast},
        {ZSTD_c_windowLog, 17},
        {ZSTD_c_hashLog, 6},
        {ZSTD_c_minMatch, 7},
        {ZSTD_c_targetLength, 1 << 17},
        {ZSTD_c_experimentalParam5, 1}, /* always compress literals */
        {ZSTD_c_checksumFlag, 1},
        {ZSTD_c_contentSizeFlag, 1},
    };
    for (size_t i = 0; i < sizeof parameters / sizeof *parameters; i++)
        if (ZSTD_isError(ZSTD_CCtx_setParameter(pack, parameters[i].name, parameters[i].value)))
            return false;
    return true;
}

static const struct perta_codec_kernels *kernels_of(enum perta_isa isa)
{
    static const struct perta_codec_kernels *const all[PERTA_N_ISAS] = {
        &perta_codec_kernels_v2, &perta_codec_kernels_v3, &perta_codec_kernels_v4};
    return all[isa];
}

struct perta_codec *perta_codec_new(size_t max_bytes)
{
    struct perta_codec *codec = calloc(1, sizeof *codec);
    if (!codec)
        return NULL;
    codec->kernels = kernels_of(perta_isa_chosen());
    codec->max_bytes = max_bytes;
    codec->pack = ZSTD_createCCtx();
    codec->unpack = ZSTD_createDCtx();
    codec->z = malloc(max_bytes + 1);
    codec->grouped = malloc(max_bytes + 1);
    codec->payload = malloc(perta_codec_payload_max(max_bytes));
    codec->frame = malloc(perta_codec_bound(max_bytes));
    if (!codec->pack || !codec->unpack || !codec->z || !codec->grouped || !codec->payload ||
        !codec->frame || !set_up(codec->pack)) {
        perta_codec_free(codec);
        return NULL;
    }
    /* Touch it all, so that what is resident now is what a run needs. (Of zeros gcc would make
     * calloc, which does not.) */
    memset(codec->z, 1, max_bytes);
    memset(codec->grouped, 1, max_bytes);
    memset(codec->payload, 1, perta_codec_payload_max(max_bytes));
    memset(codec->frame, 1, perta_codec_bound(max_bytes));
    size_t n = ZSTD_compress2(codec->pack, codec->frame, perta_codec_bound(max_bytes), codec->z,
                              max_bytes);
    ZSTD_decompressDCtx(codec->unpack, codec->payload, max_bytes, codec->frame, n);
    return codec;
}

void perta_codec_free(struct perta_codec *codec)
{
    if (!codec)
        return;
    ZSTD_freeCCtx(codec->pack);
    ZSTD_freeDCtx(codec->unpack);
    free(codec->z);
    free(codec->grouped);
    free(codec->payload);
    free(codec->frame);
    free(codec);
}

/* ---- units ---- */

/* Sign and magnitude, so that the map to ordered integers makes sense. */
static bool is_ordered(enum perta_dtype dtype)
{
    switch (dtype) {
    case PERTA_F8_E5M2:
    case PERTA_F8_E4M3:
    case PERTA_F16:
    case PERTA_BF16:
    case PERTA_F32:
    case PERTA_C64:
    case PERTA_F64:
        return true;
    default:
        return false;
    }
}

/* Where a unit's exponent is; bits 0 for dtypes that are not grouped. */
struct exponent {
    unsigned shift, bits;
};

static struct exponent exponent_of(enum perta_dtype dtype)
{
    switch (dtype) {
    case PERTA_F16:
        return (struct exponent){10, 5};
    case PERTA_BF16:
        return (struct exponent){7, 8};
    case PERTA_F32:
        return (struct exponent){23, 8};
    case PERTA_F64:
        return (struct exponent){52, 11};
    default:
        return (struct exponent){0, 0};
    }
}

bool perta_codec_groups(enum perta_dtype dtype)
{
    return exponent_of(dtype).bits != 0;
}

static inline uint64_t unit_at(const uint8_t *bytes, unsigned width, size_t i)
{
    uint64_t unit = 0;
    if (width == 1)
        unit = bytes[i];
    else if (width == 2)
        memcpy(&unit, bytes + 2 * i, 2);
    else if (width == 4)
        memcpy(&unit, bytes + 4 * i, 4);
    else
        memcpy(&unit, bytes + 8 * i, 8);
    return unit;
}

static inline void unit_copy(uint8_t *to, size_t i, const uint8_t *from, size_t j,
                             unsigned width)
{
    if (width == 2)
        memcpy(to + 2 * i, from + 2 * j, 2);
    else if (width == 4)
        memcpy(to + 4 * i, from + 4 * j, 4);
    else
        memcpy(to + 8 * i, from + 8 * j, 8);
}

static inline uint32_t exponent_at(const uint8_t *bytes, unsigned width, struct exponent e,
                                   size_t i)
{
    return (uint32_t)(unit_at(bytes, width, i) >> e.shift) & ((1u << e.bits) - 1);
}

/* ---- grouping: encode ---- */

/* Units by the larger of their two exponents: where those agree, and where not. Two of each,
 * for neighbours mostly fall into the same place, and one increment waits for the other. */
struct tally {
    uint32_t counts[2][2][MAX_KEYS];
    uint32_t top;
};

static inline void tally_units(struct tally *t, const uint8_t *before, const uint8_t *after,
                               unsigned width, struct exponent e, size_t n)
{
    memset(t, 0, sizeof *t);
    for (size_t i = 0; i < n; i++) {
        uint32_t a = exponent_at(before, width, e, i), b = exponent_at(after, width, e, i);
        uint32_t larger = a > b ? a : b;
        t->top = larger > t->top ? larger : t->top;
        t->counts[i & 1][a != b][larger]++;
    }
}

static uint32_t counted(const struct tally *t, bool differ, uint32_t exponent)
{
    return t->counts[0][differ][exponent] + t->counts[1][differ][exponent];
}

/* The lowest floor that leaves few crossers: units whose exponent changes cross under every
 * floor below the larger of the two. */
static uint32_t choose_floor(const struct tally *t, size_t n)
{
    size_t crossers = 0;
    uint32_t f = t->top;
    while (f && crossers + counted(t, true, f) <= n / CROSSER_SHARE)
        crossers += counted(t, true, f--);
    return f;
}

/* Where the group of each key starts; returns where the last one ends. */
static uint32_t starts_under(const struct tally *t, uint32_t key_floor,
                             uint32_t starts[MAX_KEYS])
{
    uint32_t at = 0;
    starts[key_floor] = 0;
    for (uint32_t k = 0; k <= key_floor; k++)
        at += counted(t, false, k) + counted(t, true, k);
    for (uint32_t k = key_floor + 1; k <= t->top; k++) {
        starts[k] = at;
        at += counted(t, false, k);
    }
    return at;
}

static void put_le(uint8_t *to, uint64_t value, unsigned bytes)
{
    for (unsigned b = 0; b < bytes; b++)
        to[b] = (uint8_t)(value >> (8 * b));
}

static uint32_t get_le(const uint8_t *from, unsigned bytes)
{
    uint32_t value = 0;
    for (unsigned b = 0; b < bytes; b++)
        value |= (uint32_t)from[b] << (8 * b);
    return value;
}

static uint8_t *put_gap(uint8_t *to, size_t gap)
{
    for (; gap >= 255; gap -= 255)
        *to++ = 255;
    *to++ = (uint8_t)gap;
    return to;
}

static inline uint32_t key_of(uint32_t exponent, uint32_t key_floor)
{
    return exponent > key_floor ? exponent : key_floor;
}

/* The payload of PERTA_ENC_GROUPED from codec->z; 0 where there would be one group. */
static inline size_t group_units(struct perta_codec *codec, const uint8_t *before,
                                 const uint8_t *after, unsigned width, struct exponent e,
                                 size_t n)
{
    struct tally tally;
    uint32_t starts[MAX_KEYS];
    tally_units(&tally, before, after, width, e, n);
    uint32_t key_floor = choose_floor(&tally, n);
    if (key_floor == tally.top)
        return 0;
    uint32_t inside = starts_under(&tally, key_floor, starts), cross_at = inside;
    uint8_t *gaps = codec->payload + GROUPED_HEAD_BYTES, *gap = gaps;
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(exponent_at(before, width, e, i), key_floor);
        if (key == key_of(exponent_at(after, width, e, i), key_floor)) {
            unit_copy(codec->grouped, starts[key]++, codec->z, i, width);
        } else {
            unit_copy(codec->grouped, cross_at++, codec->z, i, width);
            gap = put_gap(gap, i - from);
            from = i + 1;
        }
    }
    put_le(codec->payload, key_floor, 2);
    put_le(codec->payload + 2, n - inside, 4);
    put_le(codec->payload + 6, (size_t)(gap - gaps), 4);
    codec->kernels->split(width, codec->grouped, gap, inside);
    codec->kernels->split(width, codec->grouped + inside * width, gap + inside * width,
                          n - inside);
    return (size_t)(gap - codec->payload) + n * width;
}

static size_t group(struct perta_codec *codec, enum perta_dtype dtype, const void *before,
                    const void *after, size_t n)
{
    struct exponent e = exponent_of(dtype);
    if (!e.bits)
        return 0;
    unsigned width = perta_dtype_unit_bytes(dtype);
    return width == 2   ? group_units(codec, before, after, 2, e, n)
           : width == 4 ? group_units(codec, before, after, 4, e, n)
                        : group_units(codec, before, after, 8, e, n);
}

/* ---- encode ---- */

/* Pack len_bytes of payload; keep the frame in dst where it is smaller than what is there, or
 * raw and as small. A frame that does not fit is none. */
static void offer(struct perta_codec *codec, enum perta_encoding encoding,
                  const uint8_t *payload, size_t len_bytes, uint8_t *dst, size_t dst_capacity,
                  struct perta_coded *coded)
{
    bool first = !coded->frame_bytes;
    uint8_t *to = first ? dst : codec->frame;
    size_t room = first ? dst_capacity : coded->frame_bytes - (encoding != PERTA_ENC_RAW);
    size_t n = ZSTD_compress2(codec->pack, to, room, payload, len_bytes);
    if (ZSTD_isError(n))
        return;
    if (!first)
        memcpy(dst, to, n);
    coded->encoding = encoding;
    coded->frame_bytes = (uint32_t)n;
    coded->payload_bytes = (uint32_t)len_bytes;
}

int perta_codec_encode(struct perta_codec *codec, enum perta_dtype dtype, const void *before,
                       const void *after, size_t n_bytes, uint8_t *dst, size_t dst_capacity,
                       struct perta_coded *coded, struct perta_err *err)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    size_t n = n_bytes / width;
    *coded = (struct perta_coded){.encoding = PERTA_ENC_ZERO};
    coded->n_changed =
        codec->kernels->delta(width, is_ordered(dtype), before, after, codec->z, n);
    if (!coded->n_changed)
        return 0;
    codec->kernels->split(width, codec->z, codec->payload, n);
    offer(codec, PERTA_ENC_PLANES, codec->payload, n_bytes, dst, dst_capacity, coded);
    size_t grouped = group(codec, dtype, before, after, n);
    if (grouped)
        offer(codec, PERTA_ENC_GROUPED, codec->payload, grouped, dst, dst_capacity, coded);
    if (coded->frame_bytes >= n_bytes)
        offer(codec, PERTA_ENC_RAW, codec->z, n_bytes, dst, dst_capacity, coded);
    return coded->frame_bytes ? 0
                              : perta_fail_sys(err, ENOBUFS, "encoding %zu bytes", n_bytes);
}

/* ---- decode ---- */

static int damaged(struct perta_err *err, const char *what)
{
    return perta_fail(err, PERTA_ECHECK, "the frame is damaged: %s", what);
}

/* From counts to where each group starts. */
static void starts_of(uint32_t counts[MAX_KEYS])
{
    uint32_t at = 0;
    for (uint32_t k = 0; k < MAX_KEYS; k++) {
        uint32_t count = counts[k];
        counts[k] = at;
        at += count;
    }
}

/* Put units of codec->grouped back in order, into codec->z. from is either side: those that
 * do not cross have the same key in both. */
static inline void ungroup_units(struct perta_codec *codec, const uint8_t *from, unsigned width,
                                 struct exponent e, uint32_t key_floor, const uint8_t *gaps,
                                 size_t n_crossers, size_t n)
{
    uint32_t starts[MAX_KEYS] = {0};
    uint32_t cross_at = (uint32_t)(n - n_crossers);
    for (int pass = 0; pass < 2; pass++) {
        const uint8_t *gap = gaps;
        size_t at = 0;
        for (size_t c = 0; c <= n_crossers; c++) {
            size_t next = c < n_crossers ? at : n;
            if (c < n_crossers) {
                while (*gap == 255)
                    next += *gap++;
                next += *gap++;
            }
            for (; at < next; at++) {
                uint32_t key = key_of(exponent_at(from, width, e, at), key_floor);
                if (pass)
                    unit_copy(codec->z, at, codec->grouped, starts[key], width);
                starts[key]++;
            }
            if (c < n_crossers && pass)
                unit_copy(codec->z, at, codec->grouped, cross_at++, width);
            at++;
        }
        if (!pass)
            starts_of(starts);
    }
}

/* The gaps must be n_crossers numbers that lead to positions below n. */
static bool gaps_are_sound(const uint8_t *gaps, size_t len_bytes, size_t n_crossers, size_t n)
{
    size_t at = 0, found = 0;
    for (size_t i = 0; i < len_bytes; i++) {
        at += gaps[i];
        if (gaps[i] == 255)
            continue;
        if (at >= n)
            return false;
        at++;
        found++;
    }
    return found == n_crossers && (!len_bytes || gaps[len_bytes - 1] != 255);
}

/* What a grouped payload says before its planes. */
struct groups {
    uint32_t key_floor;
    size_t n_crossers;
    const uint8_t *gaps;
};

/* Units by group into codec->grouped, crossers last. */
static int read_groups(struct perta_codec *codec, enum perta_dtype dtype, size_t payload_bytes,
                       size_t n, struct groups *groups, struct perta_err *err)
{
    struct exponent e = exponent_of(dtype);
    unsigned width = perta_dtype_unit_bytes(dtype);
    if (!e.bits || payload_bytes < GROUPED_HEAD_BYTES)
        return damaged(err, "it is not grouped");
    uint32_t key_floor = get_le(codec->payload, 2);
    size_t n_crossers = get_le(codec->payload + 2, 4);
    size_t gaps_bytes = get_le(codec->payload + 6, 4);
    const uint8_t *gaps = codec->payload + GROUPED_HEAD_BYTES;
    if (key_floor >= 1u << e.bits || n_crossers > n ||
        gaps_bytes > payload_bytes - GROUPED_HEAD_BYTES ||
        payload_bytes - GROUPED_HEAD_BYTES - gaps_bytes != n * width ||
        !gaps_are_sound(gaps, gaps_bytes, n_crossers, n))
        return damaged(err, "its groups make no sense");
    const uint8_t *planes = gaps + gaps_bytes;
    size_t inside = n - n_crossers;
    codec->kernels->join(width, planes, codec->grouped, inside);
    codec->kernels->join(width, planes + inside * width, codec->grouped + inside * width,
                         n_crossers);
    *groups = (struct groups){key_floor, n_crossers, gaps};
    return 0;
}

static int ungroup(struct perta_codec *codec, enum perta_dtype dtype, const void *from,
                   size_t payload_bytes, size_t n, struct perta_err *err)
{
    struct exponent e = exponent_of(dtype);
    unsigned width = perta_dtype_unit_bytes(dtype);
    struct groups g;
    int rc = read_groups(codec, dtype, payload_bytes, n, &g, err);
    if (rc)
        return rc;
    if (width == 2)
        ungroup_units(codec, from, 2, e, g.key_floor, g.gaps, g.n_crossers, n);
    else if (width == 4)
        ungroup_units(codec, from, 4, e, g.key_floor, g.gaps, g.n_crossers, n);
    else
        ungroup_units(codec, from, 8, e, g.key_floor, g.gaps, g.n_crossers, n);
    return 0;
}

/* Into codec->payload. */
static int unpack(struct perta_codec *codec, const uint8_t *frame, size_t frame_bytes,
                  size_t payload_bytes, size_t n_bytes, struct perta_err *err)
{
    if (n_bytes > codec->max_bytes || payload_bytes > perta_codec_payload_max(n_bytes))
        return damaged(err, "it is too large");
    size_t n = ZSTD_decompressDCtx(codec->unpack, codec->payload, payload_bytes, frame,
                                   frame_bytes);
    if (ZSTD_isError(n))
        return damaged(err, ZSTD_getErrorName(n));
    return n == payload_bytes ? 0 : damaged(err, "it is too short");
}

/* z in codec->z, or in codec->payload as it is. */
static int decode(struct perta_codec *codec, enum perta_dtype dtype,
                  enum perta_encoding encoding, const void *from, size_t payload_bytes,
                  size_t n_bytes, const uint8_t **z, struct perta_err *err)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    *z = codec->z;
    if (encoding == PERTA_ENC_GROUPED)
        return ungroup(codec, dtype, from, payload_bytes, n_bytes / width, err);
    if (payload_bytes != n_bytes)
        return damaged(err, "it is not as long as the chunk");
    if (encoding == PERTA_ENC_RAW)
        *z = codec->payload;
    else
        codec->kernels->join(width, codec->payload, codec->z, n_bytes / width);
    return 0;
}

static int move(struct perta_codec *codec, enum perta_dtype dtype, enum perta_encoding encoding,
                const uint8_t *frame, size_t frame_bytes, size_t payload_bytes,
                const void *from, int sign, void *to, size_t n_bytes, struct perta_err *err)
{
    if (encoding == PERTA_ENC_ZERO) {
        memcpy(to, from, n_bytes);
        return 0;
    }
    const uint8_t *z;
    int rc = unpack(codec, frame, frame_bytes, payload_bytes, n_bytes, err);
    if (!rc)
        rc = decode(codec, dtype, encoding, from, payload_bytes, n_bytes, &z, err);
    if (rc)
        return rc;
    unsigned width = perta_dtype_unit_bytes(dtype);
    codec->kernels->add(width, is_ordered(dtype), from, z, sign, to, n_bytes / width);
    return 0;
}

int perta_codec_apply(struct perta_codec *codec, enum perta_dtype dtype,
                      enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                      size_t payload_bytes, const void *before, void *after, size_t n_bytes,
                      struct perta_err *err)
{
    return move(codec, dtype, encoding, frame, frame_bytes, payload_bytes, before, 1, after,
                n_bytes, err);
}

int perta_codec_revert(struct perta_codec *codec, enum perta_dtype dtype,
                       enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                       size_t payload_bytes, const void *after, void *before, size_t n_bytes,
                       struct perta_err *err)
{
    return move(codec, dtype, encoding, frame, frame_bytes, payload_bytes, after, -1, before,
                n_bytes, err);
}

/* ---- count ---- */

static inline uint64_t nonzero(const uint8_t *z, unsigned width, size_t n)
{
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += unit_at(z, width, i) != 0;
    return count;
}

int perta_codec_count(struct perta_codec *codec, enum perta_dtype dtype,
                      enum perta_encoding encoding, const uint8_t *frame, size_t frame_bytes,
                      size_t payload_bytes, size_t n_bytes, uint64_t *n_changed,
                      struct perta_err *err)
{
    unsigned width = perta_dtype_unit_bytes(dtype);
    size_t n = n_bytes / width;
    const uint8_t *z = codec->grouped;
    struct groups groups;
    *n_changed = 0;
    if (encoding == PERTA_ENC_ZERO)
        return 0;
    int rc = unpack(codec, frame, frame_bytes, payload_bytes, n_bytes, err);
    if (!rc && encoding == PERTA_ENC_GROUPED)
        rc = read_groups(codec, dtype, payload_bytes, n, &groups, err);
    else if (!rc)
        rc = decode(codec, dtype, encoding, NULL, payload_bytes, n_bytes, &z, err);
    if (!rc)
        *n_changed = width == 1   ? nonzero(z, 1, n)
                     : width == 2 ? nonzero(z, 2, n)
                     : width == 4 ? nonzero(z, 4, n)
                                  : nonzero(z, 8, n);
    return rc;
}
