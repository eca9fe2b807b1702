#include "estimators/model/block.h"

#include <string.h>

#include "estimators/compute/ops.h"

const char *const perta_linear_names[PERTA_N_LINEARS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
};
const char *const perta_norm_names[PERTA_N_NORMS] = {
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
};

/* ---- memory ---- */

struct widths {
    size_t H, I, Q, K;
};

static struct widths widths_of(const struct perta_llm *llm)
{
    return (struct widths){llm->hidden, llm->intermediate, (size_t)llm->n_heads * llm->head_dim,
                           (size_t)llm->n_kv_heads * llm->head_dim};
}

/* The next n floats of memory, from the start of a line of the cache; NULL: count alone. */
static float *take(float *memory, size_t *at, size_t n)
{
    float *here = memory ? memory + *at : NULL;
    *at += (n + 15) & ~(size_t)15;
    return here;
}

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t lay_out(struct perta_acts *a, const struct perta_llm *llm, size_t n, float *memory)
{
    struct widths w = widths_of(llm);
    size_t at = 0;
    float **const hidden[] = {&a->x,    &a->n1,   &a->mid, &a->n2, &a->out,
                              &a->dout, &a->dmid, &a->dn,  &a->dx};
    float **const query[] = {&a->q, &a->att, &a->datt, &a->dq};
    float **const key[] = {&a->k, &a->v, &a->dk, &a->dv};
    float **const inner[] = {&a->h, &a->dgate, &a->dup};
    float **const lent[] = {&a->gate, &a->up}; /* on the way back, to attention's heads */
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        *hidden[i] = take(memory, &at, n * w.H);
    for (size_t i = 0; i < sizeof query / sizeof *query; i++)
        *query[i] = take(memory, &at, n * w.Q);
    for (size_t i = 0; i < sizeof key / sizeof *key; i++)
        *key[i] = take(memory, &at, n * w.K);
    for (size_t i = 0; i < sizeof inner / sizeof *inner; i++)
        *inner[i] = take(memory, &at, n * w.I);
    for (size_t i = 0; i < sizeof lent / sizeof *lent; i++)
        *lent[i] = take(memory, &at, n * most(w.I, w.Q));
    a->q_raw = take(memory, &at, llm->qk_norm ? n * w.Q : 0);
    a->k_raw = take(memory, &at, llm->qk_norm ? n * w.K : 0);
    a->rstd1 = take(memory, &at, n);
    a->rstd2 = take(memory, &at, n);
    a->rstd_q = take(memory, &at, n * llm->n_heads);
    a->rstd_k = take(memory, &at, n * llm->n_kv_heads);
    size_t widest = most(most(w.H, w.I), most(w.Q, w.K));
    a->vector = take(memory, &at, widest);
    take(memory, &at, PERTA_SLACK_ROWS * widest); /* what products read past the end */
    return at;
}

size_t perta_acts_floats(const struct perta_llm *llm, size_t n)
{
    struct perta_acts acts;
    return lay_out(&acts, llm, n, NULL);
}

void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        float *memory)
{
    lay_out(acts, llm, n, memory);
}

/* ---- linear layers ---- */

#define WEIGHT_ROWS 1024

/* Rows of the weight that go into one product: all, or some where they must be converted. */
static size_t rows_at_a_time(const struct perta_gemm *gemm, const struct perta_linear *l)
{
    return l->dtype == perta_gemm_dtype(gemm) ? l->out : WEIGHT_ROWS;
}

static struct perta_operand_matrix rows_of(const struct perta_linear *l, size_t first)
{
    size_t width = l->dtype == PERTA_F32 ? 4 : 2;
    return (struct perta_operand_matrix){(const uint8_t *)l->weight + first * l->in * width,
                                         l->dtype, l->in, 1};
}

struct biased {
    float *y;
    const float *bias;
    size_t n, out;
};

#define BIAS_ROWS 64 /* of a piece */

static int add_bias(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct biased *b = ctx;
    size_t end = (i + 1) * BIAS_ROWS < b->n ? (i + 1) * BIAS_ROWS : b->n;
    (void)worker;
    (void)err;
    for (size_t t = i * BIAS_ROWS; t < end; t++)
        for (size_t k = 0; k < b->out; k++)
            b->y[t * b->out + k] += b->bias[k];
    return 0;
}

