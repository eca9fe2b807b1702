/* importance_sink.h - the sink of estimate (estimators/model/sink.h): a layer's gradients become
 * importance.
 *
 * Where all tokens are one batch, a weight's gradient is formed and written when it is handed over.
 * Else what it is made of is kept for all tokens (store.h), and formed when the layer is done. */
#ifndef PERTA_ESTIMATORS_PASSES_IMPORTANCE_SINK_H
#define PERTA_ESTIMATORS_PASSES_IMPORTANCE_SINK_H

#include "estimators/model/sink.h"
#include "estimators/model/store.h"
#include "estimators/passes/statistic.h"
#include "stream/workers.h"

struct perta_importance_sink {
    struct perta_gradient_sink sink; /* first */
    const struct perta_llm *llm;     /* borrowed, as all below */
    struct perta_statistic *statistic;
    const struct perta_chunks *chunks;                /* of all tokens */
    struct perta_scratch *scratch;                    /* where stores are */
    size_t n_tokens;                                  /* all */
    bool single;                                      /* all tokens are one batch */
    int (*advance)(void *ctx, struct perta_err *err); /* after each weight; not 0: stop */
    void *ctx;
    struct perta_array
        vectors; /* perta_importance_sink_bytes: a layer's vectors, sums and squares */
    struct perta_array
        staging; /* (staging_floats): where operands that were kept come back to; free
                                   while a layer is ended */
    uint64_t staging_floats;
    struct perta_workers *workers; /* who bring them */

    struct perta_store x[PERTA_N_PARAMS], dy[PERTA_N_PARAMS]; /* (tokens, in), (tokens, out) */
};

/* Bytes of the backend's memory for a layer's vectors. */
uint64_t perta_importance_sink_bytes(const struct perta_llm *llm);
/* Floats of staging that the longest chunk of a layer's gradients takes, with blocks of so many
 * elements. */
uint64_t perta_importance_sink_staging(const struct perta_llm *llm, size_t block_floats,
                                       size_t n_tokens);

/* The sink's own functions: for the field sink. */
extern const struct perta_gradient_sink perta_importance_sink_functions;
/* A layer: begin; then the sink's own functions; then end, which writes what is yet to be written.
 * PERTA_EINPUT where a mean is not finite. */
void perta_importance_sink_begin(struct perta_importance_sink *s);
int perta_importance_sink_end(struct perta_importance_sink *s, uint32_t layer,
                              struct perta_err *err);
void perta_importance_sink_release(struct perta_importance_sink *s);

#endif
