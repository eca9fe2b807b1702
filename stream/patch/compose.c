#include "stream/patch/compose.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/fpenv.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/input.h"
#include "stream/patch/chain.h"
#include "stream/patch/patch_out.h"
#include "stream/patch/resume.h"

#define OUT_ALIGN 64

typedef unsigned long long ull;

enum { IN_MODEL, IN_FRAMES }; /* then one frame of each patch */

struct job {
    const struct perta_compose *compose;
    struct perta_chain chain;
    struct perta_input model; /* ck NULL: not available */
    struct perta_patch_out out;
    struct perta_resume resume; /* counts: see below */
    struct perta_stream *stream;
    struct perta_codec **codecs; /* (n_workers) */
    uint8_t **scratch;           /* (n_workers, 2 * sum_bytes) */
    uint8_t *zeros;              /* (sum_bytes), where any bytes before will do */
    uint64_t sum_bytes;          /* the largest chunk that several patches change */
    unsigned n_workers;
    const char **actions;
    struct perta_walk walk; /* position of next(), in chain.after */
};

/* Indexes in resume.counts: chunks whose frame was kept, and chunks that were encoded anew. */
enum { N_KEPT, N_SUMMED };

static const struct perta_patch_entry *entry_of(const struct job *job, uint32_t k,
                                                const struct perta_piece *piece)
{
    return perta_chain_entry(&job->chain, k, piece->shard, piece->tag, piece->first_elem);
}

/* ---- reading ---- */

/* How many patches change the chunk, and the total length of their frames. */
static uint32_t count_frames(const struct job *job, const struct perta_chunk_at *at,
                             uint64_t *frames_bytes)
{
    uint32_t n = 0;
    *frames_bytes = 0;
    for (uint32_t k = 0; k < job->chain.n; k++) {
        const struct perta_patch_entry *entry =
            perta_chain_entry(&job->chain, k, at->shard, at->index, at->first_unit);
        n += entry->encoding != PERTA_ENC_ZERO;
        *frames_bytes += entry->frame_bytes;
    }
    return n;
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&job->walk, &at, piece))
        return 0;
    uint32_t n_frames = 0;
    for (uint32_t k = 0; k < job->chain.n; k++) {
        const struct perta_patch_entry *entry = entry_of(job, k, piece);
        perta_patch_in_frame(&job->chain.patches[k].shards[at.shard], entry,
                             &piece->in[IN_FRAMES + k]);
        n_frames += entry->encoding != PERTA_ENC_ZERO;
    }
    bool sum = n_frames > 1;
    if (sum && job->model.ck)
        perta_input_range(&job->model, perta_checkpoint_find(job->model.ck, at.info->name),
                          at.first_unit, at.n_units, &piece->in[IN_MODEL]);
    piece->out_bytes = OUT_ALIGN + (sum ? perta_codec_bound(at.len_bytes) : 0);
    return 1;
}

/* ---- working ---- */

struct result {
    struct perta_coded coded;
    uint32_t n_frames;
    uint32_t last; /* the last patch with a frame */
};

/* One patch changes the chunk: keep its frame. */
static int keep(struct job *job, unsigned worker, const struct perta_piece *piece,
                struct result *result, struct perta_err *err)
{
    const struct perta_patch_in_shard *shard =
        &job->chain.patches[result->last].shards[piece->shard];
    const struct perta_patch_entry *entry = entry_of(job, result->last, piece);
    const struct perta_tensor *tensor = perta_patch_in_tensor(shard, entry);
    result->coded = (struct perta_coded){
        .encoding = entry->encoding,
        .frame_bytes = entry->frame_bytes,
        .payload_bytes = entry->payload_bytes,
    };
    int rc = perta_codec_count(job->codecs[worker], tensor->dtype, entry->encoding,
                               piece->in[IN_FRAMES + result->last].data, entry->frame_bytes,
                               entry->payload_bytes, perta_patch_in_chunk_bytes(shard, entry),
                               &result->coded.n_changed, err);
    return rc ? perta_err_context(err, "%s: tensor %s, byte %llu", shard->path, tensor->name,
                                  (ull)entry->frame_off)
              : 0;
}

