/* Check that a model is one of the two sides of a patch, chunk by chunk, to the end. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/format/checkpoint.h"
#include "io/fpenv.h"
#include "io/hash.h"
#include "io/publish/publish.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/patch/manifest.h"
#include "stream/patch/patch_in.h"
#include "stream/walk.h"

typedef unsigned long long ull;

/* One shard of the model. Its layout is taken from the patch, because its own header may be
 * damaged. */
struct shard {
    char *path;
    bool readable; /* its chunks are where the patch says */
    struct perta_file file;
};

struct job {
    const char *model;
    bool applied; /* which side it should be */
    struct perta_patch_in patch;
    struct shard *shards; /* (patch.n_shards) */
    json_t *damaged;
    uint64_t n_chunks;
    /* position of next(): chunks in order of the table */
    uint32_t shard;
    uint64_t entry, unit;               /* unit: that chunk's first unit in its tensor */
    const struct perta_tensor **places; /* this shard's tensors, in order of after; or NULL */
};

/* The result that work() leaves for commit(). */
struct result {
    uint64_t digest;
    bool missing; /* the file ends before the chunk does */
};

static const struct perta_header *wanted_header(const struct job *job, uint32_t shard)
{
    const struct perta_patch *p = job->patch.shards[shard].patch;
    return job->applied ? p->after : p->before;
}

static const struct perta_header *other_header(const struct job *job, uint32_t shard)
{
    const struct perta_patch *p = job->patch.shards[shard].patch;
    return job->applied ? p->before : p->after;
}

/* ---- what differs ---- */

static void note(struct job *job, uint32_t shard, const struct perta_piece *piece, json_t *what)
{
    json_t *item = json_pack("{s:s, s:o}", "shard", job->patch.shards[shard].name, "message", what);
    if (piece) {
        const struct perta_patch *p = job->patch.shards[shard].patch;
        const char *tensor = p->after->tensors[p->entries[piece->tag].tensor].name;
        perta_json_set(&item, "tensor", json_string(tensor));
        perta_json_set(&item, "first", json_integer((json_int_t)piece->first_elem));
        perta_json_set(&item, "elements", json_integer((json_int_t)piece->n_elems));
    }
    perta_json_append(&job->damaged, item);
}

static const char *which_side(const struct job *job, bool is_other)
{
    return !is_other      ? "it is for another model, or one of the two is damaged"
           : job->applied ? "here the patch is not applied"
                          : "here the patch is applied already";
}

static void note_chunk(struct job *job, const struct perta_piece *piece, const struct result *found)
{
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *e = &shard->patch->entries[piece->tag];
    const char *path = job->shards[piece->shard].path;
    const char *tensor = shard->patch->after->tensors[e->tensor].name;
    uint64_t wanted = job->applied ? e->hash_after : e->hash_before;
    uint64_t other = job->applied ? e->hash_before : e->hash_after;
    ull first = piece->first_elem, last = piece->first_elem + piece->n_elems - 1;
    note(job, piece->shard, piece,
         found->missing
             ? perta_text_json("%s: tensor %s, elements %llu to %llu: beyond the end of the file",
                               path, tensor, first, last)
             : perta_text_json("%s: tensor %s, elements %llu to %llu: digest %016llx, the patch %s "
                               "wants %016llx: %s",
                               path, tensor, first, last, (ull)found->digest, shard->path,
                               (ull)wanted, which_side(job, found->digest == other)));
}

/* ---- opening ---- */

static bool same(const struct perta_header *header, const uint8_t *bytes, uint64_t n)
{
    return n == header->len_bytes && !memcmp(bytes, header->bytes, n);
}

