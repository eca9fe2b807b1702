/* experts.h - a layer with a mixture of experts (mixture.h), over all tokens of a pass.
 *
 * Attention and the router come first, batch by batch. Then experts are read one after another, and
 * each computes the tokens of all batches that go to it; those that no token reaches are not read.
 * What an expert adds to a token is added in the order of experts, so results do not depend on
 * batches. */
#ifndef PERTA_ESTIMATORS_PASSES_EXPERTS_H
#define PERTA_ESTIMATORS_PASSES_EXPERTS_H

#include "estimators/model/mixture.h"
#include "estimators/model/samples.h"
#include "estimators/model/store.h"

struct perta_estimate_job;

struct perta_experts {
    uint32_t *which;             /* (n_tokens, k): the experts of each token */
    float *weights, *dweights;   /* (n_tokens, k), and their gradients */
    float *logits;               /* (tokens of a batch, n_experts): the router's */
    float *correction, *dlogits; /* (n_experts) */
    /* By expert: expert e has entries starts[e] .. starts[e + 1], in the order of tokens. */
    size_t *starts;  /* (n_experts + 1) */
    uint32_t *token; /* (n_tokens * k) */
    uint32_t *slot;  /* (n_tokens * k): the index in which and weights */
    float *by;       /* (n_tokens * k): the weight */
    size_t *samples; /* (samples + 1): rows of the expert that is at work */
};

/* Bytes on the host for a pass over these samples, and for each token of a batch. */
uint64_t perta_experts_bytes(const struct perta_llm *llm, const struct perta_samples *samples);
uint64_t perta_experts_batch_bytes(const struct perta_llm *llm, size_t tokens);
/* After the plan of memory. A model without a mixture takes nothing. */
int perta_experts_open(struct perta_experts *experts, const struct perta_llm *llm,
                       const struct perta_samples *samples, size_t batch_tokens,
                       struct perta_err *err);
void perta_experts_close(struct perta_experts *experts);

/* Forward pass of a layer with a mixture over all tokens. from and to may be the same. */
int perta_experts_forward(struct perta_estimate_job *job, const struct perta_layer *layer,
                          const struct perta_store *from, struct perta_store *to,
                          struct perta_err *err);
/* Backward pass, from job->x of the layer and job->dx to next. Gradients of weights go to the
 * layer's sink. */
int perta_experts_backward(struct perta_estimate_job *job, const struct perta_layer *layer,
                           struct perta_store *next, struct perta_err *err);

#endif
