#include "stream/patch/diff.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/format/codec.h"
#include "io/format/naming.h"
#include "io/fpenv.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/input.h"
#include "stream/patch/patch_out.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

#define OUT_ALIGN 64

enum { BEFORE, AFTER, N_IN };

struct job {
    bool one_way;
    struct perta_input in[N_IN];
    struct perta_resume resume;
    struct perta_stream *stream;
    struct perta_patch_out out;
    struct perta_codec **codecs; /* one for each worker */
    const char **actions;
    struct perta_walk walk; /* position of next(), in after */
};

struct result {
    struct perta_coded coded;
    uint64_t hash_before, hash_after;
};

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&job->walk, &at, piece))
        return 0;
    struct perta_ref to = {.tensor = at.info, .shard = at.shard};
    const struct perta_ref *from = perta_checkpoint_find(job->in[BEFORE].ck, at.info->name);
    perta_input_range(&job->in[BEFORE], from, at.first_unit, at.n_units, &piece->in[BEFORE]);
    perta_input_range(&job->in[AFTER], &to, at.first_unit, at.n_units, &piece->in[AFTER]);
    piece->out_bytes = OUT_ALIGN + perta_codec_bound(at.len_bytes);
    return 1;
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    struct result *result = (struct result *)(void *)piece->out;
    const struct perta_tensor *t =
        &job->in[AFTER].ck->shards[piece->shard].header->tensors[piece->tensor];
    uint64_t n_bytes = piece->in[BEFORE].len_bytes;
    result->hash_before = perta_hash64(piece->in[BEFORE].data, n_bytes);
    result->hash_after = perta_hash64(piece->in[AFTER].data, n_bytes);
    return perta_patch_out_encode(job->one_way, job->codecs[worker], t->dtype,
                                  piece->in[BEFORE].data, piece->in[AFTER].data, n_bytes,
                                  piece->out + OUT_ALIGN, piece->out_bytes - OUT_ALIGN,
                                  &result->coded, &result->hash_before, err);
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct result *result = (const struct result *)(const void *)piece->out;
    for (int i = 0; i < N_IN; i++)
        perta_input_digest(&job->in[i], &piece->in[i]);
    int rc = perta_patch_out_reach(&job->out, piece->shard, piece->tensor, err);
    if (rc)
        return rc;
    struct perta_chunk_out chunk = {
        .coded = result->coded,
        .frame = piece->out + OUT_ALIGN,
        .after = piece->in[AFTER].data,
        .after_bytes = piece->in[AFTER].len_bytes,
        .n_units = (uint32_t)piece->n_elems,
        .hash_before = result->hash_before,
        .hash_after = result->hash_after,
    };
    rc = perta_patch_out_chunk(&job->out, &chunk, err);
    return rc ? rc : perta_resume_point(&job->resume, piece, job->stream, err);
}

static int check_tensor(const struct perta_checkpoint *before, uint32_t shard,
                        const struct perta_tensor *to, struct perta_err *err)
{
    const struct perta_ref *from = perta_checkpoint_find(before, to->name);
    if (!from)
        return perta_fail(err, PERTA_EINPUT, "tensor %s: only in the new checkpoint", to->name);
    if (from->shard != shard)
        return perta_fail(err, PERTA_EINPUT,
                          "tensor %s: in shard %s of the old checkpoint, %s of the new; both "
                          "need the same shards",
                          to->name, before->shards[from->shard].name, before->shards[shard].name);
    if (from->tensor->dtype != to->dtype)
        return perta_fail(err, PERTA_EINPUT, "tensor %s: %s in the old checkpoint, %s in the new",
                          to->name, perta_dtype_name(from->tensor->dtype),
                          perta_dtype_name(to->dtype));
    return perta_shapes_agree("the old checkpoint", from->tensor, "the new", to, err);
}

