/* naming.h - names of tensors: globs, tied embeddings, buffers, prefixes of wrappers. */
#ifndef PERTA_IO_FORMAT_NAMING_H
#define PERTA_IO_FORMAT_NAMING_H

#include <stdbool.h>

#include "io/format/checkpoint.h"

/* Globs for fnmatch(3); '*' matches dots too. */
struct perta_globs {
    const char *const *include; /* (n_include); none means everything */
    const char *const *exclude; /* (n_exclude); takes precedence over include */
    unsigned n_include, n_exclude;
};

bool perta_globs_match(const struct perta_globs *globs, const char *name);

/* The usual name of a head that may be tied to the embedding. */
#define PERTA_HEAD_NAME "lm_head.weight"

/* The other name of a pair of tied embeddings: for the head, that of the embedding in ck, and the
 * reverse; NULL for all other tensors. */
const char *perta_tied_name(const struct perta_checkpoint *ck, const char *name);
/* The tensor of that name. If embeddings are tied (config says so) and only one of embedding and
 * head is stored, it stands for both. NULL if it is missing. */
const struct perta_ref *perta_tied_find(const struct perta_checkpoint *ck, const char *name,
                                        bool tied);
/* A model around a language model has other names in memory than in its files, and other ones since
 * transformers 4.52: "model.language_model.X" is "language_model.model.X". The tensor that ck, if
 * it is such a model, stores under another one of these names than name; NULL if there is none. */
const struct perta_ref *perta_around_find(const struct perta_checkpoint *ck, const char *name);
/* Is it the name of an embedding that models tie to their head? */
bool perta_tied_is_embedding(const char *name);
/* Are embedding and head both stored, under names of their own? Then *embedding and *head. */
bool perta_tied_pair(const struct perta_checkpoint *ck, const struct perta_ref **embedding,
                     const struct perta_ref **head);
/* "tie_word_embeddings" in config.json, or transformers' default for its "model_type" (Gemma,
 * GPT-2, ...); false if neither is known. For a model around a language model, where transformers
 * looks: at the top level, in "text_config", or at both. */
bool perta_is_tied_by(const json_t *config);
/* The same for a checkpoint's config, except that embeddings are not tied by a default that
 * speaks against the files: of models around others, many store a head of its own. */
bool perta_is_tied(const struct perta_checkpoint *ck);

/* Is it a buffer, which a model computes for itself and some checkpoints store (frequencies,
 * positions, masks), rather than a parameter? Judged by its name alone, or by name and shape. */
bool perta_is_buffer_name(const char *name);
bool perta_is_buffer(const struct perta_tensor *tensor);

#define PERTA_PREFIX_ROOM 64

/* Give the tensors of ck the names that model has for them. The names may differ by one prefix, the
 * same for all of them, which training wrappers prepend or which a part of a model omits. prefix
 * (cut if it does not fit) and *add (static), "" for none, are what was removed and prepended. If
 * that is not enough, parts that wrappers of single layers leave within names are removed first;
 * *wrapper (static; NULL: none) is the first of them. PERTA_EINPUT if two names become the same. */
int perta_names_align(struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                      char prefix[PERTA_PREFIX_ROOM], const char **add, const char **wrapper,
                      struct perta_err *err);

/* Print the shape as "[2, 3]", cut if it does not fit. */
void perta_shape_print(char *to, size_t room, const struct perta_tensor *t);

/* 0 if both have the same shape, else PERTA_EINPUT with the difference; a vocabulary that differs
 * is called that. a_role and b_role are the flags that the folders were given with. */
int perta_shapes_agree(const char *a_role, const struct perta_tensor *a, const char *b_role,
                       const struct perta_tensor *b, struct perta_err *err);

#endif
