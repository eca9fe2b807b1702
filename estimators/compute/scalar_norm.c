#include <math.h>

#include "estimators/compute/scalar_own.h"

/* weight + plus of row t's element i. */
static double weight_at(struct perta_backend *be, const struct perta_norm *norm, size_t t, size_t i,
                        size_t H)
{
    const float *w = perta_scalar_floats(be, norm->weight, norm->n_weights * H);
    return w ? (double)(w[t % norm->n_weights * H + i] + norm->plus) : 1;
}

/* ---- RMSNorm (Zhang & Sennrich 2019) ---- */

void perta_scalar_rmsnorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                  struct perta_array y, struct perta_array rstd,
                                  struct perta_array x, size_t T, size_t H)
{
    float *ys = perta_scalar_floats(be, y, T * H), *rstds = perta_scalar_floats(be, rstd, T);
    const float *xs = perta_scalar_floats(be, x, T * H);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H;
        double squares = 0;
        for (size_t i = 0; i < H; i++)
            squares += (double)row[i] * (double)row[i];
        double r = 1 / sqrt(squares / (double)H + (double)norm->eps);
        for (size_t i = 0; i < H; i++)
            ys[t * H + i] = (float)((double)row[i] * r * weight_at(be, norm, t, i, H));
        rstds[t] = (float)r;
    }
}

/* y_i = w_i x_i r with r = (mean(x^2) + eps)^(-1/2), so dr/dx_i = -r^3 x_i / H. */
void perta_scalar_rmsnorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                   struct perta_array dx, struct perta_array dy,
                                   struct perta_array x, struct perta_array rstd, size_t T,
                                   size_t H)
{
    float *dxs = perta_scalar_floats(be, dx, T * H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *rstds = perta_scalar_floats(be, rstd, T);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H, *drow = dys + t * H;
        double r = (double)rstds[t], dr = 0;
        for (size_t i = 0; i < H; i++)
            dr += (double)drow[i] * weight_at(be, norm, t, i, H) * (double)row[i];
        for (size_t i = 0; i < H; i++)
            dxs[t * H + i] = (float)((double)dxs[t * H + i] +
                                     (double)drow[i] * weight_at(be, norm, t, i, H) * r -
                                     dr * r * r * r * (double)row[i] / (double)H);
    }
}

void perta_scalar_rmsnorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                          struct perta_array dweight, struct perta_array dy,
                                          struct perta_array x, struct perta_array rstd, size_t T,
                                          size_t H)
{
    size_t n = norm->n_weights;
    float *dws = perta_scalar_floats(be, dweight, n * H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *rstds = perta_scalar_floats(be, rstd, T);
    for (size_t i = 0; !be->rc && i < n * H; i++) {
        double sum = 0;
        for (size_t t = i / H; t < T; t += n)
            sum += (double)dys[t * H + i % H] * (double)xs[t * H + i % H] * (double)rstds[t];
        dws[i] = (float)((double)dws[i] + sum);
    }
}

/* ---- LayerNorm (Ba et al. 2016) ---- */

void perta_scalar_layernorm_forward(struct perta_backend *be, const struct perta_norm *norm,
                                    struct perta_array y, struct perta_array stats,
                                    struct perta_array x, size_t T, size_t H)
{
    float *ys = perta_scalar_floats(be, y, T * H), *of = perta_scalar_floats(be, stats, 2 * T);
    const float *xs = perta_scalar_floats(be, x, T * H);
    const float *bias = perta_scalar_floats(be, norm->bias, norm->n_weights * H);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H, *b = bias ? bias + t % norm->n_weights * H : NULL;
        double mean = 0, variance = 0;
        for (size_t i = 0; i < H; i++)
            mean += (double)row[i] / (double)H;
        for (size_t i = 0; i < H; i++)
            variance += ((double)row[i] - mean) * ((double)row[i] - mean) / (double)H;
        double r = 1 / sqrt(variance + (double)norm->eps);
        for (size_t i = 0; i < H; i++)
            ys[t * H + i] = (float)(((double)row[i] - mean) * r * weight_at(be, norm, t, i, H) +
                                    (b ? (double)b[i] : 0));
        of[2 * t] = (float)mean;
        of[2 * t + 1] = (float)r;
    }
}

/* With z = (x - mean) r and g = dL/dz = w dy: dx = r (g - mean(g) - z mean(g z)). */
void perta_scalar_layernorm_backward(struct perta_backend *be, const struct perta_norm *norm,
                                     struct perta_array dx, struct perta_array dy,
                                     struct perta_array x, struct perta_array stats, size_t T,
                                     size_t H)
{
    float *dxs = perta_scalar_floats(be, dx, T * H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *of = perta_scalar_floats(be, stats, 2 * T);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H, *drow = dys + t * H;
        double mean = (double)of[2 * t], r = (double)of[2 * t + 1], g = 0, gz = 0;
        for (size_t i = 0; i < H; i++) {
            double one = weight_at(be, norm, t, i, H) * (double)drow[i];
            g += one / (double)H;
            gz += one * ((double)row[i] - mean) * r / (double)H;
        }
        for (size_t i = 0; i < H; i++) {
            double one = weight_at(be, norm, t, i, H) * (double)drow[i];
            dxs[t * H + i] =
                (float)((double)dxs[t * H + i] + r * (one - g - ((double)row[i] - mean) * r * gz));
        }
    }
}

void perta_scalar_layernorm_backward_weight(struct perta_backend *be, const struct perta_norm *norm,
                                            struct perta_array dweight, struct perta_array dbias,
                                            struct perta_array dy, struct perta_array x,
                                            struct perta_array stats, size_t T, size_t H)
{
    size_t n = norm->n_weights;
    float *dws = perta_scalar_floats(be, dweight, n * H);
    float *dbs = perta_scalar_floats(be, dbias, n * H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *of = perta_scalar_floats(be, stats, 2 * T);
    for (size_t i = 0; !be->rc && i < n * H; i++) {
        double weight = 0, bias = 0;
        for (size_t t = i / H; t < T; t += n) {
            double d = (double)dys[t * H + i % H];
            weight += d * ((double)xs[t * H + i % H] - (double)of[2 * t]) * (double)of[2 * t + 1];
            bias += d;
        }
        if (dws)
            dws[i] = (float)((double)dws[i] + weight);
        if (dbs)
            dbs[i] = (float)((double)dbs[i] + bias);
    }
}
