/* stream.h - the loop: read chunks of all inputs in parallel, work on them, commit them in order.
 * Spec: docs/data-path.md
 *
 * A job cuts its inputs into pieces (mostly one chunk of one tensor, the same elements of every
 * input). The stream packs pieces into slots: one large piece, or many small ones. A slot goes FREE
 * -> READING -> READY -> WORKING -> DONE -> COMMITTED -> FREE. The caller's thread owns the engine,
 * reads ahead, and commits in order. Workers do the rest, and up to eight more threads digest what
 * was committed. All memory is mapped at the start, and becomes resident as it is used. */
#ifndef PERTA_STREAM_STREAM_H
#define PERTA_STREAM_STREAM_H

#include <signal.h>
#include <stdint.h>

#include "io/engine.h"
#include "io/writer.h"

#define PERTA_MEMORY_DEFAULT (1ull << 30)
#define PERTA_THREADS_MAX 256

/* How to run: the flags that all verbs share. */
struct perta_run {
    uint64_t memory_bytes; /* budget of the whole process; not 0 */
    /* Resident memory before the first of several jobs that share the budget, so that the code and
     * caches that one job leaves are not counted again for the next; 0: measure now. */
    uint64_t before_bytes;
    /* Workers, up to PERTA_THREADS_MAX; 0: one for each CPU that this process may use. */
    unsigned n_threads;
    enum perta_io_mode io;
    void (*progress)(void *user, uint64_t done_bytes, uint64_t total_bytes); /* may be NULL */
    void *progress_user;
    const volatile sig_atomic_t *cancel; /* set from outside to stop the run; may be NULL */
    bool resume;                         /* resume an interrupted run, if there is one */
    bool dry_run; /* check everything that needs no tensor data; write nothing */
};

struct perta_range {
    struct perta_file *file; /* NULL: the piece has no such input */
    uint64_t off_bytes, len_bytes;
    const uint8_t *data; /* set when read */
};

/* A piece of work. next() fills it, work() uses it on a worker, commit() uses it in order. */
struct perta_piece {
    uint32_t shard, tensor; /* meaning is up to the job */
    uint64_t first_elem, n_elems;
    uint64_t tag;
    struct perta_range *in; /* (job.n_in), zeroed before next() */
    uint64_t out_bytes;     /* room for its results; set by next() */
    uint8_t *out;           /* (out_bytes), 64-byte aligned; work() fills it for commit() */
};

struct perta_job {
    void *ctx;
    uint32_t n_in;          /* ranges per piece */
    uint64_t in_bytes_max;  /* all ranges of the largest piece */
    uint64_t out_bytes_max; /* largest out_bytes of a piece */
    uint64_t total_bytes;   /* bytes to read, for progress */
    uint64_t later_bytes;   /* memory that the job allocates once the stream is open */
    uint64_t worker_bytes;  /* the same, per worker (perta_stream_workers) */
    /* Fill in the next piece, in order. 1: there is one; 0: the end. Called on the owner's
     * thread. */
    int (*next)(void *ctx, struct perta_piece *piece, struct perta_err *err);
    /* Called on worker number `worker`. The pieces of one slot come in order, slots in any
     * order. */
    int (*work)(void *ctx, unsigned worker, struct perta_piece *piece, struct perta_err *err);
    /* Called in order, on the owner's thread; may append to writers. */
    int (*commit)(void *ctx, struct perta_piece *piece, struct perta_err *err);
};

struct perta_stream;

/* Choose an engine for reading paths, and allocate slots and buffers for n_writers writers, so that
 * the process stays below run->memory_bytes. There are as many workers as fit, at most
 * perta_run_threads; the caller allocates their scratch (worker_bytes each) afterwards. A budget
 * too small for one slot and one worker is PERTA_EUSAGE, and the message names one that is
 * enough. */
PERTA_API int perta_stream_open(const struct perta_run *run, const struct perta_job *job,
                                const char *const *paths, size_t n_paths, unsigned n_writers,
                                struct perta_stream **out, struct perta_err *err);
PERTA_API void perta_stream_close(struct perta_stream *stream);
/* The budget of the process that perta_stream_open needs for this job with so many workers and
 * slots (at least one of each), including what is resident now. INT64_MAX: no budget is enough. For
 * jobs that can choose the size of their pieces. */
PERTA_API uint64_t perta_stream_memory(const struct perta_job *job, unsigned n_writers,
                                       unsigned n_workers, unsigned n_slots);
/* The number of workers: work() gets numbers below this. */
PERTA_API unsigned perta_stream_workers(const struct perta_stream *stream);

PERTA_API struct perta_engine *perta_stream_engine(struct perta_stream *stream);
PERTA_API const struct perta_io_choice *perta_stream_choice(const struct perta_stream *stream);
/* The buffers of writer i of n_writers. */
PERTA_API struct perta_writer_bufs perta_stream_writer_bufs(struct perta_stream *stream,
                                                            unsigned i);

/* Run the job to its end. Returns the first error in order of the pieces. Afterwards nothing is in
 * flight. */
PERTA_API int perta_stream_run(struct perta_stream *stream, struct perta_err *err);
/* Call after the run: read a whole file in order, using the slots' memory, and pass its bytes to
 * use. */
PERTA_API int perta_stream_read_file(struct perta_stream *stream, struct perta_file *file,
                                     void (*use)(void *ctx, const uint8_t *data,
                                                 uint64_t len_bytes),
                                     void *ctx, struct perta_err *err);
/* Call before the run: an earlier run has already processed done_bytes of the job's bytes, so
 * progress does not count them. */
void perta_stream_skip(struct perta_stream *stream, uint64_t done_bytes);
/* Bytes read so far. */
PERTA_API uint64_t perta_stream_read_bytes(const struct perta_stream *stream);

/* run->n_threads, or the CPUs that this process may use (stream/cpus.h); at most
 * PERTA_THREADS_MAX. */
PERTA_API unsigned perta_run_threads(const struct perta_run *run);
/* Resident memory of the process now, in bytes, including mapped files. 0 if /proc is missing. */
PERTA_API uint64_t perta_memory_now(void);

#endif
