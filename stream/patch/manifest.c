#include "stream/patch/manifest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/format/checkpoint.h"
#include "io/fpenv.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/lanes.h"

#define PIECE_BYTES (4ull << 20)
/* Memory for a tensor in a manifest, as tree and as text. */
#define TENSOR_BYTES 1000u
/* Memory for a difference, when checking against a manifest. */
#define DIFFERENCE_BYTES 600u

/* One file, and the position in it. */
struct entry {
    char *name, *path;
    struct perta_file file;
    struct perta_header *header; /* NULL: not a safetensors file, or its header is damaged */
    json_t *tensors;
    uint64_t off_bytes, tensor;        /* position of next() */
    struct perta_digest *whole, *part; /* used by commit(): file, current tensor */
};

struct job {
    struct entry *entries; /* (n), sorted by name */
    size_t n;
    bool with_sha256;
    uint64_t later_bytes; /* memory needed after digesting */
    json_t *files;
    struct perta_lanes lanes; /* of entries; used by next() */
};

/* The end of the header, or of the tensor, that off_bytes lies in. */
static uint64_t run_end(const struct entry *e, uint64_t off_bytes, uint64_t tensor)
{
    if (!e->header)
        return e->file.len_bytes;
    if (off_bytes < e->header->len_bytes)
        return e->header->len_bytes;
    const struct perta_tensor *t = &e->header->tensors[tensor];
    return t->off_bytes + t->len_bytes;
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    size_t at;
    while ((at = (size_t)perta_lanes_item(&job->lanes)) < job->n &&
           job->entries[at].off_bytes == job->entries[at].file.len_bytes)
        perta_lanes_end(&job->lanes);
    if (at == job->n)
        return 0;
    struct entry *e = &job->entries[at];
    while (e->header && e->off_bytes >= e->header->len_bytes &&
           run_end(e, e->off_bytes, e->tensor) <= e->off_bytes)
        e->tensor++;
    uint64_t left = run_end(e, e->off_bytes, e->tensor) - e->off_bytes;
    uint64_t n = left < PIECE_BYTES ? left : PIECE_BYTES;
    piece->tag = at;
    piece->tensor = (uint32_t)e->tensor;
    piece->first_elem = e->off_bytes;
    piece->in[0] =
        (struct perta_range){.file = &e->file, .off_bytes = e->off_bytes, .len_bytes = n};
    e->off_bytes += n;
    perta_lanes_took(&job->lanes, n);
    return 1;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    /* Nothing to do: digests need a file's bytes in order, so commit() updates them. */
    (void)ctx;
    (void)worker;
    (void)piece;
    (void)err;
    return 0;
}

static void end_tensor(struct entry *e, uint64_t tensor)
{
    const struct perta_tensor *t = &e->header->tensors[tensor];
    struct perta_digest_hex hex;
    perta_digest_finish(e->part, &hex);
    perta_digest_free(e->part);
    e->part = NULL;
    perta_json_append(&e->tensors, json_pack("{s:s, s:I, s:s}", "name", t->name, "bytes",
                                             (json_int_t)t->len_bytes, "xxh3_128", hex.xxh128));
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    struct entry *e = &job->entries[piece->tag];
    const struct perta_range *in = &piece->in[0];
    perta_digest_update(e->whole, in->data, in->len_bytes);
    if (!e->header || in->off_bytes < e->header->len_bytes)
        return 0;
    if (!e->part && !(e->part = perta_digest_new(false)))
        return perta_fail_sys(err, ENOMEM, "%s", e->path);
    perta_digest_update(e->part, in->data, in->len_bytes);
    if (in->off_bytes + in->len_bytes == run_end(e, in->off_bytes, piece->tensor))
        end_tensor(e, piece->tensor);
    return 0;
}

static int end_file(struct job *job, struct entry *e, struct perta_err *err)
{
    struct perta_digest_hex hex;
    perta_digest_finish(e->whole, &hex);
    json_t *file = json_pack("{s:s, s:I, s:s}", "name", e->name, "bytes",
                             (json_int_t)e->file.len_bytes, "xxh3_128", hex.xxh128);
    if (job->with_sha256)
        perta_json_set(&file, "sha256", json_string(hex.sha256));
    if (e->header)
        perta_json_set(&file, "tensors", json_incref(e->tensors));
    perta_json_append(&job->files, file);
    return perta_file_unchanged(&e->file, err);
}

