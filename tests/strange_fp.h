/* strange_fp.h - floating-point environments that a host program may have set: every rounding
 * direction, and on x86 flush-to-zero, denormals-are-zero and both of them, with each. */
#ifndef PERTA_TESTS_STRANGE_FP_H
#define PERTA_TESTS_STRANGE_FP_H

#include <fenv.h>
#include <stdbool.h>

#ifdef __SSE2__
#include <xmmintrin.h>
#define STRANGE_FP_FLUSHES 4u
#else
#define STRANGE_FP_FLUSHES 1u
#endif

static const int strange_fp_roundings[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
#define N_STRANGE_FP (4u * STRANGE_FP_FLUSHES) /* number 0 is the default environment */

static inline void strange_fp_set(unsigned number)
{
    fesetround(strange_fp_roundings[number % 4]);
#ifdef __SSE2__
    unsigned flush = (number / 4 & 1 ? 0x8000u : 0) | (number / 4 & 2 ? 0x0040u : 0);
    _mm_setcsr((_mm_getcsr() & ~0x8040u) | flush);
#endif
}

/* The whole environment, with raised exceptions, for comparison before and after a call. */
static inline unsigned strange_fp_state(void)
{
    unsigned state = (unsigned)fegetround() << 16;
#ifdef __SSE2__
    state ^= _mm_getcsr();
#endif
    return state;
}

static inline bool strange_fp_is_default(void)
{
    bool flushes = false;
#ifdef __SSE2__
    flushes = _mm_getcsr() & 0x8040u;
#endif
    return fegetround() == FE_TONEAREST && !flushes;
}

#endif
