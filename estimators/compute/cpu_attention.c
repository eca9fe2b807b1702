#include <math.h>
#include <string.h>

#include "estimators/compute/cpu_own.h"
#include "estimators/compute/kernels.h"

/* ---- attention: one head of one sequence at a time, by blocks of query rows, so that the scores
 * are never stored whole ---- */

#define ROWS 64 /* query rows in a block */

size_t perta_cpu_attention_room(size_t longest)
{
    return 2 * ROWS * longest;
}

/* A head of a sequence: its part of each array, and the distance between rows. */
struct head {
    struct perta_gemm *gemm;
    size_t T, D, ldq, ldk;
    const struct perta_place *places; /* (T) */
    uint32_t window;
    float *p; /* the worker's room */
    float *out, *dq, *dk, *dv;
    const float *dout, *q, *k, *v;
    size_t ldd; /* distance between rows of dk and dv */
};

/* Query rows i .. i + n_rows and the keys j .. j + n_cols that they see; row r sees the keys
 * from[r] .. to[r]. */
struct tile {
    size_t i, n_rows, j, n_cols;
    size_t from[ROWS], to[ROWS];
};

/* The first key that the token at place sees. */
static size_t first_seen(const struct head *h, const struct perta_place *place)
{
    size_t low = place->first, high = place->end;
    while (low < high && place->at >= h->window) {
        size_t middle = low + (high - low) / 2;
        if (h->places[middle].at > place->at - h->window)
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

static int scores(const struct head *h, const struct tile *t, float *p, struct perta_err *err)
{
    float scale = 1.0f / sqrtf((float)h->D);
    return perta_gemm_sgemm('N', 'T', t->n_rows, t->n_cols, h->D, scale, h->q + t->i * h->ldq,
                            h->ldq, h->k + t->j * h->ldk, h->ldk, 0, p, t->n_cols, err);
}

/* The keys *from .. *to that row r of the tile sees, as columns of the tile; *from equals *to if it
 * sees none. */
static void seen(const struct tile *t, size_t r, size_t *from, size_t *to)
{
    bool nothing = t->from[r] == t->to[r];
    *from = nothing ? 0 : t->from[r] - t->j;
    *to = nothing ? 0 : t->to[r] - t->j;
}

/* Set a row of the tile to zero outside the columns from .. to. */
static void clear_unseen(const struct tile *t, float *row, size_t from, size_t to)
{
    memset(row, 0, from * sizeof *row);
    memset(row + to, 0, (t->n_cols - to) * sizeof *row);
}

static void softmax(const struct tile *t, float *p)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t r = 0; r < t->n_rows; r++) {
        float *row = p + r * t->n_cols;
        size_t from, to;
        seen(t, r, &from, &to);
        float most = k->largest(row + from, to - from, from < to ? -INFINITY : 0);
        double sum = from < to ? k->exponentials(row + from, row + from, most, to - from) : 1;
        float inverse = (float)(1 / sum);
        for (size_t j = from; j < to; j++)
            row[j] *= inverse;
        clear_unseen(t, row, from, to);
    }
}

static int tile_forward(const struct head *h, const struct tile *t, struct perta_err *err)
{
    int rc = scores(h, t, h->p, err);
    if (rc)
        return rc;
    softmax(t, h->p);
    return perta_gemm_sgemm('N', 'N', t->n_rows, h->D, t->n_cols, 1, h->p, t->n_cols,
                            h->v + t->j * h->ldk, h->ldk, 0, h->out + t->i * h->ldq, h->ldq, err);
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
 * 1. */
static void softmax_backward(const struct tile *t, const float *p, float *dp)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t r = 0; r < t->n_rows; r++) {
        size_t from, to, row = r * t->n_cols;
        seen(t, r, &from, &to);
        float mean = (float)k->dot(p + row + from, dp + row + from, to - from);
        k->softmax_backward(dp + row + from, p + row + from, mean, to - from);
        clear_unseen(t, dp + row, from, to);
    }
}

static int tile_backward(const struct head *h, const struct tile *t, struct perta_err *err)
{
    size_t rows = t->n_rows, cols = t->n_cols, D = h->D, at_q = t->i * h->ldq;
    size_t at_k = t->j * h->ldk, at_d = t->j * h->ldd;
    float scale = 1.0f / sqrtf((float)D), *p = h->p, *dp = h->p + ROWS * h->T;
    int rc = scores(h, t, p, err);
    if (!rc)
        rc = perta_gemm_sgemm('N', 'T', rows, cols, D, 1, h->dout + at_q, h->ldq, h->v + at_k,
                              h->ldk, 0, dp, cols, err);
    if (rc)
        return rc;
    softmax(t, p);
    softmax_backward(t, p, dp);
    rc = perta_gemm_sgemm('T', 'N', cols, D, rows, 1, p, cols, h->dout + at_q, h->ldq, 1,
                          h->dv + at_d, h->ldd, err);
    if (!rc)
        rc = perta_gemm_sgemm('N', 'N', rows, D, cols, scale, dp, cols, h->k + at_k, h->ldk, 0,
                              h->dq + at_q, h->ldq, err);
    return rc ? rc
              : perta_gemm_sgemm('T', 'N', cols, D, rows, scale, dp, cols, h->q + at_q, h->ldq, 1,
                                 h->dk + at_d, h->ldd, err);
}

