/* config_read.h - used by perta_llm_parse: values of config.json. Refusals name the key. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_READ_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_READ_H

#include "estimators/model/config.h"

struct perta_rope_family;

/* After a refusal, the rest is read without effect: rc and *err stay. */
struct perta_config_reader {
    const json_t *config;
    const char *path;   /* for messages, as is */
    const char *within; /* the key of the object that is read; NULL: the config itself */
    const struct perta_family *family; /* once it is known */
    struct perta_err *err;
    int rc;
};

/* The family that the config names, without any check; NULL if it is none. */
const struct perta_family *perta_config_family(const json_t *config);

/* What an architecture needs that is not implemented, if that is known; otherwise NULL. */
const char *perta_config_missing(const char *architecture);

/* Refuse the value of key. */
void perta_config_refuse(struct perta_config_reader *r, const char *key, const char *what);

/* Whether key has a value other than null. */
bool perta_config_has(const json_t *object, const char *key);
/* A whole number from 1 to 2^31 - 1. If the key is missing or null: fallback, or an error if that
 * is 0. */
uint32_t perta_config_count(struct perta_config_reader *r, const char *key, uint32_t fallback);
/* A float32 above 0, at key of object (the config, or an object in it). If the key is missing:
 * fallback, or an error if that is 0. null is refused. */
double perta_config_number(struct perta_config_reader *r, const json_t *object, const char *key,
                           double fallback);
/* A whole number from 0 to 2^31 - 1. If the key is missing or null: fallback. */
uint32_t perta_config_whole(struct perta_config_reader *r, const char *key, uint32_t fallback);
/* true or false; false if the key is null, fallback if it is missing. */
bool perta_config_flag(struct perta_config_reader *r, const char *key, bool fallback);
/* Refuse another value of key than this one (JSON); missing and null are fine. For keys that
 * transformers does not read for this family, and which say what the family does anyway. */
void perta_config_only(struct perta_config_reader *r, const char *key, const char *value);
/* The same at the top level, for what may be switched off: 0 if the key is null, or if it is missing
 * and fallback is 0. */
float perta_config_optional(struct perta_config_reader *r, const char *key, double fallback);
/* true or false; false if the key is missing or null. */
bool perta_config_bool(struct perta_config_reader *r, const char *key);

/* The number of experts: key, or "num_local_experts", which transformers takes for the same in many
 * families; the two must not contradict each other. */
uint32_t perta_config_experts(struct perta_config_reader *r, const char *key, uint32_t fallback);
/* Granite's multipliers: of the embedding, the residuals, attention's scores and the logits
 * (family_norms.c). */
void perta_config_granite(struct perta_config_reader *r, struct perta_llm *llm);
/* Whether a layer has a mixture of experts instead of an MLP. */
void perta_config_mixture(struct perta_llm *llm, uint32_t layer, bool is);

/* Which layers have the window, llm->window, which is read before: "layer_types". */
void perta_config_layer_types(struct perta_config_reader *r, struct perta_llm *llm);
/* Sliding window attention, of 4096 positions if "sliding_window" is missing, in the layers that
 * "layer_types" says; without that key, in all but every every-th. */
void perta_config_windows(struct perta_config_reader *r, struct perta_llm *llm, uint32_t every);

/* No layer has rotary positions. */
void perta_config_unrotated(struct perta_llm *llm);

/* Options of rotary positions, from the keys from which transformers takes them (config_rope.c): of
 * layers with full attention, and with sliding attention. max_positions: default of
 * max_position_embeddings. head_dim: elements of a head that may be rotated. */
void perta_config_rope(struct perta_config_reader *r, const struct perta_rope_family *family,
                       uint32_t max_positions, uint32_t head_dim, struct perta_rope to[2]);
/* Whether a family has this key at the top level for its positions. */
bool perta_config_rope_reads(const struct perta_rope_family *family, const char *key);
/* Add to *list the keys of rotary positions that no kind of the name that they give reads, as
 * "rope_scaling.NAME". */
void perta_config_rope_unknown(const json_t *config, json_t **list);

/* Refuse keys that would change the forward pass in a way that is not implemented
 * (config_keys.c). */
void perta_config_refuse_keys(struct perta_config_reader *r);

#endif
