/* adapter_config.h - what PEFT's adapter_config.json says of the numbers of a LoRA.
 * Spec: docs/method.md, "LoRA adapters". Internal to estimators/. */
#ifndef PERTA_ESTIMATORS_EDIT_ADAPTER_CONFIG_H
#define PERTA_ESTIMATORS_EDIT_ADAPTER_CONFIG_H

#include <jansson.h>
#include <stdbool.h>

#include "io/format/checkpoint.h"

struct perta_adapter_config {
    const char *path;                           /* of the folder, for messages */
    const json_t *json;                         /* borrowed, as all of it */
    const json_t *rank_pattern, *alpha_pattern; /* objects, or NULL */
    uint64_t r;
    double alpha;
    bool use_rslora;
};

/* Of an adapter (borrowed). What A, B and scaling do not describe is PERTA_EINPUT, with its
 * key. */
int perta_adapter_config_read(struct perta_adapter_config *config,
                              const struct perta_checkpoint *ck, struct perta_err *err);
/* Rank and scaling of a module (len characters). */
int perta_adapter_config_scale(const struct perta_adapter_config *config, const char *module,
                               size_t len, uint64_t *rank, float *scaling, struct perta_err *err);
/* Would PEFT put a LoRA on that module (len characters)? PERTA_EINPUT, with the key, where
 * exclude_modules, layers_to_transform or modules_to_save keep it from one: what the file holds for
 * it is then not what a live adapter does. */
int perta_adapter_config_allows(const struct perta_adapter_config *config, const char *module,
                                size_t len, struct perta_err *err);
/* Is it among target_modules, where these are a list of names? */
bool perta_adapter_config_targets(const struct perta_adapter_config *config, const char *module,
                                  size_t len);
/* Is the tensor in a module of that name, or of one that ends in it after a dot? */
bool perta_adapter_is_within(const char *tensor, const char *module);
/* Keys of newer versions of PEFT may say things that perta ought to know: append them to
 * notes. */
void perta_adapter_config_note(const struct perta_adapter_config *config, json_t *notes);

#endif
