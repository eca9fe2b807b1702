#include "estimators/backprop/block.h"

#include <string.h>

#include "estimators/backprop/ops.h"

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

static size_t lay_out(struct perta_acts *a, const struct perta_llm *llm, size_t n,
                      size_t longest, float *memory)
{
    struct widths w = widths_of(llm);
    size_t at = 0;
    float **const hidden[] = {&a->x, &a->n1, &a->mid, &a->n2, &a->out, &a->dout, &a->dmid,
                              &a->dn, &a->dx};
    float **const query[] = {&a->q, &a->att, &a->datt, &a->dq};
    float **const key[] = {&a->k, &a->v, &a->dk, &a->dv};
    float **const inner[] = {&a->gate, &a->up, &a->h, &a->dgate, &a->dup};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        *hidden[i] = take(memory, &at, n * w.H);
    for (size_t i = 0; i < sizeof query / sizeof *query; i++)
        *query[i] = take(memory, &at, n * w.Q);
    for (size_t i = 0; i < sizeof key / sizeof *key; i++)
        *key[i] = take(memory, &at, n * w.K);
    for (size_t i = 0; i < sizeof inner / sizeof *inner; i++)
        *inner[i] = take(memory, &at, n * w.I);
    a->q_raw = take(memory, &at, llm->qk_norm ? n * w.Q : 0);
    a->k_raw = take(memory, &at, llm->qk_norm ? n * w.K : 0);
    a->rstd1 = take(memory, &at, n);
    a->rstd2 = take(memory, &at, n);
    a->rstd_q = take(memory, &at, n * llm->n_heads);
    a->rstd_k = take(memory, &at, n * llm->n_kv_heads);
    a->lse = take(memory, &at, n * llm->n_heads);
    size_t vector = most(most(w.H, w.I), most(w.Q, w.K));
    a->scratch = take(memory, &at,
                      most(vector, perta_attention_scratch(longest, llm->n_kv_heads)));
    return at;
}

size_t perta_acts_floats(const struct perta_llm *llm, size_t n, size_t longest)
{
    struct perta_acts acts;
    return lay_out(&acts, llm, n, longest, NULL);
}

void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        size_t longest, float *memory)
{
    lay_out(acts, llm, n, longest, memory);
}

/* ---- linear layers ---- */

#define WEIGHT_ROWS 1024

/* Rows of the weight that go into one product: all, or some where they must be converted. */
static size_t rows_at_a_time(const struct perta_gemm *gemm, const struct perta_linear *l)
{
    return perta_gemm_takes(gemm, l->weight, l->dtype) ? l->out : WEIGHT_ROWS;
}

static struct perta_operand_matrix rows_of(const struct perta_linear *l, size_t first)
{
    size_t width = l->dtype == PERTA_F32 ? 4 : 2;
    return (struct perta_operand_matrix){(const uint8_t *)l->weight + first * l->in * width,
                                         l->dtype, l->in, 1};
}

int perta_linear_forward(struct perta_gemm *gemm, const struct perta_linear *l, const float *x,
                         float *y, size_t n, bool add, struct perta_err *err)
{
    size_t step = rows_at_a_time(gemm, l);
    for (size_t r = 0; r < l->out; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        int rc = perta_gemm_run(gemm, n, rows, l->in, perta_matrix(x, l->in),
                                perta_transposed(rows_of(l, r)), y + r, l->out, add, err);
        if (rc)
            return rc;
    }
    if (l->bias)
#pragma omp parallel for schedule(static)
        for (size_t t = 0; t < n; t++)
            for (size_t i = 0; i < l->out; i++)
                y[t * l->out + i] += l->bias[i];
    return 0;
}

