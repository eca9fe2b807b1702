#include "stream/patch/in_place.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/publish/publish.h"
#include "io/wal.h"
#include "stream/input.h"
#include "stream/patch/model_out.h"
#include "stream/patch/patch_in.h"
#include "stream/walk.h"

/* Upper bound of bytes written between two syncs; less with a small budget. */
#define BATCH_BYTES (64ull << 20)
#define BATCH_SHARE 16 /* this fraction of the budget */
#define OUT_ALIGN 64

enum { IN_MODEL, IN_FRAME, N_IN };

/* The first pass does everything except writing, so that a wrong model or a damaged patch is found
 * before anything is changed. */
enum pass { PASS_CHECK, PASS_WRITE };

struct job {
    const struct perta_apply *apply;
    bool forward;
    struct perta_patch_in patch;
    struct perta_input model;
    struct perta_file *files; /* (n_shards), open for writing */
    int lock;                 /* the folder's descriptor, which is locked; or -1 */
    struct perta_wal wal;
    struct perta_run run; /* with the engine that the first pass chose, for both passes */
    struct perta_stream *stream;
    struct perta_codec **codecs;
    enum pass pass;
    uint8_t **todo; /* (n_shards, n_entries): chunks that must be written */
    uint64_t n_todo, n_chunks;

    /* position of next(): chunks in order of the table */
    uint32_t shard;
    uint64_t entry, unit; /* unit: that chunk's first unit in its tensor */
};

static const struct perta_patch_entry *entry_of(const struct job *job,
                                                const struct perta_piece *piece)
{
    return &job->patch.shards[piece->shard].patch->entries[piece->tag];
}

/* ---- reading ---- */

/* Advance next() by one entry: to the tensor's next unit, or to the next tensor's first. */
static void advance(struct job *job, const struct perta_patch *patch)
{
    const struct perta_patch_entry *e = &patch->entries[job->entry];
    job->entry++;
    bool same = job->entry < patch->n_entries && patch->entries[job->entry].tensor == e->tensor;
    job->unit = same ? job->unit + e->n_units : 0;
}

static int next(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    (void)err;
    struct job *job = ctx;
    for (; job->shard < job->patch.n_shards; job->shard++, job->entry = job->unit = 0) {
        struct perta_patch_in_shard *shard = &job->patch.shards[job->shard];
        const struct perta_patch *patch = shard->patch;
        for (; job->entry < patch->n_entries; advance(job, patch)) {
            if (job->pass == PASS_WRITE && !job->todo[job->shard][job->entry])
                continue;
            const struct perta_patch_entry *e = &patch->entries[job->entry];
            const struct perta_tensor *tensor = perta_patch_in_tensor(shard, e);
            struct perta_ref ref = {.tensor = tensor, .shard = job->shard};
            piece->shard = job->shard;
            piece->tensor = e->tensor;
            piece->tag = job->entry;
            piece->first_elem = job->unit;
            piece->n_elems = e->n_units;
            perta_input_range(&job->model, &ref, job->unit, e->n_units, &piece->in[IN_MODEL]);
            perta_patch_in_frame(shard, e, &piece->in[IN_FRAME]);
            piece->out_bytes = OUT_ALIGN + piece->in[IN_MODEL].len_bytes;
            advance(job, patch);
            return 1;
        }
    }
    return 0;
}

/* ---- the two passes ---- */

/* piece->out gets a flag, whether the chunk must be written, and then its new bytes. */
static int work(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_patch_in_shard *shard = &job->patch.shards[piece->shard];
    const struct perta_patch_entry *e = entry_of(job, piece);
    const struct perta_range *model = &piece->in[IN_MODEL];
    uint64_t found = perta_hash64(model->data, model->len_bytes);
    bool is_from = found == (job->forward ? e->hash_before : e->hash_after);
    bool is_to = found == (job->forward ? e->hash_after : e->hash_before);
    /* Only an interrupted edit may have changed some of the chunks already. */
    if (!is_from && !(is_to && job->pass == PASS_CHECK && job->wal.resuming))
        return perta_patch_in_wrong_chunk(shard, e, job->forward, model->file->path,
                                          piece->first_elem, found, err);
    *(bool *)piece->out = !is_to;
    if (is_to)
        return 0;
    uint8_t *made = piece->out + OUT_ALIGN;
    int rc = perta_patch_in_move(shard, e, job->forward, job->codecs[worker],
                                 piece->in[IN_FRAME].data, model->data, made, err);
    return rc ? rc : perta_patch_in_check_made(shard, e, job->forward, made, err);
}

