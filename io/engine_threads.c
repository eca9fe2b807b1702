/* Threads that call pread and pwrite. Works everywhere; uses O_DIRECT where the file is open so. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/engine.h"
#include "io/thread.h"

#define THREADS_MAX 8

struct queue {
    struct perta_request *first, **last;
};

struct threads {
    struct perta_engine base;
    pthread_mutex_t lock;
    pthread_cond_t work, news;
    struct queue todo, done;
    bool woken, closing;
    unsigned n;
    pthread_t ids[THREADS_MAX];
};

static void put(struct queue *q, struct perta_request *r)
{
    r->next = NULL;
    *q->last = r;
    q->last = &r->next;
}

static struct perta_request *take(struct queue *q)
{
    struct perta_request *r = q->first;
    if (r && !(q->first = r->next))
        q->last = &q->first;
    return r;
}

static void transfer(struct perta_request *r)
{
    uint64_t start = perta_align_down(r->off_bytes, r->file->direct ? PERTA_BLOCK_BYTES : 1);
    for (;;) {
        uint8_t *at = r->buf + (r->at - start);
        size_t len = r->end - r->at;
        ssize_t got = r->write ? pwrite(r->file->fd, at, len, (off_t)r->at)
                               : pread(r->file->fd, at, len, (off_t)r->at);
        if (perta_request_advance(r, got < 0 ? -errno : got))
            return;
    }
}

static void *serve(void *arg)
{
    struct threads *t = arg;
    pthread_mutex_lock(&t->lock);
    for (;;) {
        struct perta_request *r;
        while (!(r = take(&t->todo)) && !t->closing)
            pthread_cond_wait(&t->work, &t->lock);
        if (!r)
            break;
        pthread_mutex_unlock(&t->lock);
        transfer(r);
        pthread_mutex_lock(&t->lock);
        put(&t->done, r);
        pthread_cond_signal(&t->news);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

static void threads_submit(struct perta_engine *engine, struct perta_request *request)
{
    struct threads *t = (struct threads *)engine;
    pthread_mutex_lock(&t->lock);
    put(&t->todo, request);
    pthread_cond_signal(&t->work);
    pthread_mutex_unlock(&t->lock);
}

static int threads_wait(struct perta_engine *engine, struct perta_err *err)
{
    (void)err;
    struct threads *t = (struct threads *)engine;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 200000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&t->lock);
    int late = 0;
    while (!t->done.first && !t->woken && late != ETIMEDOUT)
        late = pthread_cond_timedwait(&t->news, &t->lock, &until);
    t->woken = false;
    struct perta_request *r = t->done.first;
    t->done.first = NULL;
    t->done.last = &t->done.first;
    pthread_mutex_unlock(&t->lock);

    while (r) {
        struct perta_request *next = r->next;
        t->base.n_in_flight--;
        r->done(r);
        r = next;
    }
    return 0;
}

static void threads_wake(struct perta_engine *engine)
{
    struct threads *t = (struct threads *)engine;
    pthread_mutex_lock(&t->lock);
    t->woken = true;
    pthread_cond_signal(&t->news);
    pthread_mutex_unlock(&t->lock);
}

static void threads_close(struct perta_engine *engine)
{
    struct threads *t = (struct threads *)engine;
    pthread_mutex_lock(&t->lock);
    t->closing = true;
    pthread_cond_broadcast(&t->work);
    pthread_mutex_unlock(&t->lock);
    for (unsigned i = 0; i < t->n; i++)
        pthread_join(t->ids[i], NULL);
    pthread_cond_destroy(&t->work);
    pthread_cond_destroy(&t->news);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const struct perta_engine_ops threads_ops = {
    .name = "pread",
    .submit = threads_submit,
    .wait = threads_wait,
    .wake = threads_wake,
    .close = threads_close,
};

int perta_engine_threads_open(unsigned depth, struct perta_engine **out, struct perta_err *err)
{
    struct threads *t = calloc(1, sizeof *t);
    if (!t)
        return perta_fail_sys(err, ENOMEM, "reader threads");
    t->base = (struct perta_engine){.ops = &threads_ops, .wants_direct = true};
    t->todo.last = &t->todo.first;
    t->done.last = &t->done.first;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->work, NULL);
    pthread_cond_init(&t->news, NULL);
    unsigned wanted = depth < THREADS_MAX ? depth : THREADS_MAX;
    for (; t->n < wanted; t->n++) {
        int rc = perta_thread_start(&t->ids[t->n], serve, t);
        if (rc && !t->n) {
            threads_close(&t->base);
            return perta_fail_sys(err, rc, "reader threads");
        }
        if (rc)
            break; /* fewer threads are enough */
    }
    *out = &t->base;
    return 0;
}
