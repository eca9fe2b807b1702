/* dtype.h - the element types of the safetensors format. */
#ifndef PERTA_IO_FORMAT_DTYPE_H
#define PERTA_IO_FORMAT_DTYPE_H

#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"

enum perta_dtype {
    PERTA_BOOL,
    PERTA_F4,
    PERTA_F6_E2M3,
    PERTA_F6_E3M2,
    PERTA_U8,
    PERTA_I8,
    PERTA_F8_E5M2,
    PERTA_F8_E4M3,
    PERTA_F8_E8M0,
    PERTA_I16,
    PERTA_U16,
    PERTA_F16,
    PERTA_BF16,
    PERTA_I32,
    PERTA_U32,
    PERTA_F32,
    PERTA_C64,
    PERTA_F64,
    PERTA_I64,
    PERTA_U64,
    PERTA_N_DTYPES,
};

/* The name as safetensors writes it, e.g. "BF16". */
PERTA_API const char *perta_dtype_name(enum perta_dtype dtype);
/* Bits per element: 4 for F4, 6 for F6_*, else a multiple of 8. */
PERTA_API unsigned perta_dtype_bits(enum perta_dtype dtype);
/* Parse a dtype's name. False if it is unknown. */
PERTA_API bool perta_dtype_parse(const char *name, enum perta_dtype *dtype);
/* Can perta do arithmetic in it? True for F16, BF16, F32 and F64. */
PERTA_API bool perta_dtype_is_editable(enum perta_dtype dtype);
/* Bytes of a unit, which patches count in: the dtype's own width, but 1 for sub-byte dtypes and 4
 * for C64 (two F32 halves). */
PERTA_API unsigned perta_dtype_unit_bytes(enum perta_dtype dtype);

#endif
