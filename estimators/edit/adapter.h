/* adapter.h - a PEFT LoRA adapter in place of a tuned checkpoint: which tensors of the model it
 * changes, and by what. Spec: docs/method.md, "LoRA adapters".
 *
 *   tau = scaling * (B A), scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
 *
 * Tensors that an adapter holds whole (modules_to_save, biases) are tuned ones as any other. */
#ifndef PERTA_ESTIMATORS_EDIT_ADAPTER_H
#define PERTA_ESTIMATORS_EDIT_ADAPTER_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/edit/edit.h"
#include "stream/input.h"

/* What becomes of one tensor of the model. */
struct perta_change {
    char *target;                       /* its name */
    const struct perta_ref *a, *b;      /* lora_A and lora_B; or NULL, and whole is set */
    const struct perta_ref *whole;      /* holds the tuned tensor itself */
    const struct perta_ref *base_layer; /* PEFT's copy of what A and B are added to, or NULL */
    bool is_embedding;    /* A is (r, rows) and B (width, r), not A (r, width), B (rows, r) */
    uint64_t rows, width; /* of the model's tensor */
    uint64_t r;
    float scaling;
};

struct perta_adapter {
    const struct perta_checkpoint *ck; /* borrowed: one shard; its config is adapter_config.json */
    struct perta_change *changes;      /* (n_changes), sorted by target */
    uint64_t n_changes;
    struct perta_adapter_worker *workers; /* (n_workers) */
    unsigned n_workers;
};

/* Read config and names of an adapter that perta_checkpoint_open_adapter opened, and find and
 * check what they change in model (both borrowed): every tensor of the adapter has its place, and
 * shapes and ranks agree. What the user ought to know is appended to notes (array). Errors:
 * PERTA_EINPUT, naming file, key or tensor. */
int perta_adapter_open(const struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                       struct perta_adapter **out, json_t *notes, struct perta_err *err);
/* NULL is fine. */
void perta_adapter_close(struct perta_adapter *adapter);

/* The change of that tensor of the model, or NULL. */
const struct perta_change *perta_adapter_find(const struct perta_adapter *adapter,
                                              const char *name);

/* For a manifest: the keys of the config that decide the result. The caller's. */
json_t *perta_adapter_recipe(const struct perta_checkpoint *ck);

/* ---- its task vector, adapter_tau.c ---- */

/* Memory that perta_adapter_begin takes for each worker; UINT64_MAX: no end of it. */
uint64_t perta_adapter_memory(const struct perta_adapter *adapter);
int perta_adapter_begin(struct perta_adapter *adapter, unsigned n_workers, struct perta_err *err);
void perta_adapter_end(struct perta_adapter *adapter);

/* Elements first_elem.. (n, no more than a chunk) of the task vector that A and B of change make,
 * read from file, the adapter's shard, through the page cache. *tau (n) is worker's until its
 * next call. */
int perta_adapter_tau(const struct perta_adapter *adapter, const struct perta_file *file,
                      unsigned worker, const struct perta_change *change, uint64_t first_elem,
                      uint64_t n, const float **tau, struct perta_err *err);
/* Right after that: element elem of the tensor is not finite. PERTA_EINPUT that names the number
 * of A or B it comes from. */
int perta_adapter_bad_number(const struct perta_adapter *adapter, unsigned worker,
                             const struct perta_change *change, uint64_t elem,
                             struct perta_err *err);

#endif
