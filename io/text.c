#include "io/text.h"

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"

/* Length of the character at text; 0 for a control character or invalid UTF-8. */
static unsigned character_bytes(const char *text)
{
    static const uint32_t least[] = {0, 0, 0xa0, 0x800, 0x10000}; /* below 0xa0: controls */
    const uint8_t *c = (const uint8_t *)text;
    if (c[0] < 0x80)
        return c[0] >= 0x20 && c[0] != 0x7f;
    if (c[0] < 0xc2 || c[0] > 0xf4)
        return 0;
    unsigned n = c[0] >= 0xf0 ? 4 : c[0] >= 0xe0 ? 3 : 2;
    uint32_t code = c[0] & (0x7fu >> n);
    for (unsigned i = 1; i < n; i++) {
        if ((c[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (c[i] & 0x3f);
    }
    bool surrogate = code >= 0xd800 && code <= 0xdfff;
    return code >= least[n] && code <= 0x10ffff && !surrogate ? n : 0;
}

bool perta_text_is_plain(const char *text)
{
    for (unsigned n; *text; text += n)
        if (!(n = character_bytes(text)))
            return false;
    return true;
}

void perta_text_make_plain(char *text)
{
    while (*text) {
        unsigned n = character_bytes(text);
        if (!n)
            *text = '?';
        text += n ? n : 1;
    }
}

/* Stands in for the format's own line breaks. UTF-8 has no such byte, so no name from JSON has
 * it. */
#define BREAK '\xff'

static void replace(char *text, char from, char to)
{
    for (; (text = strchr(text, from)); text++)
        *text = to;
}

char *perta_text_lines(const char *fmt, va_list ap)
{
    char *own = strdup(fmt), *text = NULL;
    if (own)
        replace(own, '\n', BREAK);
    if (!own || vasprintf(&text, own, ap) < 0)
        text = NULL;
    free(own);
    for (char *line = text, *end; line; line = end ? end + 1 : NULL) {
        end = strchr(line, BREAK);
        if (end)
            *end = '\0';
        perta_text_make_plain(line);
        if (end)
            *end = '\n';
    }
    return text;
}

bool perta_text_ends_in(const char *text, const char *suffix)
{
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && !strcmp(text + n - m, suffix);
}

/* ---- printed into memory ---- */

struct sink {
    char *text;
    size_t len, room;
    bool failed;
};

static ssize_t sink_write(void *cookie, const char *data, size_t len)
{
    struct sink *to = cookie;
    size_t needed = to->len + len + 1;
    if (needed > to->room) {
        char *grown = realloc(to->text, 2 * needed);
        if (!grown) {
            to->failed = true;
            return 0;
        }
        to->text = grown;
        to->room = 2 * needed;
    }
    memcpy(to->text + to->len, data, len);
    to->len += len;
    to->text[to->len] = '\0';
    return (ssize_t)len;
}

char *perta_text_print(bool (*print)(FILE *to, void *ctx), void *ctx, size_t *len)
{
    struct sink sink = {0};
    FILE *file = fopencookie(&sink, "w", (cookie_io_functions_t){.write = sink_write});
    bool printed = file && print(file, ctx);
    bool closed = file && !fclose(file);
    if (!printed || !closed || sink.failed) {
        free(sink.text);
        return NULL;
    }
    *len = sink.len;
    return sink.text;
}

bool perta_name_is_plain(const char *name)
{
    return *name && *name != '.' && !strchr(name, '/') && strlen(name) <= PERTA_NAME_MAX_BYTES &&
           perta_text_is_plain(name);
}

static json_t *plain_json(const char *fmt, va_list ap) __attribute__((format(printf, 1, 0)));

static json_t *plain_json(const char *fmt, va_list ap)
{
    char *text = NULL;
    if (vasprintf(&text, fmt, ap) < 0)
        return NULL;
    perta_text_make_plain(text);
    json_t *json = json_string(text);
    free(text);
    return json;
}

json_t *perta_text_json(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    json_t *json = plain_json(fmt, ap);
    va_end(ap);
    return json;
}

json_t *perta_real_json(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static void null_unless(bool added, json_t **json)
{
    if (added)
        return;
    json_decref(*json);
    *json = NULL;
}

void perta_json_append(json_t **array, json_t *value)
{
    null_unless(!json_array_append_new(*array, value), array);
}

void perta_json_set(json_t **object, const char *key, json_t *value)
{
    null_unless(!json_object_set_new(*object, key, value), object);
}

void perta_json_update(json_t **object, const json_t *from)
{
    null_unless(!json_object_update(*object, (json_t *)(uintptr_t)from), object);
}

void perta_json_extend(json_t **array, const json_t *from)
{
    null_unless(!json_array_extend(*array, (json_t *)(uintptr_t)from), array);
}

char *perta_json_text(const json_t *json, size_t flags)
{
    size_t n = json_dumpb(json, NULL, 0, flags);
    char *text = n ? malloc(n + 1) : NULL;
    if (!text || json_dumpb(json, text, n, flags) != n) {
        free(text);
        return NULL;
    }
    text[n] = '\0';
    return text;
}

/* Notes that have lost one hold a single null; null is never a note. */
static bool lost_one(const json_t *notes)
{
    return json_is_null(json_array_get(notes, 0));
}

void perta_note(json_t *notes, const char *fmt, ...)
{
    if (lost_one(notes))
        return;
    va_list ap;
    va_start(ap, fmt);
    if (json_array_append_new(notes, plain_json(fmt, ap))) {
        json_array_clear(notes);
        json_array_append_new(notes, json_null()); /* takes no memory: an emptied array has room */
    }
    va_end(ap);
}

json_t *perta_notes_whole(json_t *notes)
{
    if (!lost_one(notes))
        return notes;
    json_decref(notes);
    return NULL;
}

/* jansson takes a read error for the end of the file, so it is noted here. */
struct source {
    int fd, failed; /* 0, or the errno of a failed read */
};

static size_t read_some(void *to, size_t len_bytes, void *source)
{
    struct source *from = source;
    struct perta_retry retry = {0};
    ssize_t n;
    do
        n = read(from->fd, to, len_bytes);
    while (n < 0 && perta_retry_same(&retry, errno));
    if (n < 0)
        from->failed = errno;
    return n < 0 ? (size_t)-1 : (size_t)n;
}

int perta_json_load(int fd, const char *path, json_t **out, struct perta_err *err)
{
    struct source from = {.fd = fd};
    json_error_t where = {0};
    *out = json_load_callback(read_some, &from, JSON_REJECT_DUPLICATES, &where);
    if (!*out && json_error_code(&where) == json_error_out_of_memory)
        from.failed = ENOMEM;
    if (from.failed) {
        json_decref(*out);
        *out = NULL;
        return perta_fail_sys(err, from.failed, "%s", path);
    }
    return *out ? 0
                : perta_fail(err, PERTA_EINPUT, "%s: byte %d: not valid JSON: %s", path,
                             where.position, where.text);
}
