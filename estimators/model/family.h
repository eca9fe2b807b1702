/* family.h - model families: a table with one row each.
 *
 * A row has the names and shapes of the family's tensors, the parts of its blocks (part.h), and
 * how its config.json is read: the names and defaults of keys, and a function for what only this
 * family has. Nothing else in estimators/ names a tensor of a model. To add a family, add a row,
 * and any part that no other family has. docs/families.md is made from the table
 * (scripts/families.sh). */
#ifndef PERTA_ESTIMATORS_MODEL_FAMILY_H
#define PERTA_ESTIMATORS_MODEL_FAMILY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "estimators/compute/place.h"
#include "io/err.h"

struct perta_llm;
struct perta_config_reader;
struct perta_norm_part;
struct perta_attention_part;

/* The parameters of a layer, by role. The bias of a weight is the next one. */
enum perta_param {
    /* attention */
    PERTA_Q,
    PERTA_Q_BIAS,
    PERTA_K,
    PERTA_K_BIAS,
    PERTA_V,
    PERTA_V_BIAS,
    PERTA_QKV, /* one tensor for all three */
    PERTA_QKV_BIAS,
    PERTA_Q_A, /* latent attention: down, then up (PERTA_Q) */
    PERTA_Q_A_BIAS,
    PERTA_KV_A,
    PERTA_KV_A_BIAS,
    PERTA_KV_B,
    PERTA_KV_B_BIAS,
    PERTA_O,
    PERTA_O_BIAS,
    PERTA_SINKS, /* a logit of each head */
    /* MLP */
    PERTA_GATE,
    PERTA_GATE_BIAS,
    PERTA_UP,
    PERTA_UP_BIAS,
    PERTA_GATE_UP, /* one tensor for both */
    PERTA_GATE_UP_BIAS,
    PERTA_DOWN,
    PERTA_DOWN_BIAS,
    /* mixture of experts */
    PERTA_ROUTER,
    PERTA_ROUTER_BIAS,
    PERTA_ROUTER_CORRECTION, /* added to scores when experts are chosen; it has no gradient */
    PERTA_SHARED_GATE,
    PERTA_SHARED_GATE_BIAS,
    PERTA_SHARED_UP,
    PERTA_SHARED_UP_BIAS,
    PERTA_SHARED_GATE_UP,
    PERTA_SHARED_GATE_UP_BIAS,
    PERTA_SHARED_DOWN,
    PERTA_SHARED_DOWN_BIAS,
    PERTA_SHARED_SCORE, /* the shared expert's own gate */
    PERTA_SHARED_SCORE_BIAS,
    PERTA_EXPERT_GATE, /* from here to EXPERT_DOWN_BIAS: one for each expert */
    PERTA_EXPERT_GATE_BIAS,
    PERTA_EXPERT_UP,
    PERTA_EXPERT_UP_BIAS,
    PERTA_EXPERT_GATE_UP,
    PERTA_EXPERT_GATE_UP_BIAS,
    PERTA_EXPERT_DOWN,
    PERTA_EXPERT_DOWN_BIAS,
    /* norms */
    PERTA_NORM_1, /* before attention */
    PERTA_NORM_1_BIAS,
    PERTA_NORM_2, /* before the MLP */
    PERTA_NORM_2_BIAS,
    PERTA_NORM_Q,
    PERTA_NORM_Q_BIAS,
    PERTA_NORM_K,
    PERTA_NORM_K_BIAS,
    PERTA_NORM_Q_A,
    PERTA_NORM_Q_A_BIAS,
    PERTA_NORM_KV_A,
    PERTA_NORM_KV_A_BIAS,
    PERTA_NORM_1_AFTER, /* after attention, before it is added */
    PERTA_NORM_1_AFTER_BIAS,
    PERTA_NORM_2_AFTER,
    PERTA_NORM_2_AFTER_BIAS,
    PERTA_N_PARAMS,
};

