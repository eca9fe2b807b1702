/* Compiled once for each instruction set; see io/isa.h. Spec: docs/patch-format.md */
#include "io/format/codec_kernels.h"

#include <stdalign.h>
#include <string.h>
#ifdef __AVX512VBMI2__
#include <immintrin.h>
#endif

#include "io/isa.h"

/* How many units are counted in a counter of a unit's width. */
#define TILE(bits) ((bits) == 8 ? 128u : 4096u)

/* The functions for units of type u<bits>. On little-endian machines byte b of a unit is
 * its bits 8b to 8b + 7. */
#define DEFINE(bits)                                                                               \
    typedef uint##bits##_t __attribute__((aligned(1), may_alias)) u##bits;                         \
                                                                                                   \
    static inline uint##bits##_t map_##bits(uint##bits##_t u, bool ordered)                        \
    {                                                                                              \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));                   \
        uint##bits##_t order = (uint##bits##_t)(u & sign ? ~u : u | sign);                         \
        return ordered ? order : u;                                                                \
    }                                                                                              \
                                                                                                   \
    static inline uint##bits##_t unmap_##bits(uint##bits##_t m, bool ordered)                      \
    {                                                                                              \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));                   \
        uint##bits##_t order = (uint##bits##_t)(m & sign ? m ^ sign : ~m);                         \
        return ordered ? order : m;                                                                \
    }                                                                                              \
                                                                                                   \
    static inline uint##bits##_t zigzag_##bits(uint##bits##_t before, uint##bits##_t after,        \
                                               bool ordered)                                       \
    {                                                                                              \
        uint##bits##_t d =                                                                         \
            (uint##bits##_t)(map_##bits(after, ordered) - map_##bits(before, ordered));            \
        uint##bits##_t negative = (uint##bits##_t) - (d >> (bits - 1));                            \
        return (uint##bits##_t)((uint##bits##_t)(d << 1) ^ negative);                              \
    }                                                                                              \
                                                                                                   \
    static inline uint##bits##_t moved_##bits(uint##bits##_t from, uint##bits##_t z, bool ordered, \
                                              bool minus)                                          \
    {                                                                                              \
        uint##bits##_t d = (uint##bits##_t)((z >> 1) ^ (uint##bits##_t) - (z & 1));                \
        uint##bits##_t m = map_##bits(from, ordered);                                              \
        return unmap_##bits((uint##bits##_t)(minus ? m - d : m + d), ordered);                     \
    }                                                                                              \
                                                                                                   \
    static uint64_t zigzags_##bits(bool ordered, const u##bits *before, const u##bits *after,      \
                                   u##bits *z, size_t n)                                           \
    {                                                                                              \
        uint64_t n_changed = 0;                                                                    \
        for (size_t at = 0; at < n; at += TILE(bits)) {                                            \
            size_t end = n - at < TILE(bits) ? n : at + TILE(bits);                                \
            uint##bits##_t changed = 0;                                                            \
            for (size_t i = at; i < end; i++) {                                                    \
                uint##bits##_t one = zigzag_##bits(before[i], after[i], ordered);                  \
                z[i] = one;                                                                        \
                changed = (uint##bits##_t)(changed + (one != 0));                                  \
            }                                                                                      \
            n_changed += changed;                                                                  \
        }                                                                                          \
        return n_changed;                                                                          \
    }                                                                                              \
                                                                                                   \
    static void add_##bits(bool ordered, const u##bits *from, const u##bits *z, bool minus,        \
                           u##bits *to, size_t n)                                                  \
    {                                                                                              \
        for (size_t i = 0; i < n; i++)                                                             \
            to[i] = moved_##bits(from[i], z[i], ordered, minus);                                   \
    }                                                                                              \
                                                                                                   \
    static inline __attribute__((always_inline)) void split_##bits(                                \
        unsigned low, const u##bits *z, size_t n, uint8_t *const *lows, uint8_t *values)           \
    {                                                                                              \
        for (unsigned at = 0; lows && at < low; at += 8, lows++) {                                 \
            uint8_t *to = *lows, mask = (uint8_t)(low - at < 8 ? (1u << (low - at)) - 1 : 255);    \
            for (size_t i = 0; i < n; i++)                                                         \
                to[i] = (uint8_t)(z[i] >> at) & mask;                                              \
        }                                                                                          \
        for (size_t i = 0; i < n; i++) {                                                           \
            uint##bits##_t value = (uint##bits##_t)(low < bits ? z[i] >> low : 0);                 \
            values[i] = (uint8_t)(value < 255 ? value : 255);                                      \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    /* n_lows: bytes of low bits. */                                                               \
    static inline __attribute__((always_inline)) uint64_t join_##bits(                             \
        unsigned low, unsigned n_lows, const uint8_t *values, const uint8_t *const *lows,          \
        u##bits *z, size_t n)                                                                      \
    {                                                                                              \
        const uint8_t *from[8];                                                                    \
        uint64_t n_changed = 0;                                                                    \
        for (unsigned b = 0; b < n_lows; b++)                                                      \
            from[b] = lows[b];                                                                     \
        for (size_t at = 0; at < n; at += TILE(bits)) {                                            \
            size_t end = n - at < TILE(bits) ? n : at + TILE(bits);                                \
            uint##bits##_t changed = 0;                                                            \
            for (size_t i = at; i < end; i++) {                                                    \
                uint##bits##_t one =                                                               \
                    (uint##bits##_t)(low < bits ? (uint##bits##_t)values[i] << low : 0);           \
                for (unsigned b = 0; b < n_lows; b++)                                              \
                    one = (uint##bits##_t)(one | (uint##bits##_t)from[b][i] << 8 * b);             \
                z[i] = one;                                                                        \
                changed = (uint##bits##_t)(changed + (one != 0));                                  \
            }                                                                                      \
            n_changed += changed;                                                                  \
        }                                                                                          \
        return n_changed;                                                                          \
    }                                                                                              \
                                                                                                   \
    static inline uint8_t key_##bits(uint##bits##_t u, unsigned shift, unsigned e_bits,            \
                                     uint##bits##_t first, uint##bits##_t last)                    \
    {                                                                                              \
        uint##bits##_t e = (uint##bits##_t)(u >> shift);                                           \
        e = (uint##bits##_t)(e & (((uint##bits##_t)1 << e_bits) - 1));                             \
        e = (uint##bits##_t)((e > first ? e : first) - first);                                     \
        return (uint8_t)(e < last ? e : last);                                                     \
    }                                                                                              \
                                                                                                   \
    /* Constant shift and e_bits keep the lanes narrow. No dtype of 8 bits has keys. */            \
    static inline __attribute__((always_inline, unused)) void keys_##bits(                         \
        unsigned shift, unsigned e_bits, uint32_t first_key, uint32_t n_keys,                      \
        const u##bits *units, uint8_t *keys, size_t n)                                             \
    {                                                                                              \
        uint##bits##_t first = (uint##bits##_t)first_key, last = (uint##bits##_t)(n_keys - 1);     \
        for (size_t i = 0; i < n; i++)                                                             \
            keys[i] = key_##bits(units[i], shift, e_bits, first, last);                            \
    }

DEFINE(8)
DEFINE(16)
DEFINE(32)
DEFINE(64)

#define BY_WIDTH(width, name, ...)           \
    ((width) == 1   ? name##_8(__VA_ARGS__)  \
     : (width) == 2 ? name##_16(__VA_ARGS__) \
     : (width) == 4 ? name##_32(__VA_ARGS__) \
                    : name##_64(__VA_ARGS__))

/* Constants let the compiler make one loop for each case. */
static uint64_t zigzags(unsigned width, bool ordered, const void *before, const void *after,
                        void *z, size_t n)
{
    return ordered ? BY_WIDTH(width, zigzags, true, before, after, z, n)
                   : BY_WIDTH(width, zigzags, false, before, after, z, n);
}

static void add(unsigned width, bool ordered, const void *from, const void *z, bool minus, void *to,
                size_t n)
{
    if (ordered)
        BY_WIDTH(width, add, true, from, z, minus, to, n);
    else
        BY_WIDTH(width, add, false, from, z, minus, to, n);
}

/* For 16-bit units the shifts are constants too; else the compiler would use 32-bit lanes. */
#define BY_LOW(low, name, ...)             \
    ((low) == 0    ? name(0, __VA_ARGS__)  \
     : (low) == 1  ? name(1, __VA_ARGS__)  \
     : (low) == 2  ? name(2, __VA_ARGS__)  \
     : (low) == 4  ? name(4, __VA_ARGS__)  \
     : (low) == 8  ? name(8, __VA_ARGS__)  \
     : (low) == 9  ? name(9, __VA_ARGS__)  \
     : (low) == 10 ? name(10, __VA_ARGS__) \
     : (low) == 12 ? name(12, __VA_ARGS__) \
                   : name(16, __VA_ARGS__))

static void split(unsigned width, unsigned low, const void *z, size_t n, uint8_t *const *lows,
                  uint8_t *values)
{
    if (width == 2)
        BY_LOW(low, split_16, z, n, lows, values);
    else
        BY_WIDTH(width, split, low, z, n, lows, values);
}

#define JOIN_16(low, ...) join_16(low, ((low) + 7) / 8, __VA_ARGS__)

/* The number of low bytes is a constant, so that there is one loop over all of them. */
static uint64_t join(unsigned width, unsigned low, const uint8_t *values,
                     const uint8_t *const *lows, void *z, size_t n)
{
    if (width == 2)
        return BY_LOW(low, JOIN_16, values, lows, z, n);
    if (width != 4)
        return BY_WIDTH(width, join, low, (low + 7) / 8, values, lows, z, n);
    switch ((low + 7) / 8) {
    case 0:
        return join_32(low, 0, values, lows, z, n);
    case 1:
        return join_32(low, 1, values, lows, z, n);
    case 2:
        return join_32(low, 2, values, lows, z, n);
    case 3:
        return join_32(low, 3, values, lows, z, n);
    default:
        return join_32(low, 4, values, lows, z, n);
    }
}

static void keys(unsigned width, const struct perta_grouping *g, const void *units, uint8_t *to,
                 size_t n)
{
    if (width == 2 && g->shift == 7) /* BF16 */
        keys_16(7, 8, g->first, g->n, units, to, n);
    else if (width == 2) /* F16 */
        keys_16(10, 5, g->first, g->n, units, to, n);
    else if (width == 4) /* F32 */
        keys_32(23, 8, g->first, g->n, units, to, n);
    else /* F64 */
        keys_64(52, 11, g->first, g->n, units, to, n);
}

static void cross(uint8_t *of, const uint8_t *other, uint8_t crosses, size_t n)
{
    for (size_t i = 0; i < n; i++)
        of[i] = of[i] == other[i] ? of[i] : crosses;
}

/* The fields of a byte are m apart in x, with m = ceil(n * bits / 8). The first `whole` bytes have
 * all their fields; later bytes lack the last ones. */
static inline size_t whole_bytes(unsigned bits, size_t n, size_t m)
{
    size_t before_last = (8 / bits - 1) * m;
    return n > before_last ? n - before_last : 0;
}

static inline void pack_bits(unsigned bits, const uint8_t *x, size_t n, uint8_t *to)
{
    size_t m = (n * bits + 7) / 8, whole = whole_bytes(bits, n, m);
    uint8_t full = (uint8_t)((1u << bits) - 1);
    for (size_t i = 0; i < whole; i++) {
        unsigned byte = 0;
        for (unsigned f = 0; f < 8 / bits; f++)
            byte |= (unsigned)(x[f * m + i] < full ? x[f * m + i] : full) << f * bits;
        to[i] = (uint8_t)byte;
    }
    for (size_t i = whole; i < m; i++) {
        unsigned byte = 0;
        for (unsigned f = 0; f * m + i < n; f++)
            byte |= (unsigned)(x[f * m + i] < full ? x[f * m + i] : full) << f * bits;
        to[i] = (uint8_t)byte;
    }
}

/* Unrolled so that shifts are constants. */
static inline void unpack_bits(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x)
{
    enum { BLOCK = 2048 }; /* bytes that stay in the L1 cache */
    size_t m = (n * bits + 7) / 8;
    uint8_t full = (uint8_t)((1u << bits) - 1);
    for (size_t at = 0; at < m; at += BLOCK) {
        size_t block = m - at < BLOCK ? m - at : BLOCK;
#ifndef __SANITIZE_ADDRESS__ /* its checks prevent unrolling, and gcc warns */
#pragma GCC unroll 8
#endif
        for (unsigned f = 0; f < 8 / bits; f++) {
            size_t start = f * m + at, left = start < n ? n - start : 0;
            for (size_t i = 0; i < (left < block ? left : block); i++)
                x[start + i] = packed[at + i] >> f * bits & full;
        }
    }
}

static void pack(unsigned bits, const uint8_t *x, size_t n, uint8_t *to)
{
    bits == 1   ? pack_bits(1, x, n, to)
    : bits == 2 ? pack_bits(2, x, n, to)
                : pack_bits(4, x, n, to);
}

static void unpack(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x)
{
    bits == 1   ? unpack_bits(1, packed, n, x)
    : bits == 2 ? unpack_bits(2, packed, n, x)
                : unpack_bits(4, packed, n, x);
}

/* ---- moving bytes ---- */

#ifdef __AVX512VBMI2__
/* 64 bytes at a time, with the AVX-512 VBMI2 instructions for it, which compilers do not find. */

static inline __m512i splat(uint8_t value)
{
    return _mm512_set1_epi8((char)value);
}

static inline __m512i load(const uint8_t *x)
{
    return _mm512_loadu_si512(x);
}

static inline size_t ones(__mmask64 mask)
{
    return (size_t)__builtin_popcountll(mask);
}

/* A mask of the first n of 64 bytes, for the last, partial vector. */
static inline __mmask64 first(size_t n)
{
    return (1ull << n) - 1;
}

static inline __m512i load_first(const uint8_t *x, size_t n)
{
    return _mm512_maskz_loadu_epi8(first(n), x);
}

static size_t at_least(const uint8_t *x, uint8_t least, size_t n)
{
    size_t found = 0, at = 0;
    for (; at + 64 <= n; at += 64)
        found += ones(_mm512_cmpge_epu8_mask(load(x + at), splat(least)));
    return found + ones(_mm512_mask_cmpge_epu8_mask(first(n - at), load_first(x + at, n - at),
                                                    splat(least)));
}

static void count(const uint8_t *x, size_t n, unsigned n_keys, uint32_t *counts)
{
    for (unsigned g = 0; g < n_keys; g++) {
        size_t found = 0, at = 0;
        for (; at + 64 <= n; at += 64)
            found += ones(_mm512_cmpeq_epi8_mask(load(x + at), splat((uint8_t)g)));
        found += ones(_mm512_mask_cmpeq_epi8_mask(first(n - at), load_first(x + at, n - at),
                                                  splat((uint8_t)g)));
        counts[g] += (uint32_t)found;
    }
}

static inline void scatter_64(__mmask64 valid, __m512i v, __m512i k, unsigned n_keys, uint8_t **to)
{
    for (unsigned g = 0; g < n_keys; g++) {
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid, k, splat((uint8_t)g));
        _mm512_storeu_si512(to[g], _mm512_maskz_compress_epi8(mask, v));
        to[g] += ones(mask);
    }
}

static void scatter(const uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys, uint8_t **to)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        scatter_64(~0ull, load(x + at), load(of + at), n_keys, to);
    if (at < n)
        scatter_64(first(n - at), load_first(x + at, n - at), load_first(of + at, n - at), n_keys,
                   to);
}

static inline __m512i gather_64(__mmask64 valid, __m512i k, unsigned n_keys, const uint8_t **from)
{
    __m512i v = _mm512_setzero_si512();
    for (unsigned g = 0; g < n_keys; g++) {
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid, k, splat((uint8_t)g));
        v = _mm512_mask_expand_epi8(v, mask, load(from[g]));
        from[g] += ones(mask);
    }
    return v;
}

static void gather(uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys, const uint8_t **from)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        _mm512_storeu_si512(x + at, gather_64(~0ull, load(of + at), n_keys, from));
    if (at < n)
        _mm512_mask_storeu_epi8(
            x + at, first(n - at),
            gather_64(first(n - at), load_first(of + at, n - at), n_keys, from));
}

static size_t pick(const uint8_t *x, uint8_t least, size_t n, uint8_t *to)
{
    uint8_t *start = to;
    size_t at = 0;
    for (; at + 64 <= n; at += 64) {
        __m512i v = load(x + at);
        __mmask64 mask = _mm512_cmpge_epu8_mask(v, splat(least));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(mask, v));
        to += ones(mask);
    }
    for (; at < n; at++)
        if (x[at] >= least)
            *to++ = x[at];
    return (size_t)(to - start);
}

static void put(uint8_t *x, uint8_t least, size_t n, const uint8_t *from)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64) {
        __m512i v = load(x + at);
        __mmask64 mask = _mm512_cmpge_epu8_mask(v, splat(least));
        _mm512_storeu_si512(x + at, _mm512_mask_expand_epi8(v, mask, load(from)));
        from += ones(mask);
    }
    for (; at < n; at++)
        if (x[at] >= least)
            x[at] = *from++;
}

static inline size_t find_32(__mmask32 mask, size_t base, uint16_t *at)
{
    alignas(64) static const uint16_t numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                     11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                     22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    __m512i all = _mm512_add_epi16(_mm512_load_si512(numbers), _mm512_set1_epi16((short)base));
    _mm512_storeu_si512(at, _mm512_maskz_compress_epi16(mask, all));
    return ones(mask);
}

static size_t find(const uint8_t *x, uint8_t value, size_t n, uint16_t *to)
{
    size_t found = 0;
    for (size_t at = 0; at < n; at += 64) {
        __mmask64 valid = n - at < 64 ? first(n - at) : ~0ull;
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid, _mm512_maskz_loadu_epi8(valid, x + at),
                                                     splat(value));
        found += find_32((__mmask32)mask, at, to + found);
        found += find_32((__mmask32)(mask >> 32), at + 32, to + found);
    }
    return found;
}

#else

static void count(const uint8_t *x, size_t n, unsigned n_keys, uint32_t *counts)
{
    for (; n; n--, x++)
        counts[*x] += *x < n_keys;
}

static size_t at_least(const uint8_t *x, uint8_t least, size_t n)
{
    size_t found = 0;
    for (size_t at = 0; at < n; at += 128) { /* so that a byte holds the count */
        uint8_t few = 0;
        for (size_t i = at; i < (n - at < 128 ? n : at + 128); i++)
            few = (uint8_t)(few + (x[i] >= least));
        found += few;
    }
    return found;
}

static void scatter(const uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys, uint8_t **to)
{
    (void)n_keys;
    for (size_t i = 0; i < n; i++)
        *to[of[i]]++ = x[i];
}

static void gather(uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys, const uint8_t **from)
{
    (void)n_keys;
    for (size_t i = 0; i < n; i++)
        x[i] = *from[of[i]]++;
}

static size_t pick(const uint8_t *x, uint8_t least, size_t n, uint8_t *to)
{
    size_t found = 0;
    for (size_t i = 0; i < n; i++) {
        to[found] = x[i];
        found += x[i] >= least;
    }
    return found;
}

static void put(uint8_t *x, uint8_t least, size_t n, const uint8_t *from)
{
    for (size_t i = 0; i < n; i++) {
        bool hit = x[i] >= least;
        x[i] = hit ? *from : x[i];
        from += hit;
    }
}

static size_t find(const uint8_t *x, uint8_t value, size_t n, uint16_t *to)
{
    size_t found = 0;
    for (size_t i = 0; i < n; i++) {
        to[found] = (uint16_t)i;
        found += x[i] == value;
    }
    return found;
}

#endif

const struct perta_codec_kernels PERTA_ISA_NAME(perta_codec_kernels) = {
    zigzags, add,    split, join, keys, cross,  count, at_least,
    scatter, gather, pick,  put,  pack, unpack, find};