/* Compare the file's header and length with the patch's. */
static int compare_header(struct job *job, uint32_t i, int fd, uint64_t file_bytes,
                          struct perta_err *err)
{
    const struct perta_header *want = wanted_header(job, i), *other = other_header(job, i);
    struct shard *shard = &job->shards[i];
    const char *patch = job->patch.shards[i].path;
    uint64_t most = perta_max(want->len_bytes, other->len_bytes);
    uint64_t have = most < file_bytes ? most : file_bytes;
    uint8_t *bytes = malloc(have + 1);
    if (!bytes)
        return perta_fail_sys(err, ENOMEM, "%s", shard->path);
    int rc = perta_pread_all(fd, bytes, have, 0, shard->path, err);
    bool equal = !rc && have >= want->len_bytes && same(want, bytes, want->len_bytes);
    bool is_other = !rc && have >= other->len_bytes && same(other, bytes, other->len_bytes);
    shard->readable = !rc && (equal || file_bytes == want->file_len_bytes);
    if (!rc && !equal)
        note(job, i, NULL,
             perta_text_json(
                 "%s: header digest %016llx, the patch %s wants %016llx: %s", shard->path,
                 (ull)perta_hash64(bytes, have < want->len_bytes ? have : want->len_bytes), patch,
                 (ull)perta_hash64(want->bytes, want->len_bytes), which_side(job, is_other)));
    if (!rc && file_bytes != want->file_len_bytes)
        note(job, i, NULL,
             perta_text_json("%s: %llu bytes, the patch %s wants %llu", shard->path,
                             (ull)file_bytes, patch, (ull)want->file_len_bytes));
    free(bytes);
    return rc;
}

