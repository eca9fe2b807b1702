/* python_json.h - JSON as Python's json module reads and writes it, which makes config.json. */
#ifndef PERTA_IO_FORMAT_PYTHON_JSON_H
#define PERTA_IO_FORMAT_PYTHON_JSON_H

#include <jansson.h>

#include "io/err.h"

/* The one value that text (len_bytes) holds; *out is the caller's. What Python takes beyond JSON:
 * NaN, Infinity and -Infinity, here the object {"__float__": "NaN"} that transformers writes
 * instead; a key twice, of which the last counts; integers of any length, here reals where 64 bits
 * do not hold them. A byte order mark in front is passed over.
 * PERTA_EINPUT, with path and byte, where it is not that; PERTA_ESYS without memory. */
int perta_python_json_parse(const char *text, size_t len_bytes, const char *path, json_t **out,
                            struct perta_err *err);
/* The same of the file open as fd, which may be 16 MiB long. */
int perta_python_json_load(int fd, const char *path, json_t **out, struct perta_err *err);

#endif
