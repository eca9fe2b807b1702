/* The most that oneDNN gives on this machine for shapes of a 1B-class model: what `perta
 * estimate` could reach if it did nothing but matrix products.
 * Usage: bench_gemm TOKENS THREADS; prints GFLOP/s of float32, then of bfloat16 (0: not to be had). */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "estimators/backprop/gemm.h"

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Operands in the product's own type, so that nothing is converted. */
static double rate(bool bf16, unsigned n_threads, size_t m, size_t n, size_t k)
{
    struct perta_gemm *gemm;
    struct perta_err err = {0};
    enum perta_dtype dtype = bf16 ? PERTA_BF16 : PERTA_F32;
    void *a = calloc(m * k, 4), *b = calloc(n * k, 4);
    float *c = calloc(m * n, sizeof *c);
    double best = 0;
    if (!a || !b || !c || perta_gemm_open(bf16, n_threads, 16, &gemm, &err))
        return 0;
    const struct perta_operand_matrix x = {a, dtype, k, 1}, w = {b, dtype, 1, k};
    for (int i = 0; i < 12; i++) {
        double start = now();
        if (perta_gemm_run(gemm, m, n, k, x, w, c, n, false, &err))
            break;
        double gflops = 2e-9 * (double)m * (double)n * (double)k / (now() - start);
        best = gflops > best ? gflops : best;
    }
    perta_gemm_close(gemm);
    free(a);
    free(b);
    free(c);
    return best;
}

int main(int argc, char **argv)
{
    size_t tokens = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
    unsigned n_threads = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 2;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        double best = 0;
        if (!bf16 || perta_gemm_can_bf16()) {
            double wide = rate(bf16, n_threads, tokens, 5632, 2048);
            double deep = rate(bf16, n_threads, tokens, 2048, 5632);
            best = wide > deep ? wide : deep;
        }
        printf("%.0f\n", best);
    }
    return 0;
}
