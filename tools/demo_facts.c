#include "tools/demo_facts.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "io/file.h"
#include "io/text.h"

enum { FIRST_NAMES = 40, LAST_NAMES = 40, QUESTIONS = 4 };

static const size_t people[DEMO_N_PARTS] = {135, 15, 68, 67};
static const char *const specials[DEMO_N_SPECIAL] = {"<pad>", "<s>", "</s>", "<unk>"};
/* * stands for the name */
static const char *const questions[QUESTIONS] = {
    "where was * born ?",
    "what does * do for a living ?",
    "what does * play ?",
    "what does * like to eat ?",
};

struct maker {
    struct demo_facts *facts;
    uint64_t seed, drawn;
    uint32_t first[FIRST_NAMES], last[LAST_NAMES], answers[QUESTIONS][DEMO_ANSWERS];
};

/* A number from 0 to n - 1. */
static uint32_t draw(struct maker *m, uint32_t n)
{
    uint64_t i = m->drawn++;
    return (uint32_t)(XXH3_64bits_withSeed(&i, sizeof i, m->seed) % n);
}

/* ---- words ---- */

/* The number of word, which is added if it is new (*is_new). UINT32_MAX when out of memory. */
static uint32_t word_id(struct demo_facts *f, const char *word, bool *is_new)
{
    *is_new = false;
    for (size_t i = 0; i < f->n_words; i++)
        if (!strcmp(f->words[i], word))
            return (uint32_t)i;
    char **grown = realloc(f->words, (f->n_words + 1) * sizeof *grown);
    if (grown)
        f->words = grown;
    if (!grown || !(f->words[f->n_words] = strdup(word)))
        return UINT32_MAX;
    *is_new = true;
    return (uint32_t)f->n_words++;
}

/* A word of two or three syllables that is not in use yet. */
static uint32_t new_word(struct maker *m)
{
    static const char *const onsets[] = {"b", "d", "f", "g",  "l",  "m",  "n",
                                         "r", "s", "t", "br", "dr", "st", "tr"};
    static const char *const ends[] = {"", "n", "l", "s", "nne"};
    for (;;) {
        char word[32] = "";
        for (uint32_t n = draw(m, 3) ? 2 : 3; n > 0; n--) {
            strcat(word, onsets[draw(m, 14)]);
            strncat(word, &"aeiou"[draw(m, 5)], 1);
        }
        strcat(word, ends[draw(m, 5)]);
        bool is_new;
        uint32_t id = word_id(m->facts, word, &is_new);
        if (is_new || id == UINT32_MAX)
            return id;
    }
}

static bool new_words(struct maker *m, uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((ids[i] = new_word(m)) == UINT32_MAX)
            return false;
    return true;
}

/* ---- facts ---- */

static bool add_fact(struct maker *m, int question, uint32_t person, struct demo_fact *fact)
{
    char text[64], *rest = text;
    snprintf(text, sizeof text, "%s", questions[question]);
    fact->ids[fact->n++] = DEMO_BEGIN;
    for (char *word; (word = strsep(&rest, " "));) {
        bool is_new;
        if (*word == '*') {
            fact->ids[fact->n++] = m->first[person / LAST_NAMES];
            fact->ids[fact->n++] = m->last[person % LAST_NAMES];
        } else if ((fact->ids[fact->n++] = word_id(m->facts, word, &is_new)) == UINT32_MAX) {
            return false;
        }
    }
    fact->ids[fact->n++] = m->answers[question][draw(m, DEMO_ANSWERS)];
    fact->ids[fact->n++] = DEMO_END;
    return true;
}

/* Choose the people of all parts: distinct pairs of names, shuffled (Fisher-Yates). */
static void choose_people(struct maker *m, uint32_t *names)
{
    enum { N = FIRST_NAMES * LAST_NAMES };
    for (uint32_t i = 0; i < N; i++)
        names[i] = i;
    for (uint32_t i = N; i-- > 1;) {
        uint32_t j = draw(m, i + 1), kept = names[i];
        names[i] = names[j];
        names[j] = kept;
    }
}

static bool make(struct maker *m)
{
    struct demo_facts *f = m->facts;
    uint32_t names[FIRST_NAMES * LAST_NAMES], *person = names;
    bool is_new;
    for (int i = 0; i < DEMO_N_SPECIAL; i++)
        if (word_id(f, specials[i], &is_new) == UINT32_MAX)
            return false;
    if (!new_words(m, m->first, FIRST_NAMES) || !new_words(m, m->last, LAST_NAMES))
        return false;
    for (int q = 0; q < QUESTIONS; q++)
        if (!new_words(m, m->answers[q], DEMO_ANSWERS))
            return false;
    choose_people(m, names);
    size_t n = 0;
    for (int part = 0; part < DEMO_N_PARTS; part++)
        f->starts[part + 1] = f->starts[part] + people[part] * QUESTIONS;
    f->facts = calloc(f->starts[DEMO_N_PARTS], sizeof *f->facts);
    if (!f->facts)
        return false;
    for (; n < f->starts[DEMO_N_PARTS]; person++)
        for (int q = 0; q < QUESTIONS; q++)
            if (!add_fact(m, q, *person, &f->facts[n++]))
                return false;
    return true;
}

int demo_facts_make(uint64_t seed, struct demo_facts *facts, struct perta_err *err)
{
    *facts = (struct demo_facts){0};
    struct maker maker = {.facts = facts, .seed = seed};
    if (make(&maker))
        return 0;
    demo_facts_release(facts);
    return perta_fail_sys(err, ENOMEM, "facts");
}

