/* Memory: allocations of the command, the library and jansson. A call of jansson's parser counts as
 * one allocation, because parts of it crash when out of memory (2.14). */
#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/faults/faults.h"

static _Thread_local bool in_parser;

static bool strikes(void)
{
    int failed = in_parser ? 0 : fault_strikes("memory");
    if (failed)
        errno = failed;
    return failed;
}

#define WRAP(type, name, parameters, arguments, failure)      \
    type __real_##name parameters;                            \
    type __wrap_##name parameters;                            \
    type __wrap_##name parameters                             \
    {                                                         \
        return strikes() ? failure : __real_##name arguments; \
    }

WRAP(void *, malloc, (size_t n), (n), NULL)
WRAP(void *, calloc, (size_t n, size_t each), (n, each), NULL)
WRAP(void *, realloc, (void *p, size_t n), (p, n), NULL)
WRAP(char *, strdup, (const char *text), (text), NULL)
WRAP(char *, strndup, (const char *text, size_t n), (text, n), NULL)
WRAP(int, vasprintf, (char **p, const char *fmt, va_list ap), (p, fmt, ap), -1)

int __wrap_asprintf(char **p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int __wrap_asprintf(char **p, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = __wrap_vasprintf(p, fmt, ap);
    va_end(ap);
    return n;
}

static json_t *out_of_memory(json_error_t *error)
{
    *error = (json_error_t){.line = -1};
    error->text[JSON_ERROR_TEXT_LENGTH - 1] = json_error_out_of_memory;
    return NULL;
}

#define WRAP_PARSER(name, parameters, arguments) \
    json_t *__real_##name parameters;            \
    json_t *__wrap_##name parameters;            \
    json_t *__wrap_##name parameters             \
    {                                            \
        if (strikes())                           \
            return out_of_memory(error);         \
        in_parser = true;                        \
        json_t *json = __real_##name arguments;  \
        in_parser = false;                       \
        return json;                             \
    }

WRAP_PARSER(json_loadb, (const char *text, size_t n, size_t flags, json_error_t *error),
            (text, n, flags, error))
WRAP_PARSER(json_load_callback,
            (json_load_callback_t more, void *ctx, size_t flags, json_error_t *error),
            (more, ctx, flags, error))

static void *take(size_t n)
{
    return __wrap_malloc(n);
}

__attribute__((constructor)) static void begin(void)
{
    json_set_alloc_funcs(take, free);
}
