/* recipe.h - what a manifest records of how a model was unlearned, and what an importance
 * folder says about itself. */
#ifndef PERTA_ESTIMATORS_EDIT_RECIPE_H
#define PERTA_ESTIMATORS_EDIT_RECIPE_H

#include <jansson.h>

#include "estimators/edit/unlearn.h"
#include "stream/input.h"

/* The folders that go into an edit, in order of enum perta_operand. */
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

/* What the folder's shards say they hold ("perta.stat"); mean, with a note appended to notes,
 * where they say nothing. */
int perta_stat_of(const struct perta_checkpoint *ck, enum perta_stat *stat, json_t *notes,
                  struct perta_err *err);

/* Every flag that matters to the bytes of the result, for alpha number a. The caller's;
 * NULL without memory. */
json_t *perta_recipe_json(const struct perta_unlearn *unlearn, const struct perta_rule *rule,
                          unsigned a, const struct perta_input *inputs);

#endif
