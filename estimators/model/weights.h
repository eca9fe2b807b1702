/* weights.h - a checkpoint's tensors, read by a thread of their own: it reads the next parameters
 * while the caller computes with those that are there. */
#ifndef PERTA_ESTIMATORS_MODEL_WEIGHTS_H
#define PERTA_ESTIMATORS_MODEL_WEIGHTS_H

#include <pthread.h>

#include "estimators/compute/round.h"
#include "estimators/model/config.h"
#include "estimators/model/dequantised.h"
#include "estimators/model/part.h"
#include "estimators/model/reader.h"
#include "estimators/model/source.h"
#include "io/engine.h"
#include "io/format/checkpoint.h"

/* What is loaded into one room: the parameters of a layer (without its experts'), those of one
 * expert, or some rows of a matrix. */
struct perta_span {
    const char *name; /* the matrix; NULL: a layer or an expert */
    struct perta_site site;
    size_t first, n; /* rows of the matrix */
};

/* A span and its room, which the reader fills one parameter after another. */
struct perta_loaded {
    struct perta_span span;
    struct perta_value values[PERTA_N_PARAMS]; /* by perta_param; rows of a matrix are the first */
    bool is_there[PERTA_N_PARAMS], is_uploaded[PERTA_N_PARAMS];
    bool is_busy; /* queued, or being read */
    int rc;       /* failure of the reader, with err */
    struct perta_err err;
};

#define PERTA_WEIGHTS_ROOMS 4

struct perta_weights {
    struct perta_parameters parameters; /* first member, of the layer that was begun last */
    struct perta_checkpoint *ck;
    struct perta_llm llm;
    struct perta_file *files; /* (ck->n_shards) */
    struct perta_io_choice choice;
    struct perta_dequantised dequantised; /* the source at first, if the weights are quantised */
    struct perta_source *source;          /* forms the tensors; NULL: they are read from the files.
                                    Borrowed; set before perta_weights_start */
    enum perta_rounding rounding;         /* of the layers' matrices, as they are read */

    /* own */
    struct perta_reader *reader; /* opens the engine, and reads with it */
    struct perta_engine *engine;
    _Atomic uint64_t read_bytes; /* so far */
    struct perta_backend *be;    /* borrowed, as are the rooms */
    /* for spans; if the second of a pair is NULL, no span is read ahead. Experts have a pair of
     * their own: their layer's other parameters stay where they are */
    uint8_t *rooms[PERTA_WEIGHTS_ROOMS];
    uint32_t buffers[PERTA_WEIGHTS_ROOMS]; /* the backend's buffers of the rooms */
    struct perta_loaded loaded[PERTA_WEIGHTS_ROOMS];
    unsigned current[2];   /* index in loaded of the span in use: of layers and rows, of experts */
    bool ahead[2];         /* the other span of the pair was queued: it is, or will be, read */
    pthread_mutex_t lock;  /* guards what follows, and what the reader writes to loaded */
    pthread_cond_t filled; /* signals that a parameter is there, or that reading failed */
    /* indices in loaded of the spans to be read, in order */
    unsigned queue[PERTA_WEIGHTS_ROOMS], n_queued;
    bool is_reading; /* the reader works on the queue */
};

/* Open the checkpoint and its config. If its weights are quantised, w->ck is the dequantised
 * checkpoint, and w->source its source. Check that every tensor of the architecture is there in its
 * shape, and that the two copies of a tied pair, if both are stored, are equal. The caller calls
 * perta_weights_close, also on error. */
int perta_weights_open(struct perta_weights *w, const char *path, struct perta_err *err);
/* Round the layers' matrices (not the embedding, nor the head) as they are read, after the source.
 * Called before perta_weights_start. PERTA_EINPUT, naming the tensor, if one cannot be stored in
 * the format. */
int perta_weights_round(struct perta_weights *w, enum perta_rounding rounding,
                        struct perta_err *err);
/* Whether it is rounded: a linear module's matrix. Routers and the gate of a shared expert are left as
 * they are. */
