#include "estimators/passes/accumulate.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/running.h"
#include "estimators/passes/importance.h"
#include "io/checked.h"
#include "io/format/naming.h"
#include "io/fpenv.h"
#include "io/text.h"
#include "stream/arguments.h"
#include "stream/input.h"
#include "stream/memory.h"
#include "stream/patch/model_out.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

#define ELEMS_MAX (1ull << 20)
#define ELEMS_MIN 1024ull
#define OUT_ALIGN 64
/* The size of a piece is chosen so that this many slots fit: then reading and arithmetic
 * overlap. */
#define SLOTS_WANTED 4

enum { MEAN, MEANSQ, N_STATS };

/* Where a tensor of one sample is stored; all that is kept of its checkpoint. */
struct place {
    uint64_t off_bytes;
    uint32_t file;
    enum perta_dtype dtype;
};

struct scratch {
    float *sums[4]; /* (elems) each: sum, carry, sum of squares, its carry */
};

struct job {
    const struct perta_accumulate *accumulate;
    struct perta_checkpoint *first; /* the outputs have its layout */
    struct perta_file *files;
    uint32_t n_files;
    struct place *places; /* (n_tensors, n_gradients), tensors in the order of shards */
    bool wanted[N_STATS];
    struct perta_model_out outs[N_STATS];
    struct perta_importance plans[N_STATS];
    uint64_t elems; /* the most elements in a piece */
    struct perta_resume resume;
    struct perta_stream *stream;
    struct scratch *scratch;
    unsigned n_workers;
    struct perta_walk walk; /* position of next() in first */
    uint32_t shards_begun;  /* used by commit(), on the owner's thread */
};

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    struct perta_chunk_at at;
    if (!perta_walk_piece(&job->walk, &at, piece))
        return 0;
    uint32_t n = job->accumulate->n_gradients;
    for (uint32_t i = 0; i < n; i++) {
        const struct place *place = &job->places[at.index * n + i];
        uint64_t width = perta_dtype_unit_bytes(place->dtype);
        piece->in[i] = (struct perta_range){
            .file = &job->files[place->file],
            .off_bytes = place->off_bytes + at.first_unit * width,
            .len_bytes = at.n_units * width,
        };
    }
    piece->out_bytes = N_STATS * perta_align_up(at.n_units * sizeof(float), OUT_ALIGN);
    return 1;
}

static int not_finite(const struct job *job, const struct perta_piece *piece, uint32_t sample,
                      uint64_t elem, struct perta_err *err)
{
    const struct place *place = &job->places[piece->tag * job->accumulate->n_gradients + sample];
    uint64_t at = piece->first_elem + elem;
    return perta_fail(
        err, PERTA_EINPUT, "%s: tensor %s, element %llu (byte %llu): not a finite float32",
        job->files[place->file].path,
        job->first->shards[piece->shard].header->tensors[piece->tensor].name,
        (unsigned long long)at,
        (unsigned long long)(place->off_bytes + at * perta_dtype_unit_bytes(place->dtype)));
}

static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    uint32_t n = job->accumulate->n_gradients;
    float **sums = job->scratch[worker].sums;
    struct perta_running running = {
        .sum = job->wanted[MEAN] ? sums[0] : NULL,
        .carry = job->wanted[MEAN] ? sums[1] : NULL,
        .sq_sum = job->wanted[MEANSQ] ? sums[2] : NULL,
        .sq_carry = job->wanted[MEANSQ] ? sums[3] : NULL,
        .n = piece->n_elems,
    };
    perta_running_zero(&running);
    for (uint32_t i = 0; i < n; i++) {
        const struct perta_view view = {job->places[piece->tag * n + i].dtype, piece->in[i].data};
        uint64_t bad = perta_running_add(&running, &view);
        if (bad != UINT64_MAX)
            return not_finite(job, piece, i, bad, err);
    }
    uint8_t *meansq = piece->out + perta_align_up(piece->n_elems * sizeof(float), OUT_ALIGN);
    uint64_t bad = perta_running_finish(&running, n, job->wanted[MEAN] ? piece->out : NULL,
                                        job->wanted[MEANSQ] ? meansq : NULL);
    if (bad != UINT64_MAX) {
        float mean = INFINITY; /* of the squares, if the other mean is finite */
        if (job->wanted[MEAN])
            memcpy(&mean, piece->out + bad * sizeof mean, sizeof mean);
        bool squares = job->wanted[MEANSQ] && (!job->wanted[MEAN] || isfinite(mean));
        return perta_fail(
            err, PERTA_EINPUT, "tensor %s, element %llu: the mean %s all gradients is not finite",
            job->first->shards[piece->shard].header->tensors[piece->tensor].name,
            (unsigned long long)(piece->first_elem + bad), squares ? "square over" : "over");
    }
    return 0;
}