static int look_at(struct job *job, uint32_t i, struct perta_err *err)
{
    struct shard *shard = &job->shards[i];
    int fd = shard->path ? perta_open_any(shard->path, O_RDONLY) : -1;
    struct stat st;
    if (fd < 0 && shard->path && errno != ENOENT && errno != ENOTDIR)
        return perta_fail_sys(err, errno, "%s", shard->path);
    if (fd < 0) {
        note(job, i, NULL,
             perta_text_json("%s: missing in %s", job->patch.shards[i].name, job->model));
        return 0;
    }
    int rc = 0;
    if (fstat(fd, &st))
        rc = perta_fail_sys(err, errno, "%s", shard->path);
    else if (!S_ISREG(st.st_mode))
        note(job, i, NULL, perta_text_json("%s: not a regular file", shard->path));
    else
        rc = compare_header(job, i, fd, (uint64_t)st.st_size, err);
    close(fd);
    return rc;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int find_shards(struct job *job, struct perta_err *err)
{
    struct stat st;
    int rc = perta_path_stat(job->model, &st, err);
    if (rc)
        return rc;
    job->shards = calloc(job->patch.n_shards + 1, sizeof *job->shards);
    if (!job->shards)
        return perta_fail_sys(err, ENOMEM, "%s", job->model);
    for (uint32_t i = 0; i < job->patch.n_shards; i++)
        job->shards[i].file.fd = -1;
    for (uint32_t i = 0; i < job->patch.n_shards; i++) {
        const char *name = job->patch.shards[i].name;
        bool is_file = !S_ISDIR(st.st_mode);
        if (!is_file)
            job->shards[i].path = perta_path_join(job->model, name);
        else if (!strcmp(base_name(job->model), name))
            job->shards[i].path = strdup(job->model);
        if (!job->shards[i].path && !is_file)
            return perta_fail_sys(err, ENOMEM, "%s", name);
        rc = look_at(job, i, err);
        if (rc)
            return rc;
    }
    return 0;
}

/* Find shards of the model that the patch does not have. If the checkpoint cannot be opened, the
 * caller reports that, unless something else was found. */
static int check_others(struct job *job, struct perta_err *err)
{
    struct perta_checkpoint *ck = NULL;
    int rc = perta_checkpoint_open(job->model, &ck, err);
    for (uint32_t i = 0; ck && i < ck->n_shards; i++) {
        bool known = false;
        for (uint32_t k = 0; k < job->patch.n_shards && !known; k++)
            known = !strcmp(ck->shards[i].name, job->patch.shards[k].name);
        if (!known)
            perta_json_append(
                &job->damaged,
                json_pack("{s:s, s:o}", "shard", ck->shards[i].name, "message",
                          perta_text_json("%s: not in the patch %s: it is for another model",
                                          ck->shards[i].path, job->patch.path)));
    }
    perta_checkpoint_close(ck);
    return rc;
}

/* ---- the run ---- */

/* Find where each tensor of the shard is: the table is in the order of the header after. */
static int index_shard(struct job *job, struct perta_err *err)
{
    const struct perta_header *after = job->patch.shards[job->shard].patch->after;
    const struct perta_header *header = wanted_header(job, job->shard);
    free(job->places);
    job->places = header == after ? NULL : perta_header_match(after, header);
    return header == after || job->places
               ? 0
               : perta_fail_sys(err, ENOMEM, "%s", job->shards[job->shard].path);
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    while (job->shard < job->patch.n_shards &&
           (!job->shards[job->shard].readable ||
            job->entry == job->patch.shards[job->shard].patch->n_entries)) {
        job->shard++;
        job->entry = job->unit = 0;
    }
    if (job->shard == job->patch.n_shards)
        return 0;
    int rc = job->entry ? 0 : index_shard(job, err);
    if (rc)
        return rc;
    const struct perta_patch *p = job->patch.shards[job->shard].patch;
    const struct perta_patch_entry *e = &p->entries[job->entry];
    const struct perta_tensor *t =
        job->places ? job->places[e->tensor] : &p->after->tensors[e->tensor];
    struct perta_file *file = &job->shards[job->shard].file;
    uint64_t width = perta_dtype_unit_bytes(t->dtype);
    uint64_t at = t->off_bytes + job->unit * width;
    piece->shard = job->shard;
    piece->tensor = e->tensor;
    piece->tag = job->entry;
    piece->first_elem = job->unit;
    piece->n_elems = e->n_units;
    piece->out_bytes = sizeof(struct result);
    if (at + e->n_units * width <= file->len_bytes)
        piece->in[0] =
            (struct perta_range){.file = file, .off_bytes = at, .len_bytes = e->n_units * width};
    job->unit += e->n_units;
    job->entry++;
    if (job->entry == p->n_entries || p->entries[job->entry].tensor != e->tensor)
        job->unit = 0;
    return 1;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    (void)ctx;
    (void)worker;
    (void)err;
    const struct perta_range *in = &piece->in[0];
    struct result *result = (struct result *)(void *)piece->out;
    *result = (struct result){.missing = !in->file};
    if (in->file)
        result->digest = perta_hash64(in->data, in->len_bytes);
    return 0;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    const struct result *found = (const struct result *)(const void *)piece->out;
    const struct perta_patch_entry *e = &job->patch.shards[piece->shard].patch->entries[piece->tag];
    job->n_chunks++;
    if (found->missing || found->digest != (job->applied ? e->hash_after : e->hash_before))
        note_chunk(job, piece, found);
    return 0;
}

/* Memory of a chunk in the list of differences, without its paths. */
#define DIFFERENCE_BYTES 1100u

static void measure(const struct job *job, struct perta_job *sizes)
{
    uint64_t places = 0;
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        const struct perta_header *header = wanted_header(job, s);
        uint64_t match = header == p->after ? 0 : PERTA_MATCH_BYTES(header->n_tensors);
        if (!job->shards[s].readable)
            continue;
        for (uint64_t t = 0; t < header->n_tensors; t++) {
            uint64_t chunk = perta_walk_chunk_bytes(&header->tensors[t]);
            sizes->in_bytes_max = perta_max(chunk, sizes->in_bytes_max);
            sizes->total_bytes += header->tensors[t].len_bytes;
        }
        /* all of them may differ */
        sizes->later_bytes += p->n_entries * (DIFFERENCE_BYTES + strlen(job->shards[s].path) +
                                              strlen(job->patch.shards[s].path));
        places = perta_max(match, places);
    }
    sizes->later_bytes += places;
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_stream **stream,
                       struct perta_err *err)
{
    struct perta_job sizes = {.ctx = job,
                              .n_in = 1,
                              .out_bytes_max = sizeof(struct result),
                              .next = next,
                              .work = work,
                              .commit = commit};
    const char **paths = calloc(job->patch.n_shards + 1, sizeof *paths);
    size_t n = 0;
    if (!paths)
        return perta_fail_sys(err, ENOMEM, "verify");
    for (uint32_t i = 0; i < job->patch.n_shards; i++)
        if (job->shards[i].readable)
            paths[n++] = job->shards[i].path;
    measure(job, &sizes);
    int rc = perta_stream_open(run, &sizes, paths, n, 0, stream, err);
    free(paths);
    for (uint32_t i = 0; i < job->patch.n_shards && !rc; i++)
        if (job->shards[i].readable)
            rc = perta_file_open(&job->shards[i].file, job->shards[i].path,
                                 perta_stream_engine(*stream)->wants_direct, err);
    return rc;
}

