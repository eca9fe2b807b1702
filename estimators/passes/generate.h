/* generate.h - prompts continued greedily: after eval's pass over the data, every further pass over
 * the model adds a token to each answer that has not ended. Spec: docs/eval.md, "Generation" */
#ifndef PERTA_ESTIMATORS_PASSES_GENERATE_H
#define PERTA_ESTIMATORS_PASSES_GENERATE_H

#include "estimators/model/cache.h"
#include "estimators/model/ends.h"
#include "estimators/passes/estimate_job.h"

/* The answer to a prompt: what a line has before its first label. */
struct perta_answer {
    uint64_t sample;   /* the line's own */
    uint32_t position; /* of the answer's first token */
    uint32_t at;       /* the same by its index in the line */
    uint32_t n;        /* tokens so far, without the end token */
    bool ended;        /* by an end token */
};

struct perta_generation {
    uint64_t most; /* tokens of an answer, its end token included; 0: nothing is generated */
    struct perta_ends ends;
    struct perta_answer *answers; /* (n) */
    uint64_t n;
    int32_t *tokens;          /* (n, most) */
    struct perta_cache cache; /* if most > 1 */
    struct perta_store x;     /* (n, H): of the tokens that are added */
    uint64_t n_passes;

    /* The tokens that are added in a pass, in place of the job's: each is a sample of its own, and
     * element i of answer is its answer. */
    struct perta_samples samples;
    size_t *starts;
    struct perta_cut cut;
    struct perta_head head;
    uint32_t *answer;
};

/* Find the prompts of the job's samples and the tokens that end answers, and tell the job what
 * memory is needed; before its plan. g is zeroed, and stays where it is. PERTA_EINPUT names a line
 * that is not one sequence. The caller calls perta_generation_close, also on error. */
int perta_generation_begin(struct perta_generation *g, struct perta_estimate_job *job,
                           uint64_t most, struct perta_err *err);
/* Open the stores, before the job's forward pass, which then keeps keys and values. */
int perta_generation_open(struct perta_generation *g, struct perta_estimate_job *job,
                          struct perta_err *err);
/* After the forward pass: generate. */
int perta_generation_run(struct perta_generation *g, struct perta_estimate_job *job,
                         struct perta_err *err);
/* Add "generated_ids" and "generated_end" to each object of "per_sample" (one for each answer), and
 * sums to the summary. */
void perta_generation_report(const struct perta_generation *g, json_t **summary);
/* Before the job is released. */
void perta_generation_close(struct perta_generation *g, struct perta_estimate_job *job);

#endif
