/* adapter.h - a PEFT LoRA adapter in place of a tuned checkpoint: which tensors of the model it
 * changes, and by how much. Spec: docs/method.md, "LoRA adapters".
 *
 *   tau = scaling * (B A), scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
 *
 * Tensors that an adapter stores whole (modules_to_save, biases) are treated as tuned tensors. */
#ifndef PERTA_ESTIMATORS_EDIT_ADAPTER_H
#define PERTA_ESTIMATORS_EDIT_ADAPTER_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/edit/edit.h"
#include "stream/input.h"

/* What an adapter does to one tensor of the model. */
struct perta_change {
    char *target;                       /* the name of the tensor */
    char *said;                         /* its name in the adapter, if that is another; or NULL */
    const struct perta_ref *a, *b;      /* lora_A and lora_B; NULL if whole is set */
    const struct perta_ref *whole;      /* the tuned tensor itself; NULL if a and b are set */
    const struct perta_ref *base_layer; /* PEFT's copy of the tensor that A and B are added to, or
                                         * NULL */
    bool is_swapped;      /* then A is (r, rows) and B (width, r), instead of A (r, width) and B
                           * (rows, r): of an embedding, or of a weight stored as (in, out) */
    uint64_t rows, width; /* shape of the model's tensor, or of a matrix of it */
    uint64_t r;
    float scaling;
    /* Of a LoRA of experts (adapter_experts.c), where A and B hold those of all experts of a layer:
     * rows e r to (e + 1) r of A are those of expert e, and columns e, n_experts + e, ... of B. */
    uint64_t n_experts;  /* otherwise 1 */
    uint64_t expert;     /* that of the tensor's first matrix */
    uint64_t n_matrices; /* in the tensor: 1, or n_experts */
    uint64_t b_first;    /* the row of B that is the matrix's first */
};

struct perta_adapter {
    const struct perta_checkpoint *ck; /* borrowed; one shard; its config is adapter_config.json */
    struct perta_change *changes;      /* (n_changes), sorted by target */
    uint64_t n_changes;
    struct perta_adapter_worker *workers; /* (n_workers) */
    unsigned n_workers;
};

/* Read the config and the names of an adapter that perta_checkpoint_open_adapter opened, and match
 * every tensor of it with the tensor of model that it changes. Both checkpoints are borrowed.
 * Shapes and ranks are checked. Warnings for the user are appended to notes (an array; NULL: they
 * are not wanted). Errors: PERTA_EINPUT, naming file, key or tensor. */
int perta_adapter_open(const struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                       struct perta_adapter **out, json_t *notes, struct perta_err *err);
/* Between adapter.c and adapter_experts.c: replace the changes that PEFT's target_parameters made of
 * the experts of a layer, whatever their tensors are in model, by one for each of these tensors.
 * Changes are not sorted afterwards. */
struct perta_adapter_config;
int perta_adapter_expand(struct perta_adapter *adapter, const struct perta_adapter_config *config,
                         const struct perta_checkpoint *model, struct perta_err *err);
/* Accepts NULL. */
void perta_adapter_close(struct perta_adapter *adapter);

/* The change to the tensor of that name, or NULL. */
const struct perta_change *perta_adapter_find(const struct perta_adapter *adapter,
                                              const char *name);

/* For the manifest: the keys of the config that decide the result. The caller owns the
 * reference. */
json_t *perta_adapter_recipe(const struct perta_checkpoint *ck);

/* ---- as an input (adapter_input.c) ---- */

/* As perta_adapter_open, from the folder at path, which becomes the input of that role (borrowed).
 * The caller calls perta_adapter_close, then perta_input_close, also on error. */
int perta_adapter_open_input(struct perta_input *in, const char *role, const char *path,
                             const struct perta_checkpoint *model, struct perta_adapter **out,
                             json_t *notes, struct perta_err *err);
/* The change to the tensor of that name, if it is a LoRA; or NULL. adapter may be NULL: there is
 * none. */
const struct perta_change *perta_adapter_lora(const struct perta_adapter *adapter,
                                              const char *name);
/* The tensor to read from ck, which is adapter->ck or --base, for the task vector of the model's
 * tensor of that name; NULL if there is none, as for a LoRA. adapter is NULL if ck is --tuned or
 * --base, and --tuned is a checkpoint. tied: perta_tied_find. */
const struct perta_ref *perta_adapter_operand(const struct perta_adapter *adapter,
                                              const struct perta_checkpoint *ck, const char *name,
                                              bool tied);

/* ---- the task vector (adapter_tau.c) ---- */

/* Bytes that perta_adapter_begin allocates for each worker; UINT64_MAX if the size overflows. */
uint64_t perta_adapter_memory(const struct perta_adapter *adapter);
int perta_adapter_begin(struct perta_adapter *adapter, unsigned n_workers, struct perta_err *err);
void perta_adapter_end(struct perta_adapter *adapter);

/* Compute n elements, from first_elem on and at most a chunk, of the task vector of change. A and B
 * are read from file, the adapter's shard, through the page cache. *tau (n) is borrowed from the
 * worker until its next call. */
int perta_adapter_tau(const struct perta_adapter *adapter, const struct perta_file *file,
                      unsigned worker, const struct perta_change *change, uint64_t first_elem,
                      uint64_t n, const float **tau, struct perta_err *err);
/* Call directly after perta_adapter_tau() if element elem of the tensor is not finite. Returns
 * PERTA_EINPUT, naming the element of A or B that causes it; with may_keep the message recommends
 * --nonfinite keep. */
int perta_adapter_bad_number(const struct perta_adapter *adapter, unsigned worker,
                             const struct perta_change *change, uint64_t elem, bool may_keep,
                             struct perta_err *err);

#endif
