/* engine.h - asynchronous reads and writes behind one interface. Spec: docs/data-path.md
 *
 * Three engines: io_uring (direct), a mapping of the files, and threads
 * that call pread and pwrite. One thread, the owner, submits and waits; completions arrive in
 * any order, inside perta_engine_wait, by callback. Any thread may wake the owner. */
#ifndef PERTA_IO_ENGINE_H
#define PERTA_IO_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io/err.h"
#include "io/file.h"

enum perta_io_mode { PERTA_IO_AUTO, PERTA_IO_DIRECT, PERTA_IO_MMAP, PERTA_IO_PREAD };

struct perta_window;

/* One request. The caller owns it, and it must not move until done is called. */
struct perta_request {
    struct perta_file *file;
    bool write;
    uint64_t off_bytes; /* write to a direct file: a multiple of PERTA_BLOCK_BYTES */
    uint64_t len_bytes; /* likewise */
    uint8_t *buf;       /* block-aligned; a read needs perta_read_room(len_bytes) bytes there */
    void (*done)(struct perta_request *request); /* called on the owner's thread */
    void *user;

    const uint8_t *data; /* set by a read: where the bytes wanted lie, in buf or mapped */
    int sys_errno;       /* 0, or why it failed; ENODATA: the file ended early */
    uint64_t done_bytes; /* of len_bytes, when it failed: how far it came */

    /* the engine's own */
    uint64_t at, end;
    uint64_t reached; /* how far any transfer came */
    struct perta_retry retry;
    struct perta_window *window;
    void *map;
    size_t map_bytes;
    struct perta_request *prev_window, *next_window;
    struct perta_request *next;
};

/* Room that a read of len bytes at any offset needs: blocks overhang at both ends. */
static inline uint64_t perta_read_room(uint64_t len_bytes)
{
    return (len_bytes + 3 * PERTA_BLOCK_BYTES - 1) & ~(uint64_t)(PERTA_BLOCK_BYTES - 1);
}

/* perta_read_room is never more than len_bytes and this. */
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
    bool wants_direct; /* open files with O_DIRECT for it */
    uint64_t n_in_flight;
    struct perta_hasher *hasher; /* of its owner, borrowed: digests of what goes through it may be
                                    done there; NULL: on the owner's thread */
};

/* What a probe of the machine and the files found. */
struct perta_io_choice {
    enum perta_io_mode mode; /* never AUTO */
    char why[256];           /* one line for people */
};

/* Choose for reading these files: page cache or no O_DIRECT: mmap; io_uring refused: pread;
 * else direct. A mode other than AUTO is taken as it is, if it can be had. */
PERTA_API int perta_engine_choose(enum perta_io_mode wanted, const char *const *paths,
                                  size_t n_paths, struct perta_io_choice *choice,
                                  struct perta_err *err);

/* depth requests are under way at once. */
PERTA_API int perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                                struct perta_err *err);
/* Nothing may be in flight. NULL is allowed. */
PERTA_API void perta_engine_close(struct perta_engine *engine);

/* Start a request. Failure shows in the request when it is done. */
PERTA_API void perta_engine_submit(struct perta_engine *engine, struct perta_request *request);
/* Wait until a request is done, perta_engine_wake was called, or a fifth of a second is over;
 * calls done for all that are. Where the engine itself fails, its requests do, each when nothing
 * writes to its buffer any more: so every request is done in the end, and until then its buffer and
 * the request itself must stay. An error is of this call alone; it may be called again. */
PERTA_API int perta_engine_wait(struct perta_engine *engine, struct perta_err *err);
PERTA_API void perta_engine_wake(struct perta_engine *engine);
/* Give back what a finished read holds besides its buffer (a mapping). */
PERTA_API void perta_engine_release(struct perta_engine *engine, struct perta_request *request);
/* Were all bytes that were used so far what is in the files? Mapped ones can fail as late as they
 * are used: to be asked before anything that came of them is kept. */
PERTA_API int perta_engine_check(struct perta_engine *engine, struct perta_err *err);
/* Wait until nothing is in flight, whatever fails meanwhile; then the first such error. */
PERTA_API int perta_engine_drain(struct perta_engine *engine, struct perta_err *err);

/* Fill *err from a request that failed. Returns the code. */
PERTA_API int perta_request_error(const struct perta_request *request, struct perta_err *err);

/* The engines, for perta_engine_open. */
int perta_engine_uring_open(unsigned depth, struct perta_engine **out, struct perta_err *err);
int perta_engine_threads_open(unsigned depth, struct perta_engine **out, struct perta_err *err);
int perta_engine_mmap_open(struct perta_engine **out, struct perta_err *err);
/* Does the kernel let us use io_uring? 0, or the errno of the refusal. */
int perta_engine_uring_probe(void);

/* Set at and end of a request to the blocks around what is wanted. */
void perta_request_align(struct perta_request *request);
/* Count got bytes (or -errno) for a request. True when it is finished. */
bool perta_request_advance(struct perta_request *request, int64_t got);

#endif
