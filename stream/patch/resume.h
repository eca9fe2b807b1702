/* resume.h - commit points of a job on the stream. Each records how far the outputs are on disk, so
 * that a later run can resume there. Spec: docs/resume.md */
#ifndef PERTA_STREAM_PATCH_RESUME_H
#define PERTA_STREAM_PATCH_RESUME_H

#include "stream/input.h"
#include "stream/journal.h"
#include "stream/patch/patch_out.h"
#include "stream/stream.h"
#include "stream/walk.h"

#define PERTA_RESUME_COUNTS 2
#define PERTA_RESUME_PATCHES_MAX 32
#define PERTA_RESUME_MODELS_MAX 2
/* Opened by perta_resume_begin. The job then sets its inputs and outputs, all borrowed. */
struct perta_resume {
    struct perta_journal journal;
    struct perta_input *inputs; /* (n_inputs); those with ck NULL are ignored */
    unsigned n_inputs;
    struct perta_patch_out *patches; /* (n_patches), with their models */
    unsigned n_patches;
    /* (n_models), of jobs without patches; those without a folder are ignored. */
    struct perta_model_out *models;
    unsigned n_models;
    uint64_t counts[PERTA_RESUME_COUNTS]; /* the job's own, for its summary */
    struct perta_walk *walk;              /* the job's position; NULL: the job restores it itself */
    /* Set by perta_resume_restore in a resumed run: the unit after the last piece that was
     * committed, which may be the end of its tensor; and the bytes that were read until then. */
    uint32_t shard;
    uint64_t tensor, unit, done_bytes;
};

/* The identity for perta_resume_begin: everything that decides the bytes of the result, namely
 * verb, flags and inputs (both stolen). The caller's; NULL only when out of memory. */
json_t *perta_resume_identity(const char *verb, json_t *flags, json_t *inputs);

/* Will the run resume one that was interrupted and left a journal beside output? Then the checks of
 * the outputs are skipped, because they may have been renamed already. */
bool perta_resume_found(const struct perta_run *run, const char *output);
/* Open the journal beside output; identity is stolen. Then the job begins its outputs with
 * &resume->journal. All of this comes before the stream. */
int perta_resume_begin(struct perta_resume *resume, const struct perta_run *run, const char *output,
                       json_t *identity, bool force, struct perta_err *err);
/* Is everything written, so that only the renames remain? Then *summary, the caller's, is that of
 * the earlier run, and only perta_resume_end is left to call. */
bool perta_resume_is_publishing(const struct perta_resume *resume, json_t **summary);
/* Call when inputs are open and patches attached: restore the state of an interrupted run, if there
 * was one. If there are models without patches, the job reopens their current shard itself. */
int perta_resume_restore(struct perta_resume *resume, struct perta_stream *stream,
                         struct perta_err *err);

/* Call after committing a piece (first_elem and n_elems in units). If a commit point is due, fsync
 * the outputs and record it in the journal. */
int perta_resume_point(struct perta_resume *resume, const struct perta_piece *piece,
                       struct perta_stream *stream, struct perta_err *err);

/* Call at the end of a run, with its rc and *err. If rc is 0, the outputs are complete: rename
 * them; *summary is kept in the journal in case that is interrupted. Else keep what can be resumed,
 * say so in *err, and release *summary. Closes the journal. */
int perta_resume_end(struct perta_resume *resume, int rc, json_t **summary, struct perta_err *err);

#endif
