/* adapted.h - a PEFT LoRA adapter in effect beside a model that is being read: y = x W^T + scaling *
 * (x A^T) B^T. It is not merged: bfloat16 would round small changes away.
 *
 * What adapter.h accepts is accepted, as far as it is a LoRA of a layer's weights; other tensors
 * are refused by name. */
#ifndef PERTA_ESTIMATORS_PASSES_ADAPTED_H
#define PERTA_ESTIMATORS_PASSES_ADAPTED_H

#include "estimators/edit/adapter.h"
#include "estimators/model/factors.h"
#include "estimators/model/weights.h"

struct perta_adapted {
    struct perta_checkpoint *ck;
    struct perta_adapter *adapter;
};

/* Open the adapter for this model, and set factors (a zeroed struct) from its shapes. Warnings are
 * appended to notes. PERTA_EINPUT, naming the key or tensor, for what is not supported. The caller
 * calls perta_adapted_close and perta_factors_release, also on error. */
int perta_adapted_open(struct perta_adapted *adapted, const char *path,
                       const struct perta_weights *weights, struct perta_factors *factors,
                       json_t *notes, struct perta_err *err);
/* Append a note if tune trained the adapter on the model that a patch leads to, and that patch is not
 * applied: patch is the SHA-256 of the manifest of the one that is; NULL: none. Without an adapter,
 * nothing happens. */
void perta_adapted_note_patch(const struct perta_adapted *adapted, const char *patch,
                              json_t **notes);
/* Read A and B of all factors into factors->values. PERTA_EINPUT if a number is not finite. */
int perta_adapted_load(const struct perta_adapted *adapted, const struct perta_factors *factors,
                       struct perta_backend *be, struct perta_err *err);
/* For a journal's identity: files and config. The caller's; NULL only when out of memory. */
json_t *perta_adapted_json(const struct perta_adapted *adapted);
/* A zeroed struct is allowed. */
void perta_adapted_close(struct perta_adapted *adapted);

#endif
