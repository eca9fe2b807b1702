/* Mapped files, read without a copy. Each read maps a window of its file and asks the kernel to
 * read ahead. The window is unmapped when its slot is freed, so neither address space nor resident
 * memory grows with the file. Writes are plain pwrites. */
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/checked.h"
#include "io/engine.h"
#include "io/pool.h"
#include "io/window.h"

struct mapped {
    struct perta_engine base;
    struct perta_request *first, **last; /* complete, not yet reported */
    struct perta_request *windows;       /* requests with a mapped window */
    atomic_uintptr_t lost; /* address of the first byte that could not be read; 0 if none */
    int wake_fd;
};

static int mapped_check(struct perta_engine *engine, struct perta_err *err)
{
    struct mapped *m = (struct mapped *)engine;
    const uint8_t *at = (const uint8_t *)atomic_load(&m->lost);
    if (!at)
        return 0;
    struct perta_request *r = m->windows;
    while (r && (at < (uint8_t *)r->map || at >= (uint8_t *)r->map + r->map_bytes))
        r = r->next_window;
    int rc = r ? perta_file_unchanged(r->file, err) : 0;
    if (rc || !r)
        return rc ? rc : perta_fail_sys(err, EIO, "a mapped file");
    uint64_t byte =
        perta_align_down(r->off_bytes, perta_page_bytes()) + (uint64_t)(at - (uint8_t *)r->map);
    return perta_fail_sys(err, EIO, "%s: read at byte %llu", r->file->path,
                          (unsigned long long)byte);
}

/* ---- windows ---- */

static void map_window(struct mapped *m, struct perta_request *r)
{
    struct stat st;
    uint64_t from = perta_align_down(r->off_bytes, perta_page_bytes());
    uint64_t to = r->off_bytes + r->len_bytes;
    if (fstat(r->file->fd, &st)) {
        r->sys_errno = errno;
        return;
    }
    if ((uint64_t)st.st_size < to) { /* reading beyond the end would raise SIGBUS */
        r->done_bytes =
            (uint64_t)st.st_size > r->off_bytes ? (uint64_t)st.st_size - r->off_bytes : 0;
        r->sys_errno = ENODATA;
        return;
    }
    r->map_bytes = to - from;
    r->map = mmap(NULL, r->map_bytes, PROT_READ, MAP_SHARED, r->file->fd, (off_t)from);
    if (r->map == MAP_FAILED) {
        r->map = NULL;
        r->sys_errno = errno;
        return;
    }
    r->window = perta_window_add(r->map, r->map_bytes, &m->lost);
    if (!r->window) {
        munmap(r->map, r->map_bytes);
        r->map = NULL;
        r->sys_errno = ENOMEM;
        return;
    }
    madvise(r->map, r->map_bytes, MADV_WILLNEED);
    r->data = (const uint8_t *)r->map + (r->off_bytes - from);
    r->next_window = m->windows;
    r->prev_window = NULL;
    if (m->windows)
        m->windows->prev_window = r;
    m->windows = r;
}

static void write_now(struct perta_request *r)
{
    ssize_t put;
    do
        put = pwrite(r->file->fd, r->buf + (r->at - r->off_bytes), r->end - r->at, (off_t)r->at);
    while (!perta_request_advance(r, put < 0 ? -errno : put));
}

static void mapped_submit(struct perta_engine *engine, struct perta_request *r)
{
    struct mapped *m = (struct mapped *)engine;
    if (r->write)
        write_now(r);
    else
        map_window(m, r);
    *m->last = r;
    m->last = &r->next;
}

static int mapped_wait(struct perta_engine *engine, struct perta_err *err)
{
    struct mapped *m = (struct mapped *)engine;
    (void)err;
    if (!m->first) {
        struct pollfd fd = {.fd = m->wake_fd, .events = POLLIN};
        poll(&fd, 1, 200);
    }
    uint64_t count;
    ssize_t got = read(m->wake_fd, &count, sizeof count); /* does not block */
    (void)got;
    struct perta_request *r = m->first;
    m->first = NULL;
    m->last = &m->first;
    while (r) {
        struct perta_request *next = r->next;
        m->base.n_in_flight--;
        r->done(r);
        r = next;
    }
    return 0;
}

static void mapped_wake(struct perta_engine *engine)
{
    uint64_t one = 1;
    while (write(((struct mapped *)engine)->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void mapped_release(struct perta_engine *engine, struct perta_request *r)
{
    if (!r->map)
        return;
    *(r->prev_window ? &r->prev_window->next_window : &((struct mapped *)engine)->windows) =
        r->next_window;
    if (r->next_window)
        r->next_window->prev_window = r->prev_window;
    perta_window_remove(r->window);
    munmap(r->map, r->map_bytes);
    r->map = NULL;
}

static void mapped_close(struct perta_engine *engine)
{
    close(((struct mapped *)engine)->wake_fd);
    perta_windows_close();
    free(engine);
}

static const struct perta_engine_ops mapped_ops = {
    .name = "mmap",
    .submit = mapped_submit,
    .wait = mapped_wait,
    .wake = mapped_wake,
    .release = mapped_release,
    .check = mapped_check,
    .close = mapped_close,
};

int perta_engine_mmap_open(struct perta_engine **out, struct perta_err *err)
{
    struct mapped *m = calloc(1, sizeof *m);
    if (!m)
        return perta_fail_sys(err, ENOMEM, "mmap");
    m->base = (struct perta_engine){.ops = &mapped_ops};
    m->last = &m->first;
    m->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (m->wake_fd < 0) {
        int rc = perta_fail_sys(err, errno, "eventfd");
        free(m);
        return rc;
    }
    perta_windows_open();
    *out = &m->base;
    return 0;
}
