/* Rounding, in tiles of floats. Compiled once for each instruction set, see io/isa.h. Loops are
 * written so that gcc and clang vectorise them: everything computed, then selected. The formats'
 * sources are named in docs/eval.md. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math") /* as in kernels.c */
#endif

#include "estimators/compute/kernels.h"
#include "estimators/compute/round.h"
#include "io/format/convert.h"
#include "io/isa.h"

typedef uint16_t __attribute__((aligned(1), may_alias)) u16_any;

#define TILE 1024 /* floats: a multiple of every block but a row */
#define INFINITE 0x7f800000u

/* x + this - this rounds x to an integer, ties to even; +0 for what rounds to 0. */
#define TO_INTEGER 0x1.8p23f

/* A matrix that is being rounded. */
struct job {
    enum perta_rounding rounding;
    enum perta_dtype dtype;
    uint8_t *w;
    size_t width; /* of an element, in bytes */
};

static uint32_t magnitude(float x)
{
    return perta_f32_bits(x) & 0x7fffffff;
}

static float smaller(float a, float b)
{
    return a < b ? a : b;
}

static float larger(float a, float b)
{
    return a > b ? a : b;
}

/* ---- tiles ---- */

static void through_f16(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = perta_f32_from_f16(perta_f16_from_f32(x[i]));
}

static void through_bf16(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = perta_f32_from_bf16(perta_bf16_from_f32(x[i]));
}

/* Round floats to the dtype's numbers. */
static void through(enum perta_dtype dtype, float *x, size_t n)
{
    if (dtype == PERTA_F16)
        through_f16(x, n);
    if (dtype == PERTA_BF16)
        through_bf16(x, n);
}

static float own(enum perta_dtype dtype, float x)
{
    through(dtype, &x, 1);
    return x;
}

static void load(const struct job *job, size_t at, float *x, size_t n)
{
    PERTA_ISA_NAME(perta_row_kernels).to_f32(x, job->w + at * job->width, job->dtype, n);
    if (job->rounding == PERTA_ROUND_INT8) /* bitsandbytes quantises float16 */
        through(PERTA_F16, x, n);
}

/* x are numbers of the dtype. */
static void store(const struct job *job, size_t at, const float *x, size_t n)
{
    uint8_t *to = job->w + at * job->width;
    u16_any *halves = (u16_any *)(void *)to;
    if (job->dtype == PERTA_F32)
        memcpy(to, x, n * sizeof *x);
    else if (job->dtype == PERTA_BF16)
        for (size_t i = 0; i < n; i++)
            halves[i] = (uint16_t)(perta_f32_bits(x[i]) >> 16);
    else
        for (size_t i = 0; i < n; i++)
            halves[i] = perta_f16_from_f32(x[i]);
}

/* The bits of the largest absolute value: from INFINITE on, an element is not finite. */
static uint32_t largest(const float *x, size_t n)
{
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++)
        most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
    return most;
}

/* Index of the first element that is not finite; there is one. */
static size_t first_bad(const float *x)
{
    size_t i = 0;
    while (magnitude(x[i]) < INFINITE)
        i++;
    return i;
}

/* ---- formats: round x (n) of one block, whose largest absolute value is most ---- */

static void round_nf4(float *x, size_t n, float most)
{
    static const float values[16] = {-1.0f,
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
                                     1.0f};
    static const float bounds[15] = {
        -0.8480964004993439f,  -0.6106329262256622f,  -0.4599952697753906f,   -0.33967943489551544f,
        -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
        0.1202552504837513f,   0.2035212516784668f,   0.2920137718319893f,    0.3893125355243683f,
        0.5016634166240692f,   0.6427869200706482f,   0.8614784181118011f};
    float by = 1 / larger(most, 1e-38f);
    for (size_t i = 0; i < n; i++) {
        float scaled = x[i] * by, value = values[0];
        for (int v = 0; v < 15; v++)
            value = scaled > bounds[v] ? values[v + 1] : value;
        x[i] = value * most;
    }
}

static void round_int8(float *x, size_t n, float most)
{
    float by = most > 0 ? 1 / most * 127 : 0; /* so PyTorch computes 127 / most */
    for (size_t i = 0; i < n; i++) {
        float q = (x[i] * by + TO_INTEGER) - TO_INTEGER;
        x[i] = q * most * 7.874015718698502e-3f;
    }
}

static void round_int4(float *x, size_t n, float most)
{
    uint32_t negative = 0;
    for (size_t i = 0; i < n; i++)
        negative |= x[i] < 0;
    float least = negative ? -most : 0, scale = (most - least) / 15;
    scale = scale > 0 ? scale : 1; /* then all are 0, or as good as */
    for (size_t i = 0; i < n; i++) {
        float q = (x[i] / scale + TO_INTEGER) - TO_INTEGER;
        x[i] = scale * smaller(larger(q, -8), 7);
    }
}

