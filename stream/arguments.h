/* arguments.h - checks of a verb's arguments, made before anything else, in the library and so for
 * the command too. Messages name a field as the command spells it: --data-forget is data_forget.
 * All errors are PERTA_EUSAGE. */
#ifndef PERTA_STREAM_ARGUMENTS_H
#define PERTA_STREAM_ARGUMENTS_H

#include <jansson.h>
#include <stddef.h>

#include "stream/stream.h"

/* Every public verb calls this first: it clears *err and *summary, whatever they held, and checks
 * run. job is the verb's struct; verbs that take only paths pass run. With err NULL, only the code
 * is returned. */
int perta_arguments_begin(const void *job, const struct perta_run *run, json_t **summary,
                          struct perta_err *err);

/* A path argument; name is what the command calls it. */
struct perta_argument {
    const char *name, *path;
};
/* All of these (n, at most 8) must be given, neither NULL nor empty. The error names those that are
 * missing. */
int perta_arguments_needed(const struct perta_argument *needed, size_t n, struct perta_err *err);
/* These may be NULL, but not empty. */
int perta_arguments_optional(const struct perta_argument *given, size_t n, struct perta_err *err);

/* An enum's value must be 0 to n - 1. */
int perta_arguments_choice(const char *name, int value, int n, struct perta_err *err);
/* No text in the list (n) may be NULL or empty. */
int perta_arguments_list(const char *name, const char *const *list, size_t n,
                         struct perta_err *err);

#endif
