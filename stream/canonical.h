/* canonical.h - JSON with one spelling for each value, so that equal records are equal bytes
 * and can be signed. Spec: docs/manifest.md */
#ifndef PERTA_STREAM_CANONICAL_H
#define PERTA_STREAM_CANONICAL_H

#include <jansson.h>

#include "io/err.h"

/* The text; the caller's (free). No line break at its end. NULL without memory. jansson's own
 * output will not do: how it spells reals depends on its version. */
PERTA_API char *perta_canonical_json(const json_t *value);

#endif
