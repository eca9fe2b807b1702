/* pow.h - x^p from + - * / and bit operations alone, so that every CPU and NumPy give the same bits
 * (libm's powf does not). Spec, coefficients and accuracy: docs/method.md. */
#ifndef PERTA_ESTIMATORS_EDIT_POW_H
#define PERTA_ESTIMATORS_EDIT_POW_H

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "io/format/convert.h"

#define PERTA_SQRT_HALF_BITS 0x3fe6a09e667f3bcdu /* sqrt(1/2) as float64 */
#define PERTA_ROUNDER \
    0x1.8p52 /* adding and then subtracting this rounds to an
                                                  * integer */

/* 2^n for a whole n in [-1022, 1023]. */
static inline double perta_two_to(double n)
{
    return perta_f64_from_bits(perta_f64_bits(n + (PERTA_ROUNDER + 1023)) << 52);
}

/* log2(m) for m in [sqrt(1/2), sqrt(2)): 2 atanh((m-1)/(m+1)) / ln 2, odd series. */
static inline double perta_log2_near_1(double m)
{
    double s = (m - 1) / (m + 1), z = s * s;
    double c = 1.0 / 21;
    c = c * z + 1.0 / 19;
    c = c * z + 1.0 / 17;
    c = c * z + 1.0 / 15;
    c = c * z + 1.0 / 13;
    c = c * z + 1.0 / 11;
    c = c * z + 1.0 / 9;
    c = c * z + 1.0 / 7;
    c = c * z + 1.0 / 5;
    c = c * z + 1.0 / 3;
    c = c * z + 1.0;
    return (s * c) * 0x1.71547652b82fep+1; /* 2 / ln 2 */
}

/* 2^f for |f| up to about 1/2: the series of e^(f ln 2). */
static inline double perta_exp2_near_0(double f)
{
    double t = f * 0x1.62e42fefa39efp-1; /* ln 2 */
    double c = 1.0 / 6227020800;
    c = c * t + 1.0 / 479001600;
    c = c * t + 1.0 / 39916800;
    c = c * t + 1.0 / 3628800;
    c = c * t + 1.0 / 362880;
    c = c * t + 1.0 / 40320;
    c = c * t + 1.0 / 5040;
    c = c * t + 1.0 / 720;
    c = c * t + 1.0 / 120;
    c = c * t + 1.0 / 24;
    c = c * t + 1.0 / 6;
    c = c * t + 1.0 / 2;
    c = c * t + 1.0;
    return c * t + 1.0;
}

/* x^p for x >= 0 (also infinity, not NaN) and p > 0. 0^p is 0; overflow gives infinity. */
static inline double perta_pow(double x, double p)
{
    double cap = p < 1e300 ? p : 1e300; /* keeps p * k finite; this changes a result only for x = 1,
                                         * where any p gives 1 */
    double scaled = x < DBL_MIN ? x * 0x1p54 : x;
    double unscale = x < DBL_MIN ? 1023.0 + 54 : 1023.0;
    /* Split x = 2^k m. Adding this constant moves the step of the exponent from 2 to sqrt(2). */
    uint64_t u = perta_f64_bits(scaled) + (0x3ff0000000000000u - PERTA_SQRT_HALF_BITS);
    double k = (perta_f64_from_bits((u >> 52) | 0x4330000000000000u) - 0x1p52) - unscale;
    double m = perta_f64_from_bits((u & 0x000fffffffffffffu) + PERTA_SQRT_HALF_BITS);
    double whole = cap * k, part = cap * perta_log2_near_1(m);
    double y = whole + part;
    double clamped = y < -1100 ? -1100 : y;
    clamped = clamped > 1100 ? 1100 : clamped;
    double n = (clamped + PERTA_ROUNDER) - PERTA_ROUNDER;
    double half = (clamped * 0.5 + PERTA_ROUNDER) - PERTA_ROUNDER;
    double f = (whole - n) + part;
    double result = (perta_exp2_near_0(f) * perta_two_to(half)) * perta_two_to(n - half);
    result = y >= 1025 ? (double)INFINITY : result;
    result = y <= -1080 ? 0 : result;
    result = x == 0 ? 0 : result;
    return x > DBL_MAX ? x : result;
}

#endif
