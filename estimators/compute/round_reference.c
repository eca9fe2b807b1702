/* Rounding in plain loops, an element at a time, as the formats' definitions have it. It shares no
 * code with the kernels. */
#include <math.h>
#include <string.h>

#include "estimators/compute/round.h"
#include "io/format/convert.h"

static const float nf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/* ---- elements ---- */

static float half(float x)
{
    return perta_f32_from_f16(perta_f16_from_f32(x));
}

static float own(enum perta_dtype dtype, float x)
{
    return dtype == PERTA_F32    ? x
           : dtype == PERTA_BF16 ? perta_f32_from_bf16(perta_bf16_from_f32(x))
                                 : half(x);
}

static float get(enum perta_dtype dtype, const uint8_t *w, size_t i)
{
    float x;
    uint16_t u;
    if (dtype == PERTA_F32) {
        memcpy(&x, w + i * sizeof x, sizeof x);
        return x;
    }
    memcpy(&u, w + i * sizeof u, sizeof u);
    return dtype == PERTA_BF16 ? perta_f32_from_bf16(u) : perta_f32_from_f16(u);
}

static void set(enum perta_dtype dtype, uint8_t *w, size_t i, float x)
{
    if (dtype == PERTA_F32) {
        memcpy(w + i * sizeof x, &x, sizeof x);
        return;
    }
    uint16_t u = dtype == PERTA_BF16 ? perta_bf16_from_f32(x) : perta_f16_from_f32(x);
    memcpy(w + i * sizeof u, &u, sizeof u);
}

/* ---- formats ---- */

/* What the elements of a block have in common. */
struct block {
    float most;     /* the largest absolute value */
    float max;      /* the first element that has it */
    bool negatives; /* there are some */
};

/* The nearest of the table's values; of two that are as near, the smaller. */
static float to_nf4(float x, const struct block *b)
{
    float scaled = x * (1.0f / fmaxf(b->most, 1e-38f));
    int v = 15;
    while (v > 0 && !(scaled > (nf4[v - 1] + nf4[v]) / 2))
        v--;
    return nf4[v] * b->most;
}

static float to_int8(float x, const struct block *b)
{
    if (b->most == 0)
        return 0;
    int q = (int)rintf(x * (1.0f / b->most * 127.0f));
    return (float)q * b->most * 7.874015718698502e-3f;
}

/* Codes are 0 to 15, and 8 is zero. */
static float to_int4(float x, const struct block *b)
{
    float scale = ((b->negatives ? b->most : 0.0f) + b->most) / 15.0f;
    if (scale == 0)
        return 0;
    float q = rintf(x / scale) + 8.0f;
    return scale * (fminf(fmaxf(q, 0), 15) - 8.0f);
}

static float to_q4_0(float x, const struct block *b)
{
    float d = b->max / -8.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
    float q = fmaxf(0, fminf(15, truncf(x * inverse + 8.5f)));
    return (float)((int)q - 8) * half(d);
}

/* Four binary digits, or as many as end with 2^-9. */
static float to_e4m3(float x)
{
    int exponent;
    frexpf(x, &exponent); /* |x| < 2^exponent */
    float place = ldexpf(1, (exponent > -5 ? exponent : -5) - 4);
    return rintf(x / place) * place;
}

static float to_fp8(float x, const struct block *b, enum perta_dtype dtype)
{
    static const float epsilons[] = {0x1p-23f, 0x1p-10f, 0x1p-7f};
    float scale = own(dtype, b->most / 448.0f);
    if (scale == 0)
        scale = epsilons[dtype == PERTA_F32 ? 0 : dtype == PERTA_F16 ? 1 : 2];
    float scaled = own(dtype, x / scale);
    return to_e4m3(fminf(fmaxf(scaled, -448), 448)) * scale;
}

static float to(enum perta_rounding rounding, enum perta_dtype dtype, float x,
                const struct block *b)
{
    switch (rounding) {
    case PERTA_ROUND_NF4:
        return to_nf4(x, b);
    case PERTA_ROUND_INT8:
        return to_int8(half(x), b);
    case PERTA_ROUND_INT4:
        return to_int4(x, b);
    case PERTA_ROUND_Q4_0:
        return to_q4_0(x, b);
    default:
        return to_fp8(x, b, dtype);
    }
}

/* ---- the matrix ---- */

static void measure(struct block *b, float x)
{
    if (fabsf(x) > b->most) {
        b->most = fabsf(x);
        b->max = x;
    }
    b->negatives |= x < 0;
}

/* Round elements first.. (n). Returns n, or the index of an element that is not finite, or would not
 * be. */
static size_t round_block(enum perta_rounding rounding, enum perta_dtype dtype, uint8_t *w,
                          size_t first, size_t n)
{
    struct block b = {0};
    for (size_t i = first; i < first + n; i++) {
        float x = get(dtype, w, i);
        x = rounding == PERTA_ROUND_INT8 ? half(x) : x;
        if (!isfinite(x))
            return i - first;
        measure(&b, x);
    }
    for (size_t i = first; i < first + n; i++) {
        float x = own(dtype, to(rounding, dtype, get(dtype, w, i), &b));
        if (!isfinite(x))
            return i - first;
        set(dtype, w, i, x);
    }
    return n;
}

size_t perta_round_reference(enum perta_rounding rounding, enum perta_dtype dtype, void *w,
                             size_t rows, size_t cols)
{
    size_t block = perta_rounding_block(rounding, cols), end = rows * cols;
    size_t row = rounding == PERTA_ROUND_NF4 ? end : cols;
    for (size_t at = 0, n; at < end; at += n) {
        size_t left = row - at % row;
        n = left < block ? left : block;
        size_t done = round_block(rounding, dtype, w, at, n);
        if (done < n)
            return at + done;
    }
    return end;
}
