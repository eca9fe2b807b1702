/* apply.h - a patch and a model: apply it, revert it, or check from digests which of its two
 * sides a model is. Spec: docs/patch-format.md */
#ifndef PERTA_STREAM_APPLY_H
#define PERTA_STREAM_APPLY_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

enum perta_apply_mode {
    PERTA_APPLY,          /* before -> after */
    PERTA_REVERT,         /* after -> before */
    PERTA_CHECK_ORIGINAL, /* is the model what the patch was made from? */
    PERTA_CHECK_APPLIED,  /* is it what the patch leads to? */
};

struct perta_apply {
    const char *model, *patch;
    const char *out; /* folder to write; NULL when checking */
    enum perta_apply_mode mode;
    bool force;
};

/* Every chunk is checked against the patch's digests before and after. A patch for another
 * model is PERTA_ECHECK at its first chunk, with both digests. A check reads digests alone and
 * goes on to the end: *summary (the caller's, also with PERTA_ECHECK from a check, else NULL on
 * error) lists every chunk that differs under "damaged". */
PERTA_API int perta_apply(const struct perta_apply *apply, const struct perta_run *run,
                          json_t **summary, struct perta_err *err);

#endif
