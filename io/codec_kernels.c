/* Compiled once for each instruction set, see io/isa.h. Spec: docs/patch-format.md */
#include "io/codec_kernels.h"

#include <string.h>
#ifdef __AVX512VBMI2__
#include <immintrin.h>
#endif

#include "io/isa.h"

#define TILE 1024

/* The functions for units of type u<bits>. On little-endian machines byte b of a unit is
 * its bits 8b to 8b + 7. */
#define DEFINE(bits)                                                                      \
    typedef uint##bits##_t __attribute__((aligned(1), may_alias)) u##bits;                \
                                                                                          \
    static inline uint##bits##_t map_##bits(uint##bits##_t u, bool ordered)               \
    {                                                                                     \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));          \
        uint##bits##_t order = (uint##bits##_t)(u & sign ? ~u : u | sign);                \
        return ordered ? order : u;                                                       \
    }                                                                                     \
                                                                                          \
    static inline uint##bits##_t unmap_##bits(uint##bits##_t m, bool ordered)             \
    {                                                                                     \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));          \
        uint##bits##_t order = (uint##bits##_t)(m & sign ? m ^ sign : ~m);                \
        return ordered ? order : m;                                                       \
    }                                                                                     \
                                                                                          \
    static inline uint##bits##_t zigzag_##bits(uint##bits##_t before,                     \
                                               uint##bits##_t after, bool ordered)        \
    {                                                                                     \
        uint##bits##_t d =                                                                \
            (uint##bits##_t)(map_##bits(after, ordered) - map_##bits(before, ordered));   \
        uint##bits##_t negative = (uint##bits##_t) - (d >> (bits - 1));                   \
        return (uint##bits##_t)((uint##bits##_t)(d << 1) ^ negative);                     \
    }                                                                                     \
                                                                                          \
    static inline uint##bits##_t moved_##bits(uint##bits##_t from, uint##bits##_t z,      \
                                              bool ordered, bool minus)                   \
    {                                                                                     \
        uint##bits##_t d = (uint##bits##_t)((z >> 1) ^ (uint##bits##_t) - (z & 1));       \
        uint##bits##_t m = map_##bits(from, ordered);                                     \
        return unmap_##bits((uint##bits##_t)(minus ? m - d : m + d), ordered);            \
    }                                                                                     \
                                                                                          \
    static uint64_t delta_##bits(bool ordered, bool narrow, const u##bits *before,        \
                                 const u##bits *after, uint8_t *planes, size_t stride,    \
                                 size_t n)                                                \
    {                                                                                     \
        uint64_t n_changed = 0;                                                           \
        uint##bits##_t z[TILE];                                                           \
        for (size_t at = 0; at < n; at += TILE) {                                         \
            size_t len = n - at < TILE ? n - at : TILE;                                   \
            uint##bits##_t changed = 0;                                                   \
            for (size_t i = 0; i < len; i++) {                                            \
                z[i] = zigzag_##bits(before[at + i], after[at + i], ordered);             \
                changed = (uint##bits##_t)(changed + (z[i] != 0));                        \
            }                                                                             \
            if (bits == 8) /* a byte would not hold the count */                          \
                for (size_t i = 0; i < len; i++)                                          \
                    n_changed += z[i] != 0;                                               \
            else                                                                          \
                n_changed += changed;                                                     \
            for (unsigned b = 0; b < (narrow ? 1 : bits / 8); b++)                        \
                for (size_t i = 0; i < len; i++)                                          \
                    planes[b * stride + at + i] =                                         \
                        (uint8_t)(narrow && z[i] > 255 ? 255 : z[i] >> (8 * b));          \
        }                                                                                 \
        return n_changed;                                                                 \
    }                                                                                     \
                                                                                          \
    static void add_##bits(bool ordered, bool narrow, const u##bits *from,                \
                           const uint8_t *planes, size_t stride, bool minus, u##bits *to, \
                           size_t n)                                                      \
    {                                                                                     \
        uint##bits##_t z[TILE];                                                           \
        for (size_t at = 0; at < n; at += TILE) {                                         \
            size_t len = n - at < TILE ? n - at : TILE;                                   \
            for (size_t i = 0; i < len; i++)                                              \
                z[i] = planes[at + i];                                                    \
            for (unsigned b = 1; b < (narrow ? 1 : bits / 8); b++)                        \
                for (size_t i = 0; i < len; i++)                                          \
                    z[i] = (uint##bits##_t)(                                              \
                        z[i] | (uint##bits##_t)planes[b * stride + at + i] << (8 * b));   \
            for (size_t i = 0; i < len; i++)                                              \
                to[at + i] = moved_##bits(from[at + i], z[i], ordered, minus);            \
        }                                                                                 \
    }                                                                                     \
                                                                                          \
    static inline uint8_t key_##bits(uint##bits##_t u, unsigned shift, unsigned e_bits,   \
                                     uint##bits##_t first, uint##bits##_t last)           \
    {                                                                                     \
        uint##bits##_t e = (uint##bits##_t)(u >> shift);                                  \
        e = (uint##bits##_t)(e & (((uint##bits##_t)1 << e_bits) - 1));                    \
        e = (uint##bits##_t)((e > first ? e : first) - first);                            \
        return (uint8_t)(e < last ? e : last);                                            \
    }                                                                                     \
                                                                                          \
    /* shift and e_bits are constants, or the compiler would work in wider lanes. */      \
    static inline __attribute__((always_inline)) void keys_##bits(                        \
        unsigned shift, unsigned e_bits, uint32_t first_key, uint32_t n_keys,             \
        const u##bits *units, uint8_t *keys, size_t n)                                    \
    {                                                                                     \
        uint##bits##_t first = (uint##bits##_t)first_key,                                 \
                       last = (uint##bits##_t)(n_keys - 1);                               \
        for (size_t i = 0; i < n; i++)                                                    \
            keys[i] = key_##bits(units[i], shift, e_bits, first, last);                   \
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

/* The constants let the compiler make one loop for each case. */
static uint64_t delta(unsigned width, bool ordered, bool narrow, const void *before,
                      const void *after, uint8_t *planes, size_t stride, size_t n)
{
    if (narrow)
        return ordered
                   ? BY_WIDTH(width, delta, true, true, before, after, planes, stride, n)
                   : BY_WIDTH(width, delta, false, true, before, after, planes, stride, n);
    return ordered ? BY_WIDTH(width, delta, true, false, before, after, planes, stride, n)
                   : BY_WIDTH(width, delta, false, false, before, after, planes, stride, n);
}

static void add(unsigned width, bool ordered, bool narrow, const void *from,
                const uint8_t *planes, size_t stride, bool minus, void *to, size_t n)
{
    if (narrow && ordered)
        BY_WIDTH(width, add, true, true, from, planes, stride, minus, to, n);
    else if (narrow)
        BY_WIDTH(width, add, false, true, from, planes, stride, minus, to, n);
    else if (ordered)
        BY_WIDTH(width, add, true, false, from, planes, stride, minus, to, n);
    else
        BY_WIDTH(width, add, false, false, from, planes, stride, minus, to, n);
}

static void keys(unsigned width, const struct perta_grouping *g, const void *units,
                 uint8_t *to, size_t n)
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

static void clamp(const uint8_t *planes, size_t stride, unsigned n_planes, uint8_t most,
                  uint8_t *fields, size_t n)
{
    for (size_t i = 0; i < n; i++)
        fields[i] = planes[i] < most ? planes[i] : most;
    for (unsigned b = 1; b < n_planes; b++)
        for (size_t i = 0; i < n; i++)
            fields[i] = planes[b * stride + i] ? most : fields[i];
}

static inline void pack_bits(unsigned bits, const uint8_t *x, size_t n, uint8_t *to)
{
    size_t m = (n * bits + 7) / 8;
    memset(to, 0, m);
    for (size_t at = 0; at < n; at += m, x += m) {
        size_t len = n - at < m ? n - at : m;
        unsigned shift = (unsigned)(at / m) * bits;
        for (size_t i = 0; i < len; i++)
            to[i] = (uint8_t)(to[i] | x[i] << shift);
    }
}

static inline void unpack_bits(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x)
{
    size_t m = (n * bits + 7) / 8;
    uint8_t mask = (uint8_t)((1u << bits) - 1);
    for (size_t at = 0; at < n; at += m, x += m) {
        size_t len = n - at < m ? n - at : m;
        unsigned shift = (unsigned)(at / m) * bits;
        for (size_t i = 0; i < len; i++)
            x[i] = packed[i] >> shift & mask;
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

/* ---- bytes about ---- */

#ifdef __AVX512VBMI2__
/* 64 at a time, with the instructions that are there for it; no compiler finds them. */

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

/* The first n of 64, for what is left at the end. */
static inline __mmask64 first(size_t n)
{
    return (1ull << n) - 1;
}

static inline __m512i load_first(const uint8_t *x, size_t n)
{
    return _mm512_maskz_loadu_epi8(first(n), x);
}

static size_t occurs(const uint8_t *x, uint8_t value, size_t n)
{
    size_t found = 0, at = 0;
    for (; at + 64 <= n; at += 64)
        found += ones(_mm512_cmpeq_epi8_mask(load(x + at), splat(value)));
    return found + ones(_mm512_mask_cmpeq_epi8_mask(
                       first(n - at), load_first(x + at, n - at), splat(value)));
}

static void count(const uint8_t *x, size_t n, unsigned n_keys, uint32_t *counts)
{
    for (unsigned g = 0; g < n_keys; g++)
        counts[g] += (uint32_t)occurs(x, (uint8_t)g, n);
}

static inline void scatter_64(__mmask64 valid, __m512i v, __m512i k, unsigned n_keys,
                              uint8_t **to)
{
    for (unsigned g = 0; g < n_keys; g++) {
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid, k, splat((uint8_t)g));
        _mm512_storeu_si512(to[g], _mm512_maskz_compress_epi8(mask, v));
        to[g] += ones(mask);
    }
}

static void scatter(const uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys,
                    uint8_t **to)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        scatter_64(~0ull, load(x + at), load(of + at), n_keys, to);
    if (at < n)
        scatter_64(first(n - at), load_first(x + at, n - at), load_first(of + at, n - at),
                   n_keys, to);
}

static inline __m512i gather_64(__mmask64 valid, __m512i k, unsigned n_keys,
                                const uint8_t **from)
{
    __m512i v = _mm512_setzero_si512();
    for (unsigned g = 0; g < n_keys; g++) {
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid, k, splat((uint8_t)g));
        v = _mm512_mask_expand_epi8(v, mask, load(from[g]));
        from[g] += ones(mask);
    }
    return v;
}

static void gather(uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys,
                   const uint8_t **from)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        _mm512_storeu_si512(x + at, gather_64(~0ull, load(of + at), n_keys, from));
    if (at < n)
        _mm512_mask_storeu_epi8(
            x + at, first(n - at),
            gather_64(first(n - at), load_first(of + at, n - at), n_keys, from));
}

static size_t pick(const uint8_t *x, const uint8_t *of, uint8_t key, size_t n, uint8_t *to)
{
    uint8_t *start = to;
    size_t at = 0;
    for (; at + 64 <= n; at += 64) {
        __mmask64 mask = _mm512_cmpeq_epi8_mask(load(of + at), splat(key));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(mask, load(x + at)));
        to += ones(mask);
    }
    for (; at < n; at++)
        if (of[at] == key)
            *to++ = x[at];
    return (size_t)(to - start);
}

static void put(uint8_t *x, const uint8_t *of, uint8_t key, size_t n, const uint8_t *from)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64) {
        __mmask64 mask = _mm512_cmpeq_epi8_mask(load(of + at), splat(key));
        _mm512_storeu_si512(x + at,
                            _mm512_mask_expand_epi8(load(x + at), mask, load(from)));
        from += ones(mask);
    }
    for (; at < n; at++)
        if (of[at] == key)
            x[at] = *from++;
}

static void masks(const uint8_t *x, uint8_t value, size_t n, uint64_t *to)
{
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        *to++ = _mm512_cmpeq_epi8_mask(load(x + at), splat(value));
    if (at < n)
        *to = _mm512_mask_cmpeq_epi8_mask(first(n - at), load_first(x + at, n - at),
                                          splat(value));
}

#else

static void count(const uint8_t *x, size_t n, unsigned n_keys, uint32_t *counts)
{
    for (; n; n--, x++)
        counts[*x] += *x < n_keys;
}

static size_t occurs(const uint8_t *x, uint8_t value, size_t n)
{
    size_t found = 0;
    for (size_t at = 0; at < n; at += 128) { /* a byte holds the count */
        uint8_t few = 0;
        for (size_t i = at; i < (n - at < 128 ? n : at + 128); i++)
            few = (uint8_t)(few + (x[i] == value));
        found += few;
    }
    return found;
}

static void scatter(const uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys,
                    uint8_t **to)
{
    (void)n_keys;
    for (size_t i = 0; i < n; i++)
        *to[of[i]]++ = x[i];
}

static void gather(uint8_t *x, const uint8_t *of, size_t n, unsigned n_keys,
                   const uint8_t **from)
{
    (void)n_keys;
    for (size_t i = 0; i < n; i++)
        x[i] = *from[of[i]]++;
}

static size_t pick(const uint8_t *x, const uint8_t *of, uint8_t key, size_t n, uint8_t *to)
{
    size_t found = 0;
    for (size_t i = 0; i < n; i++) {
        to[found] = x[i];
        found += of[i] == key;
    }
    return found;
}

static void put(uint8_t *x, const uint8_t *of, uint8_t key, size_t n, const uint8_t *from)
{
    for (size_t i = 0; i < n; i++) {
        bool hit = of[i] == key;
        x[i] = hit ? *from : x[i];
        from += hit;
    }
}

static void masks(const uint8_t *x, uint8_t value, size_t n, uint64_t *to)
{
    for (size_t at = 0; at < n; at += 64, to++) {
        size_t len = n - at < 64 ? n - at : 64;
        *to = 0;
        for (size_t i = 0; i < len; i++)
            *to |= (uint64_t)(x[at + i] == value) << i;
    }
}

#endif

const struct perta_codec_kernels PERTA_ISA_NAME(perta_codec_kernels) = {
    delta,  add,  keys, cross, count, occurs, scatter,
    gather, pick, put,  clamp, pack,  unpack, masks};
