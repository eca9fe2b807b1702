#include <math.h>

#include "estimators/compute/scalar_own.h"

/* ---- rotary positions (Su et al. 2021), in float32 as in transformers ---- */

static void rotate_head(const struct perta_rotation *r, float *head,
                        const struct perta_place *place, float direction)
{
    size_t step = r->interleaved ? 2 : 1, other = r->interleaved ? 1 : r->rotated / 2;
    for (size_t i = 0; i < r->rotated / 2; i++) {
        float *pair = head + r->first + step * i, a = pair[0], b = pair[other];
        float angle = (float)place->position * (place->is_long ? r->long_inv_freq : r->inv_freq)[i];
        float factor = place->is_long ? r->long_factor : r->factor;
        float c = cosf(angle) * factor, s = direction * sinf(angle) * factor;
        pair[0] = a * c - b * s;
        pair[other] = b * c + a * s;
    }
}

static void rotate(struct perta_backend *be, struct perta_array x, const struct perta_place *places,
                   const struct perta_rotation *rotation, size_t T, size_t n_heads, size_t D,
                   float direction)
{
    float *xs = perta_scalar_floats(be, x, T * n_heads * D);
    for (size_t t = 0; !be->rc && t < T; t++)
        for (size_t h = 0; h < n_heads; h++)
            rotate_head(rotation, xs + (t * n_heads + h) * D, places + t, direction);
}

void perta_scalar_rope_forward(struct perta_backend *be, struct perta_array x,
                               const struct perta_place *places,
                               const struct perta_rotation *rotation, size_t T, size_t n_heads,
                               size_t D)
{
    rotate(be, x, places, rotation, T, n_heads, D, 1);
}

void perta_scalar_rope_backward(struct perta_backend *be, struct perta_array dx,
                                const struct perta_place *places,
                                const struct perta_rotation *rotation, size_t T, size_t n_heads,
                                size_t D)
{
    rotate(be, dx, places, rotation, T, n_heads, D, -1);
}

/* ---- soft caps of logits ---- */

void perta_scalar_softcap_forward(struct perta_backend *be, struct perta_array x, float cap,
                                  uint64_t n)
{
    float *xs = perta_scalar_floats(be, x, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        xs[i] = (float)((double)cap * tanh((double)xs[i] / (double)cap));
}

void perta_scalar_softcap_backward(struct perta_backend *be, struct perta_array dx,
                                   struct perta_array y, float cap, uint64_t n)
{
    float *ds = perta_scalar_floats(be, dx, n);
    const float *ys = perta_scalar_floats(be, y, n);
    for (uint64_t i = 0; !be->rc && i < n; i++)
        ds[i] = (float)((double)ds[i] * (1 - pow((double)ys[i] / (double)cap, 2)));
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
