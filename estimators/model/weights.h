/* weights.h - a checkpoint's tensors, read when they are needed by a thread of its own: while one
 * computes with a parameter, the next ones are read. */
#ifndef PERTA_ESTIMATORS_MODEL_WEIGHTS_H
#define PERTA_ESTIMATORS_MODEL_WEIGHTS_H

#include <pthread.h>

#include "estimators/model/config.h"
#include "estimators/model/part.h"
#include "estimators/model/reader.h"
#include "estimators/model/source.h"
#include "io/engine.h"
#include "io/format/checkpoint.h"

/* What has room at once: a layer's parameters, or rows of a matrix. */
struct perta_span {
    const char *name; /* of the matrix; NULL: a layer */
    uint32_t layer;
    size_t first, n; /* rows of the matrix */
};

/* A span in its room. Filled by the reader, one parameter after another. */
struct perta_loaded {
    struct perta_span span;
    struct perta_value values[PERTA_N_PARAMS]; /* by perta_param; rows of a matrix: the first */
    bool is_there[PERTA_N_PARAMS], is_uploaded[PERTA_N_PARAMS];
    bool is_busy; /* to be read, or being read */
    int rc;       /* of the reader, with err */
    struct perta_err err;
};

struct perta_weights {
    struct perta_parameters parameters; /* of the layer begun last; first, so that parts find it */
    struct perta_checkpoint *ck;
    struct perta_llm llm;
    struct perta_file *files; /* (ck->n_shards) */
    struct perta_io_choice choice;
    struct perta_source *source; /* what the tensors are instead; NULL: what the files hold.
                                    Borrowed; set before perta_weights_start */

    /* own */
    struct perta_reader *reader; /* who opens the engine and reads with it */
    struct perta_engine *engine;
    _Atomic uint64_t read_bytes; /* so far */
    struct perta_backend *be;    /* borrowed, with the rooms */
    uint8_t *rooms[2];           /* for spans; the second may be NULL: then no span is read ahead */
    uint32_t buffers[2];         /* rooms, as the backend knows them */
    struct perta_loaded loaded[2];
    unsigned current;            /* of loaded: what is computed with */
    pthread_mutex_t lock;        /* of everything below, and of what the reader writes to loaded */
    pthread_cond_t filled;       /* a parameter is there, or cannot be */
    unsigned queue[2], n_queued; /* of loaded: to be read, in order */
    bool is_reading;             /* the reader is at the queue */
    bool ahead;                  /* the other span is read, or will be */
};

/* Open the checkpoint and its config; check that every tensor that the architecture wants is there in
 * its shape, and that a tied pair which is stored twice is one. Closed with perta_weights_close, on
 * error too. */
int perta_weights_open(struct perta_weights *w, const char *path, struct perta_err *err);
/* Begin to read. */
int perta_weights_start(struct perta_weights *w, enum perta_io_mode io, struct perta_err *err);
/* Where spans are read to: rooms of room_bytes, block-aligned; the second may be NULL. They and the
 * backend are borrowed until perta_weights_close. */
int perta_weights_rooms(struct perta_weights *w, struct perta_backend *be, uint8_t *const rooms[2],
                        uint64_t room_bytes, struct perta_err *err);
/* No file changed while it was read. */
int perta_weights_unchanged(const struct perta_weights *w, struct perta_err *err);
/* Wait for what is being read, and read no more: before the source is closed, and before rooms are
 * freed. */
void perta_weights_stop(struct perta_weights *w);
void perta_weights_close(struct perta_weights *w);

/* What the checkpoint calls them. The head is the embedding where they are tied, and then the one
 * of the two names that is stored stands for both. */
const char *perta_weights_embedding(const struct perta_weights *w);
const char *perta_weights_head(const struct perta_weights *w);
/* Is this one of the model's parameters? Others (tied copies, buffers of old checkpoints) get no
 * importance. */
bool perta_weights_is_parameter(const struct perta_weights *w, const char *name);

/* Room that reading len_bytes of a tensor takes. */
uint64_t perta_weights_room(uint64_t len_bytes);
/* Room for a whole layer. */
uint64_t perta_weights_layer_room(const struct perta_weights *w);

/* Begin a span: read it, unless that was begun already; then next, unless NULL, as the room allows.
 * What was loaded before is gone. A layer's parameters come through w->parameters, which waits for
 * each. */
void perta_weights_begin(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next);
/* Begin rows of a matrix, and wait for them. They stay until the next span is begun. */
int perta_weights_matrix(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next, struct perta_linear *rows,
                         struct perta_err *err);

/* For the host: n rows of a tensor of 2 dimensions from row first on, as they stand; *data is where
 * they are in room (block-aligned, perta_weights_room). */
int perta_weights_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                       uint8_t *room, const void **data, struct perta_err *err);
/* For the host: a small tensor, whole, as float32 to (n). room as above, for n elements of it. */
int perta_weights_vector(struct perta_weights *w, const char *name, size_t n, uint8_t *room,
                         float *to, struct perta_err *err);

/* For sources, which are asked on the thread that reads: len_bytes of a file from off_bytes on, as
 * they stand there; *data is where they are in room. */
int perta_weights_read(struct perta_weights *w, struct perta_file *file, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err);

/* ---- between weights.c and weights_read.c ---- */

/* Run job on the reader, once it is idle, and wait for it. */
int perta_weights_on_reader(struct perta_weights *w, int (*job)(void *ctx, struct perta_err *err),
                            void *ctx, struct perta_err *err);
#define PERTA_WEIGHTS_PIECES 16 /* requests under way at a time */
/* Of struct perta_parameters. */
int perta_weights_get(struct perta_parameters *from, uint32_t layer,
                      const struct perta_param_row *row, struct perta_value *value,
                      struct perta_err *err);
/* Wait until the reader is idle. */
void perta_weights_settle(struct perta_weights *w);

#endif
