/* stream.h - the loop: read chunks side by side, work on them, commit them in order.
 * Spec: docs/data-path.md
 *
 * A job cuts its inputs into pieces (one chunk of one tensor, the same elements of every
 * input). The stream packs pieces into slots: one large piece, or many small ones. Slots go
 * FREE -> READING -> READY -> WORKING -> DONE -> COMMITTED -> FREE. The caller's thread owns the engine,
 * reads ahead and commits in order; workers do the rest, and up to eight more threads the digests of
 * what was committed. All memory is mapped at the start, and resident once it is used. */
#ifndef PERTA_STREAM_STREAM_H
#define PERTA_STREAM_STREAM_H

#include <signal.h>
#include <stdint.h>

#include "io/engine.h"
#include "io/writer.h"

#define PERTA_MEMORY_DEFAULT (1ull << 30)
#define PERTA_THREADS_MAX 256

/* How to run, from the command line. */
struct perta_run {
    uint64_t memory_bytes; /* budget of the whole process; not 0 */
    uint64_t before_bytes; /* resident before the first of several jobs for that budget, which leave
                              code and caches that the next would count again; 0: ask now */
    unsigned n_threads; /* workers, up to PERTA_THREADS_MAX; 0: one for each CPU that there is for
                              this process */
    enum perta_io_mode io;
    void (*progress)(void *user, uint64_t done_bytes, uint64_t total_bytes); /* may be NULL */
    void *progress_user;
    const volatile sig_atomic_t *cancel; /* set from outside to stop; may be NULL */
    bool resume;  /* go on with what an interrupted run left, if it left anything */
    bool dry_run; /* check all that needs no tensor data, then stop, writing nothing */
};

struct perta_range {
    struct perta_file *file; /* NULL: the piece has no such input */
    uint64_t off_bytes, len_bytes;
    const uint8_t *data; /* set when read */
};

/* A piece of work. next() fills it, work() uses it on a worker, commit() in order. */
struct perta_piece {
    uint32_t shard, tensor; /* whatever the job says they are */
    uint64_t first_elem, n_elems;
    uint64_t tag;
    struct perta_range *in; /* (job.n_in), zeroed before next() */
    uint64_t out_bytes;     /* room it needs for results; set by next() */
    uint8_t *out;           /* (out_bytes), 64-byte aligned, for work() and commit() */
};

struct perta_job {
    void *ctx;
    uint32_t n_in;          /* ranges of a piece */
    uint64_t in_bytes_max;  /* of all ranges of the largest piece */
    uint64_t out_bytes_max; /* of a piece */
    uint64_t total_bytes;   /* to be read, for progress */
    uint64_t later_bytes;   /* of memory that it takes once the stream is open */
    uint64_t worker_bytes;  /* the same, for each worker (perta_stream_workers) */
    /* The next piece in order. 1: one; 0: no more. Called on the owner's thread. */
    int (*next)(void *ctx, struct perta_piece *piece, struct perta_err *err);
    /* On worker number worker; pieces of one slot in order, slots in any. */
    int (*work)(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err);
    /* In order, on the owner's thread; may append to writers. */
    int (*commit)(void *ctx, struct perta_piece *piece, struct perta_err *err);
};

struct perta_stream;

/* Choose an engine for reading paths and take all memory: slots, and buffers for n_writers
 * writers, so that the process stays below run->memory_bytes. There are as many workers as fit, at
 * most what is asked for (perta_run_threads); their scratch (worker_bytes each) is the caller's
 * to take afterwards. A budget too small for one slot and one worker is PERTA_EUSAGE, and the
 * message says what is enough. */
PERTA_API int perta_stream_open(const struct perta_run *run, const struct perta_job *job,
                                const char *const *paths, size_t n_paths, unsigned n_writers,
                                struct perta_stream **out, struct perta_err *err);
PERTA_API void perta_stream_close(struct perta_stream *stream);
/* What perta_stream_open needs for such a job with so many workers and slots, one of each at least:
 * the budget of the process, with what is resident now. INT64_MAX: no budget is enough. For jobs
 * that may choose the size of their pieces. */
PERTA_API uint64_t perta_stream_memory(const struct perta_job *job, unsigned n_writers,
                                       unsigned n_workers, unsigned n_slots);
/* How many workers there are: work() gets numbers below this. */
PERTA_API unsigned perta_stream_workers(const struct perta_stream *stream);

PERTA_API struct perta_engine *perta_stream_engine(struct perta_stream *stream);
PERTA_API const struct perta_io_choice *perta_stream_choice(const struct perta_stream *stream);
/* Buffers for writer i of n_writers. */
PERTA_API struct perta_writer_bufs perta_stream_writer_bufs(struct perta_stream *stream,
                                                            unsigned i);

/* Run the job to its end. The first error in order of the pieces is returned; then nothing is
 * in flight any more. */
PERTA_API int perta_stream_run(struct perta_stream *stream, struct perta_err *err);
/* After the run: read a whole file in order, in the room of the slots, and pass its bytes on. */
PERTA_API int perta_stream_read_file(struct perta_stream *stream, struct perta_file *file,
                                     void (*use)(void *ctx, const uint8_t *data,
                                                 uint64_t len_bytes),
                                     void *ctx, struct perta_err *err);
/* Before the run: so many of the job's bytes were read by another. */
void perta_stream_skip(struct perta_stream *stream, uint64_t done_bytes);
/* Bytes read so far. */
PERTA_API uint64_t perta_stream_read_bytes(const struct perta_stream *stream);

/* run->n_threads, or the CPUs that there are for this process (stream/cpus.h); 256 at most. */
PERTA_API unsigned perta_run_threads(const struct perta_run *run);
/* Resident memory of the process, now, in bytes; mapped files count. 0 where /proc is missing. */
PERTA_API uint64_t perta_memory_now(void);

#endif
