#include "estimators/model/line.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "estimators/model/sample_keys.h"

#define DEEPEST 512 /* the deepest nesting of arrays and objects */
#define NEAR_BYTES 20

int perta_line_fail(const struct perta_line *line, struct perta_err *err, const char *fmt, ...)
{
    char what[768];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return perta_fail(err, PERTA_EINPUT, "%s: line %llu: %s%s", line->path,
                      (unsigned long long)line->number, line->of, what);
}

struct reader {
    struct perta_line line;
    const char *text, *at, *end;
    struct perta_err *err;
};

/* ---- passing by: where a value ends ---- */

static int unexpected(struct reader *r, const char *wanted)
{
    size_t left = (size_t)(r->end - r->at);
    if (!left)
        return perta_line_fail(
            &r->line, r->err,
            "the line ends where %s should be; each line is one whole JSON object", wanted);
    return perta_line_fail(&r->line, r->err, "byte %zu: %s expected near '%.*s'",
                           (size_t)(r->at - r->text) + 1, wanted,
                           (int)(left < NEAR_BYTES ? left : NEAR_BYTES), r->at);
}

static void skip_blanks(struct reader *r)
{
    while (r->at < r->end && strchr(" \t\r\n", *r->at) && *r->at)
        r->at++;
}

/* The next character that is not white space; 0 at the end. */
static char next(struct reader *r)
{
    skip_blanks(r);
    return r->at < r->end ? *r->at : '\0';
}

/* Between the elements of an array or an object: returns 1 if another follows, 0 at close. */
static int more(struct reader *r, char close, bool first)
{
    char c = next(r);
    if (c != close && !first && c != ',')
        return unexpected(r, close == '}' ? "',' or '}'" : "',' or ']'");
    r->at += c == close || !first;
    return c != close;
}

static int pass_string(struct reader *r)
{
    for (r->at++; r->at < r->end && *r->at != '"'; r->at++)
        if (*r->at == '\\' && r->at + 1 < r->end)
            r->at++;
    if (r->at >= r->end)
        return unexpected(r, "'\"'");
    r->at++;
    return 0;
}

/* A number or a name, also those that other programs write and JSON does not allow. */
static int pass_word(struct reader *r)
{
    static const char *const names[] = {"true", "false", "null", "NaN", "Infinity", "-Infinity"};
    const char *start = r->at;
    while (r->at < r->end && *r->at && strchr("abcdefghijklmnopqrstuvwxyzNIE0123456789+-.", *r->at))
        r->at++;
    size_t len = (size_t)(r->at - start);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (len == strlen(names[i]) && !memcmp(start, names[i], len))
            return 0;
    if (len && strspn(start, "0123456789+-.eE") >= len && strchr("-0123456789", *start))
        return 0;
    r->at = start;
    return unexpected(r, "a value");
}

static int pass_key(struct reader *r)
{
    int rc = next(r) == '"' ? pass_string(r) : unexpected(r, "a key");
    if (!rc && next(r) != ':')
        rc = unexpected(r, "':'");
    r->at += !rc;
    return rc;
}

static int pass_value(struct reader *r, unsigned depth)
{
    char open = next(r), close = open == '{' ? '}' : ']';
    if (open == '"')
        return pass_string(r);
    if (open != '{' && open != '[')
        return pass_word(r);
    if (depth == DEEPEST)
        return perta_line_fail(&r->line, r->err, "arrays nested more than %d deep", DEEPEST);
    r->at++;
    int rc = 0;
    for (bool first = true; !rc && (rc = more(r, close, first)) > 0; first = false) {
        rc = open == '{' ? pass_key(r) : 0;
        if (!rc)
            rc = pass_value(r, depth + 1);
    }
    return rc;
}

/* ---- keeping ---- */

static int out_of_memory(struct reader *r)
{
    return perta_fail_sys(r->err, ENOMEM, "%s", r->line.path);
}

