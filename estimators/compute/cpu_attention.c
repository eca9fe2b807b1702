#include <math.h>
#include <string.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"
#include "io/format/convert.h"

/* ---- attention: one head of one sequence at a time, by blocks of query rows, so that the scores
 * are never stored whole ---- */

#define ROWS 64 /* query rows in a block */

size_t perta_cpu_attention_room(size_t longest)
{
    return 2 * ROWS * longest;
}

/* A head of a sequence: its part of each array, and the distance between rows: of q and dq; k; v;
 * out and dout; dk; dv. */
struct head {
    const struct perta_attention *of;
    size_t T, ldq, ldk, ldv, ldo, lddk, lddv;
    const struct perta_place *places; /* (T) */
    float *p;                         /* the worker's room */
    float *out, *dq, *dk, *dv;
    const float *dout, *q, *k, *v;
    /* The head's own; NULL: none. In run_past, a row is a head, and row i has number i. */
    const float *slope, *sink;
    bool rows_are_heads;
    size_t first;  /* tokens of the sequence before key 0 */
    double *dsink; /* the sum of the sink's gradient */
};

/* Query rows i .. i + n_rows and the keys j .. j + n_cols that they see; row r sees the keys
 * from[r] .. to[r]. */
struct tile {
    size_t i, n_rows, j, n_cols;
    size_t from[ROWS], to[ROWS];
    float p_sink[ROWS]; /* the sink's probability */
};

/* The least at that the token at place sees. */
static uint32_t least_seen(const struct head *h, const struct perta_place *place)
{
    const struct perta_attention *a = h->of;
    uint32_t least = place->at >= a->window ? place->at - a->window + 1 : 0;
    uint32_t start = h->places[0].at; /* tokens that are seen come first */
    if (a->chunk && place->at >= start) {
        uint32_t chunk = place->at - (place->at - start) % a->chunk;
        least = chunk > least ? chunk : least;
    }
    return least;
}

/* The first key that the token at place sees. */
static size_t first_seen(const struct head *h, const struct perta_place *place)
{
    size_t low = place->first, high = place->end;
    uint32_t least = least_seen(h, place);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (h->places[middle].at >= least)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static struct tile tile_at(const struct head *h, size_t i)
{
    struct tile t = {.i = i, .n_rows = h->T - i < ROWS ? h->T - i : ROWS, .j = h->T - 1};
    size_t end = 0;
    for (size_t r = 0; r < t.n_rows; r++) {
        t.from[r] = first_seen(h, &h->places[i + r]);
        t.to[r] = h->places[i + r].end;
        if (t.from[r] == t.to[r])
            continue;
        t.j = t.from[r] < t.j ? t.from[r] : t.j;
        end = t.to[r] > end ? t.to[r] : end;
    }
    t.n_cols = end > t.j ? end - t.j : 1; /* a product needs a column, even if nothing is seen */
    return t;
}

/* scale * q k */
static int products(const struct head *h, const struct tile *t, float *p, struct perta_err *err)
{
    return perta_gemm_sgemm('N', 'T', t->n_rows, t->n_cols, h->of->D, h->of->scale,
                            h->q + t->i * h->ldq, h->ldq, h->k + t->j * h->ldk, h->ldk, 0, p,
                            t->n_cols, err);
}

/* The keys *from .. *to that row r of the tile sees, as columns of the tile; *from equals *to if it
 * sees none. */
static void seen(const struct tile *t, size_t r, size_t *from, size_t *to)
{
    bool nothing = t->from[r] == t->to[r];
    *from = nothing ? 0 : t->from[r] - t->j;
    *to = nothing ? 0 : t->to[r] - t->j;
}

/* Of a value of each head, that of row r of the tile. */
static float of_row(const struct head *h, const struct tile *t, const float *values, size_t r)
{
    return values[h->rows_are_heads ? t->i + r : 0];
}

static float bf16(float x)
{
    return perta_f32_from_bf16(perta_bf16_from_f32(x));
}

/* Add the slope to the scores of n keys, the first of which has this number. The last one's term is
 * subtracted from all, so float32 rounds least where scores count most. */
static void add_slope(const struct head *h, float slope, float *row, size_t number, size_t n)
{
    float last = bf16(slope * bf16((float)(number + n - 1)));
    for (size_t j = 0; j < n && h->of->slopes_bf16; j++)
        row[j] += h->of->scale * (bf16(slope * bf16((float)(number + j))) - last);
    for (size_t j = 0; j < n && !h->of->slopes_bf16; j++)
        row[j] -= slope * (float)(n - 1 - j);
}

/* The scores of a tile: (n_rows, n_cols). */
static int scores(const struct head *h, const struct tile *t, float *p, struct perta_err *err)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    int rc = products(h, t, p, err);
    for (size_t r = 0; r < t->n_rows && !rc && (h->of->softcap > 0 || h->slope); r++) {
        float *row = p + r * t->n_cols;
        size_t from, to;
        seen(t, r, &from, &to);
        if (h->of->softcap > 0)
            k->softcap(row + from, h->of->softcap, to - from);
        if (h->slope)
            add_slope(h, of_row(h, t, h->slope, r), row + from, h->first + t->j + from, to - from);
    }
    return rc;
}

