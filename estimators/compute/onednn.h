/* onednn.h - single-threaded products by oneDNN 2.6 or 3.x, whose interfaces differ.
 * Only gemm.c includes it. */
#ifndef PERTA_ESTIMATORS_COMPUTE_ONEDNN_H
#define PERTA_ESTIMATORS_COMPUTE_ONEDNN_H

#include <dnnl.h>
#include <stdbool.h>
#include <stddef.h>

/* With oneTBB, or a thread pool of its own, it would use threads other than the workers. */
#if DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP && DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_SEQ
#error "this oneDNN is built with neither OpenMP nor the sequential runtime"
#endif

/* oneDNN asks OpenMP how many threads the calling thread may use. That is set to one while oneDNN
 * works, and set back, so that the host program's own setting stays. Weak symbols: a sequential
 * build of oneDNN does not link OpenMP. */
extern int omp_get_max_threads(void) __attribute__((weak));
extern void omp_set_num_threads(int) __attribute__((weak));

static inline int onednn_alone(void)
{
    int before = omp_get_max_threads ? omp_get_max_threads() : 1;
    if (before != 1)
        omp_set_num_threads(1);
    return before;
}

static inline void onednn_as_before(int before)
{
    if (before != 1)
        omp_set_num_threads(before);
}

/* ---- descriptions of matrices ---- */

/* Element (i, j) is at i * row + j * col. */
static inline dnnl_status_t onednn_describe(dnnl_memory_desc_t *desc, size_t rows, size_t cols,
                                            size_t row, size_t col, bool bf16)
{
    const dnnl_dims_t dims = {(dnnl_dim_t)rows, (dnnl_dim_t)cols};
    const dnnl_dims_t strides = {(dnnl_dim_t)row, (dnnl_dim_t)col};
    dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_strides(desc, 2, dims, type, strides);
#else
    return dnnl_memory_desc_init_by_strides(desc, 2, dims, type, strides);
#endif
}

static inline void onednn_forget(dnnl_memory_desc_t *desc)
{
#if DNNL_VERSION_MAJOR >= 3
    if (*desc)
        dnnl_memory_desc_destroy(*desc);
    *desc = NULL;
#else
    (void)desc;
#endif
}

static inline dnnl_status_t onednn_memory(dnnl_memory_t *memory, const dnnl_memory_desc_t *desc,
                                          dnnl_engine_t engine, void *data)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_create(memory, *desc, engine, data);
#else
    return dnnl_memory_create(memory, desc, engine, data);
#endif
}

/* ---- a product ---- */

static inline dnnl_status_t onednn_sum(dnnl_post_ops_t ops)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_post_ops_append_sum(ops, 1.0f, 0, dnnl_data_type_undef);
#else
    return dnnl_post_ops_append_sum(ops, 1.0f);
#endif
}

/* desc: descriptions of a, b and c. */
static inline dnnl_status_t onednn_matmul(dnnl_primitive_desc_t *made, dnnl_engine_t engine,
                                          const dnnl_memory_desc_t desc[3],
                                          dnnl_primitive_attr_t attr)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_matmul_primitive_desc_create(made, engine, desc[0], desc[1], NULL, desc[2], attr);
#else
    dnnl_matmul_desc_t matmul;
    dnnl_status_t status = dnnl_matmul_desc_init(&matmul, &desc[0], &desc[1], NULL, &desc[2]);
    return status == dnnl_success ? dnnl_primitive_desc_create(made, &matmul, attr, engine, NULL)
                                  : status;
#endif
}

/* Describe the scratchpad that the product needs. The caller releases *desc with onednn_forget. */
static inline dnnl_status_t onednn_scratchpad(dnnl_memory_desc_t *desc, size_t *len_bytes,
                                              const_dnnl_primitive_desc_t made)
{
#if DNNL_VERSION_MAJOR >= 3
    const_dnnl_memory_desc_t of = dnnl_primitive_desc_query_md(made, dnnl_query_scratchpad_md, 0);
    *len_bytes = dnnl_memory_desc_get_size(of);
    return dnnl_memory_desc_clone(desc, of);
#else
    *desc = *dnnl_primitive_desc_query_md(made, dnnl_query_scratchpad_md, 0);
    *len_bytes = dnnl_memory_desc_get_size(desc);
    return dnnl_success;
#endif
}

#endif
