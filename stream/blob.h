/* blob.h - bytes in a record of a journal, and the states of digests. */
#ifndef PERTA_STREAM_BLOB_H
#define PERTA_STREAM_BLOB_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "io/hash.h"

/* Bytes in a record are written in hexadecimal. perta_blob_json: the caller's; NULL only when out
 * of memory. perta_blob_get: false if there are not exactly n bytes. */
json_t *perta_blob_json(const void *data, size_t n);
bool perta_blob_get(const json_t *blob, void *data, size_t n);
/* The number of bytes. */
size_t perta_blob_bytes(const json_t *blob);
/* The state of a digest. perta_blob_get_digest restores it into a new digest of the same kind. */
json_t *perta_blob_of_digest(const struct perta_digest *digest);
bool perta_blob_get_digest(const json_t *blob, struct perta_digest *digest);

#endif
