/* source.h - a source of tensors other than those in a checkpoint's files: they are computed as
 * they are read, and stored nowhere. Implementations: estimators/passes/patched.c,
 * estimators/passes/scaled.c. */
#ifndef PERTA_ESTIMATORS_MODEL_SOURCE_H
#define PERTA_ESTIMATORS_MODEL_SOURCE_H

#include "io/err.h"
#include "io/format/checkpoint.h"

struct perta_weights;
struct perta_source;

struct perta_source_ops {
    /* Append the paths of its files, as perta_input_paths does. */
    int (*paths)(const struct perta_source *source, const char ***paths, size_t *n_paths,
                 struct perta_err *err);
    /* Open its files for reading. room has been set by then. */
    int (*open)(struct perta_source *source, bool direct, struct perta_err *err);
    /* Write len_bytes of a tensor, from off_bytes within it on, in the dtype of the checkpoint, to
     * to. */
    int (*read)(struct perta_source *source, struct perta_weights *weights,
                const struct perta_ref *ref, uint64_t off_bytes, uint64_t len_bytes, uint8_t *to,
                struct perta_err *err);
    int (*unchanged)(const struct perta_source *source, struct perta_err *err);
};

struct perta_source {
    const struct perta_source_ops *ops;
    uint64_t room_bytes; /* of room, block-aligned memory to read into, which its user provides */
    uint8_t *room;
    uint64_t heap_bytes; /* it has allocated besides, but not touched yet */
};

#endif
