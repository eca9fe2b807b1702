#include "stream/stream.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/fpenv.h"
#include "io/hasher.h"
#include "io/thread.h"
#include "stream/cpus.h"
#include "stream/memory.h"
#include "stream/slot.h"

#define SLOTS_MAX 64
/* Reading further ahead than this gains nothing, and touching memory costs time. */
#define AHEAD_BYTES (64ull << 20)
#define DEPTH 32
/* For thread stacks, malloc's own memory, and what the kernel charges to the process. */
#define MARGIN_BYTES (12ull << 20)

struct perta_stream {
    struct perta_run run;
    struct perta_job job;
    struct perta_io_choice choice;
    struct perta_engine *engine;
    struct perta_hasher *hasher;
    struct perta_pool pool;
    struct perta_slot_shape shape;
    struct perta_slot slots[SLOTS_MAX]; /* a ring, in order of the pieces */
    unsigned n_slots, n_workers;
    struct perta_writer_bufs writer_bufs; /* of the first writer; the others' buffers follow */

    /* used by the owner alone */
    /* How many batches were filled, committed and freed so far. Batch i is in slot i mod
     * n_slots. */
    uint64_t n_filled, n_committed, n_freed;
    bool ended;                 /* next() returned 0, or failed */
    struct perta_err next_err;  /* its error, reported after all pieces before it */
    struct perta_piece pending; /* from next(), not in a slot yet */
    bool has_pending;
    uint64_t read_bytes;

    /* shared with the workers, under lock */
    pthread_mutex_t lock;
    pthread_cond_t ready;
    bool stopping;
    pthread_t threads[SLOTS_MAX];
    unsigned n_threads; /* how many of n_workers are running */
    unsigned next_worker;
};

unsigned perta_run_threads(const struct perta_run *run)
{
    unsigned n = run->n_threads ? run->n_threads : perta_cpus_available();
    return n < PERTA_THREADS_MAX ? n : PERTA_THREADS_MAX;
}

/* Each worker needs a slot. */
static unsigned workers_wanted(const struct perta_run *run)
{
    unsigned n = perta_run_threads(run);
    return n < SLOTS_MAX ? n : SLOTS_MAX;
}

static unsigned queue_depth(void)
{
    const char *asked = getenv("PERTA_QUEUE_DEPTH"); /* for measurements and tests */
    unsigned long depth = asked ? strtoul(asked, NULL, 10) : 0;
    return depth > 0 && depth <= 1024 ? (unsigned)depth : DEPTH;
}

static uint64_t slot_bytes(const struct perta_slot_shape *shape)
{
    return perta_slot_pool_bytes(shape) + perta_slot_heap_bytes(shape);
}

static uint64_t fixed_bytes(const struct perta_job *job, unsigned n_writers)
{
    return perta_memory_trimmed() + job->later_bytes + MARGIN_BYTES +
           (uint64_t)n_writers * PERTA_WRITER_BUFS_MIN * PERTA_WRITER_BUF_BYTES;
}

/* Scratch and stacks of n workers. False on overflow. */
static bool worker_bytes(const struct perta_job *job, unsigned n, uint64_t *bytes)
{
    return !perta_add_overflows(job->worker_bytes, PERTA_STACK_BYTES, bytes) &&
           !perta_mul_overflows(*bytes, n, bytes);
}

uint64_t perta_stream_memory(const struct perta_job *job, unsigned n_writers, unsigned n_workers,
                             unsigned n_slots)
{
    struct perta_slot_shape shape = perta_slot_shape_for(job);
    uint64_t workers, sum;
    uint64_t slots = n_slots * slot_bytes(&shape);
    bool known = worker_bytes(job, n_workers, &workers) &&
                 !perta_add_overflows(fixed_bytes(job, n_writers), slots, &sum) &&
                 !perta_add_overflows(sum, workers, &sum);
    return known && sum < INT64_MAX ? sum : INT64_MAX;
}

/* Give the writers more than their minimum of buffers: up to a quarter of what is left. Returns the
 * bytes that takes. */
