#include "estimators/model/reader.h"

#include <errno.h>
#include <stdlib.h>

#include "io/thread.h"

struct perta_reader {
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    int (*job)(void *ctx, struct perta_err *err); /* NULL: idle */
    void *ctx;
    bool stop;
    int rc;
    struct perta_err err;
};

static void *run(void *of)
{
    struct perta_reader *r = of;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        while (!r->job && !r->stop)
            pthread_cond_wait(&r->changed, &r->lock);
        if (!r->job)
            break;
        pthread_mutex_unlock(&r->lock);
        r->err = (struct perta_err){0};
        int rc = r->job(r->ctx, &r->err);
        pthread_mutex_lock(&r->lock);
        r->rc = rc;
        r->job = NULL;
        pthread_cond_broadcast(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

int perta_reader_open(struct perta_reader **out, struct perta_err *err)
{
    struct perta_reader *r = calloc(1, sizeof *r);
    if (!r)
        return perta_fail_sys(err, ENOMEM, "reader");
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    int refused = perta_thread_start(&r->thread, run, r);
    if (refused) {
        pthread_cond_destroy(&r->changed);
        pthread_mutex_destroy(&r->lock);
        free(r);
        return perta_fail_sys(err, refused, "a thread to read with");
    }
    *out = r;
    return 0;
}

void perta_reader_close(struct perta_reader *r)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->thread, NULL);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

void perta_reader_begin(struct perta_reader *r, int (*job)(void *ctx, struct perta_err *err),
                        void *ctx)
{
    pthread_mutex_lock(&r->lock);
    r->job = job;
    r->ctx = ctx;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

int perta_reader_wait(struct perta_reader *r, struct perta_err *err)
{
    pthread_mutex_lock(&r->lock);
    while (r->job)
        pthread_cond_wait(&r->changed, &r->lock);
    int rc = r->rc;
    if (rc)
        *err = r->err;
    pthread_mutex_unlock(&r->lock);
    return rc;
}
