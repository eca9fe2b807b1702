#include <assert.h>
#include <math.h>
#include <string.h>

#include "estimators/compute/scalar_own.h"

/* ---- weights in the dtypes of checkpoints ---- */

static float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* IEEE 754 binary16: a sign, 5 bits of exponent, 10 of fraction. */
static float float_of_half(uint16_t half)
{
    float sign = half & 0x8000 ? -1 : 1;
    int exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31)
        return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf((float)(1024 + fraction), exponent - 25)
                            : ldexpf((float)fraction, -24));
}

static float element(const void *from, enum perta_dtype dtype, size_t i)
{
    uint32_t whole;
    uint16_t half;
    if (dtype == PERTA_F32) {
        memcpy(&whole, (const uint8_t *)from + i * 4, sizeof whole);
        return float_of_bits(whole);
    }
    memcpy(&half, (const uint8_t *)from + i * 2, sizeof half);
    return dtype == PERTA_BF16 ? float_of_bits((uint32_t)half << 16) : float_of_half(half);
}

static const void *weight_of(struct perta_backend *be, const struct perta_linear *l)
{
    return perta_scalar_bytes(be, l->weight, l->out * l->in * (l->dtype == PERTA_F32 ? 4 : 2));
}

/* ---- linear layers ---- */

/* Of element (o, i) of a weight (out, in). */
static size_t index_of(const struct perta_linear *l, size_t o, size_t i)
{
    return l->transposed ? i * l->out + o : o * l->in + i;
}

void perta_scalar_linear_forward(struct perta_backend *be, const struct perta_linear *l,
                                 const struct perta_runs *tiles, struct perta_array x,
                                 struct perta_array y, size_t n, bool add)
{
    const void *weight = weight_of(be, l);
    const float *xs = perta_scalar_floats(be, x, n * l->in); /* (n, in) */
    const float *bias = perta_scalar_floats(be, l->bias, l->out);
    float *ys = perta_scalar_floats(be, y, n * l->out); /* (n, out) */
    (void)tiles;
    for (size_t t = 0; !be->rc && t < n; t++)
        for (size_t o = 0; o < l->out; o++) {
            double sum = add ? (double)ys[t * l->out + o] : 0;
            for (size_t i = 0; i < l->in; i++)
                sum += (double)xs[t * l->in + i] *
                       (double)element(weight, l->dtype, index_of(l, o, i));
            ys[t * l->out + o] = (float)(sum + (bias ? (double)bias[o] : 0));
        }
}

void perta_scalar_linear_backward(struct perta_backend *be, const struct perta_linear *l,
                                  const struct perta_runs *tiles, struct perta_array dy,
                                  struct perta_array dx, size_t n, bool add)
{
    const void *weight = weight_of(be, l);
    const float *dys = perta_scalar_floats(be, dy, n * l->out); /* (n, out) */
    float *dxs = perta_scalar_floats(be, dx, n * l->in);        /* (n, in) */
    (void)tiles;
    for (size_t t = 0; !be->rc && t < n; t++)
        for (size_t i = 0; i < l->in; i++) {
            double sum = add ? (double)dxs[t * l->in + i] : 0;
            for (size_t o = 0; o < l->out; o++)
                sum += (double)dys[t * l->out + o] *
                       (double)element(weight, l->dtype, index_of(l, o, i));
            dxs[t * l->in + i] = (float)sum;
        }
}

void perta_scalar_linear_backward_weight(struct perta_backend *be, struct perta_array dweight,
                                         struct perta_array dy, struct perta_array x, size_t n,
                                         size_t out, size_t in)
{
    float *dweights = perta_scalar_floats(be, dweight, out * in); /* (out, in) */
    const float *dys = perta_scalar_floats(be, dy, n * out);      /* (n, out) */
    const float *xs = perta_scalar_floats(be, x, n * in);         /* (n, in) */
    for (size_t o = 0; !be->rc && o < out; o++)
        for (size_t i = 0; i < in; i++) {
            double sum = (double)dweights[o * in + i];
            for (size_t t = 0; t < n; t++)
                sum += (double)dys[t * out + o] * (double)xs[t * in + i];
            dweights[o * in + i] = (float)sum;
        }
}

void perta_scalar_linear_backward_bias(struct perta_backend *be, struct perta_array dbias,
                                       struct perta_array dy, size_t first, size_t end, size_t out)
{
    float *dbiases = perta_scalar_floats(be, dbias, out);
    const float *dys = perta_scalar_floats(be, dy, end * out); /* (end, out) */
    for (size_t o = 0; !be->rc && o < out; o++) {
        double sum = 0;
        for (size_t t = first; t < end; t++)
            sum += (double)dys[t * out + o];
        dbiases[o] = (float)sum;
    }
}

/* ---- LoRA ---- */

