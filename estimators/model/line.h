/* line.h - a line of data taken apart. What is known of a key (sample_keys.h) says what becomes of
 * its value: it is parsed, or only passed by, so that what other programs write into keys that are
 * not perta's (numbers beyond 64 bits, NaN, half of a surrogate pair) does not matter. */
#ifndef PERTA_ESTIMATORS_MODEL_LINE_H
#define PERTA_ESTIMATORS_MODEL_LINE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"

/* Where it is, for messages. */
struct perta_line {
    const char *path;
    uint64_t number; /* from 1 */
    const char *of;  /* "\"perturbed\": " before what is wrong there; else "" */
};

/* PERTA_EINPUT: path, line, of, and then what fmt says. */
int perta_line_fail(const struct perta_line *line, struct perta_err *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Parse text, one JSON object. *out, the caller's, has all its keys; the value of one whose value
 * is passed by is true. With answers, other answers (sample_keys.h) are objects of the same kind.
 * No key of an object that is kept stands twice. */
int perta_line_parse(const struct perta_line *line, const char *text, size_t len, bool answers,
                     json_t **out, struct perta_err *err);

#endif