/* Parse the text start .. at, which was skipped before; key is for messages. */
static int parse_value(struct reader *r, const char *key, const char *start, json_t **out)
{
    json_error_t why = {.line = 0};
    *out = json_loadb(start, (size_t)(r->at - start),
                      JSON_DECODE_ANY | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    if (*out)
        return 0;
    return *why.text ? perta_line_fail(&r->line, r->err, "%s: %s", key, why.text)
                     : out_of_memory(r);
}

static int read_object(struct reader *r, bool answers, json_t **out);

static int read_objects(struct reader *r, json_t **out)
{
    *out = json_array();
    int rc = *out ? 0 : out_of_memory(r);
    r->at++;
    for (bool first = true; !rc && (rc = more(r, ']', first)) > 0; first = false) {
        json_t *item = NULL;
        bool object = next(r) == '{';
        const char *start = r->at;
        rc = object ? read_object(r, false, &item) : pass_value(r, 1);
        if (!rc && !object)
            rc = parse_value(r, "\"perturbed\"", start, &item);
        if (!rc && json_array_append(*out, item))
            rc = out_of_memory(r);
        json_decref(item);
    }
    return rc;
}

static int read_value(struct reader *r, const char *key, bool answers, json_t **out)
{
    enum perta_key_rule rule = perta_key_rule(key);
    char first = next(r);
    const char *start = r->at;
    *out = NULL;
    if (rule == PERTA_KEY_ANSWERS && answers && first == '{')
        return read_object(r, false, out);
    if (rule == PERTA_KEY_ANSWERS && answers && first == '[')
        return read_objects(r, out);
    int rc = pass_value(r, 0);
    if (rc)
        return rc;
    if (perta_key_is_read(rule) && (rule != PERTA_KEY_ANSWERS || answers)) {
        char quoted[64];
        snprintf(quoted, sizeof quoted, "\"%s\"", key);
        return parse_value(r, quoted, start, out);
    }
    *out = json_true();
    return 0;
}

static int read_key(struct reader *r, json_t **key)
{
    const char *start = r->at;
    int rc = pass_string(r);
    if (!rc)
        rc = parse_value(r, "a key", start, key);
    if (!rc && next(r) != ':')
        rc = unexpected(r, "':'");
    r->at += !rc;
    return rc;
}

static int read_member(struct reader *r, bool answers, json_t *object)
{
    json_t *key = NULL, *value = NULL;
    int rc = next(r) == '"' ? read_key(r, &key) : unexpected(r, "a key");
    const char *name = rc ? "" : json_string_value(key);
    if (strlen(name) < json_string_length(key)) /* a key with \u0000 is never one of ours */
        name = "";
    if (!rc && *name && json_object_get(object, name))
        rc = perta_line_fail(&r->line, r->err, "key \"%s\" is there twice", name);
    if (!rc)
        rc = read_value(r, name, answers, &value);
    if (!rc && json_object_set(object, name, value))
        rc = out_of_memory(r);
    json_decref(value);
    json_decref(key);
    return rc;
}

/* Called at its '{'. */
static int read_object(struct reader *r, bool answers, json_t **out)
{
    *out = json_object();
    int rc = *out ? 0 : out_of_memory(r);
    r->at++;
    for (bool first = true; !rc && (rc = more(r, '}', first)) > 0; first = false)
        rc = read_member(r, answers, *out);
    return rc;
}

int perta_line_parse(const struct perta_line *line, const char *text, size_t len, bool answers,
                     json_t **out, struct perta_err *err)
{
    while (len && (text[len - 1] == '\n' || text[len - 1] == '\r'))
        len--;
    struct reader r = {*line, text, text, text + len, err};
    *out = NULL;
    char first = next(&r);
    int rc = 0;
    if (first == '[')
        rc = perta_line_fail(
            line, err,
            "a JSON array, where each line is to be one object with \"input_ids\"; "
            "`jq -c .[]' puts an array's objects on lines of their own, " PERTA_TOKENIZE);
    else if (first != '{')
        rc = perta_line_fail(line, err, "no JSON object near '%.*s'; " PERTA_TOKENIZE,
                             (int)(r.end - r.at < NEAR_BYTES ? r.end - r.at : NEAR_BYTES), r.at);
    if (!rc)
        rc = read_object(&r, answers, out);
    skip_blanks(&r);
    if (!rc && r.at < r.end)
        rc = unexpected(&r, "the line's end");
    if (rc) {
        json_decref(*out);
        *out = NULL;
    }
    return rc;
}
