/* in_place.h - apply a patch to the model's own files. Spec: docs/resume.md, In place */
#ifndef PERTA_STREAM_PATCH_IN_PLACE_H
#define PERTA_STREAM_PATCH_IN_PLACE_H

#include "stream/patch/apply.h"

/* perta_apply with apply->out NULL. */
int perta_in_place(const struct perta_apply *apply, const struct perta_run *run, json_t **summary,
                   struct perta_err *err);

#endif
