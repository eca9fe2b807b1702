/* cpu.h - the CPU's backend (backend.h): the project's workers, with single-threaded matrix
 * products by oneDNN (gemm.h). Arrays are in the process's memory. An operation is finished when
 * its call returns.
 *
 * Results do not depend on the number of workers. With bf16, operands of products are rounded to
 * bfloat16, and linear_backward_weight, which only training uses, fails. */
#ifndef PERTA_ESTIMATORS_COMPUTE_CPU_H
#define PERTA_ESTIMATORS_COMPUTE_CPU_H

#include "estimators/compute/backend.h"
#include "stream/workers.h"

/* The largest operations that will be asked for: memory besides buffers depends on them. Larger
 * ones fail. */
struct perta_cpu_needs {
    bool bf16;
    size_t widest;  /* the longest row of any operand or activation */
    size_t rows;    /* the most rows in a product */
    size_t longest; /* tokens of the longest sequence */
    /* for the gradient operation: float32 elements of x and dy together, over the longest chunk
     * (padded); 0: there are no gradients */
    uint64_t gradient_floats;
};

/* Bytes of scratch, in which operands are converted and packed. */
uint64_t perta_cpu_bytes(const struct perta_cpu_needs *needs);
/* Bytes that each worker takes. */
uint64_t perta_cpu_worker_bytes(const struct perta_cpu_needs *needs);
/* Bytes that alloc takes for a buffer. Products read PERTA_SLACK_ROWS rows past its end. */
uint64_t perta_cpu_buffer_bytes(const struct perta_cpu_needs *needs, uint64_t len_bytes);

/* workers is borrowed. The caller closes *out with perta_backend_close. */
int perta_cpu_open(const struct perta_cpu_needs *needs, struct perta_workers *workers,
                   struct perta_backend **out, struct perta_err *err);

#endif
