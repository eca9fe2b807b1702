/* adapter_config.h - the keys of PEFT's adapter_config.json that decide the numbers of a LoRA.
 * Spec: docs/method.md, "LoRA adapters". Internal to estimators/. */
#ifndef PERTA_ESTIMATORS_EDIT_ADAPTER_CONFIG_H
#define PERTA_ESTIMATORS_EDIT_ADAPTER_CONFIG_H

#include <jansson.h>
#include <stdbool.h>

#include "io/format/checkpoint.h"

struct perta_adapter_config {
    const char *path; /* of the folder, for messages; all pointers here
                                                 * are borrowed */
    const json_t *json;
    const json_t *rank_pattern, *alpha_pattern; /* objects, or NULL */
    uint64_t r;
    double alpha;
    bool use_rslora;
};

/* Read the config of an adapter (borrowed). Returns PERTA_EINPUT, naming the key, for settings that
 * A, B and scaling do not describe. */
int perta_adapter_config_read(struct perta_adapter_config *config,
                              const struct perta_checkpoint *ck, struct perta_err *err);
/* Refuse "fan_in_fan_out", for a module whose weight is not stored transposed. */
int perta_adapter_config_plain(const struct perta_adapter_config *config, struct perta_err *err);
/* Rank and scaling of a module, whose name has len characters. */
int perta_adapter_config_scale(const struct perta_adapter_config *config, const char *module,
                               size_t len, uint64_t *rank, float *scaling, struct perta_err *err);
/* Would PEFT put a LoRA on that module (a name of len characters)? Returns PERTA_EINPUT, naming the
 * key, if exclude_modules, layers_to_transform or modules_to_save forbid it: the LoRA in the file
 * would then have no effect in PEFT. */
int perta_adapter_config_allows(const struct perta_adapter_config *config, const char *module,
                                size_t len, struct perta_err *err);
/* True if the module is among target_modules, or if target_modules is not a list of names. */
bool perta_adapter_config_targets(const struct perta_adapter_config *config, const char *module,
                                  size_t len);
/* True if the tensor is among target_parameters; any tensor of experts or of a router is, if there are
 * any: those are names of parameters in memory (adapter_experts.c). */
bool perta_adapter_config_targets_parameter(const struct perta_adapter_config *config,
                                            const char *tensor);
/* Is the tensor in a module of that name, or in one whose name ends in it after a dot? */
bool perta_adapter_is_within(const char *tensor, const char *module);
/* Append a note for each key that perta does not know: newer versions of PEFT may define keys that
 * change the result. */
void perta_adapter_config_note(const struct perta_adapter_config *config, json_t *notes);

#endif
