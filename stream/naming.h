/* naming.h - which tensors are meant: globs, and the names that tied embeddings share. */
#ifndef PERTA_STREAM_NAMING_H
#define PERTA_STREAM_NAMING_H

#include <stdbool.h>

#include "io/checkpoint.h"

/* Globs as fnmatch(3) reads them; '*' matches dots too. */
struct perta_globs {
    const char *const *include; /* (n_include); none: everything */
    const char *const *exclude; /* (n_exclude); wins over include */
    unsigned n_include, n_exclude;
};

bool perta_globs_match(const struct perta_globs *globs, const char *name);

/* The other name of embeddings that are tied; NULL for all other tensors. */
const char *perta_tied_name(const char *name);
/* The tensor of that name; where embeddings are tied (config says so) and only one of
 * model.embed_tokens.weight and lm_head.weight is there, it stands for both. NULL: missing. */
const struct perta_ref *perta_tied_find(const struct perta_checkpoint *ck, const char *name,
                                        bool tied);
/* "tie_word_embeddings" of config.json; false without one. */
bool perta_is_tied(const struct perta_checkpoint *ck);

/* "[2, 3]", cut where it does not fit. */
void perta_shape_print(char *to, size_t room, const struct perta_tensor *t);

/* 0 if both have the same shape, else PERTA_EINPUT that says what differs; a vocabulary that
 * differs is named as such. a_role and b_role are the folders' flags. */
int perta_shapes_agree(const char *a_role, const struct perta_tensor *a, const char *b_role,
                       const struct perta_tensor *b, struct perta_err *err);

#endif
