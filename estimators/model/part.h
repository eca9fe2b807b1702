/* part.h - the parts that a block is made of, each with its forward and backward pass side by side:
 * norm.c, attention.c, mlp.c. A family (family.h) says which of them its blocks have.
 *
 * Parts compute with a backend (estimators/compute/backend.h) and take a layer's weights parameter
 * by parameter. Their passes return nothing: a failure, of the backend, of the weights or of the
 * sink, is kept by the backend and returned by perta_backend_wait(). */
#ifndef PERTA_ESTIMATORS_MODEL_PART_H
#define PERTA_ESTIMATORS_MODEL_PART_H

#include "estimators/compute/backend.h"
#include "estimators/model/config.h"
#include "estimators/model/family.h"
#include "estimators/model/sink.h"

/* ---- what a part is given ---- */

/* A parameter's numbers, in the backend's memory. */
struct perta_value {
    struct perta_array data; /* (out, in), or a vector (in) of float32 */
    enum perta_dtype dtype;  /* F32, BF16 or F16 */
    size_t out, in;          /* out 0: a vector */
};

/* Where a layer's parameters come from: weights.c (a checkpoint's, as they are read), model.c (a
 * model in memory). What get() gives stays until the next layer is begun. */
struct perta_parameters {
    int (*get)(struct perta_parameters *from, uint32_t layer, const struct perta_param_row *row,
               struct perta_value *value, struct perta_err *err);
};

struct perta_layer {
    const struct perta_llm *llm;
    struct perta_backend *be;
    struct perta_parameters *from;
    struct perta_gradient_sink *sink; /* NULL: weights' gradients are not wanted */
    const float *inv_freq;            /* (head_dim / 2) */
    uint32_t number;
};

/* Activations of a block and their gradients, for n tokens of a batch. H hidden, I intermediate,
 * Q = n_heads * head_dim, K = n_kv_heads * head_dim. One piece of the backend's memory. */
struct perta_acts {
    struct perta_array x, n1, mid, n2, out, dout, dmid, dn, dx; /* (n, H) */
    struct perta_array q, att, datt, dq;                        /* (n, Q) */
    struct perta_array k, v, dk, dv;                            /* (n, K) */
    struct perta_array q_raw, k_raw;   /* (n, Q), (n, K): before the norm of each head */
    struct perta_array h, dgate, dup;  /* (n, I) */
    struct perta_array gate, up;       /* (n, I); on the way back, once the MLP is done with them,
                                             attention's scratch (n, Q) */
    struct perta_array rstd1, rstd2;   /* (n) */
    struct perta_array rstd_q, rstd_k; /* (n, n_heads), (n, n_kv_heads) */
    struct perta_array vector;         /* scratch for the widest vector, and its bias */
};

/* A layer's parameter; none where the model has none. */
struct perta_linear perta_layer_linear(const struct perta_layer *l, enum perta_param weight);
struct perta_array perta_layer_vector(const struct perta_layer *l, enum perta_param param);
/* To the sink: a weight's gradient, and its bias's of each sequence. vector: scratch (out). */
void perta_layer_linear_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                                 enum perta_param weight, struct perta_array x,
                                 struct perta_array dy, struct perta_array vector);

/* ---- norms ---- */

struct perta_norm {
    struct perta_array weight, bias; /* (H); bias none */
    float eps;
};

struct perta_norm_part {
    /* y (T, H) from x (T, H); rstd (T) is kept for the way back. */
    void (*forward)(struct perta_backend *be, const struct perta_norm *norm, struct perta_array y,
                    struct perta_array rstd, struct perta_array x, size_t T, size_t H);
    /* dx (T, H) += gradient through x, of dy (T, H). */
    void (*backward)(struct perta_backend *be, const struct perta_norm *norm, struct perta_array dx,
                     struct perta_array dy, struct perta_array x, struct perta_array rstd, size_t T,
                     size_t H);
    /* dweight (H), dbias (H; none without a bias) += the gradients of the norm's own. */
    void (*backward_weight)(struct perta_backend *be, const struct perta_norm *norm,
                            struct perta_array dweight, struct perta_array dbias,
                            struct perta_array dy, struct perta_array x, struct perta_array rstd,
                            size_t T, size_t H);
};
extern const struct perta_norm_part perta_rmsnorm_part;

/* A layer's norm, its weight being param. */
struct perta_norm perta_layer_norm(const struct perta_layer *l, enum perta_param param);
/* To the sink: the gradients of that norm, of each sequence, which has so many rows for each token.
 * vector: scratch, twice (H). */
void perta_layer_norm_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                               enum perta_param param, struct perta_array dy, struct perta_array x,
                               struct perta_array rstd, size_t rows, size_t H,
                               struct perta_array vector);

/* ---- attention and MLP ---- */

struct perta_attention_part {
    /* acts->mid += what attention makes of acts->n1. */
    void (*forward)(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *acts);
    /* From acts->dmid to acts->dn, the gradient of n1; gradients of weights to the sink. */
    void (*backward)(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *acts);
};
extern const struct perta_attention_part perta_attention_part;

struct perta_mlp_part {
    /* acts->out += what the MLP makes of acts->n2. */
    void (*forward)(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *acts);
    /* From acts->dout to acts->dn, the gradient of n2; gradients of weights to the sink. */
    void (*backward)(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *acts);
};
extern const struct perta_mlp_part perta_gated_mlp_part;

#endif