int perta_linear_forward(struct perta_gemm *gemm, const struct perta_linear *l,
                         const struct perta_runs *tiles, const float *x, float *y, size_t n,
                         bool add, struct perta_err *err)
{
    size_t step = rows_at_a_time(gemm, l);
    struct biased b = {y, l->bias, n, l->out};
    int rc = 0;
    for (size_t r = 0; r < l->out && !rc; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        rc = perta_gemm_run(gemm, tiles, n, rows, l->in, perta_matrix(x, l->in),
                            perta_transposed(rows_of(l, r)), y + r, l->out, add, err);
    }
    if (!rc && l->bias)
        rc = perta_workers_run(perta_gemm_workers(gemm), (n + BIAS_ROWS - 1) / BIAS_ROWS, add_bias,
                               &b, err);
    return rc;
}

int perta_linear_backward(struct perta_gemm *gemm, const struct perta_linear *l,
                          const struct perta_runs *tiles, const float *dy, float *dx, size_t n,
                          bool add, struct perta_err *err)
{
    size_t step = rows_at_a_time(gemm, l);
    for (size_t r = 0; r < l->out; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        int rc = perta_gemm_run(gemm, tiles, n, l->in, rows, perta_matrix(dy + r, l->out),
                                rows_of(l, r), dx, l->in, add || r, err);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- forward ---- */

static struct perta_workers *workers_of(const struct perta_block *b)
{
    return perta_gemm_workers(b->gemm);
}

static struct perta_attention attention_of(const struct perta_block *b,
                                           const struct perta_batch *batch)
{
    return (struct perta_attention){batch->sequences,   batch->places,    b->llm->n_heads,
                                    b->llm->n_kv_heads, b->llm->head_dim, b->window};
}

/* Queries or keys of each head, normalised (Qwen3), then turned by their positions. */
static void place(const struct perta_block *b, const struct perta_batch *batch, float *x,
                  float *raw, float *rstd, const float *norm, size_t n_heads)
{
    size_t D = b->llm->head_dim;
    if (norm) {
        memcpy(raw, x, batch->n * n_heads * D * sizeof *raw);
        perta_rmsnorm_forward(workers_of(b), x, rstd, raw, norm, batch->n * n_heads, D,
                              b->llm->rms_eps);
    }
    perta_rope_forward(workers_of(b), x, batch->places, b->inv_freq, batch->n, n_heads, D);
}

int perta_block_forward(const struct perta_block *b, const struct perta_batch *batch,
                        struct perta_acts *a, struct perta_err *err)
{
    const struct perta_llm *llm = b->llm;
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = llm->hidden;
    perta_rmsnorm_forward(workers_of(b), a->n1, a->rstd1, a->x, b->norm[PERTA_NORM_1], n, H,
                          llm->rms_eps);
    int rc = perta_linear_forward(b->gemm, &l[PERTA_Q], &batch->tiles, a->n1, a->q, n, false, err);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_K], &batch->tiles, a->n1, a->k, n, false, err);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_V], &batch->tiles, a->n1, a->v, n, false, err);
    if (rc)
        return rc;
    place(b, batch, a->q, a->q_raw, a->rstd_q, b->norm[PERTA_NORM_Q], llm->n_heads);
    place(b, batch, a->k, a->k_raw, a->rstd_k, b->norm[PERTA_NORM_K], llm->n_kv_heads);
    struct perta_attention attention = attention_of(b, batch);
    rc = perta_attention_forward(b->gemm, &attention, a->att, a->q, a->k, a->v, err);
    memcpy(a->mid, a->x, n * H * sizeof *a->mid);
    if (!rc)
        rc =
            perta_linear_forward(b->gemm, &l[PERTA_O], &batch->tiles, a->att, a->mid, n, true, err);
    if (rc)
        return rc;
    perta_rmsnorm_forward(workers_of(b), a->n2, a->rstd2, a->mid, b->norm[PERTA_NORM_2], n, H,
                          llm->rms_eps);
    rc =
        perta_linear_forward(b->gemm, &l[PERTA_GATE], &batch->tiles, a->n2, a->gate, n, false, err);
    if (!rc)
        rc =
            perta_linear_forward(b->gemm, &l[PERTA_UP], &batch->tiles, a->n2, a->up, n, false, err);
    if (rc)
        return rc;
    perta_swiglu_forward(workers_of(b), a->h, a->gate, a->up, n * llm->intermediate);
    memcpy(a->out, a->mid, n * H * sizeof *a->out);
    return perta_linear_forward(b->gemm, &l[PERTA_DOWN], &batch->tiles, a->h, a->out, n, true, err);
}

