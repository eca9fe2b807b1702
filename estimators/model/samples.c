#include "estimators/model/samples.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "estimators/model/sample_keys.h"
#include "io/text.h"

#define POSITION_MAX INT32_MAX
#define VALUE_CHARS 40 /* characters of a wrong value that are shown */
#define UNKNOWN_MAX 8  /* unknown keys that are listed */

struct reading {
    const struct perta_samples_wanted *wanted;
    struct perta_samples *to;
    struct perta_draft draft;
    struct perta_digest *digest;
    struct perta_hmac *hmac;
    json_t *unknown; /* unknown keys in order of appearance, at most UNKNOWN_MAX */
    bool more;       /* there are more */
    /* The first line whose position_ids start again, without and with attention_mask; 0: none. */
    uint64_t blocks, blocks_under_mask;
};

/* ---- a line's arrays ---- */

static int grow_draft(struct perta_draft *d, size_t n, struct perta_err *err)
{
    if (n <= d->room)
        return 0;
    void **const arrays[] = {(void **)&d->ids, (void **)&d->labels, (void **)&d->positions,
                             (void **)&d->seen, (void **)&d->begins};
    const size_t widths[] = {sizeof *d->ids, sizeof *d->labels, sizeof *d->positions,
                             sizeof *d->seen, sizeof *d->begins};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        void *grown = realloc(*arrays[i], 2 * n * widths[i]);
        if (!grown)
            return perta_fail_sys(err, ENOMEM, "samples");
        *arrays[i] = grown;
    }
    d->room = 2 * n;
    return 0;
}

static void free_draft(struct perta_draft *d)
{
    free(d->ids);
    free(d->labels);
    free(d->positions);
    free(d->seen);
    free(d->begins);
}

/* Refuse element t of key. */
static int bad_element(const struct perta_line *line, const char *key, const json_t *value,
                       size_t t, const char *wanted, struct perta_err *err)
{
    const json_t *of = json_array_get(value, t);
    if (json_is_array(of))
        return perta_line_fail(
            line, err,
            "\"%s\" holds arrays, as batches do; each line is one sample: [1, 2, 3], "
            "not [[1, 2, 3]]",
            key);
    char *text = perta_json_text(of, JSON_ENCODE_ANY | JSON_COMPACT);
    int rc = perta_line_fail(line, err, "\"%s\", element %zu: %.*s is %s", key, t, VALUE_CHARS,
                             text ? text : "?", wanted);
    free(text);
    return rc;
}

/* The value of key, which must be as long as input_ids; NULL if there is none. */
static int find_row(const struct perta_line *line, const json_t *object, const char *key, size_t n,
                    const json_t **row, struct perta_err *err)
{
    *row = json_object_get(object, key);
    if (json_is_null(*row))
        *row = NULL;
    if (*row && json_array_size(*row) != n)
        return perta_line_fail(line, err, "\"%s\" is not as long as \"input_ids\"", key);
    return 0;
}

static int read_ids(const struct perta_line *line, const json_t *ids, uint32_t vocab,
                    struct perta_draft *d, struct perta_err *err)
{
    for (size_t t = 0; t < d->n; t++) {
        const json_t *id = json_array_get(ids, t);
        json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0)
            return bad_element(line, "input_ids", ids, t, "not a token id, a whole number from 0",
                               err);
        if (value >= vocab)
            return perta_line_fail(line, err, "token id %lld, but the vocabulary has %u",
                                   (long long)value, vocab);
        d->ids[t] = (int32_t)value;
    }
    return 0;
}

static int read_labels(const struct perta_line *line, const json_t *object, uint32_t vocab,
                       struct perta_draft *d, struct perta_err *err)
{
    const json_t *labels;
    int rc = find_row(line, object, "labels", d->n, &labels, err);
    for (size_t t = 0; t < d->n && !rc; t++) {
        const json_t *label = json_array_get(labels, t);
        json_int_t value = labels ? json_integer_value(label) : d->ids[t];
        if (labels &&
            (!json_is_integer(label) || (value != PERTA_IGNORED && (value < 0 || value >= vocab))))
            rc = bad_element(line, "labels", labels, t,
                             "neither a token id of the vocabulary nor -100", err);
        d->labels[t] = (int32_t)value;
    }
    return rc;
}

