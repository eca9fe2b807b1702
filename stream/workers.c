#include "stream/workers.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "io/thread.h"

struct thread {
    struct perta_workers *workers;
    unsigned number;
    pthread_t id;
    uint64_t taken;
};

struct perta_workers {
    pthread_mutex_t lock;   /* protects everything below */
    pthread_cond_t more;    /* there are pieces, or the pool is closing */
    pthread_cond_t done;    /* no piece is running any more */
    struct thread *threads; /* (n); the first stands for the caller */
    unsigned n, n_started;
    bool stop;

    /* the job */
    perta_piece_fn *piece;
    void *ctx;
    size_t next, end, n_running;
    size_t failed; /* the lowest piece that failed; SIZE_MAX: none */
    int rc;
    struct perta_err err;
};

/* ---- a worker ---- */

static void note_failure(struct perta_workers *w, size_t i, int rc, const struct perta_err *err)
{
    w->next = w->end; /* start no more pieces; all before i were started before it */
    if (i >= w->failed)
        return;
    w->failed = i;
    w->rc = rc;
    w->err = *err;
}

/* Run pieces until there are none left. The lock is held, except while a piece runs. Taking a piece
 * wakes one more worker, so a job of few pieces wakes few. */
static void take_pieces(struct perta_workers *w, struct thread *self)
{
    while (w->next < w->end) {
        size_t i = w->next++;
        struct perta_err err = {0};
        w->n_running++;
        self->taken++;
        if (w->next < w->end)
            pthread_cond_signal(&w->more);
        pthread_mutex_unlock(&w->lock);
        int rc = w->piece(w->ctx, self->number, i, &err);
        pthread_mutex_lock(&w->lock);
        w->n_running--;
        if (rc)
            note_failure(w, i, rc, &err);
    }
    if (!w->n_running)
        pthread_cond_signal(&w->done);
}

static void *run_thread(void *of)
{
    struct thread *self = of;
    struct perta_workers *w = self->workers;
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        take_pieces(w, self);
        while (!w->stop && w->next == w->end)
            pthread_cond_wait(&w->more, &w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* If no thread can be created, there are fewer workers. */
static void start_threads(struct perta_workers *w, size_t wanted)
{
    if (wanted > w->n)
        wanted = w->n;
    for (; w->n_started < wanted; w->n_started++) {
        struct thread *t = &w->threads[w->n_started];
        *t = (struct thread){.workers = w, .number = w->n_started};
        if (perta_thread_start(&t->id, run_thread, t))
            break;
    }
}

/* ---- all of them ---- */

int perta_workers_open(unsigned n, struct perta_workers **out, struct perta_err *err)
{
    struct perta_workers *w = calloc(1, sizeof *w);
    if (!w || !(w->threads = calloc(n, sizeof *w->threads))) {
        free(w);
        return perta_fail_sys(err, ENOMEM, "%u workers", n);
    }
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->more, NULL);
    pthread_cond_init(&w->done, NULL);
    w->n = n;
    w->n_started = 1; /* the caller */
    *out = w;
    return 0;
}

void perta_workers_close(struct perta_workers *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_broadcast(&w->more);
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 1; i < w->n_started; i++)
        pthread_join(w->threads[i].id, NULL);
    pthread_cond_destroy(&w->done);
    pthread_cond_destroy(&w->more);
    pthread_mutex_destroy(&w->lock);
    free(w->threads);
    free(w);
}

unsigned perta_workers_count(const struct perta_workers *w)
{
    return w->n;
}

uint64_t perta_workers_taken(struct perta_workers *w, unsigned worker)
{
    pthread_mutex_lock(&w->lock);
    uint64_t taken = w->threads[worker].taken;
    pthread_mutex_unlock(&w->lock);
    return taken;
}

int perta_workers_run(struct perta_workers *w, size_t n, perta_piece_fn *piece, void *ctx,
                      struct perta_err *err)
{
    pthread_mutex_lock(&w->lock);
    w->piece = piece;
    w->ctx = ctx;
    w->failed = SIZE_MAX;
    w->rc = 0;
    start_threads(w, n);
    w->next = 0;
    w->end = n;
    take_pieces(w, &w->threads[0]);
    while (w->n_running)
        pthread_cond_wait(&w->done, &w->lock);
    int rc = w->rc;
    if (rc)
        *err = w->err;
    pthread_mutex_unlock(&w->lock);
    return rc;
}
