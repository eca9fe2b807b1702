/* naming.h - which tensors are meant: globs, and the names that tied embeddings share. */
#ifndef PERTA_IO_FORMAT_NAMING_H
#define PERTA_IO_FORMAT_NAMING_H

#include <stdbool.h>

#include "io/format/checkpoint.h"

/* Globs as fnmatch(3) reads them; '*' matches dots too. */
struct perta_globs {
    const char *const *include; /* (n_include); none: everything */
    const char *const *exclude; /* (n_exclude); wins over include */
    unsigned n_include, n_exclude;
};

bool perta_globs_match(const struct perta_globs *globs, const char *name);

/* The head that may be tied to the embedding. */
#define PERTA_HEAD_NAME "lm_head.weight"

/* The other name of embeddings that are tied: of a head that of the embedding in ck; NULL for all
 * other tensors. */
const char *perta_tied_name(const struct perta_checkpoint *ck, const char *name);
/* The tensor of that name; where embeddings are tied (config says so) and only one of embedding and
 * head is there, it stands for both. NULL: missing. */
const struct perta_ref *perta_tied_find(const struct perta_checkpoint *ck, const char *name,
                                        bool tied);
/* Is it one of the embeddings that models tie to their head? */
bool perta_tied_is_embedding(const char *name);
/* Are both there, each under a name of its own? */
bool perta_tied_pair(const struct perta_checkpoint *ck, const struct perta_ref **embedding,
                     const struct perta_ref **head);
/* "tie_word_embeddings" of config.json, or what transformers has by default for its "model_type"
 * (Gemma, GPT-2, ...); false without either. */
bool perta_is_tied(const struct perta_checkpoint *ck);

/* Is it no parameter, but what a model computes for itself and some checkpoints store: frequencies,
 * positions, masks? By its name alone, and by name and shape. */
bool perta_is_buffer_name(const char *name);
bool perta_is_buffer(const struct perta_tensor *tensor);

#define PERTA_PREFIX_ROOM 64

/* Names of ck may be those of model but for one prefix, the same for all of them, that wrappers of
 * training put in front, or that a part of a model does without: give them those of model. prefix
 * (cut where it does not fit) and *add (static), "" for none, are what was taken off and put in front. Where that does not do,
 * parts within names that wrappers of single layers leave there are dropped first; *wrapper (static;
 * NULL: none) is the first of them. PERTA_EINPUT if that makes one name of two. */
int perta_names_align(struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                      char prefix[PERTA_PREFIX_ROOM], const char **add, const char **wrapper,
                      struct perta_err *err);

/* "[2, 3]", cut where it does not fit. */
void perta_shape_print(char *to, size_t room, const struct perta_tensor *t);

/* 0 if both have the same shape, else PERTA_EINPUT that says what differs; a vocabulary that
 * differs is named as such. a_role and b_role are the folders' flags. */
int perta_shapes_agree(const char *a_role, const struct perta_tensor *a, const char *b_role,
                       const struct perta_tensor *b, struct perta_err *err);

#endif