static int read_mask(const struct perta_line *line, const json_t *object, struct perta_draft *d,
                     bool *given, struct perta_err *err)
{
    const json_t *mask;
    bool hides = false, shows = false;
    int rc = find_row(line, object, "attention_mask", d->n, &mask, err);
    *given = mask;
    for (size_t t = 0; t < d->n && !rc; t++) {
        const json_t *of = json_array_get(mask, t);
        double value = json_is_boolean(of) ? json_is_true(of) : json_number_value(of);
        if (mask && ((value != 0 && value != 1) || !(json_is_boolean(of) || json_is_number(of))))
            rc = bad_element(line, "attention_mask", mask, t, "neither 0 nor 1", err);
        d->seen[t] = !mask || value == 1;
        hides |= !d->seen[t];
        shows |= d->seen[t];
    }
    if (!rc && !shows)
        rc = perta_line_fail(line, err, "\"attention_mask\" leaves no token");
    const json_t *labels = json_object_get(object, "labels");
    if (!rc && hides && (!labels || json_is_null(labels)))
        rc = perta_line_fail(
            line, err,
            "\"attention_mask\" has zeros, and no \"labels\" say what is learned; give "
            "them, -100 for padding");
    return rc;
}

static void count_seen(struct perta_draft *d)
{
    uint32_t n = 0;
    for (size_t t = 0; t < d->n; t++)
        d->positions[t] = d->seen[t] ? n++ : PERTA_POSITION_HIDDEN;
}

/* As in transformers' masking_utils.find_packed_sequence_indices: a block begins where a position
 * is not the one before plus 1. With attention_mask, all tokens are one block. */
static int read_positions(const struct perta_line *line, const json_t *object,
                          const struct perta_position_ids *rule, struct perta_draft *d, bool masked,
                          bool *again, struct perta_err *err)
{
    const json_t *positions;
    int rc = find_row(line, object, "position_ids", d->n, &positions, err);
    *again = false;
    if (!rc && positions && rule->refused)
        return perta_line_fail(line, err, "\"position_ids\": a model of this family has none");
    for (size_t t = 0; t < d->n && !rc; t++) {
        const json_t *of = json_array_get(positions, t);
        json_int_t value = positions ? json_integer_value(of) : (json_int_t)t;
        if (positions && (!json_is_integer(of) || value < 0 || value > POSITION_MAX))
            rc = bad_element(line, "position_ids", positions, t,
                             "not a position, a whole number from 0", err);
        d->positions[t] = (uint32_t)value;
        bool begins = t && d->positions[t] != d->positions[t - 1] + 1;
        d->begins[t] = !t || (begins && !masked && !rule->no_blocks);
        *again |= begins;
    }
    if (!positions && rule->count_seen)
        count_seen(d);
    return rc;
}

/* Tokens that attention_mask hides count too, as in transformers. */
static int check_positions(const struct perta_line *line, struct perta_draft *d,
                           const struct perta_samples_wanted *wanted, struct perta_err *err)
{
    uint32_t limit = wanted->positions;
    d->is_long = false;
    for (size_t t = 0; wanted->is_short && t < d->n; t++)
        d->is_long |= d->positions[t] >= wanted->is_short;
    for (size_t t = 0; limit && t < d->n; t++)
        if (d->positions[t] >= limit && d->positions[t] != PERTA_POSITION_HIDDEN)
            return perta_line_fail(line, err,
                                   "token %zu has position %u, counted from 0: from %u on, %s", t,
                                   d->positions[t], limit, wanted->beyond);
    return 0;
}

/* ---- from the draft to a sample ---- */

static int32_t target_of(const struct perta_draft *d, size_t t)
{
    return t + 1 < d->n ? d->labels[t + 1] : PERTA_IGNORED;
}

