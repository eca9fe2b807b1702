#include "io/format/patch_manifest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/file.h"
#include "io/format/plain.h"

/* Take the key of member i. 1: there is one; 0: the object ends; -1: unusual layout, or not
 * JSON. */
static int next_key(struct perta_plain *p, size_t i, const char **key, size_t *len)
{
    if (perta_plain_word(p, "}"))
        return 0;
    return (!i || perta_plain_word(p, ",")) && perta_plain_string(p, key, len) &&
                   perta_plain_word(p, ":")
               ? 1
               : -1;
}

/* Skip an array, parsing one item at a time. */
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

/* Parse the manifest without "tensors", which is for people and takes 100 MB as a tree for 100,000
 * tensors. NULL: unusual layout, or not JSON. */
static json_t *without_tensors(const char *text, size_t len_bytes)
{
    struct perta_plain p = {text, text + len_bytes};
    json_t *json = json_object();
    int more = perta_plain_word(&p, "{") ? 1 : -1;
    bool good = true, had_tensors = false;
    const char *key;
    size_t len;
    for (size_t i = 0; good && more > 0 && (more = next_key(&p, i, &key, &len)) > 0; i++) {
        if (perta_plain_is(key, len, "tensors") && !had_tensors)
            good = had_tensors = pass_array(&p);
        else
            good = add_member(json, key, len, &p);
    }
    if (good && !more && perta_plain_word(&p, ""))
        return json;
    json_decref(json);
    return NULL;
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

int perta_patch_manifest_load(const char *dir, bool whole, json_t **manifest,
                              struct perta_digest_hex *hex, struct perta_err *err)
{
    size_t len_bytes = 0;
    char *path = perta_path_join(dir, PERTA_PATCH_MANIFEST), *text = NULL;
    struct perta_digest *digest = perta_digest_new(true);
    *manifest = NULL;
    int rc = path && digest ? perta_file_text(path, &text, &len_bytes, err)
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

bool perta_patch_manifest_is(const json_t *manifest)
{
    const char *format = json_string_value(json_object_get(manifest, "format"));
    return format && !strcmp(format, "perta-patch");
}

/* ---- without a tree ---- */

static bool scan_file(struct perta_plain *p, struct perta_patch_manifest_files *files)
{
    const char *key;
    size_t len;
    int more = perta_plain_word(p, "{") ? 1 : -1;
    for (size_t i = 0; more > 0 && (more = next_key(p, i, &key, &len)) > 0; i++) {
        if (!perta_plain_is(key, len, "name")) {
            if (!perta_plain_pass(p))
                return false;
            continue;
        }
        struct perta_patch_manifest_file *grown =
            realloc(files->all, (files->n + 1) * sizeof *grown);
        files->all = grown ? grown : files->all;
        files->short_of_memory |= !grown;
        if (!grown || !perta_plain_raw(p, &grown[files->n].name, &grown[files->n].len))
            return false;
        files->n++;
    }
    return !more;
}

static bool scan_outputs(struct perta_plain *p, struct perta_patch_manifest_files *files)
{
    const char *key;
    size_t len;
    int more = perta_plain_word(p, "{") ? 1 : -1;
    for (size_t i = 0; more > 0 && (more = next_key(p, i, &key, &len)) > 0; i++) {
        bool good =
            perta_plain_is(key, len, "patch") ? perta_plain_word(p, "[") : perta_plain_pass(p);
        for (size_t f = 0; good && perta_plain_is(key, len, "patch") && !perta_plain_word(p, "]");
             f++)
            good = (!f || perta_plain_word(p, ",")) && scan_file(p, files);
        if (!good)
            return false;
    }
    return !more;
}

static bool scan(struct perta_plain *p, struct perta_patch_manifest_files *files)
{
    const char *key, *format;
    size_t len, format_len;
    int more = perta_plain_word(p, "{") ? 1 : -1;
    for (size_t i = 0; more > 0 && (more = next_key(p, i, &key, &len)) > 0; i++) {
        bool good;
        if (perta_plain_is(key, len, "format")) {
            good = perta_plain_raw(p, &format, &format_len);
            files->is_patch = good && perta_plain_is(format, format_len, "perta-patch");
        } else {
            good =
                perta_plain_is(key, len, "outputs") ? scan_outputs(p, files) : perta_plain_pass(p);
        }
        if (!good)
            return false;
    }
    return !more && perta_plain_word(p, "");
}

int perta_patch_manifest_scan(const char *dir, struct perta_patch_manifest_files *files,
                              struct perta_err *err)
{
    size_t len_bytes = 0;
    char *path = perta_path_join(dir, PERTA_PATCH_MANIFEST);
    *files = (struct perta_patch_manifest_files){0};
    int rc = path ? perta_file_text(path, &files->text, &len_bytes, err)
                  : perta_fail_sys(err, ENOMEM, "%s", dir);
    free(path);
    if (rc)
        return rc;
    struct perta_plain p = {files->text, files->text + len_bytes};
    files->is_whole = scan(&p, files);
    files->is_patch &= files->is_whole;
    return files->short_of_memory ? perta_fail_sys(err, ENOMEM, "%s", dir) : 0;
}

void perta_patch_manifest_release(struct perta_patch_manifest_files *files)
{
    free(files->all);
    free(files->text);
    *files = (struct perta_patch_manifest_files){0};
}
