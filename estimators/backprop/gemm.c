#include "estimators/backprop/gemm.h"

#include <dnnl.h>
#include <errno.h>
#include <stdlib.h>

#include "estimators/backprop/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#else /* fuzzers do without */
static void omp_set_num_threads(int n)
{
    (void)n;
}
#endif

struct perta_gemm {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    bool bf16;
    float *scratch; /* (scratch_floats) */
    size_t scratch_floats;
};

static int failed(dnnl_status_t status, struct perta_err *err)
{
    return status == dnnl_out_of_memory
               ? perta_fail_sys(err, ENOMEM, "matrix product")
               : perta_fail(err, PERTA_ESYS, "matrix product: oneDNN says %d", (int)status);
}

bool perta_gemm_has_bf16(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}

/* oneDNN has it from AVX-512 (F, BW, DQ, VL) on. */
bool perta_gemm_can_bf16(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

int perta_gemm_open(bool bf16, unsigned n_threads, size_t scratch_floats,
                    struct perta_gemm **out, struct perta_err *err)
{
    struct perta_gemm *g = calloc(1, sizeof *g);
    if (!g)
        return perta_fail_sys(err, ENOMEM, "matrix products");
    g->bf16 = bf16;
    g->scratch_floats = scratch_floats;
    g->scratch = malloc(scratch_floats * sizeof *g->scratch + 64);
    dnnl_status_t status =
        g->scratch ? dnnl_engine_create(&g->engine, dnnl_cpu, 0) : dnnl_out_of_memory;
    if (status == dnnl_success)
        status = dnnl_stream_create(&g->stream, g->engine, dnnl_stream_default_flags);
    if (status != dnnl_success) {
        perta_gemm_close(g);
        return failed(status, err);
    }
    omp_set_num_threads((int)n_threads);
    *out = g;
    return 0;
}

void perta_gemm_close(struct perta_gemm *g)
{
    if (!g)
        return;
    if (g->stream)
        dnnl_stream_destroy(g->stream);
    if (g->engine)
        dnnl_engine_destroy(g->engine);
    free(g->scratch);
    free(g);
}

/* ---- operands ---- */

float perta_operand_element(const struct perta_operand_matrix *m)
{
    float x;
    perta_row_kernels()->to_f32(&x, m->data, m->dtype, 1);
    return x;
}

bool perta_gemm_takes(const struct perta_gemm *g, const void *data, enum perta_dtype dtype)
{
    return dtype == (g->bf16 ? PERTA_BF16 : PERTA_F32) &&
           (uintptr_t)data % (g->bf16 ? 2 : 4) == 0;
}

/* Make m (rows, cols) what the product wants; at is where scratch is free. */
static bool prepare(struct perta_gemm *g, struct perta_operand_matrix *m, size_t rows,
                    size_t cols, size_t *at)
{
    enum perta_dtype want = g->bf16 ? PERTA_BF16 : PERTA_F32;
    size_t width = g->bf16 ? 2 : 4;
    if (perta_gemm_takes(g, m->data, m->dtype))
        return true;
    /* Convert along what is contiguous. */
    bool turned = m->col != 1;
    size_t n_rows = turned ? cols : rows, n_cols = turned ? rows : cols;
    size_t stride = turned ? m->col : m->row;
    size_t need = (n_rows * n_cols * width + 3) / 4;
    if (need > g->scratch_floats - *at)
        return false;
    uint8_t *to = (uint8_t *)(g->scratch + *at);
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t from_width = m->dtype == PERTA_F32 ? 4 : 2;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n_rows; i++) {
        const uint8_t *from = (const uint8_t *)m->data + i * stride * from_width;
        if (g->bf16)
            k->to_bf16((uint16_t *)(void *)to + i * n_cols, from, m->dtype, n_cols);
        else
            k->to_f32((float *)(void *)to + i * n_cols, from, m->dtype, n_cols);
    }
    *at += (need + 15) & ~(size_t)15;
    *m = turned ? (struct perta_operand_matrix){to, want, 1, n_cols}
                : (struct perta_operand_matrix){to, want, n_cols, 1};
    return true;
}

