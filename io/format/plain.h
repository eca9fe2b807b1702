/* plain.h - a parser for the simple JSON that writers of checkpoints produce: strings of printable
 * ASCII without escapes, short whole numbers. It needs no tree, which matters for headers and
 * indexes of 100,000 tensors. When a function returns false, the caller parses the whole text with
 * jansson instead, and errors come from there. */
#ifndef PERTA_IO_FORMAT_PLAIN_H
#define PERTA_IO_FORMAT_PLAIN_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct perta_plain {
    const char *at, *end;
};

/* Skip white space, then take one of these. False if something else follows. */
bool perta_plain_word(struct perta_plain *plain, const char *word); /* "": end of text? */
bool perta_plain_string(struct perta_plain *plain, const char **text, size_t *len);
bool perta_plain_uint(struct perta_plain *plain, uint64_t *n); /* below 10^18 */
/* Take any value as a tree, which the caller owns. Also false when out of memory. */
bool perta_plain_value(struct perta_plain *plain, json_t **value);

/* perta_plain_pass skips any value; only its quotes and brackets must be right (Infinity is
 * accepted), and nothing is allocated. perta_plain_raw takes a string of any bytes as it is, with
 * its escapes. */
bool perta_plain_pass(struct perta_plain *plain);
bool perta_plain_raw(struct perta_plain *plain, const char **text, size_t *len);

/* Is text (len bytes) equal to string? */
bool perta_plain_is(const char *text, size_t len, const char *string);

#endif
