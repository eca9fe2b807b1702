/* importance_sink.h - the gradient sink of estimate (estimators/model/sink.h), which turns a
 * layer's gradients into importance.
 *
 * If all tokens are one batch, a weight's gradient is computed and written as soon as its
 * operands are handed over. Otherwise the operands are kept for all tokens (store.h), and gradients
 * are computed when the layer ends. */
#ifndef PERTA_ESTIMATORS_PASSES_IMPORTANCE_SINK_H
#define PERTA_ESTIMATORS_PASSES_IMPORTANCE_SINK_H

#include "estimators/model/sink.h"
#include "estimators/model/store.h"
#include "estimators/passes/statistic.h"
#include "stream/workers.h"

struct perta_importance_sink {
    struct perta_gradient_sink sink; /* first member */
    const struct perta_llm *llm;     /* borrowed, as all that follows */
    struct perta_statistic *statistic;
    struct perta_sink_rows all;                       /* the tokens of all samples */
    struct perta_scratch *scratch;                    /* of the stores */
    int (*advance)(void *ctx, struct perta_err *err); /* after each weight; not 0: stop */
    void *ctx;
    /* perta_importance_sink_bytes: sums and squares of a layer's vectors */
    struct perta_array vectors;
    /* (staging_floats): kept operands are read into it; not used otherwise while a layer is
     * ended */
    struct perta_array staging;
    uint64_t staging_floats;
    struct perta_workers *workers; /* read into staging */

    struct perta_sink_rows expert;      /* the tokens that reach the expert that was begun */
    uint64_t n_vectors[PERTA_N_PARAMS]; /* sequences whose gradients came, of this layer */
    struct perta_store x[PERTA_N_PARAMS], dy[PERTA_N_PARAMS]; /* (rows, in), (rows, out) */
};

/* Bytes of the backend's memory for the sums of a layer's vectors. */
uint64_t perta_importance_sink_bytes(const struct perta_llm *llm);
/* Floats of staging that the longest chunk of any of a layer's gradients takes, with blocks of
 * block_floats elements. */
uint64_t perta_importance_sink_staging(const struct perta_llm *llm, size_t block_floats,
                                       size_t n_tokens);

/* The value of the member sink. */
extern const struct perta_gradient_sink perta_importance_sink_functions;
/* Begin a layer; then the backward pass calls the sink; then end writes what is not written yet.
 * PERTA_EINPUT if a mean is not finite. */
void perta_importance_sink_begin(struct perta_importance_sink *s);
int perta_importance_sink_end(struct perta_importance_sink *s, uint32_t layer,
                              struct perta_err *err);
void perta_importance_sink_release(struct perta_importance_sink *s);

#endif