/* Size of one dimension of a parameter. */
enum perta_width {
    PERTA_WIDTH_NONE, /* first dimension of a vector */
    PERTA_WIDTH_HIDDEN,
    PERTA_WIDTH_INTERMEDIATE,
    PERTA_WIDTH_GATE_UP,  /* 2 * intermediate */
    PERTA_WIDTH_QUERIES,  /* n_heads * head_dim */
    PERTA_WIDTH_KEYS,     /* n_kv_heads * head_dim */
    PERTA_WIDTH_VALUES,   /* n_kv_heads * value_dim */
    PERTA_WIDTH_QKV,      /* queries + keys + values */
    PERTA_WIDTH_ATTENDED, /* n_heads * value_dim */
    PERTA_WIDTH_HEAD,     /* head_dim */
    PERTA_WIDTH_HEADS,    /* n_heads */
    PERTA_WIDTH_Q_LORA,   /* q_lora_rank */
    PERTA_WIDTH_KV_LORA,  /* kv_lora_rank */
    PERTA_WIDTH_KV_A,     /* kv_lora_rank + rotary_dim */
    PERTA_WIDTH_KV_B,     /* n_heads * (head_dim - rotary_dim + value_dim) */
    PERTA_WIDTH_EXPERTS,  /* n_experts */
    PERTA_WIDTH_EXPERT,   /* intermediate size of an expert */
    PERTA_WIDTH_EXPERT_GATE_UP,
    PERTA_WIDTH_SHARED, /* intermediate size of the shared expert */
    PERTA_WIDTH_SHARED_GATE_UP,
    PERTA_WIDTH_ONE,
    PERTA_WIDTH_ROW, /* first dimension of a vector that is stored as (1, in) */
    /* weights of a norm for each head: vectors that are stored as (heads, head_dim) */
    PERTA_WIDTH_EACH_QUERY, /* n_heads * head_dim */
    PERTA_WIDTH_EACH_KEY,   /* n_kv_heads * head_dim */
    PERTA_N_WIDTHS,
};

/* What a model, or a layer of it, has: bits of perta_llm.options and perta_llm.layers[]. A parameter
 * is there if all that its row asks for are. */
enum perta_option {
    PERTA_ALWAYS = 0,
    PERTA_QKV_HAS_BIAS = 1 << 0,
    PERTA_O_HAS_BIAS = 1 << 1,
    PERTA_MLP_HAS_BIAS = 1 << 2,
    PERTA_QK_NORM = 1 << 3,
    PERTA_Q_LORA = 1 << 4,  /* latent queries */
    PERTA_Q_PLAIN = 1 << 5, /* not those */
    /* Names of published files, which mostly have a tensor for each expert; or those of
     * transformers 5 in memory, with all experts in one tensor of three dimensions. */
    PERTA_EXPERTS_APART = 1 << 6,
    PERTA_EXPERTS_TOGETHER = 1 << 7,
    PERTA_HAS_SHARED = 1 << 8,     /* shared expert */
    PERTA_HAS_CORRECTION = 1 << 9, /* of the router's scores */
    PERTA_OWN_1 = 1 << 10,         /* what these mean is the family's affair */
    PERTA_OWN_2 = 1 << 11,
    PERTA_OWN_3 = 1 << 12,
    PERTA_OWN_4 = 1 << 13,
    PERTA_NO_HEAD_BIAS = 1 << 14, /* though the family may have one */
    /* of a layer */
    PERTA_LAYER_DENSE = 1 << 20,     /* an MLP */
    PERTA_LAYER_MIXTURE = 1 << 21,   /* a mixture of experts */
    PERTA_LAYER_WINDOW = 1 << 22,    /* sliding window attention; rotates with ropes[1] */
    PERTA_LAYER_CHUNKS = 1 << 23,    /* attention within chunks */
    PERTA_LAYER_UNROTATED = 1 << 24, /* no rotary positions */
    PERTA_LAYER_QK_NORM = 1 << 25,   /* norms of queries and keys of a head, without weights */
};

struct perta_param_row {
    enum perta_param param;
    /* In files, after "model.layers.3."; that of an expert's own tensor has %u for its number, that
     * of a tensor of three dimensions with all experts has none. */
    const char *name;
    enum perta_width out, in; /* a matrix (out, in); out NONE: a vector (in) */
    uint32_t when;            /* enum perta_option */
    bool transposed;          /* stored as (in, out) */
};

