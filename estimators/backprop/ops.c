#include "estimators/backprop/ops.h"

#include <dnnl.h>
#include <math.h>
#include <string.h>

#include "estimators/backprop/kernels.h"
#include "io/isa.h"

const struct perta_row_kernels *perta_row_kernels(void)
{
    static const struct perta_row_kernels *const all[PERTA_N_ISAS] = {
        &perta_row_kernels_v2, &perta_row_kernels_v3, &perta_row_kernels_v4};
    return all[perta_isa_chosen()];
}

/* ---- RMSNorm (Zhang & Sennrich 2019) ---- */

void perta_rmsnorm_forward(float *y, float *rstd, const float *x, const float *weight, size_t T,
                           size_t H, float eps)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const float *row = x + t * H;
        float r = 1.0f / sqrtf((float)(k->dot(row, row, H) / (double)H) + eps);
        rstd[t] = r;
        for (size_t i = 0; i < H; i++)
            y[t * H + i] = weight[i] * (row[i] * r);
    }
}

void perta_rmsnorm_backward(float *dx, const float *dy, const float *x, const float *rstd,
                            const float *weight, size_t T, size_t H)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const float *row = x + t * H, *drow = dy + t * H;
        float r = rstd[t];
        float c = (float)(k->dot_of_product(weight, drow, row, H) / (double)H) * r * r * r;
        for (size_t i = 0; i < H; i++)
            dx[t * H + i] += r * weight[i] * drow[i] - c * row[i];
    }
}

#define COLUMNS 128 /* that are summed over tokens together */

void perta_rmsnorm_backward_weight(float *dweight, const float *dy, const float *x,
                                   const float *rstd, size_t T, size_t H)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < H; i += COLUMNS) {
        size_t n = H - i < COLUMNS ? H - i : COLUMNS;
        double sums[COLUMNS] = {0};
        for (size_t t = 0; t < T; t++)
            k->add_products(sums, dy + t * H + i, x + t * H + i, rstd[t], n);
        for (size_t c = 0; c < n; c++)
            dweight[i + c] += (float)sums[c];
    }
}

/* ---- rotary positions (Su et al. 2021) ---- */

static void rotate(float *x, const uint32_t *positions, const float *inv_freq, size_t T,
                   size_t n_heads, size_t D, float direction)
{
    size_t half = D / 2;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < half; i++) {
            float angle = (float)positions[t] * inv_freq[i];
            float c = cosf(angle), s = direction * sinf(angle);
            for (size_t h = 0; h < n_heads; h++) {
                float *head = x + (t * n_heads + h) * D;
                float a = head[i], b = head[i + half];
                head[i] = a * c - b * s;
                head[i + half] = b * c + a * s;
            }
        }
}

void perta_rope_forward(float *x, const uint32_t *positions, const float *inv_freq, size_t T,
                        size_t n_heads, size_t D)
{
    rotate(x, positions, inv_freq, T, n_heads, D, 1);
}

void perta_rope_backward(float *dx, const uint32_t *positions, const float *inv_freq, size_t T,
                         size_t n_heads, size_t D)
{
    rotate(dx, positions, inv_freq, T, n_heads, D, -1);
}

/* ---- SwiGLU ---- */

#define PART 4096 /* elements of a vector that one thread takes at a time */

void perta_swiglu_forward(float *h, const float *gate, const float *up, size_t n)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += PART)
        k->swiglu(h + i, gate + i, up + i, n - i < PART ? n - i : PART);
}

void perta_swiglu_backward(float *dgate, float *dup, const float *dh, const float *gate,
                           const float *up, size_t n)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += PART)
        k->swiglu_backward(dgate + i, dup + i, dh + i, gate + i, up + i,
                           n - i < PART ? n - i : PART);
}

/* ---- cross-entropy ---- */

void perta_cross_entropy_forward(const float *logits, size_t row, size_t n_rows, size_t n,
                                 const int32_t *target, float *most, double *sums,
                                 float *of_target)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        const float *l = logits + i * n_rows;
        float high = k->largest(l, n_rows, most[i]);
        sums[i] = sums[i] * exp((double)most[i] - (double)high) +
                  k->sum_exponentials(l, high, n_rows);
        most[i] = high;
        size_t at = (size_t)target[i];
        if (at >= row && at < row + n_rows)
            of_target[i] = l[at - row];
    }
}