int perta_linear_backward(struct perta_gemm *gemm, const struct perta_linear *l, const float *dy,
                          float *dx, size_t n, bool add, struct perta_err *err)
{
    size_t step = rows_at_a_time(gemm, l);
    for (size_t r = 0; r < l->out; r += step) {
        size_t rows = l->out - r < step ? l->out - r : step;
        int rc = perta_gemm_run(gemm, n, l->in, rows, perta_matrix(dy + r, l->out), rows_of(l, r),
                                dx, l->in, add || r, err);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- forward ---- */

static struct perta_attention shape_of(const struct perta_block *b, const struct perta_batch *batch,
                                       size_t s)
{
    return (struct perta_attention){batch->starts[s + 1] - batch->starts[s], b->llm->n_heads,
                                    b->llm->n_kv_heads, b->llm->head_dim, b->window};
}

/* Queries or keys of each head, normalised (Qwen3), then turned by their positions. */
static void place(const struct perta_block *b, const struct perta_batch *batch, float *x,
                  float *raw, float *rstd, const float *norm, size_t n_heads)
{
    size_t D = b->llm->head_dim;
    if (norm) {
        memcpy(raw, x, batch->n * n_heads * D * sizeof *raw);
        perta_rmsnorm_forward(x, rstd, raw, norm, batch->n * n_heads, D, b->llm->rms_eps);
    }
    perta_rope_forward(x, batch->positions, b->inv_freq, batch->n, n_heads, D);
}

static int attend(const struct perta_block *b, const struct perta_batch *batch,
                  struct perta_acts *a, struct perta_err *err)
{
    struct widths w = widths_of(b->llm);
    int rc = 0;
    for (size_t s = 0; s < batch->n_sequences && !rc; s++) {
        struct perta_attention shape = shape_of(b, batch, s);
        size_t t = batch->starts[s];
        rc = perta_attention_forward(&shape, a->att + t * w.Q, a->lse + t * b->llm->n_heads,
                                     a->q + t * w.Q, a->k + t * w.K, a->v + t * w.K, a->scratch,
                                     err);
    }
    return rc;
}

int perta_block_forward(const struct perta_block *b, const struct perta_batch *batch,
                        struct perta_acts *a, struct perta_err *err)
{
    const struct perta_llm *llm = b->llm;
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = llm->hidden;
    perta_rmsnorm_forward(a->n1, a->rstd1, a->x, b->norm[PERTA_NORM_1], n, H, llm->rms_eps);
    int rc = perta_linear_forward(b->gemm, &l[PERTA_Q], a->n1, a->q, n, false, err);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_K], a->n1, a->k, n, false, err);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_V], a->n1, a->v, n, false, err);
    if (rc)
        return rc;
    place(b, batch, a->q, a->q_raw, a->rstd_q, b->norm[PERTA_NORM_Q], llm->n_heads);
    place(b, batch, a->k, a->k_raw, a->rstd_k, b->norm[PERTA_NORM_K], llm->n_kv_heads);
    rc = attend(b, batch, a, err);
    memcpy(a->mid, a->x, n * H * sizeof *a->mid);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_O], a->att, a->mid, n, true, err);
    if (rc)
        return rc;
    perta_rmsnorm_forward(a->n2, a->rstd2, a->mid, b->norm[PERTA_NORM_2], n, H, llm->rms_eps);
    rc = perta_linear_forward(b->gemm, &l[PERTA_GATE], a->n2, a->gate, n, false, err);
    if (!rc)
        rc = perta_linear_forward(b->gemm, &l[PERTA_UP], a->n2, a->up, n, false, err);
    if (rc)
        return rc;
    perta_swiglu_forward(a->h, a->gate, a->up, n * llm->intermediate);
    memcpy(a->out, a->mid, n * H * sizeof *a->out);
    return perta_linear_forward(b->gemm, &l[PERTA_DOWN], a->h, a->out, n, true, err);
}

/* ---- backward ---- */

static void sink_norm(const struct perta_vector_sink *sink, const struct perta_batch *batch,
                      enum perta_norm_name name, const float *dy, const float *x,
                      const float *rstd, size_t rows, size_t H, float *scratch)
{
    /* rows of each token: 1, or one for each head */
    for (size_t s = 0; s < batch->n_sequences; s++) {
        size_t t = batch->starts[s] * rows, n = batch->starts[s + 1] * rows - t;
        memset(scratch, 0, H * sizeof *scratch);
        perta_rmsnorm_backward_weight(scratch, dy + t * H, x + t * H, rstd + t, n, H);
        sink->norm(sink->ctx, s, name, scratch, H);
    }
}

static void sink_bias(const struct perta_vector_sink *sink, const struct perta_batch *batch,
                      const struct perta_linear *l, enum perta_linear_name name, const float *dy,
                      float *scratch)
{
    for (size_t s = 0; l->bias && s < batch->n_sequences; s++) {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < l->out; i++) {
            double sum = 0;
            for (size_t t = batch->starts[s]; t < batch->starts[s + 1]; t++)
                sum += (double)dy[t * l->out + i];
            scratch[i] = (float)sum;
        }
        sink->bias(sink->ctx, s, name, scratch, l->out);
    }
}

static int attend_backward(const struct perta_block *b, const struct perta_batch *batch,
                           struct perta_acts *a, struct perta_err *err)
{
    struct widths w = widths_of(b->llm);
    int rc = 0;
    for (size_t s = 0; s < batch->n_sequences && !rc; s++) {
        struct perta_attention shape = shape_of(b, batch, s);
        size_t t = batch->starts[s];
        rc = perta_attention_backward(&shape, a->dq + t * w.Q, a->dk + t * w.K, a->dv + t * w.K,
                                      a->datt + t * w.Q, a->att + t * w.Q,
                                      a->lse + t * b->llm->n_heads, a->q + t * w.Q,
                                      a->k + t * w.K, a->v + t * w.K, a->scratch, err);
    }
    return rc;
}