static int commit(void *ctx, struct perta_piece *piece, struct perta_err *err)
{
    struct job *job = ctx;
    const struct perta_range *model = &piece->in[IN_MODEL];
    if (job->pass == PASS_WRITE)
        return perta_wal_put(&job->wal, piece->shard, model->off_bytes, piece->out + OUT_ALIGN,
                             model->len_bytes, err);
    bool todo = *(const bool *)piece->out;
    job->todo[piece->shard][piece->tag] = todo;
    job->n_todo += todo;
    job->n_chunks++;
    return 0;
}

/* ---- checks ---- */

/* Lock the folder: only one process may edit it at a time. */
static int lock_folder(struct job *job, struct perta_err *err)
{
    const char *path = job->apply->model;
    job->lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (job->lock < 0)
        return errno == ENOTDIR
                   ? perta_fail(err, PERTA_EUSAGE,
                                "%s: --in-place is for folders; --out DIR takes files", path)
                   : perta_fail_sys(err, errno, "%s", path);
    if (flock(job->lock, LOCK_EX | LOCK_NB))
        return errno == EWOULDBLOCK
                   ? perta_fail(err, PERTA_EUSAGE, "%s: another process edits it in place", path)
                   : perta_fail_sys(err, errno, "%s: lock", path);
    return 0;
}

/* The shard must have no other name: the file would change under that name, too. */
static int check_shard(const struct perta_shard *shard, struct perta_err *err)
{
    struct stat st;
    if (lstat(shard->path, &st))
        return perta_fail_sys(err, errno, "%s", shard->path);
    if (S_ISLNK(st.st_mode))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: a symbolic link, as in a Hugging Face cache, where other snapshots "
                          "may share the file; copy the folder first (cp -rL), or use --out DIR",
                          shard->path);
    if (st.st_nlink > 1)
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: has %llu names (hard links), which would all change; copy the "
                          "folder first (cp -r), or use --out DIR",
                          shard->path, (unsigned long long)st.st_nlink);
    if (!(st.st_mode & 0222) || access(shard->path, W_OK))
        return perta_fail(err, PERTA_EUSAGE,
                          "%s: may not be written; change that (chmod u+w), or use --out DIR",
                          shard->path);
    return 0;
}

static int check_layout(const struct job *job, struct perta_err *err)
{
    int rc = 0;
    for (uint32_t s = 0; s < job->patch.n_shards && !rc; s++) {
        const struct perta_patch *p = job->patch.shards[s].patch;
        if (p->before != p->after)
            rc = perta_fail(err, PERTA_EUSAGE,
                            "%s: the patch changes the header of this shard, not only values; that "
                            "cannot be done in place: use --out DIR",
                            job->model.ck->shards[s].path);
        else
            rc = check_shard(&job->model.ck->shards[s], err);
    }
    return rc;
}

static int open_all(struct job *job, struct perta_err *err)
{
    const struct perta_apply *apply = job->apply;
    int rc = perta_patch_in_open(&job->patch, apply->patch, err);
    if (!rc)
        rc = perta_patch_in_refuse_one_way(
            &job->patch, "an interrupted edit in place could not be reverted; use --out DIR", err);
    if (!rc)
        rc = lock_folder(job, err);
    job->model.role = "model";
    if (!rc)
        rc = perta_checkpoint_open_unfinished(apply->model, &job->model.ck, err);
    if (!rc)
        rc = perta_patch_in_check_model(&job->patch, job->model.ck, job->forward, err);
    return rc ? rc : check_layout(job, err);
}

/* ---- memory ---- */

