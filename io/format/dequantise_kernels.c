/* Compiled once for each instruction set; see io/isa.h. Spec: docs/dequantize.md */
#include "io/format/dequantise_kernels.h"

#include "io/format/convert.h"
#include "io/isa.h"

#define TILE 256u /* elements of float32 at a time */
/* Rows of MXFP4 that are transposed together. With fewer, each page of the result is visited more
 * often. */
#define ROWS TILE

typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;

/* ---- FP8 ---- */

/* E4M3 has no infinities; 0x7f and 0xff are NaN. Masks in place of ?: let it vectorise. */
static inline float from_e4m3(uint8_t code)
{
    uint32_t mag = code & 0x7f, sign = (uint32_t)(code & 0x80) << 24;
    uint32_t normal = (mag << 20) + (120u << 23);
    /* Place the fraction of a subnormal after 2^-6, then subtract 2^-6: exact. */
    float fraction = perta_f32_from_bits((mag << 20) | (121u << 23)) - 0x1p-6f;
    uint32_t is_small = 0u - (mag < 8), is_nan = 0u - (mag == 0x7f);
    uint32_t bits = (is_small & perta_f32_bits(fraction)) | (~is_small & normal);
    return perta_f32_from_bits(bits | (is_nan & 0x7fc00000) | sign);
}

static void round_to(enum perta_dtype dtype, float *x, size_t n)
{
    for (size_t i = 0; i < n && dtype == PERTA_BF16; i++)
        x[i] = perta_f32_from_bf16(perta_bf16_from_f32(x[i]));
    for (size_t i = 0; i < n && dtype == PERTA_F16; i++)
        x[i] = perta_f32_from_f16(perta_f16_from_f32(x[i]));
}

/* to (n) = x (n) in dtype; n is at most TILE. Returns how many are not finite. */
static uint32_t narrow(const float *x, size_t n, enum perta_dtype dtype, void *to)
{
    u16 *half = to;
    u32 *whole = to;
    uint32_t bad = 0;
    uint16_t bad_half = 0;
    for (size_t i = 0; i < n && dtype == PERTA_BF16; i++) {
        uint16_t h = perta_bf16_from_f32(x[i]);
        bad_half = (uint16_t)(bad_half + ((h & 0x7f80) == 0x7f80));
        half[i] = h;
    }
    for (size_t i = 0; i < n && dtype == PERTA_F16; i++) {
        uint16_t h = perta_f16_from_f32(x[i]);
        bad_half = (uint16_t)(bad_half + ((h & 0x7c00) == 0x7c00));
        half[i] = h;
    }
    for (size_t i = 0; i < n && dtype == PERTA_F32; i++) {
        uint32_t u = perta_f32_bits(x[i]);
        bad += (u & 0x7f800000) == 0x7f800000;
        whole[i] = u;
    }
    return bad + bad_half;
}

static uint64_t e4m3(const uint8_t *codes, float scale, size_t n, enum perta_dtype first,
                     enum perta_dtype dtype, void *to)
{
    uint64_t bad = 0;
    for (size_t at = 0, m; at < n; at += m) {
        float tile[TILE];
        m = n - at < TILE ? n - at : TILE;
        for (size_t i = 0; i < m; i++)
            tile[i] = from_e4m3(codes[at + i]) * scale;
        round_to(first, tile, m);
        bad += narrow(tile, m, dtype, (uint8_t *)to + at * perta_dtype_unit_bytes(dtype));
    }
    return bad;
}

/* ---- MXFP4 ---- */