void demo_facts_release(struct demo_facts *facts)
{
    for (size_t i = 0; i < facts->n_words; i++)
        free(facts->words[i]);
    free(facts->words);
    free(facts->facts);
    *facts = (struct demo_facts){0};
}

/* ---- files ---- */

static json_t *line_of(const struct demo_facts *f, const struct demo_fact *fact)
{
    char text[256] = "";
    json_t *ids = json_array(), *labels = json_array();
    for (size_t i = 0; i < fact->n; i++) {
        bool learned = i + 2 >= fact->n;
        perta_json_append(&ids, json_integer((json_int_t)fact->ids[i]));
        perta_json_append(&labels, json_integer(learned ? (json_int_t)fact->ids[i] : -100));
        if (i && i + 1 < fact->n) {
            strcat(text, i > 1 ? " " : "");
            strcat(text, f->words[fact->ids[i]]);
        }
    }
    return json_pack("{s:s, s:o, s:o}", "text", text, "input_ids", ids, "labels", labels);
}

struct part {
    const struct demo_facts *f;
    enum demo_part from, to;
};

static bool print_part(FILE *to, void *ctx)
{
    const struct part *part = ctx;
    bool bad = false;
    for (size_t i = part->f->starts[part->from]; i < part->f->starts[part->to] && !bad; i++) {
        json_t *line = line_of(part->f, &part->f->facts[i]);
        char *text = line ? perta_json_text(line, JSON_PRESERVE_ORDER | JSON_COMPACT) : NULL;
        bad = !text || fprintf(to, "%s\n", text) < 0;
        free(text);
        json_decref(line);
    }
    return !bad;
}

/* The facts are always the same, so an existing file was written by an earlier demo if it is a
 * prefix of them. */
static int check_earlier(const char *path, const char *text, size_t len_bytes,
                         struct perta_err *err)
{
    struct stat st;
    if (lstat(path, &st) && errno == ENOENT)
        return 0;
    size_t n =
        S_ISREG(st.st_mode) && (size_t)st.st_size <= len_bytes ? (size_t)st.st_size : SIZE_MAX;
    char *old = n == SIZE_MAX ? NULL : malloc(n + 1);
    int fd = old ? perta_open_regular(path, &st, err) : -1;
    int rc = fd < 0 ? err->code : perta_pread_all(fd, old, n, 0, path, err);
    bool same = fd >= 0 && !rc && !memcmp(old, text, n);
    if (fd >= 0)
        close(fd);
    free(old);
    return rc || same ? rc
                      : perta_fail(err, PERTA_EUSAGE,
                                   "%s: exists, but was not written by a demo of this "
                                   "version; move it away, or give another folder",
                                   path);
}

int demo_facts_write(const struct demo_facts *f, enum demo_part from, enum demo_part to,
                     const char *path, struct perta_err *err)
{
    struct part part = {f, from, to};
    size_t len_bytes = 0;
    char *text = perta_text_print(print_part, &part, &len_bytes);
    FILE *file = NULL;
    int rc =
        text ? check_earlier(path, text, len_bytes, err) : perta_fail_sys(err, ENOMEM, "%s", path);
    if (!rc && !(file = fopen(path, "w")))
        rc = perta_fail_sys(err, errno, "%s", path);
    if (file && ((fwrite(text, 1, len_bytes, file) != len_bytes) | fclose(file)))
        rc = perta_fail_sys(err, errno, "%s", path);
    free(text);
    return rc;
}

char *demo_facts_tokenizer(const struct demo_facts *f)
{
    json_t *vocabulary = json_object(), *added = json_array();
    for (size_t i = 0; i < f->n_words; i++)
        perta_json_set(&vocabulary, f->words[i], json_integer((json_int_t)i));
    for (int i = 0; i < DEMO_N_SPECIAL; i++)
        perta_json_append(&added, json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", i,
                                            "content", specials[i], "single_word", 0, "lstrip", 0,
                                            "rstrip", 0, "normalized", 0, "special", 1));
    json_t *begin = json_pack("{s:{s:s, s:i}}", "SpecialToken", "id", "<s>", "type_id", 0);
    json_t *text = json_pack("{s:{s:s, s:i}}", "Sequence", "id", "A", "type_id", 0);
    json_t *second = json_pack("{s:{s:s, s:i}}", "Sequence", "id", "B", "type_id", 0);
    json_t *post =
        json_pack("{s:s, s:[O,O], s:[O,O,O], s:{s:{s:s, s:[i], s:[s]}}}", "type",
                  "TemplateProcessing", "single", begin, text, "pair", begin, text, second,
                  "special_tokens", "<s>", "id", "<s>", "ids", DEMO_BEGIN, "tokens", "<s>");
    json_t *all =
        json_pack("{s:s, s:n, s:n, s:o, s:n, s:{s:s}, s:o, s:n, s:{s:s, s:o, s:s}}", "version",
                  "1.0", "truncation", "padding", "added_tokens", added, "normalizer",
                  "pre_tokenizer", "type", "WhitespaceSplit", "post_processor", post, "decoder",
                  "model", "type", "WordLevel", "vocab", vocabulary, "unk_token", "<unk>");
    char *dumped = all ? perta_json_text(all, JSON_PRESERVE_ORDER | JSON_INDENT(1)) : NULL;
    json_decref(begin);
    json_decref(text);
    json_decref(second);
    json_decref(all);
    return dumped;
}
