#include "io/format/python_json.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/file.h"

#define FILE_MAX_BYTES (16ull << 20)
/* An integer of this many digits always fits 64 bits. */
#define DIGITS 18
#define MARK "\xef\xbb\xbf"

struct text {
    const char *at, *end;
};

/* The converted text. to NULL: only count its bytes. */
struct sink {
    char *to;
    size_t n;
};

static void put(struct sink *sink, const char *from, size_t n)
{
    if (sink->to)
        memcpy(sink->to + sink->n, from, n);
    sink->n += n;
}

static bool begins(const struct text *text, const char *with)
{
    size_t n = strlen(with);
    return (size_t)(text->end - text->at) >= n && !memcmp(text->at, with, n);
}

static void take_string(struct text *text, struct sink *sink)
{
    const char *from = text->at++;
    while (text->at < text->end && *text->at != '"')
        text->at += *text->at == '\\' && text->at + 1 < text->end ? 2 : 1;
    text->at += text->at < text->end;
    put(sink, from, (size_t)(text->at - from));
}

static void take_number(struct text *text, struct sink *sink)
{
    const char *from = text->at;
    bool whole = true;
    for (; text->at < text->end && strchr("+-.eE0123456789", *text->at) && *text->at; text->at++)
        whole = whole && !strchr(".eE", *text->at);
    put(sink, from, (size_t)(text->at - from));
    if (whole && text->at - from > DIGITS)
        put(sink, ".0", 2);
}

static bool take_word(struct text *text, struct sink *sink)
{
    static const char *const words[] = {"NaN", "Infinity", "-Infinity"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!begins(text, words[i]))
            continue;
        put(sink, "{\"__float__\":\"", 14);
        put(sink, words[i], strlen(words[i]));
        put(sink, "\"}", 2);
        text->at += strlen(words[i]);
        return true;
    }
    return false;
}

/* Convert text to JSON, until it ends or until_bytes of JSON are written. */
static void convert(struct text *text, struct sink *sink, size_t until_bytes)
{
    if (begins(text, MARK))
        text->at += strlen(MARK);
    while (text->at < text->end && sink->n < until_bytes) {
        if (*text->at == '"')
            take_string(text, sink);
        else if (take_word(text, sink))
            continue;
        else if (*text->at == '-' || (*text->at >= '0' && *text->at <= '9'))
            take_number(text, sink);
        else
            put(sink, text->at++, 1);
    }
}

/* The offset in text of what became byte `position` of the JSON. */
static size_t place_of(const char *text, size_t len_bytes, size_t position)
{
    struct text before = {text, text + len_bytes};
    struct sink count = {0};
    convert(&before, &count, position);
    size_t at = (size_t)(before.at - text), beyond = count.n > position ? count.n - position : 0;
    return at > beyond ? at - beyond : 0;
}

int perta_python_json_parse(const char *text, size_t len_bytes, const char *path, json_t **out,
                            struct perta_err *err)
{
    struct text from = {text, text + len_bytes};
    struct sink sink = {0};
    json_error_t where = {0};
    convert(&from, &sink, SIZE_MAX);
    *out = NULL;
    sink = (struct sink){.to = malloc(sink.n + 1)};
    from.at = text;
    if (sink.to) {
        convert(&from, &sink, SIZE_MAX);
        *out = json_loadb(sink.to, sink.n, JSON_ALLOW_NUL, &where);
    }
    bool no_memory = !sink.to || json_error_code(&where) == json_error_out_of_memory;
    free(sink.to);
    if (*out)
        return 0;
    return no_memory ? perta_fail_sys(err, ENOMEM, "%s", path)
                     : perta_fail(err, PERTA_EINPUT, "%s: byte %zu: not valid JSON: %s", path,
                                  place_of(text, len_bytes, (size_t)where.position), where.text);
}

int perta_python_json_load(int fd, const char *path, json_t **out, struct perta_err *err)
{
    struct stat st;
    *out = NULL;
    if (fstat(fd, &st))
        return perta_fail_sys(err, errno, "%s", path);
    uint64_t len = (uint64_t)st.st_size;
    if (len > FILE_MAX_BYTES)
        return perta_fail(err, PERTA_EINPUT, "%s: %llu bytes; at most %llu are read", path,
                          (unsigned long long)len, FILE_MAX_BYTES);
    char *text = malloc(len + 1);
    int rc = text ? perta_pread_all(fd, text, len, 0, path, err)
                  : perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc)
        rc = perta_python_json_parse(text, len, path, out, err);
    free(text);
    return rc;
}
