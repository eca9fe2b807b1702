/* diff.h - make a patch between two checkpoints with the same shards, tensors, shapes and
 * dtypes. */
#ifndef PERTA_STREAM_PATCH_DIFF_H
#define PERTA_STREAM_PATCH_DIFF_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

struct perta_diff {
    const char *before, *after; /* checkpoints */
    const char *patch;          /* folder to write */
    bool one_way;               /* store new values only: the patch cannot be reverted */
    bool force;
};

/* Write the patch from before to after. *summary is the caller's. */
PERTA_API int perta_diff(const struct perta_diff *diff, const struct perta_run *run,
                         json_t **summary, struct perta_err *err);

#endif
