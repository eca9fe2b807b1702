/* What oneDNN gives on this machine for the products of a 1B-class model: what `perta estimate`
 * could reach if it did nothing else.
 * Usage: bench_gemm TOKENS THREADS. For float32, then for bfloat16 (zeros: not to be had), a line:
 * GFLOP/s at best, GFLOP a CPU second over all; then, for people, the best of each kind of product:
 * y = x W^T, dx = dy W, dW += dy^T x, of a wide and of a deep weight. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "estimators/backprop/gemm.h"

#define HIDDEN 2048
#define INNER 5632
#define ROUNDS 4

enum { FORWARD, BACKWARD, GRADIENT, N_KINDS };

struct bench {
    struct perta_workers *workers;
    struct perta_gemm *gemm;
    enum perta_dtype dtype; /* of operands: the product's own, so that nothing is converted */
    size_t tokens;
    void *x, *dy, *weight;
    float *to;
    double best[N_KINDS], flop, cpu_seconds;
};

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* x (tokens, in), dy (tokens, out), weight (out, in). */
static int multiply(struct bench *b, int kind, size_t out, size_t in, struct perta_err *err)
{
    const struct perta_operand_matrix x = {b->x, b->dtype, in, 1}, dy = {b->dy, b->dtype, out, 1};
    const struct perta_operand_matrix w = {b->weight, b->dtype, in, 1};
    if (kind == FORWARD)
        return perta_gemm_run(b->gemm, NULL, b->tokens, out, in, x, perta_transposed(w), b->to, out,
                              false, err);
    if (kind == BACKWARD)
        return perta_gemm_run(b->gemm, NULL, b->tokens, in, out, dy, w, b->to, in, false, err);
    return perta_gemm_run(b->gemm, NULL, out, in, b->tokens, perta_transposed(dy), x, b->to, in, true,
                          err);
}

static int measure(struct bench *b, int kind, size_t out, size_t in, struct perta_err *err)
{
    double flop = 2 * (double)b->tokens * (double)out * (double)in;
    double start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    int rc = multiply(b, kind, out, in, err);
    double rate = flop / (now(CLOCK_MONOTONIC) - start);
    b->cpu_seconds += now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    b->flop += flop;
    b->best[kind] = rate > b->best[kind] ? rate : b->best[kind];
    return rc;
}

static int measure_all(struct bench *b, struct perta_err *err)
{
    int rc = 0;
    for (int i = -1; i < ROUNDS && !rc; i++) {
        for (int kind = 0; kind < N_KINDS && !rc; kind++) {
            rc = measure(b, kind, INNER, HIDDEN, err);
            if (!rc)
                rc = measure(b, kind, HIDDEN, INNER, err);
        }
        if (i < 0) /* code was made, pages were touched */
            b->flop = b->cpu_seconds = 0;
    }
    return rc;
}

/* Numbers of about 1, for memory that is never written is one page of zeros to all its readers. */
static void *numbers(size_t n, bool bf16)
{
    uint16_t *halves = malloc(n * 4);
    float *floats = (float *)(void *)halves;
    for (size_t i = 0; halves && i < n; i++) {
        uint32_t noise = (uint32_t)i * 2654435761u;
        if (bf16)
            halves[i] = (uint16_t)(0x3f00 | (noise >> 24) | (noise & 0x8000));
        else
            floats[i] = (float)(int32_t)noise * 0x1p-31f;
    }
    return halves;
}

static void run(bool bf16, unsigned n_threads, size_t tokens)
{
    struct perta_err err = {0};
    struct bench b = {.dtype = bf16 ? PERTA_BF16 : PERTA_F32, .tokens = tokens};
    size_t most = (tokens > HIDDEN ? tokens : HIDDEN) * INNER;
    b.x = numbers(most, bf16);
    b.dy = numbers(most, bf16);
    b.weight = numbers((size_t)HIDDEN * INNER, bf16);
    b.to = calloc(most, 4);
    double best = 0;
    if ((bf16 && !perta_gemm_can_bf16()) || !b.x || !b.dy || !b.weight || !b.to ||
        perta_workers_open(n_threads, &b.workers, &err) ||
        perta_gemm_open(bf16, b.workers, 16, 0, &b.gemm, &err) || measure_all(&b, &err))
        b = (struct bench){.x = b.x, .dy = b.dy, .weight = b.weight, .to = b.to, .gemm = b.gemm,
                           .workers = b.workers, .cpu_seconds = 1};
    for (int kind = 0; kind < N_KINDS; kind++)
        best = b.best[kind] > best ? b.best[kind] : best;
    printf("%.0f %.0f  forward %.0f backward %.0f weight %.0f\n", best * 1e-9,
           b.flop / b.cpu_seconds * 1e-9, b.best[FORWARD] * 1e-9, b.best[BACKWARD] * 1e-9,
           b.best[GRADIENT] * 1e-9);
    perta_gemm_close(b.gemm);
    perta_workers_close(b.workers);
    free(b.x);
    free(b.dy);
    free(b.weight);
    free(b.to);
}

int main(int argc, char **argv)
{
    size_t tokens = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
    unsigned n_threads = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 2;
    run(false, n_threads, tokens);
    run(true, n_threads, tokens);
    return 0;
}
