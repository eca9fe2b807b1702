#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/compute/scalar_own.h"

/* ---- RMSNorm (Zhang & Sennrich 2019) ---- */

void perta_scalar_rmsnorm_forward(struct perta_backend *be, struct perta_array y,
                                  struct perta_array rstd, struct perta_array x,
                                  struct perta_array weight, size_t T, size_t H, float eps)
{
    float *ys = perta_scalar_floats(be, y, T * H), *rstds = perta_scalar_floats(be, rstd, T);
    const float *xs = perta_scalar_floats(be, x, T * H);
    const float *w = perta_scalar_floats(be, weight, H);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H;
        double squares = 0;
        for (size_t i = 0; i < H; i++)
            squares += (double)row[i] * (double)row[i];
        double r = 1 / sqrt(squares / (double)H + (double)eps);
        for (size_t i = 0; i < H; i++)
            ys[t * H + i] = (float)((double)row[i] * r * (double)w[i]);
        rstds[t] = (float)r;
    }
}

/* y_i = w_i x_i r with r = (mean(x^2) + eps)^(-1/2), so dr/dx_i = -r^3 x_i / H. */
void perta_scalar_rmsnorm_backward(struct perta_backend *be, struct perta_array dx,
                                   struct perta_array dy, struct perta_array x,
                                   struct perta_array rstd, struct perta_array weight, size_t T,
                                   size_t H)
{
    float *dxs = perta_scalar_floats(be, dx, T * H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *rstds = perta_scalar_floats(be, rstd, T), *w = perta_scalar_floats(be, weight, H);
    for (size_t t = 0; !be->rc && t < T; t++) {
        const float *row = xs + t * H, *drow = dys + t * H;
        double r = (double)rstds[t], dr = 0;
        for (size_t i = 0; i < H; i++)
            dr += (double)drow[i] * (double)w[i] * (double)row[i];
        for (size_t i = 0; i < H; i++)
            dxs[t * H + i] = (float)((double)dxs[t * H + i] + (double)drow[i] * (double)w[i] * r -
                                     dr * r * r * r * (double)row[i] / (double)H);
    }
}

void perta_scalar_rmsnorm_backward_weight(struct perta_backend *be, struct perta_array dweight,
                                          struct perta_array dy, struct perta_array x,
                                          struct perta_array rstd, size_t T, size_t H)
{
    float *dws = perta_scalar_floats(be, dweight, H);
    const float *dys = perta_scalar_floats(be, dy, T * H), *xs = perta_scalar_floats(be, x, T * H);
    const float *rstds = perta_scalar_floats(be, rstd, T);
    for (size_t i = 0; !be->rc && i < H; i++) {
        double sum = 0;
        for (size_t t = 0; t < T; t++)
            sum += (double)dys[t * H + i] * (double)xs[t * H + i] * (double)rstds[t];
        dws[i] = (float)((double)dws[i] + sum);
    }
}

/* ---- rotary positions (Su et al. 2021), in float32 as in transformers ---- */

static void rotate(struct perta_backend *be, struct perta_array x, const struct perta_place *places,
                   const float *inv_freq, size_t T, size_t n_heads, size_t D, float direction)
{
    float *xs = perta_scalar_floats(be, x, T * n_heads * D);
    for (size_t t = 0; !be->rc && t < T; t++)
        for (size_t h = 0; h < n_heads; h++)
            for (size_t i = 0; i < D / 2; i++) {
                float *head = xs + (t * n_heads + h) * D, a = head[i], b = head[i + D / 2];
                float angle = (float)places[t].position * inv_freq[i];
                float c = cosf(angle), s = direction * sinf(angle);
                head[i] = a * c - b * s;
                head[i + D / 2] = b * c + a * s;
            }
}

void perta_scalar_rope_forward(struct perta_backend *be, struct perta_array x,
                               const struct perta_place *places, const float *inv_freq, size_t T,
                               size_t n_heads, size_t D)
{
    rotate(be, x, places, inv_freq, T, n_heads, D, 1);
}

void perta_scalar_rope_backward(struct perta_backend *be, struct perta_array dx,
                                const struct perta_place *places, const float *inv_freq, size_t T,
                                size_t n_heads, size_t D)
{
    rotate(be, dx, places, inv_freq, T, n_heads, D, -1);
}

/* ---- SwiGLU (Shazeer 2020): silu(x) = x sigmoid(x) ---- */

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

void perta_scalar_swiglu_forward(struct perta_backend *be, struct perta_array h,
                                 struct perta_array gate, struct perta_array up, size_t n)
{
    float *hs = perta_scalar_floats(be, h, n);
    const float *gates = perta_scalar_floats(be, gate, n), *ups = perta_scalar_floats(be, up, n);
    for (size_t i = 0; !be->rc && i < n; i++) {
        double g = (double)gates[i];
        hs[i] = (float)(g * sigmoid(g) * (double)ups[i]);
    }
}

void perta_scalar_swiglu_backward(struct perta_backend *be, struct perta_array dgate,
                                  struct perta_array dup, struct perta_array dh,
                                  struct perta_array gate, struct perta_array up, size_t n)
{
    float *dgates = perta_scalar_floats(be, dgate, n), *dups = perta_scalar_floats(be, dup, n);
    const float *dhs = perta_scalar_floats(be, dh, n), *gates = perta_scalar_floats(be, gate, n);
    const float *ups = perta_scalar_floats(be, up, n);
    for (size_t i = 0; !be->rc && i < n; i++) {
        double d = (double)dhs[i], g = (double)gates[i], s = sigmoid(g);
        dgates[i] = (float)(d * (double)ups[i] * (s + g * s * (1 - s)));
        dups[i] = (float)(d * g * s);
    }
}

/* ---- cross-entropy ---- */

void perta_scalar_cross_entropy_forward(struct perta_backend *be, struct perta_array logits,
                                        size_t row, size_t n_rows, size_t n, const int32_t *target,
                                        struct perta_array most, struct perta_array sums,
                                        struct perta_array of_target)
{
    const float *l = perta_scalar_floats(be, logits, n * n_rows);
    float *mosts = perta_scalar_floats(be, most, n);
    float *of_targets = perta_scalar_floats(be, of_target, n);
    double *sum = perta_scalar_doubles(be, sums, n);
    for (size_t i = 0; !be->rc && i < n; i++, l += n_rows) {
        float high = mosts[i];
        for (size_t j = 0; j < n_rows; j++)
            high = fmaxf(high, l[j]);
        sum[i] *= exp((double)mosts[i] - (double)high);
        for (size_t j = 0; j < n_rows; j++) {
            sum[i] += exp((double)l[j] - (double)high);
            if (row + j == (size_t)target[i])
                of_targets[i] = l[j];
        }
        mosts[i] = high;
    }
}

void perta_scalar_cross_entropy_backward(struct perta_backend *be, struct perta_array logits,
                                         size_t row, size_t n_rows, size_t n, const int32_t *target,
                                         struct perta_array most, struct perta_array sums,
                                         struct perta_array share)
{
    float *l = perta_scalar_floats(be, logits, n * n_rows);
    const float *mosts = perta_scalar_floats(be, most, n);
    const double *sum = perta_scalar_doubles(be, sums, n);
    const float *shares = perta_scalar_floats(be, share, n);
    for (size_t i = 0; !be->rc && i < n; i++, l += n_rows)
        for (size_t j = 0; j < n_rows; j++) {
            double p = exp((double)l[j] - (double)mosts[i]) / sum[i];
            l[j] = (float)((double)shares[i] * (p - (row + j == (size_t)target[i])));
        }
}

void perta_scalar_best_forward(struct perta_backend *be, struct perta_array logits, size_t row,
                               size_t n_rows, size_t n, struct perta_array most,
                               struct perta_array best)
{
    const float *l = perta_scalar_floats(be, logits, n * n_rows);
    float *mosts = perta_scalar_floats(be, most, n);
    int32_t *bests = perta_scalar_bytes(be, best, n * sizeof *bests);
    for (size_t i = 0; !be->rc && i < n; i++, l += n_rows)
        for (size_t j = 0; j < n_rows; j++)
            if (l[j] > mosts[i]) {
                mosts[i] = l[j];
                bests[i] = (int32_t)(row + j);
            }
}

void perta_scalar_moments_forward(struct perta_backend *be, struct perta_array logits,
                                  size_t n_rows, size_t n, struct perta_array most,
                                  struct perta_array sums, struct perta_array moments)
{
    const float *l = perta_scalar_floats(be, logits, n * n_rows);
    const float *mosts = perta_scalar_floats(be, most, n);
    const double *sum = perta_scalar_doubles(be, sums, n);
    double *m = perta_scalar_doubles(be, moments, 2 * n);
    for (size_t i = 0; !be->rc && i < n; i++, l += n_rows, m += 2) {
        float high = mosts[i];
        for (size_t j = 0; j < n_rows; j++)
            high = fmaxf(high, l[j]);
        /* The sums so far, of d - g instead of d; there are none before the first block. */
        double g = isinf(mosts[i]) ? 0 : (double)high - (double)mosts[i];
        m[1] = exp(-g) * (m[1] - 2 * g * m[0] + g * g * sum[i]);
        m[0] = exp(-g) * (m[0] - g * sum[i]);
        for (size_t j = 0; j < n_rows; j++) {
            double d = (double)l[j] - (double)high;
            m[0] += exp(d) * d;
            m[1] += exp(d) * d * d;
        }
    }
}
