/* Check a patch without the model it is for. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "io/hash.h"
#include "io/text.h"
#include "stream/manifest.h"
#include "stream/patch_in.h"

struct job {
    struct perta_patch_in patch;
    json_t *differences;
    struct {
        ZSTD_DCtx *zstd;
        void *payload;
    } *scratch; /* (n_workers) */
    unsigned n_workers;
    uint64_t payload_max;
    uint64_t n_frames;
    /* where next() stands: piece 0 of a shard is its head, then frames, then its table */
    uint32_t shard;
    uint64_t entry;
    bool head_done;
    /* the owner's, for commit() */
    struct perta_digest *digest;
    struct perta_hasher *hasher; /* the stream's */
};

enum { HEAD, FRAME, TABLE };

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    while (job->shard < job->patch.n_shards && !job->patch.shards[job->shard].patch)
        job->shard++;
    if (job->shard == job->patch.n_shards)
        return 0;
    struct perta_patch_in_shard *shard = &job->patch.shards[job->shard];
    const struct perta_patch *p = shard->patch;
    struct perta_range *in = &piece->in[0];
    piece->shard = job->shard;
    piece->out_bytes = sizeof(uint64_t);
    in->file = &shard->file;
    if (!job->head_done) {
        piece->tensor = HEAD;
        in->len_bytes = p->head_bytes;
        job->head_done = true;
        job->entry = 0;
        return 1;
    }
    while (job->entry < p->n_entries && p->entries[job->entry].encoding == PERTA_ENC_ZERO)
        job->entry++;
    if (job->entry < p->n_entries) {
        piece->tensor = FRAME;
        piece->tag = job->entry;
        in->off_bytes = p->entries[job->entry].frame_off;
        in->len_bytes = p->entries[job->entry++].frame_bytes;
        return 1;
    }
    piece->tensor = TABLE;
    in->off_bytes = p->table_off;
    in->len_bytes = p->file_bytes - p->table_off;
    job->head_done = false;
    job->shard++;
    return 1;
}

/* zstd checks each frame by its own checksum. The piece's room tells whether it is good. */
static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    uint64_t *bad = (uint64_t *)(void *)piece->out;
    *bad = 0;
    if (piece->tensor != FRAME)
        return 0;
    uint64_t wanted = job->patch.shards[piece->shard].patch->entries[piece->tag].payload_bytes;
    size_t got = ZSTD_decompressDCtx(job->scratch[worker].zstd, job->scratch[worker].payload,
                                     job->payload_max, piece->in[0].data, piece->in[0].len_bytes);
    *bad = ZSTD_isError(got) || got != wanted ||
           !perta_codec_is_frame(piece->in[0].data, piece->in[0].len_bytes, wanted);
    return 0;
}

static json_t *differ(struct job *job, uint32_t shard, const char *tensor, json_t *what)
{
    json_t *item = json_pack("{s:s, s:s?, s:o}", "file", job->patch.shards[shard].file_name,
                             "tensor", tensor, "what", what);
    json_array_append_new(job->differences, item);
    return item;
}

/* Of a file that is missing, or whose head or table is damaged. */
static void note_damage(void *ctx, uint32_t shard, const char *message)
{
    struct job *job = ctx;
    /* Messages start with the path, which the item has. */
    size_t path = strlen(job->patch.shards[shard].path);
    bool has_path = !strncmp(message, job->patch.shards[shard].path, path) &&
                    !strncmp(message + path, ": ", 2);
    differ(job, shard, NULL, perta_text_json("%s", has_path ? message + path + 2 : message));
}

static uint64_t first_unit(const struct perta_patch *p, uint64_t entry)
{
    uint64_t first = 0;
    while (entry && p->entries[entry - 1].tensor == p->entries[entry].tensor)
        first += p->entries[--entry].n_units;
    return first;
}

static void note_frame(struct job *job, const struct perta_piece *piece)
{
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *e = &shard->patch->entries[piece->tag];
    unsigned long long first = first_unit(shard->patch, piece->tag);
    json_t *item = differ(job, piece->shard, shard->patch->after->tensors[e->tensor].name,
                          json_sprintf("frame at byte %llu (elements %llu to %llu) is damaged",
                                       (unsigned long long)e->frame_off, first,
                                       first + e->n_units - 1));
    json_object_set_new(item, "first", json_integer((json_int_t)first));
    json_object_set_new(item, "elements", json_integer((json_int_t)e->n_units));
}

