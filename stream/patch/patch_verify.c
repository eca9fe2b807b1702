/* Check a patch without its model: every byte against the manifest's SHA-256, and that frames are
 * frames. In files that differ, all frames are then decompressed, to find the damaged ones. */
#define ZSTD_STATIC_LINKING_ONLY
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "io/checked.h"
#include "io/fpenv.h"
#include "io/hash.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/lanes.h"
#include "stream/patch/manifest.h"
#include "stream/patch/patch_in.h"

struct job {
    struct perta_patch_in patch;
    json_t *differences;
    struct {
        struct perta_digest *digest;
        bool suspect; /* its digest differs, or it has an invalid frame */
        /* position of next(): the head, then frames, then the table */
        bool head_done, done;
        uint64_t entry;
    } *files;                 /* (n_shards) */
    struct perta_lanes lanes; /* of files */
    struct {
        ZSTD_DCtx *zstd;
        void *payload;
    } *scratch; /* (n_workers), to decompress */
    unsigned n_workers;
    uint64_t payload_max;
    uint64_t n_frames;
    struct perta_hasher *hasher; /* the stream's */
};

enum { HEAD, FRAME, TABLE };

/* Reads are at least this large, where frames are smaller. */
#define READ_BYTES (2ull << 20)

/* Set piece to the next frame of the file. False if there is none. */
static bool next_frame(struct job *job, uint64_t i, struct perta_piece *piece)
{
    struct perta_patch_in_shard *shard = &job->patch.shards[i];
    const struct perta_patch *p = shard->patch;
    uint64_t *entry = &job->files[i].entry;
    while (*entry < p->n_entries && p->entries[*entry].encoding == PERTA_ENC_ZERO)
        ++*entry;
    if (*entry == p->n_entries)
        return false;
    piece->shard = (uint32_t)i;
    piece->tensor = FRAME;
    piece->tag = *entry;
    piece->out_bytes = sizeof(uint64_t);
    perta_patch_in_frame(shard, &p->entries[*entry], &piece->in[0]);
    ++*entry;
    return true;
}

/* A frame's piece->out says whether the frame is bad. */
static uint64_t *verdict(const struct perta_piece *piece)
{
    return (uint64_t *)(void *)piece->out;
}

static bool is_frame(const struct job *job, const struct perta_piece *piece)
{
    const struct perta_patch *p = job->patch.shards[piece->shard].patch;
    return perta_codec_is_frame(piece->in[0].data, piece->in[0].len_bytes,
                                p->entries[piece->tag].payload_bytes);
}

/* ---- all bytes of all files ---- */

static void next_part(struct job *job, uint64_t i, struct perta_piece *piece)
{
    struct perta_patch_in_shard *shard = &job->patch.shards[i];
    const struct perta_patch *p = shard->patch;
    piece->shard = (uint32_t)i;
    piece->in[0].file = &shard->file;
    if (!job->files[i].head_done) {
        piece->tensor = HEAD;
        piece->in[0].len_bytes = p->head_bytes;
        job->files[i].head_done = true;
    } else if (!next_frame(job, i, piece)) {
        piece->tensor = TABLE;
        piece->in[0].off_bytes = p->table_off;
        piece->in[0].len_bytes = p->file_bytes - p->table_off;
        job->files[i].done = true;
    }
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    uint64_t i;
    while ((i = perta_lanes_item(&job->lanes)) < job->patch.n_shards &&
           (!job->patch.shards[i].patch || job->files[i].done))
        perta_lanes_end(&job->lanes);
    if (i == job->patch.n_shards)
        return 0;
    next_part(job, i, piece);
    perta_lanes_took(&job->lanes, piece->in[0].len_bytes);
    return 1;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    (void)worker;
    (void)err;
    if (piece->tensor == FRAME)
        *verdict(piece) = !is_frame(ctx, piece);
    return 0;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    struct perta_digest **digest = &job->files[piece->shard].digest;
    if (!*digest) {
        if (!(*digest = perta_digest_new(true)))
            return perta_fail_sys(err, ENOMEM, "digest");
        perta_digest_offload(*digest, job->hasher);
    }
    perta_digest_update(*digest, piece->in[0].data, piece->in[0].len_bytes);
    if (piece->tensor == FRAME) {
        job->n_frames++;
        job->files[piece->shard].suspect |= *verdict(piece);
    }
    return 0;
}

