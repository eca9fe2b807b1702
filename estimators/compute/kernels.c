/* Compiled once for each instruction set, see io/isa.h. Loops are written so that gcc and clang
 * vectorise them: everything computed, then selected; sums and maxima in lanes. */
#if defined(__GNUC__) && !defined(__clang__)
/* Neither errno nor exception flags are read here. These options change no value, and let loops
 * vectorise. */
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include "estimators/compute/kernels.h"

#include "estimators/compute/exponential.h"
#include "io/format/convert.h"
#include "io/isa.h"

typedef uint16_t __attribute__((aligned(1), may_alias)) u16_any;
typedef float __attribute__((aligned(1), may_alias)) f32_any;

#define LANES 16 /* element i is added to lane i % 16; in the end, lanes are added in order */

/* ---- conversion ---- */

static void to_f32(float *to, const void *from, enum perta_dtype dtype, size_t n)
{
    const u16_any *u16 = from;
    const f32_any *f32 = from;
    if (dtype == PERTA_BF16)
        for (size_t i = 0; i < n; i++)
            to[i] = perta_f32_from_bf16(u16[i]);
    else if (dtype == PERTA_F16)
        for (size_t i = 0; i < n; i++)
            to[i] = perta_f32_from_f16(u16[i]);
    else
        for (size_t i = 0; i < n; i++)
            to[i] = f32[i];
}

static void to_bf16(uint16_t *to, const void *from, enum perta_dtype dtype, size_t n)
{
    const u16_any *u16 = from;
    const f32_any *f32 = from;
    if (dtype == PERTA_BF16)
        for (size_t i = 0; i < n; i++)
            to[i] = u16[i];
    else if (dtype == PERTA_F16)
        for (size_t i = 0; i < n; i++)
            to[i] = perta_bf16_from_f32(perta_f32_from_f16(u16[i]));
    else
        for (size_t i = 0; i < n; i++)
            to[i] = perta_bf16_from_f32(f32[i]);
}

/* ---- sums ---- */

static double add_lanes(const double *lanes)
{
    double sum = 0;
    for (size_t l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

static double dot(const float *a, const float *b, size_t n)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] += (double)a[i + l] * (double)b[i + l];
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] += (double)a[i] * (double)b[i];
    return add_lanes(lanes);
}

static double dot_of_product(const float *a, const float *b, const float *c, size_t n)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] += (double)(a[i + l] * b[i + l]) * (double)c[i + l];
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] += (double)(a[i] * b[i]) * (double)c[i];
    return add_lanes(lanes);
}

static double sum(const float *x, size_t n)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] += (double)x[i + l];
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] += (double)x[i];
    return add_lanes(lanes);
}

static double sum_deviations(const float *x, double mean, size_t n)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] += ((double)x[i + l] - mean) * ((double)x[i + l] - mean);
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] += ((double)x[i] - mean) * ((double)x[i] - mean);
    return add_lanes(lanes);
}

static void layernorm_sums(double sums[2], const float *w, const float *dy, const float *x,
                           float mean, size_t n)
{
    double first[LANES] = {0}, second[LANES] = {0};
    for (size_t i = 0; i < n; i += LANES)
        for (size_t l = 0; l < LANES && i + l < n; l++) {
            double g = (double)(w[i + l] * dy[i + l]);
            first[l] += g;
            second[l] += g * (double)(x[i + l] - mean);
        }
    sums[0] = add_lanes(first);
    sums[1] = add_lanes(second);
}

static void add_products(double *restrict sums, const float *restrict dy, const float *restrict x,
                         float mean, float rstd, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sums[i] += (double)dy[i] * (double)((x[i] - mean) * rstd);
}

static void add(double *restrict sums, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sums[i] += (double)x[i];
}

static void add_squares(double *restrict sums, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sums[i] += (double)x[i] * (double)x[i];
}

static unsigned divide(float *restrict means, const double *restrict sums, double of, size_t n)
{
    unsigned bad = 0;
    for (size_t i = 0; i < n; i++) {
        means[i] = (float)(sums[i] / of);
        bad |= (perta_f32_bits(means[i]) & 0x7f800000) == 0x7f800000;
    }
    return bad;
}

