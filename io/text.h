/* text.h - text that comes from files: names that become paths, and what is shown of it. */
#ifndef PERTA_IO_TEXT_H
#define PERTA_IO_TEXT_H

#include <jansson.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "io/err.h"

/* File names are at most 255 bytes long, and a shard's patch adds ".perta" to its name. */
#define PERTA_NAME_MAX_BYTES 249u

/* UTF-8 without control characters: no line break, no command to a terminal. */
bool perta_text_is_plain(const char *text);
/* Put ? for what is not. */
void perta_text_make_plain(char *text);
/* The same of fmt and its arguments, but the line breaks of fmt itself stay: a name that holds one
 * forges no line. The caller's (free); NULL without memory. */
char *perta_text_lines(const char *fmt, va_list ap) __attribute__((format(printf, 1, 0)));

/* What print(to, ctx) prints, and a NUL after it; the caller's (free). NULL without memory, or if
 * print returns false. It must print something. open_memstream will not do: glibc's drops what it
 * has no memory for, and no ferror tells. */
char *perta_text_print(bool (*print)(FILE *to, void *ctx), void *ctx, size_t *len);

/* Is suffix the end of text, or all of it? */
bool perta_text_ends_in(const char *text, const char *suffix);

/* May name come from a file and become that of a file in a folder? Plain text, not empty, at most
 * PERTA_NAME_MAX_BYTES long, without a slash, not beginning with a dot. */
bool perta_name_is_plain(const char *name);

/* A string for people, made plain, so that it is never NULL but without memory. */
json_t *perta_text_json(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* A number; null for NaN and infinities, which JSON has none of. NULL only without memory. */
json_t *perta_real_json(double value);

/* Add value, stolen, or what is in from, borrowed, to what *json owns. Without memory (value, from
 * or *json is NULL, too) *json becomes NULL, and so does what is packed of it in the end: no record
 * lacks a part. */
void perta_json_append(json_t **array, json_t *value);
void perta_json_set(json_t **object, const char *key, json_t *value);
void perta_json_extend(json_t **array, const json_t *from);
void perta_json_update(json_t **object, const json_t *from);

/* As json_dumps, which leaves out keys that it has no memory for (jansson 2.14). The caller's (free);
 * NULL without memory. */
char *perta_json_text(const json_t *json, size_t flags);

/* Append a note for people, made plain, to notes, an array that holds nothing else. That one was
 * lost without memory shows at the end: perta_notes_whole() returns notes, or releases them and
 * returns NULL. */
void perta_note(json_t *notes, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
json_t *perta_notes_whole(json_t *notes);

/* The one value that the file open as fd holds, no key twice; *out is the caller's. PERTA_EINPUT,
 * naming the byte, if it holds none; PERTA_ESYS if it cannot be read. path for messages.
 * json_loadfd reads byte by byte, which an index of many tensors makes millions of calls. */
int perta_json_load(int fd, const char *path, json_t **out, struct perta_err *err);

#endif