/* Set a row of the tile to zero outside the columns from .. to. */
static void clear_unseen(const struct tile *t, float *row, size_t from, size_t to)
{
    memset(row, 0, from * sizeof *row);
    memset(row + to, 0, (t->n_cols - to) * sizeof *row);
}

/* The maximum of n scores and of the row's sink. */
static float largest(const struct head *h, const struct tile *t, size_t r, const float *row,
                     size_t n)
{
    float least = h->sink ? of_row(h, t, h->sink, r) : n ? -INFINITY : 0;
    return perta_row_kernels()->largest(row, n, least);
}

/* Scores become probabilities; the sink's are kept in the tile. */
static void softmax(const struct head *h, struct tile *t, float *p)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t r = 0; r < t->n_rows; r++) {
        float *row = p + r * t->n_cols;
        size_t from, to;
        seen(t, r, &from, &to);
        float most = largest(h, t, r, row + from, to - from), sink = 0;
        double sum = from < to ? k->exponentials(row + from, row + from, most, to - from) : 1;
        if (h->sink && from < to) {
            sink = of_row(h, t, h->sink, r);
            sum += k->exponentials(&sink, &sink, most, 1);
        }
        float inverse = (float)(1 / sum);
        t->p_sink[r] = sink * inverse;
        for (size_t j = from; j < to; j++)
            row[j] *= inverse;
        clear_unseen(t, row, from, to);
    }
}

static int tile_forward(const struct head *h, struct tile *t, struct perta_err *err)
{
    int rc = scores(h, t, h->p, err);
    if (rc)
        return rc;
    softmax(h, t, h->p);
    return perta_gemm_sgemm('N', 'N', t->n_rows, h->of->V, t->n_cols, 1, h->p, t->n_cols,
                            h->v + t->j * h->ldv, h->ldv, 0, h->out + t->i * h->ldo, h->ldo, err);
}

static int head_forward(const struct head *h, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < h->T && !rc; i += ROWS) {
        struct tile t = tile_at(h, i);
        rc = tile_forward(h, &t, err);
    }
    return rc;
}

/* dp: from the gradient of the probabilities p to the gradient of the scores. The mean of dp is
 * taken with these same p, as in the forward pass: if one of them is nearly 1, what remains of dp
 * is far below the rounding error of any other sum (such as dout times out), and exactly 0 if it is
 * 1. A sink has no value, so its dp is 0. */
static void softmax_backward(const struct head *h, const struct tile *t, const float *p, float *dp)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t r = 0; r < t->n_rows; r++) {
        size_t from, to, row = r * t->n_cols;
        seen(t, r, &from, &to);
        double mean = k->dot(p + row + from, dp + row + from, to - from);
        if (h->dsink)
            *h->dsink -= (double)t->p_sink[r] * mean;
        k->softmax_backward(dp + row + from, p + row + from, (float)mean, to - from);
        clear_unseen(t, dp + row, from, to);
    }
}

/* ds: from the gradient of capped scores, which are computed again, into p, to that of the
 * scores. */
static int softcap_backward(const struct head *h, const struct tile *t, float *p, float *ds,
                            struct perta_err *err)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    int rc = h->of->softcap > 0 ? products(h, t, p, err) : 0;
    for (size_t r = 0; r < t->n_rows && !rc && h->of->softcap > 0; r++) {
        size_t from, to, row = r * t->n_cols;
        seen(t, r, &from, &to);
        k->softcap(p + row + from, h->of->softcap, to - from);
        k->softcap_backward(ds + row + from, p + row + from, h->of->softcap, to - from);
    }
    return rc;
}

/* dp becomes the gradient of scale * q k; dv is added to. p, dp: scratch, (n_rows, n_cols). */
static int scores_backward(const struct head *h, struct tile *t, float *p, float *dp,
                           struct perta_err *err)
{
    size_t rows = t->n_rows, cols = t->n_cols, V = h->of->V;
    const float *dout = h->dout + t->i * h->ldo;
    int rc = scores(h, t, p, err);
    if (!rc)
        rc = perta_gemm_sgemm('N', 'T', rows, cols, V, 1, dout, h->ldo, h->v + t->j * h->ldv,
                              h->ldv, 0, dp, cols, err);
    if (rc)
        return rc;
    softmax(h, t, p);
    softmax_backward(h, t, p, dp);
    rc = perta_gemm_sgemm('T', 'N', cols, V, rows, 1, p, cols, dout, h->ldo, 1,
                          h->dv + t->j * h->lddv, h->lddv, err);
    return rc ? rc : softcap_backward(h, t, p, dp, err);
}

