/* convert.h - F16 and BF16 to float32 and back, in plain C that vectorises.
 * Spec: docs/method.md. Widening is exact. Narrowing rounds to nearest, ties to even; it
 * keeps subnormals, overflows to infinity and keeps NaN a (quiet) NaN. */
#ifndef PERTA_IO_FORMAT_CONVERT_H
#define PERTA_IO_FORMAT_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline uint32_t perta_f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float perta_f32_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline uint64_t perta_f64_bits(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline double perta_f64_from_bits(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float perta_f32_from_bf16(uint16_t h)
{
    return perta_f32_from_bits((uint32_t)h << 16);
}

static inline float perta_f32_from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t mag = (uint32_t)(h & 0x7fff) << 13;
    uint32_t normal = mag + (112u << 23);
    /* Place the fraction after 2^-14, then subtract 2^-14: exact. */
    float fraction = perta_f32_from_bits(mag | (113u << 23)) - 0x1p-14f;
    uint32_t u = mag < (1u << 23) ? perta_f32_bits(fraction) : normal;
    u = mag >= (31u << 23) ? mag | 0x7f800000 : u;
    return perta_f32_from_bits(u | sign);
}

static inline uint16_t perta_bf16_from_f32(float x)
{
    uint32_t u = perta_f32_bits(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uint32_t quiet = (u >> 16) | 0x40;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

static inline uint16_t perta_f16_from_f32(float x)
{
    uint32_t u = perta_f32_bits(x);
    uint32_t sign = (u >> 16) & 0x8000;
    uint32_t mag = u & 0x7fffffff;
    /* From 65520 on, the carry makes the exponent 31, which is infinity. */
    uint32_t normal = (mag - (112u << 23) + 0xfff + ((mag >> 13) & 1)) >> 13;
    /* Next to 0.5 the last place is 2^-24, as in an F16 subnormal: the addition rounds. */
    uint32_t small = perta_f32_bits(perta_f32_from_bits(mag) + 0.5f) - (126u << 23);
    uint32_t h = mag < (113u << 23) ? small : normal;
    h = mag >= (143u << 23) ? 0x7c00 : h;
    h = mag > 0x7f800000 ? 0x7e00 | ((mag >> 13) & 0x3ff) : h;
    return (uint16_t)(h | sign);
}

#endif
