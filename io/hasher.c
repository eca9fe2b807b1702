#include "io/hasher.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "io/thread.h"

#define QUEUE_MAX 1024
#define HELD_MAX 64

struct given {
    struct perta_digest *digest;
    const void *data;
    size_t len_bytes;
    enum { WAITING, TAKEN, DONE } state;
};

struct perta_hasher {
    pthread_t threads[PERTA_HASHER_THREADS_MAX];

    /* Used by the owner alone. held: given, but not queued yet. */
    unsigned n_started;
    struct given held[HELD_MAX];
    unsigned n_held;

    /* under lock */
    pthread_mutex_t lock;
    pthread_cond_t more, moved;
    struct given queue[QUEUE_MAX];                             /* a ring */
    uint64_t n_given, n_passed;                                /* passed: all up to it are done */
    const struct perta_digest *busy[PERTA_HASHER_THREADS_MAX]; /* (n_threads); NULL: idle */
    unsigned n_threads;
    uint64_t asked; /* the ticket to report with passed(); 0: none */
    bool stopping;
    void (*passed)(void *user);
    void *user;
};

static bool is_busy(const struct perta_hasher *h, const struct perta_digest *digest)
{
    for (unsigned i = 0; i < h->n_threads; i++)
        if (h->busy[i] == digest)
            return true;
    return false;
}

/* The oldest waiting bytes whose digest no thread is working on: a digest takes its bytes in
 * order. */
static struct given *find_waiting(struct perta_hasher *h)
{
    for (uint64_t i = h->n_passed; i < h->n_given; i++) {
        struct given *given = &h->queue[i % QUEUE_MAX];
        if (given->state == WAITING && !is_busy(h, given->digest))
            return given;
    }
    return NULL;
}

/* Advance over everything that is done at the front of the queue. True: the ticket that was asked
 * about has passed. */
static bool advance(struct perta_hasher *h)
{
    while (h->n_passed < h->n_given && h->queue[h->n_passed % QUEUE_MAX].state == DONE)
        h->n_passed++;
    bool reached = h->asked && h->n_passed >= h->asked;
    if (reached)
        h->asked = 0;
    pthread_cond_signal(&h->moved);
    return reached;
}

static void *run_thread(void *arg)
{
    struct perta_hasher *h = arg;
    struct given *next;
    pthread_mutex_lock(&h->lock);
    unsigned self = h->n_threads++;
    assert(self < PERTA_HASHER_THREADS_MAX);
    for (;;) {
        while (!(next = find_waiting(h)) && !h->stopping)
            pthread_cond_wait(&h->more, &h->lock);
        if (!next)
            break;
        next->state = TAKEN;
        h->busy[self] = next->digest;
        pthread_mutex_unlock(&h->lock);
        perta_digest_add(next->digest, next->data, next->len_bytes);
        pthread_mutex_lock(&h->lock);
        next->state = DONE;
        h->busy[self] = NULL;
        if (advance(h)) {
            pthread_mutex_unlock(&h->lock);
            h->passed(h->user);
            pthread_mutex_lock(&h->lock);
        }
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

int perta_hasher_open(struct perta_hasher **out, unsigned n_threads, void (*passed)(void *user),
                      void *user, struct perta_err *err)
{
    struct perta_hasher *h = calloc(1, sizeof *h);
    if (!h)
        return perta_fail_sys(err, ENOMEM, "digests");
    h->passed = passed;
    h->user = user;
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->more, NULL);
    pthread_cond_init(&h->moved, NULL);
    n_threads = n_threads < PERTA_HASHER_THREADS_MAX ? n_threads : PERTA_HASHER_THREADS_MAX;
    int rc = 0;
    for (; h->n_started < n_threads && !rc; h->n_started += !rc)
        rc = perta_thread_start(&h->threads[h->n_started], run_thread, h);
    if (!h->n_started) { /* fewer than asked for are enough */
        perta_hasher_close(h);
        return perta_fail_sys(err, rc, "threads for digests");
    }
    *out = h;
    return 0;
}

/* Move what is held into the queue, waiting while it is full. */
static void queue_held(struct perta_hasher *h)
{
    if (!h->n_held)
        return;
    pthread_mutex_lock(&h->lock);
    for (unsigned i = 0; i < h->n_held; i++) {
        while (h->n_given - h->n_passed == QUEUE_MAX)
            pthread_cond_wait(&h->moved, &h->lock);
        h->queue[h->n_given++ % QUEUE_MAX] = h->held[i];
    }
    pthread_cond_broadcast(&h->more);
    pthread_mutex_unlock(&h->lock);
    h->n_held = 0;
}

void perta_hasher_close(struct perta_hasher *h)
{
    if (!h)
        return;
    queue_held(h);
    pthread_mutex_lock(&h->lock);
    h->stopping = true;
    pthread_cond_broadcast(&h->more);
    pthread_mutex_unlock(&h->lock);
    while (h->n_started)
        pthread_join(h->threads[--h->n_started], NULL);
    pthread_cond_destroy(&h->moved);
    pthread_cond_destroy(&h->more);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

void perta_hasher_give(struct perta_hasher *h, struct perta_digest *digest, const void *data,
                       size_t len_bytes)
{
    for (unsigned i = h->n_held; i-- > 0;) {
        struct given *held = &h->held[i];
        if (held->digest != digest)
            continue;
        if ((const uint8_t *)held->data + held->len_bytes != data)
            break;
        held->len_bytes += len_bytes;
        return;
    }
    if (h->n_held == HELD_MAX)
        queue_held(h);
    h->held[h->n_held++] = (struct given){digest, data, len_bytes, WAITING};
}

uint64_t perta_hasher_given(struct perta_hasher *h)
{
    if (!h)
        return 0;
    queue_held(h);
    return h->n_given; /* only the owner changes it */
}

bool perta_hasher_passed(struct perta_hasher *h, uint64_t ticket)
{
    if (!h)
        return true;
    pthread_mutex_lock(&h->lock);
    bool has = h->n_passed >= ticket;
    h->asked = has ? 0 : ticket;
    pthread_mutex_unlock(&h->lock);
    return has;
}

void perta_hasher_wait(struct perta_hasher *h, uint64_t ticket)
{
    if (!h)
        return;
    pthread_mutex_lock(&h->lock);
    while (h->n_passed < ticket)
        pthread_cond_wait(&h->moved, &h->lock);
    pthread_mutex_unlock(&h->lock);
}