/* ---- backward ---- */

/* Of each sequence, which has so many rows for each token: 1, or one for each head. */
static void sink_norm(const struct perta_block *b, const struct perta_vector_sink *sink,
                      const struct perta_batch *batch, enum perta_norm_name name, const float *dy,
                      const float *x, const float *rstd, size_t rows, size_t H, float *vector)
{
    const struct perta_runs *s = &batch->sequences;
    for (size_t i = 0; i < s->n; i++) {
        size_t t = (s->starts[i] - s->origin) * rows;
        size_t n = (s->starts[i + 1] - s->starts[i]) * rows;
        memset(vector, 0, H * sizeof *vector);
        perta_rmsnorm_backward_weight(workers_of(b), vector, dy + t * H, x + t * H, rstd + t, n, H);
        sink->norm(sink->ctx, i, name, vector, H);
    }
}

/* The gradient of a bias: dy (n, out), summed over rows first .. end. */
struct bias_sum {
    const float *dy;
    size_t first, end, out;
    float *sums;
};

#define BIAS_COLUMNS 256 /* of a piece */

static int sum_columns(void *ctx, unsigned worker, size_t i, struct perta_err *err)
{
    const struct bias_sum *b = ctx;
    size_t from = i * BIAS_COLUMNS, n = b->out - from < BIAS_COLUMNS ? b->out - from : BIAS_COLUMNS;
    double sums[BIAS_COLUMNS] = {0};
    (void)worker;
    (void)err;
    for (size_t t = b->first; t < b->end; t++)
        for (size_t k = 0; k < n; k++)
            sums[k] += (double)b->dy[t * b->out + from + k];
    for (size_t k = 0; k < n; k++)
        b->sums[from + k] = (float)sums[k];
    return 0;
}

static void sink_bias(const struct perta_block *block, const struct perta_vector_sink *sink,
                      const struct perta_batch *batch, enum perta_linear_name name, const float *dy,
                      float *vector)
{
    const struct perta_linear *l = &block->linear[name];
    const struct perta_runs *s = &batch->sequences;
    struct perta_err never = {0};
    for (size_t i = 0; l->bias && i < s->n; i++) {
        struct bias_sum b = {dy, s->starts[i] - s->origin, s->starts[i + 1] - s->origin, l->out,
                             vector};
        perta_workers_run(workers_of(block), (l->out + BIAS_COLUMNS - 1) / BIAS_COLUMNS,
                          sum_columns, &b, &never);
        sink->bias(sink->ctx, i, name, vector, l->out);
    }
}

/* The way back of place(); d holds the gradient before and after. spare is as long as x. */
static void place_backward(const struct perta_block *b, const struct perta_batch *batch, float *d,
                           const float *raw, const float *rstd, enum perta_norm_name name,
                           size_t n_heads, const struct perta_vector_sink *sink, float *spare,
                           float *vector)
{
    size_t D = b->llm->head_dim, n = batch->n * n_heads;
    perta_rope_backward(workers_of(b), d, batch->places, b->inv_freq, batch->n, n_heads, D);
    if (!b->norm[name])
        return;
    sink_norm(b, sink, batch, name, d, raw, rstd, n_heads, D, vector);
    memset(spare, 0, n * D * sizeof *spare);
    perta_rmsnorm_backward(workers_of(b), spare, d, raw, rstd, b->norm[name], n, D);
    memcpy(d, spare, n * D * sizeof *d);
}

