/* config.h - the shape and options of a model, from its config.json, as transformers reads it. The
 * families are in family.h. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "estimators/model/rope.h"
#include "io/err.h"

struct perta_family;

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
    bool tied; /* the head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm;               /* Qwen3: RMSNorm of each head's queries and keys */
    struct perta_rope ropes[2]; /* of layers without and with the window */
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

/* The number of positions that a token sees in a layer, its own included; UINT32_MAX: all. */
static inline uint32_t perta_llm_window(const struct perta_llm *llm, uint32_t layer)
{
    bool has =
        llm->window && layer < PERTA_WINDOW_LAYERS && llm->windowed[layer / 64] >> layer % 64 & 1;
    return has ? llm->window : UINT32_MAX;
}

/* The rotary positions of a layer. */
static inline const struct perta_rope *perta_llm_rope(const struct perta_llm *llm, uint32_t layer)
{
    return &llm->ropes[perta_llm_window(llm, layer) != UINT32_MAX];
}

/* The length of sequences up to which the frequencies of both are valid (perta_rope_longest). */
static inline uint32_t perta_llm_longest(const struct perta_llm *llm)
{
    uint32_t full = perta_rope_longest(&llm->ropes[0]), local = perta_rope_longest(&llm->ropes[1]);
    return full < local ? full : local;
}

/* Fill tables (2, head_dim / 2) with the frequencies of both llm->ropes. */
void perta_llm_rope_tables(const struct perta_llm *llm, float *tables);
/* The row of such tables that a layer uses. */
static inline const float *perta_llm_rope_table(const struct perta_llm *llm, uint32_t layer,
                                                const float *tables)
{
    return tables + (perta_llm_rope(llm, layer) - llm->ropes) * (llm->head_dim / 2);
}

#endif