/* ---- what differs ---- */

/* A difference; the caller adds it to job->differences. */
static json_t *differ(const struct job *job, uint32_t shard, const char *tensor, json_t *what)
{
    return json_pack("{s:s, s:s?, s:o}", "file", job->patch.shards[shard].file_name, "tensor",
                     tensor, "what", what);
}

/* Note a file that is missing, or whose head or table is damaged. */
static void note_damage(void *ctx, uint32_t shard, const char *message)
{
    struct job *job = ctx;
    /* Remove the path in front of the message: the item has it already. */
    size_t path = strlen(job->patch.shards[shard].path);
    bool has_path =
        !strncmp(message, job->patch.shards[shard].path, path) && !strncmp(message + path, ": ", 2);
    perta_json_append(
        &job->differences,
        differ(job, shard, NULL, perta_text_json("%s", has_path ? message + path + 2 : message)));
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
    json_t *item =
        differ(job, piece->shard, shard->patch->after->tensors[e->tensor].name,
               json_sprintf("frame at byte %llu (elements %llu to %llu) is damaged",
                            (unsigned long long)e->frame_off, first, first + e->n_units - 1));
    perta_json_set(&item, "first", json_integer((json_int_t)first));
    perta_json_set(&item, "elements", json_integer((json_int_t)e->n_units));
    perta_json_append(&job->differences, item);
}

static void compare_digest(struct job *job, uint32_t shard)
{
    const json_t *outputs = json_object_get(job->patch.manifest, "outputs");
    const json_t *listed = json_array_get(json_object_get(outputs, "patch"), shard);
    struct perta_digest_hex hex;
    perta_digest_finish(job->files[shard].digest, &hex);
    const char *sha256 = json_string_value(json_object_get(listed, "sha256"));
    if (sha256 && !strcmp(sha256, hex.sha256))
        return;
    job->files[shard].suspect = true;
    perta_json_append(&job->differences,
                      differ(job, shard, NULL,
                             json_sprintf("SHA-256 %s, manifest.json says %s", hex.sha256,
                                          sha256 ? sha256 : "nothing")));
}

/* ---- frames of files that differ ---- */

static int next_suspect(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    uint64_t i;
    while ((i = perta_lanes_item(&job->lanes)) < job->patch.n_shards &&
           (!job->files[i].suspect || !next_frame(job, i, piece)))
        perta_lanes_end(&job->lanes);
    return i < job->patch.n_shards;
}

/* zstd checks each frame against its own checksum. */
static int unpack(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    uint64_t wanted = job->patch.shards[piece->shard].patch->entries[piece->tag].payload_bytes;
    size_t got = ZSTD_decompressDCtx(job->scratch[worker].zstd, job->scratch[worker].payload,
                                     job->payload_max, piece->in[0].data, piece->in[0].len_bytes);
    *verdict(piece) = ZSTD_isError(got) || got != wanted || !is_frame(job, piece);
    return 0;
}

static int commit_suspect(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    if (*verdict(piece))
        note_frame(ctx, piece);
    return 0;
}

/* ---- the run ---- */

/* Memory of a damaged frame in the list of differences, without the names of its file and
 * tensor. */
#define DIFFERENCE_BYTES 900u

static void measure(struct job *job, struct perta_job *sizes)
{
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        if (!p)
            continue;
        uint64_t most = perta_max(p->head_bytes, p->file_bytes - p->table_off);
        for (uint64_t e = 0; e < p->n_entries; e++) {
            most = perta_max(p->entries[e].frame_bytes, most);
            job->payload_max = perta_max(p->entries[e].payload_bytes, job->payload_max);
            if (p->entries[e].encoding != PERTA_ENC_ZERO) /* all of them may be damaged */
                sizes->later_bytes += DIFFERENCE_BYTES + strlen(job->patch.shards[s].file_name);
        }
        sizes->in_bytes_max = perta_max(perta_max(most, READ_BYTES), sizes->in_bytes_max);
        sizes->total_bytes += p->file_bytes;
    }
}

static uint64_t scratch_bytes(const struct job *job)
{
    return job->payload_max + 1 + ZSTD_estimateDCtxSize();
}