/* The chunk before the first patch: from the model, or zeros. */
static int start(const struct job *job, const struct perta_piece *piece, const uint8_t **from,
                 struct perta_err *err)
{
    const struct perta_range *model = &piece->in[IN_MODEL];
    *from = model->file ? model->data : job->zeros;
    if (!model->file)
        return 0;
    const struct perta_patch_entry *entry = entry_of(job, 0, piece);
    uint64_t found = perta_hash64(model->data, model->len_bytes);
    return found == entry->hash_before
               ? 0
               : perta_patch_in_wrong_chunk(&job->chain.patches[0].shards[piece->shard], entry,
                                            true, model->file->path, piece->first_elem, found, err);
}

/* Several patches change the chunk: apply all of them, and encode the total change. */
static int sum(struct job *job, unsigned worker, const struct perta_piece *piece,
               struct result *result, struct perta_err *err)
{
    struct perta_codec *codec = job->codecs[worker];
    const struct perta_patch_in_shard *shard = &job->chain.patches[0].shards[piece->shard];
    const struct perta_patch_entry *entry = entry_of(job, 0, piece);
    uint64_t n_bytes = perta_patch_in_chunk_bytes(shard, entry);
    enum perta_dtype dtype = perta_patch_in_tensor(shard, entry)->dtype;
    const uint8_t *before;
    int rc = start(job, piece, &before, err);
    const uint8_t *at = before;
    for (uint32_t k = 0; k < job->chain.n && !rc; k++) {
        if (!piece->in[IN_FRAMES + k].file)
            continue;
        uint8_t *to = job->scratch[worker];
        to += at == to ? job->sum_bytes : 0;
        shard = &job->chain.patches[k].shards[piece->shard];
        entry = entry_of(job, k, piece);
        rc = perta_patch_in_move(shard, entry, true, codec, piece->in[IN_FRAMES + k].data, at, to,
                                 err);
        if (!rc && piece->in[IN_MODEL].file)
            rc = perta_patch_in_check_made(shard, entry, true, to, err);
        at = to;
    }
    return rc ? rc
              : perta_codec_encode(codec, dtype, before, at, n_bytes, piece->out + OUT_ALIGN,
                                   piece->out_bytes - OUT_ALIGN, &result->coded, err);
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    struct result *result = (struct result *)(void *)piece->out;
    *result = (struct result){0}; /* PERTA_ENC_ZERO */
    for (uint32_t k = 0; k < job->chain.n; k++)
        if (piece->in[IN_FRAMES + k].file) {
            result->n_frames++;
            result->last = k;
        }
    if (!result->n_frames)
        return 0;
    return (result->n_frames == 1 ? keep : sum)(job, worker, piece, result, err);
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct result *result = (const struct result *)(const void *)piece->out;
    bool kept = result->n_frames == 1;
    job->resume.counts[N_KEPT] += kept;
    job->resume.counts[N_SUMMED] += result->n_frames > 1;
    int rc = perta_patch_out_reach(&job->out, piece->shard, piece->tensor, err);
    if (rc)
        return rc;
    struct perta_chunk_out chunk = {
        .coded = result->coded,
        .frame = kept ? piece->in[IN_FRAMES + result->last].data : piece->out + OUT_ALIGN,
        .n_units = (uint32_t)piece->n_elems,
        .hash_before = entry_of(job, 0, piece)->hash_before,
        .hash_after = entry_of(job, job->chain.n - 1, piece)->hash_after,
    };
    rc = perta_patch_out_chunk(&job->out, &chunk, err);
    return rc ? rc : perta_resume_point(&job->resume, piece, job->stream, err);
}

/* ---- before the run ---- */

static int model_is_needed(const struct job *job, const struct perta_chunk_at *at,
                           struct perta_err *err)
{
    return perta_fail(err, PERTA_EUSAGE,
                      "tensor %s, elements %llu to %llu: several of the patches change them, and "
                      "adding up changes of %s values needs the values: give --model DIR, what "
                      "%s was made from",
                      at->info->name, (ull)at->first_unit, (ull)(at->first_unit + at->n_units - 1),
                      perta_dtype_name(at->info->dtype), job->compose->patches[0]);
}