static int run_all(struct job *job, const struct perta_run *run, struct perta_stream **stream,
                   struct perta_err *err)
{
    int rc = open_stream(job, run, stream, err);
    if (!rc)
        rc = perta_stream_run(*stream, err);
    for (uint32_t i = 0; i < job->patch.n_shards && !rc; i++)
        if (job->shards[i].readable)
            rc = perta_file_unchanged(&job->shards[i].file, err);
    return rc;
}

/* List what is wrong, and then make an error of it. */
static int conclude(const struct job *job, const struct perta_err *others, json_t **summary,
                    const struct perta_stream *stream, struct perta_err *err)
{
    size_t n = json_array_size(job->damaged);
    if (job->damaged && !n && others->code) {
        *err = *others;
        return err->code;
    }
    *summary = json_pack("{s:I, s:I, s:O}", "chunks", (json_int_t)job->n_chunks, "read_bytes",
                         (json_int_t)perta_stream_read_bytes(stream), "damaged", job->damaged);
    if (!*summary)
        return perta_fail_sys(err, ENOMEM, "%s", job->model);
    return n ? perta_fail(err, PERTA_ECHECK, "%s: %zu differences from the patch %s", job->model, n,
                          job->patch.path)
             : 0;
}

static void release(struct job *job)
{
    for (uint32_t i = 0; job->shards && i < job->patch.n_shards; i++) {
        free(job->shards[i].path);
        perta_file_close(&job->shards[i].file);
    }
    free(job->shards);
    perta_patch_in_close(&job->patch);
    json_decref(job->damaged);
    free(job->places);
}

int perta_model_verify(const char *model, const char *patch, bool applied,
                       const struct perta_run *run, json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_argument needed[] = {{"PATH (model)", model}, {"--patch DIR", patch}};
    int rc = perta_arguments_begin(run, run, summary, err);
    if (!rc)
        rc = perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
    if (rc)
        return rc;
    struct job job = {.model = model, .applied = applied, .damaged = json_array()};
    struct perta_stream *stream = NULL;
    struct perta_err others = {0};
    rc = perta_patch_in_open(&job.patch, patch, err);
    if (!rc && !applied)
        rc = perta_patch_in_refuse_one_way(&job.patch,
                                           "--applied can be verified, --original cannot", err);
    if (!rc)
        rc = find_shards(&job, err);
    if (!rc && check_others(&job, &others) == PERTA_ESYS) {
        *err = others;
        rc = err->code;
    }
    if (!rc && run->dry_run)
        rc = (*summary = json_object()) ? 0 : perta_fail_sys(err, ENOMEM, "%s", model);
    else if (!rc && !(rc = run_all(&job, run, &stream, err)))
        rc = conclude(&job, &others, summary, stream, err);
    release(&job);
    perta_stream_close(stream);
    return rc;
}
