/* cpu.h - the CPU's backend (backend.h): the project's workers, and single-threaded products by
 * oneDNN (gemm.h). Arrays lie in the process's memory, and operations run at once, in the caller.
 *
 * Results do not depend on the number of workers. With bf16 operands of products are rounded to
 * bfloat16; linear_backward_weight, which training uses, then fails. */
#ifndef PERTA_ESTIMATORS_COMPUTE_CPU_H
#define PERTA_ESTIMATORS_COMPUTE_CPU_H

#include "estimators/compute/backend.h"
#include "stream/workers.h"

/* What memory beside buffers depends on. Larger operations than these fail. */
struct perta_cpu_needs {
    bool bf16;
    size_t widest;  /* the longest row of any operand or activation */
    size_t rows;    /* of a product, at most */
    size_t longest; /* tokens of the longest sequence */
    /* float32 of x and dy, side by side, of the longest chunk (padded) of a gradient operation; 0:
     * there are no gradients */
    uint64_t gradient_floats;
};

/* Scratch, in which operands are converted and packed. */
uint64_t perta_cpu_bytes(const struct perta_cpu_needs *needs);
/* What each worker takes. */
uint64_t perta_cpu_worker_bytes(const struct perta_cpu_needs *needs);
/* What alloc takes for a buffer: products read PERTA_SLACK_ROWS past its end. */
uint64_t perta_cpu_buffer_bytes(const struct perta_cpu_needs *needs, uint64_t len_bytes);

/* workers: borrowed. *out is closed with perta_backend_close. */
int perta_cpu_open(const struct perta_cpu_needs *needs, struct perta_workers *workers,
                   struct perta_backend **out, struct perta_err *err);

#endif
