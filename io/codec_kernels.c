/* Compiled once for each instruction set, see io/isa.h. Spec: docs/patch-format.md */
#include "io/codec_kernels.h"

#include "io/isa.h"

/* The four functions for units of type u<bits>. On little-endian machines byte b of a unit
 * is its bits 8b to 8b + 7. */
#define DEFINE(bits)                                                                            \
    typedef uint##bits##_t __attribute__((aligned(1), may_alias)) u##bits;                      \
                                                                                                \
    static inline uint##bits##_t map_##bits(uint##bits##_t u, bool ordered)                     \
    {                                                                                           \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));                \
        uint##bits##_t order = (uint##bits##_t)(u & sign ? ~u : u | sign);                      \
        return ordered ? order : u;                                                             \
    }                                                                                           \
                                                                                                \
    static inline uint##bits##_t unmap_##bits(uint##bits##_t m, bool ordered)                   \
    {                                                                                           \
        uint##bits##_t sign = (uint##bits##_t)((uint##bits##_t)1 << (bits - 1));                \
        uint##bits##_t order = (uint##bits##_t)(m & sign ? m ^ sign : ~m);                      \
        return ordered ? order : m;                                                             \
    }                                                                                           \
                                                                                                \
    static uint64_t delta_##bits(bool ordered, const u##bits *before, const u##bits *after,     \
                                 u##bits *z, size_t n)                                          \
    {                                                                                           \
        uint64_t n_changed = 0;                                                                 \
        for (size_t i = 0; i < n; i++) {                                                        \
            uint##bits##_t d =                                                                  \
                (uint##bits##_t)(map_##bits(after[i], ordered) - map_##bits(before[i], ordered)); \
            uint##bits##_t negative = (uint##bits##_t)-(d >> (bits - 1));                       \
            z[i] = (uint##bits##_t)((uint##bits##_t)(d << 1) ^ negative);                       \
            n_changed += d != 0;                                                                \
        }                                                                                       \
        return n_changed;                                                                       \
    }                                                                                           \
                                                                                                \
    static void add_##bits(bool ordered, const u##bits *from, const u##bits *z, bool minus,     \
                           u##bits *to, size_t n)                                               \
    {                                                                                           \
        for (size_t i = 0; i < n; i++) {                                                        \
            uint##bits##_t d = (uint##bits##_t)((z[i] >> 1) ^ (uint##bits##_t)-(z[i] & 1));     \
            uint##bits##_t m = map_##bits(from[i], ordered);                                    \
            m = (uint##bits##_t)(minus ? m - d : m + d);                                        \
            to[i] = unmap_##bits(m, ordered);                                                   \
        }                                                                                       \
    }                                                                                           \
                                                                                                \
    static void split_##bits(const u##bits *z, uint8_t *planes, size_t n)                       \
    {                                                                                           \
        for (unsigned b = 0; b < bits / 8; b++)                                                 \
            for (size_t i = 0; i < n; i++)                                                      \
                planes[b * n + i] = (uint8_t)(z[i] >> (8 * b));                                 \
    }                                                                                           \
                                                                                                \
    static void join_##bits(const uint8_t *planes, u##bits *z, size_t n)                        \
    {                                                                                           \
        for (size_t i = 0; i < n; i++) {                                                        \
            uint##bits##_t unit = 0;                                                            \
            for (unsigned b = 0; b < bits / 8; b++)                                             \
                unit |= (uint##bits##_t)((uint##bits##_t)planes[b * n + i] << (8 * b));         \
            z[i] = unit;                                                                        \
        }                                                                                       \
    }

DEFINE(8)
DEFINE(16)
DEFINE(32)
DEFINE(64)

#define BY_WIDTH(width, name, ...)                                                              \
    ((width) == 1   ? name##_8(__VA_ARGS__)                                                     \
     : (width) == 2 ? name##_16(__VA_ARGS__)                                                    \
     : (width) == 4 ? name##_32(__VA_ARGS__)                                                    \
                    : name##_64(__VA_ARGS__))

/* The constants let the compiler make one loop for each case. */
static uint64_t delta(unsigned width, bool ordered, const void *before, const void *after,
                      void *z, size_t n)
{
    return ordered ? BY_WIDTH(width, delta, true, before, after, z, n)
                   : BY_WIDTH(width, delta, false, before, after, z, n);
}

static void add(unsigned width, bool ordered, const void *from, const void *z, int sign,
                void *to, size_t n)
{
    if (ordered)
        BY_WIDTH(width, add, true, from, z, sign < 0, to, n);
    else
        BY_WIDTH(width, add, false, from, z, sign < 0, to, n);
}

static void split(unsigned width, const void *z, uint8_t *planes, size_t n)
{
    BY_WIDTH(width, split, z, planes, n);
}

static void join(unsigned width, const uint8_t *planes, void *z, size_t n)
{
    BY_WIDTH(width, join, planes, z, n);
}

const struct perta_codec_kernels PERTA_ISA_NAME(perta_codec_kernels) = {delta, add, split, join};
