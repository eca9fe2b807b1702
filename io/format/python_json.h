/* python_json.h - JSON as Python's json module reads and writes it, which is how config.json is
 * made. */
#ifndef PERTA_IO_FORMAT_PYTHON_JSON_H
#define PERTA_IO_FORMAT_PYTHON_JSON_H

#include <jansson.h>

#include "io/err.h"

/* Parse the one value in text (len_bytes). *out is the caller's. Accepts what Python accepts beyond
 * JSON: NaN, Infinity and -Infinity become the object {"__float__": "NaN"} that transformers writes
 * instead; of a key that occurs twice, the last counts; integers of any length, which become reals
 * if 64 bits do not hold them. A byte order mark is skipped. PERTA_EINPUT, with path and byte, for
 * anything else; PERTA_ESYS when out of memory. */
int perta_python_json_parse(const char *text, size_t len_bytes, const char *path, json_t **out,
                            struct perta_err *err);
/* The same for the file open as fd, of at most 16 MiB. */
int perta_python_json_load(int fd, const char *path, json_t **out, struct perta_err *err);

#endif
