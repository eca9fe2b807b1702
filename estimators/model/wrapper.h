/* wrapper.h - models around a language model, as for images: which they are, where in config.json
 * and in their files the language model is, and which tensors are other parts. Only the language
 * model is computed, for text. The other parts stay as they are. */
#ifndef PERTA_ESTIMATORS_MODEL_WRAPPER_H
#define PERTA_ESTIMATORS_MODEL_WRAPPER_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "io/err.h"
#include "io/format/checkpoint.h"

struct perta_family;
struct perta_llm;

struct perta_wrapper {
    const char *model_type, *architecture; /* its names in config.json */
    /* The "model_type" of its text model where "text_config" does not say; NULL: it must. */
    const char *text_type;
    bool is_fixed; /* it can be no other */
    bool is_flat;  /* without "text_config", the text model's keys are at the top level */
    /* The head is its own, which computes logits and nothing else; otherwise it is the text
     * model's. */
    bool has_own_head;
    /* The text model's family, if it is no language model of its own; NULL: one of
     * perta_families. */
    const struct perta_family *text;
};

extern const struct perta_wrapper perta_wrappers[];
extern const size_t perta_n_wrappers;

/* The wrapper that config (config.json) names; NULL if it is none. */
const struct perta_wrapper *perta_wrapper_find(const json_t *config);
/* The text model's config, with its model_type, and the sizes that transformers takes if they are
 * missing. A new object; NULL if the config has none, or when out of memory. */
json_t *perta_wrapper_text(const struct perta_wrapper *wrapper, const json_t *config);
/* Whether key is one of a wrapper's own in config.json, which nothing that is computed depends
 * on. */
bool perta_wrapper_has_key(const char *key);

/* Set the names of llm's tensors to those that ck has. */
void perta_wrapper_names(struct perta_llm *llm, const struct perta_checkpoint *ck);
/* Whether the tensor of that name is of another part than the language model. */
bool perta_wrapper_is_other(const char *name);

#endif
