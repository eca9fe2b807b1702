/* estimate.h - importance from a model and text: a forward and a backward pass, block by block,
 * through a model that need not fit in memory. Spec: docs/estimate.md */
#ifndef PERTA_ESTIMATORS_PASSES_ESTIMATE_H
#define PERTA_ESTIMATORS_PASSES_ESTIMATE_H

#include <jansson.h>
#include <stdbool.h>

#include "estimators/compute/round.h"
#include "stream/stream.h"

/* The backend: the CPU's, in float32 or with bfloat16 products (AUTO: whichever is faster on this
 * CPU); or the reference, plain loops that tests compare the CPU's with: slow, and in memory
 * outside the budget. */
enum perta_compute {
    PERTA_COMPUTE_AUTO,
    PERTA_COMPUTE_F32,
    PERTA_COMPUTE_BF16,
    PERTA_COMPUTE_REFERENCE,
};

/* A model during stepwise unlearning (steps.h): theta - s * tau, computed as it is read. */
struct perta_scaled_paths {
    const char *tuned, *base; /* checkpoints; tau is their difference. As in perta_unlearn, tuned
                               * may be a LoRA adapter */
    const char *scale; /* s, a folder that steps wrote; tensors without scales stay as they are */
    const char *box;   /* tau, in place of tuned and base; a folder that steps wrote */
    double box_size;   /* c, for box (estimators/edit/box.h) */
    /* This share of the scales counts as 0: those of elements whose random number (as in --method
     * random, of drop_seed) is below it. 0: none. */
    double drop;
    uint64_t drop_seed;
};

/* Which samples of a data file are taken (pick.h). */
enum perta_picked {
    PERTA_PICK_ALL,
    PERTA_PICK_BATCH, /* batch number turn, of at most size samples, of epochs shuffled by seed */
    PERTA_PICK_SOME,  /* size samples at random, by seed and turn; the file must have more */
    PERTA_PICK_REST,  /* all others than those */
};
struct perta_pick {
    enum perta_picked what;
    uint64_t size, seed, turn;
};

struct perta_estimate {
    const char *model;                   /* checkpoint with config.json */
    const struct perta_scaled_paths *at; /* use theta - s * tau instead of the model; NULL: no */
    const char *adapter;                 /* a PEFT LoRA adapter beside the model; NULL: none */
    /* Use the layers' matrices rounded to this format and back; the gradients are those there. The
     * adapter is not rounded. */
    enum perta_rounding quantize;
    const char *data;        /* JSON lines: input_ids, labels */
    const char *data_xxh128; /* digest that data must have (perta_samples_wanted); NULL: any */
    const char *data_key; /* file of a key: importance records the HMAC of data; NULL: no digest */
    const char *out;      /* OUT/mean, OUT/meansq are written */
    bool mean, meansq;
    /* weight the gradients of samples as steps do (docs/steps.md); the summary then has "spread"
     * (struct perta_head_means) */
    bool by_probability;
    struct perta_pick pick;
    uint64_t max_tokens; /* longer samples are refused; 0: no limit */
    /* Called when the forward pass has given the mean loss and probability. If it returns false, the
     * estimate ends there, without outputs, and "folders" in the summary is empty. A run that is
     * resumed must decide alike. NULL: always take the gradients. */
    bool (*takes_gradients)(void *ctx, double loss, double probability);
    void *ctx;
    enum perta_compute compute;
    const char *scratch; /* folder for what does not fit in memory; NULL: beside out */
    bool force;
};

/* Run the estimate. The caller owns *summary: loss, samples, tokens, folders, bytes read, "notes"
 * (strings) on the data. */
PERTA_API int perta_estimate(const struct perta_estimate *estimate, const struct perta_run *run,
                             json_t **summary, struct perta_err *err);

#endif