static int add_entry(struct job *job, const char *dir, const char *name, struct perta_err *err)
{
    struct entry *grown = realloc(job->entries, (job->n + 1) * sizeof *grown);
    if (!grown)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    job->entries = grown;
    struct entry *e = &grown[job->n++];
    *e = (struct entry){.file.fd = -1, .tensors = json_array()};
    e->name = strdup(name);
    e->path = dir ? perta_path_join(dir, name) : strdup(name);
    if (!e->name || !e->path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    return perta_text_is_plain(name)
               ? 0
               : perta_fail(
                     err, PERTA_EINPUT,
                     "%s: has a line break, another control character, or what is not UTF-8 in "
                     "its name; a manifest cannot name it; rename it",
                     e->path);
}

/* For listing a folder's files except skip, which need not exist (st_ino 0). */
struct listing {
    struct job *job;
    const char *dir;
    struct stat skip;
};

static int list_entry(void *ctx, const char *name, struct perta_err *err)
{
    const struct listing *l = ctx;
    struct stat st;
    char *path = perta_path_join(l->dir, name);
    if (!path)
        return perta_fail_sys(err, ENOMEM, "%s", name);
    bool listed = !stat(path, &st) && S_ISREG(st.st_mode) &&
                  (st.st_dev != l->skip.st_dev || st.st_ino != l->skip.st_ino);
    free(path);
    return listed ? add_entry(l->job, l->dir, name, err) : 0;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->name, ((const struct entry *)b)->name);
}

static int list(struct job *job, const char *path, const char *skip, struct perta_err *err)
{
    struct listing listing = {.job = job, .dir = path};
    struct stat st;
    int rc = perta_path_stat(path, &st, err);
    if (!rc && S_ISREG(st.st_mode))
        return add_entry(job, NULL, path, err);
    if (skip && stat(skip, &listing.skip))
        listing.skip = (struct stat){0};
    if (!rc)
        rc = perta_folder_each(path, list_entry, &listing, err);
    if (!rc && !job->n)
        rc = perta_fail(err, PERTA_EINPUT, "%s: no files in it", path);
    if (!rc)
        qsort(job->entries, job->n, sizeof *job->entries, by_name);
    return rc;
}

/* A damaged header is not an error here: the file's own digest will show it. */
static int try_header(struct entry *e, struct perta_err *err)
{
    struct perta_err why = {0};
    struct stat st;
    if (!perta_text_ends_in(e->name, ".safetensors"))
        return 0;
    int fd = perta_open_regular(e->path, &st, err);
    if (fd < 0)
        return fd;
    if (perta_safetensors_read(fd, (uint64_t)st.st_size, e->path, &e->header, &why) == PERTA_ESYS)
        *err = why;
    close(fd);
    return err->code;
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_stream **stream,
                       struct perta_err *err)
{
    struct perta_job sizes = {.ctx = job,
                              .n_in = 1,
                              .in_bytes_max = PIECE_BYTES,
                              .next = next,
                              .work = work,
                              .commit = commit,
                              .later_bytes = job->later_bytes};
    const char **paths = calloc(job->n, sizeof *paths);
    if (!paths)
        return perta_fail_sys(err, ENOMEM, "manifest");
    int rc = 0;
    for (size_t i = 0; i < job->n && !rc; i++) {
        struct stat st;
        paths[i] = job->entries[i].path;
        rc = try_header(&job->entries[i], err);
        if (job->entries[i].header)
            sizes.later_bytes += job->entries[i].header->n_tensors * TENSOR_BYTES;
        if (!stat(paths[i], &st))
            sizes.total_bytes += (uint64_t)st.st_size;
    }
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, job->n, 0, stream, err);
    free(paths);
    for (size_t i = 0; i < job->n && !rc; i++) {
        struct entry *e = &job->entries[i];
        rc = perta_file_open(&e->file, e->path, perta_stream_engine(*stream)->wants_direct, err);
        if (!rc && e->header && e->header->file_len_bytes != e->file.len_bytes)
            rc = perta_fail(err, PERTA_EINPUT, "%s: changed since its header was read", e->path);
        if (!rc && !(e->whole = perta_digest_new(job->with_sha256)))
            rc = perta_fail_sys(err, ENOMEM, "%s", e->path);
        if (!rc)
            perta_digest_offload(e->whole, perta_stream_engine(*stream)->hasher);
    }
    perta_lanes_begin(&job->lanes, job->n, perta_run_threads(run));
    return rc;
}