void perta_best_forward(const float *logits, size_t row, size_t n_rows, size_t n, float *most,
                        int32_t *best)
{
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        const float *l = logits + i * n_rows;
        for (size_t j = 0; j < n_rows; j++)
            if (l[j] > most[i]) {
                most[i] = l[j];
                best[i] = (int32_t)(row + j);
            }
    }
}

void perta_cross_entropy_backward(float *logits, size_t row, size_t n_rows, size_t n,
                                  const int32_t *target, const float *lse, const float *share)
{
    const struct perta_row_kernels *k = perta_row_kernels();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        size_t at = (size_t)target[i];
        k->scaled_exponentials(logits + i * n_rows, lse[i], share[i], n_rows);
        if (at >= row && at < row + n_rows)
            logits[i * n_rows + at - row] -= share[i];
    }
}

/* ---- attention, a block of query rows at a time, so that scores are never whole ---- */

#define ROWS 64 /* query rows of a block */

/* Two blocks of scores for each key-value head. */
size_t perta_attention_scratch(size_t longest, size_t n_kv_heads)
{
    return n_kv_heads * 2 * ROWS * longest;
}

/* Query rows i .. i + n_rows of a head see keys j .. j + n_cols. */
struct tile {
    size_t i, n_rows, j, n_cols;
};

static struct tile tile_at(const struct perta_attention *s, size_t i)
{
    struct tile t = {.i = i, .n_rows = s->T - i < ROWS ? s->T - i : ROWS};
    t.j = i >= s->window ? i - s->window + 1 : 0;
    t.n_cols = i + t.n_rows - t.j;
    return t;
}

/* c (m, n) = scale a b + beta c, row-major; not 0 where oneDNN refuses. */
static unsigned product(char ta, char tb, size_t m, size_t n, size_t k, float scale,
                        const float *a, size_t lda, const float *b, size_t ldb, float beta,
                        float *c, size_t ldc)
{
    return dnnl_sgemm(ta, tb, (dnnl_dim_t)m, (dnnl_dim_t)n, (dnnl_dim_t)k, scale, a,
                      (dnnl_dim_t)lda, b, (dnnl_dim_t)ldb, beta, c,
                      (dnnl_dim_t)ldc) != dnnl_success;
}

static unsigned scores(const struct perta_attention *s, const struct tile *t,
                       const float *q, const float *k, float *p)
{
    float scale = 1.0f / sqrtf((float)s->D);
    size_t ldq = s->n_heads * s->D, ldk = s->n_kv_heads * s->D;
    return product('N', 'T', t->n_rows, t->n_cols, s->D, scale, q + t->i * ldq, ldq,
                   k + t->j * ldk, ldk, 0, p, t->n_cols);
}

/* The first key that row r of the tile sees, and one past the last, in columns of the tile. */
static void seen(const struct perta_attention *s, const struct tile *t, size_t r, size_t *from,
                 size_t *to)
{
    size_t i = t->i + r;
    size_t first = i >= s->window ? i - s->window + 1 : 0;
    *from = first > t->j ? first - t->j : 0;
    *to = i + 1 - t->j;
}

/* Row r of the tile: zero where it sees nothing. */
static void clear_unseen(const struct tile *t, float *row, size_t from, size_t to)
{
    memset(row, 0, from * sizeof *row);
    memset(row + to, 0, (t->n_cols - to) * sizeof *row);
}

static void softmax(const struct perta_attention *s, const struct tile *t, float *p, float *lse)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    for (size_t r = 0; r < t->n_rows; r++) {
        float *row = p + r * t->n_cols;
        size_t from, to;
        seen(s, t, r, &from, &to);
        float most = k->largest(row + from, to - from, -INFINITY);
        double sum = k->exponentials(row + from, row + from, most, to - from);
        float inverse = (float)(1 / sum);
        for (size_t j = from; j < to; j++)
            row[j] *= inverse;
        clear_unseen(t, row, from, to);
        lse[t->i + r] = most + (float)log(sum);
    }
}

