/* unlearn.h - the whole job: five checkpoints in, a patch and, if wanted, a model out, in one
 * pass over the bytes, for any number of alphas at once. Spec: docs/method.md */
#ifndef PERTA_ESTIMATORS_EDIT_UNLEARN_H
#define PERTA_ESTIMATORS_EDIT_UNLEARN_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/edit/edit.h"
#include "io/format/naming.h"
#include "stream/stream.h"

#define PERTA_ALPHAS_MAX 32

enum perta_missing { PERTA_MISSING_ERROR, PERTA_MISSING_TV, PERTA_MISSING_KEEP };

struct perta_alpha {
    float value;
    const char *text; /* as it was written: names the folder alpha-TEXT when there are several */
};

struct perta_unlearn {
    const char *model, *tuned, *base; /* checkpoints; tuned may be a PEFT LoRA adapter, which
                                         needs base for what it holds whole alone */
    const char *forget, *retain;      /* importances; NULL where the method needs none */
    const char *scale;                /* of PERTA_SCALE: a weight for each parameter */
    const json_t *steps;    /* how the scale was found, for the recipe; NULL: nothing to say */
    struct perta_rule rule; /* rule.stat is found in the importances */
    struct perta_alpha alphas[PERTA_ALPHAS_MAX];
    unsigned n_alphas;
    const char *patch;          /* folder to write */
    const char *out;            /* NULL: no finished model */
    struct perta_globs globs;   /* tensors outside stay as they are */
    enum perta_missing missing; /* what to do about tensors without importance */
    bool one_way;               /* new values only: patches cannot be reverted */
    bool force;
};

/* Run it. *summary is the caller's: one object for each alpha under "results", under "unedited" how
 * many "parameters" stay as they are, "of" how many, and for what "reasons" (why, tensors,
 * parameters), and what was read. Errors name folder, tensor, element and what to do. */
PERTA_API int perta_unlearn(const struct perta_unlearn *unlearn, const struct perta_run *run,
                            json_t **summary, struct perta_err *err);

#endif
