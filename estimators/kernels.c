/* Compiled once for each instruction set, see io/isa.h. Loops are written so that gcc and
 * clang vectorise them: everything computed, then selected. */
#if defined(__GNUC__) && !defined(__clang__)
/* Nobody reads errno or the exception flags here; values stay the same, loops vectorise. */
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include "estimators/kernels.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "estimators/pow.h"

/* Said again, that they read and write no memory (errno), or loops with them stay scalar. */
float sqrtf(float x) __attribute__((const));
double sqrt(double x) __attribute__((const));

typedef uint16_t __attribute__((aligned(1), may_alias)) u16_any;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32_any;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64_any;
typedef float __attribute__((aligned(1), may_alias)) f32_any;
typedef double __attribute__((aligned(1), may_alias)) f64_any;

/* Width of one element of an editable dtype. */
static size_t width_bytes(enum perta_dtype dtype)
{
    return dtype == PERTA_F64 ? 8 : dtype == PERTA_F32 ? 4 : 2;
}

#define real float
#define REAL(name) name##_f32
#define REAL_BITS perta_f32_bits
#define REAL_EXPONENT 0x7f800000u
#define REAL_FABS fabsf
#define REAL_SQRT sqrtf
#include "estimators/kernels_edit.h"
#undef real
#undef REAL
#undef REAL_BITS
#undef REAL_EXPONENT
#undef REAL_FABS
#undef REAL_SQRT

#define real double
#define REAL(name) name##_f64
#define REAL_BITS perta_f64_bits
#define REAL_EXPONENT 0x7ff0000000000000u
#define REAL_FABS fabs
#define REAL_SQRT sqrt
#define REAL_IS_F64
#include "estimators/kernels_edit.h"

/* (n) each. sum + carry grows by x: Knuth's TwoSum. */
static void two_sum(float *restrict sum, float *restrict carry, const float *restrict x,
                    size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float s = sum[i], t = s + x[i], z = t - s;
        carry[i] += (s - (t - z)) + (x[i] - z);
        sum[i] = t;
    }
}

static uint64_t running_add(struct perta_running *running,
                            const struct perta_view *gradient)
{
    float x[PERTA_TILE]; /* (n) */
    for (uint64_t first = 0; first < running->n; first += PERTA_TILE) {
        uint64_t left = running->n - first;
        size_t n = left < PERTA_TILE ? (size_t)left : PERTA_TILE;
        load_f32(gradient, first, n, x);
        if (any_bad_f32(x, n, false)) {
            size_t i = 0;
            while (!is_bad_f32(x[i], false))
                i++;
            return first + i;
        }
        if (running->sum)
            two_sum(running->sum + first, running->carry + first, x, n);
        if (running->sq_sum) {
            for (size_t i = 0; i < n; i++)
                x[i] *= x[i];
            two_sum(running->sq_sum + first, running->sq_carry + first, x, n);
        }
    }
    return UINT64_MAX;
}

const struct perta_kernels PERTA_ISA_NAME(perta_kernels) = {edit_f32, edit_f64,
                                                            running_add};
