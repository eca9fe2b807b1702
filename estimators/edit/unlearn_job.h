/* unlearn_job.h - what the parts of unlearn share: the plan (unlearn_plan.c), the run
 * itself (unlearn.c), and what is said of its numbers (unlearn_notes.c). */
#ifndef PERTA_ESTIMATORS_EDIT_UNLEARN_JOB_H
#define PERTA_ESTIMATORS_EDIT_UNLEARN_JOB_H

#include "estimators/edit/adapter.h"
#include "estimators/edit/recipe.h"
#include "io/format/codec.h"
#include "stream/input.h"
#include "stream/patch/patch_out.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

_Static_assert(PERTA_ALPHAS_MAX <= PERTA_RESUME_PATCHES_MAX, "a patch for each");

/* The flags of the folders, in order of enum perta_role. */
extern const char *const perta_roles[PERTA_N_ROLES];

/* What is done to one tensor of the model. */
struct perta_unlearn_row {
    const struct perta_ref *in[PERTA_N_ROLES]; /* NULL: not read */
    const struct perta_change *lora;           /* its task vector is an adapter's, or NULL */
    enum perta_method method;
    uint64_t name_hash;
    bool edited;
};

/* So many tensors, of so many parameters. */
struct perta_tally {
    uint64_t n_tensors, n_params;
};

struct perta_unlearn_job {
    const struct perta_unlearn *unlearn;
    struct perta_rule rule;
    struct perta_input in[PERTA_N_ROLES];
    struct perta_adapter *adapter;  /* --tuned is one, or NULL */
    struct perta_unlearn_row *rows; /* (n_tensors) of the model, shard by shard */
    const char **actions;           /* likewise */
    float alphas[PERTA_ALPHAS_MAX];
    struct perta_patch_out outs[PERTA_ALPHAS_MAX]; /* (n_alphas) */
    unsigned n_outs;
    struct perta_resume resume;
    struct perta_stream *stream;
    struct perta_codec **codecs; /* one for each worker */
    struct perta_walk walk;      /* where next() stands, in the model */
    /* Of the tensors to edit, where the method wants importance; and of those, without it. */
    struct perta_tally wanted, missing;
};

/* Open the inputs, fit them together tensor by tensor (in, rows, actions, rule.stat), and
 * check where the outputs go. Nothing is written. What the user ought to know is appended
 * to notes. */
int perta_unlearn_plan(struct perta_unlearn_job *job, const struct perta_run *run, json_t *notes,
                       struct perta_err *err);

/* How many parameters the plan leaves as they are, of how many, and why. NULL without memory. */
json_t *perta_unlearn_unedited(const struct perta_unlearn_job *job);

/* Append to notes: what --missing covers. */
void perta_unlearn_note_missing(const struct perta_unlearn_job *job, json_t *notes);
/* Likewise: importances that the method has no use for. */
void perta_unlearn_note_unread(const struct perta_unlearn *unlearn, json_t *notes);
/* Likewise: alphas that do what one might not expect. */
void perta_unlearn_note_alphas(const struct perta_unlearn *unlearn, json_t *notes);
/* After the run: inputs (as the record has them) that are to differ and hold the same. */
void perta_unlearn_note_same(const json_t *inputs, json_t *notes);
/* Likewise: a run that changes nothing, and why. */
void perta_unlearn_note_nothing(const struct perta_unlearn_job *job, const json_t *inputs,
                                json_t *notes);
/* Likewise: importances that are zero where one might not expect it. */
void perta_unlearn_note_zeros(const struct perta_unlearn_job *job, json_t *notes);

/* Where alpha number a goes, of the patches' or the models' folder dir. The caller's; NULL
 * without dir, or memory. */
char *perta_unlearn_folder(const struct perta_unlearn_job *job, const char *dir, unsigned a);
/* The journal is beside the folder that is published last. The caller's. */
char *perta_unlearn_home(const struct perta_unlearn_job *job);

#endif
