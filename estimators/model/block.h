/* block.h - one transformer block, forward and backward, over a batch of whole sequences.
 *
 *   mid = x + O(attention(rope(Q n1), rope(K n1), V n1)),   n1 = rmsnorm(x)
 *   out = mid + down(silu(gate n2) * up n2),                n2 = rmsnorm(mid)
 *
 * Weights are the checkpoint's own (out, in); what the backward pass needs is computed again from
 * x, not kept. Shapes: n tokens of the batch, H hidden, I intermediate, Q = n_heads * head_dim,
 * K = n_kv_heads * head_dim. */
#ifndef PERTA_ESTIMATORS_MODEL_BLOCK_H
#define PERTA_ESTIMATORS_MODEL_BLOCK_H

#include "estimators/compute/gemm.h"
#include "estimators/compute/place.h"
#include "estimators/model/config.h"

enum perta_linear_name {
    PERTA_Q,
    PERTA_K,
    PERTA_V,
    PERTA_O,
    PERTA_GATE,
    PERTA_UP,
    PERTA_DOWN,
    PERTA_N_LINEARS,
};
enum perta_norm_name { PERTA_NORM_1, PERTA_NORM_2, PERTA_NORM_Q, PERTA_NORM_K, PERTA_N_NORMS };

/* Where a block's tensors are in the checkpoint: "model.layers.3." + this + ".weight". */
extern const char *const perta_linear_names[PERTA_N_LINEARS];
extern const char *const perta_norm_names[PERTA_N_NORMS];

struct perta_linear {
    const void *weight;     /* (out, in); NULL: not there */
    enum perta_dtype dtype; /* F32, BF16 or F16 */
    size_t out, in;
    const float *bias; /* (out), or NULL */
};

struct perta_block {
    const struct perta_llm *llm;
    struct perta_gemm *gemm;
    const float *inv_freq; /* (head_dim / 2) */
    uint32_t window;
    struct perta_linear linear[PERTA_N_LINEARS];
    const float *norm[PERTA_N_NORMS]; /* (H), (H), (head_dim), (head_dim); NULL: not there */
};

/* n tokens, whole sequences. */
struct perta_batch {
    size_t n;
    struct perta_runs sequences;
    struct perta_runs tiles;          /* where products are cut (cut.h) */
    const struct perta_place *places; /* (n) */
};

/* Everything between x and out, and the gradients of it. One allocation. */
struct perta_acts {
    float *x, *n1, *q, *k, *v, *q_raw, *k_raw, *att, *mid, *n2, *gate, *up, *h, *out;
    float *rstd1, *rstd2, *rstd_q, *rstd_k;
    float *dout, *dgate, *dup, *dmid, *datt, *dq, *dk, *dv, *dn, *dx;
    float *vector; /* scratch for one */
};

/* Floats that a batch of n tokens needs. */
size_t perta_acts_floats(const struct perta_llm *llm, size_t n);
/* memory (perta_acts_floats) is the caller's. */
void perta_acts_lay_out(struct perta_acts *acts, const struct perta_llm *llm, size_t n,
                        float *memory);

/* From acts->x to acts->out, and all between. */
int perta_block_forward(const struct perta_block *block, const struct perta_batch *batch,
                        struct perta_acts *acts, struct perta_err *err);

/* After forward: from acts->dout to acts->dx. Each sequence's gradients of norms and biases go to
 * the sink. */
struct perta_vector_sink {
    void *ctx;
    /* One sequence's gradient of a vector of n floats. */
    void (*norm)(void *ctx, size_t sequence, enum perta_norm_name name, const float *d, size_t n);
    void (*bias)(void *ctx, size_t sequence, enum perta_linear_name name, const float *d, size_t n);
};
int perta_block_backward(const struct perta_block *block, const struct perta_batch *batch,
                         struct perta_acts *acts, const struct perta_vector_sink *sink,
                         struct perta_err *err);

/* What a linear's weight gradient is made of, after backward: dweight = dy^T x, x (n, in), dy
 * (n, out). */
void perta_block_operands(const struct perta_acts *acts, enum perta_linear_name name,
                          const float **x, const float **dy);

/* y (n, out) = x (n, in) weight^T + bias; with add, y +=. Tiles are of the n rows; x and dy are read
 * PERTA_SLACK_ROWS past their end. */
int perta_linear_forward(struct perta_gemm *gemm, const struct perta_linear *linear,
                         const struct perta_runs *tiles, const float *x, float *y, size_t n,
                         bool add, struct perta_err *err);
/* dx (n, in) = dy (n, out) weight; with add, dx +=. */
int perta_linear_backward(struct perta_gemm *gemm, const struct perta_linear *linear,
                          const struct perta_runs *tiles, const float *dy, float *dx, size_t n,
                          bool add, struct perta_err *err);

#endif