static uint64_t add_writer_bufs(struct perta_stream *s, unsigned n_writers, uint64_t left_bytes)
{
    uint64_t each = n_writers * (uint64_t)PERTA_WRITER_BUF_BYTES, most = PERTA_WRITER_BUFS_MAX;
    uint64_t more = n_writers ? left_bytes / 4 / each : 0;
    most -= PERTA_WRITER_BUFS_MIN;
    more = more < most ? more : most;
    s->writer_bufs.n = PERTA_WRITER_BUFS_MIN + (unsigned)more;
    return more * each;
}

/* Choose how many workers and slots fit the budget: first as many workers as possible, each with a
 * slot to work on; then as many more slots as are useful. At least one of each. */
static int choose_counts(struct perta_stream *s, unsigned n_writers, struct perta_err *err)
{
    uint64_t slot = slot_bytes(&s->shape), worker, budget = s->run.memory_bytes;
    uint64_t least = perta_stream_memory(&s->job, n_writers, 1, 1);
    if (budget < least || !worker_bytes(&s->job, 1, &worker))
        return perta_memory_refuse(budget, least, err, "for this job");
    uint64_t left = budget - least, fit = 1 + left / (worker + slot);
    unsigned wanted = workers_wanted(&s->run);
    s->n_workers = fit < wanted ? (unsigned)fit : wanted;
    left -= (s->n_workers - 1) * (worker + slot);
    left -= add_writer_bufs(s, n_writers, left);
    fit = s->n_workers + left / slot;
    uint64_t ahead = s->job.total_bytes < AHEAD_BYTES ? s->job.total_bytes : AHEAD_BYTES;
    uint64_t useful = ahead / slot + 2 * (uint64_t)s->n_workers + 2;
    uint64_t n = fit < useful ? fit : useful;
    s->n_slots = n < SLOTS_MAX ? (unsigned)n : SLOTS_MAX;
    return 0;
}

static int take_memory(struct perta_stream *s, unsigned n_writers, struct perta_err *err)
{
    int rc = choose_counts(s, n_writers, err);
    if (rc)
        return rc;
    uint64_t stride = perta_slot_pool_bytes(&s->shape), slots_bytes = stride * s->n_slots;
    uint64_t writer_bytes = s->writer_bufs.n * (uint64_t)PERTA_WRITER_BUF_BYTES;
    rc = perta_pool_take(&s->pool, slots_bytes + n_writers * writer_bytes, err);
    if (rc)
        return rc;
    s->writer_bufs.base = s->pool.base + slots_bytes;
    for (unsigned i = 0; i < s->n_slots && !rc; i++)
        rc = perta_slot_init(&s->slots[i], &s->shape, s->pool.base + i * stride, err);
    s->pending.in = calloc(s->shape.n_in, sizeof *s->pending.in);
    if (!rc && !s->pending.in)
        rc = perta_fail_sys(err, ENOMEM, "slots");
    return rc;
}

static void digested(void *stream)
{
    perta_engine_wake(((struct perta_stream *)stream)->engine);
}

int perta_stream_open(const struct perta_run *run, const struct perta_job *job,
                      const char *const *paths, size_t n_paths, unsigned n_writers,
                      struct perta_stream **out, struct perta_err *err)
{
    struct perta_stream *s = calloc(1, sizeof *s);
    if (!s)
        return perta_fail_sys(err, ENOMEM, "stream");
    s->run = *run;
    s->job = *job;
    s->shape = perta_slot_shape_for(job);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->ready, NULL);
    int rc = perta_engine_choose(run->io, paths, n_paths, &s->choice, err);
    if (!rc)
        rc = take_memory(s, n_writers, err);
    if (!rc)
        rc = perta_engine_open(s->choice.mode, queue_depth(), &s->engine, err);
    if (!rc)
        rc = perta_hasher_open(&s->hasher, s->n_workers, digested, s, err);
    if (!rc)
        s->engine->hasher = s->hasher;
    if (rc) {
        perta_stream_close(s);
        return rc;
    }
    *out = s;
    return 0;
}

