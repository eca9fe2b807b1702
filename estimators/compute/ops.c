#include "estimators/compute/ops.h"

#include <math.h>
#include <string.h>

#include "estimators/compute/kernels.h"
#include "io/isa.h"

const struct perta_row_kernels *perta_row_kernels(void)
{
    static const struct perta_row_kernels *const all[PERTA_N_ISAS] = {
        &perta_row_kernels_v2, &perta_row_kernels_v3, &perta_row_kernels_v4};
    return all[perta_isa_chosen()];
}

/* ---- rows, shared out ---- */

/* Elements of a piece, about: some ten microseconds' worth. */
#define PIECE_ELEMS (1u << 16)

struct rows {
    void (*some)(const void *args, size_t from, size_t to);
    const void *args;
    size_t n, of_piece;
};

static int run_rows(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct rows *r = ctx;
    size_t from = i * r->of_piece, to = from + r->of_piece;
    (void)worker;
    (void)err;
    r->some(r->args, from, to < r->n ? to : r->n);
    return 0;
}

/* some() goes through rows from .. to of n; a row has so many elements. */
static void share_out(struct perta_workers *workers, size_t n, size_t elems,
                      void (*some)(const void *args, size_t from, size_t to), const void *args)
{
    struct perta_err never = {0};
    struct rows r = {some, args, n, elems < PIECE_ELEMS ? PIECE_ELEMS / elems : 1};
    perta_workers_run(workers, (n + r.of_piece - 1) / r.of_piece, run_rows, &r, &never);
}

/* ---- RMSNorm (Zhang & Sennrich 2019) ---- */

struct rmsnorm {
    float *y, *rstd_out, *dx, *dweight;
    const float *dy, *x, *rstd, *weight;
    size_t T, H;
    float eps;
};

static void rmsnorm_rows(const void *args, size_t from, size_t to)
{
    const struct rmsnorm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H;
        float r = 1.0f / sqrtf((float)(k->dot(row, row, H) / (double)H) + n->eps);
        n->rstd_out[t] = r;
        for (size_t i = 0; i < H; i++)
            n->y[t * H + i] = n->weight[i] * (row[i] * r);
    }
}

void perta_rmsnorm_forward(struct perta_workers *workers, float *y, float *rstd, const float *x,
                           const float *weight, size_t T, size_t H, float eps)
{
    const struct rmsnorm n = {
        .y = y, .rstd_out = rstd, .x = x, .weight = weight, .H = H, .eps = eps};
    share_out(workers, T, H, rmsnorm_rows, &n);
}

static void rmsnorm_backward_rows(const void *args, size_t from, size_t to)
{
    const struct rmsnorm *n = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = n->H;
    for (size_t t = from; t < to; t++) {
        const float *row = n->x + t * H, *drow = n->dy + t * H;
        float r = n->rstd[t];
        float c = (float)(k->dot_of_product(n->weight, drow, row, H) / (double)H) * r * r * r;
        for (size_t i = 0; i < H; i++)
            n->dx[t * H + i] += r * n->weight[i] * drow[i] - c * row[i];
    }
}

void perta_rmsnorm_backward(struct perta_workers *workers, float *dx, const float *dy,
                            const float *x, const float *rstd, const float *weight, size_t T,
                            size_t H)
{
    const struct rmsnorm n = {.dx = dx, .dy = dy, .x = x, .rstd = rstd, .weight = weight, .H = H};
    share_out(workers, T, H, rmsnorm_backward_rows, &n);
}

#define COLUMNS 128 /* that are summed over tokens together */

/* Columns from * COLUMNS .. to * COLUMNS. */
static void rmsnorm_backward_columns(const void *args, size_t from, size_t to)
{
    const struct rmsnorm *w = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t H = w->H;
    for (size_t i = from * COLUMNS; i < to * COLUMNS && i < H; i += COLUMNS) {
        size_t n = H - i < COLUMNS ? H - i : COLUMNS;
        double sums[COLUMNS] = {0};
        for (size_t t = 0; t < w->T; t++)
            k->add_products(sums, w->dy + t * H + i, w->x + t * H + i, w->rstd[t], n);
        for (size_t c = 0; c < n; c++)
            w->dweight[i + c] += (float)sums[c];
    }
}

void perta_rmsnorm_backward_weight(struct perta_workers *workers, float *dweight, const float *dy,
                                   const float *x, const float *rstd, size_t T, size_t H)
{
    const struct rmsnorm n = {.dweight = dweight, .dy = dy, .x = x, .rstd = rstd, .T = T, .H = H};
    share_out(workers, (H + COLUMNS - 1) / COLUMNS, T * COLUMNS, rmsnorm_backward_columns, &n);
}

/* ---- rotary positions (Su et al. 2021) ---- */

struct rope {
    float *x;
    const struct perta_place *places;
    const float *inv_freq;
    size_t n_heads, D;
    float direction;
};

