/* route.h - a mixture's router: which experts a token goes to, and with what weights.
 *
 * A router is data. Its logits, one for each expert, are the token's state times the router's weight
 * (plus its bias, if it has one). From them follow scores; from these and a bias for the choice, if
 * the model has one, the choice; and from the scores of the chosen, the weights with which their
 * outputs are added up. Logits, scores and what is chosen by are float32 numbers, formed in the order
 * in which transformers forms them, so that what is equal there is equal here: ties are broken as
 * PyTorch breaks them (topk.h). Weights and gradients are computed in float64 and rounded once.
 *
 * The families' routers, from transformers 5.23 (models/FAMILY/modeling_FAMILY.py). The keys of
 * config.json for n_experts and k are in the first two columns; "norm" is the key that renormalises.
 *
 *   family                          n_experts            k                    the router
 *   qwen2_moe, qwen3_moe, olmoe,    num_experts          num_experts_per_tok  SOFTMAX; norm_topk_prob
 *     flex_olmo, qwen3_next
 *   mixtral, minimax                num_local_experts    num_experts_per_tok  SOFTMAX; always
 *   hunyuan_v1_moe                  num_experts, moe_topk: each a number or     SOFTMAX; always
 *                                   a list with one for each layer
 *   jamba                           num_experts          num_experts_per_tok  SOFTMAX; never
 *   ernie4_5_moe                    moe_num_experts      moe_k                SOFTMAX; always, with
 *                                     norm_min = moe_norm_min; bias moe_statics.e_score_correction_bias
 *   deepseek_v2                     n_routed_experts     num_experts_per_tok  SOFTMAX; never; scale;
 *                                     topk_method "greedy" or, with GROUP_MAX and MASKED_SCORE,
 *                                     "group_limited_greedy"
 *   deepseek_v3, kimi_k2, dots1,    n_routed_experts     num_experts_per_tok  SIGMOID; norm_topk_prob,
 *     glm4_moe, glm4_moe_lite,        norm_eps 1e-20; bias gate.e_score_correction_bias; GROUP_TOP2,
 *     exaone_moe, solar_open          MASKED_OUT; scale
 *   minimax_m2                      num_local_experts    num_experts_per_tok  SIGMOID; always; bias
 *                                     e_score_correction_bias
 *   lfm2_moe                        num_experts          num_experts_per_tok  SIGMOID; norm_topk_prob,
 *                                     norm_eps 1e-6; bias expert_bias (use_expert_bias); scale
 *   mistral4                        n_routed_experts     num_experts_per_tok  SOFTMAX; norm_topk_prob,
 *                                     norm_eps 1e-20; GROUP_TOP2, MASKED_ZERO; scale
 *   gpt_oss, granitemoe,            num_local_experts    num_experts_per_tok  CHOSEN_SOFTMAX
 *     granitemoeshared
 *   llama4                          num_local_experts    num_experts_per_tok  CHOSEN_SIGMOID;
 *                                     scales_input
 *   phimoe                          num_local_experts    2, whatever the      SPARSEMIXER, jitter =
 *                                     config says                             router_jitter_noise
 *
 * scale is routed_scaling_factor; GROUP_TOP2 and GROUP_MAX take n_group and topk_group. */
#ifndef PERTA_ESTIMATORS_MODEL_ROUTE_H
#define PERTA_ESTIMATORS_MODEL_ROUTE_H

#include <stdbool.h>
#include <stdint.h>

#include "io/err.h"

enum perta_scoring {
    PERTA_SCORE_SOFTMAX,       /* softmax of all logits */
    PERTA_SCORE_SIGMOID,       /* sigmoid of each */
    PERTA_SCORE_SQRT_SOFTPLUS, /* square root of log(1 + exp(x)) of each */
    /* Experts are chosen by their logits: */
    PERTA_SCORE_CHOSEN_SOFTMAX, /* softmax of the chosen logits */
    PERTA_SCORE_CHOSEN_SIGMOID, /* sigmoid of each of them */
    /* SparseMixer-v2 without noise (arXiv 2409.12136, as PhiMoE has it), for k = 2. The first expert
     * is that of the largest logit; its weight is the softmax over the logits that are within a
     * relative distance of 2 jitter. The second is found in the same way among the others. */
    PERTA_SCORE_SPARSEMIXER,
};

/* Experts in n_groups groups of equal size, in order; k_groups groups are chosen first. */
enum perta_grouping {
    PERTA_GROUP_NONE,
    PERTA_GROUP_MAX,  /* by the largest score of each (DeepSeek-V2) */
    PERTA_GROUP_TOP2, /* by the sum of its two largest scores (DeepSeek-V3) */
};

/* What becomes of the scores in groups that are not chosen. It matters where the chosen groups have
 * fewer than k experts, or some with a score of 0 or less. */
enum perta_masked {
    PERTA_MASKED_OUT,   /* the choice sees minus infinity */
    PERTA_MASKED_ZERO,  /* the choice sees 0 */
    PERTA_MASKED_SCORE, /* the scores themselves are 0, so that the weights are, too */
};

struct perta_router {
    uint32_t n_experts, k;
    enum perta_scoring scoring;
    enum perta_grouping grouping;
    enum perta_masked masked;
    uint32_t n_groups, k_groups; /* only with grouping */
    /* Weights are divided by their sum, which is at least norm_min, plus norm_eps. */
    bool renormalise;
    double norm_eps, norm_min;
    double scale;      /* of the weights, in the end: 1 if the family has none */
    double jitter;     /* of SPARSEMIXER */
    bool scales_input; /* weights multiply the experts' inputs, not their outputs (Llama4) */
};

/* Whether r can be computed. Returns 0, or PERTA_EINPUT: the number that makes no sense, by the
 * name that it mostly has in config.json. */
int perta_router_check(const struct perta_router *r, struct perta_err *err);

/* One token's way: which (k) and weights (k) from logits (n_experts) and bias (n_experts), which
 * counts only for the choice; NULL if there is none. Experts are in descending order of what they
 * are chosen by. Returns 0, or PERTA_EINPUT if a logit, a score with its bias, or a weight is not a
 * finite number; the caller knows layer and token. Experts and weights are undefined then. */
int perta_route_forward(const struct perta_router *r, const float *logits, const float *bias,
                        uint32_t *which, float *weights);

/* dlogits (n_experts), all of which are set, from dweights (k), for what perta_route_forward made of
 * logits: as PyTorch differentiates transformers' code. The choice has no gradient. */
void perta_route_backward(const struct perta_router *r, const float *logits, const uint32_t *which,
                          const float *weights, const float *dweights, float *dlogits);

#endif
