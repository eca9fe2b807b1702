/* apply.h - a patch and a model: apply it, or revert it. Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_APPLY_H
#define PERTA_STREAM_APPLY_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

enum perta_apply_mode {
    PERTA_APPLY,  /* before -> after */
    PERTA_REVERT, /* after -> before */
};

struct perta_apply {
    const char *model, *patch;
    const char *out; /* folder to write */
    enum perta_apply_mode mode;
    bool force;
};

/* Every chunk is checked against the patch's digests before and after. A patch for another
 * model is PERTA_ECHECK at its first chunk, with both digests. *summary is the caller's, NULL on
 * error. */
PERTA_API int perta_apply(const struct perta_apply *apply, const struct perta_run *run,
                          json_t **summary, struct perta_err *err);

#endif