/* A dense weight (out, in) = scaling * (b a), and its gradient: room is not used. */
static double low_rank_element(struct perta_backend *be, const struct perta_low_rank *l, size_t o,
                               size_t i)
{
    const float *a = perta_scalar_floats(be, l->a, l->r * l->in);  /* (r, in) */
    const float *b = perta_scalar_floats(be, l->b, l->out * l->r); /* (out, r) */
    double sum = 0;
    for (size_t k = 0; k < l->r; k++)
        sum += (double)b[o * l->r + k] * (double)a[k * l->in + i];
    return sum * (double)l->scaling;
}

void perta_scalar_low_rank_forward(struct perta_backend *be, const struct perta_low_rank *l,
                                   const struct perta_runs *tiles, struct perta_array x,
                                   struct perta_array y, size_t n, struct perta_array room)
{
    const float *xs = perta_scalar_floats(be, x, n * l->in); /* (n, in) */
    float *ys = perta_scalar_floats(be, y, n * l->out);      /* (n, out) */
    (void)tiles;
    (void)room;
    for (size_t o = 0; !be->rc && o < l->out; o++)
        for (size_t t = 0; t < n; t++) {
            double sum = (double)ys[t * l->out + o];
            for (size_t i = 0; i < l->in; i++)
                sum += (double)xs[t * l->in + i] * low_rank_element(be, l, o, i);
            ys[t * l->out + o] = (float)sum;
        }
}

void perta_scalar_low_rank_backward(struct perta_backend *be, const struct perta_low_rank *l,
                                    const struct perta_runs *tiles, struct perta_array dy,
                                    struct perta_array dx, size_t n, struct perta_array room)
{
    const float *dys = perta_scalar_floats(be, dy, n * l->out); /* (n, out) */
    float *dxs = perta_scalar_floats(be, dx, n * l->in);        /* (n, in) */
    (void)tiles;
    (void)room;
    for (size_t i = 0; !be->rc && i < l->in; i++)
        for (size_t t = 0; t < n; t++) {
            double sum = (double)dxs[t * l->in + i];
            for (size_t o = 0; o < l->out; o++)
                sum += (double)dys[t * l->out + o] * low_rank_element(be, l, o, i);
            dxs[t * l->in + i] = (float)sum;
        }
}

/* Element (o, i) of dy^T x. */
static double dense_gradient(const struct perta_low_rank *l, const float *xs, const float *dys,
                             size_t n, size_t o, size_t i)
{
    double sum = 0;
    for (size_t t = 0; t < n; t++)
        sum += (double)dys[t * l->out + o] * (double)xs[t * l->in + i];
    return sum;
}

void perta_scalar_low_rank_gradient(struct perta_backend *be, const struct perta_low_rank *l,
                                    const struct perta_runs *tiles, struct perta_array x,
                                    struct perta_array dy, struct perta_array da,
                                    struct perta_array db, size_t n, struct perta_array room)
{
    const float *a = perta_scalar_floats(be, l->a, l->r * l->in);  /* (r, in) */
    const float *b = perta_scalar_floats(be, l->b, l->out * l->r); /* (out, r) */
    const float *xs = perta_scalar_floats(be, x, n * l->in),       /* (n, in), (n, out) */
        *dys = perta_scalar_floats(be, dy, n * l->out);
    float *das = perta_scalar_floats(be, da, l->r * l->in);
    float *dbs = perta_scalar_floats(be, db, l->out * l->r);
    (void)tiles;
    (void)room;
    for (size_t k = 0; !be->rc && k < l->r; k++) {
        for (size_t i = 0; i < l->in; i++) {
            double sum = 0;
            for (size_t o = 0; o < l->out; o++)
                sum += (double)b[o * l->r + k] * dense_gradient(l, xs, dys, n, o, i);
            das[k * l->in + i] += (float)(sum * (double)l->scaling);
        }
        for (size_t o = 0; o < l->out; o++) {
            double sum = 0;
            for (size_t i = 0; i < l->in; i++)
                sum += (double)a[k * l->in + i] * dense_gradient(l, xs, dys, n, o, i);
            dbs[o * l->r + k] += (float)(sum * (double)l->scaling);
        }
    }
}

/* ---- gradients over samples ---- */

/* Element (r, i) of dy^T x over a chunk's rows. */
static double product(struct perta_backend *be, const struct perta_gradient *g,
                      const struct perta_chunk *chunk, size_t r, size_t i)
{
    size_t n = chunk->n, row = chunk->first - g->origin;
    const float *x = perta_scalar_floats(be, perta_array_at(g->x, row * g->in), n * g->in);
    const float *dy =
        perta_scalar_floats(be, perta_array_at(g->dy, row * g->dy_width), n * g->dy_width);
    double sum = 0;
    for (size_t t = 0; t < n; t++)
        sum += (double)dy[t * g->dy_width + g->col + r] * (double)x[t * g->in + i];
    return sum;
}