static int head_backward(const struct head *h, struct perta_err *err)
{
    int rc = 0;
    for (size_t t = 0; t < h->T; t++) {
        memset(h->dk + t * h->ldd, 0, h->D * sizeof *h->dk);
        memset(h->dv + t * h->ldd, 0, h->D * sizeof *h->dv);
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
    float *out, *dq, *dk, *dv;
    const float *dout, *q, *k, *v;
};

static float *at(float *array, size_t i)
{
    return array ? array + i : NULL;
}

/* Piece i is head i % n_heads of a sequence. */
static int run_head(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct heads *all = ctx;
    const struct perta_attention *a = all->of;
    size_t s = i / a->n_heads, head = i % a->n_heads, D = a->D;
    size_t t = a->sequences.starts[s] - a->sequences.origin;
    size_t ldq = a->n_heads * D, ldk = a->n_kv_heads * D, q = t * ldq + head * D;
    size_t k = t * ldk + head / (a->n_heads / a->n_kv_heads) * D;
    struct head h = {
        .gemm = all->gemm,
        .T = a->sequences.starts[s + 1] - a->sequences.starts[s],
        .D = D,
        .ldq = ldq,
        .ldk = ldk,
        .ldd = ldq,
        .places = a->places + t,
        .window = a->window,
        .p = perta_gemm_room(all->gemm, worker),
        .out = at(all->out, q),
        .q = all->q + q,
        .k = all->k + k,
        .v = all->v + k,
        .dout = all->dout ? all->dout + q : NULL,
        .dq = at(all->dq, q),
        .dk = at(all->dk, q),
        .dv = at(all->dv, q),
    };
    if (!h.p)
        return perta_fail(err, PERTA_ESYS, "attention: out of memory");
    return all->dout ? head_backward(&h, err) : head_forward(&h, err);
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
                        .v = perta_cpu_at(cpu, v)};
    be->rc = perta_workers_run(cpu->workers, a->sequences.n * a->n_heads, run_head, &all, &be->err);
}

/* dkv (n, n_kv_heads, D) = sums of of_heads (n, n_heads, D), in order, over the query heads that
 * share a key-value head. */
struct group_sum {
    float *dkv, *of_heads;
    size_t n_kv_heads, group, D;
};

static void group_sum_rows(const void *args, size_t from, size_t to)
{
    const struct group_sum *g = args;
    for (size_t r = from * g->n_kv_heads; r < to * g->n_kv_heads; r++)
        for (size_t d = 0; d < g->D; d++) {
            double sum = 0;
            for (size_t h = 0; h < g->group; h++)
                sum += (double)g->of_heads[(r * g->group + h) * g->D + d];
            g->dkv[r * g->D + d] = (float)sum;
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
                              group, a->D};
    struct heads all = {.gemm = cpu->gemm,
                        .of = a,
                        .dq = perta_cpu_at(cpu, dq),
                        .dout = perta_cpu_at(cpu, dout),
                        .q = perta_cpu_at(cpu, q),
                        .k = perta_cpu_at(cpu, k),
                        .v = perta_cpu_at(cpu, v),
                        .dk = group > 1 ? k_sum.of_heads : k_sum.dkv,
                        .dv = group > 1 ? v_sum.of_heads : v_sum.dkv};
    be->rc = perta_workers_run(cpu->workers, a->sequences.n * a->n_heads, run_head, &all, &be->err);
    if (be->rc || group == 1)
        return;
    perta_cpu_share_out(cpu, n, a->n_heads * a->D, group_sum_rows, &k_sum);
    perta_cpu_share_out(cpu, n, a->n_heads * a->D, group_sum_rows, &v_sum);
}

/* ---- one token of each sequence, over what came before it ---- */

struct past_heads {
    struct perta_gemm *gemm;
    const struct perta_attention_past *of;
    float *out;
    const float *q, *kv;
};

/* Piece i is key-value head i % n_kv_heads of a token. The query heads that share it are the rows
 * of its tiles; each of them sees all keys. */
static int run_past(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct past_heads *all = ctx;
    const struct perta_attention_past *a = all->of;
    size_t token = i / a->n_kv_heads, kv = i % a->n_kv_heads, D = a->D;
    size_t group = a->n_heads / a->n_kv_heads, ldk = a->n_kv_heads * D;
    size_t q = (token * a->n_heads + kv * group) * D;
    const struct perta_past *past = &a->pasts[token];
    struct head h = {
        .gemm = all->gemm,
        .D = D,
        .ldq = D,
        .ldk = ldk,
        .p = perta_gemm_room(all->gemm, worker),
        .out = all->out + q,
        .q = all->q + q,
        .k = all->kv + past->keys * ldk + kv * D,
        .v = all->kv + past->values * ldk + kv * D,
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
                                      const struct perta_attention_past *a, struct perta_array out,
                                      struct perta_array q, struct perta_array kv)
{
    struct perta_cpu *cpu = perta_cpu_ready(be);
    if (!cpu)
        return;
    struct past_heads all = {.gemm = cpu->gemm,
                             .of = a,
                             .out = perta_cpu_at(cpu, out),
                             .q = perta_cpu_at(cpu, q),
                             .kv = perta_cpu_at(cpu, kv)};
    be->rc = perta_workers_run(cpu->workers, a->n * a->n_kv_heads, run_past, &all, &be->err);
}
