#include "stream/model_out.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int perta_model_out_begin(struct perta_model_out *out, const char *path, bool force,
                          struct perta_err *err)
{
    *out = (struct perta_model_out){.has_folder = path != NULL, .shards = json_array()};
    return path ? perta_publish_begin(&out->folder, path, force, err) : 0;
}

int perta_model_out_shard(struct perta_model_out *out, const char *name,
                          const uint8_t *header, uint64_t header_bytes, uint64_t file_bytes,
                          struct perta_err *err)
{
    if (out->has_folder) {
        char *path = perta_publish_path(&out->folder, name);
        if (!path)
            return perta_fail_sys(err, ENOMEM, "%s", name);
        int rc = perta_writer_open(&out->writer, out->engine, path, file_bytes,
                                   out->writer_bufs, err);
        free(path);
        if (rc)
            return rc;
    } else if (!(out->digest = perta_digest_new(true))) {
        return perta_fail_sys(err, ENOMEM, "%s", name);
    }
    return perta_model_out_append(out, header, header_bytes, err);
}

int perta_model_out_append(struct perta_model_out *out, const void *data, uint64_t len_bytes,
                           struct perta_err *err)
{
    if (out->has_folder)
        return perta_writer_append(&out->writer, data, len_bytes, err);
    perta_digest_update(out->digest, data, len_bytes);
    return 0;
}

int perta_model_out_shard_end(struct perta_model_out *out, const char *name,
                              struct perta_err *err)
{
    struct perta_digest_hex hex;
    if (out->has_folder) {
        int rc = perta_writer_close(&out->writer, &hex, err);
        if (rc)
            return rc;
        out->written_bytes += hex.len_bytes;
    } else {
        perta_digest_finish(out->digest, &hex);
        perta_digest_free(out->digest);
        out->digest = NULL;
    }
    json_array_append_new(out->shards,
                          json_pack("{s:s, s:I, s:s, s:s}", "name", name, "bytes",
                                    (json_int_t)hex.len_bytes, "xxh3_128", hex.xxh128,
                                    "sha256", hex.sha256));
    return 0;
}

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n >= m && !strcmp(name + n - m, suffix);
}

static bool is_weights(const char *name)
{
    static const char *const suffixes[] = {".safetensors", ".bin",     ".pt",   ".pth",
                                           ".gguf",        ".ggml",    ".h5",   ".msgpack",
                                           ".onnx",        ".ckpt",    ".npz",  ".pkl"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (ends_with(name, suffixes[i]))
            return true;
    return false;
}

static bool is_shard(const struct perta_checkpoint *ck, const char *name)
{
    for (uint32_t i = 0; i < ck->n_shards; i++)
        if (!strcmp(ck->shards[i].name, name))
            return true;
    return false;
}

static int copy_entry(struct perta_model_out *out, const struct perta_checkpoint *from,
                      const char *name, json_t *skipped, struct perta_err *err)
{
    struct stat st;
    if (is_shard(from, name))
        return 0;
    char *path = perta_path_join(from->path, name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    int rc = 0;
    if (is_weights(name)) {
        if (skipped)
            json_array_append_new(skipped, json_string(name));
    } else if (!stat(path, &st) && S_ISREG(st.st_mode)) {
        rc = perta_publish_copy(&out->folder, path, name, err);
    }
    free(path);
    return rc;
}

int perta_model_out_copy_rest(struct perta_model_out *out, const struct perta_checkpoint *from,
                              json_t *skipped, struct perta_err *err)
{
    struct stat st;
    if (!out->has_folder || stat(from->path, &st) || !S_ISDIR(st.st_mode))
        return 0;
    DIR *dir = opendir(from->path);
    if (!dir)
        return perta_fail_sys(err, errno, "%s", from->path);
    int rc = 0;
    for (struct dirent *entry; !rc && (entry = readdir(dir));)
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            rc = copy_entry(out, from, entry->d_name, skipped, err);
    closedir(dir);
    return rc;
}

int perta_model_out_commit(struct perta_model_out *out, struct perta_err *err)
{
    return out->has_folder ? perta_publish_commit(&out->folder, err) : 0;
}

void perta_model_out_release(struct perta_model_out *out)
{
    perta_writer_abort(&out->writer);
    perta_digest_free(out->digest);
    perta_publish_release(&out->folder);
    json_decref(out->shards);
    *out = (struct perta_model_out){0};
}
