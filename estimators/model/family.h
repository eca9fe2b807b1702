/* family.h - what a model is: a table of families, one row each.
 *
 * A family says where its tensors are and what shape they have, which parts its blocks are made of
 * (part.h), and what transformers takes where config.json leaves a key out. Nothing else in
 * estimators/ names a tensor of a model. A new dense family is a row here and, where it has a new
 * part, that part. */
#ifndef PERTA_ESTIMATORS_MODEL_FAMILY_H
#define PERTA_ESTIMATORS_MODEL_FAMILY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

struct perta_llm;
struct perta_norm_part;
struct perta_attention_part;
struct perta_mlp_part;

/* The parameters of a layer, by role. A bias follows its weight. */
enum perta_param {
    PERTA_Q,
    PERTA_Q_BIAS,
    PERTA_K,
    PERTA_K_BIAS,
    PERTA_V,
    PERTA_V_BIAS,
    PERTA_O,
    PERTA_O_BIAS,
    PERTA_GATE,
    PERTA_GATE_BIAS,
    PERTA_UP,
    PERTA_UP_BIAS,
    PERTA_DOWN,
    PERTA_DOWN_BIAS,
    PERTA_NORM_1,
    PERTA_NORM_1_BIAS,
    PERTA_NORM_2,
    PERTA_NORM_2_BIAS,
    PERTA_NORM_Q,
    PERTA_NORM_K,
    PERTA_N_PARAMS,
};

/* A dimension of a parameter. */
enum perta_width {
    PERTA_WIDTH_NONE, /* of a vector, the first */
    PERTA_WIDTH_HIDDEN,
    PERTA_WIDTH_INTERMEDIATE,
    PERTA_WIDTH_QUERIES, /* n_heads * head_dim */
    PERTA_WIDTH_KEYS,    /* n_kv_heads * head_dim */
    PERTA_WIDTH_HEAD,    /* head_dim */
};

/* When a parameter is there: always, or if struct perta_llm has the option. */
enum perta_option {
    PERTA_ALWAYS,
    PERTA_IF_QKV_BIAS,
    PERTA_IF_O_BIAS,
    PERTA_IF_MLP_BIAS,
    PERTA_IF_QK_NORM,
};

struct perta_param_row {
    enum perta_param param;
    const char *name;         /* on disk, after "model.layers.3." */
    enum perta_width out, in; /* a matrix (out, in); out NONE: a vector (in) */
    enum perta_option when;
};

/* Sliding attention: never, in every layer, or as Qwen's use_sliding_window and max_window_layers
 * say. */
enum perta_windows { PERTA_WINDOWS_NONE, PERTA_WINDOWS_EVERYWHERE, PERTA_WINDOWS_QWEN };

struct perta_family {
    const char *model_type, *architecture; /* as config.json names it */

    const char *layers;                   /* on disk: "model.layers" */
    const struct perta_param_row *params; /* (n_params) of a layer, in the order they are saved */
    size_t n_params;
    const char *embedding, *head;
    const char *final_norm, *final_norm_bias; /* bias NULL: none */

    const struct perta_norm_part *norm;
    const struct perta_attention_part *attention;
    const struct perta_mlp_part *mlp;

    /* What transformers takes where a key is missing, and which keys it looks at (config.c). */
    bool qkv_bias, qk_norm, reads_attention_bias, reads_mlp_bias;
    uint32_t n_kv_heads; /* 0: as many as heads */
    uint32_t max_positions;
    enum perta_windows windows;
};

/* The families that are supported, in the order in which messages list them. */
extern const struct perta_family perta_families[];
extern const size_t perta_n_families;

/* A parameter's row; NULL: this model has none. */
const struct perta_param_row *perta_llm_param(const struct perta_llm *llm, enum perta_param param);
/* Its shape; *out is 0 for a vector of *in. */
void perta_llm_shape(const struct perta_llm *llm, const struct perta_param_row *row, size_t *out,
                     size_t *in);
/* The longest row or column of a layer's parameters. */
size_t perta_llm_widest(const struct perta_llm *llm);

/* What the checkpoint calls a parameter of a layer, in buf. */
#define PERTA_NAME_BYTES 128
const char *perta_llm_name(const struct perta_llm *llm, uint32_t layer,
                           const struct perta_param_row *row, char buf[PERTA_NAME_BYTES]);

/* Every parameter of a model, in the order they are saved: its name and its shape (rows, cols);
 * rows 0: a vector. A tied head is the embedding, and does not come twice. Stops at the first that
 * tensor() returns not 0 for. */
typedef int perta_tensor_fn(void *ctx, const char *name, size_t rows, size_t cols,
                            struct perta_err *err);
int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err);

#endif
