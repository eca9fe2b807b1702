/* engine.h - asynchronous reads and writes behind one interface. Spec: docs/data-path.md
 *
 * There are three engines: io_uring, mapped files, and threads that call pread and pwrite. One
 * thread, the owner, submits requests and waits. Requests complete in any order; perta_engine_wait
 * calls their callbacks. Any thread may wake the owner. */
#ifndef PERTA_IO_ENGINE_H
#define PERTA_IO_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/file.h"

enum perta_io_mode { PERTA_IO_AUTO, PERTA_IO_DIRECT, PERTA_IO_MMAP, PERTA_IO_PREAD };

struct perta_window;

/* One request, owned by the caller. It must not move until done is called. */
struct perta_request {
    struct perta_file *file;
    bool write;
    uint64_t off_bytes; /* writing with O_DIRECT: a multiple of PERTA_BLOCK_BYTES */
    uint64_t len_bytes; /* likewise */
    uint8_t *buf;       /* block-aligned; a read needs perta_read_room(len_bytes) bytes */
    void (*done)(struct perta_request *request); /* called on the owner's thread */
    void *user;

    const uint8_t *data; /* set by a read: the requested bytes, in buf or mapped */
    int sys_errno;       /* 0, or why it failed; ENODATA: end of file */
    uint64_t done_bytes; /* after a failure: how many of len_bytes were transferred */

    /* private to the engine */
    uint64_t at, end;
    uint64_t reached; /* highest offset that a transfer has reached */
    struct perta_retry retry;
    struct perta_window *window;
    void *map;
    size_t map_bytes;
    struct perta_request *prev_window, *next_window;
    struct perta_request *next;
};

/* Buffer size for a read of len_bytes at any offset: whole blocks may overhang at both ends. */
static inline uint64_t perta_read_room(uint64_t len_bytes)
{
    return (len_bytes + 3 * PERTA_BLOCK_BYTES - 1) & ~(uint64_t)(PERTA_BLOCK_BYTES - 1);
}

/* perta_read_room(n) is at most n plus this. */
#define PERTA_READ_OVERHANG (3 * PERTA_BLOCK_BYTES)

struct perta_engine;
struct perta_engine_ops {
    const char *name;
    void (*submit)(struct perta_engine *engine, struct perta_request *request);
    int (*wait)(struct perta_engine *engine, struct perta_err *err);
    void (*wake)(struct perta_engine *engine);
    void (*release)(struct perta_engine *engine, struct perta_request *request);
    int (*check)(struct perta_engine *engine, struct perta_err *err);
    void (*close)(struct perta_engine *engine);
};

struct perta_engine {
    const struct perta_engine_ops *ops;
    bool wants_direct; /* files should be opened with O_DIRECT */
    uint64_t n_in_flight;
    /* Borrowed. If set, digests run on its threads; if NULL, on the owner's thread. */
    struct perta_hasher *hasher;
};

/* The engine that was chosen, and why. */
struct perta_io_choice {
    enum perta_io_mode mode; /* never AUTO */
    char why[256];           /* one line for people */
};

/* Choose an engine for reading these files. AUTO: mmap if the files are in the page cache or their
 * file system has no O_DIRECT; else pread if io_uring is refused; else io_uring. Any other mode is
 * used as asked, or is an error if it is not available. */
PERTA_API int perta_engine_choose(enum perta_io_mode wanted, const char *const *paths,
                                  size_t n_paths, struct perta_io_choice *choice,
                                  struct perta_err *err);

/* depth: how many requests may be in flight at once; more are queued. */
PERTA_API int perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                                struct perta_err *err);
/* No request may be in flight. NULL is allowed. */
PERTA_API void perta_engine_close(struct perta_engine *engine);

/* Start a request. Errors are reported in the request, when done is called. */
PERTA_API void perta_engine_submit(struct perta_engine *engine, struct perta_request *request);
/* Wait until a request completes, perta_engine_wake is called, or 0.2 s have passed; then call done
 * for all that are complete. If the engine itself fails, each request fails once nothing can write
 * to its buffer any more. So every request completes; until then the request and its buffer must
 * stay. An error return is about this call alone: it may be called again. */
PERTA_API int perta_engine_wait(struct perta_engine *engine, struct perta_err *err);
PERTA_API void perta_engine_wake(struct perta_engine *engine);
/* Release what a finished read holds besides its buffer (a mapping). */
PERTA_API void perta_engine_release(struct perta_engine *engine, struct perta_request *request);
/* Check that all bytes used so far were really what the files hold: accesses to mapped files can
 * fail when the bytes are used. Call it before keeping anything computed from them. */
PERTA_API int perta_engine_check(struct perta_engine *engine, struct perta_err *err);
/* Wait until no request is in flight, ignoring errors on the way. Returns the first of them. */
PERTA_API int perta_engine_drain(struct perta_engine *engine, struct perta_err *err);

/* Fill *err from a failed request. Returns the code. */
PERTA_API int perta_request_error(const struct perta_request *request, struct perta_err *err);

/* The engines behind perta_engine_open. */
int perta_engine_uring_open(unsigned depth, struct perta_engine **out, struct perta_err *err);
int perta_engine_threads_open(unsigned depth, struct perta_engine **out, struct perta_err *err);
int perta_engine_mmap_open(struct perta_engine **out, struct perta_err *err);
/* Is io_uring usable here? 0, or the errno of the refusal. */
int perta_engine_uring_probe(void);

/* Set at and end of a request to the blocks that cover its bytes. */
void perta_request_align(struct perta_request *request);
/* Account for a transfer of got bytes (or -errno). True when the request is complete. */
bool perta_request_advance(struct perta_request *request, int64_t got);

#endif
