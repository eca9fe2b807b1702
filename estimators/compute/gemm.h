/* gemm.h - matrix products by oneDNN, cut into pieces.
 *
 * Operands are float32, or weights in the dtype of the checkpoint (BF16, F16, F32). With bf16,
 * both operands are rounded to bfloat16 and products are summed in float32, which is several times
 * faster on CPUs with AMX or AVX-512 BF16; otherwise everything is float32.
 *
 * A piece is one single-threaded product, a tile of at most PERTA_TILE_ROWS by PERTA_TILE_COLS.
 * How a product is cut depends on shapes and on the samples (cut.h) alone, so its bits are the same
 * for every number of workers, every budget and every batch. Another instruction set may give other
 * last bits. */
#ifndef PERTA_ESTIMATORS_COMPUTE_GEMM_H
#define PERTA_ESTIMATORS_COMPUTE_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/cut.h"
#include "io/err.h"
#include "io/format/dtype.h"
#include "stream/workers.h"

/* Products may read this many rows past the end of an operand, and ignore them, so that fewer
 * different shapes must be compiled. That memory must be readable. */
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

/* The transpose of a matrix. */
static inline struct perta_operand_matrix perta_transposed(struct perta_operand_matrix m)
{
    return (struct perta_operand_matrix){m.data, m.dtype, m.col, m.row};
}

/* workers is borrowed. scratch_floats float32 are taken for the conversion of both operands;
 * products that need more fail. Each worker that has work gets room_floats of its own, and at least
 * a tile (perta_gemm_room). oneDNN's own cache is turned off for the process: compiled products are
 * kept here, a bounded number of them. */
PERTA_API int perta_gemm_open(bool bf16, struct perta_workers *workers, size_t scratch_floats,
                              size_t room_floats, struct perta_gemm **out, struct perta_err *err);
PERTA_API void perta_gemm_close(struct perta_gemm *gemm);
struct perta_workers *perta_gemm_workers(const struct perta_gemm *gemm);
/* Memory that a worker takes besides room_floats: its stack, and oneDNN's buffers. */
#define PERTA_GEMM_WORKER_BYTES (2ull << 20)

/* has: oneDNN multiplies bfloat16 faster than float32 on this CPU. can: it supports bfloat16. */
PERTA_API bool perta_gemm_has_bf16(void);
PERTA_API bool perta_gemm_can_bf16(void);
/* A number for the instruction set of products, on which results depend. */
PERTA_API int perta_gemm_isa(void);
/* "oneDNN VERSION HASH", in buf. Results depend on it, too. */
const char *perta_gemm_version(char buf[64]);

/* The dtype of a piece's operands: BF16 or F32. */
enum perta_dtype perta_gemm_dtype(const struct perta_gemm *gemm);
/* The scratch, from float number at on. */
float *perta_gemm_scratch(const struct perta_gemm *gemm, size_t at);

/* c (m, n) = a (m, k) b (k, n); with add, c +=. Rows of c are ldc apart. m is cut at rows, the last
 * of which ends at m; if rows is NULL, every PERTA_TILE_ROWS. With rows, up to PERTA_SLACK_ROWS
 * rows are read past the end of a. */
PERTA_API int perta_gemm_run(struct perta_gemm *gemm, const struct perta_runs *rows, size_t m,
                             size_t n, size_t k, struct perta_operand_matrix a,
                             struct perta_operand_matrix b, float *c, size_t ldc, bool add,
                             struct perta_err *err);

/* ---- called by workers, for a piece ---- */

/* The worker's own room_floats; NULL only when out of memory. */
float *perta_gemm_room(struct perta_gemm *gemm, unsigned worker);
/* One product. Operands have the dtype perta_gemm_dtype. */
int perta_gemm_tile(struct perta_gemm *gemm, unsigned worker, size_t m, size_t n, size_t k,
                    struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                    size_t ldc, bool add, struct perta_err *err);
/* c (m, n) = scale * a b + beta * c in float32, row-major; ta and tb are 'N', or 'T' for a
 * transposed operand. Nothing is compiled, so it suits products of many shapes. PERTA_ESYS if
 * oneDNN refuses. */
int perta_gemm_sgemm(char ta, char tb, size_t m, size_t n, size_t k, float scale, const float *a,
                     size_t lda, const float *b, size_t ldb, float beta, float *c, size_t ldc,
                     struct perta_err *err);

#endif
