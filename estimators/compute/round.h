/* round.h - number formats in which models are served: weights are rounded to one of them and back,
 * as the programs that use it do. Spec: docs/eval.md */
#ifndef PERTA_ESTIMATORS_COMPUTE_ROUND_H
#define PERTA_ESTIMATORS_COMPUTE_ROUND_H

#include <stdbool.h>
#include <stddef.h>

#include "io/err.h"
#include "io/format/dtype.h"

enum perta_rounding {
    PERTA_ROUND_NONE,
    PERTA_ROUND_NF4,  /* bitsandbytes, blocks of 64 of the flattened matrix */
    PERTA_ROUND_INT8, /* bitsandbytes' LLM.int8, rows */
    PERTA_ROUND_INT4, /* GPTQ's round to nearest, groups of 128 in a row */
    PERTA_ROUND_Q4_0, /* llama.cpp, blocks of 32 in a row */
    PERTA_ROUND_FP8,  /* compressed-tensors' FP8_DYNAMIC: E4M3FN, rows */
    PERTA_N_ROUNDINGS,
};

/* As --quantize spells it; "none" for PERTA_ROUND_NONE. */
PERTA_API const char *perta_rounding_name(enum perta_rounding rounding);
/* Elements that share a scale, in a matrix with rows of cols elements. */
size_t perta_rounding_block(enum perta_rounding rounding, size_t cols);
/* Whether a matrix with rows of cols elements can be stored in the format. */
bool perta_rounding_fits(enum perta_rounding rounding, size_t cols);

/* Round w (rows, cols; BF16, F16 or F32; any alignment) in place, to the numbers that come out when
 * the format is converted back to dtype. rounding is not PERTA_ROUND_NONE, and fits. Returns
 * rows * cols; or, if an element is not finite, or would not be once it is rounded, the index of
 * such an element, which is left as it is. */
PERTA_API size_t perta_round(enum perta_rounding rounding, enum perta_dtype dtype, void *w,
                             size_t rows, size_t cols);

/* The same in plain loops, from the formats' definitions, which perta_round is compared with. */
size_t perta_round_reference(enum perta_rounding rounding, enum perta_dtype dtype, void *w,
                             size_t rows, size_t cols);

/* ---- between round.c and round_kernels.c, which is compiled once for each instruction set ---- */

typedef size_t perta_round_fn(enum perta_rounding rounding, enum perta_dtype dtype, void *w,
                              size_t rows, size_t cols);
perta_round_fn perta_round_v2, perta_round_v3, perta_round_v4;

#endif
