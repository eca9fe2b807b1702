#include "estimators/backprop/samples.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct line {
    const char *path;
    uint64_t number;
    const struct perta_samples_wanted *wanted;
    const char *of; /* "perturbed: " before what is wrong there; else "" */
};

static int bad_line(const struct line *line, const char *what, struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s: line %llu: %s%s", line->path,
                      (unsigned long long)line->number, line->of, what);
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
    uint64_t *lines = realloc(s->lines, (s->n + 1) * sizeof *lines);
    s->lines = lines ? lines : s->lines;
    uint8_t *kinds = realloc(s->kinds, (s->n + 1) * sizeof *kinds);
    s->kinds = kinds ? kinds : s->kinds;
    return starts && n_labels && lines && kinds ? 0 : perta_fail_sys(err, ENOMEM, "samples");
}

static int fill(struct perta_samples *s, const struct line *line, const json_t *ids,
                const json_t *labels, enum perta_sample_kind kind, struct perta_err *err)
{
    uint64_t n = json_array_size(ids), at = s->n_tokens;
    uint32_t n_labels = 0, vocab = line->wanted->vocab;
    for (uint64_t t = 0; t < n; t++) {
        const json_t *id = json_array_get(ids, t);
        if (!json_is_integer(id) || json_integer_value(id) < 0)
            return bad_line(line, "\"input_ids\" holds something that is no token id", err);
        if (json_integer_value(id) >= vocab)
            return perta_fail(err, PERTA_EINPUT,
                              "%s: line %llu: %stoken id %lld, but the vocabulary has %u",
                              line->path, (unsigned long long)line->number, line->of,
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
    s->lines[s->n] = line->number;
    s->kinds[s->n] = (uint8_t)kind;
    s->n++;
    s->n_tokens += n;
    s->longest = n > s->longest ? n : s->longest;
    return 0;
}

static int add_sample(struct perta_samples *s, const struct line *line, const json_t *object,
                      enum perta_sample_kind kind, struct perta_err *err)
{
    const json_t *ids = json_object_get(object, "input_ids");
    const json_t *labels = json_object_get(object, "labels");
    uint64_t n = json_array_size(ids), most = line->wanted->max_tokens;
    if (!json_is_array(ids) || !n)
        return bad_line(line, "no array \"input_ids\" with tokens in it", err);
    if (labels && json_array_size(labels) != n)
        return bad_line(line, "\"labels\" is not as long as \"input_ids\"", err);
    if (most && n > most)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: line %llu: %s%llu tokens, --max-tokens allows %llu", line->path,
                          (unsigned long long)line->number, line->of, (unsigned long long)n,
                          (unsigned long long)most);
    int rc = grow(s, n, err);
    return rc ? rc : fill(s, line, ids, labels, kind, err);
}

static int add_answers(struct perta_samples *s, struct line line, const json_t *object,
                       struct perta_err *err)
{
    const json_t *paraphrased = json_object_get(object, "paraphrased");
    const json_t *perturbed = json_object_get(object, "perturbed");
    int rc = 0;
    line.of = "\"paraphrased\": ";
    if (paraphrased)
        rc = add_sample(s, &line, paraphrased, PERTA_PARAPHRASED, err);
    line.of = "\"perturbed\": ";
    if (!rc && perturbed && !json_array_size(perturbed))
        rc = bad_line(&line, "no array with answers in it", err);
    for (size_t i = 0; i < json_array_size(perturbed) && !rc; i++)
        rc = add_sample(s, &line, json_array_get(perturbed, i), PERTA_PERTURBED, err);
    return rc;
}

static int add_line(struct perta_samples *s, const struct line *line, const char *text,
                    size_t len, struct perta_err *err)
{
    json_error_t why;
    json_t *object = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
    if (!object && json_error_code(&why) == json_error_out_of_memory)
        return perta_fail_sys(err, ENOMEM, "%s", line->path);
    int rc = object ? add_sample(s, line, object, PERTA_SAMPLE, err)
                    : bad_line(line, why.text, err);
    if (!rc && line->wanted->answers)
        rc = add_answers(s, *line, object, err);
    json_decref(object);
    return rc;
}

static bool is_blank(const char *text, size_t len)
{
    return strspn(text, " \t\r\n") == len;
}

int perta_samples_read(const char *path, const struct perta_samples_wanted *wanted,
                       struct perta_samples *out, struct perta_err *err)
{
    *out = (struct perta_samples){0};
    FILE *file = fopen(path, "re");
    if (!file)
        return errno == ENOENT ? perta_fail(err, PERTA_EINPUT, "%s: no such file", path)
                               : perta_fail_sys(err, errno, "%s", path);
    struct line line = {.path = path, .wanted = wanted, .of = ""};
    char *text = NULL;
    size_t room = 0;
    ssize_t len;
    int rc = 0;
    while (!rc && (len = getline(&text, &room, file)) >= 0) {
        line.number++;
        if (!is_blank(text, (size_t)len))
            rc = add_line(out, &line, text, (size_t)len, err);
    }
    if (!rc && !feof(file))
        rc = errno == EISDIR
                 ? perta_fail(err, PERTA_EINPUT, "%s: a folder, where JSON lines should be", path)
                 : perta_fail_sys(err, errno, "%s", path);
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
    free(samples->lines);
    free(samples->kinds);
    *samples = (struct perta_samples){0};
}