/* Sliding window attention. */
enum perta_windows {
    PERTA_WINDOWS_NONE,       /* never */
    PERTA_WINDOWS_EVERYWHERE, /* in every layer, or those that layer_types says */
    /* in every layer, if use_sliding_window says so; layer_types is not read */
    PERTA_WINDOWS_SWITCHED,
    PERTA_WINDOWS_QWEN,  /* according to use_sliding_window and max_window_layers or layer_types */
    PERTA_WINDOWS_ASKED, /* in every layer, if sliding_window is there; layer_types is not read */
    PERTA_WINDOWS_UPPER, /* from max_window_layers on, or those that layer_types says */
    /* According to use_sliding_window and layer_types, or every other layer, from the first one on,
     * below max_window_layers. */
    PERTA_WINDOWS_ALTERNATE,
    PERTA_WINDOWS_OWN, /* the family's read function sets them */
};

/* Names of keys in config.json that differ between families; NULL: the usual one. */
struct perta_config_keys {
    const char *layers;       /* num_hidden_layers */
    const char *hidden;       /* hidden_size */
    const char *intermediate; /* intermediate_size; "": none */
    const char *heads;        /* num_attention_heads */
    const char *kv_heads;     /* num_key_value_heads; "": none, as many as query heads */
    const char *positions;    /* max_position_embeddings */
    const char *norm_eps;     /* rms_norm_eps; "": none */
    const char *act;          /* hidden_act; "": none */
};

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
    const char *interleave_key;  /* says so, if it is there; NULL: none */
    bool alpha;                  /* "dynamic" with "alpha" is a fixed theta */
    bool mrope;                  /* "mrope" is a kind: several axes, which are equal for text */
    bool yarn_is_longrope;       /* "su" and "yarn" are names of longrope, the only scaling */
    bool short_mscale;           /* longrope, the only scaling, has "short_mscale" as scale */
    bool query_scale;            /* "llama_4_scaling_beta" scales queries */
    /* "rope_parameters" has an object for each type of layer, whose theta is otherwise that at the
     * top level for full attention, and this for sliding attention. */
    bool by_layer_type;
    double local_theta;
    const char *local_theta_key; /* NULL: not at the top level */
};

struct perta_family {
    const char *model_type, *architecture; /* its names in config.json */
    const char *other_type;                /* another model_type that means the same; NULL: none */
    /* The architecture under which transformers saves it, whose class it has there; NULL: its own
     * name. */
    const char *saved_as;

    const char *base;                     /* in files: "model", which the names below follow */
    const char *layers;                   /* "layers" */
    const struct perta_param_row *params; /* (n_params) of a layer, in the order of saving */
    size_t n_params;
    const char *embedding;
    const char *head, *head_bias;             /* without base; head_bias NULL: none */
    const char *final_norm, *final_norm_bias; /* NULL: none */
    /* How names begin, after base, of tensors that predict further tokens; NULL: there are none.
     * Whole layers do so elsewhere (perta_llm.n_extra_layers). */
    const char *extra;
    const char *positions;                            /* table of learned positions; NULL: none */
    const char *embedding_norm, *embedding_norm_bias; /* after the embedding; NULL: none */
    const char *other_base; /* which some files have instead of base; NULL: none */

    const struct perta_norm_part *norm;
    bool bare_norms; /* norms before attention and the MLP, and the final one, have no weights */
    const struct perta_attention_part *attention;

    /* Defaults for missing keys, and which keys transformers reads for this family (config.c). */
    struct perta_config_keys keys;
    const char *const *own_keys; /* that read() looks at, up to a NULL; NULL: none */
    uint32_t options;            /* enum perta_option that every model of it has */
    bool reads_attention_bias, reads_mlp_bias;
    bool tied;             /* the default of tie_word_embeddings */
    uint32_t pad;          /* the default of pad_token_id, plus 1; 0: none */
    bool no_padding;       /* pad_token_id is a token like others (no padding_idx) */
    uint32_t n_kv_heads;   /* 0: as many as query heads */
    uint32_t intermediate; /* times hidden; 0: no default */
    uint32_t head_dim;     /* 0: hidden / n_heads */
    uint32_t max_positions;
    double norm_eps; /* 0: 1e-6 */
    const char *act; /* NULL: silu */
    struct perta_rope_family rope;
    enum perta_windows windows;
    struct perta_position_ids position_ids;
    /* Read what only this family has; NULL: nothing. Called after the rest. */
    void (*read)(struct perta_config_reader *r, struct perta_llm *llm);
};

/* The supported families, in the order in which `perta help families' lists them. */
extern const struct perta_family *const perta_families[];
extern const size_t perta_n_families;
/* The architecture of a supported family that is spelled nearly like this one or, if that is NULL,
 * the model_type: up to two letters differ, or one in a short name. NULL: none is. */
