/* text.h - text that comes from files (names that become paths, names that are shown), and JSON
 * that loses nothing when memory runs out. */
#ifndef PERTA_IO_TEXT_H
#define PERTA_IO_TEXT_H

#include <jansson.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "io/err.h"

/* File names are at most 255 bytes long, and a shard's patch file adds ".perta". */
#define PERTA_NAME_MAX_BYTES 249u

/* Is it UTF-8 without control characters? Such text has no line breaks and cannot command a
 * terminal. */
bool perta_text_is_plain(const char *text);
/* Replace every other byte with '?'. */
void perta_text_make_plain(char *text);
/* Format, and make the result plain, but keep the line breaks of fmt itself: a line break in a name
 * cannot forge a line. The caller frees it. NULL only when out of memory. */
char *perta_text_lines(const char *fmt, va_list ap) __attribute__((format(printf, 1, 0)));

/* What print(to, ctx) prints, with a NUL at the end; the caller frees it. It must print something.
 * NULL when out of memory, or if print returns false. (glibc's open_memstream will not do: it drops
 * what it has no memory for, and ferror does not tell.) */
char *perta_text_print(bool (*print)(FILE *to, void *ctx), void *ctx, size_t *len);

/* Does text end in suffix? */
bool perta_text_ends_in(const char *text, const char *suffix);

/* May a name found in a file be used as the name of a file in a folder? It must be plain, not
 * empty, at most PERTA_NAME_MAX_BYTES long, without a slash, and must not begin with a dot. */
bool perta_name_is_plain(const char *name);

/* A JSON string, formatted and made plain, so that bad UTF-8 is no error. NULL only when out of
 * memory. */
json_t *perta_text_json(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* A JSON number; null for NaN and infinities, which JSON does not have. NULL only when out of
 * memory. */
json_t *perta_real_json(double value);

/* Add value (stolen), or the contents of from (borrowed), to *json, which the caller owns. If
 * memory runs out, or value, from or *json is NULL, *json becomes NULL, and so does whatever is
 * packed from it later: no JSON lacks a part. */
void perta_json_append(json_t **array, json_t *value);
void perta_json_set(json_t **object, const char *key, json_t *value);
void perta_json_extend(json_t **array, const json_t *from);
void perta_json_update(json_t **object, const json_t *from);

/* As json_dumps, which silently leaves out keys when out of memory (jansson 2.14). The caller frees
 * it. NULL only when out of memory. */
char *perta_json_text(const json_t *json, size_t flags);

/* Append a note for people, made plain, to notes, an array of nothing else. If a note is lost
 * because memory runs out, perta_notes_whole() at the end releases notes and returns NULL; else it
 * returns notes. */
void perta_note(json_t *notes, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
json_t *perta_notes_whole(json_t *notes);

/* Parse the one JSON value in the file open as fd, in which no key may occur twice. *out is the
 * caller's. PERTA_EINPUT, with the byte, if it is not valid; PERTA_ESYS if it cannot be read. path
 * is for messages. (json_loadfd reads byte by byte: millions of calls for the index of many
 * tensors.) */
int perta_json_load(int fd, const char *path, json_t **out, struct perta_err *err);

#endif