static int tile_backward(const struct head *h, struct tile *t, struct perta_err *err)
{
    size_t rows = t->n_rows, cols = t->n_cols, D = h->of->D, at_q = t->i * h->ldq;
    float scale = h->of->scale, *p = h->p, *ds = h->p + ROWS * h->T;
    int rc = scores_backward(h, t, p, ds, err);
    if (!rc)
        rc = perta_gemm_sgemm('N', 'N', rows, D, cols, scale, ds, cols, h->k + t->j * h->ldk,
                              h->ldk, 0, h->dq + at_q, h->ldq, err);
    return rc ? rc
              : perta_gemm_sgemm('T', 'N', cols, D, rows, scale, ds, cols, h->q + at_q, h->ldq, 1,
                                 h->dk + t->j * h->lddk, h->lddk, err);
}

static int head_backward(const struct head *h, struct perta_err *err)
{
    int rc = 0;
    for (size_t t = 0; t < h->T; t++) {
        memset(h->dk + t * h->lddk, 0, h->of->D * sizeof *h->dk);
        memset(h->dv + t * h->lddv, 0, h->of->V * sizeof *h->dv);
    }
    for (size_t i = 0; i < h->T && !rc; i += ROWS) {
        struct tile t = tile_at(h, i);
        rc = tile_backward(h, &t, err);
    }
    return rc;
}

/* ---- all heads of all sequences ---- */

struct heads {
    struct perta_gemm *gemm;
    const struct perta_attention *of;
    float *out, *dq, *dk, *dv, *dsinks;
    const float *dout, *q, *k, *v, *sinks;
};

static float *at(float *array, size_t i)
{
    return array ? array + i : NULL;
}

static const float *its(const float *values, size_t head)
{
    return values ? values + head : NULL;
}

/* Piece i is head i % n_heads of a sequence. */
static int run_head(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct heads *all = ctx;
    const struct perta_attention *a = all->of;
    size_t s = i / a->n_heads, head = i % a->n_heads, kv = head / (a->n_heads / a->n_kv_heads);
    size_t t = a->sequences.starts[s] - a->sequences.origin, q = t * a->n_heads + head;
    size_t k = t * a->n_kv_heads + kv;
    double dsink = 0;
    struct head h = {
        .of = a,
        .T = a->sequences.starts[s + 1] - a->sequences.starts[s],
        .ldq = a->n_heads * a->D,
        .ldk = a->n_kv_heads * a->D,
        .ldv = a->n_kv_heads * a->V,
        .ldo = a->n_heads * a->V,
        .lddk = a->n_heads * a->D,
        .lddv = a->n_heads * a->V,
        .places = a->places + t,
        .p = perta_gemm_room(all->gemm, worker),
        .out = at(all->out, q * a->V),
        .q = all->q + q * a->D,
        .k = all->k + k * a->D,
        .v = all->v + k * a->V,
        .dout = its(all->dout, q * a->V),
        .dq = at(all->dq, q * a->D),
        .dk = at(all->dk, q * a->D),
        .dv = at(all->dv, q * a->V),
        .slope = its(a->slopes, head),
        .sink = its(all->sinks, head),
        .dsink = all->dsinks ? &dsink : NULL,
    };
    if (!h.p)
        return perta_fail(err, PERTA_ESYS, "attention: out of memory");
    int rc = all->dout ? head_backward(&h, err) : head_forward(&h, err);
    if (all->dsinks)
        all->dsinks[i] = (float)dsink;
    return rc;
}

void perta_cpu_attention_forward(struct perta_backend *be, const struct perta_attention *a,
                                 struct perta_array out, struct perta_array q, struct perta_array k,
                                 struct perta_array v)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct heads all = {.gemm = cpu->gemm,
                        .of = a,
                        .out = perta_cpu_at(cpu, out),
                        .q = perta_cpu_at(cpu, q),
                        .k = perta_cpu_at(cpu, k),
                        .v = perta_cpu_at(cpu, v),
                        .sinks = perta_cpu_at(cpu, a->sinks)};
    be->rc = perta_workers_run(cpu->workers, a->sequences.n * a->n_heads, run_head, &all, &be->err);
}

/* dkv (n, n_kv_heads, width) = sums of of_heads (n, n_heads, width), in order, over the query heads
 * that share a key-value head. */
struct group_sum {
    float *dkv, *of_heads;
    size_t n_kv_heads, group, width;
};

