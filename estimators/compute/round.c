#include "estimators/compute/round.h"

#include <assert.h>

#include "io/isa.h"

const char *perta_rounding_name(enum perta_rounding rounding)
{
    static const char *const names[PERTA_N_ROUNDINGS] = {"none", "nf4",  "int8",
                                                         "int4", "q4_0", "fp8"};
    return names[rounding];
}

size_t perta_rounding_block(enum perta_rounding rounding, size_t cols)
{
    return rounding == PERTA_ROUND_NF4    ? 64
           : rounding == PERTA_ROUND_INT4 ? 128
           : rounding == PERTA_ROUND_Q4_0 ? 32
                                          : cols;
}

bool perta_rounding_fits(enum perta_rounding rounding, size_t cols)
{
    return rounding != PERTA_ROUND_Q4_0 || cols % 32 == 0;
}

size_t perta_round(enum perta_rounding rounding, enum perta_dtype dtype, void *w, size_t rows,
                   size_t cols)
{
    static perta_round_fn *const all[PERTA_N_ISAS] = {perta_round_v2, perta_round_v3,
                                                      perta_round_v4};
    assert(rounding != PERTA_ROUND_NONE && perta_rounding_fits(rounding, cols));
    return all[perta_isa_chosen()](rounding, dtype, w, rows, cols);
}
