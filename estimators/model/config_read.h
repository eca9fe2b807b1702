/* config_read.h - inside perta_llm_parse: the values of config.json, each refused by its key. */
#ifndef PERTA_ESTIMATORS_MODEL_CONFIG_READ_H
#define PERTA_ESTIMATORS_MODEL_CONFIG_READ_H

#include "estimators/model/config.h"

/* Once something was refused the rest is read for nothing: rc and *err stay. */
struct perta_config_reader {
    const json_t *config;
    const char *path;   /* for messages, as */
    const char *within; /* the key of the object that is read; NULL: the config itself */
    struct perta_err *err;
    int rc;
};

/* Refuse what is at key. */
void perta_config_refuse(struct perta_config_reader *r, const char *key, const char *what);

/* Is there something at key, other than null? */
bool perta_config_has(const json_t *object, const char *key);
/* A whole number from 1 that 31 bits hold; fallback where there is none, or null; 0: there must
 * be one. */
uint32_t perta_config_count(struct perta_config_reader *r, const char *key, uint32_t fallback);
/* A float32 above 0 at key of object, the config or the one within; fallback where there is none;
 * 0: there must be one. null is refused. */
double perta_config_number(struct perta_config_reader *r, const json_t *object, const char *key,
                           double fallback);
/* true or false; false where there is none, or null. */
bool perta_config_bool(struct perta_config_reader *r, const char *key);

/* Rotary positions, from whichever keys transformers takes them. max_positions: where
 * max_position_embeddings is missing. config_rope.c */
void perta_config_rope(struct perta_config_reader *r, uint32_t max_positions,
                       struct perta_rope *to);
/* The object that says how positions are scaled: "rope_scaling" unless it is empty, else
 * "rope_parameters"; NULL: there is neither. *key is which. Borrowed. */
const json_t *perta_config_rope_object(const json_t *config, const char **key);

/* Keys that change some model's forward pass and that nothing here computes with. config_keys.c */
void perta_config_refuse_keys(struct perta_config_reader *r);

#endif
