/* exponential.h - e^x for kernels, which the compiler vectorises. */
#ifndef PERTA_ESTIMATORS_COMPUTE_EXPONENTIAL_H
#define PERTA_ESTIMATORS_COMPUTE_EXPONENTIAL_H

#include "io/format/convert.h"

/* e^x as Cephes' expf has it, 2^n e^r with |r| <= ln 2 / 2, within 2 units in the last place.
 * Below -87 it is 0, above 88 it is e^88. NaN stays NaN. */
static inline float perta_exponential(float x)
{
    const float rounder = 0x1.8p23f; /* x + this - this rounds x to an integer */
    float c = x < -87.0f ? -87.0f : x;
    c = c > 88.0f ? 88.0f : c;
    float n = (c * 1.44269504088896341f + rounder) - rounder;
    float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * (r * r) + r) + 1.0f;
    float power = perta_f32_from_bits(perta_f32_bits(n + (rounder + 127.0f)) << 23);
    return x < -87.0f ? 0.0f : y * power;
}

#endif