static int reach_shard(struct job *job, uint32_t shard, struct perta_err *err)
{
    int rc = 0;
    for (; !rc && job->shards_begun <= shard; job->shards_begun++)
        for (int stat = 0; stat < N_STATS && !rc; stat++) {
            uint32_t begun = job->shards_begun;
            if (!job->wanted[stat])
                continue;
            const struct perta_importance_shard *shards = job->plans[stat].shards;
            if (begun)
                rc = perta_model_out_shard_end(&job->outs[stat], shards[begun - 1].name, err);
            if (!rc && begun < job->first->n_shards)
                rc = perta_model_out_shard(&job->outs[stat], shards[begun].name,
                                           shards[begun].header, shards[begun].header_bytes,
                                           shards[begun].file_bytes, err);
        }
    return rc;
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    uint64_t len_bytes = piece->n_elems * sizeof(float);
    int rc = reach_shard(job, piece->shard, err);
    for (int stat = 0; stat < N_STATS && !rc; stat++)
        if (job->wanted[stat])
            rc = perta_model_out_append(
                &job->outs[stat],
                piece->out + (stat == MEAN ? 0 : perta_align_up(len_bytes, OUT_ALIGN)), len_bytes,
                err);
    return rc ? rc : perta_resume_point(&job->resume, piece, job->stream, err);
}

static int add_file(struct job *job, const struct perta_shard *shard, struct perta_err *err)
{
    struct perta_file *grown = realloc(job->files, (job->n_files + 1) * sizeof *grown);
    if (!grown)
        return perta_fail_sys(err, ENOMEM, "%s", shard->path);
    job->files = grown;
    struct perta_file *file = &grown[job->n_files++];
    *file = (struct perta_file){.fd = -1,
                                .path = strdup(shard->path),
                                .len_bytes = shard->size_bytes,
                                .dev = shard->dev,
                                .ino = shard->ino,
                                .mtime = shard->mtime};
    return file->path ? 0 : perta_fail_sys(err, ENOMEM, "%s", shard->path);
}

static int place_tensor(struct job *job, const struct perta_checkpoint *ck,
                        const struct perta_tensor *want, struct place *place, uint32_t first_file,
                        struct perta_err *err)
{
    const struct perta_ref *ref = perta_checkpoint_find(ck, want->name);
    if (!ref)
        return perta_fail(err, PERTA_EINPUT, "%s: no tensor %s, but %s has it", ck->path,
                          want->name, job->first->path);
    if (!perta_dtype_is_editable(ref->tensor->dtype))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16, F32 or F64 needed",
                          ck->path, want->name, perta_dtype_name(ref->tensor->dtype));
    *place = (struct place){ref->tensor->off_bytes, first_file + ref->shard, ref->tensor->dtype};
    return perta_shapes_agree(job->first->path, want, ck->path, ref->tensor, err);
}

/* Check one sample against the first one, and note where its tensors are stored. */
static int add_sample(struct job *job, uint32_t sample, struct perta_err *err)
{
    struct perta_checkpoint *ck = NULL;
    uint32_t n = job->accumulate->n_gradients, first_file = job->n_files;
    int rc = perta_checkpoint_open(job->accumulate->gradients[sample], &ck, err);
    if (!rc && !sample) {
        job->first = ck;
        job->places = calloc(ck->n_tensors * n + 1, sizeof *job->places);
        if (!job->places)
            rc = perta_fail_sys(err, ENOMEM, "plan");
    }
    if (!rc && ck->n_tensors != job->first->n_tensors)
        rc = perta_fail(err, PERTA_EINPUT, "%s: %llu tensors, but %s has %llu", ck->path,
                        (unsigned long long)ck->n_tensors, job->first->path,
                        (unsigned long long)job->first->n_tensors);
    for (uint32_t s = 0; !rc && s < ck->n_shards; s++)
        rc = add_file(job, &ck->shards[s], err);
    uint64_t index = 0;
    for (uint32_t s = 0; !rc && s < job->first->n_shards; s++)
        for (uint64_t t = 0; !rc && t < job->first->shards[s].header->n_tensors; t++, index++)
            rc = place_tensor(job, ck, &job->first->shards[s].header->tensors[t],
                              &job->places[index * n + sample], first_file, err);
    if (ck != job->first)
        perta_checkpoint_close(ck);
    return rc;
}