/* ---- exponentials ---- */

static float largest(const float *x, size_t n, float least)
{
    float lanes[LANES], most = least;
    size_t i = 0;
    for (size_t l = 0; l < LANES; l++)
        lanes[l] = least;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] = x[i] > lanes[l] ? x[i] : lanes[l];
    for (size_t l = 0; l < LANES; l++)
        most = lanes[l] > most ? lanes[l] : most;
    return most;
}

#define TILE 256 /* exponentials at a time; they are summed in float64 */

static void exponentials_of(float *restrict y, const float *x, float most, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = perta_exponential(x[i] - most);
}

static void add_tile(double *lanes, const float *x, size_t n)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lanes[l] += (double)x[i + l];
    for (size_t l = 0; i < n; i++, l++)
        lanes[l] += (double)x[i];
}

static double exponentials(float *y, const float *x, float most, size_t n)
{
    double lanes[LANES] = {0};
    float tile[TILE];
    for (size_t first = 0; first < n; first += TILE) {
        size_t m = n - first < TILE ? n - first : TILE;
        exponentials_of(tile, x + first, most, m);
        add_tile(lanes, tile, m);
        memcpy(y + first, tile, m * sizeof *y);
    }
    return add_lanes(lanes);
}

static double sum_exponentials(const float *x, float most, size_t n)
{
    double lanes[LANES] = {0};
    float tile[TILE];
    for (size_t first = 0; first < n; first += TILE) {
        size_t m = n - first < TILE ? n - first : TILE;
        exponentials_of(tile, x + first, most, m);
        add_tile(lanes, tile, m);
    }
    return add_lanes(lanes);
}

static void add_moments(double moments[2], const float *x, float most, size_t n)
{
    double first[LANES] = {0}, second[LANES] = {0};
    float tile[TILE];
    for (size_t at = 0; at < n; at += TILE) {
        size_t m = n - at < TILE ? n - at : TILE, i = 0;
        exponentials_of(tile, x + at, most, m);
        for (; i < m; i += LANES)
            for (size_t l = 0; l < LANES && i + l < m; l++) {
                double d = (double)(x[at + i + l] - most), term = (double)tile[i + l] * d;
                first[l] += term;
                second[l] += term * d;
            }
    }
    moments[0] += add_lanes(first);
    moments[1] += add_lanes(second);
}

static void softmax_backward(float *restrict dp, const float *restrict p, float mean, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dp[i] = p[i] * (dp[i] - mean);
}

/* As Cephes' tanhf has it, within 2 units in the last place. NaN stays NaN. */
static inline float hyperbolic_tangent(float x)
{
    float magnitude = x < 0 ? -x : x, s = x * x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    float near = p * s * x + x;
    float far = 1 - 2 / (perta_exponential(2 * magnitude) + 1);
    far = x < 0 ? -far : far;
    return magnitude < 0.625f ? near : far;
}

static void softcap(float *x, float cap, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = cap * hyperbolic_tangent(x[i] / cap);
}

static void softcap_backward(float *restrict d, const float *restrict y, float cap, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float t = y[i] / cap;
        d[i] *= 1 - t * t;
    }
}

static void scaled_exponentials(float *x, float most, float scale, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = scale * perta_exponential(x[i] - most);
}

const struct perta_row_kernels PERTA_ISA_NAME(perta_row_kernels) = {
    .to_f32 = to_f32,
    .to_bf16 = to_bf16,
    .dot = dot,
    .dot_of_product = dot_of_product,
    .sum = sum,
    .sum_deviations = sum_deviations,
    .layernorm_sums = layernorm_sums,
    .add_products = add_products,
    .add = add,
    .add_squares = add_squares,
    .divide = divide,
    .largest = largest,
    .exponentials = exponentials,
    .sum_exponentials = sum_exponentials,
    .add_moments = add_moments,
    .softmax_backward = softmax_backward,
    .softcap = softcap,
    .softcap_backward = softcap_backward,
    .scaled_exponentials = scaled_exponentials,
};
