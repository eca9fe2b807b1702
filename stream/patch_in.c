#include "stream/patch_in.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/publish.h"

static json_t *load_manifest(const char *dir, json_error_t *why)
{
    char *path = perta_path_join(dir, "manifest.json");
    json_t *manifest = path ? json_load_file(path, JSON_REJECT_DUPLICATES, why) : NULL;
    free(path);
    return manifest;
}

static bool says_patch(const json_t *manifest)
{
    const char *format = json_string_value(json_object_get(manifest, "format"));
    return format && !strcmp(format, "perta-patch");
}

bool perta_patch_in_is_patch(const char *path)
{
    json_error_t why;
    json_t *manifest = load_manifest(path, &why);
    bool is = says_patch(manifest);
    json_decref(manifest);
    return is;
}

static int read_shard(struct perta_patch_in_shard *shard, const char *dir, const char *name,
                      struct perta_err *err)
{
    size_t len = strlen(name), suffix = sizeof PERTA_PATCH_SUFFIX - 1;
    if (len <= suffix || strcmp(name + len - suffix, PERTA_PATCH_SUFFIX) || strchr(name, '/'))
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: %s is no name of a patch file",
                          dir, name);
    shard->file_name = strdup(name);
    shard->name = strndup(name, len - suffix);
    shard->path = perta_path_join(dir, name);
    if (!shard->file_name || !shard->name || !shard->path)
        return perta_fail_sys(err, ENOMEM, "%s", dir);
    int fd = open(shard->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;
    if (fd < 0)
        return errno == ENOENT ? perta_fail(err, PERTA_ECHECK, "%s: missing", shard->path)
                               : perta_fail_sys(err, errno, "%s", shard->path);
    int rc;
    if (fstat(fd, &st))
        rc = perta_fail_sys(err, errno, "%s", shard->path);
    else if (!S_ISREG(st.st_mode))
        rc = perta_fail(err, PERTA_EINPUT, "%s: not a regular file", shard->path);
    else
        rc = perta_patch_read(fd, (uint64_t)st.st_size, shard->path, &shard->patch, err);
    close(fd);
    return rc;
}

static int read_shards(struct perta_patch_in *in, struct perta_err *err)
{
    const json_t *list = json_object_get(json_object_get(in->manifest, "outputs"), "patch");
    in->shards = calloc(json_array_size(list) + 1, sizeof *in->shards);
    if (!in->shards)
        return perta_fail_sys(err, ENOMEM, "%s", in->path);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name =
            json_string_value(json_object_get(json_array_get(list, i), "name"));
        in->shards[i].file.fd = -1;
        in->n_shards++;
        int rc = name ? read_shard(&in->shards[i], in->path, name, err)
                      : perta_fail(err, PERTA_EINPUT,
                                   "%s/manifest.json: outputs.patch[%zu] has no name", in->path,
                                   i);
        if (rc)
            return rc;
        if (i && strcmp(in->shards[i - 1].name, in->shards[i].name) >= 0)
            return perta_fail(err, PERTA_EINPUT,
                              "%s/manifest.json: outputs.patch is not sorted by name", in->path);
    }
    return 0;
}

int perta_patch_in_open(struct perta_patch_in *in, const char *path, struct perta_err *err)
{
    json_error_t why;
    *in = (struct perta_patch_in){.path = strdup(path)};
    if (!in->path)
        return perta_fail_sys(err, ENOMEM, "%s", path);
    in->manifest = load_manifest(path, &why);
    if (!in->manifest)
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: %s; is it a patch folder?", path,
                          why.text);
    if (!says_patch(in->manifest))
        return perta_fail(err, PERTA_EINPUT, "%s/manifest.json: not of a perta patch", path);
    json_int_t version = json_integer_value(json_object_get(in->manifest, "version"));
    if (version != PERTA_PATCH_VERSION)
        return perta_fail(err, PERTA_EINPUT,
                          "%s/manifest.json: patch format %lld; this perta reads format %u", path,
                          (long long)version, PERTA_PATCH_VERSION);
    return read_shards(in, err);
}

int perta_patch_in_open_files(struct perta_patch_in *in, bool direct, struct perta_err *err)
{
    for (uint32_t i = 0; i < in->n_shards; i++) {
        struct perta_patch_in_shard *shard = &in->shards[i];
        int rc = perta_file_open(&shard->file, shard->path, direct, err);
        if (rc)
            return rc;
        if (shard->file.len_bytes != shard->patch->file_bytes)
            return perta_fail(err, PERTA_EINPUT, "%s: changed since its table was read",
                              shard->path);
    }
    return 0;
}

void perta_patch_in_close(struct perta_patch_in *in)
{
    for (uint32_t i = 0; i < in->n_shards; i++) {
        free(in->shards[i].name);
        free(in->shards[i].file_name);
        free(in->shards[i].path);
        perta_patch_free(in->shards[i].patch);
        perta_file_close(&in->shards[i].file);
    }
    free(in->shards);
    free(in->path);
    json_decref(in->manifest);
    *in = (struct perta_patch_in){0};
}
