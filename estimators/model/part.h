/* part.h - the parts of a transformer block, each with its forward and backward pass in one file:
 * norm.c, attention.c, mlp.c. A family (family.h) says which parts its blocks have.
 *
 * Parts compute on a backend (estimators/compute/backend.h) and get a layer's weights one parameter
 * at a time. Their functions return nothing: the backend keeps a failure, be it its own, of the
 * weights or of the sink, and perta_backend_wait() returns it. */
#ifndef PERTA_ESTIMATORS_MODEL_PART_H
#define PERTA_ESTIMATORS_MODEL_PART_H

#include "estimators/compute/backend.h"
#include "estimators/model/config.h"
#include "estimators/model/factors.h"
#include "estimators/model/family.h"
#include "estimators/model/sink.h"

struct perta_layer;
struct perta_acts;

/* ---- inputs of a part ---- */

/* The values of a parameter, in the backend's memory. */
struct perta_value {
    struct perta_array data; /* (out, in), or a vector (in) of float32 */
    enum perta_dtype dtype;  /* F32, BF16 or F16 */
    size_t out, in;          /* out 0: a vector */
    bool transposed;         /* a matrix is stored as (in, out) */
};

/* A source of a layer's parameters: weights.c (a checkpoint that is being read) or model.c (a model
 * in memory). What get() returns is valid until the next layer begins. */
struct perta_parameters {
    int (*get)(struct perta_parameters *from, struct perta_site site,
               const struct perta_param_row *row, struct perta_value *value, struct perta_err *err);
};

/* What came before the tokens of a batch, each of which is added to a sequence of its own
 * (cache.h). */
struct perta_past_tokens {
    /* acts->att = attention of acts->q over the keys and values that are kept and acts->k, acts->v,
     * which are kept from now on. */
    void (*attend)(struct perta_past_tokens *past, const struct perta_layer *layer,
                   const struct perta_batch *batch, const struct perta_acts *acts);
};

struct perta_layer {
    const struct perta_llm *llm;
    struct perta_backend *be;
    struct perta_parameters *from;
    struct perta_gradient_sink *sink;    /* NULL: gradients of weights are not wanted */
    const struct perta_factors *factors; /* LoRA beside the weights; NULL: none */
    struct perta_past_tokens *past;      /* NULL: a batch is whole sequences */
    const float *inv_freq;               /* this layer's row of perta_llm_rope_tables */
    const float *slopes;                 /* (n_heads), of ALiBi; NULL: none */
    struct perta_site site;
    bool again; /* a second forward pass, for the backward pass: out is not wanted */
};

/* Activations of a block and their gradients, for n tokens of a batch, in one array of the
 * backend's memory. H: hidden, I: intermediate (the larger one of the MLP's and the shared
 * expert's), Q = n_heads * head_dim, A = n_heads * value_dim, K = n_kv_heads * head_dim, V =
 * n_kv_heads * value_dim. Arrays of what the model does not have are empty. */
struct perta_acts {
    struct perta_array x, n1, mid, n2, out, dout, dmid, dn, dx; /* (n, H) */
    /* (n, H): what attention and MLP give, if more is done to it before it is added; its gradient,
     * and scratch */
    struct perta_array branch_1, branch_2, dbranch, spare;
    /* (n, Q), (n, K), (n, V): queries, keys and values before they are clamped */
    struct perta_array q_free, k_free, v_free;
    struct perta_array q, dq;         /* (n, Q) */
    struct perta_array att, datt;     /* (n, A); datt: and scratch of attention (n, max(A, Q)) */
    struct perta_array k, dk;         /* (n, K) */
    struct perta_array v, dv;         /* (n, V) */
    struct perta_array q_raw, k_raw;  /* (n, Q), (n, K): before their norms */
    struct perta_array h, dgate, dup; /* (n, I) */
    struct perta_array gate, up;      /* (n, I); in the backward pass, once the MLP no longer needs
                                             them, scratch of attention (n, Q), (n, A) */
    struct perta_array fused;         /* scratch: the result of a linear that is several in one */
    struct perta_array latent;        /* of latent attention (mla.c) */
    struct perta_array dlatent;       /* its gradients, laid out alike */
    struct perta_array rstd1, rstd2;  /* (n, stats of the norm) */
    struct perta_array rstd1_after, rstd2_after;
    struct perta_array rstd_q, rstd_k; /* (n, norms of a token, stats) */
    struct perta_array router;         /* (n, n_experts): logits, or their gradients */
    struct perta_array score, dscore;  /* (n): logit of the shared expert's own gate */
    struct perta_array dsinks;         /* (n, n_heads): of each sequence */
    struct perta_array vector; /* scratch: the longest vector, or a norm's weight and bias */
};

/* A vector of the layer; no array if the model does not have it. */
struct perta_array perta_layer_vector(const struct perta_layer *l, enum perta_param param);
/* y (n, out) = x (n, in) weight^T + bias, with the weight's LoRA; with add, y +=. */
void perta_layer_linear_forward(const struct perta_layer *l, const struct perta_batch *batch,
                                enum perta_param weight, struct perta_array x, struct perta_array y,
                                bool add);
