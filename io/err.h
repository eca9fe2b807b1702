/* err.h - how every function in libperta fails.
 *
 * A function returns 0, or a negative PERTA_E*. Its last argument is a struct perta_err that the
 * caller owns. It is filled once, where the error starts, and callers pass the code on unchanged. A
 * layer boundary may put context in front of the message once. */
#ifndef PERTA_IO_ERR_H
#define PERTA_IO_ERR_H

#include <stdbool.h>

#define PERTA_API __attribute__((visibility("default")))

/* The command's exit status is the negated code; PERTA_EINTR becomes 130. */
enum perta_code {
    PERTA_ECHECK = -1, /* a check failed: damaged file, patch for another model */
    PERTA_EUSAGE = -2, /* the arguments make no sense together */
    PERTA_EINPUT = -3, /* an input file breaks its format or does not fit the others */
    PERTA_ESYS = -4,   /* the system refused: I/O, memory */
    PERTA_EINTR = -5,  /* the caller asked to stop */
};

struct perta_err {
    int code;         /* PERTA_E*; 0 if nothing has failed */
    int sys_errno;    /* errno of a failed system call, else 0 */
    const char *file; /* source position where the error started */
    int line;
    bool resumable; /* the same call with resume set (--resume) continues; msg says so */
    char msg[1200]; /* one line for people: file, tensor, byte, what to do */
};

/* Fill *err, unless it is filled already: zero it first (the verbs of perta.h do that themselves).
 * If sys_errno is not 0, its text is appended to the message. Returns code. */
PERTA_API int perta_err_fill(struct perta_err *err, int code, int sys_errno, const char *file,
                             int line, const char *fmt, ...) __attribute__((format(printf, 6, 7)));

/* Put "context: " in front of the message. Returns err->code. */
PERTA_API int perta_err_context(struct perta_err *err, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* perta_err_fill never returns 0. Saying so lets compilers and linters see that code which relies
 * on success does not run. */
static inline int perta_err_negative(int code)
{
    if (code >= 0)
        __builtin_unreachable();
    return code;
}

#define perta_fail(err, code, ...) \
    perta_err_negative(perta_err_fill((err), (code), 0, __FILE__, __LINE__, __VA_ARGS__))
/* The same for a failed system call: appends strerror(errno). */
#define perta_fail_sys(err, sys_errno, ...) \
    perta_err_negative(                     \
        perta_err_fill((err), PERTA_ESYS, (sys_errno), __FILE__, __LINE__, __VA_ARGS__))

#endif
