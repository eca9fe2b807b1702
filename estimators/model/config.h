/* config.h - the shape and options of a model, from its config.json, as transformers reads it. The
 * families are in family.h. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "estimators/compute/activation.h"
#include "io/err.h"

struct perta_family;

enum perta_rope_kind { PERTA_ROPE_DEFAULT, PERTA_ROPE_LINEAR, PERTA_ROPE_LLAMA3 };

struct perta_rope {
    enum perta_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor, original_positions; /* only LLAMA3 */
};

#define PERTA_WINDOW_LAYERS 1024 /* the most layers of a model with windows */
#define PERTA_NO_PAD UINT32_MAX

struct perta_llm {
    const struct perta_family *family; /* family.h */
    uint32_t n_layers, hidden, intermediate, vocab;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t window; /* positions that sliding window attention sees; 0: no layer has a window */
    uint64_t windowed[PERTA_WINDOW_LAYERS / 64]; /* one bit for each layer: it has the window */
    /* padding token: its row of the embedding gets no gradient from lookups, as with PyTorch's
     * padding_idx; or PERTA_NO_PAD */
    uint32_t pad;
    float norm_eps;
    struct perta_activation activation; /* of the MLP */
    bool tied;                          /* the head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm; /* Qwen3: RMSNorm of each head's queries and keys */
    struct perta_rope rope;
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

/* Frequencies of the rotary embedding, inv_freq (head_dim / 2): theta^(-2i/head_dim), scaled as in
 * transformers' modeling_rope_utils. */
void perta_rope_frequencies(const struct perta_llm *llm, float *inv_freq);

/* The number of positions that a token sees in a layer, its own included; UINT32_MAX: all. */
static inline uint32_t perta_llm_window(const struct perta_llm *llm, uint32_t layer)
{
    bool has =
        llm->window && layer < PERTA_WINDOW_LAYERS && llm->windowed[layer / 64] >> layer % 64 & 1;
    return has ? llm->window : UINT32_MAX;
}

#endif
