#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "estimators/compute/scalar_own.h"
#include "io/format/convert.h"

/* ---- attention, from float32 to float32, in double ---- */

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* x (n) becomes its softmax, in which a sink takes part that -INFINITY leaves out. Returns the
 * sink's probability. All may be -INFINITY: then all are 0. */
static double softmax(double *x, size_t n, double sink)
{
    double most = sink, sum = 0;
    for (size_t j = 0; j < n; j++)
        most = fmax(most, x[j]);
    for (size_t j = 0; j < n; j++)
        sum += x[j] = isinf(x[j]) ? 0 : exp(x[j] - most);
    double of_sink = isinf(sink) ? 0 : exp(sink - most);
    sum += of_sink;
    for (size_t j = 0; j < n && sum > 0; j++)
        x[j] /= sum;
    return sum > 0 ? of_sink / sum : 0;
}

static double bf16(double x)
{
    return (double)perta_f32_from_bf16(perta_bf16_from_f32((float)x));
}

/* What ALiBi adds to the score of the key of this number. */
static double bias(const struct perta_attention *a, size_t head, size_t number)
{
    double slope = a->slopes ? (double)a->slopes[head] : 0, n = (double)number;
    return a->slopes_bf16 ? (double)a->scale * bf16(slope * bf16(n)) : slope * n;
}

/* The score of query q (D) and key k (D), which has this number; the last key that is seen has
 * number last. *slope, unless NULL, is set to its derivative by scale * q k. */
static double score(const struct perta_attention *a, size_t head, const float *q, const float *k,
                    size_t number, size_t last, double *slope)
{
    double s = (double)a->scale * dot(q, k, a->D), cap = (double)a->softcap;
    double t = cap > 0 ? tanh(s / cap) : 0;
    if (slope)
        *slope = 1 - t * t;
    return (cap > 0 ? cap * t : s) + bias(a, head, number) - bias(a, head, last);
}

/* ---- within sequences ---- */

/* A key-value head of a sequence. */
struct head {
    const struct perta_attention *of;
    size_t T, first;                  /* first: query head of those that share it */
    const struct perta_place *places; /* (T) */
    const float *sinks;               /* (n_heads); NULL: none */
    float *dsinks;                    /* of the sequence, (n_heads); NULL: not wanted */
    float *out, *dq, *dk, *dv;        /* the sequence's part of each array, for this head; */
    const float *q, *k, *v, *dout;    /* tokens are ldq, ldk, ldv or ldo apart */
    size_t ldq, ldk, ldv, ldo;        /* n_heads * D, n_kv_heads * D, n_kv_heads * V, n_heads * V */
    double *p, *dp, *slopes;          /* (T) */
    double *dk_sums, *dv_sums;        /* (T, D), (T, V) */
};

static bool same_chunk(const struct head *h, uint32_t a, uint32_t b)
{
    uint32_t start = h->places[0].at, chunk = h->of->chunk;
    return !chunk || (a >= start && b >= start && (a - start) / chunk == (b - start) / chunk);
}

static bool sees(const struct head *h, size_t t, size_t j)
{
    const struct perta_place *place = &h->places[t];
    return j >= place->first && j < place->end &&
           (uint64_t)h->places[j].at + h->of->window > place->at &&
           same_chunk(h, h->places[j].at, place->at);
}

/* p (T) = the probabilities of the tokens that token t sees in query head g, and 0 elsewhere.
 * Returns the sink's. */
static double probabilities(const struct head *h, size_t g, size_t t)
{
    const float *q = h->q + t * h->ldq + g * h->of->D;
    for (size_t j = 0; j < h->T; j++)
        h->p[j] = sees(h, t, j) ? score(h->of, h->first + g, q, h->k + j * h->ldk, j,
                                        h->places[t].end - 1, &h->slopes[j])
                                : -INFINITY;
    return softmax(h->p, h->T, h->sinks ? (double)h->sinks[h->first + g] : -INFINITY);
}