static void group_sum_rows(const void *args, size_t from, size_t to)
{
    const struct group_sum *g = args;
    for (size_t r = from * g->n_kv_heads; r < to * g->n_kv_heads; r++)
        for (size_t d = 0; d < g->width; d++) {
            double sum = 0;
            for (size_t h = 0; h < g->group; h++)
                sum += (double)g->of_heads[(r * g->group + h) * g->width + d];
            g->dkv[r * g->width + d] = (float)sum;
        }
}

void perta_cpu_attention_backward(struct perta_backend *be, const struct perta_attention *a,
                                  struct perta_array dq, struct perta_array dk,
                                  struct perta_array dv, struct perta_array dout,
                                  struct perta_array q, struct perta_array k, struct perta_array v,
                                  const struct perta_array of_heads[2])
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    size_t group = a->n_heads / a->n_kv_heads;
    size_t n = a->sequences.starts[a->sequences.n] - a->sequences.origin;
    struct group_sum k_sum = {perta_cpu_at(cpu, dk), perta_cpu_at(cpu, of_heads[0]), a->n_kv_heads,
                              group, a->D};
    struct group_sum v_sum = {perta_cpu_at(cpu, dv), perta_cpu_at(cpu, of_heads[1]), a->n_kv_heads,
                              group, a->V};
    struct heads all = {.gemm = cpu->gemm,
                        .of = a,
                        .dq = perta_cpu_at(cpu, dq),
                        .dout = perta_cpu_at(cpu, dout),
                        .q = perta_cpu_at(cpu, q),
                        .k = perta_cpu_at(cpu, k),
                        .v = perta_cpu_at(cpu, v),
                        .sinks = perta_cpu_at(cpu, a->sinks),
                        .dsinks = perta_cpu_at(cpu, a->dsinks),
                        .dk = group > 1 ? k_sum.of_heads : k_sum.dkv,
                        .dv = group > 1 ? v_sum.of_heads : v_sum.dkv};
    be->rc = perta_workers_run(cpu->workers, a->sequences.n * a->n_heads, run_head, &all, &be->err);
    if (be->rc || group == 1)
        return;
    perta_cpu_share_out(cpu, n, a->n_heads * a->D, group_sum_rows, &k_sum);
    perta_cpu_share_out(cpu, n, a->n_heads * a->V, group_sum_rows, &v_sum);
}

/* ---- one token of each sequence, over what came before it ---- */

struct past_heads {
    struct perta_gemm *gemm;
    const struct perta_attention_past *past;
    float *out;
    const float *q, *kv, *sinks;
};

/* Piece i is key-value head i % n_kv_heads of a token. The query heads that share it are the rows
 * of its tiles; each of them sees all keys. */
static int run_past(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct past_heads *all = ctx;
    const struct perta_attention *a = &all->past->of;
    size_t token = i / a->n_kv_heads, kv = i % a->n_kv_heads, group = a->n_heads / a->n_kv_heads;
    size_t q = token * a->n_heads + kv * group;
    const struct perta_past *past = &all->past->pasts[token];
    struct head h = {
        .of = a,
        .ldq = a->D,
        .ldk = a->n_kv_heads * a->D,
        .ldv = a->n_kv_heads * a->V,
        .ldo = a->V,
        .p = perta_gemm_room(all->gemm, worker),
        .out = all->out + q * a->V,
        .q = all->q + q * a->D,
        .k = all->kv + past->keys + kv * a->D,
        .v = all->kv + past->values + kv * a->V,
        .slope = its(a->slopes, kv * group),
        .sink = its(all->sinks, kv * group),
        .rows_are_heads = true,
        .first = past->first,
    };
    struct tile t = {.n_cols = past->n};
    for (size_t r = 0; r < ROWS; r++)
        t.to[r] = past->n;
    int rc = h.p ? 0 : perta_fail(err, PERTA_ESYS, "attention: out of memory");
    for (; t.i < group && !rc; t.i += ROWS) {
        t.n_rows = group - t.i < ROWS ? group - t.i : ROWS;
        rc = tile_forward(&h, &t, err);
    }
    return rc;
}

void perta_cpu_attention_past_forward(struct perta_backend *be,
                                      const struct perta_attention_past *past,
                                      struct perta_array out, struct perta_array q,
                                      struct perta_array kv)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct past_heads all = {.gemm = cpu->gemm,
                             .past = past,
                             .out = perta_cpu_at(cpu, out),
                             .q = perta_cpu_at(cpu, q),
                             .kv = perta_cpu_at(cpu, kv),
                             .sinks = perta_cpu_at(cpu, past->of.sinks)};
    be->rc =
        perta_workers_run(cpu->workers, past->n * past->of.n_kv_heads, run_past, &all, &be->err);
}