static void release(struct job *job)
{
    for (size_t i = 0; i < job->n; i++) {
        free(job->entries[i].name);
        free(job->entries[i].path);
        perta_file_close(&job->entries[i].file);
        perta_header_free(job->entries[i].header);
        json_decref(job->entries[i].tensors);
        perta_digest_free(job->entries[i].whole);
        perta_digest_free(job->entries[i].part);
    }
    free(job->entries);
}

/* with_sha256 and later_bytes of job are set by the caller. */
static int digest_all(struct job *job, const char *path, const char *skip,
                      const struct perta_run *run, json_t **manifest, struct perta_err *err)
{
    struct perta_stream *stream = NULL;
    job->files = json_array();
    int rc = list(job, path, skip, err);
    if (!rc)
        rc = open_stream(job, run, &stream, err);
    if (!rc)
        rc = perta_stream_run(stream, err);
    for (size_t i = 0; i < job->n && !rc; i++)
        rc = end_file(job, &job->entries[i], err);
    *manifest = rc ? NULL
                   : json_pack("{s:s, s:i, s:s, s:O}", "format", "perta-manifest", "version", 1,
                               "tool", "perta " PERTA_VERSION, "files", job->files);
    release(job);
    json_decref(job->files);
    perta_stream_close(stream);
    return rc || *manifest ? rc : perta_fail_sys(err, ENOMEM, "%s", path);
}

int perta_manifest(const char *path, bool with_sha256, const char *skip,
                   const struct perta_run *run, json_t **manifest, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_argument needed = {"PATH", path};
    int rc = perta_arguments_begin(run, run, manifest, err);
    if (!rc)
        rc = perta_arguments_needed(&needed, 1, err);
    if (rc)
        return rc;
    struct job job = {.with_sha256 = with_sha256};
    return digest_all(&job, path, skip, run, manifest, err);
}

/* ---- the check ---- */

static json_t *find_named(const json_t *array, const char *name)
{
    size_t i;
    json_t *item;
    json_array_foreach (array, i, item) {
        const char *other = json_string_value(json_object_get(item, "name"));
        if (other && !strcmp(name, other))
            return item;
    }
    return NULL;
}

static void add_difference(json_t **differences, const char *file, const char *tensor,
                           const char *what)
{
    perta_json_append(differences,
                      json_pack("{s:s, s:s?, s:s}", "file", file, "tensor", tensor, "what", what));
}

static void compare_tensors(const char *file, const json_t *want, const json_t *have,
                            json_t **differences)
{
    size_t i;
    json_t *item;
    json_t *by_names = json_object(); /* 100,000 tensors are not unusual */
    json_array_foreach (have, i, item)
        perta_json_set(&by_names, json_string_value(json_object_get(item, "name")),
                       json_incref(item));
    if (!by_names) {
        json_decref(*differences);
        *differences = NULL;
    }
    json_array_foreach (want, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        const json_t *other = name ? json_object_get(by_names, name) : NULL;
        if (!other)
            add_difference(differences, file, name, "is missing");
        else if (!json_equal(item, other))
            add_difference(differences, file, name, "differs");
    }
    json_decref(by_names);
}

static bool same(const json_t *want, const json_t *have, const char *key)
{
    return json_equal(json_object_get(want, key), json_object_get(have, key));
}

