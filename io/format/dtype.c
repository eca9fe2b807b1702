#include "io/format/dtype.h"

#include <string.h>

static const struct {
    const char *name;
    unsigned bits;
} dtypes[PERTA_N_DTYPES] = {
    [PERTA_BOOL] = {"BOOL", 8},       [PERTA_F4] = {"F4", 4},
    [PERTA_F6_E2M3] = {"F6_E2M3", 6}, [PERTA_F6_E3M2] = {"F6_E3M2", 6},
    [PERTA_U8] = {"U8", 8},           [PERTA_I8] = {"I8", 8},
    [PERTA_F8_E5M2] = {"F8_E5M2", 8}, [PERTA_F8_E4M3] = {"F8_E4M3", 8},
    [PERTA_F8_E8M0] = {"F8_E8M0", 8}, [PERTA_I16] = {"I16", 16},
    [PERTA_U16] = {"U16", 16},        [PERTA_F16] = {"F16", 16},
    [PERTA_BF16] = {"BF16", 16},      [PERTA_I32] = {"I32", 32},
    [PERTA_U32] = {"U32", 32},        [PERTA_F32] = {"F32", 32},
    [PERTA_C64] = {"C64", 64},        [PERTA_F64] = {"F64", 64},
    [PERTA_I64] = {"I64", 64},        [PERTA_U64] = {"U64", 64},
};

const char *perta_dtype_name(enum perta_dtype dtype)
{
    return dtypes[dtype].name;
}

unsigned perta_dtype_bits(enum perta_dtype dtype)
{
    return dtypes[dtype].bits;
}

bool perta_dtype_parse(const char *name, enum perta_dtype *dtype)
{
    for (int i = 0; i < PERTA_N_DTYPES; i++)
        if (!strcmp(name, dtypes[i].name)) {
            *dtype = (enum perta_dtype)i;
            return true;
        }
    return false;
}

bool perta_dtype_is_editable(enum perta_dtype dtype)
{
    return dtype == PERTA_F16 || dtype == PERTA_BF16 || dtype == PERTA_F32 || dtype == PERTA_F64;
}

unsigned perta_dtype_unit_bytes(enum perta_dtype dtype)
{
    if (dtype == PERTA_C64)
        return 4;
    return dtypes[dtype].bits < 8 ? 1 : dtypes[dtype].bits / 8;
}