/* out = p v, of token t in query head g of those that share this key-value head. */
static void token_forward(const struct head *h, size_t g, size_t t)
{
    size_t V = h->of->V;
    probabilities(h, g, t);
    for (size_t d = 0; d < V; d++) {
        double sum = 0;
        for (size_t j = 0; j < h->T; j++)
            sum += h->p[j] * (double)h->v[j * h->ldv + d];
        h->out[t * h->ldo + g * V + d] = (float)sum;
    }
}

/* With s = scale * q k: dp = dout v, ds = p (dp - sum of p dp) times the soft cap's derivative;
 * dq = scale * ds k, dk += scale * ds q, dv += p dout. Returns the gradient of the sink. */
static double token_backward(const struct head *h, size_t g, size_t t)
{
    size_t D = h->of->D, V = h->of->V, at = t * h->ldq + g * D;
    const float *dout = h->dout + t * h->ldo + g * V;
    double mean = 0, *ds = h->dp, scale = (double)h->of->scale;
    double p_sink = probabilities(h, g, t);
    for (size_t j = 0; j < h->T; j++)
        mean += h->p[j] * (h->dp[j] = dot(dout, h->v + j * h->ldv, V));
    for (size_t j = 0; j < h->T; j++)
        ds[j] = h->p[j] > 0 ? h->p[j] * (h->dp[j] - mean) * h->slopes[j] : 0;
    for (size_t d = 0; d < D; d++) {
        double sum = 0;
        for (size_t j = 0; j < h->T; j++) {
            sum += ds[j] * scale * (double)h->k[j * h->ldk + d];
            h->dk_sums[j * D + d] += ds[j] * scale * (double)h->q[at + d];
        }
        h->dq[at + d] = (float)sum;
    }
    for (size_t j = 0; j < h->T; j++)
        for (size_t d = 0; d < V; d++)
            h->dv_sums[j * V + d] += h->p[j] * (double)dout[d];
    return -p_sink * mean;
}

static void head_backward(const struct head *h)
{
    size_t D = h->of->D, V = h->of->V;
    assert(h->dout && h->dq && h->dk && h->dv);
    for (size_t i = 0; i < h->T * D; i++)
        h->dk_sums[i] = 0;
    for (size_t i = 0; i < h->T * V; i++)
        h->dv_sums[i] = 0;
    for (size_t g = 0; g < h->of->n_heads / h->of->n_kv_heads; g++) {
        double dsink = 0;
        for (size_t t = 0; t < h->T; t++)
            dsink += token_backward(h, g, t);
        if (h->dsinks)
            h->dsinks[h->first + g] = (float)dsink;
    }
    for (size_t i = 0; i < h->T * D; i++)
        h->dk[i / D * h->ldk + i % D] = (float)h->dk_sums[i];
    for (size_t i = 0; i < h->T * V; i++)
        h->dv[i / V * h->ldv + i % V] = (float)h->dv_sums[i];
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
    h.first = kv * (a->n_heads / a->n_kv_heads);
    size_t q = t * h.ldq + h.first * a->D, k = t * h.ldk + kv * a->D;
    size_t v = t * h.ldv + kv * a->V, o = t * h.ldo + h.first * a->V;
    h.T = a->sequences.starts[s + 1] - a->sequences.starts[s];
    h.places += t;
    h.q += q;
    h.k += k;
    h.v += v;
    h.out = h.out ? h.out + o : NULL;
    h.dout = h.dout ? h.dout + o : NULL;
    h.dq = h.dq ? h.dq + q : NULL;
    h.dk = h.dk ? h.dk + k : NULL;
    h.dv = h.dv ? h.dv + v : NULL;
    h.dsinks = h.dsinks ? h.dsinks + s * a->n_heads : NULL;
    return h;
}

