/* config.h - the shape of a model, from its config.json, as transformers reads it. Which families
 * there are: family.h. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"

struct perta_family;

enum perta_rope_kind { PERTA_ROPE_DEFAULT, PERTA_ROPE_LINEAR, PERTA_ROPE_LLAMA3 };

struct perta_rope {
    enum perta_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor, original_positions; /* of LLAMA3 */
};

#define PERTA_WINDOW_LAYERS 1024 /* of a model with windows, at most */
#define PERTA_NO_PAD UINT32_MAX

struct perta_llm {
    const struct perta_family *family; /* family.h */
    uint32_t n_layers, hidden, intermediate, vocab;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t window; /* sliding attention sees so many positions; 0: none has it */
    uint64_t windowed[PERTA_WINDOW_LAYERS / 64]; /* a bit for each layer that has it */
    uint32_t pad; /* this token's row of the embedding gets no gradient from being looked up, as
                     PyTorch's padding_idx has it; PERTA_NO_PAD: there is none */
    float norm_eps;
    bool tied; /* the head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm; /* Qwen3: RMSNorm of each head's queries and keys */
    struct perta_rope rope;
};

/* Fill *llm from config (config.json's object), as transformers reads it. path is for messages.
 * PERTA_EINPUT names the key, or the architecture and what is supported. A key that is known to
 * change some model's forward pass, and not computed here, is refused unless it is switched off. */
PERTA_API int perta_llm_parse(const json_t *config, const char *path, struct perta_llm *llm,
                              struct perta_err *err);

/* The keys that perta does not know: whether they bear on the forward pass is not known either.
 * A new list of names, those inside another key as "rope_scaling.NAME"; NULL without memory. */
PERTA_API json_t *perta_llm_unknown_keys(const json_t *config);

/* Frequencies of the rotary embedding, inv_freq (head_dim / 2): theta^(-2i/head_dim), rescaled
 * as transformers' modeling_rope_utils does. */
void perta_rope_frequencies(const struct perta_llm *llm, float *inv_freq);

/* How many positions back layer sees, itself included; UINT32_MAX: all. */
static inline uint32_t perta_llm_window(const struct perta_llm *llm, uint32_t layer)
{
    bool has =
        llm->window && layer < PERTA_WINDOW_LAYERS && llm->windowed[layer / 64] >> layer % 64 & 1;
    return has ? llm->window : UINT32_MAX;
}

#endif
