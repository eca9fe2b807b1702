/* arguments.h - what a verb of the library is asked: checked before anything else, in the library and
 * so for the command too. Messages name a field as the command spells it: --data-forget is data_forget.
 * All are PERTA_EUSAGE. */
#ifndef PERTA_STREAM_ARGUMENTS_H
#define PERTA_STREAM_ARGUMENTS_H

#include <jansson.h>
#include <stddef.h>

#include "stream/stream.h"

/* The first thing that every public verb does: *err and *summary are empty from here on, whatever they
 * held. job is the verb's struct; of verbs that take paths alone, run. What run holds makes sense; with
 * err NULL there is only the code. */
int perta_arguments_begin(const void *job, const struct perta_run *run, json_t **summary,
                          struct perta_err *err);

/* A path that must be there, neither NULL nor empty; name is what the command calls it. */
struct perta_argument {
    const char *name, *path;
};
/* Are all (n, at most 8) there? Else all are named that are not. */
int perta_arguments_needed(const struct perta_argument *needed, size_t n, struct perta_err *err);
/* These may be NULL; none is empty. */
int perta_arguments_optional(const struct perta_argument *given, size_t n, struct perta_err *err);

/* An enum's value, of 0 to n - 1. */
int perta_arguments_choice(const char *name, int value, int n, struct perta_err *err);
/* A list (n) of texts: none is NULL. */
int perta_arguments_list(const char *name, const char *const *list, size_t n,
                         struct perta_err *err);

#endif