/* ---- the product ---- */

static dnnl_status_t describe(dnnl_memory_desc_t *desc, size_t rows, size_t cols, size_t row,
                              size_t col, bool bf16)
{
    const dnnl_dims_t dims = {(dnnl_dim_t)rows, (dnnl_dim_t)cols};
    const dnnl_dims_t strides = {(dnnl_dim_t)row, (dnnl_dim_t)col};
    return dnnl_memory_desc_init_by_strides(desc, 2, dims, bf16 ? dnnl_bf16 : dnnl_f32, strides);
}

static dnnl_status_t make_primitive(struct perta_gemm *g, const dnnl_memory_desc_t desc[3],
                                    bool add, dnnl_primitive_t *primitive)
{
    dnnl_matmul_desc_t matmul;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t sum = NULL;
    dnnl_primitive_desc_t made = NULL;
    dnnl_status_t status = dnnl_matmul_desc_init(&matmul, &desc[0], &desc[1], NULL, &desc[2]);
    if (status == dnnl_success)
        status = dnnl_primitive_attr_create(&attr);
    if (status == dnnl_success && add) {
        status = dnnl_post_ops_create(&sum);
        if (status == dnnl_success)
            status = dnnl_post_ops_append_sum(sum, 1.0f);
        if (status == dnnl_success)
            status = dnnl_primitive_attr_set_post_ops(attr, sum);
    }
    if (status == dnnl_success)
        status = dnnl_primitive_desc_create(&made, &matmul, attr, g->engine, NULL);
    if (status == dnnl_success)
        status = dnnl_primitive_create(primitive, made);
    if (made)
        dnnl_primitive_desc_destroy(made);
    if (sum)
        dnnl_post_ops_destroy(sum);
    if (attr)
        dnnl_primitive_attr_destroy(attr);
    return status;
}

static dnnl_status_t execute(struct perta_gemm *g, dnnl_primitive_t primitive,
                             const dnnl_memory_desc_t desc[3], void *const data[3])
{
    static const int names[3] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
    dnnl_exec_arg_t args[3] = {0};
    dnnl_status_t status = dnnl_success;
    for (int i = 0; i < 3 && status == dnnl_success; i++) {
        args[i].arg = names[i];
        status = dnnl_memory_create(&args[i].memory, &desc[i], g->engine, data[i]);
    }
    if (status == dnnl_success)
        status = dnnl_primitive_execute(primitive, g->stream, 3, args);
    if (status == dnnl_success)
        status = dnnl_stream_wait(g->stream);
    for (int i = 0; i < 3; i++)
        if (args[i].memory)
            dnnl_memory_destroy(args[i].memory);
    return status;
}

int perta_gemm_run(struct perta_gemm *g, size_t m, size_t n, size_t k,
                   struct perta_operand_matrix a, struct perta_operand_matrix b, float *c,
                   size_t ldc, bool add, struct perta_err *err)
{
    size_t at = 0;
    if (!m || !n)
        return 0;
    if (!prepare(g, &a, m, k, &at) || !prepare(g, &b, k, n, &at))
        return perta_fail(err, PERTA_ESYS, "matrix product of %zu x %zu x %zu: no room", m, n, k);
    dnnl_memory_desc_t desc[3];
    dnnl_primitive_t primitive = NULL;
    dnnl_status_t status = describe(&desc[0], m, k, a.row, a.col, g->bf16);
    if (status == dnnl_success)
        status = describe(&desc[1], k, n, b.row, b.col, g->bf16);
    if (status == dnnl_success)
        status = describe(&desc[2], m, n, ldc, 1, false);
    if (status == dnnl_success)
        status = make_primitive(g, desc, add, &primitive);
    if (status == dnnl_success)
        status = execute(g, primitive, desc, (void *const[]){(void *)a.data, (void *)b.data, c});
    if (primitive)
        dnnl_primitive_destroy(primitive);
    return status == dnnl_success ? 0 : failed(status, err);
}