/* What token k adds to element (r, i). */
static float of_token(struct perta_backend *be, const struct perta_gradient *g, size_t k, size_t r,
                      size_t i)
{
    return g->tokens[k].row == r ? *perta_scalar_floats(be, perta_array_at(g->d, k * g->in + i), 1)
                                 : 0;
}

/* Where the square of element (r, i) of a sample's gradient is added. */
static double *norm_at(struct perta_backend *be, const struct perta_gradient *g, size_t r, size_t i,
                       uint64_t sample)
{
    size_t row_tiles = (g->rows + PERTA_TILE_ROWS - 1) / PERTA_TILE_ROWS;
    size_t tile = i / PERTA_TILE_COLS * row_tiles + r / PERTA_TILE_ROWS;
    return perta_scalar_doubles(be, g->norms, perta_tiles(g->rows, g->in) * g->n_samples) +
           tile * g->n_samples + sample;
}

/* Add to element (r, i), chunk after chunk. */
static void add_element(struct perta_backend *be, const struct perta_gradient *g, size_t r,
                        size_t i)
{
    size_t at = r * g->in + i, k = 0; /* k: next token */
    double *sum = perta_scalar_doubles(be, g->sums, g->rows * g->in);
    double *square = perta_scalar_doubles(be, g->squares, g->rows * g->in);
    float *sample = perta_scalar_floats(be, g->sample, g->rows * g->in);
    for (size_t c = g->first; c < g->end; c++) {
        const struct perta_chunk *chunk = &g->chunks->of[c];
        assert(chunk->begins || sample);
        float d = chunk->begins ? 0 : sample[at];
        if (perta_array_is(g->x))
            d = (float)((double)d + product(be, g, chunk, r, i));
        while (g->chunks->by_sample && k < g->n_tokens && g->tokens[k].sample < chunk->sample)
            k++;
        for (; g->chunks->by_sample && chunk->ends && k < g->n_tokens &&
               g->tokens[k].sample == chunk->sample;
             k++)
            d += of_token(be, g, k, r, i);
        if (sample)
            sample[at] = d;
        if (chunk->ends && sum)
            sum[at] += (double)d;
        if (chunk->ends && square)
            square[at] += (double)d * (double)d;
        if (chunk->ends && perta_array_is(g->norms))
            *norm_at(be, g, r, i, chunk->sample) += (double)d * (double)d;
    }
    for (k = 0; sum && !g->chunks->by_sample && k < g->n_tokens; k++)
        sum[at] += (double)of_token(be, g, k, r, i);
}

void perta_scalar_gradient(struct perta_backend *be, const struct perta_gradient *g)
{
    for (size_t r = 0; !be->rc && r < g->rows; r++)
        for (size_t i = 0; i < g->in; i++)
            add_element(be, g, r, i);
}

void perta_scalar_accumulate(struct perta_backend *be, struct perta_array sums,
                             struct perta_array squares, struct perta_array d, size_t n)
{
    double *sum = perta_scalar_doubles(be, sums, n), *square = perta_scalar_doubles(be, squares, n);
    const float *ds = perta_scalar_floats(be, d, n);
    for (size_t i = 0; !be->rc && i < n; i++) {
        sum[i] += (double)ds[i];
        if (square)
            square[i] += (double)ds[i] * (double)ds[i];
    }
}

void perta_scalar_mean(struct perta_backend *be, struct perta_array to, struct perta_array from,
                       double of, size_t n, bool *finite)
{
    float *means = perta_scalar_floats(be, to, n);
    const double *sums = perta_scalar_doubles(be, from, n);
    *finite = true;
    for (size_t i = 0; !be->rc && i < n; i++) {
        means[i] = (float)(sums[i] / of);
        *finite = *finite && isfinite(means[i]);
    }
}

/* ---- training ---- */

void perta_scalar_adamw(struct perta_backend *be, struct perta_array weight,
                        struct perta_array first, struct perta_array second,
                        struct perta_array gradient, uint64_t n, float learning_rate,
                        float weight_decay, uint64_t step)
{
    const float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
    float *w = perta_scalar_floats(be, weight, n), *g = perta_scalar_floats(be, gradient, n);
    float *m = perta_scalar_floats(be, first, n), *v = perta_scalar_floats(be, second, n);
    float correct1 = (float)(1 - pow(0.9, (double)step));
    float correct2 = (float)(1 - pow(0.999, (double)step));
    for (uint64_t i = 0; !be->rc && i < n; i++) {
        m[i] = beta1 * m[i] + (1 - beta1) * g[i];
        v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
        w[i] -= learning_rate * weight_decay * w[i];
        w[i] -= learning_rate * (m[i] / correct1) / (sqrtf(v[i] / correct2) + eps);
    }
}
