/* This file is compiled once for each instruction set (io/isa.h). Loops compute every case and then
 * select, so that gcc and clang vectorise them. */
#if defined(__GNUC__) && !defined(__clang__)
/* Nothing here reads errno or the floating-point exception flags. Without them loops vectorise, and
 * results stay the same. */
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include "estimators/edit/kernels.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "estimators/edit/pow.h"

/* Declared again as functions that access no memory (errno): otherwise loops that call them stay
 * scalar. */
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
#include "estimators/edit/kernels_edit.h"
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
#include "estimators/edit/kernels_edit.h"

/* Add x to sum + carry by Knuth's TwoSum; all arrays (n). */
static void two_sum(float *restrict sum, float *restrict carry, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float s = sum[i], t = s + x[i], z = t - s;
        carry[i] += (s - (t - z)) + (x[i] - z);
        sum[i] = t;
    }
}

static uint64_t running_add(struct perta_running *running, const struct perta_view *gradient)
{
    float x[PERTA_TILE]; /* (n) */
    for (uint64_t first = 0; first < running->n; first += PERTA_TILE) {
        uint64_t left = running->n - first;
        size_t n = left < PERTA_TILE ? (size_t)left : PERTA_TILE;
        load_f32(gradient, first, n, x);
        if (any_bad_f32(x, n, false)) {
            size_t i = 0;
            while (
                !is_bad_f32(x[i], false)) /* NOLINT(clang-analyzer-core.CallAndMessage): one is */
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

/* tau (n) of one row: row holds its r floats of B; columns (r, width) points to the column of the
 * first of the n elements. */
static void lora_row(const float *row, const float *columns, uint64_t r, uint64_t width,
                     float scaling, size_t n, float *restrict tau)
{
    float sum[PERTA_TILE] = {0}; /* (n) */
    uint64_t k = 0;
    for (; k + 4 <= r; k += 4) {
        const float *a = columns + k * width, *b = a + width, *c = b + width, *d = c + width;
        float p = row[k], q = row[k + 1], s = row[k + 2], t = row[k + 3];
        for (size_t j = 0; j < n; j++)
            sum[j] = (((sum[j] + p * a[j]) + q * b[j]) + s * c[j]) + t * d[j];
    }
    for (; k < r; k++)
        for (size_t j = 0; j < n; j++)
            sum[j] += row[k] * columns[k * width + j];
    for (size_t j = 0; j < n; j++)
        tau[j] = scaling * sum[j];
}

/* Works through the columns tile by tile: a tile stays in the second-level cache while all
 * rows use it. */
static void lora_tau(const struct perta_lora *lora, uint64_t first_elem, uint64_t n, float *tau)
{
    uint64_t end = first_elem + n, width = lora->width;
    for (uint64_t left = 0; left < width; left += PERTA_TILE) {
        uint64_t right = width - left < PERTA_TILE ? width : left + PERTA_TILE;
        for (uint64_t row = first_elem / width; row * width < end; row++) {
            uint64_t from = row * width + left, to = row * width + right;
            from = from < first_elem ? first_elem : from;
            to = to > end ? end : to;
            if (from < to)
                lora_row(lora->rows + (row - lora->first_row) * lora->r,
                         lora->columns + from % width, lora->r, width, lora->scaling,
                         (size_t)(to - from), tau + (from - first_elem));
        }
    }
}

const struct perta_kernels PERTA_ISA_NAME(perta_kernels) = {edit_f32, edit_f64, running_add,
                                                            lora_tau};