/* Add up what there is to read, and the sizes of pieces. Fails if the model is needed and not
 * given. */
static int survey(struct job *job, struct perta_job *sizes, uint64_t *chunk_bytes,
                  struct perta_err *err)
{
    struct perta_walk walk = {.ck = &job->chain.after};
    struct perta_chunk_at at;
    sizes->out_bytes_max = OUT_ALIGN;
    while (perta_walk_next(&walk, &at)) {
        uint64_t read_bytes;
        uint32_t n_frames = count_frames(job, &at, &read_bytes);
        if (n_frames)
            *chunk_bytes = perta_max(*chunk_bytes, at.len_bytes);
        if (n_frames > 1) {
            if (!job->model.ck && perta_codec_groups(at.info->dtype))
                return model_is_needed(job, &at, err);
            job->sum_bytes = perta_max(job->sum_bytes, at.len_bytes);
            read_bytes += job->model.ck ? at.len_bytes : 0;
        }
        sizes->in_bytes_max = perta_max(sizes->in_bytes_max, read_bytes);
        sizes->total_bytes += read_bytes;
    }
    if (job->sum_bytes)
        sizes->out_bytes_max += perta_codec_bound(job->sum_bytes);
    return 0;
}

/* The last patch's manifest lists the resulting shards. */
static int known_model(const struct job *job, json_t **shards, struct perta_err *err)
{
    const struct perta_patch_in *last = &job->chain.patches[job->chain.n - 1];
    *shards = json_object_get(json_object_get(last->manifest, "outputs"), "model");
    bool fits = json_array_size(*shards) == last->n_shards;
    for (uint32_t i = 0; i < last->n_shards && fits; i++) {
        const json_t *shard = json_array_get(*shards, i);
        const char *name = json_string_value(json_object_get(shard, "name"));
        json_int_t len_bytes = json_integer_value(json_object_get(shard, "bytes"));
        fits = name && !strcmp(name, last->shards[i].name) &&
               (uint64_t)len_bytes == last->shards[i].patch->after->file_len_bytes;
    }
    return fits ? 0
                : perta_fail(err, PERTA_ECHECK,
                             "%s/manifest.json: outputs.model does not fit its .perta files: the "
                             "patch is damaged",
                             last->path);
}

static int check_outputs(const struct perta_compose *compose, struct perta_err *err)
{
    const char **inputs = calloc(compose->n_patches + 1, sizeof *inputs);
    if (!inputs)
        return perta_fail_sys(err, ENOMEM, "compose");
    memcpy(inputs, compose->patches, compose->n_patches * sizeof *inputs);
    inputs[compose->n_patches] = compose->model;
    int rc = perta_publish_check(&compose->patch, 1, inputs, compose->n_patches + 1, compose->force,
                                 err);
    free(inputs);
    return rc;
}

static int open_inputs(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    const struct perta_compose *compose = job->compose;
    int rc = perta_chain_open(&job->chain, compose->patches, compose->n_patches, err);
    if (!rc && compose->model)
        rc = perta_input_open(&job->model, "model", compose->model, err);
    if (!rc && compose->model)
        rc = perta_patch_in_check_model(&job->chain.patches[0], job->model.ck, true, err);
    return rc || perta_resume_found(run, compose->patch) ? rc : check_outputs(compose, err);
}

/* The patches, in order, by the digests of their manifests. */
static json_t *identity_of(const struct job *job)
{
    json_t *patches = json_array();
    for (uint32_t k = 0; k < job->chain.n; k++)
        perta_json_append(&patches, json_string(job->chain.patches[k].manifest_digest.sha256));
    json_t *model = job->model.ck ? perta_journal_checkpoint(job->model.ck) : json_null();
    return perta_resume_identity("compose", json_object(),
                                 json_pack("{s:o, s:o}", "patches", patches, "model", model));
}