static void round_q4_0(float *x, size_t n, float most)
{
    float max = 0;
    for (size_t i = 0; most > 0; i++)
        if (magnitude(x[i]) == perta_f32_bits(most)) {
            max = x[i];
            break;
        }
    float d = max / -8, by = magnitude(d) ? 1 / d : 0, stored = own(PERTA_F16, d);
    for (size_t i = 0; i < n; i++) {
        float q = x[i] * by + 8.5f;
        q = larger(q < 15 ? q : 15, 0); /* also if by is infinite; then stored is 0 */
        x[i] = (float)((int)q - 8) * stored;
    }
}

/* To E4M3FN, |x| <= 448, ties to even. */
static float to_e4m3(float x)
{
    uint32_t sign = perta_f32_bits(x) & 0x80000000u, u = magnitude(x);
    uint32_t normal = (u + 0x7ffff + ((u >> 20) & 1)) & 0xfff00000u;
    /* Below 2^-6 the last place is 2^-9, as that of a float32 next to 2^14. */
    float small = (perta_f32_from_bits(u) + 0x1p14f) - 0x1p14f;
    u = u < 0x3c800000u ? perta_f32_bits(small) : normal;
    return perta_f32_from_bits(u | sign);
}

/* The arithmetic is the dtype's. */
static void round_fp8(float *x, size_t n, float most, enum perta_dtype dtype)
{
    float epsilon = dtype == PERTA_F32 ? 0x1p-23f : dtype == PERTA_F16 ? 0x1p-10f : 0x1p-7f;
    float scale = own(dtype, most / 448);
    scale = scale > 0 ? scale : epsilon;
    for (size_t i = 0; i < n; i++)
        x[i] /= scale;
    through(dtype, x, n);
    for (size_t i = 0; i < n; i++)
        x[i] = to_e4m3(smaller(larger(x[i], -448), 448)) * scale;
}

static void round_block(const struct job *job, float *x, size_t n, float most)
{
    if (job->rounding == PERTA_ROUND_NF4)
        round_nf4(x, n, most);
    else if (job->rounding == PERTA_ROUND_INT8)
        round_int8(x, n, most);
    else if (job->rounding == PERTA_ROUND_INT4)
        round_int4(x, n, most);
    else if (job->rounding == PERTA_ROUND_Q4_0)
        round_q4_0(x, n, most);
    else
        round_fp8(x, n, most, job->dtype);
}

/* ---- the matrix ---- */

/* Make x (n), which is rounded, the elements from number at on. Returns n, or the index of the first
 * that is not finite. */
static size_t finish(const struct job *job, size_t at, float *x, size_t n)
{
    through(job->dtype, x, n);
    if (largest(x, n) >= INFINITE)
        return first_bad(x);
    store(job, at, x, n);
    return n;
}

/* Round a tile of whole blocks: n elements from number at on. Returns n, or the index of the first
 * bad one. */
static size_t tile_of_blocks(const struct job *job, size_t at, size_t n, size_t block)
{
    float x[TILE];
    load(job, at, x, n);
    if (largest(x, n) >= INFINITE)
        return first_bad(x);
    for (size_t i = 0; i < n; i += block) {
        size_t m = n - i < block ? n - i : block;
        round_block(job, x + i, m, perta_f32_from_bits(largest(x + i, m)));
    }
    return finish(job, at, x, n);
}

/* Round one block that is longer than a tile: n elements from number first on. */
static size_t long_block(const struct job *job, size_t first, size_t n)
{
    float x[TILE];
    uint32_t most = 0;
    for (size_t at = 0, m; at < n; at += m) {
        m = n - at < TILE ? n - at : TILE;
        load(job, first + at, x, m);
        uint32_t of_tile = largest(x, m);
        if (of_tile >= INFINITE)
            return at + first_bad(x);
        most = of_tile > most ? of_tile : most;
    }
    for (size_t at = 0, m; at < n; at += m) {
        m = n - at < TILE ? n - at : TILE;
        load(job, first + at, x, m);
        round_block(job, x, m, perta_f32_from_bits(most));
        size_t done = finish(job, first + at, x, m);
        if (done < m)
            return at + done;
    }
    return n;
}

size_t PERTA_ISA_NAME(perta_round)(enum perta_rounding rounding, enum perta_dtype dtype, void *w,
                                   size_t rows, size_t cols)
{
    const struct job job = {rounding, dtype, w, perta_dtype_unit_bytes(dtype)};
    size_t block = perta_rounding_block(rounding, cols), whole = rows * cols;
    /* Blocks do not reach over the end of a row, except those of nf4. */
    size_t row = rounding == PERTA_ROUND_NF4 || cols % block == 0 ? whole : cols;
    size_t step = block > TILE ? block : TILE / block * block;
    for (size_t first = 0; first < whole; first += row)
        for (size_t at = 0, n; at < row; at += n) {
            n = row - at < step ? row - at : step;
            size_t done = block > TILE ? long_block(&job, first + at, n)
                                       : tile_of_blocks(&job, first + at, n, block);
            if (done < n)
                return first + at + done;
        }
    return whole;
}
