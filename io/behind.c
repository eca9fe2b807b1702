#include "io/behind.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/thread.h"

#define WRITES 8
#define WRITE_BYTES (PERTA_BEHIND_BYTES / WRITES)

/* One write. In memory, its bytes have the same offset within a block as in the file. */
struct queued_write {
    uint8_t *data;
    uint64_t len_bytes, off_bytes;
    int fd, direct_fd;
    const char *name;
};

struct perta_behind {
    uint8_t *memory; /* (WRITES, WRITE_BYTES) */
    pthread_t thread;
    bool running;

    /* under lock */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct queued_write writes[WRITES];
    uint64_t n_put, n_done; /* so far; write i is at i mod WRITES */
    bool stopping;
    struct perta_err failure; /* the first one */
};

/* Write head and tail through the page cache, the whole blocks between with O_DIRECT. */
static int write_one(const struct queued_write *p, struct perta_err *err)
{
    uint64_t end = p->off_bytes + p->len_bytes;
    uint64_t first = perta_align_up(p->off_bytes, PERTA_BLOCK_BYTES);
    uint64_t last = perta_align_down(end, PERTA_BLOCK_BYTES);
    const uint8_t *data = p->data;
    if (p->direct_fd < 0 || first >= last)
        return perta_pwrite_all(p->fd, data, p->len_bytes, p->off_bytes, p->name, err);
    int rc = perta_pwrite_all(p->fd, data, first - p->off_bytes, p->off_bytes, p->name, err);
    if (!rc)
        rc = perta_pwrite_all(p->direct_fd, data + (first - p->off_bytes), last - first, first,
                              p->name, err);
    return rc ? rc
              : perta_pwrite_all(p->fd, data + (last - p->off_bytes), end - last, last, p->name,
                                 err);
}

static void *run(void *arg)
{
    struct perta_behind *b = arg;
    pthread_mutex_lock(&b->lock);
    for (;;) {
        while (b->n_done == b->n_put && !b->stopping)
            pthread_cond_wait(&b->changed, &b->lock);
        if (b->n_done == b->n_put)
            break;
        struct queued_write next = b->writes[b->n_done % WRITES];
        bool failed = b->failure.code != 0;
        pthread_mutex_unlock(&b->lock);
        struct perta_err err = {0};
        if (!failed)
            write_one(&next, &err);
        pthread_mutex_lock(&b->lock);
        if (err.code)
            b->failure = err;
        b->n_done++;
        pthread_cond_broadcast(&b->changed);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

int perta_behind_open(struct perta_behind **out, struct perta_err *err)
{
    struct perta_behind *b = calloc(1, sizeof *b);
    if (!b)
        return perta_fail_sys(err, ENOMEM, "writing");
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->changed, NULL);
    void *memory =
        mmap(NULL, PERTA_BEHIND_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    b->memory = memory == MAP_FAILED ? NULL : memory;
    int failed = b->memory ? perta_thread_start(&b->thread, run, b) : ENOMEM;
    b->running = !failed;
    if (failed) {
        perta_behind_close(b);
        return perta_fail_sys(err, failed, "the thread that writes");
    }
    *out = b;
    return 0;
}

void perta_behind_close(struct perta_behind *b)
{
    if (!b)
        return;
    if (b->running) {
        pthread_mutex_lock(&b->lock);
        b->stopping = true;
        pthread_cond_broadcast(&b->changed);
        pthread_mutex_unlock(&b->lock);
        pthread_join(b->thread, NULL);
    }
    if (b->memory)
        munmap(b->memory, PERTA_BEHIND_BYTES);
    pthread_cond_destroy(&b->changed);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

/* Wait until at most `most` writes are queued. */
static int wait_for(struct perta_behind *b, uint64_t most, struct perta_err *err)
{
    pthread_mutex_lock(&b->lock);
    while (b->n_put - b->n_done > most)
        pthread_cond_wait(&b->changed, &b->lock);
    if (b->failure.code)
        *err = b->failure;
    int rc = b->failure.code;
    pthread_mutex_unlock(&b->lock);
    return rc;
}

int perta_behind_write(struct perta_behind *b, int fd, int direct_fd, const void *data,
                       uint64_t len_bytes, uint64_t off_bytes, const char *name,
                       struct perta_err *err)
{
    const uint8_t *from = data;
    while (len_bytes) {
        int rc = wait_for(b, WRITES - 1, err);
        if (rc)
            return rc;
        uint64_t skip = off_bytes % PERTA_BLOCK_BYTES, room = WRITE_BYTES - skip;
        uint64_t n = len_bytes < room ? len_bytes : room;
        uint8_t *to = b->memory + b->n_put % WRITES * WRITE_BYTES + skip;
        memcpy(to, from, n);
        pthread_mutex_lock(&b->lock);
        b->writes[b->n_put++ % WRITES] =
            (struct queued_write){to, n, off_bytes, fd, direct_fd, name};
        pthread_cond_broadcast(&b->changed);
        pthread_mutex_unlock(&b->lock);
        from += n;
        off_bytes += n;
        len_bytes -= n;
    }
    return 0;
}

int perta_behind_settle(struct perta_behind *b, struct perta_err *err)
{
    return wait_for(b, 0, err);
}
