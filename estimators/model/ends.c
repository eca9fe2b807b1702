#include "estimators/model/ends.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/file.h"
#include "io/format/naming.h"
#include "io/format/python_json.h"
#include "io/text.h"

#define NAME "generation_config.json"
#define KEY "eos_token_id"

/* ---- the file ---- */

/* *path: beside config.json, whether it exists or not. *out: its object; NULL: no such file. */
static int read_file(const struct perta_checkpoint *ck, char **path, json_t **out,
                     struct perta_err *err)
{
    const char *slash = strrchr(ck->config_path, '/');
    int n = slash ? (int)(slash - ck->config_path) : 1;
    char *folder = strndup(slash ? ck->config_path : ".", (size_t)n);
    struct stat st;
    *path = folder ? perta_path_join(folder, NAME) : NULL;
    int rc = *path ? perta_check_link(folder, *path, err) : perta_fail_sys(err, ENOMEM, NAME);
    free(folder);
    if (rc || access(*path, F_OK))
        return rc;
    int fd = perta_open_regular(*path, &st, err);
    if (fd < 0)
        return fd;
    rc = perta_python_json_load(fd, *path, out, err);
    close(fd);
    return rc || json_is_object(*out) ? rc
                                      : perta_fail(err, PERTA_EINPUT, "%s: not an object", *path);
}

/* ---- what else it says ---- */

/* Settings that change which token is taken, and the value with which they do not, if they have
 * one. */
static const struct {
    const char *key;
    double off;
} settings[] = {
    {"repetition_penalty", 1},
    {"encoder_repetition_penalty", 1},
    {"no_repeat_ngram_size", 0},
    {"encoder_no_repeat_ngram_size", 0},
    {"min_length", 0},
    {"min_new_tokens", 0},
    {"guidance_scale", 1},
    {"num_beams", 1},
    {"bad_words_ids", -1},
    {"suppress_tokens", -1},
    {"begin_suppress_tokens", -1},
    {"forced_bos_token_id", -1},
    {"forced_eos_token_id", -1},
    {"sequence_bias", -1},
    {"exponential_decay_length_penalty", -1},
    {"stop_strings", -1},
    {"watermarking_config", -1},
};

static bool is_off(const json_t *value, double off)
{
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_number(value) && json_number_value(value) == off);
}

static void note_settings(const json_t *config, const char *path, json_t **notes)
{
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (!is_off(json_object_get(config, settings[i].key), settings[i].off))
            perta_json_append(notes,
                              perta_text_json("%s: \"%s\" is not applied: every token that is "
                                              "generated is the most probable one",
                                              path, settings[i].key));
}

/* ---- the tokens ---- */

static int take(const json_t *value, const char *path, struct perta_ends *ends,
                struct perta_err *err)
{
    size_t n = json_is_array(value) ? json_array_size(value) : 1;
    ends->ids = calloc(n + 1, sizeof *ends->ids);
    if (!ends->ids)
        return perta_fail_sys(err, ENOMEM, KEY);
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_is_array(value) ? json_array_get(value, i) : value;
        if (!json_is_integer(id))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: \"" KEY "\" is neither a token id nor an array of them", path);
        ends->ids[ends->n++] = json_integer_value(id);
    }
    return 0;
}

/* transformers takes any number, too; but such a one ends nothing. */
static void note_strange(const struct perta_ends *ends, uint32_t vocab, const char *path,
                         json_t **notes)
{
    for (size_t i = 0; i < ends->n; i++)
        if (ends->ids[i] < 0 || ends->ids[i] >= vocab)
            perta_json_append(notes, perta_text_json("%s: \"" KEY "\": the vocabulary of %u tokens "
                                                     "has no %lld, so it ends no answer",
                                                     path, vocab, (long long)ends->ids[i]));
}

int perta_ends_read(const struct perta_checkpoint *ck, uint32_t vocab, struct perta_ends *ends,
                    json_t **notes, struct perta_err *err)
{
    json_t *config = NULL;
    char *path = NULL;
    *ends = (struct perta_ends){0};
    int rc = read_file(ck, &path, &config, err);
    const json_t *value = json_object_get(config ? config : ck->config, KEY);
    if (!rc && value && !json_is_null(value))
        rc = take(value, config ? path : ck->config_path, ends, err);
    if (!rc && !ends->n)
        perta_json_append(notes, perta_text_json("%s: no \"" KEY "\", so answers have no end",
                                                 config ? path : ck->config_path));
    note_strange(ends, vocab, config ? path : ck->config_path, notes);
    if (!rc)
        note_settings(config, path, notes);
    json_decref(config);
    free(path);
    return rc;
}

bool perta_ends_has(const struct perta_ends *ends, int64_t id)
{
    for (size_t i = 0; i < ends->n; i++)
        if (ends->ids[i] == id)
            return true;
    return false;
}

void perta_ends_release(struct perta_ends *ends)
{
    free(ends->ids);
    *ends = (struct perta_ends){0};
}