static void end_file(struct job *job, uint32_t shard)
{
    const json_t *outputs = json_object_get(job->patch.manifest, "outputs");
    const json_t *listed = json_array_get(json_object_get(outputs, "patch"), shard);
    struct perta_digest_hex hex;
    perta_digest_finish(job->digest, &hex);
    perta_digest_free(job->digest);
    job->digest = NULL;
    const char *sha256 = json_string_value(json_object_get(listed, "sha256"));
    if (!sha256 || strcmp(sha256, hex.sha256))
        differ(job, shard, NULL,
               json_sprintf("SHA-256 %s, manifest.json says %s", hex.sha256,
                            sha256 ? sha256 : "nothing"));
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    if (!job->digest) {
        if (!(job->digest = perta_digest_new(true)))
            return perta_fail_sys(err, ENOMEM, "digest");
        perta_digest_behind(job->digest, job->hasher);
    }
    perta_digest_update(job->digest, piece->in[0].data, piece->in[0].len_bytes);
    job->n_frames += piece->tensor == FRAME;
    if (*(const uint64_t *)(const void *)piece->out)
        note_frame(job, piece);
    if (piece->tensor == TABLE)
        end_file(job, piece->shard);
    return 0;
}

static void measure(struct job *job, struct perta_job *sizes)
{
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        if (!p)
            continue;
        uint64_t most = p->file_bytes - p->table_off;
        most = p->head_bytes > most ? p->head_bytes : most;
        for (uint64_t e = 0; e < p->n_entries; e++) {
            most = p->entries[e].frame_bytes > most ? p->entries[e].frame_bytes : most;
            if (p->entries[e].payload_bytes > job->payload_max)
                job->payload_max = p->entries[e].payload_bytes;
        }
        sizes->in_bytes_max = most > sizes->in_bytes_max ? most : sizes->in_bytes_max;
        sizes->total_bytes += p->file_bytes;
    }
}

static int make_scratch(struct job *job, struct perta_err *err)
{
    job->scratch = calloc(job->n_workers, sizeof *job->scratch);
    for (unsigned i = 0; job->scratch && i < job->n_workers; i++) {
        job->scratch[i].zstd = ZSTD_createDCtx();
        job->scratch[i].payload = malloc(job->payload_max + 1);
        if (!job->scratch[i].zstd || !job->scratch[i].payload)
            return perta_fail_sys(err, ENOMEM, "verify");
        memset(job->scratch[i].payload, 1, job->payload_max); /* resident from now on; gcc makes calloc of 0 */
    }
    return job->scratch ? 0 : perta_fail_sys(err, ENOMEM, "verify");
}

static int run_all(struct job *job, const struct perta_run *run, struct perta_stream **stream,
                   struct perta_err *err)
{
    struct perta_job sizes = {.ctx = job,
                              .n_in = 1,
                              .out_bytes_max = sizeof(uint64_t),
                              .next = next,
                              .work = work,
                              .commit = commit};
    measure(job, &sizes);
    int rc = make_scratch(job, err);
    const char **paths = NULL;
    size_t n_paths = 0;
    if (!rc)
        rc = perta_patch_in_paths(&job->patch, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, 0, stream, err);
    free(paths);
    if (!rc)
        rc = perta_patch_in_open_files(&job->patch, perta_stream_engine(*stream)->wants_direct,
                                       err);
    if (rc)
        return rc;
    job->hasher = perta_stream_engine(*stream)->hasher;
    return perta_stream_run(*stream, err);
}

int perta_patch_verify(const char *path, const struct perta_run *run, json_t **summary,
                       struct perta_err *err)
{
    struct job job = {.differences = json_array(), .n_workers = perta_run_threads(run)};
    struct perta_stream *stream = NULL;
    *summary = NULL;
    int rc = perta_patch_in_open_damaged(&job.patch, path, note_damage, &job, err);
    if (!rc)
        rc = run_all(&job, run, &stream, err);
    if (!rc) {
        *summary = json_pack("{s:I, s:I, s:O}", "files", (json_int_t)job.patch.n_shards,
                             "frames", (json_int_t)job.n_frames, "differences", job.differences);
        if (json_array_size(job.differences))
            rc = perta_fail(err, PERTA_ECHECK, "%s: %zu differences", path,
                            json_array_size(job.differences));
    }
    for (unsigned i = 0; job.scratch && i < job.n_workers; i++) {
        ZSTD_freeDCtx(job.scratch[i].zstd);
        free(job.scratch[i].payload);
    }
    free(job.scratch);
    perta_digest_free(job.digest);
    perta_patch_in_close(&job.patch);
    json_decref(job.differences);
    perta_stream_close(stream);
    return rc;
}