static int check_pair(const struct perta_checkpoint *before, const struct perta_checkpoint *after,
                      struct perta_err *err)
{
    for (uint32_t i = 0; i < before->n_shards || i < after->n_shards; i++) {
        const char *old = i < before->n_shards ? before->shards[i].name : "none";
        const char *new = i < after->n_shards ? after->shards[i].name : "none";
        if (strcmp(old, new))
            return perta_fail(err, PERTA_EINPUT,
                              "the checkpoints are split into different shards: shard %u is %s in "
                              "%s, %s in %s",
                              i + 1, old, before->path, new, after->path);
    }
    for (uint64_t i = 0; i < before->n_tensors; i++)
        if (!perta_checkpoint_find(after, before->by_name[i].tensor->name))
            return perta_fail(err, PERTA_EINPUT, "tensor %s: only in the old checkpoint",
                              before->by_name[i].tensor->name);
    for (uint32_t i = 0; i < after->n_shards; i++)
        for (uint64_t t = 0; t < after->shards[i].header->n_tensors; t++) {
            int rc = check_tensor(before, i, &after->shards[i].header->tensors[t], err);
            if (rc)
                return rc;
        }
    return 0;
}

/* Sizes of the largest piece, and how much there is to read. */
static void measure(const struct perta_checkpoint *ck, struct perta_job *sizes)
{
    uint64_t most = 0;
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        const struct perta_tensor *t = ck->by_name[i].tensor;
        most = perta_max(perta_walk_chunk_bytes(t), most);
        sizes->total_bytes += 2 * t->len_bytes;
    }
    sizes->in_bytes_max = 2 * most;
    sizes->out_bytes_max = OUT_ALIGN + perta_codec_bound(most);
}

static int open_inputs(struct job *job, const struct perta_diff *diff, const struct perta_run *run,
                       struct perta_err *err)
{
    int rc = perta_input_open(&job->in[BEFORE], "old checkpoint", diff->before, err);
    if (!rc)
        rc = perta_input_open(&job->in[AFTER], "new checkpoint", diff->after, err);
    if (!rc)
        rc = check_pair(job->in[BEFORE].ck, job->in[AFTER].ck, err);
    return rc || perta_resume_found(run, diff->patch)
               ? rc
               : perta_publish_check(&diff->patch, 1, (const char *[]){diff->before, diff->after},
                                     N_IN, diff->force, err);
}

static int begin_output(struct job *job, const struct perta_diff *diff, const struct perta_run *run,
                        struct perta_err *err)
{
    json_t *inputs = json_pack("{s:o, s:o}", "before", perta_journal_checkpoint(job->in[BEFORE].ck),
                               "after", perta_journal_checkpoint(job->in[AFTER].ck));
    job->resume.inputs = job->in;
    job->resume.n_inputs = N_IN;
    job->resume.patches = &job->out;
    job->resume.n_patches = 1;
    job->resume.walk = &job->walk;
    int rc = perta_resume_begin(
        &job->resume, run, diff->patch,
        perta_resume_identity("diff", json_pack("{s:b}", "one_way", (int)job->one_way), inputs),
        diff->force, err);
    if (!rc)
        rc = perta_patch_out_begin(&job->out, diff->patch, NULL, NULL, &job->resume.journal,
                                   diff->force, err);
    job->out.one_way = job->one_way;
    return rc;
}