static uint64_t total_bytes(const struct job *job)
{
    uint64_t total = 0, index = 0;
    uint32_t n = job->accumulate->n_gradients;
    for (uint32_t s = 0; s < job->first->n_shards; s++)
        for (uint64_t t = 0; t < job->first->shards[s].header->n_tensors; t++, index++)
            for (uint32_t i = 0; i < n; i++)
                total += job->first->shards[s].header->tensors[t].n_elems *
                         perta_dtype_unit_bytes(job->places[index * n + i].dtype);
    return total;
}

static uint64_t largest_piece(const struct job *job)
{
    uint64_t most = 0;
    uint32_t n = job->accumulate->n_gradients;
    for (uint64_t t = 0; t < job->first->n_tensors; t++) {
        uint64_t width = 0;
        for (uint32_t i = 0; i < n; i++)
            width += perta_dtype_unit_bytes(job->places[t * n + i].dtype);
        most = width > most ? width : most;
    }
    return most * job->elems;
}

static unsigned count_writers(const struct job *job)
{
    return (unsigned)job->wanted[MEAN] + (unsigned)job->wanted[MEANSQ];
}

static uint64_t sums_bytes(const struct job *job)
{
    return 2 * sizeof(float) * count_writers(job) * job->elems;
}

static struct perta_job sizes_of(struct job *job)
{
    return (struct perta_job){
        .ctx = job,
        .n_in = job->accumulate->n_gradients,
        .in_bytes_max = largest_piece(job),
        .out_bytes_max = N_STATS * perta_align_up(job->elems * sizeof(float), OUT_ALIGN),
        .total_bytes = total_bytes(job),
        .worker_bytes = sums_bytes(job),
        .next = next,
        .work = work,
        .commit = commit,
    };
}

/* Memory for the headers of the outputs, which are made after the size of pieces is chosen. A
 * header takes about as much as the first checkpoint's; an index is printed from a JSON tree. */
static uint64_t plans_bytes(const struct job *job)
{
    const struct perta_checkpoint *ck = job->first;
    uint64_t bytes = ck->n_tensors * (sizeof(struct perta_tensor) + (ck->n_shards > 1 ? 500 : 0));
    for (uint32_t s = 0; s < ck->n_shards; s++)
        bytes += 2 * ck->shards[s].header->len_bytes;
    return count_writers(job) * bytes;
}

/* Choose the number of elements in a piece: as many as let a few slots and workers fit the budget,
 * whatever the number of samples. */
static int choose_elems(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    uint64_t needed = 0;
    unsigned n_workers = perta_run_threads(run);
    n_workers = n_workers < SLOTS_WANTED ? n_workers : SLOTS_WANTED;
    for (job->elems = ELEMS_MAX; job->elems >= ELEMS_MIN; job->elems /= 2) {
        struct perta_job sizes = sizes_of(job);
        sizes.later_bytes = plans_bytes(job);
        bool few = job->elems == ELEMS_MIN;
        needed = perta_stream_memory(&sizes, count_writers(job), few ? 1 : n_workers,
                                     few ? 1 : SLOTS_WANTED);
        if (needed <= run->memory_bytes)
            return 0;
    }
    return perta_memory_refuse(run->memory_bytes, needed, err, "to read %u gradients side by side",
                               job->accumulate->n_gradients);
}

static int make_scratch(struct job *job, struct perta_err *err)
{
    job->n_workers = perta_stream_workers(job->stream);
    job->scratch = calloc(job->n_workers, sizeof *job->scratch);
    for (unsigned w = 0; job->scratch && w < job->n_workers; w++)
        for (int i = 0; i < 4; i++)
            if (job->wanted[i / 2] &&
                !(job->scratch[w].sums[i] = malloc(job->elems * sizeof(float))))
                return perta_fail_sys(err, ENOMEM, "sums");
    return job->scratch ? 0 : perta_fail_sys(err, ENOMEM, "sums");
}

static const char *const stat_names[N_STATS] = {"mean", "meansq"};

static int check_outputs(const struct job *job, struct perta_err *err)
{
    const struct perta_accumulate *acc = job->accumulate;
    int rc = 0;
    for (int stat = 0; stat < N_STATS && !rc; stat++) {
        if (!job->wanted[stat])
            continue;
        char *path = perta_path_join(acc->out, stat_names[stat]);
        rc = path ? perta_publish_check((const char *const *)&path, 1, acc->gradients,
                                        acc->n_gradients, acc->force, err)
                  : perta_fail_sys(err, ENOMEM, "%s", acc->out);
        free(path);
    }
    return rc;
}