/* Call every() for each key-value head of each sequence. */
static void for_heads(struct perta_backend *be, struct head *whole,
                      void (*every)(const struct head *))
{
    const struct perta_attention *a = whole->of;
    size_t n = rows_of(a); /* no sequence is longer than this */
    double *memory = malloc((3 + a->D + a->V) * n * sizeof *memory);
    if (!memory) {
        be->rc = perta_fail_sys(&be->err, ENOMEM, "attention");
        return;
    }
    whole->p = memory;
    whole->dp = memory + n;
    whole->slopes = memory + 2 * n;
    whole->dk_sums = memory + 3 * n;
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
    size_t ldv = a->n_kv_heads * a->V, ldo = a->n_heads * a->V;
    return (struct head){.of = a,
                         .places = a->places,
                         .sinks = perta_scalar_floats(be, a->sinks, a->n_heads),
                         .q = perta_scalar_floats(be, q, n * ldq),
                         .k = perta_scalar_floats(be, k, n * ldk),
                         .v = perta_scalar_floats(be, v, n * ldv),
                         .ldq = ldq,
                         .ldk = ldk,
                         .ldv = ldv,
                         .ldo = ldo};
}

void perta_scalar_attention_forward(struct perta_backend *be,
                                    const struct perta_attention *attention, struct perta_array out,
                                    struct perta_array q, struct perta_array k,
                                    struct perta_array v)
{
    struct head whole = whole_of(be, attention, q, k, v);
    whole.out = perta_scalar_floats(be, out, rows_of(attention) * whole.ldo);
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
    whole.dout = perta_scalar_floats(be, dout, n * whole.ldo);
    whole.dq = perta_scalar_floats(be, dq, n * whole.ldq);
    whole.dk = perta_scalar_floats(be, dk, n * whole.ldk);
    whole.dv = perta_scalar_floats(be, dv, n * whole.ldv);
    whole.dsinks =
        perta_scalar_floats(be, attention->dsinks, attention->sequences.n * attention->n_heads);
    if (!be->rc)
        for_heads(be, &whole, head_backward);
}

/* ---- one token of each sequence, over what came before it ---- */

/* out (n_heads, V) of a token with queries q (n_heads, D), keys k (past->n, n_kv_heads, D), values
 * v (past->n, n_kv_heads, V) and sinks (n_heads), or NULL; p: scratch (past->n). */
static void past_forward(const struct perta_attention *a, const struct perta_past *past, float *out,
                         const float *q, const float *k, const float *v, const float *sinks,
                         double *p)
{
    size_t D = a->D, V = a->V, n = past->n;
    for (size_t h = 0; h < a->n_heads; h++) {
        size_t kv = h / (a->n_heads / a->n_kv_heads);
        for (size_t j = 0; j < n; j++)
            p[j] = score(a, h, q + h * D, k + (j * a->n_kv_heads + kv) * D, past->first + j,
                         past->first + n - 1, NULL);
        softmax(p, n, sinks ? (double)sinks[h] : -INFINITY);
        for (size_t d = 0; d < V; d++) {
            double sum = 0;
            for (size_t j = 0; j < n; j++)
                sum += p[j] * (double)v[(j * a->n_kv_heads + kv) * V + d];
            out[h * V + d] = (float)sum;
        }
    }
}

void perta_scalar_attention_past_forward(struct perta_backend *be,
                                         const struct perta_attention_past *past,
                                         struct perta_array out, struct perta_array q,
                                         struct perta_array kv)
{
    const struct perta_attention *a = &past->of;
    size_t ldq = a->n_heads * a->D, ldk = a->n_kv_heads * a->D, ldv = a->n_kv_heads * a->V;
    size_t ldo = a->n_heads * a->V;
    float *outs = perta_scalar_floats(be, out, past->n * ldo);
    const float *qs = perta_scalar_floats(be, q, past->n * ldq);
    const float *sinks = perta_scalar_floats(be, a->sinks, a->n_heads);
    for (size_t t = 0; t < past->n && !be->rc; t++) {
        const struct perta_past *of = &past->pasts[t];
        const float *k = perta_scalar_floats(be, perta_array_at(kv, of->keys), of->n * ldk);
        const float *v = perta_scalar_floats(be, perta_array_at(kv, of->values), of->n * ldv);
        double *p = malloc(of->n * sizeof *p);
        if (!p)
            be->rc = perta_fail_sys(&be->err, ENOMEM, "attention");
        if (!be->rc)
            past_forward(a, of, outs + t * ldo, qs + t * ldq, k, v, sinks, p);
        free(p);
    }
}
