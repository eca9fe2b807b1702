#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/compute/scalar_own.h"

/* ---- rotary positions (Su et al. 2021), in float32 as in transformers ---- */

static void rotate_head(const struct perta_rotation *r, float *head, uint32_t position,
                        float direction)
{
    size_t step = r->interleaved ? 2 : 1, other = r->interleaved ? 1 : r->rotated / 2;
    for (size_t i = 0; i < r->rotated / 2; i++) {
        float *pair = head + r->first + step * i, a = pair[0], b = pair[other];
        float angle = (float)position * r->inv_freq[i];
        float c = cosf(angle) * r->factor, s = direction * sinf(angle) * r->factor;
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
            rotate_head(rotation, xs + (t * n_heads + h) * D, places[t].position, direction);
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

/* ---- attention ---- */

/* A key-value head of a sequence. */
struct head {
    const struct perta_attention *of;
    size_t T;
    const struct perta_place *places; /* (T) */
    float *out, *dq, *dk, *dv;        /* the sequence's part of each array, for this head; */
    const float *q, *k, *v, *dout;    /* tokens are ldq or ldk apart */
    size_t ldq, ldk;                  /* n_heads * D, n_kv_heads * D */
    double *p, *dp;                   /* (T) */
    double *dk_sums, *dv_sums;        /* (T, D) */
};

static bool sees(const struct head *h, size_t t, size_t j)
{
    const struct perta_place *place = &h->places[t];
    return j >= place->first && j < place->end &&
           (uint64_t)h->places[j].at + h->of->window > place->at;
}

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* p (T) = softmax of q k / sqrt(D) over the tokens that token t sees, and 0 elsewhere; all 0 if it
 * sees none. q (D) is the token's query. */
static void probabilities(const struct head *h, size_t t, const float *q)
{
    size_t D = h->of->D;
    double most = -INFINITY, sum = 0;
    for (size_t j = 0; j < h->T; j++) {
        h->p[j] = sees(h, t, j) ? dot(q, h->k + j * h->ldk, D) / sqrt((double)D) : -INFINITY;
        most = fmax(most, h->p[j]);
    }
    for (size_t j = 0; j < h->T; j++)
        sum += h->p[j] = sees(h, t, j) ? exp(h->p[j] - most) : 0;
    for (size_t j = 0; j < h->T; j++)
        h->p[j] = sum > 0 ? h->p[j] / sum : 0;
}

/* out = p v, of token t in query head g of those that share this key-value head. */
static void token_forward(const struct head *h, size_t g, size_t t)
{
    size_t D = h->of->D, at = t * h->ldq + g * D;
    probabilities(h, t, h->q + at);
    for (size_t d = 0; d < D; d++) {
        double sum = 0;
        for (size_t j = 0; j < h->T; j++)
            sum += h->p[j] * (double)h->v[j * h->ldk + d];
        h->out[at + d] = (float)sum;
    }
}

/* dp = dout v, ds = p (dp - sum of p dp), of the scores; dq = ds k / sqrt(D), dk += ds q / sqrt(D),
 * dv += p dout. */
static void token_backward(const struct head *h, size_t g, size_t t)
{
    size_t D = h->of->D, at = t * h->ldq + g * D;
    double mean = 0, *ds = h->dp, scale = 1 / sqrt((double)D);
    probabilities(h, t, h->q + at);
    for (size_t j = 0; j < h->T; j++)
        mean += h->p[j] * (h->dp[j] = dot(h->dout + at, h->v + j * h->ldk, D));
    for (size_t j = 0; j < h->T; j++)
        ds[j] = h->p[j] * (h->dp[j] - mean);
    for (size_t d = 0; d < D; d++) {
        double sum = 0;
        for (size_t j = 0; j < h->T; j++) {
            sum += ds[j] * scale * (double)h->k[j * h->ldk + d];
            h->dk_sums[j * D + d] += ds[j] * scale * (double)h->q[at + d];
            h->dv_sums[j * D + d] += h->p[j] * (double)h->dout[at + d];
        }
        h->dq[at + d] = (float)sum;
    }
}

static void head_backward(const struct head *h)
{
    size_t D = h->of->D;
    assert(h->dout && h->dq && h->dk && h->dv);
    for (size_t i = 0; i < h->T * D; i++)
        h->dk_sums[i] = h->dv_sums[i] = 0;
    for (size_t g = 0; g < h->of->n_heads / h->of->n_kv_heads; g++)
        for (size_t t = 0; t < h->T; t++)
            token_backward(h, g, t);
    for (size_t i = 0; i < h->T * D; i++) {
        h->dk[i / D * h->ldk + i % D] = (float)h->dk_sums[i];
        h->dv[i / D * h->ldk + i % D] = (float)h->dv_sums[i];
    }
}

static void head_forward(const struct head *h)
{
    for (size_t g = 0; g < h->of->n_heads / h->of->n_kv_heads; g++)
        for (size_t t = 0; t < h->T; t++)
            token_forward(h, g, t);
}

static size_t rows_of(const struct perta_attention *a)
{
    return a->sequences.starts[a->sequences.n] - a->sequences.origin;
}

/* Key-value head kv of sequence s; whole has the arrays from their start. */
static struct head head_at(const struct perta_attention *a, const struct head *whole, size_t s,
                           size_t kv)
{
    struct head h = *whole;
    size_t t = a->sequences.starts[s] - a->sequences.origin;
    size_t q = t * h.ldq + kv * (a->n_heads / a->n_kv_heads) * a->D, k = t * h.ldk + kv * a->D;
    h.T = a->sequences.starts[s + 1] - a->sequences.starts[s];
    h.places += t;
    h.q += q;
    h.k += k;
    h.v += k;
    h.out = h.out ? h.out + q : NULL;
    h.dout = h.dout ? h.dout + q : NULL;
    h.dq = h.dq ? h.dq + q : NULL;
    h.dk = h.dk ? h.dk + k : NULL;
    h.dv = h.dv ? h.dv + k : NULL;
    return h;
}

/* Call every() for each key-value head of each sequence. */
static void for_heads(struct perta_backend *be, struct head *whole,
                      void (*every)(const struct head *))
{
    const struct perta_attention *a = whole->of;
    size_t n = rows_of(a); /* no sequence is longer than this */
    double *memory = malloc((2 * n + 2 * n * a->D) * sizeof *memory);
    if (!memory) {
        be->rc = perta_fail_sys(&be->err, ENOMEM, "attention");
        return;
    }
    whole->p = memory;
    whole->dp = memory + n;
    whole->dk_sums = memory + 2 * n;
    whole->dv_sums = whole->dk_sums + n * a->D;
    for (size_t s = 0; s < a->sequences.n; s++)
        for (size_t kv = 0; kv < a->n_kv_heads; kv++) {
            struct head h = head_at(a, whole, s, kv);
            every(&h);
        }
    free(memory);
}

/* The inputs that forward and backward share. */
static struct head whole_of(struct perta_backend *be, const struct perta_attention *a,
                            struct perta_array q, struct perta_array k, struct perta_array v)
{
    size_t n = rows_of(a), ldq = a->n_heads * a->D, ldk = a->n_kv_heads * a->D;
    return (struct head){.of = a,
                         .places = a->places,
                         .q = perta_scalar_floats(be, q, n * ldq),
                         .k = perta_scalar_floats(be, k, n * ldk),
                         .v = perta_scalar_floats(be, v, n * ldk),
                         .ldq = ldq,
                         .ldk = ldk};
}

void perta_scalar_attention_forward(struct perta_backend *be,
                                    const struct perta_attention *attention, struct perta_array out,
                                    struct perta_array q, struct perta_array k,
                                    struct perta_array v)
{
    struct head whole = whole_of(be, attention, q, k, v);
    whole.out = perta_scalar_floats(be, out, rows_of(attention) * whole.ldq);
    if (!be->rc)
        for_heads(be, &whole, head_forward);
}

void perta_scalar_attention_backward(struct perta_backend *be,
                                     const struct perta_attention *attention, struct perta_array dq,
                                     struct perta_array dk, struct perta_array dv,
                                     struct perta_array dout, struct perta_array q,
                                     struct perta_array k, struct perta_array v,
                                     const struct perta_array of_heads[2])
{
    struct head whole = whole_of(be, attention, q, k, v);
    size_t n = rows_of(attention);
    (void)of_heads;
    whole.dout = perta_scalar_floats(be, dout, n * whole.ldq);
    whole.dq = perta_scalar_floats(be, dq, n * whole.ldq);
    whole.dk = perta_scalar_floats(be, dk, n * whole.ldk);
    whole.dv = perta_scalar_floats(be, dv, n * whole.ldk);
    if (!be->rc)
        for_heads(be, &whole, head_backward);
}

/* Keys and values of one token. */
static const float *row_of(struct perta_backend *be, const struct perta_attention_past *a,
                           struct perta_array kv, uint64_t row, size_t n)
{
    size_t ldk = a->n_kv_heads * a->D;
    return perta_scalar_floats(be, perta_array_at(kv, row * ldk), n * ldk);
}

/* out (n_heads, D) of a token with queries q (n_heads, D); p: scratch (past->n). */
static void past_forward(const struct perta_attention_past *a, const struct perta_past *past,
                         float *out, const float *q, const float *k, const float *v, double *p)
{
    size_t D = a->D, group = a->n_heads / a->n_kv_heads, ldk = a->n_kv_heads * D;
    for (size_t h = 0; h < a->n_heads; h++) {
        size_t kv = h / group * D;
        double most = -INFINITY, sum = 0;
        for (size_t j = 0; j < past->n; j++) {
            p[j] = dot(q + h * D, k + j * ldk + kv, D) / sqrt((double)D);
            most = fmax(most, p[j]);
        }
        for (size_t j = 0; j < past->n; j++)
            sum += p[j] = exp(p[j] - most);
        for (size_t d = 0; d < D; d++) {
            double of = 0;
            for (size_t j = 0; j < past->n; j++)
                of += p[j] / sum * (double)v[j * ldk + kv + d];
            out[h * D + d] = (float)of;
        }
    }
}

void perta_scalar_attention_past_forward(struct perta_backend *be,
                                         const struct perta_attention_past *a,
                                         struct perta_array out, struct perta_array q,
                                         struct perta_array kv)
{
    size_t ldq = a->n_heads * a->D;
    float *outs = perta_scalar_floats(be, out, a->n * ldq);
    const float *qs = perta_scalar_floats(be, q, a->n * ldq);
    for (size_t t = 0; t < a->n && !be->rc; t++) {
        const struct perta_past *past = &a->pasts[t];
        const float *k = row_of(be, a, kv, past->keys, past->n);
        const float *v = row_of(be, a, kv, past->values, past->n);
        double *p = malloc(past->n * sizeof *p);
        if (!p)
            be->rc = perta_fail_sys(&be->err, ENOMEM, "attention");
        if (!be->rc)
            past_forward(a, past, outs + t * ldq, qs + t * ldq, k, v, p);
        free(p);
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
