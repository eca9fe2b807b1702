/* unlearn.h - the whole job: reads five checkpoints and writes a patch and, on request, the edited
 * model, in one pass over the bytes and for any number of alphas at once. Spec: docs/method.md */
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
    const char *text; /* as the user wrote it; names the folder alpha-TEXT if there are several */
};

struct perta_unlearn {
    const char *model, *tuned, *base; /* checkpoints; tuned may be a PEFT LoRA adapter, which needs
                                       * base only for tensors that it stores whole */
    const char *forget, *retain;      /* importances; NULL if the method needs none */
    const char *scale;                /* for PERTA_SCALE: a weight for each parameter */
    const char *box;                  /* for PERTA_SCALE: tau, in place of tuned and base; a folder
                                       * that steps wrote (box.h) */
    double box_size;                  /* c, for box */
    const json_t *steps;              /* how the scales were found, for the recipe; or NULL */
    struct perta_rule rule;           /* the job sets rule.stat from the importances */
    struct perta_alpha alphas[PERTA_ALPHAS_MAX];
    unsigned n_alphas;
    const char *patch;          /* the folder to write */
    const char *out;            /* NULL: write no model */
    struct perta_globs globs;   /* tensors outside of them stay unchanged */
    enum perta_missing missing; /* what to do with tensors that have no importance */
    bool one_way;               /* write new values only; such patches cannot be reverted */
    bool force;
};

/* Run the job. The caller owns *summary. It holds under "results" an object for each alpha; under
 * "unedited" how many "parameters" stay unchanged, "of" how many, and for what "reasons" (why,
 * tensors, parameters); and how many bytes were read. Errors name folder and tensor, with its
 * element, and say what to do. */
PERTA_API int perta_unlearn(const struct perta_unlearn *unlearn, const struct perta_run *run,
                            json_t **summary, struct perta_err *err);

#endif