static const float e2m1[16] = {0,     0.5f,  1,     1.5f,  2,     3,     4,     6,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/* One block of each of n rows, and where its transpose goes: (32, n of a stride of n_rows). */
struct strip {
    const uint8_t *codes, *scales; /* of rows that are n_blocks apart */
    size_t n_blocks, n, n_rows;
    uint8_t *to;
};

/* Are all results normal numbers in BF16, whose bits then only need another exponent? */
static bool are_normal(const struct strip *s)
{
    bool all = true;
    for (size_t r = 0; r < s->n; r++)
        all &= s->scales[r * s->n_blocks] >= 2 && s->scales[r * s->n_blocks] <= 252;
    return all;
}

/* The bits in BF16 of an E2M1 code times 2^(exponent / 128). */
static inline uint16_t from_e2m1(uint8_t code, uint16_t exponent)
{
    uint16_t mag = code & 7, sign = (uint16_t)((code & 8) << 12);
    uint16_t is_half = (uint16_t)(0 - (mag == 1)), is_not_0 = (uint16_t)(0 - (mag > 0));
    uint16_t normal = (uint16_t)((mag + 252) << 6); /* of 1 that would be 0.75 */
    uint16_t bits = (uint16_t)((normal & ~(is_half & 0x40)) + exponent);
    return (uint16_t)((bits & is_not_0) | sign);
}

static void store(const struct strip *s, size_t i, enum perta_dtype dtype, const uint16_t *bf16)
{
    u32 *whole = (u32 *)(void *)s->to + i * s->n_rows;
    for (size_t r = 0; r < s->n && dtype == PERTA_F32; r++)
        whole[r] = (uint32_t)bf16[r] << 16;
    if (dtype == PERTA_BF16)
        memcpy(s->to + i * s->n_rows * sizeof *bf16, bf16, s->n * sizeof *bf16);
}

/* BF16 or F32. */
static void transpose_normal(const struct strip *s, enum perta_dtype dtype)
{
    uint8_t codes[PERTA_MXFP4_BLOCK_BYTES][ROWS];
    uint16_t exponents[ROWS], low[ROWS], high[ROWS];
    for (size_t r = 0; r < s->n; r++) {
        const uint8_t *from = s->codes + r * s->n_blocks * PERTA_MXFP4_BLOCK_BYTES;
        exponents[r] = (uint16_t)((s->scales[r * s->n_blocks] - 127) * 128);
        for (size_t b = 0; b < PERTA_MXFP4_BLOCK_BYTES; b++)
            codes[b][r] = from[b];
    }
    for (size_t b = 0; b < PERTA_MXFP4_BLOCK_BYTES; b++) {
        for (size_t r = 0; r < s->n; r++) {
            low[r] = from_e2m1(codes[b][r] & 15, exponents[r]);
            high[r] = from_e2m1(codes[b][r] >> 4, exponents[r]);
        }
        store(s, 2 * b, dtype, low);
        store(s, 2 * b + 1, dtype, high);
    }
}

static uint64_t transpose_any(const struct strip *s, enum perta_dtype dtype)
{
    float tile[PERTA_MXFP4_BLOCK][ROWS];
    uint64_t bad = 0, width = perta_dtype_unit_bytes(dtype);
    for (size_t r = 0; r < s->n; r++) {
        const uint8_t *from = s->codes + r * s->n_blocks * PERTA_MXFP4_BLOCK_BYTES;
        float scale = perta_e8m0(s->scales[r * s->n_blocks]);
        for (size_t b = 0; b < PERTA_MXFP4_BLOCK_BYTES; b++) {
            tile[2 * b][r] = e2m1[from[b] & 15] * scale;
            tile[2 * b + 1][r] = e2m1[from[b] >> 4] * scale;
        }
    }
    for (size_t i = 0; i < PERTA_MXFP4_BLOCK; i++)
        bad += narrow(tile[i], s->n, dtype, s->to + i * s->n_rows * width);
    return bad;
}

static uint64_t mxfp4(const uint8_t *codes, const uint8_t *scales, size_t n_rows, size_t n_blocks,
                      enum perta_dtype dtype, void *to)
{
    uint64_t bad = 0, width = perta_dtype_unit_bytes(dtype);
    for (size_t r = 0, n; r < n_rows; r += n) {
        n = n_rows - r < ROWS ? n_rows - r : ROWS;
        for (size_t g = 0; g < n_blocks; g++) {
            const struct strip s = {codes + (r * n_blocks + g) * PERTA_MXFP4_BLOCK_BYTES,
                                    scales + r * n_blocks + g,
                                    n_blocks,
                                    n,
                                    n_rows,
                                    (uint8_t *)to + (g * PERTA_MXFP4_BLOCK * n_rows + r) * width};
            if (dtype != PERTA_F16 && are_normal(&s))
                transpose_normal(&s, dtype);
            else
                bad += transpose_any(&s, dtype);
        }
    }
    return bad;
}

const struct perta_dequantise_kernels PERTA_ISA_NAME(perta_dequantise_kernels) = {e4m3, mxfp4};
