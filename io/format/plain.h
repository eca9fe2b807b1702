/* plain.h - JSON in the words that writers of checkpoints use: printable ASCII without escapes in
 * strings, short whole numbers. That much is read here, without a tree, for headers and indexes of
 * 100,000 tensors; whatever else a text holds is jansson's: where a function says false, the
 * caller reads the whole text with it, and errors come from there. */
#ifndef PERTA_IO_FORMAT_PLAIN_H
#define PERTA_IO_FORMAT_PLAIN_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct perta_plain {
    const char *at, *end;
};

/* Pass over white space, then take one of these; false where something else stands. */
bool perta_plain_word(struct perta_plain *plain, const char *word); /* "" at the text's end */
bool perta_plain_string(struct perta_plain *plain, const char **text, size_t *len);
bool perta_plain_uint(struct perta_plain *plain, uint64_t *n); /* below 10^18 */
/* Any value, as a tree, the caller's. False too without memory. */
bool perta_plain_value(struct perta_plain *plain, json_t **value);

/* Pass over any value, of which only quotes and brackets must be right: Infinity is fine. Nothing is
 * allocated. And over a string of any bytes, which is as it stands, escapes and all. */
bool perta_plain_pass(struct perta_plain *plain);
bool perta_plain_raw(struct perta_plain *plain, const char **text, size_t *len);

/* Is it that string? */
bool perta_plain_is(const char *text, size_t len, const char *string);

#endif