/* The folder that is published last; the journal is kept beside it. The caller frees it. */
static char *last_folder_of(const struct job *job)
{
    return perta_path_join(job->accumulate->out, stat_names[job->wanted[MEANSQ] ? MEANSQ : MEAN]);
}

/* Identity of the run: every input file by name, size and modification time, and the flags. */
static json_t *identity_of(const struct job *job)
{
    const struct perta_accumulate *acc = job->accumulate;
    json_t *inputs = json_object();
    for (uint32_t i = 0; i < job->n_files; i++) {
        json_t *path = perta_text_json("%s", job->files[i].path); /* JSON keys must be UTF-8 */
        perta_json_set(&inputs, json_string_value(path),
                       perta_journal_file(job->files[i].len_bytes, &job->files[i].mtime));
        json_decref(path);
    }
    return perta_resume_identity("accumulate",
                                 json_pack("{s:b, s:b, s:I}", "mean", (int)acc->mean, "meansq",
                                           (int)acc->meansq, "gradients",
                                           (json_int_t)acc->n_gradients),
                                 inputs);
}

static int begin_outputs(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    char *last_folder = last_folder_of(job);
    job->resume.models = job->outs;
    job->resume.n_models = N_STATS;
    job->resume.walk = &job->walk;
    job->walk = (struct perta_walk){.ck = job->first, .chunk_units = job->elems};
    int rc = last_folder ? perta_resume_begin(&job->resume, run, last_folder, identity_of(job),
                                              job->accumulate->force, err)
                         : perta_fail_sys(err, ENOMEM, "%s", job->accumulate->out);
    free(last_folder);
    for (int stat = 0; stat < N_STATS && !rc; stat++) {
        if (!job->wanted[stat])
            continue;
        char *path = perta_path_join(job->accumulate->out, stat_names[stat]);
        rc = path ? perta_model_out_begin(&job->outs[stat], path, NULL, &job->resume.journal,
                                          job->accumulate->force, err)
                  : perta_fail_sys(err, ENOMEM, "%s", job->accumulate->out);
        free(path);
        if (!rc)
            rc = perta_importance_plan(
                &job->plans[stat], job->first,
                &(struct perta_importance_about){.stat = stat == MEAN ? PERTA_STAT_MEAN
                                                                      : PERTA_STAT_MEANSQ,
                                                 .n_samples = job->accumulate->n_gradients},
                NULL, NULL, err);
    }
    return rc;
}

static int prepare(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    if (!job->accumulate->n_gradients)
        return perta_fail(err, PERTA_EUSAGE, "no gradients given; name files or folders");
    int rc = 0;
    for (uint32_t i = 0; i < job->accumulate->n_gradients && !rc; i++)
        rc = add_sample(job, i, err);
    if (!rc)
        rc = choose_elems(job, run, err);
    char *last_folder = last_folder_of(job);
    if (!rc && !(last_folder && perta_resume_found(run, last_folder)))
        rc = check_outputs(job, err);
    free(last_folder);
    return rc;
}

static int open_stream(struct job *job, const struct perta_run *run, struct perta_err *err)
{
    struct perta_job sizes = sizes_of(job);
    const char **paths = calloc(job->n_files + 1, sizeof *paths);
    if (!paths)
        return perta_fail_sys(err, ENOMEM, "paths");
    for (uint32_t i = 0; i < job->n_files; i++)
        paths[i] = job->files[i].path;
    int rc =
        perta_stream_open(run, &sizes, paths, job->n_files, count_writers(job), &job->stream, err);
    free(paths);
    if (!rc)
        rc = make_scratch(job, err);
    if (rc)
        return rc;
    struct perta_engine *engine = perta_stream_engine(job->stream);
    for (uint32_t i = 0; i < job->n_files && !rc; i++) {
        struct perta_file was = job->files[i];
        rc = perta_file_open(&job->files[i], was.path, engine->wants_direct, err);
        was.fd = job->files[i].fd;
        if (!rc)
            rc = perta_file_unchanged(&was, err);
        free(was.path);
    }
    unsigned writer = 0;
    for (int stat = 0; stat < N_STATS; stat++)
        if (job->wanted[stat]) {
            job->outs[stat].engine = engine;
            job->outs[stat].writer_bufs = perta_stream_writer_bufs(job->stream, writer++);
        }
    return rc;
}

