/* resume.h - commit points of a job on the stream: how far its outputs are on disk, so that a
 * run that was killed goes on there. Spec: docs/resume.md */
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
/* Opened by perta_resume_begin; then the job names its inputs and outputs, all borrowed. */
struct perta_resume {
    struct perta_journal journal;
    struct perta_input *inputs; /* (n_inputs); those with ck NULL are not used */
    unsigned n_inputs;
    struct perta_patch_out *patches; /* (n_patches), with their models */
    unsigned n_patches;
    struct perta_model_out *models; /* (n_models) of jobs without patches; those with no folder
                                       are not used */
    unsigned n_models;
    uint64_t counts[PERTA_RESUME_COUNTS]; /* the job's own, for its summary */
    struct perta_walk *walk; /* where the job stands; NULL: it finds its place itself */
    /* of a run that goes on, after perta_resume_restore: the unit after the last piece that was
     * committed, which may be its tensor's end; and bytes that were read until then */
    uint32_t shard;
    uint64_t tensor, unit, done_bytes;
};

/* Whatever decides the bytes of the result, for perta_resume_begin: verb, flags and inputs (both
 * stolen). The caller's; NULL without memory. */
json_t *perta_resume_identity(const char *verb, json_t *flags, json_t *inputs);

/* Is it to go on with what an interrupted run left beside home? Then what was checked of the
 * outputs when that began need not hold: they may have their names already. */
bool perta_resume_found(const struct perta_run *run, const char *home);
/* Open the journal beside home; identity is stolen. The job then begins its outputs with
 * &resume->journal; all of this before the stream. */
int perta_resume_begin(struct perta_resume *resume, const struct perta_run *run, const char *home,
                       json_t *identity, bool force, struct perta_err *err);
/* All is done but the names: *summary is that of the run that came so far, the caller's; only
 * perta_resume_end is left. */
bool perta_resume_is_publishing(const struct perta_resume *resume, json_t **summary);
/* Inputs are open and patches attached: take up what was left, if anything was. The
 * shard under way of models without a patch is the job's to open again. */
int perta_resume_restore(struct perta_resume *resume, struct perta_stream *stream,
                         struct perta_err *err);

/* A piece (first_elem, n_elems: units) is committed: if it is time, bring all to disk and say so in
 * the journal. */
int perta_resume_point(struct perta_resume *resume, const struct perta_piece *piece,
                       struct perta_stream *stream, struct perta_err *err);

/* After a run that ended with rc and *err. 0: the outputs are complete, give them their names;
 * *summary is on record in case it is killed meanwhile. Else keep what the next run can go on
 * with, say so in *err, and let go of *summary. Closes the journal. */
int perta_resume_end(struct perta_resume *resume, int rc, json_t **summary, struct perta_err *err);

#endif
