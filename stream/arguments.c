#include "stream/arguments.h"

#include <stdio.h>
#include <string.h>

static int check_run(const struct perta_run *run, struct perta_err *err)
{
    int rc = perta_arguments_choice("--io", (int)run->io, PERTA_IO_PREAD + 1, err);
    if (!rc && run->n_threads > PERTA_THREADS_MAX)
        rc = perta_fail(err, PERTA_EUSAGE, "--threads: 1 to %d", PERTA_THREADS_MAX);
    if (!rc && !run->memory_bytes)
        rc = perta_fail(err, PERTA_EUSAGE, "--memory: 0 (memory_bytes) is too small for any job");
    return rc;
}

int perta_arguments_begin(const void *job, const struct perta_run *run, json_t **summary,
                          struct perta_err *err)
{
    if (summary)
        *summary = NULL;
    if (!err)
        return PERTA_EUSAGE;
    *err = (struct perta_err){0};
    return !run       ? perta_fail(err, PERTA_EUSAGE, "run is NULL: it says how to run")
           : !job     ? perta_fail(err, PERTA_EUSAGE, "the job is NULL: it says what to do")
           : !summary ? perta_fail(err, PERTA_EUSAGE, "summary is NULL: the result goes there")
                      : check_run(run, err);
}

int perta_arguments_needed(const struct perta_argument *needed, size_t n, struct perta_err *err)
{
    const char *missing[8];
    size_t n_missing = 0;
    char all[512] = "";
    for (size_t i = 0; i < n; i++)
        if (!needed[i].path || !*needed[i].path)
            missing[n_missing++] = needed[i].name;
    for (size_t i = 0, at = 0; i < n_missing; i++, at = strlen(all))
        snprintf(all + at, sizeof all - at, "%s%s",
                 !i                  ? ""
                 : i + 1 < n_missing ? ", "
                                     : " and ",
                 missing[i]);
    return n_missing
               ? perta_fail(err, PERTA_EUSAGE, "%s %s needed", all, n_missing > 1 ? "are" : "is")
               : 0;
}

int perta_arguments_optional(const struct perta_argument *given, size_t n, struct perta_err *err)
{
    for (size_t i = 0; i < n; i++)
        if (given[i].path && !*given[i].path)
            return perta_fail(err, PERTA_EUSAGE,
                              "%s: a name is needed, but it is \"\" (NULL leaves it out)",
                              given[i].name);
    return 0;
}

int perta_arguments_choice(const char *name, int value, int n, struct perta_err *err)
{
    return value >= 0 && value < n
               ? 0
               : perta_fail(err, PERTA_EUSAGE, "%s: %d is not one of its values", name, value);
}

int perta_arguments_list(const char *name, const char *const *list, size_t n, struct perta_err *err)
{
    if (n && !list)
        return perta_fail(err, PERTA_EUSAGE, "%s: the list of %zu is NULL", name, n);
    for (size_t i = 0; i < n; i++)
        if (!list[i] || !*list[i])
            return perta_fail(err, PERTA_EUSAGE, "%s: number %zu of %zu is empty", name, i + 1, n);
    return 0;
}
