/* estimate.h - importance from a model and text: forward and backward through a Llama-family
 * model that need not fit in memory, block by block. Spec: docs/estimate.md */
#ifndef PERTA_ESTIMATORS_PASSES_ESTIMATE_H
#define PERTA_ESTIMATORS_PASSES_ESTIMATE_H

#include <jansson.h>
#include <stdbool.h>

#include "stream/stream.h"

/* What computes: the CPU's backend, in float32 or with products of bfloat16 (AUTO: as the CPU is
 * faster); or the reference's plain loops, which the others are compared with in tests: slow, and
 * in memory that no budget bounds. */
enum perta_compute {
    PERTA_COMPUTE_AUTO,
    PERTA_COMPUTE_F32,
    PERTA_COMPUTE_BF16,
    PERTA_COMPUTE_REFERENCE,
};

/* On the way of stepwise unlearning (steps.h): theta - s * tau, formed while it is read. */
struct perta_scaled_paths {
    const char *tuned, *base; /* checkpoints; tau is their difference */
    const char *scale;        /* s, a folder that steps wrote; what it lacks stays as it is */
};

struct perta_estimate {
    const char *model;                   /* checkpoint with config.json */
    const struct perta_scaled_paths *at; /* at theta - s * tau instead; NULL: at the model */
    const char *data;                    /* JSON lines: input_ids, labels */
    const char *data_xxh128; /* of what data is to hold, perta_samples_wanted; NULL: anything */
    const char *data_key; /* file with a key: importance says the HMAC of data; NULL: no digest */
    const char *out;      /* OUT/mean, OUT/meansq are written */
    bool mean, meansq;
    bool by_probability; /* gradients of samples weighed as steps have them (docs/steps.md) */
    uint64_t max_tokens; /* of a sample; 0: no bound */
    enum perta_compute compute;
    const char *scratch; /* folder for what does not fit in memory; NULL: beside out */
    bool force;
};

/* Run it. *summary is the caller's: loss, samples, tokens, folders, bytes read,
 * "notes" (strings) on the data. */
PERTA_API int perta_estimate(const struct perta_estimate *estimate, const struct perta_run *run,
                             json_t **summary, struct perta_err *err);

#endif
