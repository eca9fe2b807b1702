#include "io/engine.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "io/checked.h"

/* AUTO chooses mmap when at least this share of the sampled pages is in the page cache. */
#define CACHED_ENOUGH 0.9

/* Mean over the files; -1 if it is unknown for one of them. */
static double cached_share(const char *const *paths, size_t n_paths)
{
    double sum = 0;
    for (size_t i = 0; i < n_paths; i++) {
        double share = perta_file_cached_share(paths[i]);
        if (share < 0)
            return -1;
        sum += share;
    }
    return n_paths ? sum / (double)n_paths : 0;
}

static int choose_by_hand(enum perta_io_mode wanted, struct perta_io_choice *choice,
                          struct perta_err *err)
{
    choice->mode = wanted;
    snprintf(choice->why, sizeof choice->why, "asked for");
    int refused = wanted == PERTA_IO_DIRECT ? perta_engine_uring_probe() : 0;
    if (refused)
        return perta_fail_sys(err, refused,
                              "io_uring is refused here; use --io auto, pread or mmap");
    return 0;
}

int perta_engine_choose(enum perta_io_mode wanted, const char *const *paths, size_t n_paths,
                        struct perta_io_choice *choice, struct perta_err *err)
{
    if (wanted != PERTA_IO_AUTO)
        return choose_by_hand(wanted, choice, err);
    for (size_t i = 0; i < n_paths; i++)
        if (!perta_file_can_direct(paths[i])) {
            choice->mode = PERTA_IO_MMAP;
            snprintf(choice->why, sizeof choice->why, "no O_DIRECT for %.200s", paths[i]);
            return 0;
        }
    double cached = cached_share(paths, n_paths);
    int refused = perta_engine_uring_probe();
    if (cached >= CACHED_ENOUGH) {
        choice->mode = PERTA_IO_MMAP;
        snprintf(choice->why, sizeof choice->why, "%.0f%% of the files is in the page cache",
                 cached * 100);
    } else if (refused) {
        choice->mode = PERTA_IO_PREAD;
        snprintf(choice->why, sizeof choice->why, "io_uring is refused here: %s",
                 strerror(refused));
    } else {
        choice->mode = PERTA_IO_DIRECT;
        if (cached < 0)
            snprintf(choice->why, sizeof choice->why,
                     "io_uring works; how much is in the page cache is unknown");
        else
            snprintf(choice->why, sizeof choice->why,
                     "io_uring works; files are on disk (%.0f%% in the page cache)", cached * 100);
    }
    return 0;
}

int perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                      struct perta_err *err)
{
    switch (mode) {
    case PERTA_IO_MMAP:
        return perta_engine_mmap_open(out, err);
    case PERTA_IO_PREAD:
        return perta_engine_threads_open(depth, out, err);
    default:
        return perta_engine_uring_open(depth, out, err);
    }
}

void perta_engine_close(struct perta_engine *engine)
{
    assert(!engine || !engine->n_in_flight); /* or the kernel would write to freed memory */
    if (engine)
        engine->ops->close(engine);
}

void perta_engine_submit(struct perta_engine *engine, struct perta_request *request)
{
    request->sys_errno = 0;
    request->done_bytes = 0;
    request->retry = (struct perta_retry){0};
    request->map = NULL;
    request->next = NULL;
    perta_request_align(request);
    engine->n_in_flight++;
    engine->ops->submit(engine, request);
}

int perta_engine_wait(struct perta_engine *engine, struct perta_err *err)
{
    return engine->ops->wait(engine, err);
}

void perta_engine_wake(struct perta_engine *engine)
{
    engine->ops->wake(engine);
}

void perta_engine_release(struct perta_engine *engine, struct perta_request *request)
{
    if (engine->ops->release)
        engine->ops->release(engine, request);
}

int perta_engine_check(struct perta_engine *engine, struct perta_err *err)
{
    return engine->ops->check ? engine->ops->check(engine, err) : 0;
}

int perta_engine_drain(struct perta_engine *engine, struct perta_err *err)
{
    int rc = 0;
    while (engine->n_in_flight) {
        struct perta_err why = {0};
        if (perta_engine_wait(engine, &why) && !rc) {
            rc = why.code;
            *err = why;
        }
    }
    return rc;
}

int perta_request_error(const struct perta_request *request, struct perta_err *err)
{
    unsigned long long byte = request->off_bytes + request->done_bytes;
    if (request->sys_errno == ENODATA)
        return perta_fail(err, PERTA_EINPUT, "%s: ends at byte %llu, %llu more expected",
                          request->file->path, byte,
                          (unsigned long long)(request->len_bytes - request->done_bytes));
    return perta_fail_sys(err, request->sys_errno, "%s: %s at byte %llu", request->file->path,
                          request->write ? "write" : "read", byte);
}

void perta_request_align(struct perta_request *request)
{
    uint64_t unit = request->file->direct ? PERTA_BLOCK_BYTES : 1;
    request->at = perta_align_down(request->off_bytes, unit);
    request->end = perta_align_up(request->off_bytes + request->len_bytes, unit);
    request->reached = request->at;
    request->data = request->buf + (request->off_bytes - request->at);
}

static void count_done(struct perta_request *r)
{
    uint64_t wanted_end = r->off_bytes + r->len_bytes;
    if (r->at > r->off_bytes)
        r->done_bytes = (r->at < wanted_end ? r->at : wanted_end) - r->off_bytes;
}

/* Some FUSE file systems keep returning less than a block although there is more. Read the rest
 * without O_DIRECT, from where the transfer stopped. */
static bool read_rest(struct perta_request *r)
{
    if (r->write || !r->file->direct || r->retry.buffered || r->at >= r->file->len_bytes)
        return false;
    r->retry.buffered = true;
    r->at = r->reached;
    return perta_fd_buffer(r->file->fd);
}

bool perta_request_advance(struct perta_request *request, int64_t got)
{
    uint64_t wanted_end = request->off_bytes + request->len_bytes;
    if (got < 0) {
        request->sys_errno = (int)-got;
        if (perta_retry_any(&request->retry, request->file->fd, request->sys_errno))
            request->sys_errno = 0;
        return request->sys_errno;
    }
    request->at += (uint64_t)got;
    /* No progress: a direct read at the end of the file keeps returning its last, partial block. */
    if (request->at <= request->reached && request->at < wanted_end) {
        count_done(request);
        if (read_rest(request))
            return false;
        request->sys_errno = request->write ? EIO : ENODATA;
        return true;
    }
    request->reached = request->at;
    request->retry.n_again = 0;
    count_done(request);
    if (request->at >= wanted_end)
        return true;
    /* With O_DIRECT, a short transfer continues at the block in which it stopped. */
    if (request->file->direct && !request->retry.buffered)
        request->at = perta_align_down(request->at, PERTA_BLOCK_BYTES);
    return false;
}