static void measure(const struct job *job, uint64_t *chunk_bytes, uint64_t *frame_bytes)
{
    *chunk_bytes = *frame_bytes = 0;
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch_in_shard *shard = &job->patch.shards[s];
        for (uint64_t e = 0; e < shard->patch->n_entries; e++) {
            const struct perta_patch_entry *entry = &shard->patch->entries[e];
            *chunk_bytes = perta_max(*chunk_bytes, perta_patch_in_chunk_bytes(shard, entry));
            *frame_bytes = perta_max(*frame_bytes, entry->frame_bytes);
        }
    }
}

/* Bytes that this pass reads. */
static uint64_t bytes_to_read(const struct job *job)
{
    uint64_t total = 0;
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        const struct perta_patch_in_shard *shard = &job->patch.shards[s];
        for (uint64_t e = 0; e < shard->patch->n_entries; e++) {
            const struct perta_patch_entry *entry = &shard->patch->entries[e];
            if (job->pass == PASS_CHECK || job->todo[s][e])
                total += perta_patch_in_chunk_bytes(shard, entry) + entry->frame_bytes;
        }
    }
    return total;
}

/* Allocate everything whose size is fixed or grows with the table, so that it is resident before
 * slots are counted. */
static int take_memory(struct job *job, uint64_t chunk_bytes, struct perta_err *err)
{
    uint64_t share = job->run.memory_bytes / BATCH_SHARE;
    uint64_t room =
        perta_max(share < BATCH_BYTES ? share : BATCH_BYTES, chunk_bytes + 4 * PERTA_BLOCK_BYTES);
    job->files = calloc(job->patch.n_shards + 1, sizeof *job->files);
    job->todo = calloc(job->patch.n_shards + 1, sizeof *job->todo);
    if (!job->files || !job->todo)
        return perta_fail_sys(err, ENOMEM, "in place");
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        job->files[s].fd = -1;
        uint64_t n = job->patch.shards[s].patch->n_entries + 1;
        if (!(job->todo[s] = malloc(n)))
            return perta_fail_sys(err, ENOMEM, "in place");
        memset(job->todo[s], 1, n);
    }
    int rc = 0;
    for (uint32_t s = 0; s < job->patch.n_shards && !rc; s++)
        rc = perta_file_reopen(&job->files[s], job->model.ck->shards[s].path, true, err);
    if (!rc)
        rc = perta_wal_open(&job->wal, job->model.ck->path, job->patch.manifest_digest.sha256,
                            job->files, job->patch.n_shards, room, err);
    if (rc || !job->wal.resuming)
        return rc;
    /* The log's last batch was replayed, so the shards' times have changed: open the model
     * again. */
    perta_checkpoint_close(job->model.ck);
    rc = perta_checkpoint_open_unfinished(job->apply->model, &job->model.ck, err);
    return rc ? rc : perta_patch_in_check_model(&job->patch, job->model.ck, job->forward, err);
}

/* ---- run ---- */

static int open_stream(struct job *job, struct perta_err *err)
{
    uint64_t chunk_bytes, frame_bytes;
    measure(job, &chunk_bytes, &frame_bytes);
    struct perta_job sizes = {
        .ctx = job,
        .n_in = N_IN,
        .in_bytes_max = chunk_bytes + frame_bytes,
        .out_bytes_max = OUT_ALIGN + chunk_bytes,
        .total_bytes = bytes_to_read(job),
        .worker_bytes = perta_codec_bytes(chunk_bytes),
        .next = next,
        .work = work,
        .commit = commit,
    };
    const char **paths = NULL;
    size_t n_paths = 0;
    int rc = perta_input_paths(&job->model, &paths, &n_paths, err);
    if (!rc)
        rc = perta_patch_in_paths(&job->patch, &paths, &n_paths, err);
    if (!rc)
        rc = perta_stream_open(&job->run, &sizes, paths, n_paths, 0, &job->stream, err);
    free(paths);
    if (rc)
        return rc;
    if (!(job->codecs = perta_codecs_new(perta_stream_workers(job->stream), chunk_bytes, err)))
        return err->code;
    job->run.io = perta_stream_choice(job->stream)->mode;
    bool direct = perta_stream_engine(job->stream)->wants_direct;
    if (job->model.files) /* by the first pass */
        return 0;
    rc = perta_input_open_files(&job->model, direct, err);
    return rc ? rc : perta_patch_in_open_files(&job->patch, direct, err);
}

