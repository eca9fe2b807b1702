/* io_uring. Buffers are not registered with the kernel: that would touch all of them before the
 * first read, and with huge pages it saves nothing measurable. */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/engine.h"

struct uring {
    struct perta_engine base;
    struct io_uring ring;
    unsigned depth, n_busy;      /* n_busy: requests given to the kernel */
    struct perta_request *first; /* queue of requests that wait for a free place */
    struct perta_request **last;
    int wake_fd;
    uint64_t wake_count; /* the read of wake_fd goes here */
    struct perta_retry retry;
    int broken; /* 0, or the errno of a ring that failed (see below) */
};

static void prepare(struct uring *u, struct perta_request *r)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    uint64_t unit = r->file->direct ? PERTA_BLOCK_BYTES : 1;
    uint8_t *to = r->buf + (r->at - perta_align_down(r->off_bytes, unit));
    unsigned len = (unsigned)(r->end - r->at);
    if (r->write)
        io_uring_prep_write(sqe, r->file->fd, to, len, r->at);
    else
        io_uring_prep_read(sqe, r->file->fd, to, len, r->at);
    io_uring_sqe_set_data(sqe, r);
}

static void start_waiting(struct uring *u)
{
    while (u->first && u->n_busy < u->depth && !u->broken) {
        struct perta_request *r = u->first;
        u->first = r->next;
        if (!u->first)
            u->last = &u->first;
        u->n_busy++;
        prepare(u, r);
    }
}

/* A write goes ahead of waiting reads: once written, its memory can be read into. */
static void uring_submit(struct perta_engine *engine, struct perta_request *request)
{
    struct uring *u = (struct uring *)engine;
    if (request->write && u->first) {
        request->next = u->first;
        u->first = request;
    } else {
        *u->last = request;
        u->last = &request->next;
    }
    start_waiting(u);
}

static void listen_for_wake(struct uring *u)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);
    io_uring_prep_read(sqe, u->wake_fd, &u->wake_count, sizeof u->wake_count, 0);
    io_uring_sqe_set_data(sqe, NULL);
}

static void finish(struct uring *u, struct perta_request *r)
{
    u->n_busy--;
    u->base.n_in_flight--;
    start_waiting(u);
    r->done(r);
}

static void complete(struct uring *u, struct perta_request *r, int res)
{
    if (perta_request_advance(r, res)) {
        finish(u, r);
    } else if (u->broken) { /* the rest cannot be submitted */
        r->sys_errno = u->broken;
        finish(u, r);
    } else {
        prepare(u, r);
    }
}

/* Handle all completions that are ready. False if there was none. */
static bool reap(struct uring *u)
{
    struct io_uring_cqe *cqe;
    bool some = false;
    while (!io_uring_peek_cqe(&u->ring, &cqe)) {
        struct perta_request *r = io_uring_cqe_get_data(cqe);
        int res = cqe->res;
        io_uring_cqe_seen(&u->ring, cqe);
        some = true;
        if (r)
            complete(u, r, res);
        else if (!u->broken)
            listen_for_wake(u);
    }
    return some;
}

/* ---- a ring that fails ---- */

/* Requests that the kernel has taken still complete, and it writes to their buffers, so they are
 * waited for like any other. All other requests fail, and so does every later submission.
 *
 * This one fails the requests that were prepared but not submitted. The ring is not entered again,
 * so they never will be. */
static void fail_prepared(struct uring *u)
{
    unsigned n = io_uring_sq_ready(&u->ring), mask = u->ring.sq.ring_mask;
    for (unsigned i = 0; i < n; i++) {
        const struct io_uring_sqe *sqe = &u->ring.sq.sqes[(u->ring.sq.sqe_tail - n + i) & mask];
        struct perta_request *r = (struct perta_request *)(uintptr_t)sqe->user_data;
        if (!r || sqe->user_data == LIBURING_UDATA_TIMEOUT)
            continue;
        r->sys_errno = u->broken;
        finish(u, r);
    }
}