static int mlp_backward(const struct perta_block *b, const struct perta_batch *batch,
                        struct perta_acts *a, const struct perta_vector_sink *sink,
                        struct perta_err *err)
{
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = b->llm->hidden;
    int rc = perta_linear_backward(b->gemm, &l[PERTA_DOWN], &batch->tiles, a->dout, a->dgate, n,
                                   false, err);
    if (rc)
        return rc;
    perta_swiglu_backward(workers_of(b), a->dgate, a->dup, a->dgate, a->gate, a->up,
                          n * b->llm->intermediate);
    rc = perta_linear_backward(b->gemm, &l[PERTA_GATE], &batch->tiles, a->dgate, a->dn, n, false,
                               err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_UP], &batch->tiles, a->dup, a->dn, n, true,
                                   err);
    if (rc)
        return rc;
    memcpy(a->dmid, a->dout, n * H * sizeof *a->dmid);
    perta_rmsnorm_backward(workers_of(b), a->dmid, a->dn, a->mid, a->rstd2, b->norm[PERTA_NORM_2],
                           n, H);
    sink_norm(b, sink, batch, PERTA_NORM_2, a->dn, a->mid, a->rstd2, 1, H, a->vector);
    sink_bias(b, sink, batch, PERTA_DOWN, a->dout, a->vector);
    sink_bias(b, sink, batch, PERTA_GATE, a->dgate, a->vector);
    sink_bias(b, sink, batch, PERTA_UP, a->dup, a->vector);
    return 0;
}

static int self_attention_backward(const struct perta_block *b, const struct perta_batch *batch,
                                   struct perta_acts *a, const struct perta_vector_sink *sink,
                                   struct perta_err *err)
{
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = b->llm->hidden;
    struct perta_attention attention = attention_of(b, batch);
    sink_bias(b, sink, batch, PERTA_O, a->dmid, a->vector);
    int rc =
        perta_linear_backward(b->gemm, &l[PERTA_O], &batch->tiles, a->dmid, a->datt, n, false, err);
    if (!rc)
        rc = perta_attention_backward(b->gemm, &attention, a->dq, a->dk, a->dv, a->datt, a->q, a->k,
                                      a->v, (float *const[]){a->gate, a->up}, err);
    if (rc)
        return rc;
    /* datt is free again */
    place_backward(b, batch, a->dq, a->q_raw, a->rstd_q, PERTA_NORM_Q, b->llm->n_heads, sink,
                   a->datt, a->vector);
    place_backward(b, batch, a->dk, a->k_raw, a->rstd_k, PERTA_NORM_K, b->llm->n_kv_heads, sink,
                   a->datt, a->vector);
    sink_bias(b, sink, batch, PERTA_Q, a->dq, a->vector);
    sink_bias(b, sink, batch, PERTA_K, a->dk, a->vector);
    sink_bias(b, sink, batch, PERTA_V, a->dv, a->vector);
    rc = perta_linear_backward(b->gemm, &l[PERTA_Q], &batch->tiles, a->dq, a->dn, n, false, err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_K], &batch->tiles, a->dk, a->dn, n, true, err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_V], &batch->tiles, a->dv, a->dn, n, true, err);
    if (rc)
        return rc;
    memcpy(a->dx, a->dmid, n * H * sizeof *a->dx);
    perta_rmsnorm_backward(workers_of(b), a->dx, a->dn, a->x, a->rstd1, b->norm[PERTA_NORM_1], n,
                           H);
    sink_norm(b, sink, batch, PERTA_NORM_1, a->dn, a->x, a->rstd1, 1, H, a->vector);
    return 0;
}

int perta_block_backward(const struct perta_block *b, const struct perta_batch *batch,
                         struct perta_acts *a, const struct perta_vector_sink *sink,
                         struct perta_err *err)
{
    int rc = mlp_backward(b, batch, a, sink, err);
    return rc ? rc : self_attention_backward(b, batch, a, sink, err);
}

void perta_block_operands(const struct perta_acts *a, enum perta_linear_name name, const float **x,
                          const float **dy)
{
    const float *const xs[PERTA_N_LINEARS] = {a->n1, a->n1, a->n1, a->att, a->n2, a->n2, a->h};
    const float *const dys[PERTA_N_LINEARS] = {a->dq,    a->dk,  a->dv,  a->dmid,
                                               a->dgate, a->dup, a->dout};
    *x = xs[name];
    *dy = dys[name];
}
