/* gemm.h - matrix products, by oneDNN, cut into pieces.
 *
 * Operands are float32, or weights as they stand in the checkpoint (BF16, F16, F32). With bf16
 * both are rounded to bfloat16 and products summed in float32, which CPUs with AMX or AVX-512
 * BF16 do several times faster; else all is float32.
 *
 * A piece is one single-threaded product, a tile of PERTA_TILE_ROWS and PERTA_TILE_COLS at most. Where a product
 * is cut depends on shapes and on the samples (cut.h), so that its bits are the same for every
 * number of workers, every budget and every batch. Another instruction set may give other last
 * bits. */
#ifndef PERTA_ESTIMATORS_COMPUTE_GEMM_H
#define PERTA_ESTIMATORS_COMPUTE_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/cut.h"
#include "io/err.h"
#include "io/format/dtype.h"
#include "stream/workers.h"

#define PERTA_TILE_COLS 512
/* Products read rows up to so many past the end of what they are given (and use nothing of it), so
 * that few different shapes are compiled: memory must go on there. */
#define PERTA_SLACK_ROWS 31

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

/* workers: borrowed. scratch_floats is room for the conversion of operands (float32 each, both
 * together); larger products fail. Each worker that has something to do gets room for room_floats
 * of its own, at least a tile (perta_gemm_room). The process's cache of oneDNN is turned off: what
 * is compiled is kept here, and counted. */
PERTA_API int perta_gemm_open(bool bf16, struct perta_workers *workers, size_t scratch_floats,
                              size_t room_floats, struct perta_gemm **out, struct perta_err *err);
PERTA_API void perta_gemm_close(struct perta_gemm *gemm);
struct perta_workers *perta_gemm_workers(const struct perta_gemm *gemm);
/* Memory that a worker takes besides room_floats: its stack, oneDNN's. */
#define PERTA_GEMM_WORKER_BYTES (2ull << 20)

/* Does oneDNN multiply bfloat16 faster than float32 on this CPU? Can it at all? */
PERTA_API bool perta_gemm_has_bf16(void);
PERTA_API bool perta_gemm_can_bf16(void);
/* A number for the instruction set that products use: results depend on it. */
PERTA_API int perta_gemm_isa(void);
/* "oneDNN VERSION HASH", in buf: on which they depend too. */
const char *perta_gemm_version(char buf[64]);

/* What operands of a piece must be: BF16 or F32. */
enum perta_dtype perta_gemm_dtype(const struct perta_gemm *gemm);
/* Scratch, from the float at on. */
float *perta_gemm_scratch(const struct perta_gemm *gemm, size_t at);

/* c (m, n), row stride ldc, = a (m, k) b (k, n), or += with add. m is cut at rows, whose last end
 * is m; rows NULL: every PERTA_TILE_ROWS. a is read PERTA_SLACK_ROWS past its end if rows is given. */
PERTA_API int perta_gemm_run(struct perta_gemm *gemm, const struct perta_runs *rows, size_t m,
                             size_t n, size_t k, struct perta_operand_matrix a,
                             struct perta_operand_matrix b, float *c, size_t ldc, bool add,
                             struct perta_err *err);

/* ---- on a worker, within a piece ---- */

/* The worker's own room_floats; NULL when out of memory. */
float *perta_gemm_room(struct perta_gemm *gemm, unsigned worker);
/* One product; operands are perta_gemm_dtype's. */
int perta_gemm_tile(struct perta_gemm *gemm, unsigned worker, size_t m, size_t n, size_t k,
                    struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                    size_t ldc, bool add, struct perta_err *err);
/* c (m, n) = scale * a b + beta * c in float32, row-major, ta and tb 'N' or 'T' (transposed): for
 * products of many shapes. PERTA_ESYS: oneDNN refuses. */
int perta_gemm_sgemm(char ta, char tb, size_t m, size_t n, size_t k, float scale, const float *a,
                     size_t lda, const float *b, size_t ldb, float beta, float *c, size_t ldc,
                     struct perta_err *err);

#endif