static inline bool perta_weights_rounds(const struct perta_weights *w,
                                        const struct perta_param_row *row)
{
    return w->rounding && row->out != PERTA_WIDTH_NONE && row->out != PERTA_WIDTH_ROW &&
           row->param != PERTA_ROUTER && row->param != PERTA_SHARED_SCORE;
}
/* How many parameters are rounded. */
uint64_t perta_weights_n_rounded(const struct perta_weights *w);
/* Start the reader. */
int perta_weights_start(struct perta_weights *w, enum perta_io_mode io, struct perta_err *err);
/* Set the rooms into which spans are read, block-aligned: two of room_bytes each, for layers and
 * rows, and two of expert_bytes each; the second of each pair may be NULL, and the last two are if
 * expert_bytes is 0. The rooms and the backend are borrowed until perta_weights_close. */
int perta_weights_rooms(struct perta_weights *w, struct perta_backend *be,
                        uint8_t *const rooms[PERTA_WEIGHTS_ROOMS], uint64_t room_bytes,
                        uint64_t expert_bytes, struct perta_err *err);
/* Fail if a file changed while it was read. */
int perta_weights_unchanged(const struct perta_weights *w, struct perta_err *err);
/* Stop the reader: wait for what it is reading, and drop what is queued. Must be called before the
 * source is closed and before the rooms are freed. */
void perta_weights_stop(struct perta_weights *w);
void perta_weights_close(struct perta_weights *w);

/* Their names in the checkpoint. If they are tied, the head is the embedding, and whichever of the
 * two names is stored is used for both. */
const char *perta_weights_embedding(const struct perta_weights *w);
const char *perta_weights_head(const struct perta_weights *w);
/* Whether a tensor is a parameter of the model. Others (tied copies, buffers in old checkpoints)
 * get no importance. */
bool perta_weights_is_parameter(const struct perta_weights *w, const char *name);

/* Bytes that a tensor takes in the checkpoint's files. */
uint64_t perta_weights_stored(const struct perta_weights *w, const struct perta_ref *ref);

/* Bytes of room that are needed to read len_bytes of a tensor. */
uint64_t perta_weights_room(uint64_t len_bytes);
/* Bytes of room for any whole layer, without experts; for any expert (0: there are none). */
uint64_t perta_weights_layer_room(const struct perta_weights *w);
uint64_t perta_weights_expert_room(const struct perta_weights *w);

/* Begin a span: queue it to be read, unless it was read ahead; then queue next, unless it is NULL
 * or there is no second room. The span before in the same pair of rooms becomes invalid. next is of
 * the same pair. The parameters of a layer, or of an expert, are taken through w->parameters, which
 * waits for each of them. */
void perta_weights_begin(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next);
/* Begin rows of a matrix and wait for them. They are valid until the next span is begun. */
int perta_weights_matrix(struct perta_weights *w, const struct perta_span *span,
                         const struct perta_span *next, struct perta_linear *rows,
                         struct perta_err *err);

/* For use on the host: n rows of a matrix from row first on, in its dtype. *data points to them in
 * room (block-aligned, of perta_weights_room bytes). */
int perta_weights_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                       uint8_t *room, const void **data, struct perta_err *err);
/* For use on the host: n elements of a tensor from element first on, converted to float32, to (n).
 * room: as above, for n elements. */
int perta_weights_vector(struct perta_weights *w, const char *name, size_t first, size_t n,
                         uint8_t *room, float *to, struct perta_err *err);

/* For sources, which run on the reader: len_bytes of a file from off_bytes on. *data points to them
 * in room. */
int perta_weights_read(struct perta_weights *w, struct perta_file *file, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err);

/* ---- between weights.c and weights_read.c ---- */

/* Wait until the reader is idle, run job on it, and wait for the result. */
int perta_weights_on_reader(struct perta_weights *w, int (*job)(void *ctx, struct perta_err *err),
                            void *ctx, struct perta_err *err);
#define PERTA_WEIGHTS_PIECES 16 /* requests in flight */
/* The function get of struct perta_parameters. */
int perta_weights_get(struct perta_parameters *from, struct perta_site site,
                      const struct perta_param_row *row, struct perta_value *value,
                      struct perta_err *err);
/* Wait until the reader is idle. */
void perta_weights_settle(struct perta_weights *w);

#endif
