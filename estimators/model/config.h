/* config.h - the shape and options of a model, from its config.json, as transformers reads it. The
 * families are in family.h. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "estimators/compute/activation.h"
#include "estimators/model/family.h"
#include "estimators/model/rope.h"
#include "estimators/model/route.h"
#include "io/err.h"

#define PERTA_MOST_LAYERS 1024
#define PERTA_NO_PAD UINT32_MAX

struct perta_wrapper;

/* Names of tensors in files. */
struct perta_llm_names {
    char layers[64]; /* "model.layers" */
    char embedding[96], head[96], head_bias[96], final_norm[96], final_norm_bias[96];
    char positions[96], embedding_norm[96], embedding_norm_bias[96];
};

struct perta_rotation;

struct perta_llm {
    const struct perta_family *family;
    const struct perta_wrapper *wrapper; /* the model that it is a part of; NULL: none */
    struct perta_llm_names names;        /* "" for what the family does not have */
    uint32_t n_layers, hidden, intermediate, vocab;
    uint32_t n_extra_layers; /* that files may have after those: they predict further tokens, and
                                take no part in the loss */
    uint32_t n_heads, n_kv_heads, head_dim, value_dim;
    uint32_t options;                   /* enum perta_option */
    uint32_t layers[PERTA_MOST_LAYERS]; /* the same for each layer */
    uint32_t any_layer;                 /* of all layers together */
    uint32_t window; /* positions that sliding window attention sees; 0: no layer has a window */
    /* padding token: its row of the embedding gets no gradient from lookups, as with PyTorch's
     * padding_idx; or PERTA_NO_PAD */
    uint32_t pad;
    float norm_eps;
    struct perta_activation activation; /* of the MLP */
    bool tied;                          /* the head is the embedding */
    struct perta_rope ropes[2];         /* of layers without and with the window */

    /* attention */
    float attention_scale;   /* of the scores; 0: 1 / sqrt(head_dim) */
    float attention_softcap; /* 0: none */
    float clip_qkv; /* queries, keys and values are clamped to -clip_qkv .. clip_qkv; 0: no */
    uint32_t chunk; /* of layers with PERTA_LAYER_CHUNKS */
    /* in layers with PERTA_LAYER_UNROTATED, the query of the token at index i of its line is
     * multiplied by 1 + query_beta * log(1 + floor((i + 1) / query_floor)); query_beta 0: no */
    float query_beta, query_floor;
    bool alibi;           /* linear biases instead of rotary positions */
    bool alibi_bf16;      /* perta_attention.slopes_bf16 */
    bool scale_by_number; /* scores of layer l are divided by l + 1, too (GPT-2) */
    bool qk_norm_after_rope;
    bool
        no_blocks; /* lines whose position_ids start again are not supported: they make no blocks, or
                     * other ones than usual */
    /* of one tensor for queries, keys and values: those of a key-value head and its queries are
     * together; otherwise all queries come first, then all keys, then all values */
    bool qkv_by_group;
    uint32_t q_lora, kv_lora, rotary_dim; /* latent attention */
    bool gate_up_interleaved; /* of one tensor for gate and up: row 2i is gate i, row 2i + 1 up i */
    /* the block */
    bool parallel;             /* attention and MLP both start from the block's input */
    float norm_plus;           /* weights of norms are stored minus this */
    float residual_multiplier; /* of what attention and MLP add; 1: none */
    /* mixture of experts; n_experts is 0 if no layer has one */
    uint32_t n_experts, expert_intermediate, shared_intermediate;
    struct perta_router router;
    /* the ends */
    float embedding_multiplier, logit_multiplier; /* 1: none */
    float logit_softcap;                          /* 0: none */
    /* Learned positions: position p has row p + position_offset of a table that has rows for
     * n_positions of them; 0: there is none */
    uint32_t n_positions, position_offset;
};

/* Fill *llm from config (the object in config.json), as transformers reads it. path is for
 * messages. PERTA_EINPUT: the message names the key, or the architecture and the supported ones. A
 * key that would change the forward pass in a way that is not implemented is refused, unless it is
 * switched off. */
PERTA_API int perta_llm_parse(const json_t *config, const char *path, struct perta_llm *llm,
                              struct perta_err *err);

/* The names of the keys that perta does not know, which may or may not change the forward pass;
 * those inside another key as "rope_scaling.NAME". A new list; NULL only when out of memory. */
PERTA_API json_t *perta_llm_unknown_keys(const json_t *config);

/* Whether a layer has an option. */
static inline bool perta_llm_has(const struct perta_llm *llm, uint32_t layer, uint32_t option)
{
    return layer < llm->n_layers && (llm->layers[layer] & option);
}

/* The number of positions that a token sees in a layer, its own included; UINT32_MAX: all. */
static inline uint32_t perta_llm_window(const struct perta_llm *llm, uint32_t layer)
{
    return llm->window && perta_llm_has(llm, layer, PERTA_LAYER_WINDOW) ? llm->window : UINT32_MAX;
}

/* The rotary positions of a layer. */
static inline const struct perta_rope *perta_llm_rope(const struct perta_llm *llm, uint32_t layer)
{
    return &llm->ropes[perta_llm_has(llm, layer, PERTA_LAYER_WINDOW)];
}

/* The length of sequences above which they are long, and up to which frequencies are known, of all
 * layers (perta_rope_short, perta_rope_longest). If layers differ in the first, none may be long. */
static inline uint32_t perta_llm_short(const struct perta_llm *llm)
{
    uint32_t full = perta_rope_short(&llm->ropes[0]), local = perta_rope_short(&llm->ropes[1]);
    return full < local ? full : local;
}
static inline uint32_t perta_llm_longest(const struct perta_llm *llm)
{
    uint32_t full = perta_rope_longest(&llm->ropes[0]), local = perta_rope_longest(&llm->ropes[1]);
    uint32_t least = full < local ? full : local, most = perta_llm_short(llm);
    bool differ = perta_rope_short(&llm->ropes[0]) != perta_rope_short(&llm->ropes[1]);
    least = differ && most < least ? most : least;
    return llm->n_positions && llm->n_positions < least ? llm->n_positions : least;
}

/* Why positions from perta_llm_longest on are refused. */
static inline const char *perta_llm_beyond(const struct perta_llm *llm)
{
    return llm->n_positions ? "the model has no learned positions"
                            : "the frequencies of this model's rotary positions change with the "
                              "length, which is not supported";
}

/* Fill slopes (n_heads) with those of ALiBi, as transformers' build_alibi_tensor computes them: the
 * geometric sequence of Press et al. 2022, section 3, and for a number of heads that is no power of
 * 2 every other slope of twice as many. */
void perta_llm_alibi_slopes(const struct perta_llm *llm, float *slopes);
/* Fill tables (4, head_dim / 2) with the frequencies of both llm->ropes, for sequences that are not
 * long, and for long ones. */
void perta_llm_rope_tables(const struct perta_llm *llm, float *tables);
/* What the backend is to rotate in a layer, from element first of a head on. table: the layer's row
 * of such tables. */
struct perta_rotation perta_llm_rotation(const struct perta_llm *llm, uint32_t layer,
                                         const float *table, size_t first);
/* The row of such tables that a layer uses, for sequences that are not long. */
static inline const float *perta_llm_rope_table(const struct perta_llm *llm, uint32_t layer,
                                                const float *tables)
{
    return tables + (perta_llm_rope(llm, layer) - llm->ropes) * (llm->head_dim / 2);
}

#endif