/* dx (n, in) = dy (n, out) weight, with the weight's LoRA; with add, dx +=. */
void perta_layer_linear_backward(const struct perta_layer *l, const struct perta_batch *batch,
                                 enum perta_param weight, struct perta_array dy,
                                 struct perta_array dx, bool add);
/* Hand the operands of a weight's gradient to the sink, and its bias's gradient of each sequence.
 * vector: scratch (out). */
void perta_layer_linear_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                                 enum perta_param weight, struct perta_array x,
                                 struct perta_array dy, struct perta_array vector);

/* ---- norms ---- */

struct perta_norm_part {
    size_t
        stats; /* numbers of each row that are kept for the backward pass: RMSNorm 1, LayerNorm 2 */
    /* y (T, H) from x (T, H); rstd (T, stats) is kept for the backward pass. */
    void (*forward)(struct perta_backend *be, const struct perta_norm *norm, struct perta_array y,
                    struct perta_array rstd, struct perta_array x, size_t T, size_t H);
    /* dx (T, H) += the gradient of x, from dy (T, H). */
    void (*backward)(struct perta_backend *be, const struct perta_norm *norm, struct perta_array dx,
                     struct perta_array dy, struct perta_array x, struct perta_array rstd, size_t T,
                     size_t H);
    /* dweight, dbias (n_weights, H; no array without a bias) += the gradients of the norm's
     * parameters. */
    void (*backward_weight)(struct perta_backend *be, const struct perta_norm *norm,
                            struct perta_array dweight, struct perta_array dbias,
                            struct perta_array dy, struct perta_array x, struct perta_array rstd,
                            size_t T, size_t H);
};
extern const struct perta_norm_part perta_rmsnorm_part, perta_layernorm_part;

/* The norm of a layer whose weight is param. */
struct perta_norm perta_layer_norm(const struct perta_layer *l, enum perta_param param);
/* Hand that norm's gradients of each sequence, if it has weights, to the sink. rows: rows of x and
 * dy for each token. vector: scratch, twice (n_weights, H). */
void perta_layer_norm_gradient(const struct perta_layer *l, const struct perta_batch *batch,
                               enum perta_param param, struct perta_array dy, struct perta_array x,
                               struct perta_array rstd, size_t rows, size_t H,
                               struct perta_array vector);

/* Whether the layer has that norm. */
bool perta_layer_has_norm(const struct perta_layer *l, enum perta_param param);

/* ---- attention ---- */

/* A layer's attention over a batch. */
struct perta_attention perta_layer_attention(const struct perta_layer *l,
                                             const struct perta_batch *batch);
/* The rotation of the layer's queries and keys, from element first of a head on. */
struct perta_rotation perta_layer_rotation(const struct perta_layer *l, size_t first);

struct perta_attention_part {
    /* Floats of acts->latent for each token; NULL: none. */
    size_t (*latent_width)(const struct perta_llm *llm);
    /* to (n, H) = attention(acts->n1); with add, +=. */
    void (*forward)(const struct perta_layer *l, const struct perta_batch *batch,
                    const struct perta_acts *acts, struct perta_array to, bool add);
    /* From dy (n, H), the gradient of that, to acts->dn, the gradient of n1. Gradients of weights go
     * to the sink. */
    void (*backward)(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_acts *acts, struct perta_array dy);
};
extern const struct perta_attention_part perta_attention_part, perta_latent_attention_part;

/* ---- MLP ---- */

/* The parameters of an MLP: with a gate, in a tensor of its own or in one with up; or without. */
struct perta_mlp_roles {
    enum perta_param gate, up, gate_up, down;
};
extern const struct perta_mlp_roles perta_mlp_roles;    /* the layer's own */
extern const struct perta_mlp_roles perta_shared_roles; /* the shared expert's */
extern const struct perta_mlp_roles perta_expert_roles; /* an expert's: that of the layer's site */

/* Its activations, for n rows. */
struct perta_mlp_acts {
    struct perta_array x, dx;                   /* (n, H) */
    struct perta_array gate, up, h, dgate, dup; /* (n, width) */
    struct perta_array fused;                   /* (n, 2 * width): scratch */
    struct perta_array vector;                  /* scratch: the longest vector */
    size_t width;
};

/* acts->h from acts->x. */
void perta_mlp_inner(const struct perta_layer *l, const struct perta_batch *batch,
                     const struct perta_mlp_roles *roles, const struct perta_mlp_acts *acts);
/* From acts->dgate, which holds the gradient of h, to acts->dx, the gradient of x; with add, +=.
 * Gradients of weights but down go to the sink. */
void perta_mlp_inner_backward(const struct perta_layer *l, const struct perta_batch *batch,
                              const struct perta_mlp_roles *roles,
                              const struct perta_mlp_acts *acts, bool add);
/* to (n, H) = down(h(x)); with add, +=. */
void perta_mlp_forward(const struct perta_layer *l, const struct perta_batch *batch,
                       const struct perta_mlp_roles *roles, const struct perta_mlp_acts *acts,
                       struct perta_array to, bool add);
/* From dy (n, H) to acts->dx; with add, +=. Gradients of all weights go to the sink. */
void perta_mlp_backward(const struct perta_layer *l, const struct perta_batch *batch,
                        const struct perta_mlp_roles *roles, const struct perta_mlp_acts *acts,
                        struct perta_array dy, bool add);

#endif
