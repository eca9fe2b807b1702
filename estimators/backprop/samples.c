#include "estimators/backprop/samples.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct line {
    const char *path;
    uint64_t number;
};

static int bad_line(const struct line *line, const char *what, struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s: line %llu: %s", line->path,
                      (unsigned long long)line->number, what);
}

static int grow(struct perta_samples *s, uint64_t n_tokens, struct perta_err *err)
{
    if (s->n_tokens + n_tokens > s->room) {
        uint64_t room = 2 * (s->n_tokens + n_tokens);
        int32_t *ids = realloc(s->ids, room * sizeof *ids);
        s->ids = ids ? ids : s->ids;
        int32_t *targets = realloc(s->targets, room * sizeof *targets);
        s->targets = targets ? targets : s->targets;
        if (!ids || !targets)
            return perta_fail_sys(err, ENOMEM, "samples");
        s->room = room;
    }
    uint64_t *starts = realloc(s->starts, (s->n + 2) * sizeof *starts);
    s->starts = starts ? starts : s->starts;
    uint32_t *n_labels = realloc(s->n_labels, (s->n + 1) * sizeof *n_labels);
    s->n_labels = n_labels ? n_labels : s->n_labels;
    return starts && n_labels ? 0 : perta_fail_sys(err, ENOMEM, "samples");
}

static int fill(struct perta_samples *s, const struct line *line, const json_t *ids,
                const json_t *labels, uint32_t vocab, struct perta_err *err)
{
    uint64_t n = json_array_size(ids), at = s->n_tokens;
    uint32_t n_labels = 0;
    for (uint64_t t = 0; t < n; t++) {
        const json_t *id = json_array_get(ids, t);
        if (!json_is_integer(id) || json_integer_value(id) < 0)
            return bad_line(line, "\"input_ids\" holds something that is no token id", err);
        if (json_integer_value(id) >= vocab)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: line %llu: token id %lld, but the vocabulary has %u",
                              line->path, (unsigned long long)line->number,
                              (long long)json_integer_value(id), vocab);
        s->ids[at + t] = (int32_t)json_integer_value(id);
        s->targets[at + t] = PERTA_IGNORED;
        const json_t *label = labels ? json_array_get(labels, t) : id;
        json_int_t value = json_integer_value(label);
        if (!json_is_integer(label) || (value != PERTA_IGNORED && (value < 0 || value >= vocab)))
            return bad_line(line, "\"labels\" holds something that is neither a token id of the "
                                  "vocabulary nor -100",
                            err);
        if (t && value != PERTA_IGNORED) {
            s->targets[at + t - 1] = (int32_t)value;
            n_labels++;
        }
    }
    if (!n_labels)
        return bad_line(line, "no label: nothing after the first token is to be learned", err);
    s->starts[s->n] = at;
    s->starts[s->n + 1] = at + n;
    s->n_labels[s->n] = n_labels;
    s->n++;
    s->n_tokens += n;
    s->longest = n > s->longest ? n : s->longest;
    return 0;
}

static int add_line(struct perta_samples *s, const struct line *line, const char *text,
                    size_t len, uint32_t vocab, uint64_t max_tokens, struct perta_err *err)
{
    json_error_t why;
    json_t *object = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    const json_t *ids = json_object_get(object, "input_ids");
    const json_t *labels = json_object_get(object, "labels");
    uint64_t n = json_array_size(ids);
    int rc;
    if (!object)
        rc = bad_line(line, why.text, err);
    else if (!json_is_array(ids) || !n)
        rc = bad_line(line, "no array \"input_ids\" with tokens in it", err);
    else if (labels && json_array_size(labels) != n)
        rc = bad_line(line, "\"labels\" is not as long as \"input_ids\"", err);
    else if (max_tokens && n > max_tokens)
        rc = perta_fail(err, PERTA_EINPUT,
                        "%s: line %llu: %llu tokens, --max-tokens allows %llu", line->path,
                        (unsigned long long)line->number, (unsigned long long)n,
                        (unsigned long long)max_tokens);
    else if (!(rc = grow(s, n, err)))
        rc = fill(s, line, ids, labels, vocab, err);
    json_decref(object);
    return rc;
}

static bool is_blank(const char *text, size_t len)
{
    return strspn(text, " \t\r\n") == len;
}

int perta_samples_read(const char *path, uint32_t vocab, uint64_t max_tokens,
                       struct perta_samples *out, struct perta_err *err)
{
    *out = (struct perta_samples){0};
    FILE *file = fopen(path, "re");
    if (!file)
        return perta_fail_sys(err, errno, "%s", path);
    struct line line = {.path = path};
    char *text = NULL;
    size_t room = 0;
    ssize_t len;
    int rc = 0;
    while (!rc && (len = getline(&text, &room, file)) >= 0) {
        line.number++;
        if (!is_blank(text, (size_t)len))
            rc = add_line(out, &line, text, (size_t)len, vocab, max_tokens, err);
    }
    if (!rc && ferror(file))
        rc = perta_fail_sys(err, errno, "%s", path);
    if (!rc && !out->n)
        rc = perta_fail(err, PERTA_EINPUT, "%s: no samples", path);
    free(text);
    fclose(file);
    if (rc)
        perta_samples_release(out);
    return rc;
}

void perta_samples_release(struct perta_samples *samples)
{
    free(samples->starts);
    free(samples->ids);
    free(samples->targets);
    free(samples->n_labels);
    *samples = (struct perta_samples){0};
}