static int begin_output(struct job *job, const struct perta_run *run, json_t *shards,
                        struct perta_err *err)
{
    const struct perta_compose *compose = job->compose;
    job->walk.ck = &job->chain.after;
    job->resume.inputs = &job->model;
    job->resume.n_inputs = 1;
    job->resume.patches = &job->out;
    job->resume.n_patches = 1;
    job->resume.walk = &job->walk;
    int rc = perta_resume_begin(&job->resume, run, compose->patch, identity_of(job), compose->force,
                                err);
    if (!rc)
        rc = perta_patch_out_begin(&job->out, compose->patch, NULL, NULL, &job->resume.journal,
                                   compose->force, err);
    if (!rc)
        perta_model_out_known(&job->out.model, shards);
    return rc;
}

static int name_actions(struct job *job, struct perta_err *err)
{
    job->actions = calloc(job->chain.after.n_tensors + 1, sizeof *job->actions);
    if (!job->actions)
        return perta_fail_sys(err, ENOMEM, "compose");
    for (uint64_t i = 0; i < job->chain.after.n_tensors; i++)
        job->actions[i] = "composed";
    return 0;
}

static uint64_t scratch_bytes(const struct job *job)
{
    return 2 * job->sum_bytes + 1;
}

static int take_scratch(struct job *job, uint64_t chunk_bytes, struct perta_err *err)
{
    job->n_workers = perta_stream_workers(job->stream);
    job->codecs = perta_codecs_new(job->n_workers, chunk_bytes, err);
    job->scratch = calloc(job->n_workers, sizeof *job->scratch);
    job->zeros = calloc(1, job->sum_bytes + 1);
    if (!job->codecs)
        return err->code;
    if (!job->scratch || !job->zeros)
        return perta_fail_sys(err, ENOMEM, "compose");
    for (unsigned i = 0; i < job->n_workers; i++)
        if (!(job->scratch[i] = malloc(scratch_bytes(job))))
            return perta_fail_sys(err, ENOMEM, "compose");
    return 0;
}

static int open_files(struct job *job, bool direct, struct perta_err *err)
{
    int rc = job->model.ck ? perta_input_open_files(&job->model, direct, err) : 0;
    for (uint32_t k = 0; k < job->chain.n && !rc; k++)
        rc = perta_patch_in_open_files(&job->chain.patches[k], direct, err);
    return rc;
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_job *sizes,
                       uint64_t chunk_bytes, struct perta_err *err)
{
    const char **paths = NULL;
    size_t n_paths = 0;
    sizes->later_bytes =
        perta_patch_out_memory(&job->chain.before, &job->chain.after) + job->sum_bytes;
    sizes->worker_bytes = perta_codec_bytes(chunk_bytes) + scratch_bytes(job);
    int rc = job->model.ck ? perta_input_paths(&job->model, &paths, &n_paths, err) : 0;
    for (uint32_t k = 0; k < job->chain.n && !rc; k++)
        rc = perta_patch_in_paths(&job->chain.patches[k], &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, sizes, paths, n_paths, 1, &job->stream, err);
    free(paths);
    if (!rc)
        rc = take_scratch(job, chunk_bytes, err);
    if (!rc)
        rc = open_files(job, perta_stream_engine(job->stream)->wants_direct, err);
    return rc ? rc
              : perta_patch_out_attach(&job->out, &job->chain.before, &job->chain.after,
                                       job->actions, perta_stream_engine(job->stream),
                                       perta_stream_writer_bufs(job->stream, 0),
                                       (struct perta_writer_bufs){0}, err);
}

/* ---- after it ---- */

/* Each patch, by the digest of its manifest, with its recipe. */
static json_t *recipe_json(const struct job *job)
{
    json_t *patches = json_array();
    for (uint32_t k = 0; k < job->chain.n; k++) {
        const struct perta_patch_in *patch = &job->chain.patches[k];
        const struct perta_digest_hex *hex = &patch->manifest_digest;
        perta_json_append(&patches, json_pack("{s:{s:I, s:s, s:s}, s:O*}", "manifest", "bytes",
                                              (json_int_t)hex->len_bytes, "xxh3_128", hex->xxh128,
                                              "sha256", hex->sha256, "recipe",
                                              json_object_get(patch->manifest, "recipe")));
    }
    return json_pack("{s:s, s:o}", "command", "compose", "patches", patches);
}

