#include "io/format/plain.h"

#include <ctype.h>
#include <string.h>

static void pass_space(struct perta_plain *p)
{
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r'))
        p->at++;
}

bool perta_plain_word(struct perta_plain *p, const char *word)
{
    size_t n = strlen(word);
    pass_space(p);
    if (!n)
        return p->at == p->end;
    if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n))
        return false;
    p->at += n;
    return true;
}

bool perta_plain_string(struct perta_plain *p, const char **text, size_t *len)
{
    if (!perta_plain_word(p, "\""))
        return false;
    *text = p->at;
    while (p->at < p->end && *p->at >= ' ' && *p->at <= '~' && *p->at != '"' && *p->at != '\\')
        p->at++;
    *len = (size_t)(p->at - *text);
    return p->at < p->end && *p->at++ == '"';
}

bool perta_plain_uint(struct perta_plain *p, uint64_t *n)
{
    pass_space(p);
    const char *first = p->at;
    *n = 0;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9' && p->at - first < 18)
        *n = *n * 10 + (uint64_t)(*p->at++ - '0');
    return p->at > first && (*first != '0' || p->at == first + 1);
}

bool perta_plain_value(struct perta_plain *p, json_t **value)
{
    json_error_t where;
    pass_space(p);
    *value = json_loadb(p->at, (size_t)(p->end - p->at),
                        JSON_REJECT_DUPLICATES | JSON_DISABLE_EOF_CHECK | JSON_DECODE_ANY, &where);
    if (*value)
        p->at += where.position;
    return *value;
}

bool perta_plain_raw(struct perta_plain *p, const char **text, size_t *len)
{
    if (!perta_plain_word(p, "\""))
        return false;
    *text = p->at;
    while (p->at < p->end && *p->at != '"')
        p->at += *p->at == '\\' && p->at + 1 < p->end ? 2 : 1;
    *len = (size_t)(p->at - *text);
    return p->at < p->end && *p->at++ == '"';
}

/* Skip a number, true, null, NaN, -Infinity. */
static bool pass_bare(struct perta_plain *p)
{
    const char *first = p->at;
    while (p->at < p->end && *p->at && (isalnum((unsigned char)*p->at) || strchr("+-.", *p->at)))
        p->at++;
    return p->at > first;
}

bool perta_plain_pass(struct perta_plain *p)
{
    size_t depth = 0;
    do {
        const char *text;
        size_t len;
        pass_space(p);
        if (p->at >= p->end || !*p->at)
            return false;
        if (strchr("{[", *p->at))
            depth++, p->at++;
        else if (strchr("}]", *p->at) && depth)
            depth--, p->at++;
        else if (strchr(",:", *p->at) && depth)
            p->at++;
        else if (*p->at == '"' ? !perta_plain_raw(p, &text, &len) : !pass_bare(p))
            return false;
    } while (depth);
    return true;
}

bool perta_plain_is(const char *text, size_t len, const char *string)
{
    return len == strlen(string) && !memcmp(text, string, len);
}
