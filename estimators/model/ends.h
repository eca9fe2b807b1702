/* ends.h - the tokens that end what a model says. */
#ifndef PERTA_ESTIMATORS_MODEL_ENDS_H
#define PERTA_ESTIMATORS_MODEL_ENDS_H

#include <jansson.h>
#include <stdbool.h>

#include "io/format/checkpoint.h"

struct perta_ends {
    int64_t *ids; /* (n) */
    size_t n;
};

/* As transformers' generate() finds them: "eos_token_id" of generation_config.json, beside the
 * model's config.json; without such a file, of config.json. Appends to *notes which other settings
 * of generation_config.json are not applied, although they would change which token is taken; that
 * there is no end token; and which are none of the vocab tokens that the model can say.
 * PERTA_EINPUT names file and key. The caller calls perta_ends_release, also on error. */
int perta_ends_read(const struct perta_checkpoint *ck, uint32_t vocab, struct perta_ends *ends,
                    json_t **notes, struct perta_err *err);
bool perta_ends_has(const struct perta_ends *ends, int64_t id);
void perta_ends_release(struct perta_ends *ends);

#endif
