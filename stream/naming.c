#include "stream/naming.h"

#include <fnmatch.h>
#include <stdio.h>
#include <string.h>

#define EMBED "model.embed_tokens.weight"
#define HEAD "lm_head.weight"

static bool any_matches(const char *const *globs, unsigned n, const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!fnmatch(globs[i], name, 0))
            return true;
    return false;
}

bool perta_globs_match(const struct perta_globs *globs, const char *name)
{
    if (any_matches(globs->exclude, globs->n_exclude, name))
        return false;
    return !globs->n_include || any_matches(globs->include, globs->n_include, name);
}

const char *perta_tied_name(const char *name)
{
    return !strcmp(name, HEAD) ? EMBED : !strcmp(name, EMBED) ? HEAD : NULL;
}

const struct perta_ref *perta_tied_find(const struct perta_checkpoint *ck, const char *name,
                                        bool tied)
{
    const struct perta_ref *ref = perta_checkpoint_find(ck, name);
    const char *other = tied ? perta_tied_name(name) : NULL;
    return ref || !other ? ref : perta_checkpoint_find(ck, other);
}

bool perta_is_tied(const struct perta_checkpoint *ck)
{
    return ck->config && json_is_true(json_object_get(ck->config, "tie_word_embeddings"));
}

void perta_shape_print(char *to, size_t room, const struct perta_tensor *t)
{
    size_t n = (size_t)snprintf(to, room, "[");
    for (uint32_t i = 0; i < t->n_dims && n < room; i++)
        n += (size_t)snprintf(to + n, room - n, "%s%llu", i ? ", " : "",
                              (unsigned long long)t->shape[i]);
    if (n < room)
        snprintf(to + n, room - n, "]");
}

static bool is_vocabulary(const struct perta_tensor *a, const struct perta_tensor *b)
{
    return a->n_dims == 2 && b->n_dims == 2 && a->shape[1] == b->shape[1] &&
           (strstr(a->name, "embed") || strstr(a->name, "lm_head") || strstr(a->name, "wte"));
}

int perta_shapes_agree(const char *a_role, const struct perta_tensor *a, const char *b_role,
                       const struct perta_tensor *b, struct perta_err *err)
{
    bool same = a->n_dims == b->n_dims;
    for (uint32_t i = 0; same && i < a->n_dims; i++)
        same = a->shape[i] == b->shape[i];
    if (same)
        return 0;
    char a_shape[128], b_shape[128];
    perta_shape_print(a_shape, sizeof a_shape, a);
    perta_shape_print(b_shape, sizeof b_shape, b);
    if (is_vocabulary(a, b))
        return perta_fail(err, PERTA_EINPUT,
                          "tensor %s: the vocabulary differs: %llu rows in %s, %llu in %s; "
                          "resize one of them so that both have the same tokens",
                          a->name, (unsigned long long)a->shape[0], a_role,
                          (unsigned long long)b->shape[0], b_role);
    return perta_fail(err, PERTA_EINPUT, "tensor %s: shape %s in %s, %s in %s", a->name,
                      a_shape, a_role, b_shape, b_role);
}
