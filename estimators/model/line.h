/* line.h - parses a line of data. The kind of each key (sample_keys.h) decides whether its value is
 * parsed or only skipped, so that what other programs write under keys that are not perta's
 * (numbers beyond 64 bits, NaN, half of a surrogate pair) does no harm. */
#ifndef PERTA_ESTIMATORS_MODEL_LINE_H
#define PERTA_ESTIMATORS_MODEL_LINE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

/* The place of a line, for messages. */
struct perta_line {
    const char *path;
    uint64_t number; /* from 1 */
    const char *of;  /* prefix of messages: "\"perturbed\": " within that key, otherwise "" */
};

/* PERTA_EINPUT: path, line, of, and then what fmt says. */
int perta_line_fail(const struct perta_line *line, struct perta_err *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Parse text, which must be one JSON object. *out, which the caller owns, has all its keys; the
 * value of a key that is skipped is true. With answers, other answers (sample_keys.h) are objects
 * of the same form. No key may be twice in an object that is kept. */
int perta_line_parse(const struct perta_line *line, const char *text, size_t len, bool answers,
                     json_t **out, struct perta_err *err);

#endif