void perta_stream_close(struct perta_stream *s)
{
    if (!s)
        return;
    perta_hasher_close(s->hasher);
    perta_engine_close(s->engine);
    for (unsigned i = 0; i < s->n_slots; i++)
        perta_slot_release(&s->slots[i]);
    free(s->pending.in);
    perta_pool_give(&s->pool);
    pthread_cond_destroy(&s->ready);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

struct perta_engine *perta_stream_engine(struct perta_stream *s)
{
    return s->engine;
}

unsigned perta_stream_workers(const struct perta_stream *s)
{
    return s->n_workers;
}

const struct perta_io_choice *perta_stream_choice(const struct perta_stream *s)
{
    return &s->choice;
}

struct perta_writer_bufs perta_stream_writer_bufs(struct perta_stream *s, unsigned i)
{
    struct perta_writer_bufs bufs = s->writer_bufs;
    bufs.base += (uint64_t)i * bufs.n * PERTA_WRITER_BUF_BYTES;
    return bufs;
}

void perta_stream_skip(struct perta_stream *s, uint64_t done_bytes)
{
    s->job.total_bytes -= done_bytes < s->job.total_bytes ? done_bytes : s->job.total_bytes;
}

uint64_t perta_stream_read_bytes(const struct perta_stream *s)
{
    return s->read_bytes;
}

static void set_state(struct perta_stream *s, struct perta_slot *slot, enum perta_slot_state state)
{
    pthread_mutex_lock(&s->lock);
    slot->state = state;
    if (state == SLOT_READY)
        pthread_cond_signal(&s->ready);
    pthread_mutex_unlock(&s->lock);
}

static enum perta_slot_state get_state(struct perta_stream *s, const struct perta_slot *slot)
{
    pthread_mutex_lock(&s->lock);
    enum perta_slot_state state = slot->state;
    pthread_mutex_unlock(&s->lock);
    return state;
}

/* Reads end in any order. Report the failure of the first piece. */
static void find_failed(struct perta_slot *slot)
{
    const struct perta_slot_read *first = NULL;
    for (uint32_t i = 0; i < slot->n_reads; i++) {
        const struct perta_slot_read *read = &slot->reads[i];
        if (read->request.sys_errno && (!first || read->first_piece < first->first_piece))
            first = read;
    }
    if (first)
        perta_request_error(&first->request, &slot->err);
}

/* READING -> READY, when the last of the slot's reads is done. */
static void on_read(struct perta_request *request)
{
    struct perta_slot *slot = request->user;
    if (--slot->n_pending)
        return;
    find_failed(slot);
    perta_slot_point(slot);
    set_state(slot->stream, slot, SLOT_READY);
}

/* Add pieces to a slot until one does not fit. True if the slot has any. */
static bool pack(struct perta_stream *s, struct perta_slot *slot)
{
    perta_slot_clear(slot);
    for (;;) {
        if (!s->has_pending && !s->ended) {
            struct perta_range *in = s->pending.in;
            memset(in, 0, s->shape.n_in * sizeof *in);
            s->pending = (struct perta_piece){.in = in};
            int rc = s->job.next(s->job.ctx, &s->pending, &s->next_err);
            s->has_pending = rc > 0;
            s->ended = rc <= 0;
        }
        if (!s->has_pending || !perta_slot_add(slot, &s->shape, &s->pending)) {
            assert(!s->has_pending || slot->n_pieces); /* else the job's *_max are too small */
            return slot->n_pieces > 0;
        }
        s->has_pending = false;
    }
}

/* FREE -> READING: fill every free slot, in order. */
static void read_ahead(struct perta_stream *s)
{
    while (s->n_filled - s->n_freed < s->n_slots && (!s->ended || s->has_pending)) {
        struct perta_slot *slot = &s->slots[s->n_filled % s->n_slots];
        if (!pack(s, slot))
            return;
        perta_slot_lay_out(slot);
        slot->stream = s;
        slot->n_pending = slot->n_reads;
        pthread_mutex_lock(&s->lock);
        slot->state = slot->n_reads ? SLOT_READING : SLOT_READY;
        s->n_filled++;
        if (slot->state == SLOT_READY)
            pthread_cond_signal(&s->ready);
        pthread_mutex_unlock(&s->lock);
        for (uint32_t i = 0; i < slot->n_reads; i++) {
            slot->reads[i].request.done = on_read;
            perta_engine_submit(s->engine, &slot->reads[i].request);
        }
    }
}

/* DONE -> COMMITTED: the oldest batch. */
static int commit(struct perta_stream *s, struct perta_slot *slot, struct perta_err *err)
{
    int rc = perta_engine_check(s->engine, err);
    for (uint32_t i = 0; i < slot->n_good && !rc; i++) {
        for (uint32_t k = 0; k < s->shape.n_in; k++)
            s->read_bytes += slot->pieces[i].in[k].len_bytes;
        rc = s->job.commit(s->job.ctx, &slot->pieces[i], err);
    }
    if (!rc)
        rc = perta_engine_check(s->engine, err);
    if (!rc && slot->err.code) {
        *err = slot->err;
        rc = err->code;
    }
    slot->digested = perta_hasher_given(s->hasher);
    pthread_mutex_lock(&s->lock);
    slot->state = SLOT_COMMITTED;
    s->n_committed++;
    pthread_mutex_unlock(&s->lock);
    if (s->run.progress)
        s->run.progress(s->run.progress_user, s->read_bytes, s->job.total_bytes);
    return rc;
}

/* COMMITTED -> FREE: in order, once the bytes in a slot are digested. */
static int set_free(struct perta_stream *s, struct perta_err *err)
{
    while (s->n_freed < s->n_committed) {
        struct perta_slot *slot = &s->slots[s->n_freed % s->n_slots];
        if (!perta_hasher_passed(s->hasher, slot->digested))
            return 0;
        int rc = perta_engine_check(s->engine, err);
        if (rc)
            return rc;
        for (uint32_t i = 0; i < slot->n_reads; i++)
            perta_engine_release(s->engine, &slot->reads[i].request);
        set_state(s, slot, SLOT_FREE);
        s->n_freed++;
    }
    return 0;
}

/* Everything is read and committed. */
static int finish(struct perta_stream *s, struct perta_err *err)
{
    perta_hasher_wait(s->hasher, perta_hasher_given(s->hasher));
    int rc = set_free(s, err);
    if (!rc && s->next_err.code)
        *err = s->next_err;
    return rc ? rc : s->next_err.code;
}

static bool cancelled(const struct perta_stream *s)
{
    return s->run.cancel && *s->run.cancel;
}

/* The loop: free slots, read ahead, and commit or wait, until the job ends. */
static int loop(struct perta_stream *s, struct perta_err *err)
{
    for (;;) {
        if (cancelled(s))
            return perta_fail(err, PERTA_EINTR, "interrupted");
        int rc = set_free(s, err);
        if (rc)
            return rc;
        read_ahead(s);
        if (s->n_committed == s->n_filled && s->ended && !s->has_pending)
            return finish(s, err);
        struct perta_slot *oldest = &s->slots[s->n_committed % s->n_slots];
        if (get_state(s, oldest) == SLOT_DONE)
            rc = commit(s, oldest, err);
        else
            rc = perta_engine_wait(s->engine, err);
        if (rc)
            return rc;
    }
}

/* READY -> WORKING: workers take ready slots in order. */
static struct perta_slot *take_slot(struct perta_stream *s)
{
    pthread_mutex_lock(&s->lock);
    struct perta_slot *slot = NULL;
    while (!s->stopping) {
        for (uint64_t b = s->n_committed; b < s->n_filled && !slot; b++)
            if (s->slots[b % s->n_slots].state == SLOT_READY)
                slot = &s->slots[b % s->n_slots];
        if (slot)
            break;
        pthread_cond_wait(&s->ready, &s->lock);
    }
    if (slot)
        slot->state = SLOT_WORKING;
    pthread_mutex_unlock(&s->lock);
    return slot;
}

/* WORKING -> DONE. */
static void *worker(void *arg)
{
    struct perta_stream *s = arg;
    pthread_mutex_lock(&s->lock);
    unsigned number = s->next_worker++;
    pthread_mutex_unlock(&s->lock);
    for (struct perta_slot *slot; (slot = take_slot(s));) {
        for (; slot->n_good < slot->n_pieces && !slot->err.code; slot->n_good++)
            if (s->job.work(s->job.ctx, number, &slot->pieces[slot->n_good], &slot->err))
                break;
        set_state(s, slot, SLOT_DONE);
        perta_engine_wake(s->engine);
    }
    return NULL;
}

/* Start the workers. Fewer are enough if the system has no more threads. */
static int start_workers(struct perta_stream *s, struct perta_err *err)
{
    int rc = 0;
    for (; s->n_threads < s->n_workers && !rc; s->n_threads += !rc)
        rc = perta_thread_start(&s->threads[s->n_threads], worker, s);
    return s->n_threads ? 0 : perta_fail_sys(err, rc, "worker threads");
}

static void stop_workers(struct perta_stream *s)
{
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_broadcast(&s->ready);
    pthread_mutex_unlock(&s->lock);
    while (s->n_threads)
        pthread_join(s->threads[--s->n_threads], NULL);
}

int perta_stream_run(struct perta_stream *s, struct perta_err *err)
{
    PERTA_FP_SCOPE;
    int rc = start_workers(s, err);
    if (!rc)
        rc = loop(s, err);
    stop_workers(s);
    struct perta_err ignored = {0};
    perta_engine_drain(s->engine, &ignored);
    perta_hasher_wait(s->hasher, perta_hasher_given(s->hasher));
    for (unsigned i = 0; i < s->n_slots; i++)
        for (uint32_t r = 0; r < s->slots[i].n_reads; r++)
            perta_engine_release(s->engine, &s->slots[i].reads[r].request);
    return rc;
}

/* ---- one file in order ---- */

#define PARTS_MAX 8
#define PART_BYTES (2ull << 20)

static void on_part(struct perta_request *request)
{
    *(bool *)request->user = true;
}

int perta_stream_read_file(struct perta_stream *s, struct perta_file *file,
                           void (*use)(void *ctx, const uint8_t *data, uint64_t len_bytes),
                           void *ctx, struct perta_err *err)
{
    struct perta_request requests[PARTS_MAX];
    bool done[PARTS_MAX];
    uint64_t room = perta_slot_pool_bytes(&s->shape) * s->n_slots;
    uint64_t n = room / perta_read_room(PART_BYTES), part = PART_BYTES, sent = 0, used = 0;
    n = n < PARTS_MAX ? n : PARTS_MAX;
    if (!n) { /* a tiny job */
        n = 1;
        part = room - PERTA_READ_OVERHANG;
    }
    assert(part);
    int rc = 0;
    while (!rc && used < file->len_bytes) {
        for (; sent < file->len_bytes && sent - used < n * part; sent += part) {
            uint64_t i = sent / part % n, left = file->len_bytes - sent;
            requests[i] = (struct perta_request){
                .file = file,
                .off_bytes = sent,
                .len_bytes = left < part ? left : part,
                .buf = s->pool.base + i * perta_read_room(part),
                .done = on_part,
                .user = &done[i],
            };
            done[i] = false;
            perta_engine_submit(s->engine, &requests[i]);
        }
        struct perta_request *oldest = &requests[used / part % n];
        while (!rc && !done[used / part % n])
            rc = cancelled(s) ? perta_fail(err, PERTA_EINTR, "interrupted")
                              : perta_engine_wait(s->engine, err);
        if (!rc && oldest->sys_errno)
            rc = perta_request_error(oldest, err);
        if (!rc) {
            use(ctx, oldest->data, oldest->len_bytes);
            rc = perta_engine_check(s->engine, err);
        }
        perta_engine_release(s->engine, oldest);
        used += part;
        uint64_t so_far = used < file->len_bytes ? used : file->len_bytes;
        if (s->run.progress)
            s->run.progress(s->run.progress_user, so_far, file->len_bytes);
    }
    s->read_bytes += used < file->len_bytes ? used : file->len_bytes;
    struct perta_err ignored = {0};
    perta_engine_drain(s->engine, &ignored);
    for (; used < sent; used += part)
        perta_engine_release(s->engine, &requests[used / part % n]);
    return rc;
}