/* The model before, as in the first patch's manifest. */
static json_t *inputs_json(const struct job *job)
{
    const json_t *inputs = json_object_get(job->chain.patches[0].manifest, "inputs");
    json_t *before = json_object_get(inputs, "before");
    return json_pack("{s:O*}", "before", before ? before : json_object_get(inputs, "model"));
}

static int finish(struct job *job, json_t **summary, struct perta_err *err)
{
    int rc = job->model.ck ? perta_input_unchanged(&job->model, err) : 0;
    for (uint32_t k = 0; k < job->chain.n && !rc; k++)
        rc = perta_patch_in_unchanged(&job->chain.patches[k], err);
    if (rc)
        return rc;
    json_t *recipe = recipe_json(job), *inputs = inputs_json(job);
    rc = perta_patch_out_finish(&job->out, recipe, inputs, NULL, summary, err);
    json_decref(recipe);
    json_decref(inputs);
    if (rc)
        return rc;
    perta_json_set(summary, "kept", json_integer((json_int_t)job->resume.counts[N_KEPT]));
    perta_json_set(summary, "summed", json_integer((json_int_t)job->resume.counts[N_SUMMED]));
    perta_json_set(summary, "read_bytes",
                   json_integer((json_int_t)perta_stream_read_bytes(job->stream)));
    return 0;
}

static void release(struct job *job)
{
    perta_patch_out_release(&job->out);
    perta_input_close(&job->model);
    perta_chain_close(&job->chain);
    perta_stream_close(job->stream);
    perta_codecs_free(job->codecs);
    for (unsigned i = 0; job->scratch && i < job->n_workers; i++)
        free(job->scratch[i]);
    free(job->scratch);
    free(job->zeros);
    free(job->actions);
}

/* Run once the inputs are open and checked. shards: the resulting ones. */
static int run_all(struct job *job, const struct perta_run *run, struct perta_job *sizes,
                   uint64_t chunk_bytes, json_t *shards, json_t **summary, struct perta_err *err)
{
    int rc = begin_output(job, run, shards, err);
    if (rc || perta_resume_is_publishing(&job->resume, summary))
        return rc;
    rc = name_actions(job, err);
    if (!rc)
        rc = open_stream(job, run, sizes, chunk_bytes, err);
    if (!rc)
        rc = perta_resume_restore(&job->resume, job->stream, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    return rc ? rc : finish(job, summary, err);
}

static int check_arguments(const struct perta_compose *compose, struct perta_err *err)
{
    const struct perta_argument needed = {"--patch DIR", compose->patch};
    const struct perta_argument model = {"--model", compose->model};
    if (compose->n_patches < 2)
        return perta_fail(err, PERTA_EUSAGE,
                          "at least two patches are needed, in the order they were made");
    int rc = perta_arguments_list("patches", compose->patches, compose->n_patches, err);
    if (!rc)
        rc = perta_arguments_optional(&model, 1, err);
    return rc ? rc : perta_arguments_needed(&needed, 1, err);
}

int perta_compose(const struct perta_compose *compose, const struct perta_run *run,
                  json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(compose, run, summary, err);
    if (!rc)
        rc = check_arguments(compose, err);
    if (rc)
        return rc;
    struct job job = {.compose = compose};
    struct perta_job sizes = {.ctx = &job, .next = next, .work = work, .commit = commit};
    uint64_t chunk_bytes = 0;
    json_t *shards = NULL;
    rc = open_inputs(&job, run, err);
    sizes.n_in = IN_FRAMES + job.chain.n;
    if (!rc)
        rc = known_model(&job, &shards, err);
    if (!rc)
        rc = survey(&job, &sizes, &chunk_bytes, err);
    if (!rc && run->dry_run) {
        *summary = json_object();
        rc = *summary ? 0 : perta_fail_sys(err, ENOMEM, "compose");
    } else if (!rc) {
        rc = run_all(&job, run, &sizes, chunk_bytes, shards, summary, err);
        rc = perta_resume_end(&job.resume, rc, summary, err);
    }
    release(&job);
    return rc;
}
