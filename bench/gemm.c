/* What oneDNN gives on this machine for the products of a 1B-class model, each whole and with its
 * own threads: what `perta estimate` could reach if it did nothing else.
 * Usage: bench_gemm TOKENS THREADS. For float32, then for bfloat16 (zeros: not to be had), a line:
 * GFLOP/s at best, GFLOP a CPU second over all; then, for people, the best of each kind of product:
 * y = x W^T, dx = dy W, dW += dy^T x, of a wide and of a deep weight. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "estimators/compute/gemm.h"
#include "estimators/compute/onednn.h"

#define HIDDEN 2048
#define INNER 5632
#define ROUNDS 4

enum { FORWARD, BACKWARD, GRADIENT, N_KINDS };

struct bench {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    bool bf16; /* operands */
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

static void must(dnnl_status_t status)
{
    if (status == dnnl_success)
        return;
    fprintf(stderr, "bench_gemm: oneDNN says %d\n", (int)status);
    exit(1);
}

/* ---- a product ---- */

struct matrix {
    const void *data;
    size_t rows, cols, row, col;
};

static struct matrix turned(struct matrix m)
{
    return (struct matrix){m.data, m.cols, m.rows, m.col, m.row};
}

struct product {
    dnnl_memory_desc_t desc[3];
    dnnl_memory_t memory[3];
    dnnl_primitive_t primitive;
};

static void prepare(const struct bench *b, struct product *p, struct matrix a, struct matrix w,
                    bool add)
{
    const struct matrix m[3] = {a, w, {b->to, a.rows, w.cols, w.cols, 1}};
    dnnl_primitive_attr_t attr;
    dnnl_post_ops_t sum;
    dnnl_primitive_desc_t made;
    for (int i = 0; i < 3; i++) {
        must(onednn_describe(&p->desc[i], m[i].rows, m[i].cols, m[i].row, m[i].col,
                             b->bf16 && i < 2));
        must(onednn_memory(&p->memory[i], &p->desc[i], b->engine, (void *)(uintptr_t)m[i].data));
    }
    must(dnnl_primitive_attr_create(&attr));
    must(dnnl_post_ops_create(&sum));
    if (add) {
        must(onednn_sum(sum));
        must(dnnl_primitive_attr_set_post_ops(attr, sum));
    }
    must(onednn_matmul(&made, b->engine, p->desc, attr));
    must(dnnl_primitive_create(&p->primitive, made));
    dnnl_primitive_desc_destroy(made);
    dnnl_post_ops_destroy(sum);
    dnnl_primitive_attr_destroy(attr);
}

static void release(struct product *p)
{
    dnnl_primitive_destroy(p->primitive);
    for (int i = 0; i < 3; i++) {
        dnnl_memory_destroy(p->memory[i]);
        onednn_forget(&p->desc[i]);
    }
}

static void measure(struct bench *b, int kind, size_t out, size_t in)
{
    const struct matrix x = {b->x, b->tokens, in, in, 1}, dy = {b->dy, b->tokens, out, out, 1};
    const struct matrix w = {b->weight, out, in, in, 1};
    dnnl_exec_arg_t args[3] = {
        {.arg = DNNL_ARG_SRC}, {.arg = DNNL_ARG_WEIGHTS}, {.arg = DNNL_ARG_DST}};
    struct product p;
    prepare(b, &p,
            kind == FORWARD    ? x
            : kind == BACKWARD ? dy
                               : turned(dy),
            kind == FORWARD    ? turned(w)
            : kind == BACKWARD ? w
                               : x,
            kind == GRADIENT);
    for (int i = 0; i < 3; i++)
        args[i].memory = p.memory[i];
    double flop = 2 * (double)b->tokens * (double)out * (double)in;
    double start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    must(dnnl_primitive_execute(p.primitive, b->stream, 3, args));
    must(dnnl_stream_wait(b->stream));
    double rate = flop / (now(CLOCK_MONOTONIC) - start);
    b->cpu_seconds += now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    b->flop += flop;
    b->best[kind] = rate > b->best[kind] ? rate : b->best[kind];
    release(&p);
}

static void measure_all(struct bench *b)
{
    for (int i = -1; i < ROUNDS; i++) {
        for (int kind = 0; kind < N_KINDS; kind++) {
            measure(b, kind, INNER, HIDDEN);
            measure(b, kind, HIDDEN, INNER);
        }
        if (i < 0) /* code was made, pages were touched */
            b->flop = b->cpu_seconds = 0;
    }
}

/* ---- all of them ---- */

/* Numbers of about 1, for memory that is never written is one page of zeros to all its readers. */
static void *numbers(size_t n, bool bf16)
{
    uint16_t *halves = malloc(n * 4);
    float *floats = (float *)(void *)halves;
    if (!halves)
        exit(1);
    for (size_t i = 0; i < n; i++) {
        uint32_t noise = (uint32_t)i * 2654435761u;
        if (bf16)
            halves[i] = (uint16_t)(0x3f00 | (noise >> 24) | (noise & 0x8000));
        else
            floats[i] = (float)(int32_t)noise * 0x1p-31f;
    }
    return halves;
}

static void run(bool bf16, size_t tokens)
{
    struct bench b = {.bf16 = bf16, .tokens = tokens, .cpu_seconds = 1};
    size_t most = (tokens > HIDDEN ? tokens : HIDDEN) * INNER;
    double best = 0;
    must(dnnl_engine_create(&b.engine, dnnl_cpu, 0));
    must(dnnl_stream_create(&b.stream, b.engine, dnnl_stream_default_flags));
    b.x = numbers(most, bf16);
    b.dy = numbers(most, bf16);
    b.weight = numbers((size_t)HIDDEN * INNER, bf16);
    b.to = calloc(most, 4);
    if (b.to && (!bf16 || perta_gemm_can_bf16()))
        measure_all(&b);
    for (int kind = 0; kind < N_KINDS; kind++)
        best = b.best[kind] > best ? b.best[kind] : best;
    printf("%.0f %.0f  forward %.0f backward %.0f weight %.0f\n", best * 1e-9,
           b.flop / b.cpu_seconds * 1e-9, b.best[FORWARD] * 1e-9, b.best[BACKWARD] * 1e-9,
           b.best[GRADIENT] * 1e-9);
    dnnl_stream_destroy(b.stream);
    dnnl_engine_destroy(b.engine);
    free(b.x);
    free(b.dy);
    free(b.weight);
    free(b.to);
}

int main(int argc, char **argv)
{
    size_t tokens = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
    if (omp_set_num_threads)
        omp_set_num_threads(argc > 2 ? (int)strtol(argv[2], NULL, 10) : 2);
    run(false, tokens);
    run(true, tokens);
    return 0;
}