const char *perta_family_nearest(const char *architecture, const char *model_type);

/* Rows that several families share (family.c). */
#define PERTA_N_LLAMA_PARAMS 18
extern const struct perta_param_row perta_llama_params[PERTA_N_LLAMA_PARAMS];

/* Tensors and parts of most families. Users include part.h. */
#define PERTA_LLAMA_NAMES                                                               \
    .base = "model", .layers = "layers", .embedding = "embed_tokens.weight",            \
    .head = "lm_head.weight", .final_norm = "norm.weight", .norm = &perta_rmsnorm_part, \
    .attention = &perta_attention_part
#define PERTA_LLAMA_LINE \
    PERTA_LLAMA_NAMES, .params = perta_llama_params, .n_params = PERTA_N_LLAMA_PARAMS

/* Whose parameter it is. */
struct perta_site {
    uint32_t layer;
    uint32_t expert; /* its number plus 1; 0: the layer's own */
};

static inline struct perta_site perta_site_of(uint32_t layer)
{
    return (struct perta_site){layer, 0};
}

static inline struct perta_site perta_site_of_expert(uint32_t layer, uint32_t number)
{
    return (struct perta_site){layer, number + 1};
}

/* Whether it is a norm's, with weights for each head. */
static inline bool perta_is_by_head(const struct perta_param_row *row)
{
    return row->in == PERTA_WIDTH_EACH_QUERY || row->in == PERTA_WIDTH_EACH_KEY;
}

static inline bool perta_is_of_expert(enum perta_param param)
{
    return param >= PERTA_EXPERT_GATE && param <= PERTA_EXPERT_DOWN_BIAS;
}

#define PERTA_ANY_LAYER UINT32_MAX
/* The row of a parameter; NULL if this layer (PERTA_ANY_LAYER: no layer) of the model has it. */
const struct perta_param_row *perta_llm_param(const struct perta_llm *llm, uint32_t layer,
                                              enum perta_param param);
/* The shape of a parameter, of one expert if it is an expert's, as products see it; *out is 0 for a
 * vector of *in elements. */
void perta_llm_shape(const struct perta_llm *llm, const struct perta_param_row *row, size_t *out,
                     size_t *in);
/* The same as it is stored: rows 0 for a vector. */
void perta_llm_stored(const struct perta_llm *llm, const struct perta_param_row *row, size_t *rows,
                      size_t *cols);
/* How many elements a norm of queries or keys normalises together: the width of its weights, or of
 * one head's. */
size_t perta_llm_norm_width(const struct perta_llm *llm, const struct perta_param_row *row);
/* The longest row or column of a layer's parameters. */
size_t perta_llm_widest(const struct perta_llm *llm);

/* The name of a parameter's tensor in files, in buf. */
#define PERTA_NAME_BYTES 160
const char *perta_llm_name(const struct perta_llm *llm, struct perta_site site,
                           const struct perta_param_row *row, char buf[PERTA_NAME_BYTES]);
/* Whether a tensor of the model is a matrix, or the matrices of all experts, by its name and the
 * number of its dimensions: all experts' biases, or a norm's weight for each head, have two and are
 * none. */
bool perta_llm_is_matrix(const struct perta_llm *llm, const char *name, size_t n_dims);
/* The index of a parameter's first element in its tensor: 0, unless all experts are in one. */
uint64_t perta_llm_first(const struct perta_llm *llm, struct perta_site site,
                         const struct perta_param_row *row);

/* Set the names of the tensors outside the layers, and of the layers, in *llm, for a model whose
 * tensors' names begin with base ("model"), and head_base ("") for the head. */
void perta_llm_set_names(struct perta_llm *llm, const char *base, const char *head_base);

/* A tensor of a model: of 1 to 3 dimensions. */
struct perta_tensor_shape {
    size_t n_dims, dims[3];
};
/* Call tensor() for every tensor of a model, in the order in which they are saved, with its name
 * and shape. A tied head is the same tensor as the embedding and is not repeated. Stops when
 * tensor() does not return 0, and returns that. */
typedef int perta_tensor_fn(void *ctx, const char *name, const struct perta_tensor_shape *shape,
                            struct perta_err *err);
int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err);

#endif