/* The way back of place(); d holds the gradient before and after. spare is as long as x. */
static void place_backward(const struct perta_block *b, const struct perta_batch *batch, float *d,
                           const float *raw, const float *rstd, enum perta_norm_name name,
                           size_t n_heads, const struct perta_vector_sink *sink, float *spare,
                           float *vector)
{
    size_t D = b->llm->head_dim, n = batch->n * n_heads;
    perta_rope_backward(d, batch->positions, b->inv_freq, batch->n, n_heads, D);
    if (!b->norm[name])
        return;
    sink_norm(sink, batch, name, d, raw, rstd, n_heads, D, vector);
    memset(spare, 0, n * D * sizeof *spare);
    perta_rmsnorm_backward(spare, d, raw, rstd, b->norm[name], n, D);
    memcpy(d, spare, n * D * sizeof *d);
}

static int mlp_backward(const struct perta_block *b, const struct perta_batch *batch,
                        struct perta_acts *a, const struct perta_vector_sink *sink,
                        struct perta_err *err)
{
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = b->llm->hidden;
    int rc = perta_linear_backward(b->gemm, &l[PERTA_DOWN], a->dout, a->dgate, n, false, err);
    if (rc)
        return rc;
    perta_swiglu_backward(a->dgate, a->dup, a->dgate, a->gate, a->up, n * b->llm->intermediate);
    rc = perta_linear_backward(b->gemm, &l[PERTA_GATE], a->dgate, a->dn, n, false, err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_UP], a->dup, a->dn, n, true, err);
    if (rc)
        return rc;
    memcpy(a->dmid, a->dout, n * H * sizeof *a->dmid);
    perta_rmsnorm_backward(a->dmid, a->dn, a->mid, a->rstd2, b->norm[PERTA_NORM_2], n, H);
    sink_norm(sink, batch, PERTA_NORM_2, a->dn, a->mid, a->rstd2, 1, H, a->scratch);
    sink_bias(sink, batch, &l[PERTA_DOWN], PERTA_DOWN, a->dout, a->scratch);
    sink_bias(sink, batch, &l[PERTA_GATE], PERTA_GATE, a->dgate, a->scratch);
    sink_bias(sink, batch, &l[PERTA_UP], PERTA_UP, a->dup, a->scratch);
    return 0;
}

static int self_attention_backward(const struct perta_block *b, const struct perta_batch *batch,
                                   struct perta_acts *a, const struct perta_vector_sink *sink,
                                   struct perta_err *err)
{
    const struct perta_linear *l = b->linear;
    size_t n = batch->n, H = b->llm->hidden;
    sink_bias(sink, batch, &l[PERTA_O], PERTA_O, a->dmid, a->scratch);
    int rc = perta_linear_backward(b->gemm, &l[PERTA_O], a->dmid, a->datt, n, false, err);
    if (!rc)
        rc = attend_backward(b, batch, a, err);
    if (rc)
        return rc;
    /* datt is free again */
    place_backward(b, batch, a->dq, a->q_raw, a->rstd_q, PERTA_NORM_Q, b->llm->n_heads, sink,
                   a->datt, a->scratch);
    place_backward(b, batch, a->dk, a->k_raw, a->rstd_k, PERTA_NORM_K, b->llm->n_kv_heads, sink,
                   a->datt, a->scratch);
    sink_bias(sink, batch, &l[PERTA_Q], PERTA_Q, a->dq, a->scratch);
    sink_bias(sink, batch, &l[PERTA_K], PERTA_K, a->dk, a->scratch);
    sink_bias(sink, batch, &l[PERTA_V], PERTA_V, a->dv, a->scratch);
    rc = perta_linear_backward(b->gemm, &l[PERTA_Q], a->dq, a->dn, n, false, err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_K], a->dk, a->dn, n, true, err);
    if (!rc)
        rc = perta_linear_backward(b->gemm, &l[PERTA_V], a->dv, a->dn, n, true, err);
    if (rc)
        return rc;
    memcpy(a->dx, a->dmid, n * H * sizeof *a->dx);
    perta_rmsnorm_backward(a->dx, a->dn, a->x, a->rstd1, b->norm[PERTA_NORM_1], n, H);
    sink_norm(sink, batch, PERTA_NORM_1, a->dn, a->x, a->rstd1, 1, H, a->scratch);
    return 0;
}

int perta_block_backward(const struct perta_block *b, const struct perta_batch *batch,
                         struct perta_acts *a, const struct perta_vector_sink *sink,
                         struct perta_err *err)
{
    int rc = mlp_backward(b, batch, a, sink, err);
    return rc ? rc : self_attention_backward(b, batch, a, sink, err);
}

void perta_block_operands(const struct perta_acts *a, enum perta_linear_name name,
                          const float **x, const float **dy)
{
    const float *const xs[PERTA_N_LINEARS] = {a->n1, a->n1, a->n1, a->att, a->n2, a->n2, a->h};
    const float *const dys[PERTA_N_LINEARS] = {a->dq,    a->dk,  a->dv,  a->dmid,
                                               a->dgate, a->dup, a->dout};
    *x = xs[name];
    *dy = dys[name];
}
