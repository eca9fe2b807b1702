#include "io/record.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"
#include "io/plain.h"

/* The next member's key, after i others; false: it is written in another way, or wrong. */
static bool next_key(struct perta_plain *p, size_t i, const char **key, size_t *len)
{
    return (!i || perta_plain_word(p, ",")) && perta_plain_string(p, key, len) &&
           perta_plain_word(p, ":");
}

/* Read, and dropped, one value at a time. */
static bool pass_array(struct perta_plain *p)
{
    if (!perta_plain_word(p, "["))
        return false;
    for (size_t i = 0; !perta_plain_word(p, "]"); i++) {
        json_t *value;
        if ((i && !perta_plain_word(p, ",")) || !perta_plain_value(p, &value))
            return false;
        json_decref(value);
    }
    return true;
}

static bool add_member(json_t *json, const char *key, size_t len, struct perta_plain *p)
{
    json_t *value = NULL;
    char *name = strndup(key, len);
    bool good = name && !json_object_get(json, name) && perta_plain_value(p, &value) &&
                !json_object_set_new(json, name, value);
    free(name);
    return good;
}

/* What is said of the tensors is for people, and of 100,000 of them takes 100 MB as a tree. NULL:
 * it is written in another way, or wrong. */
static json_t *without_tensors(const char *text, size_t len_bytes)
{
    struct perta_plain p = {text, text + len_bytes};
    json_t *json = json_object();
    bool good = perta_plain_word(&p, "{"), had_tensors = false;
    for (size_t i = 0; good && !perta_plain_word(&p, "}"); i++) {
        const char *key;
        size_t len;
        good = next_key(&p, i, &key, &len);
        if (good && perta_plain_is(key, len, "tensors") && !had_tensors)
            good = had_tensors = pass_array(&p);
        else
            good = good && add_member(json, key, len, &p);
    }
    if (good && perta_plain_word(&p, ""))
        return json;
    json_decref(json);
    return NULL;
}

/* The whole text of the file at path, the caller's (free). */
static int read_text(const char *path, char **text, size_t *len_bytes, struct perta_err *err)
{
    struct stat st;
    *text = NULL;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    *len_bytes = (size_t)st.st_size;
    *text = malloc(*len_bytes + 1);
    int rc = *text ? perta_pread_all(fd, *text, *len_bytes, 0, path, err)
                   : perta_fail_sys(err, ENOMEM, "%s", path);
    close(fd);
    return rc;
}

static int parse_text(const char *path, const char *text, size_t len_bytes, bool whole,
                      json_t **manifest, struct perta_err *err)
{
    json_error_t why;
    *manifest = whole ? NULL : without_tensors(text, len_bytes);
    if (!*manifest)
        *manifest = json_loadb(text, len_bytes, JSON_REJECT_DUPLICATES, &why);
    if (*manifest)
        return 0;
    return json_error_code(&why) == json_error_out_of_memory
               ? perta_fail_sys(err, ENOMEM, "%s", path)
               : perta_fail(err, PERTA_EINPUT, "%s: %s", path, why.text);
}

int perta_record_load(const char *dir, bool whole, json_t **manifest,
                      struct perta_digest_hex *hex, struct perta_err *err)
{
    size_t len_bytes = 0;
    char *path = NULL, *text = NULL;
    struct perta_digest *digest = perta_digest_new(true);
    *manifest = NULL;
    if (asprintf(&path, "%s/" PERTA_RECORD_NAME, dir) < 0)
        path = NULL;
    int rc = path && digest ? read_text(path, &text, &len_bytes, err)
                            : perta_fail_sys(err, ENOMEM, "%s", dir);
    if (!rc) {
        perta_digest_update(digest, text, len_bytes);
        perta_digest_finish(digest, hex);
        rc = parse_text(path, text, len_bytes, whole, manifest, err);
    }
    perta_digest_free(digest);
    free(text);
    free(path);
    return rc;
}

bool perta_record_is_patch(const json_t *manifest)
{
    const char *format = json_string_value(json_object_get(manifest, "format"));
    return format && !strcmp(format, "perta-patch");
}
