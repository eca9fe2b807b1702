#include "io/err.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "io/text.h"

int perta_err_fill(struct perta_err *err, int code, int sys_errno, const char *file, int line,
                   const char *fmt, ...)
{
    assert(code < 0 && err->code <= 0);
    if (err->code)
        return err->code;
    err->code = code;
    err->sys_errno = sys_errno;
    err->file = file;
    err->line = line;

    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    va_end(ap);
    if (sys_errno) {
        char text[128];
        size_t len = strlen(err->msg);
        snprintf(err->msg + len, sizeof err->msg - len, ": %s",
                 strerror_r(sys_errno, text, sizeof text));
    }
    perta_text_make_plain(err->msg); /* names in it may hold any bytes, and may be cut anywhere */
    return code;
}

int perta_err_context(struct perta_err *err, const char *fmt, ...)
{
    char was[sizeof err->msg];
    memcpy(was, err->msg, sizeof was);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    va_end(ap);
    size_t len = strlen(err->msg);
    snprintf(err->msg + len, sizeof err->msg - len, ": %.*s", (int)sizeof was, was);
    perta_text_make_plain(err->msg);
    return err->code;
}
