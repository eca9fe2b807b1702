/* config.h - the shape of a Llama-family model, from its config.json.
 *
 * LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM as transformers
 * defines them: RMSNorm, rotary positions, grouped-query attention, SwiGLU. */
#ifndef PERTA_BACKPROP_CONFIG_H
#define PERTA_BACKPROP_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"

enum perta_rope_kind { PERTA_ROPE_DEFAULT, PERTA_ROPE_LINEAR, PERTA_ROPE_LLAMA3 };

struct perta_rope {
    enum perta_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor, original_positions; /* of LLAMA3 */
};

struct perta_llm {
    uint32_t n_layers, hidden, intermediate, vocab;
    uint32_t n_heads, n_kv_heads, head_dim;
    uint32_t window;       /* sliding attention sees so many positions; 0: all */
    uint32_t window_first; /* from this layer on */
    float rms_eps;
    bool tied;             /* the head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm;          /* Qwen3: RMSNorm of each head's queries and keys */
    struct perta_rope rope;
};

/* Fill *llm from config (config.json's object). path is for messages. PERTA_EINPUT names the
 * key, or the architecture and what is supported. */
PERTA_API int perta_llm_parse(const json_t *config, const char *path, struct perta_llm *llm,
                              struct perta_err *err);

/* Frequencies of the rotary embedding, inv_freq (head_dim / 2): theta^(-2i/head_dim), rescaled
 * as transformers' modeling_rope_utils does. */
void perta_rope_frequencies(const struct perta_llm *llm, float *inv_freq);

/* How many positions back layer sees, itself included; UINT32_MAX: all. */
static inline uint32_t perta_llm_window(const struct perta_llm *llm, uint32_t layer)
{
    return llm->window && layer >= llm->window_first ? llm->window : UINT32_MAX;
}

#endif
