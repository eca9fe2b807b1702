#include "estimators/compute/scalar_own.h"

void perta_scalar_zero(struct perta_backend *be, struct perta_array to, uint64_t n)
{
    float *tos = perta_scalar_floats(be, to, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        tos[i] = 0;
}

void perta_scalar_copy(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       uint64_t n)
{
    float *tos = perta_scalar_floats(be, to, n), *rows_from = perta_scalar_floats(be, from, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        tos[i] = rows_from[i];
}

void perta_scalar_add(struct perta_backend *be, struct perta_array to, struct perta_array from,
                      uint64_t n)
{
    float *tos = perta_scalar_floats(be, to, n), *rows_from = perta_scalar_floats(be, from, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        tos[i] += rows_from[i];
}

void perta_scalar_scale(struct perta_backend *be, struct perta_array x, float by, uint64_t n)
{
    float *xs = perta_scalar_floats(be, x, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        xs[i] *= by;
}

void perta_scalar_clamp_forward(struct perta_backend *be, struct perta_array x, float limit,
                                uint64_t n)
{
    float *xs = perta_scalar_floats(be, x, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        if (xs[i] > limit || xs[i] < -limit)
            xs[i] = xs[i] > 0 ? limit : -limit;
}

void perta_scalar_clamp_backward(struct perta_backend *be, struct perta_array dx,
                                 struct perta_array x, float limit, uint64_t n)
{
    float *ds = perta_scalar_floats(be, dx, n), *xs = perta_scalar_floats(be, x, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        if (!(xs[i] >= -limit && xs[i] <= limit))
            ds[i] = 0;
}

void perta_scalar_scale_rows(struct perta_backend *be, struct perta_array x, const float *by,
                             size_t n, size_t H)
{
    float *xs = perta_scalar_floats(be, x, n * H);
    for (size_t i = 0; !be->rc && i < n * H; i++)
        xs[i] *= by[i / H];
}

/* Row i of an array. */
static float *row(struct perta_backend *be, struct perta_array a, size_t i, size_t H)
{
    return perta_scalar_floats(be, perta_array_at(a, i * H), H);
}

void perta_scalar_gather(struct perta_backend *be, struct perta_array to, struct perta_array from,
                         const uint32_t *index, size_t n, size_t H)
{
    for (size_t i = 0; !be->rc && i < n; i++)
        for (size_t k = 0; k < H; k++)
            row(be, to, i, H)[k] = row(be, from, index[i], H)[k];
}

void perta_scalar_scatter(struct perta_backend *be, struct perta_array to, struct perta_array from,
                          const uint32_t *index, size_t n, size_t H)
{
    for (size_t i = 0; !be->rc && i < n; i++)
        for (size_t k = 0; k < H; k++)
            row(be, to, index[i], H)[k] = row(be, from, i, H)[k];
}

void perta_scalar_scatter_add(struct perta_backend *be, struct perta_array to,
                              struct perta_array from, const uint32_t *index, size_t n, size_t H)
{
    for (size_t i = 0; !be->rc && i < n; i++)
        for (size_t k = 0; index[i] != UINT32_MAX && k < H; k++)
            row(be, to, index[i], H)[k] += row(be, from, i, H)[k];
}

/* ---- with factors ---- */

void perta_scalar_scatter_add_scaled(struct perta_backend *be, struct perta_array to,
                                     struct perta_array from, const uint32_t *index,
                                     const float *by, size_t n, size_t H)
{
    for (size_t i = 0; !be->rc && i < n; i++)
        for (size_t k = 0; index[i] != UINT32_MAX && k < H; k++)
            row(be, to, index[i], H)[k] += (by ? by[i] : 1) * row(be, from, i, H)[k];
}

void perta_scalar_add_scaled(struct perta_backend *be, struct perta_array to,
                             struct perta_array from, float by, uint64_t n)
{
    float *tos = perta_scalar_floats(be, to, n), *rows_from = perta_scalar_floats(be, from, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        tos[i] += by * rows_from[i];
}

void perta_scalar_multiply_rows(struct perta_backend *be, struct perta_array to,
                                struct perta_array a, struct perta_array by, size_t n, size_t H)
{
    float *tos = perta_scalar_floats(be, to, n * H);
    const float *as = perta_scalar_floats(be, a, n * H), *factors = perta_scalar_floats(be, by, n);
    for (size_t i = 0; !be->rc && i < n * H; i++)
        tos[i] = as[i] * factors[i / H];
}

void perta_scalar_row_dots(struct perta_backend *be, struct perta_array to, struct perta_array a,
                           struct perta_array b, size_t n, size_t width)
{
    float *tos = perta_scalar_floats(be, to, n);
    for (size_t i = 0; !be->rc && i < n; i++) {
        double sum = 0;
        for (size_t k = 0; k < width; k++)
            sum += (double)row(be, a, i, width)[k] * (double)row(be, b, i, width)[k];
        tos[i] = (float)sum;
    }
}

/* ---- blocks of columns ---- */

void perta_scalar_split(struct perta_backend *be, struct perta_array to, struct perta_array from,
                        size_t n, size_t width, size_t first, size_t block, size_t stride,
                        size_t n_blocks)
{
    for (size_t t = 0; !be->rc && t < n; t++)
        for (size_t i = 0; i < n_blocks * block; i++)
            row(be, to, t, n_blocks * block)[i] =
                row(be, from, t, width)[first + i / block * stride + i % block];
}

void perta_scalar_join(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       size_t n, size_t width, size_t first, size_t block, size_t stride,
                       size_t n_blocks)
{
    for (size_t t = 0; !be->rc && t < n; t++)
        for (size_t i = 0; i < n_blocks * block; i++)
            row(be, to, t, width)[first + i / block * stride + i % block] =
                row(be, from, t, n_blocks * block)[i];
}