static int run_pass(struct job *job, enum pass pass, uint64_t *read_bytes, struct perta_err *err)
{
    job->pass = pass;
    job->shard = 0;
    job->entry = job->unit = 0;
    int rc = open_stream(job, err);
    if (!rc)
        rc = perta_stream_run(job->stream, err);
    if (!rc)
        *read_bytes += perta_stream_read_bytes(job->stream);
    perta_stream_close(job->stream);
    perta_codecs_free(job->codecs); /* they are resident, and would count twice in the next pass */
    job->stream = NULL;
    job->codecs = NULL;
    return rc;
}

/* Create the log. It has the patch's absolute path, for whoever finds it from another folder. */
static int begin_journal(struct job *job, struct perta_err *err)
{
    char *whole = realpath(job->patch.path, NULL);
    int rc = perta_wal_begin(&job->wal, job->patch.manifest_digest.sha256,
                             whole ? whole : job->patch.path, err);
    free(whole);
    return rc;
}

static int write_all(struct job *job, uint64_t *read_bytes, struct perta_err *err)
{
    if (!job->n_todo && !job->wal.resuming)
        return 0;
    int rc = job->wal.resuming ? 0 : begin_journal(job, err);
    if (rc)
        return rc;
    rc = run_pass(job, PASS_WRITE, read_bytes, err);
    if (!rc)
        rc = perta_wal_finish(&job->wal, err);
    return rc ? perta_err_context(err,
                                  "%s: partly edited; the same command completes the edit, %s "
                                  "reverts it",
                                  job->model.ck->path, job->forward ? "revert" : "apply")
              : 0;
}

static int run_all(struct job *job, json_t **summary, struct perta_err *err)
{
    uint64_t chunk_bytes, frame_bytes, read_bytes = 0;
    measure(job, &chunk_bytes, &frame_bytes);
    int rc = take_memory(job, chunk_bytes, err);
    if (!rc)
        rc = run_pass(job, PASS_CHECK, &read_bytes, err);
    if (!rc)
        rc = perta_input_unchanged(&job->model, err);
    bool went_on = job->wal.resuming;
    if (!rc)
        rc = write_all(job, &read_bytes, err);
    json_t *unedited = json_array();
    if (!rc)
        rc = perta_model_out_others(job->model.ck, &unedited, err);
    if (!rc && !unedited)
        rc = perta_fail_sys(err, ENOMEM, "%s", job->model.ck->path);
    if (!rc)
        *summary = json_pack("{s:O, s:I, s:I, s:I, s:I, s:b}", "unedited", unedited, "chunks",
                             (json_int_t)job->n_chunks, "written_chunks", (json_int_t)job->n_todo,
                             "read_bytes", (json_int_t)read_bytes, "written_bytes",
                             (json_int_t)job->wal.written_bytes, "went_on", (int)went_on);
    json_decref(unedited);
    return rc;
}

static void release(struct job *job)
{
    perta_wal_close(&job->wal);
    for (uint32_t s = 0; s < job->patch.n_shards; s++) {
        if (job->todo)
            free(job->todo[s]);
        if (job->files)
            perta_file_close(&job->files[s]);
    }
    free(job->todo);
    free(job->files);
    perta_input_close(&job->model);
    perta_patch_in_close(&job->patch);
    if (job->lock >= 0)
        close(job->lock);
}

int perta_in_place(const struct perta_apply *apply, const struct perta_run *run, json_t **summary,
                   struct perta_err *err)
{
    struct job job = {.apply = apply,
                      .forward = apply->mode == PERTA_APPLY,
                      .lock = -1,
                      .wal.log.fd = -1,
                      .run = *run};
    int rc = open_all(&job, err);
    if (!rc && run->dry_run)
        *summary = json_pack("{s:b}", "interrupted", (int)perta_wal_found(apply->model));
    else if (!rc)
        rc = run_all(&job, summary, err);
    release(&job);
    return rc || *summary ? rc : perta_fail_sys(err, ENOMEM, "%s", apply->model);
}
