/* dequantise_kernels.h - the functions that dequantise_kernels.c defines for each instruction set.
 * Internal to io/format. Nothing needs to be aligned. Spec: docs/dequantize.md */
#ifndef PERTA_IO_FORMAT_DEQUANTISE_KERNELS_H
#define PERTA_IO_FORMAT_DEQUANTISE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "io/format/convert.h"
#include "io/format/dtype.h"

/* Values of E2M1 that share a scale, two in a byte. */
#define PERTA_MXFP4_BLOCK 32
#define PERTA_MXFP4_BLOCK_BYTES 16

struct perta_dequantise_kernels {
    /* to (n) in dtype (BF16, F16 or F32) = E4M3 codes (n) * scale in float32, rounded to `first`
     * first (F32: not at all). Returns how many are not finite. */
    uint64_t (*e4m3)(const uint8_t *codes, float scale, size_t n, enum perta_dtype first,
                     enum perta_dtype dtype, void *to);
    /* to (32 * n_blocks, n_rows) in dtype, the transpose of codes (n_rows, n_blocks, 16) times
     * 2^(scales - 127) (n_rows, n_blocks); 255 counts as not finite. The low half of a byte is the
     * first of its two values. Returns how many are not finite. */
    uint64_t (*mxfp4)(const uint8_t *codes, const uint8_t *scales, size_t n_rows, size_t n_blocks,
                      enum perta_dtype dtype, void *to);
};

extern const struct perta_dequantise_kernels perta_dequantise_kernels_v2,
    perta_dequantise_kernels_v3, perta_dequantise_kernels_v4;

/* 2^(code - 127), the value of an E8M0 code; NaN for 255. */
static inline float perta_e8m0(uint8_t code)
{
    uint32_t bits = code == 255 ? 0x7fc00000 : code ? (uint32_t)code << 23 : 1u << 22;
    return perta_f32_from_bits(bits);
}

#endif