static int grow(struct perta_samples *s, uint64_t n_tokens, struct perta_err *err)
{
    if (s->n_tokens + n_tokens > s->room) {
        uint64_t room = 2 * (s->n_tokens + n_tokens);
        int32_t *ids = realloc(s->ids, room * sizeof *ids);
        s->ids = ids ? ids : s->ids;
        int32_t *targets = realloc(s->targets, room * sizeof *targets);
        s->targets = targets ? targets : s->targets;
        struct perta_place *places = realloc(s->places, room * sizeof *places);
        s->places = places ? places : s->places;
        if (!ids || !targets || !places)
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

static void put_token(struct perta_samples *s, const struct perta_draft *d, size_t t,
                      uint32_t first, uint32_t end)
{
    s->ids[s->n_tokens] = d->ids[t];
    s->targets[s->n_tokens] = target_of(d, t);
    s->places[s->n_tokens++] =
        (struct perta_place){d->positions[t], (uint32_t)t, first, end, d->is_long};
}

/* First the tokens that are seen, in order; each sees its block up to itself. Then the hidden
 * tokens that predict something, which see the tokens before them. */
static void put_tokens(struct perta_samples *s, const struct perta_draft *d)
{
    uint32_t n_seen = 0, first = 0;
    for (size_t t = 0; t < d->n; t++) {
        first = d->begins[t] ? n_seen : first;
        if (d->seen[t]) {
            n_seen++;
            put_token(s, d, t, first, n_seen);
        }
    }
    n_seen = 0;
    for (size_t t = 0; t < d->n; t++) {
        n_seen += d->seen[t];
        if (!d->seen[t] && target_of(d, t) != PERTA_IGNORED)
            put_token(s, d, t, 0, n_seen);
    }
}

static int put_sample(struct reading *r, const struct perta_line *line, enum perta_sample_kind kind,
                      struct perta_err *err)
{
    struct perta_samples *s = r->to;
    const struct perta_draft *d = &r->draft;
    uint64_t most = r->wanted->max_tokens;
    uint32_t n_labels = 0;
    int rc = grow(s, d->n, err);
    if (rc)
        return rc;
    for (size_t t = 0; t < d->n; t++)
        n_labels += target_of(d, t) != PERTA_IGNORED;
    if (!n_labels)
        return perta_line_fail(line, err,
                               "no label: nothing after the first token is to be learned");
    s->starts[s->n] = s->n_tokens;
    put_tokens(s, d);
    uint64_t n = s->n_tokens - s->starts[s->n];
    if (most && n > most)
        return perta_line_fail(line, err, "%llu tokens, --max-tokens allows %llu",
                               (unsigned long long)n, (unsigned long long)most);
    s->n_labels[s->n] = n_labels;
    s->lines[s->n] = line->number;
    s->kinds[s->n] = (uint8_t)kind;
    s->starts[++s->n] = s->n_tokens;
    s->longest = n > s->longest ? n : s->longest;
    return 0;
}

/* ---- lines ---- */

static void note_unknown(struct reading *r, json_t *object)
{
    const char *key;
    json_t *value, *known;
    size_t i;
    json_object_foreach (object, key, value) {
        bool new = perta_key_rule(key) == PERTA_KEY_UNKNOWN && *key;
        json_array_foreach (r->unknown, i, known)
            new = new && strcmp(json_string_value(known), key);
        if (new && json_array_size(r->unknown) < UNKNOWN_MAX)
            perta_json_append(&r->unknown, json_string(key));
        else
            r->more |= new;
    }
}

static int add_sample(struct reading *r, const struct perta_line *line, json_t *object,
                      enum perta_sample_kind kind, struct perta_err *err)
{
    const json_t *ids = json_object_get(object, "input_ids");
    struct perta_draft *d = &r->draft;
    uint32_t vocab = r->wanted->vocab;
    bool masked, again;
    d->n = json_array_size(ids);
    if (!d->n)
        return perta_line_fail(line, err,
                               "no array \"input_ids\" with tokens in it; " PERTA_TOKENIZE);
    int rc = grow_draft(d, d->n, err);
    if (!rc)
        rc = read_ids(line, ids, vocab, d, err);
    if (!rc)
        rc = read_labels(line, object, vocab, d, err);
    if (!rc)
        rc = read_mask(line, object, d, &masked, err);
    if (!rc)
        rc = read_positions(line, object, &r->wanted->position_ids, d, masked, &again, err);
    if (!rc)
        rc = check_positions(line, d, r->wanted, err);
    if (!rc)
        rc = perta_keys_check(line, d, object, err);
    if (rc)
        return rc;
    if (again && !masked && r->wanted->is_whole)
        return perta_line_fail(
            line, err,
            "\"position_ids\" start again, which is not supported for this model; "
            "give each block a line of its own");
    uint64_t *first = masked ? &r->blocks_under_mask : &r->blocks;
    if (again && !*first)
        *first = line->number;
    note_unknown(r, object);
    return put_sample(r, line, kind, err);
}

static int add_answers(struct reading *r, struct perta_line line, const json_t *object,
                       struct perta_err *err)
{
    json_t *paraphrased = json_object_get(object, "paraphrased");
    const json_t *perturbed = json_object_get(object, "perturbed");
    int rc = 0;
    line.of = "\"paraphrased\": ";
    if (paraphrased && !json_is_null(paraphrased))
        rc = add_sample(r, &line, paraphrased, PERTA_PARAPHRASED, err);
    line.of = "\"perturbed\": ";
    if (!rc && perturbed && !json_is_null(perturbed) && !json_array_size(perturbed))
        rc = perta_line_fail(&line, err, "no array with answers in it");
    for (size_t i = 0; i < json_array_size(perturbed) && !rc; i++)
        rc = add_sample(r, &line, json_array_get(perturbed, i), PERTA_PERTURBED, err);
    return rc;
}

static int add_line(struct reading *r, const struct perta_line *line, const char *text, size_t len,
                    struct perta_err *err)
{
    json_t *object;
    int rc = perta_line_parse(line, text, len, r->wanted->answers, &object, err);
    if (!rc)
        rc = add_sample(r, line, object, PERTA_SAMPLE, err);
    if (!rc && r->wanted->answers)
        rc = add_answers(r, *line, object, err);
    json_decref(object);
    return rc;
}

/* ---- the file ---- */

/* Files that begin like this are not text, and what to do about it. */
static const struct magic {
    const char *bytes;
    size_t n;
    const char *what;
} magics[] = {
    {"\xff\xfe\0\0", 4, "is UTF-32; write it as UTF-8"},
    {"\0\0\xfe\xff", 4, "is UTF-32; write it as UTF-8"},
    {"\xff\xfe", 2, "is UTF-16, by its byte order mark; write it as UTF-8"},
    {"\xfe\xff", 2, "is UTF-16, by its byte order mark; write it as UTF-8"},
    {"{\0", 2, "is UTF-16; write it as UTF-8"},
    {"\0{", 2, "is UTF-16; write it as UTF-8"},
    {"PAR1", 4, "is Parquet; write it as JSON lines: datasets' to_json does"},
    {"ARROW1", 6, "is Arrow; write it as JSON lines: datasets' to_json does"},
    {"\xff\xff\xff\xff", 4, "is Arrow, it seems; write it as JSON lines: datasets' to_json does"},
    {"\x1f\x8b", 2, "is compressed; gunzip it first"},
    {"\x28\xb5\x2f\xfd", 4, "is compressed; unzstd it first"},
    {"BZh", 3, "is compressed; bunzip2 it first"},
    {"\xfd"
     "7zXZ",
     5, "is compressed; unxz it first"},
    {"\x04\x22\x4d\x18", 4, "is compressed; unlz4 it first"},
    {"PK\x03\x04", 4, "is a zip file (NumPy's npz and PyTorch's files are), not JSON lines"},
    {"\x93NUMPY", 6, "is a NumPy array, not JSON lines"},
    {"\x89HDF", 4, "is HDF5, not JSON lines"},
    {"\x80\x02", 2, "is a pickle, not JSON lines"},
    {"\x80\x04", 2, "is a pickle, not JSON lines"},
    {"\x80\x05", 2, "is a pickle, not JSON lines"},
    {"SQLite", 6, "is an SQLite database, not JSON lines"},
};

static int check_magic(const char *path, const char *text, size_t len, struct perta_err *err)
{
    for (size_t i = 0; i < sizeof magics / sizeof *magics; i++)
        if (len >= magics[i].n && !memcmp(text, magics[i].bytes, magics[i].n))
            return perta_fail(err, PERTA_EINPUT, "%s: %s", path, magics[i].what);
    return 0;
}

static bool is_blank(const char *text, size_t len)
{
    return strspn(text, " \t\r\n") == len;
}

/* 1: a line of *len bytes; 0: there are no more. */
static int next_line(const char *path, FILE *file, char **text, size_t *room, size_t *len,
                     struct perta_err *err)
{
    ssize_t got = getline(text, room, file);
    int failed = got < 0 ? errno : 0;
    *len = got < 0 ? 0 : (size_t)got;
    if (got >= 0 || feof(file))
        return got >= 0;
    return failed == EISDIR
               ? perta_fail(err, PERTA_EINPUT, "%s: a folder, where JSON lines should be", path)
               : perta_fail_sys(err, failed, "%s", path);
}

static int read_lines(struct reading *r, const char *path, FILE *file, struct perta_err *err)
{
    struct perta_line line = {.path = path, .of = ""};
    char *text = NULL;
    size_t room = 0, len;
    int rc = 0;
    while (!rc && (rc = next_line(path, file, &text, &room, &len, err)) > 0) {
        size_t bom = 0;
        rc = 0;
        perta_digest_update(r->digest, text, len);
        if (r->hmac)
            perta_hmac_update(r->hmac, text, len);
        if (!line.number++)
            rc = check_magic(path, text, len, err);
        if (len >= 3 && !memcmp(text, "\xef\xbb\xbf", 3))
            bom = 3;
        if (!rc && !is_blank(text + bom, len - bom))
            rc = add_line(r, &line, text + bom, len - bom, err);
    }
    if (!rc && !r->to->n)
        rc = perta_fail(err, PERTA_EINPUT, "%s: no samples", path);
    free(text);
    return rc;
}

/* Check that the file did not change while it was read, and compute its digests. */
static int settle_file(struct reading *r, const char *path, FILE *file, const struct stat *was,
                       struct perta_err *err)
{
    struct perta_samples_file *f = &r->to->file;
    const char *before = r->wanted->xxh128;
    struct stat st;
    if (fstat(fileno(file), &st))
        return perta_fail_sys(err, errno, "%s", path);
    f->len_bytes = (uint64_t)st.st_size;
    f->mtime = st.st_mtim;
    if (S_ISREG(st.st_mode) && (perta_digest_bytes(r->digest) != f->len_bytes ||
                                memcmp(&st.st_mtim, &was->st_mtim, sizeof st.st_mtim) ||
                                memcmp(&st.st_ctim, &was->st_ctim, sizeof st.st_ctim)))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: changed while it was read; run again when nothing writes to it",
                          path);
    perta_digest_xxh128(r->digest, f->xxh128);
    if (before && strcmp(before, f->xxh128))
        return perta_fail(
            err, PERTA_EINPUT,
            "%s: is not what it was when the run began; run again when nothing writes "
            "to it",
            path);
    return r->hmac ? perta_hmac_finish(r->hmac, f->hmac, err) : 0;
}

static void add_note(struct reading *r, const char *path, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void add_note(struct reading *r, const char *path, const char *fmt, ...)
{
    char what[768];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    perta_json_append(&r->to->notes, perta_text_json("%s: %s", path, what));
}

static void add_notes(struct reading *r, const char *path)
{
    if (r->blocks)
        add_note(
            r, path,
            "line %llu: \"position_ids\" start again, so each token sees its own block alone, as "
            "where transformers trains (use_cache=False)",
            (unsigned long long)r->blocks);
    if (r->blocks_under_mask)
        add_note(r, path,
                 "line %llu: with \"attention_mask\", \"position_ids\" that start again make no "
                 "blocks, as in transformers; without it they do",
                 (unsigned long long)r->blocks_under_mask);
    if (!json_array_size(r->unknown))
        return;
    char *names = perta_json_text(r->unknown, JSON_COMPACT);
    if (names)
        add_note(r, path, "keys that perta does not know are ignored: %.*s%s",
                 (int)strlen(names) - 2, names + 1, r->more ? " and more" : "");
    else
        perta_json_append(&r->to->notes, NULL);
    free(names);
}

static int read_file(struct reading *r, const char *path, struct perta_err *err)
{
    FILE *file = fopen(path, "re");
    struct stat was = {0};
    if (!file)
        return errno == ENOENT ? perta_fail(err, PERTA_EINPUT, "%s: no such file", path)
                               : perta_fail_sys(err, errno, "%s", path);
    int rc = fstat(fileno(file), &was) ? perta_fail_sys(err, errno, "%s", path) : 0;
    if (!rc)
        rc = read_lines(r, path, file, err);
    if (!rc)
        rc = settle_file(r, path, file, &was, err);
    fclose(file);
    return rc;
}

int perta_samples_read(const char *path, const struct perta_samples_wanted *wanted,
                       struct perta_samples *out, struct perta_err *err)
{
    *out = (struct perta_samples){.notes = json_array()};
    struct reading r = {.wanted = wanted, .to = out, .unknown = json_array()};
    r.digest = perta_digest_new(false);
    int rc = r.digest ? 0 : perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc && wanted->key_path)
        rc = perta_hmac_new(wanted->key_path, &r.hmac, err);
    if (!rc)
        rc = read_file(&r, path, err);
    add_notes(&r, path);
    if (!rc && (!r.unknown || !out->notes))
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    json_decref(r.unknown);
    perta_digest_free(r.digest);
    perta_hmac_free(r.hmac);
    free_draft(&r.draft);
    if (rc)
        perta_samples_release(out);
    return rc;
}

uint64_t perta_samples_bytes(const struct perta_samples *s)
{
    return s->room * (sizeof *s->ids + sizeof *s->targets + sizeof *s->places) +
           (s->n + 1) *
               (sizeof *s->starts + sizeof *s->n_labels + sizeof *s->lines + sizeof *s->kinds);
}

void perta_samples_release(struct perta_samples *samples)
{
    free(samples->starts);
    free(samples->ids);
    free(samples->targets);
    free(samples->places);
    free(samples->n_labels);
    free(samples->lines);
    free(samples->kinds);
    json_decref(samples->notes);
    *samples = (struct perta_samples){0};
}