static int make_scratch(struct job *job, unsigned n_workers, struct perta_err *err)
{
    job->n_workers = n_workers;
    job->scratch = calloc(job->n_workers, sizeof *job->scratch);
    for (unsigned i = 0; job->scratch && i < job->n_workers; i++) {
        job->scratch[i].zstd = ZSTD_createDCtx();
        job->scratch[i].payload = malloc(job->payload_max + 1);
        if (!job->scratch[i].zstd || !job->scratch[i].payload)
            return perta_fail_sys(err, ENOMEM, "verify");
    }
    return job->scratch ? 0 : perta_fail_sys(err, ENOMEM, "verify");
}

static int run_stream(struct job *job, struct perta_stream *stream, struct perta_err *err)
{
    struct perta_engine *engine = perta_stream_engine(stream);
    job->hasher = engine->hasher;
    int rc = perta_patch_in_open_files(&job->patch, engine->wants_direct, err);
    if (!rc)
        rc = perta_stream_run(stream, err);
    return rc ? rc : perta_patch_in_unchanged(&job->patch, err);
}

static int run_once(struct job *job, const struct perta_run *run, const struct perta_job *sizes,
                    struct perta_err *err)
{
    struct perta_stream *stream = NULL;
    const char **paths = NULL;
    size_t n_paths = 0;
    int rc = perta_patch_in_paths(&job->patch, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, sizes, paths, n_paths, 0, &stream, err);
    free(paths);
    if (!rc && sizes->work == unpack)
        rc = make_scratch(job, perta_stream_workers(stream), err);
    if (!rc)
        rc = run_stream(job, stream, err);
    perta_stream_close(stream);
    return rc;
}

/* Finish all digests first: those of one file are computed while the next one is read. */
static int run_all(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = {.ctx = job,
                              .n_in = 1,
                              .out_bytes_max = sizeof(uint64_t),
                              .next = next,
                              .work = work,
                              .commit = commit};
    measure(job, &sizes);
    job->files = calloc(job->patch.n_shards + 1, sizeof *job->files);
    if (!job->files)
        return perta_fail_sys(err, ENOMEM, "verify");
    perta_lanes_begin(&job->lanes, job->patch.n_shards, perta_run_threads(run));
    /* The memory for examining damaged files is planned before it is known whether there are
     * any. */
    sizes.worker_bytes = scratch_bytes(job);
    int rc = run_once(job, run, &sizes, err);
    bool any = false;
    for (uint32_t i = 0; i < job->patch.n_shards && !rc; i++) {
        if (job->files[i].digest)
            compare_digest(job, i);
        any |= job->files[i].suspect;
    }
    if (rc || !any)
        return rc;
    sizes.next = next_suspect;
    sizes.work = unpack;
    sizes.commit = commit_suspect;
    for (uint32_t i = 0; i < job->patch.n_shards; i++)
        job->files[i].entry = 0;
    perta_lanes_begin(&job->lanes, job->patch.n_shards, 1); /* so that they are listed in order */
    return run_once(job, run, &sizes, err);
}

int perta_patch_verify(const char *path, const struct perta_run *run, json_t **summary,
                       struct perta_err *err)
{
    PERTA_FP_SCOPE;
    const struct perta_argument needed = {"PATH", path};
    int rc = perta_arguments_begin(run, run, summary, err);
    if (!rc)
        rc = perta_arguments_needed(&needed, 1, err);
    if (rc)
        return rc;
    struct job job = {.differences = json_array()};
    rc = perta_patch_in_open_damaged(&job.patch, path, note_damage, &job, err);
    if (!rc)
        rc = run_all(&job, run, err);
    if (!rc) {
        *summary = json_pack("{s:I, s:I, s:O}", "files", (json_int_t)job.patch.n_shards, "frames",
                             (json_int_t)job.n_frames, "differences", job.differences);
        if (!*summary)
            rc = perta_fail_sys(err, ENOMEM, "%s", path);
        else if (json_array_size(job.differences))
            rc = perta_fail(err, PERTA_ECHECK, "%s: %zu differences", path,
                            json_array_size(job.differences));
    }
    for (unsigned i = 0; job.scratch && i < job.n_workers; i++) {
        ZSTD_freeDCtx(job.scratch[i].zstd);
        free(job.scratch[i].payload);
    }
    free(job.scratch);
    for (uint32_t i = 0; job.files && i < job.patch.n_shards; i++)
        perta_digest_free(job.files[i].digest);
    free(job.files);
    perta_patch_in_close(&job.patch);
    json_decref(job.differences);
    return rc;
}
