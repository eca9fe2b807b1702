/* recipe.h - the recipe: what a manifest records of how a model was unlearned, and what an
 * importance folder records about itself. */
#ifndef PERTA_ESTIMATORS_EDIT_RECIPE_H
#define PERTA_ESTIMATORS_EDIT_RECIPE_H

#include <jansson.h>

#include "estimators/edit/unlearn.h"
#include "stream/input.h"

/* The input folders of an edit, in the order of enum perta_operand. */
enum perta_role {
    PERTA_ROLE_MODEL,
    PERTA_ROLE_TUNED,
    PERTA_ROLE_BASE,
    PERTA_ROLE_FORGET,
    PERTA_ROLE_RETAIN,
    PERTA_ROLE_SCALE,
    PERTA_N_ROLES,
};

const char *perta_method_name(enum perta_method method);
const char *perta_stat_name(enum perta_stat stat);

/* Read what the folder's shards hold (metadata "perta.stat"). If they do not say, it is mean
 * gradients, and a note is appended to notes. */
int perta_stat_of(const struct perta_checkpoint *ck, enum perta_stat *stat, json_t *notes,
                  struct perta_err *err);

/* Every flag that affects the bytes of the result, for alpha number a. The caller owns the
 * reference. NULL when out of memory. */
json_t *perta_recipe_json(const struct perta_unlearn *unlearn, const struct perta_rule *rule,
                          unsigned a, const struct perta_input *inputs);

#endif
