/* compose.h - combine a chain of patches into one. Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_PATCH_COMPOSE_H
#define PERTA_STREAM_PATCH_COMPOSE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_compose {
    const char *const *patches; /* (n_patches), each made from what the one before leads to */
    uint32_t n_patches;         /* at least two */
    const char *model;          /* what the first was made from; NULL: not available */
    const char *patch;          /* folder to write */
    bool force;
};

/* Write the patch from the model before the first patch to the one after the last. Its .perta files
 * are byte-identical to those that perta_diff makes of these two models.
 *
 * A chunk that only one patch changes keeps its frame. For a chunk that several change, the model
 * is needed if units of its dtype are grouped by exponent (perta_codec_groups), because the order
 * of the frame's content follows from the model; without a model that is PERTA_EUSAGE. If a model
 * is given, all chunks that several patches change are read from it, and checked after each patch.
 *
 * PERTA_ECHECK if a patch does not start from where the one before it ends, or the model is not
 * what the first was made from. *summary is the caller's. */
PERTA_API int perta_compose(const struct perta_compose *compose, const struct perta_run *run,
                            json_t **summary, struct perta_err *err);

#endif
