/* short_of.h - makes one request to the system fail: the nth allocation, or the nth open of a file.
 * Linked with --wrap for each name (tests/meson.build), so the calls in libperta's own code count,
 * and the allocations of jansson and libcrypto. Allocations inside oneDNN and zstd do not count,
 * but making their objects does. A call of jansson's parser counts as one, because parts of it
 * crash when out of memory (2.14). */
#ifndef PERTA_TESTS_SHORT_OF_H
#define PERTA_TESTS_SHORT_OF_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <jansson.h>
#include <locale.h>
#include <openssl/crypto.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <zstd.h>

enum short_of { MEMORY, FILES, N_SHORT_OF };

static _Atomic uint64_t n_asked[N_SHORT_OF],
    fails_at[N_SHORT_OF]; /* counted from 1; 0: none fails */
static const char *_Atomic failed_call;
static void *_Atomic failed_caller; /* for `addr2line` if a case fails */
static _Thread_local bool in_parser;

static inline void fail_at(enum short_of what, uint64_t n)
{
    n_asked[what] = 0;
    fails_at[what] = n;
    failed_call = "";
}

static inline bool fails(enum short_of what, const char *call, void *caller)
{
    if (in_parser || !fails_at[what] || ++n_asked[what] != fails_at[what])
        return false;
    failed_call = call;
    failed_caller = caller;
    errno = what == MEMORY ? ENOMEM : EMFILE;
    return true;
}

/* WRAP(what, type, name, (parameters), (arguments), result on failure) */
#define WRAP(what, type, name, parameters, arguments, failure) \
    type __real_##name parameters;                             \
    type __wrap_##name parameters;                             \
    type __wrap_##name parameters                              \
    {                                                          \
        if (fails(what, #name, __builtin_return_address(0)))   \
            return failure;                                    \
        return __real_##name arguments;                        \
    }

WRAP(MEMORY, void *, malloc, (size_t n), (n), NULL)
WRAP(MEMORY, void *, calloc, (size_t n, size_t each), (n, each), NULL)
WRAP(MEMORY, void *, realloc, (void *p, size_t n), (p, n), NULL)
WRAP(MEMORY, void *, aligned_alloc, (size_t align, size_t n), (align, n), NULL)
WRAP(MEMORY, int, posix_memalign, (void **p, size_t align, size_t n), (p, align, n), ENOMEM)
WRAP(MEMORY, char *, strdup, (const char *s), (s), NULL)
WRAP(MEMORY, char *, strndup, (const char *s, size_t n), (s, n), NULL)
WRAP(MEMORY, int, vasprintf, (char **p, const char *fmt, va_list ap), (p, fmt, ap), -1)
WRAP(MEMORY, ssize_t, __getdelim, (char **p, size_t *n, int end, FILE *f), (p, n, end, f), -1)
WRAP(MEMORY, ssize_t, getline, (char **p, size_t *n, FILE *f), (p, n, f), -1)
WRAP(MEMORY, FILE *, fopencookie, (void *c, const char *m, cookie_io_functions_t f), (c, m, f),
     NULL)
WRAP(MEMORY, FILE *, fdopen, (int fd, const char *mode), (fd, mode), NULL)
WRAP(MEMORY, char *, realpath, (const char *path, char *to), (path, to), NULL)
WRAP(MEMORY, locale_t, newlocale, (int m, const char *name, locale_t b), (m, name, b), (locale_t)0)
WRAP(MEMORY, void *, mmap64, (void *p, size_t n, int prot, int flags, int fd, off_t at),
     (p, n, prot, flags, fd, at), MAP_FAILED)
WRAP(MEMORY, int, pthread_create,
     (pthread_t * t, const pthread_attr_t *a, void *(*run)(void *), void *arg), (t, a, run, arg),
     EAGAIN)
WRAP(MEMORY, ZSTD_CCtx *, ZSTD_createCCtx, (void), (), NULL)
WRAP(MEMORY, ZSTD_DCtx *, ZSTD_createDCtx, (void), (), NULL)
WRAP(FILES, FILE *, fopen64, (const char *path, const char *mode), (path, mode), NULL)
WRAP(FILES, DIR *, opendir, (const char *path), (path), NULL)
WRAP(FILES, int, dup, (int fd), (fd), -1)
WRAP(FILES, int, mkostemp64, (char *path, int flags), (path, flags), -1)
WRAP(FILES, int, eventfd, (unsigned n, int flags), (n, flags), -1)
WRAP(FILES, int, nftw64, (const char *path, __nftw_func_t each, int n, int flags),
     (path, each, n, flags), -1)

int __wrap_asprintf(char **p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int __wrap_asprintf(char **p, const char *fmt, ...)
{
    if (fails(MEMORY, "asprintf", __builtin_return_address(0)))
        return -1;
    va_list ap;
    va_start(ap, fmt);
    int n = __real_vasprintf(p, fmt, ap);
    va_end(ap);
    return n;
}

int __real_open64(const char *path, int flags, ...);
int __wrap_open64(const char *path, int flags, ...);
int __wrap_open64(const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & O_CREAT ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    return fails(FILES, "open", __builtin_return_address(0)) ? -1
                                                             : __real_open64(path, flags, mode);
}

/* ---- jansson ---- */

static inline bool parser_fails(const char *call, json_error_t *error)
{
    if (!fails(MEMORY, call, NULL))
        return false;
    *error = (json_error_t){.line = -1};
    error->text[JSON_ERROR_TEXT_LENGTH - 1] = json_error_out_of_memory;
    return true;
}

json_t *__real_json_loadb(const char *text, size_t n, size_t flags, json_error_t *error);
json_t *__wrap_json_loadb(const char *text, size_t n, size_t flags, json_error_t *error);
json_t *__wrap_json_loadb(const char *text, size_t n, size_t flags, json_error_t *error)
{
    if (parser_fails("json_loadb", error))
        return NULL;
    in_parser = true;
    json_t *json = __real_json_loadb(text, n, flags, error);
    in_parser = false;
    return json;
}

json_t *__real_json_load_callback(json_load_callback_t more, void *ctx, size_t flags,
                                  json_error_t *error);
json_t *__wrap_json_load_callback(json_load_callback_t more, void *ctx, size_t flags,
                                  json_error_t *error);
json_t *__wrap_json_load_callback(json_load_callback_t more, void *ctx, size_t flags,
                                  json_error_t *error)
{
    if (parser_fails("json_load_callback", error))
        return NULL;
    in_parser = true;
    json_t *json = __real_json_load_callback(more, ctx, flags, error);
    in_parser = false;
    return json;
}

static void *json_take(size_t n)
{
    return fails(MEMORY, "jansson", __builtin_return_address(0)) ? NULL : __real_malloc(n);
}

/* ---- libcrypto ---- */

static void *crypto_take(size_t n, const char *file, int line)
{
    (void)file, (void)line;
    return fails(MEMORY, "libcrypto", NULL) ? NULL : __real_malloc(n);
}

static void *crypto_grow(void *p, size_t n, const char *file, int line)
{
    (void)file, (void)line;
    return fails(MEMORY, "libcrypto", NULL) ? NULL : __real_realloc(p, n);
}

static void crypto_give(void *p, const char *file, int line)
{
    (void)file, (void)line;
    free(p);
}

/* Call at the start of main. */
static inline bool short_of_init(void)
{
    json_set_alloc_funcs(json_take, free);
    return CRYPTO_set_mem_functions(crypto_take, crypto_grow, crypto_give);
}

#endif