static void rotate_rows(const void *args, size_t from, size_t to)
{
    const struct rope *r = args;
    size_t half = r->D / 2;
    for (size_t t = from; t < to; t++)
        for (size_t i = 0; i < half; i++) {
            float angle = (float)r->places[t].position * r->inv_freq[i];
            float c = cosf(angle), s = r->direction * sinf(angle);
            for (size_t h = 0; h < r->n_heads; h++) {
                float *head = r->x + (t * r->n_heads + h) * r->D;
                float a = head[i], b = head[i + half];
                head[i] = a * c - b * s;
                head[i + half] = b * c + a * s;
            }
        }
}

static void rotate(struct perta_workers *workers, const struct rope *r, size_t T)
{
    share_out(workers, T, r->n_heads * r->D, rotate_rows, r);
}

void perta_rope_forward(struct perta_workers *workers, float *x, const struct perta_place *places,
                        const float *inv_freq, size_t T, size_t n_heads, size_t D)
{
    rotate(workers, &(struct rope){x, places, inv_freq, n_heads, D, 1}, T);
}

void perta_rope_backward(struct perta_workers *workers, float *dx, const struct perta_place *places,
                         const float *inv_freq, size_t T, size_t n_heads, size_t D)
{
    rotate(workers, &(struct rope){dx, places, inv_freq, n_heads, D, -1}, T);
}

/* ---- SwiGLU ---- */

struct swiglu {
    float *h, *dgate, *dup;
    const float *dh, *gate, *up;
};

static void swiglu_elems(const void *args, size_t from, size_t to)
{
    const struct swiglu *s = args;
    perta_row_kernels()->swiglu(s->h + from, s->gate + from, s->up + from, to - from);
}

void perta_swiglu_forward(struct perta_workers *workers, float *h, const float *gate,
                          const float *up, size_t n)
{
    share_out(workers, n, 1, swiglu_elems, &(struct swiglu){.h = h, .gate = gate, .up = up});
}

static void swiglu_backward_elems(const void *args, size_t from, size_t to)
{
    const struct swiglu *s = args;
    perta_row_kernels()->swiglu_backward(s->dgate + from, s->dup + from, s->dh + from,
                                         s->gate + from, s->up + from, to - from);
}

void perta_swiglu_backward(struct perta_workers *workers, float *dgate, float *dup, const float *dh,
                           const float *gate, const float *up, size_t n)
{
    share_out(workers, n, 1, swiglu_backward_elems,
              &(struct swiglu){.dgate = dgate, .dup = dup, .dh = dh, .gate = gate, .up = up});
}

/* ---- cross-entropy ---- */

struct entropy {
    const float *logits;
    float *dlogits;
    size_t row, n_rows;
    const int32_t *target;
    float *most, *of_target;
    double *sums;
    int32_t *best;
    const float *share;
};

static void entropy_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = from; i < to; i++) {
        const float *l = e->logits + i * e->n_rows;
        float high = k->largest(l, e->n_rows, e->most[i]);
        e->sums[i] = e->sums[i] * exp((double)e->most[i] - (double)high) +
                     k->sum_exponentials(l, high, e->n_rows);
        e->most[i] = high;
        size_t at = (size_t)e->target[i];
        if (at >= e->row && at < e->row + e->n_rows)
            e->of_target[i] = l[at - e->row];
    }
}

void perta_cross_entropy_forward(struct perta_workers *workers, const float *logits, size_t row,
                                 size_t n_rows, size_t n, const int32_t *target, float *most,
                                 double *sums, float *of_target)
{
    const struct entropy e = {.logits = logits,
                              .row = row,
                              .n_rows = n_rows,
                              .target = target,
                              .most = most,
                              .sums = sums,
                              .of_target = of_target};
    share_out(workers, n, n_rows, entropy_rows, &e);
}

static void best_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    for (size_t i = from; i < to; i++) {
        const float *l = e->logits + i * e->n_rows;
        for (size_t j = 0; j < e->n_rows; j++)
            if (l[j] > e->most[i]) {
                e->most[i] = l[j];
                e->best[i] = (int32_t)(e->row + j);
            }
    }
}

void perta_best_forward(struct perta_workers *workers, const float *logits, size_t row,
                        size_t n_rows, size_t n, float *most, int32_t *best)
{
    const struct entropy e = {
        .logits = logits, .row = row, .n_rows = n_rows, .most = most, .best = best};
    share_out(workers, n, n_rows, best_rows, &e);
}

static void entropy_backward_rows(const void *args, size_t from, size_t to)
{
    const struct entropy *e = args;
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t i = from; i < to; i++) {
        size_t at = (size_t)e->target[i];
        float share = (float)((double)e->share[i] / e->sums[i]);
        k->scaled_exponentials(e->dlogits + i * e->n_rows, e->most[i], share, e->n_rows);
        if (at >= e->row && at < e->row + e->n_rows)
            e->dlogits[i * e->n_rows + at - e->row] -= e->share[i];
    }
}