int perta_attention_forward(const struct perta_attention *s, float *out, float *lse,
                            const float *q, const float *k, const float *v, float *scratch,
                            struct perta_err *err)
{
    size_t group = s->n_heads / s->n_kv_heads, ldq = s->n_heads * s->D;
    size_t ldk = s->n_kv_heads * s->D;
    unsigned bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad)
    for (size_t kv = 0; kv < s->n_kv_heads; kv++) {
        float *p = scratch + kv * 2 * ROWS * s->T;
        for (size_t h = kv * group; h < (kv + 1) * group; h++)
            for (size_t i = 0; i < s->T; i += ROWS) {
                struct tile t = tile_at(s, i);
                bad |= scores(s, &t, q + h * s->D, k + kv * s->D, p);
                softmax(s, &t, p, lse + h * s->T);
                bad |= product('N', 'N', t.n_rows, s->D, t.n_cols, 1, p, t.n_cols,
                               v + t.j * ldk + kv * s->D, ldk, 0, out + i * ldq + h * s->D, ldq);
            }
    }
    return bad ? perta_fail(err, PERTA_ESYS, "attention: oneDNN refuses a product") : 0;
}

/* p: scores -> probabilities; dp: gradient of probabilities -> gradient of scores. */
static void softmax_backward(const struct perta_attention *s, const struct tile *t, float *p,
                             float *dp, const float *dout, const float *out, const float *lse)
{
    const struct perta_row_kernels *k = perta_row_kernels();
    size_t ld = s->n_heads * s->D;
    for (size_t r = 0; r < t->n_rows; r++) {
        size_t from, to, at = (t->i + r) * ld, row = r * t->n_cols;
        float dot = (float)k->dot(dout + at, out + at, s->D);
        seen(s, t, r, &from, &to);
        k->softmax_backward(p + row + from, dp + row + from, lse[t->i + r], dot, to - from);
        clear_unseen(t, p + row, from, to);
        clear_unseen(t, dp + row, from, to);
    }
}

static unsigned backward_tile(const struct perta_attention *s, const struct tile *t, size_t h,
                              size_t kv, float *dq, float *dk, float *dv, const float *dout,
                              const float *out, const float *lse, const float *q,
                              const float *k, const float *v, float *p)
{
    size_t rows = t->n_rows, cols = t->n_cols, D = s->D;
    size_t ldq = s->n_heads * D, ldk = s->n_kv_heads * D;
    size_t at_q = t->i * ldq + h * D, at_k = t->j * ldk + kv * D;
    float scale = 1.0f / sqrtf((float)s->D);
    float *dp = p + ROWS * s->T;
    unsigned bad = scores(s, t, q + h * s->D, k + kv * s->D, p);
    bad |= product('N', 'T', rows, cols, D, 1, dout + at_q, ldq, v + at_k, ldk, 0, dp, cols);
    softmax_backward(s, t, p, dp, dout + h * s->D, out + h * s->D, lse + h * s->T);
    bad |= product('T', 'N', cols, D, rows, 1, p, cols, dout + at_q, ldq, 1, dv + at_k, ldk);
    bad |= product('N', 'N', rows, D, cols, scale, dp, cols, k + at_k, ldk, 0, dq + at_q, ldq);
    bad |= product('T', 'N', cols, D, rows, scale, dp, cols, q + at_q, ldq, 1, dk + at_k, ldk);
    return bad;
}

int perta_attention_backward(const struct perta_attention *s, float *dq, float *dk, float *dv,
                             const float *dout, const float *out, const float *lse,
                             const float *q, const float *k, const float *v, float *scratch,
                             struct perta_err *err)
{
    size_t group = s->n_heads / s->n_kv_heads;
    unsigned bad = 0;
    memset(dk, 0, s->T * s->n_kv_heads * s->D * sizeof *dk);
    memset(dv, 0, s->T * s->n_kv_heads * s->D * sizeof *dv);
#pragma omp parallel for schedule(static) reduction(| : bad)
    for (size_t kv = 0; kv < s->n_kv_heads; kv++)
        for (size_t h = kv * group; h < (kv + 1) * group; h++)
            for (size_t i = 0; i < s->T; i += ROWS) {
                struct tile t = tile_at(s, i);
                bad |= backward_tile(s, &t, h, kv, dq, dk, dv, dout, out, lse, q, k, v,
                                     scratch + kv * 2 * ROWS * s->T);
            }
    return bad ? perta_fail(err, PERTA_ESYS, "attention: oneDNN refuses a product") : 0;
}
