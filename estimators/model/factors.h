/* factors.h - the LoRA factors beside a model's frozen weights, in memory: y = x W^T + bias +
 * scaling * (x A^T) B^T, as PEFT computes it, for weights of layers. */
#ifndef PERTA_ESTIMATORS_MODEL_FACTORS_H
#define PERTA_ESTIMATORS_MODEL_FACTORS_H

#include "estimators/compute/backend.h"
#include "estimators/model/config.h"
#include "estimators/model/family.h"

/* The factors of one weight. In an array of all factors, A (r, in) is at floats at .. and B (out,
 * r) at floats at_b .. */
struct perta_factor {
    struct perta_site site;
    enum perta_param param;
    size_t out, in, r;
    float scaling;
    uint64_t at, at_b;
};

struct perta_factors {
    const struct perta_llm *llm; /* borrowed */
    struct perta_factor *of;     /* (n), in the order of layers, parameters and experts */
    size_t n, r_max;
    /* Index in of, plus 1; 0: none. (n_layers, PERTA_N_PARAMS), then those of experts (n_layers,
     * n_experts, EXPERT_PARAMS of factors.c) */
    uint32_t *numbers;
    uint64_t n_floats;         /* in an array of all factors */
    struct perta_array values; /* (n_floats), of the backend's */
    struct perta_array room;   /* scratch of the backend's, (2, rows of a batch, r_max) */
};

/* Make an empty set for this model. The caller releases it with perta_factors_release. */
int perta_factors_open(struct perta_factors *factors, const struct perta_llm *llm,
                       struct perta_err *err);
/* Add a LoRA to a matrix of a layer or an expert, once; layers, parameters, experts in order. */
void perta_factors_add(struct perta_factors *factors, struct perta_site site,
                       const struct perta_param_row *row, uint64_t r, float scaling);
/* A zeroed struct is allowed. */
void perta_factors_release(struct perta_factors *factors);

/* The LoRA beside a weight, or NULL. factors may be NULL. */
const struct perta_factor *perta_factors_find(const struct perta_factors *factors,
                                              struct perta_site site, enum perta_param param);
/* For the backend, with A and B in array, which has the layout of values. */
struct perta_low_rank perta_factor_in(const struct perta_factor *factor, struct perta_array array);

#endif