void perta_cross_entropy_backward(struct perta_workers *workers, float *logits, size_t row,
                                  size_t n_rows, size_t n, const int32_t *target, const float *most,
                                  const double *sums, const float *share)
{
    const struct entropy e = {.dlogits = logits,
                              .row = row,
                              .n_rows = n_rows,
                              .target = target,
                              .most = (float *)(uintptr_t)most,
                              .sums = (double *)(uintptr_t)sums,
                              .share = share};
    share_out(workers, n, n_rows, entropy_backward_rows, &e);
}

/* ---- attention: a head of a sequence at a time, within it a block of query rows, so that scores
 * are never whole ---- */

#define ROWS 64 /* query rows of a block */

/* Two blocks of scores. */
size_t perta_attention_room(size_t longest)
{
    return 2 * ROWS * longest;
}

/* A sequence's head: where the arrays begin for it, and how far rows are apart. */
struct head {
    struct perta_gemm *gemm;
    size_t T, D, ldq, ldk;
    const struct perta_place *places; /* (T) */
    uint32_t window;
    float *p; /* the worker's room */
    float *out, *dq, *dk, *dv;
    const float *dout, *q, *k, *v;
    size_t ldd; /* of dk and dv */
};

/* Query rows i .. i + n_rows see keys j .. j + n_cols, each some of them: row r the keys from[r] ..
 * to[r]. */
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
    t.n_cols = end > t.j ? end - t.j : 1; /* a product has columns, though nothing be seen */
    return t;
}

static int scores(const struct head *h, const struct tile *t, float *p, struct perta_err *err)
{
    float scale = 1.0f / sqrtf((float)h->D);
    return perta_gemm_sgemm('N', 'T', t->n_rows, t->n_cols, h->D, scale, h->q + t->i * h->ldq,
                            h->ldq, h->k + t->j * h->ldk, h->ldk, 0, p, t->n_cols, err);
}

/* The first key that row r of the tile sees, and one past the last, in columns of the tile; equal
 * where it sees none. */
static void seen(const struct tile *t, size_t r, size_t *from, size_t *to)
{
    bool nothing = t->from[r] == t->to[r];
    *from = nothing ? 0 : t->from[r] - t->j;
    *to = nothing ? 0 : t->to[r] - t->j;
}

/* Row r of the tile: zero where it sees nothing. */
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

static int head_forward(const struct head *h, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < h->T && !rc; i += ROWS) {
        struct tile t = tile_at(h, i);
        rc = scores(h, &t, h->p, err);
        if (rc)
            break;
        softmax(&t, h->p);
        rc = perta_gemm_sgemm('N', 'N', t.n_rows, h->D, t.n_cols, 1, h->p, t.n_cols,
                              h->v + t.j * h->ldk, h->ldk, 0, h->out + i * h->ldq, h->ldq, err);
    }
    return rc;
}

/* dp: gradient of the probabilities p -> gradient of scores. The mean of dp is taken of these very p,
 * the forward pass's: where one of them is nearly all, what is left of dp is far below the rounding
 * of another sum (dout times out, say), and exactly 0 where it is 1. */
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

int perta_attention_forward(struct perta_gemm *gemm, const struct perta_attention *a, float *out,
                            const float *q, const float *k, const float *v, struct perta_err *err)
{
    struct heads all = {.gemm = gemm, .of = a, .out = out, .q = q, .k = k, .v = v};
    return perta_workers_run(perta_gemm_workers(gemm), a->sequences.n * a->n_heads, run_head, &all,
                             err);
}

/* dkv (n, n_kv_heads, D) = sums over the query heads that share it, in order, of_heads (n,
 * n_heads, D). */
struct group_sum {
    float *dkv;
    const float *of_heads;
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

int perta_attention_backward(struct perta_gemm *gemm, const struct perta_attention *a, float *dq,
                             float *dk, float *dv, const float *dout, const float *q,
                             const float *k, const float *v, float *const of_heads[2],
                             struct perta_err *err)
{
    size_t group = a->n_heads / a->n_kv_heads;
    size_t n = a->sequences.starts[a->sequences.n] - a->sequences.origin;
    struct heads all = {.gemm = gemm,
                        .of = a,
                        .dout = dout,
                        .q = q,
                        .k = k,
                        .v = v,
                        .dq = dq,
                        .dk = group > 1 ? of_heads[0] : dk,
                        .dv = group > 1 ? of_heads[1] : dv};
    struct perta_workers *workers = perta_gemm_workers(gemm);
    int rc = perta_workers_run(workers, a->sequences.n * a->n_heads, run_head, &all, err);
    if (rc || group == 1)
        return rc;
    struct group_sum k_sum = {dk, all.dk, a->n_kv_heads, group, a->D};
    struct group_sum v_sum = {dv, all.dv, a->n_kv_heads, group, a->D};
    share_out(workers, n, a->n_heads * a->D, group_sum_rows, &k_sum);
    share_out(workers, n, a->n_heads * a->D, group_sum_rows, &v_sum);
    return 0;
}
