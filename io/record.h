/* record.h - manifest.json of a patch folder. Spec: docs/patch-format.md */
#ifndef PERTA_IO_RECORD_H
#define PERTA_IO_RECORD_H

#include <jansson.h>
#include <stdbool.h>

#include "io/err.h"
#include "io/hash.h"

#define PERTA_RECORD_NAME "manifest.json"

/* Read the manifest.json of the folder dir, and digest it. whole: with what it says of the tensors,
 * which of 100,000 of them takes 100 MB; else without, unless it is written oddly. *manifest is the
 * caller's. PERTA_EINPUT for what is not JSON. */
int perta_record_load(const char *dir, bool whole, json_t **manifest, struct perta_digest_hex *hex,
                      struct perta_err *err);
/* Does it say that it is a patch's? NULL is none. */
bool perta_record_is_patch(const json_t *manifest);

#endif
