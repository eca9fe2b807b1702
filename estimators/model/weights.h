/* weights.h - a model's tensors, read when they are needed, by a thread of their own: what is needed
 * next is read while one computes with what is there. */
#ifndef PERTA_ESTIMATORS_MODEL_WEIGHTS_H
#define PERTA_ESTIMATORS_MODEL_WEIGHTS_H

#include "estimators/model/block.h"
#include "estimators/model/config.h"
#include "estimators/model/reader.h"
#include "estimators/model/source.h"
#include "io/engine.h"
#include "io/format/checkpoint.h"

/* What is read at once: a block, or rows of a matrix. */
struct perta_part {
    const char *name; /* of the matrix; NULL: a block */
    uint32_t layer;   /* of the block */
    size_t first, n;  /* rows of the matrix */
};

/* A part in its room. */
struct perta_loaded {
    struct perta_part part;
    struct perta_block block;   /* its weights alone are set */
    struct perta_linear linear; /* the rows */
};

struct perta_weights {
    struct perta_checkpoint *ck;
    struct perta_llm llm;
    struct perta_file *files; /* (ck->n_shards) */
    struct perta_io_choice choice;
    struct perta_source *source; /* what the tensors are instead; NULL: what the files hold.
                                    Borrowed; set before perta_weights_start */
    uint8_t *rooms[2]; /* for parts, block-aligned, borrowed; the second may be NULL: then nothing
                          is read ahead */

    /* own */
    struct perta_reader *reader; /* who opens the engine and reads with it */
    struct perta_engine *engine;
    _Atomic uint64_t read_bytes; /* so far */
    struct perta_loaded loaded[2];
    unsigned current;   /* of loaded: what is computed with */
    bool ahead;         /* the other is being read, or was */
    bool ahead_is_done; /* it was: */
    int ahead_rc;
    struct perta_err ahead_err;
};

#define PERTA_EMBEDDING "model.embed_tokens.weight"
#define PERTA_FINAL_NORM "model.norm.weight"
#define PERTA_HEAD "lm_head.weight"

/* Every parameter of the architecture, in the order of the model: its name (the embedding's may be
 * another in the checkpoint, perta_weights_embedding) and its shape (rows, cols); rows 0: a vector. Stops at the first that tensor() returns not 0 for. */
typedef int perta_tensor_fn(void *ctx, const char *name, size_t rows, size_t cols,
                            struct perta_err *err);
int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err);

/* Open the checkpoint and its config; check that every tensor that the architecture wants is
 * there in its shape, and that a tied pair which is stored twice is one. Closed with perta_weights_close, on error too. */
int perta_weights_open(struct perta_weights *w, const char *path, struct perta_err *err);
/* Begin to read. */
int perta_weights_start(struct perta_weights *w, enum perta_io_mode io, struct perta_err *err);
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
/* Room for a whole block: weights and vectors. */
uint64_t perta_weights_block_room(const struct perta_weights *w);

/* Read a part, or wait for it if it was begun; then begin to read next, unless NULL. *loaded is in
 * a room: its weights are there until the next call. */
int perta_weights_load(struct perta_weights *w, const struct perta_part *part,
                       const struct perta_part *next, const struct perta_loaded **loaded,
                       struct perta_err *err);
/* Read n rows of a tensor (2 dimensions) from row first on into room (block-aligned,
 * perta_weights_room); *linear is those rows. */
int perta_weights_rows(struct perta_weights *w, const char *name, size_t first, size_t n,
                       uint8_t *room, struct perta_linear *linear, struct perta_err *err);
/* A small tensor, whole, as float32 to (n). room as above, for n elements of the tensor. */
int perta_weights_vector(struct perta_weights *w, const char *name, size_t n, uint8_t *room,
                         float *to, struct perta_err *err);

/* For sources, which are asked on the thread that reads: len_bytes of a file from off_bytes on, as
 * they stand there; *data is where they are in room. */
int perta_weights_read(struct perta_weights *w, struct perta_file *file, uint64_t off_bytes,
                       uint64_t len_bytes, uint8_t *room, const void **data, struct perta_err *err);

/* "model.layers.LAYER.PART.weight" (or bias), in buf (128). */
const char *perta_weights_name(char *buf, uint32_t layer, const char *part, const char *kind);

#endif
