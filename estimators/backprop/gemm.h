/* gemm.h - matrix products, by oneDNN.
 *
 * Operands are float32, or weights as they stand in the checkpoint (BF16, F16, F32). With bf16
 * both are rounded to bfloat16 and products summed in float32, which CPUs with AMX or AVX-512
 * BF16 do several times faster; else all is float32. Threads: one owner; it works in parallel
 * inside, with as many threads as perta_gemm_open was given. */
#ifndef PERTA_BACKPROP_GEMM_H
#define PERTA_BACKPROP_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/dtype.h"
#include "io/err.h"

struct perta_gemm;

/* A row-major matrix; element (i, j) is at data[i * row + j * col]. */
struct perta_operand_matrix {
    const void *data;
    enum perta_dtype dtype; /* F32, BF16 or F16 */
    size_t row, col;
};

static inline struct perta_operand_matrix perta_matrix(const float *data, size_t row)
{
    return (struct perta_operand_matrix){data, PERTA_F32, row, 1};
}

/* The same matrix, rows and columns exchanged. */
static inline struct perta_operand_matrix perta_transposed(struct perta_operand_matrix m)
{
    return (struct perta_operand_matrix){m.data, m.dtype, m.col, m.row};
}

/* The first element, as float32. */
PERTA_API float perta_operand_element(const struct perta_operand_matrix *m);

/* scratch_floats is room for the conversion of operands (float32 each, both together); larger
 * products fail. */
PERTA_API int perta_gemm_open(bool bf16, unsigned n_threads, size_t scratch_floats,
                              struct perta_gemm **out, struct perta_err *err);
PERTA_API void perta_gemm_close(struct perta_gemm *gemm);

/* Does this CPU multiply bfloat16 faster than float32? Can it at all? */
PERTA_API bool perta_gemm_has_bf16(void);
PERTA_API bool perta_gemm_can_bf16(void);

/* Are such operands used as they stand? Others are converted first. */
bool perta_gemm_takes(const struct perta_gemm *gemm, const void *data, enum perta_dtype dtype);

/* c (m, n), row stride ldc, = a (m, k) b (k, n), or += with add. */
PERTA_API int perta_gemm_run(struct perta_gemm *gemm, size_t m, size_t n, size_t k,
                             struct perta_operand_matrix a, struct perta_operand_matrix b,
                             float *c, size_t ldc, bool add, struct perta_err *err);

#endif
