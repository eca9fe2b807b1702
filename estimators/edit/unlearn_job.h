/* unlearn_job.h - what the parts of unlearn share: the plan (unlearn_plan.c), the run itself
 * (unlearn.c), and the notes for the user (unlearn_notes.c). */
#ifndef PERTA_ESTIMATORS_EDIT_UNLEARN_JOB_H
#define PERTA_ESTIMATORS_EDIT_UNLEARN_JOB_H

#include "estimators/edit/adapter.h"
#include "estimators/edit/recipe.h"
#include "io/format/codec.h"
#include "stream/input.h"
#include "stream/patch/patch_out.h"
#include "stream/patch/resume.h"
#include "stream/walk.h"

_Static_assert(PERTA_ALPHAS_MAX <= PERTA_RESUME_PATCHES_MAX, "every alpha has a patch");

/* The flags that name the input folders, in the order of enum perta_role. */
extern const char *const perta_roles[PERTA_N_ROLES];

/* The plan for one tensor of the model. */
struct perta_unlearn_row {
    const struct perta_ref *in[PERTA_N_ROLES]; /* NULL: not read */
    const struct perta_change *lora;           /* the adapter's change that gives the task vector;
                                                * NULL: tuned - base */
    enum perta_method method;
    uint64_t name_hash;
    bool edited;
};

/* A number of tensors, and of parameters in them. */
struct perta_tally {
    uint64_t n_tensors, n_params;
};

struct perta_unlearn_job {
    const struct perta_unlearn *unlearn;
    struct perta_rule rule;
    struct perta_input in[PERTA_N_ROLES];
    struct perta_adapter *adapter;  /* open if --tuned is an adapter, else NULL */
    struct perta_unlearn_row *rows; /* (n_tensors) of the model, in the order of shards */
    const char **actions;           /* likewise; what is done to each, for the record */
    float alphas[PERTA_ALPHAS_MAX];
    struct perta_patch_out outs[PERTA_ALPHAS_MAX]; /* (n_alphas) */
    unsigned n_outs;
    struct perta_resume resume;
    struct perta_stream *stream;
    struct perta_codec **codecs; /* one per worker */
    struct perta_walk walk;      /* position of next() in the model */
    /* The tensors to edit, if the method needs importance; and those of them that have none. */
    struct perta_tally wanted, missing;
};

/* Open the inputs, match their tensors (fills in, rows, actions and rule.stat), and check that the
 * outputs may be written. Writes nothing. Warnings for the user are appended to notes. */
int perta_unlearn_plan(struct perta_unlearn_job *job, const struct perta_run *run, json_t *notes,
                       struct perta_err *err);

/* How many parameters the plan leaves unchanged, of how many, and why. NULL when out of memory. */
json_t *perta_unlearn_unedited(const struct perta_unlearn_job *job);

/* Append a note: what --missing applies to. */
void perta_unlearn_note_missing(const struct perta_unlearn_job *job, json_t *notes);
/* Append a note: importances that are given but that the method does not use. */
void perta_unlearn_note_unread(const struct perta_unlearn *unlearn, json_t *notes);
/* Append notes: alphas with a possibly unexpected effect. */
void perta_unlearn_note_alphas(const struct perta_unlearn *unlearn, json_t *notes);
/* After the run, append notes: inputs that should differ and are byte-identical. inputs is as in
 * the record. */
void perta_unlearn_note_same(const json_t *inputs, json_t *notes);
/* After the run, append a note: the run changes nothing, and why. */
void perta_unlearn_note_nothing(const struct perta_unlearn_job *job, const json_t *inputs,
                                json_t *notes);
/* After the run, append notes: importances that are zero where the user may not expect it. */
void perta_unlearn_note_zeros(const struct perta_unlearn_job *job, json_t *notes);

/* The folder for alpha number a below dir, which holds patches or models. The caller frees it. NULL
 * if dir is NULL or when out of memory. */
char *perta_unlearn_folder(const struct perta_unlearn_job *job, const char *dir, unsigned a);
/* The folder that is published last; the journal is kept beside it. The caller frees it. */
char *perta_unlearn_last_folder(const struct perta_unlearn_job *job);

#endif