static void compare_file(const json_t *want, const json_t *have, json_t **differences)
{
    const char *name = json_string_value(json_object_get(want, "name"));
    if (!have) {
        add_difference(differences, name, NULL, "is missing");
        return;
    }
    if (same(want, have, "xxh3_128") && same(want, have, "bytes")) {
        if (json_object_get(want, "sha256") && !same(want, have, "sha256"))
            add_difference(
                differences, name, NULL,
                "has another SHA-256, though the same XXH3-128: the file or the manifest "
                "was forged");
        return;
    }
    size_t before = json_array_size(*differences);
    const json_t *tensors = json_object_get(have, "tensors");
    if (json_object_get(want, "tensors") && !tensors)
        add_difference(differences, name, NULL,
                       "differs: its header is damaged, so that its tensors cannot be told "
                       "apart");
    else if (tensors)
        compare_tensors(name, json_object_get(want, "tensors"), tensors, differences);
    if (json_array_size(*differences) == before)
        add_difference(differences, name, NULL,
                       tensors ? "differs in its header, not in its tensors" : "differs");
}

/* A job for a check against the manifest: its digests, and memory in case everything differs. */
static struct job job_for(const json_t *manifest)
{
    struct job job = {0};
    size_t i;
    json_t *file;
    json_array_foreach (json_object_get(manifest, "files"), i, file) {
        job.with_sha256 |= json_object_get(file, "sha256") != NULL;
        job.later_bytes +=
            DIFFERENCE_BYTES * (1 + json_array_size(json_object_get(file, "tensors")));
    }
    return job;
}

static int load(const char *path, json_t **manifest, struct perta_err *err)
{
    struct stat st;
    int fd = perta_open_regular(path, &st, err);
    if (fd < 0)
        return fd;
    int rc = perta_json_load(fd, path, manifest, err);
    close(fd);
    if (rc == PERTA_EINPUT)
        return perta_err_context(
            err, "verify reads manifests in perta's format; for the others use xxhsum --check "
                 "or sha256sum --check");
    if (rc)
        return rc;
    const char *format = json_string_value(json_object_get(*manifest, "format"));
    if (!format || strcmp(format, "perta-manifest") ||
        !json_is_array(json_object_get(*manifest, "files")))
        return perta_fail(err, PERTA_EINPUT, "%s: not a manifest that perta wrote", path);
    size_t i;
    json_t *file;
    json_array_foreach (json_object_get(*manifest, "files"), i, file)
        if (!json_is_string(json_object_get(file, "name")))
            return perta_fail(err, PERTA_EINPUT, "%s: files[%zu] has no name", path, i);
    return 0;
}

int perta_manifest_verify(const char *path, const char *manifest_path, const struct perta_run *run,
                          json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_argument needed[] = {{"PATH", path}, {"--manifest FILE", manifest_path}};
    int rc = perta_arguments_begin(run, run, summary, err);
    if (!rc)
        rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (rc)
        return rc;
    json_t *want = NULL, *have = NULL;
    rc = load(manifest_path, &want, err);
    struct job job = job_for(want);
    if (!rc)
        rc = digest_all(&job, path, manifest_path, run, &have, err);
    if (rc)
        goto out;
    json_t *differences = json_array(), *unlisted = json_array();
    const json_t *want_files = json_object_get(want, "files");
    const json_t *have_files = json_object_get(have, "files");
    size_t i;
    json_t *item;
    json_array_foreach (want_files, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        compare_file(item, find_named(have_files, name), &differences);
    }
    json_array_foreach (have_files, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        if (!find_named(want_files, name))
            perta_json_append(&unlisted, json_string(name));
    }
    *summary = json_pack("{s:I, s:o, s:o}", "files", (json_int_t)json_array_size(want_files),
                         "differences", differences, "unlisted", unlisted);
    if (!*summary)
        rc = perta_fail_sys(err, ENOMEM, "%s", path);
    else if (json_array_size(differences))
        rc = perta_fail(err, PERTA_ECHECK, "%s: %zu differences from %s", path,
                        json_array_size(differences), manifest_path);
out:
    json_decref(want);
    json_decref(have);
    return rc;
}