static int finish(struct job *job, json_t **summary, struct perta_err *err)
{
    json_t *folders = json_array();
    uint64_t written = 0;
    int rc = reach_shard(job, job->first->n_shards, err);
    for (uint32_t i = 0; i < job->n_files && !rc; i++)
        rc = perta_file_unchanged(&job->files[i], err);
    for (int stat = 0; stat < N_STATS && !rc; stat++) {
        if (!job->wanted[stat])
            continue;
        if (job->plans[stat].index)
            rc = perta_publish_file(&job->outs[stat].folder, PERTA_INDEX_NAME,
                                    job->plans[stat].index, strlen(job->plans[stat].index), err);
        perta_json_append(&folders, perta_text_json("%s", job->outs[stat].folder.path));
        written += job->outs[stat].written_bytes;
    }
    perta_json_set(summary, "folders", folders);
    perta_json_set(summary, "written_bytes", json_integer((json_int_t)written));
    perta_json_set(summary, "samples", json_integer(job->accumulate->n_gradients));
    perta_json_set(summary, "tensors", json_integer((json_int_t)job->first->n_tensors));
    return rc;
}

static void release(struct job *job)
{
    for (int stat = 0; stat < N_STATS; stat++) {
        perta_model_out_release(&job->outs[stat]);
        perta_importance_release(&job->plans[stat]);
    }
    for (uint32_t i = 0; i < job->n_files; i++)
        perta_file_close(&job->files[i]);
    free(job->files);
    free(job->places);
    for (unsigned w = 0; job->scratch && w < job->n_workers; w++)
        for (int i = 0; i < 4; i++)
            free(job->scratch[w].sums[i]);
    free(job->scratch);
    perta_stream_close(job->stream);
    perta_checkpoint_close(job->first);
}

/* Restore what the interrupted run had written, and reopen the shards that it was writing. */
static int restore(struct job *job, struct perta_err *err)
{
    int rc = perta_resume_restore(&job->resume, job->stream, err);
    if (rc || !job->resume.journal.resuming)
        return rc;
    job->shards_begun = job->resume.shard + 1;
    for (int stat = 0; stat < N_STATS && !rc; stat++) {
        if (!job->wanted[stat])
            continue;
        const struct perta_importance_shard *shard = &job->plans[stat].shards[job->resume.shard];
        uint64_t off = shard->tensors[job->resume.tensor].off_bytes;
        rc = perta_model_out_reopen(&job->outs[stat], job->resume.shard, shard->name,
                                    off + job->resume.unit * sizeof(float), err);
    }
    return rc;
}

static int run_all(struct job *job, const struct perta_run *run, json_t **summary,
                   struct perta_err *err)
{
    int rc = begin_outputs(job, run, err);
    if (rc || perta_resume_is_publishing(&job->resume, summary))
        return rc;
    rc = open_stream(job, run, err);
    if (!rc)
        rc = restore(job, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    if (!rc)
        rc = finish(job, summary, err);
    if (!rc)
        perta_json_set(summary, "read_bytes",
                       json_integer((json_int_t)perta_stream_read_bytes(job->stream)));
    return rc;
}

static int check_arguments(const struct perta_accumulate *acc, struct perta_err *err)
{
    const struct perta_argument needed = {"--out DIR", acc->out};
    if (!acc->n_gradients)
        return perta_fail(err, PERTA_EUSAGE, "no gradients given; name files or folders");
    if (!acc->mean && !acc->meansq)
        return perta_fail(err, PERTA_EUSAGE, "--stat: mean, meansq or both");
    int rc = perta_arguments_list("gradients", acc->gradients, acc->n_gradients, err);
    return rc ? rc : perta_arguments_needed(&needed, 1, err);
}

int perta_accumulate(const struct perta_accumulate *accumulate, const struct perta_run *run,
                     json_t **summary, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = perta_arguments_begin(accumulate, run, summary, err);
    if (!rc)
        rc = check_arguments(accumulate, err);
    if (rc)
        return rc;
    struct job job = {
        .accumulate = accumulate,
        .wanted = {accumulate->mean, accumulate->meansq},
    };
    rc = prepare(&job, run, err);
    if (!rc && !(*summary = json_object()))
        rc = perta_fail_sys(err, ENOMEM, "accumulate");
    if (!rc && !run->dry_run) {
        rc = run_all(&job, run, summary, err);
        rc = perta_resume_end(&job.resume, rc, summary, err);
    }
    release(&job);
    return rc;
}