static int plan(struct job *job, struct perta_err *err)
{
    job->actions = calloc(job->in[AFTER].ck->n_tensors + 1, sizeof *job->actions);
    for (uint64_t i = 0; job->actions && i < job->in[AFTER].ck->n_tensors; i++)
        job->actions[i] = "compared";
    job->walk.ck = job->in[AFTER].ck;
    return job->actions ? 0 : perta_fail_sys(err, ENOMEM, "diff");
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = {.ctx = job,
                              .n_in = N_IN,
                              .next = next,
                              .work = work,
                              .commit = commit,
                              .later_bytes =
                                  perta_patch_out_memory(job->in[BEFORE].ck, job->in[AFTER].ck)};
    const char **paths = NULL;
    size_t n_paths = 0;
    measure(job->in[AFTER].ck, &sizes);
    uint64_t chunk_bytes = sizes.in_bytes_max / 2;
    sizes.worker_bytes = perta_codec_bytes(chunk_bytes);
    int rc = plan(job, err);
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_paths(&job->in[i], &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(run, &sizes, paths, n_paths, 1, &job->stream, err);
    free(paths);
    if (rc)
        return rc;
    job->codecs = perta_codecs_new(perta_stream_workers(job->stream), chunk_bytes, err);
    rc = err->code;
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_open_files(&job->in[i], perta_stream_engine(job->stream)->wants_direct,
                                    err);
    for (int i = 0; i < N_IN && !rc; i++)
        perta_input_digest_offload(&job->in[i], perta_stream_engine(job->stream)->hasher);
    return rc ? rc
              : perta_patch_out_attach(&job->out, job->in[BEFORE].ck, job->in[AFTER].ck,
                                       job->actions, perta_stream_engine(job->stream),
                                       perta_stream_writer_bufs(job->stream, 0),
                                       (struct perta_writer_bufs){0}, err);
}

static int finish(struct job *job, json_t **summary, struct perta_err *err)
{
    int rc = perta_patch_out_reach(&job->out, job->in[AFTER].ck->n_shards, 0, err);
    if (!rc)
        rc = perta_input_digest_rest(&job->in[BEFORE], job->stream, err);
    for (int i = 0; i < N_IN && !rc; i++)
        rc = perta_input_unchanged(&job->in[i], err);
    if (rc)
        return rc;
    json_t *recipe = json_pack("{s:s}", "command", "diff");
    if (job->one_way)
        perta_json_set(&recipe, "one_way", json_true());
    json_t *inputs = json_pack("{s:o, s:o}", "before", perta_input_json(&job->in[BEFORE]), "after",
                               perta_input_json(&job->in[AFTER]));
    rc = perta_patch_out_finish(&job->out, recipe, inputs, job->in[BEFORE].ck, summary, err);
    json_decref(recipe);
    json_decref(inputs);
    if (!rc)
        perta_json_set(summary, "read_bytes",
                       json_integer((json_int_t)perta_stream_read_bytes(job->stream)));
    return rc;
}

static int run_all(struct job *job, const struct perta_diff *diff, const struct perta_run *run,
                   json_t **summary, struct perta_err *err)
{
    int rc = begin_output(job, diff, run, err);
    if (rc || perta_resume_is_publishing(&job->resume, summary))
        return rc;
    rc = open_stream(job, run, err);
    if (!rc)
        rc = perta_resume_restore(&job->resume, job->stream, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    return rc ? rc : finish(job, summary, err);
}

static void release(struct job *job)
{
    perta_patch_out_release(&job->out);
    for (int i = 0; i < N_IN; i++)
        perta_input_close(&job->in[i]);
    perta_codecs_free(job->codecs);
    perta_stream_close(job->stream);
    free(job->actions);
}

static int check_arguments(const struct perta_diff *diff, struct perta_err *err)
{
    const struct perta_argument needed[] = {
        {"OLD (before)", diff->before}, {"NEW (after)", diff->after}, {"--patch DIR", diff->patch}};
    return perta_arguments_needed(needed, sizeof needed / sizeof *needed, err);
}

int perta_diff(const struct perta_diff *diff, const struct perta_run *run, json_t **summary,
               struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(diff, run, summary, err);
    if (!rc)
        rc = check_arguments(diff, err);
    if (rc)
        return rc;
    struct job job = {.one_way = diff->one_way};
    rc = open_inputs(&job, diff, run, err);
    if (!rc && run->dry_run) {
        *summary = json_object();
        rc = *summary ? 0 : perta_fail_sys(err, ENOMEM, "diff");
    } else if (!rc) {
        rc = run_all(&job, diff, run, summary, err);
        rc = perta_resume_end(&job.resume, rc, summary, err);
    }
    release(&job);
    return rc;
}