/* Fail the queued requests. done may submit more; those fail in the next turn. */
static bool fail_waiting(struct uring *u)
{
    struct perta_request *r = u->first;
    bool some = r;
    u->first = NULL;
    u->last = &u->first;
    while (r) {
        struct perta_request *next = r->next;
        r->sys_errno = u->broken;
        u->base.n_in_flight--;
        r->done(r);
        r = next;
    }
    return some;
}

/* Poll for completions without entering the ring. */
static void wait_broken(struct uring *u)
{
    const struct timespec pause = {.tv_nsec = 1000000};
    bool some = fail_waiting(u);
    if (!reap(u) && !some)
        nanosleep(&pause, NULL);
}

static void enter(struct uring *u)
{
    struct __kernel_timespec fifth = {.tv_nsec = 200000000};
    struct io_uring_cqe *cqe;
    int rc = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &fifth, NULL);
    if (rc >= 0 || rc == -ETIME || rc == -EINTR)
        u->retry.n_again = 0;
    else if ((rc != -EAGAIN && rc != -EBUSY) || !perta_retry_same(&u->retry, EAGAIN))
        u->broken = -rc;
}

static int uring_wait(struct perta_engine *engine, struct perta_err *err)
{
    struct uring *u = (struct uring *)engine;
    (void)err;
    if (u->broken) {
        wait_broken(u);
        return 0;
    }
    enter(u);
    if (u->broken)
        fail_prepared(u);
    reap(u);
    return 0;
}

static void uring_wake(struct perta_engine *engine)
{
    uint64_t one = 1;
    while (write(((struct uring *)engine)->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void uring_close(struct perta_engine *engine)
{
    struct uring *u = (struct uring *)engine;
    io_uring_queue_exit(&u->ring); /* cancels the read of wake_fd */
    close(u->wake_fd);
    free(u);
}

static const struct perta_engine_ops uring_ops = {
    .name = "io_uring",
    .submit = uring_submit,
    .wait = uring_wait,
    .wake = uring_wake,
    .close = uring_close,
};

int perta_engine_uring_open(unsigned depth, struct perta_engine **out, struct perta_err *err)
{
    struct uring *u = calloc(1, sizeof *u);
    if (!u)
        return perta_fail_sys(err, ENOMEM, "io_uring");
    u->base = (struct perta_engine){.ops = &uring_ops, .wants_direct = true};
    u->depth = depth;
    u->last = &u->first;
    u->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (u->wake_fd < 0) {
        int rc = perta_fail_sys(err, errno, "eventfd");
        free(u);
        return rc;
    }
    /* At most depth requests and the read of wake_fd are prepared at once; liburing may add a
     * timeout. The rest is headroom. */
    int rc = io_uring_queue_init(2 * depth + 2, &u->ring, 0);
    if (rc < 0) {
        close(u->wake_fd);
        free(u);
        return perta_fail_sys(err, -rc, "io_uring");
    }
    listen_for_wake(u);
    *out = &u->base;
    return 0;
}

int perta_engine_uring_probe(void)
{
    struct io_uring ring;
    int rc = io_uring_queue_init(4, &ring, 0);
    if (rc < 0)
        return -rc;
    /* Try a plain read: kernels before 5.6 have io_uring, but only vectored reads. */
    struct io_uring_cqe *cqe = NULL;
    uint64_t count = 0;
    int fd = eventfd(1, EFD_CLOEXEC);
    if (fd < 0)
        rc = -errno;
    if (fd >= 0) {
        io_uring_prep_read(io_uring_get_sqe(&ring), fd, &count, sizeof count, 0);
        rc = io_uring_submit_and_wait(&ring, 1);
    }
    if (rc >= 0)
        rc = io_uring_peek_cqe(&ring, &cqe);
    if (rc >= 0)
        rc = cqe->res;
    io_uring_queue_exit(&ring);
    if (fd >= 0)
        close(fd);
    return rc < 0 ? -rc : 0;
}
