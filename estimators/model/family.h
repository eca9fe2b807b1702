/* family.h - model families: a table with one row each.
 *
 * A row has the names and shapes of the family's tensors, the parts of its blocks (part.h), and
 * the defaults that transformers uses for keys missing in config.json. Nothing else in estimators/
 * names a tensor of a model. To add a dense family, add a row, and any part that no other family
 * has. */
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

/* The parameters of a layer, by role. The bias of a weight is the next one. */
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

/* Size of one dimension of a parameter. */
enum perta_width {
    PERTA_WIDTH_NONE, /* first dimension of a vector */
    PERTA_WIDTH_HIDDEN,
    PERTA_WIDTH_INTERMEDIATE,
    PERTA_WIDTH_QUERIES, /* n_heads * head_dim */
    PERTA_WIDTH_KEYS,    /* n_kv_heads * head_dim */
    PERTA_WIDTH_HEAD,    /* head_dim */
};

/* Whether a model has a parameter: always, or if struct perta_llm has this option. */
enum perta_option {
    PERTA_ALWAYS,
    PERTA_IF_QKV_BIAS,
    PERTA_IF_O_BIAS,
    PERTA_IF_MLP_BIAS,
    PERTA_IF_QK_NORM,
};

struct perta_param_row {
    enum perta_param param;
    const char *name;         /* in files, after "model.layers.3." */
    enum perta_width out, in; /* a matrix (out, in); out NONE: a vector (in) */
    enum perta_option when;
};

/* Sliding window attention: never, in every layer, or according to Qwen's use_sliding_window and
 * max_window_layers. */
enum perta_windows { PERTA_WINDOWS_NONE, PERTA_WINDOWS_EVERYWHERE, PERTA_WINDOWS_QWEN };

/* Rotary positions: what transformers takes for keys that config.json leaves out, and by which
 * further names it has them. All zeros: whole heads, theta 10000. */
struct perta_rope_family {
    double theta;          /* 0: 10000 */
    const char *theta_key; /* instead of "rope_theta" at the top level; NULL: that */
    /* partial_rotary_factor; 0: heads are rotated as a whole, and another factor than 1 is refused
     */
    double partial;
    const char *partial_key;     /* instead of that at the top level; NULL: that */
    const char *elements_key;    /* number of elements, if there is no such key; NULL: none */
    const char *parameters;      /* rope_parameters where there are none, as JSON; NULL: {} */
    uint32_t original_positions; /* 0: max_position_embeddings */
    bool interleaved;            /* pairs are neighbours in a head */
    bool mrope;                  /* "mrope" is a kind: several axes, which are equal for text */
    bool yarn_is_longrope;       /* "su" and "yarn" are names of longrope */
    bool short_mscale; /* longrope's scale is "short_mscale", and there is no other kind */
    bool query_scale;  /* "llama_4_scaling_beta" scales queries */
    /* "rope_parameters" has an object for each type of layer, whose theta is otherwise that at the
     * top level for full attention, and this for sliding attention. */
    bool by_layer_type;
    double local_theta;
    const char *local_theta_key; /* NULL: not at the top level */
};

struct perta_family {
    const char *model_type, *architecture; /* its names in config.json */

    const char *layers;                   /* in files: "model.layers" */
    const struct perta_param_row *params; /* (n_params) of a layer, in the order of saving */
    size_t n_params;
    const char *embedding, *head;
    const char *final_norm, *final_norm_bias; /* bias NULL: none */

    const struct perta_norm_part *norm;
    const struct perta_attention_part *attention;
    const struct perta_mlp_part *mlp;

    /* Defaults for missing keys, and which keys transformers reads for this family (config.c). */
    bool qkv_bias, qk_norm, reads_attention_bias, reads_mlp_bias;
    uint32_t n_kv_heads; /* 0: as many as query heads */
    uint32_t max_positions;
    struct perta_rope_family rope;
    enum perta_windows windows;
};

/* The supported families, in the order in which messages list them. */
extern const struct perta_family perta_families[];
extern const size_t perta_n_families;

/* The row of a parameter; NULL if this model does not have it. */
const struct perta_param_row *perta_llm_param(const struct perta_llm *llm, enum perta_param param);
/* The shape of a parameter; *out is 0 for a vector of *in elements. */
void perta_llm_shape(const struct perta_llm *llm, const struct perta_param_row *row, size_t *out,
                     size_t *in);
/* The longest row or column of a layer's parameters. */
size_t perta_llm_widest(const struct perta_llm *llm);

/* The name of a layer's parameter in files, in buf. */
#define PERTA_NAME_BYTES 128
const char *perta_llm_name(const struct perta_llm *llm, uint32_t layer,
                           const struct perta_param_row *row, char buf[PERTA_NAME_BYTES]);

/* Call tensor() for every parameter of a model, in the order in which they are saved, with its name
 * and shape (rows, cols); rows is 0 for a vector. A tied head is the same tensor as the embedding
 * and is not repeated. Stops when tensor() does not return 0, and returns that. */
typedef int perta_tensor_fn(void *ctx, const char *name, size_t rows, size_t cols,
                            struct perta_err *err);
int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err);

#endif
