/* compose.h - patches made one after another, as one. Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_PATCH_COMPOSE_H
#define PERTA_STREAM_PATCH_COMPOSE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_compose {
    const char *const *patches; /* (n_patches), each made from what the one before leads to */
    uint32_t n_patches;         /* two at least */
    const char *model;          /* what the first was made from; NULL: not at hand */
    const char *patch;          /* folder to write */
    bool force;
};

/* Write the patch that leads from the model before the first patch to the one after the
 * last; its .perta files are those that perta_diff makes of these two models.
 *
 * Chunks that at most one patch changes keep their frame. Where several do, the model is
 * needed for dtypes whose elements are grouped by exponent (see perta_codec_groups), for
 * what a frame holds in which order follows from the model; without it that is
 * PERTA_EUSAGE. Where it is given, all chunks that several patches change are read from it
 * and checked after each of them.
 *
 * A patch that does not go out from where the one before it ends, or a model that is not
 * the first one's, is PERTA_ECHECK. *summary is the caller's. */
PERTA_API int perta_compose(const struct perta_compose *compose, const struct perta_run *run,
                            json_t **summary, struct perta_err *err);

#endif
