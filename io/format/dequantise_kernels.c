/* Compiled once for each instruction set; see io/isa.h. Spec: docs/dequantize.md */
#include "io/format/dequantise_kernels.h"

#include "io/format/convert.h"
#include "io/isa.h"

#define TILE 256u /* elements of float32 at a time */

typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;

/* ---- FP8 ---- */

/* E4M3 has no infinities; 0x7f and 0xff are NaN. */
static inline float from_e4m3(uint8_t code)
{
    uint32_t mag = code & 0x7f, sign = (uint32_t)(code & 0x80) << 24;
    uint32_t normal = (mag << 20) + (120u << 23);
    /* Place the fraction of a subnormal after 2^-6, then subtract 2^-6: exact. */
    float fraction = perta_f32_from_bits((mag << 20) | (121u << 23)) - 0x1p-6f;
    uint32_t bits = mag < 8 ? perta_f32_bits(fraction) : normal;
    bits = mag == 0x7f ? 0x7fc00000 : bits;
    return perta_f32_from_bits(bits | sign);
}

static void round_to(enum perta_dtype dtype, float *x, size_t n)
{
    for (size_t i = 0; i < n && dtype == PERTA_BF16; i++)
        x[i] = perta_f32_from_bf16(perta_bf16_from_f32(x[i]));
    for (size_t i = 0; i < n && dtype == PERTA_F16; i++)
        x[i] = perta_f32_from_f16(perta_f16_from_f32(x[i]));
}

/* to (n) = x (n) in dtype. Returns how many are not finite. */
static uint64_t narrow(const float *x, size_t n, enum perta_dtype dtype, void *to)
{
    u16 *half = to;
    u32 *whole = to;
    uint64_t bad = 0;
    for (size_t i = 0; i < n && dtype == PERTA_BF16; i++)
        bad += ((half[i] = perta_bf16_from_f32(x[i])) & 0x7f80) == 0x7f80;
    for (size_t i = 0; i < n && dtype == PERTA_F16; i++)
        bad += ((half[i] = perta_f16_from_f32(x[i])) & 0x7c00) == 0x7c00;
    for (size_t i = 0; i < n && dtype == PERTA_F32; i++)
        bad += ((whole[i] = perta_f32_bits(x[i])) & 0x7f800000) == 0x7f800000;
    return bad;
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

/* Only codes whose value is not finite; values holds those of all sixteen. */
static uint64_t count_bad(const uint8_t *codes, const uint8_t bad[16])
{
    uint64_t n = 0;
    for (size_t b = 0; b < PERTA_MXFP4_BLOCK_BYTES; b++)
        n += (uint64_t)bad[codes[b] & 15] + bad[codes[b] >> 4];
    return n;
}

#define ROWS 32u /* rows that are transposed together: whole cache lines of the result */

/* For results of bits bits: to (32, n of a stride of n_rows) = the transpose of one block of n
 * rows. */
#define DEFINE(bits)                                                                               \
    static uint64_t transpose_##bits(const uint8_t *codes, const uint8_t *scales, size_t n_blocks, \
                                     size_t n, size_t n_rows, enum perta_dtype dtype, u##bits *to) \
    {                                                                                              \
        uint##bits##_t tile[PERTA_MXFP4_BLOCK][ROWS], values[16];                                  \
        uint64_t n_bad = 0;                                                                        \
        for (size_t r = 0; r < n; r++) {                                                           \
            const uint8_t *from = codes + r * n_blocks * PERTA_MXFP4_BLOCK_BYTES;                  \
            float scale = perta_e8m0(scales[r * n_blocks]), scaled[16];                            \
            for (size_t k = 0; k < 16; k++)                                                        \
                scaled[k] = e2m1[k] * scale;                                                       \
            if (narrow(scaled, 16, dtype, values)) {                                               \
                uint8_t bad[16];                                                                   \
                for (size_t k = 0; k < 16; k++)                                                    \
                    bad[k] = (uint8_t)narrow(&scaled[k], 1, dtype, &values[k]);                    \
                n_bad += count_bad(from, bad);                                                     \
            }                                                                                      \
            for (size_t b = 0; b < PERTA_MXFP4_BLOCK_BYTES; b++) {                                 \
                tile[2 * b][r] = values[from[b] & 15];                                             \
                tile[2 * b + 1][r] = values[from[b] >> 4];                                         \
            }                                                                                      \
        }                                                                                          \
        for (size_t i = 0; i < PERTA_MXFP4_BLOCK; i++)                                             \
            memcpy(to + i * n_rows, tile[i], n * sizeof *tile[i]);                                 \
        return n_bad;                                                                              \
    }

DEFINE(16)
DEFINE(32)

static uint64_t mxfp4(const uint8_t *codes, const uint8_t *scales, size_t n_rows, size_t n_blocks,
                      enum perta_dtype dtype, void *to)
{
    uint64_t bad = 0;
    for (size_t r = 0, n; r < n_rows; r += n) {
        n = n_rows - r < ROWS ? n_rows - r : ROWS;
        for (size_t g = 0; g < n_blocks; g++) {
            const uint8_t *from = codes + (r * n_blocks + g) * PERTA_MXFP4_BLOCK_BYTES;
            const uint8_t *scale = scales + r * n_blocks + g;
            size_t at = g * PERTA_MXFP4_BLOCK * n_rows + r;
            bad += dtype == PERTA_F32
                       ? transpose_32(from, scale, n_blocks, n, n_rows, dtype, (u32 *)to + at)
                       : transpose_16(from, scale, n_blocks, n, n_rows, dtype, (u16 *)to + at);
        }
    }
    return bad;
}

const struct perta_dequantise_kernels PERTA_ISA_NAME(perta_dequantise_kernels) = {e4m3, mxfp4};
