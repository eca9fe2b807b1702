/* route.h - a mixture's router: which experts a token goes to, and with what weights.
 *
 * A router is data. Its logits, one for each expert, are the token's state times the router's
 * weight (plus its bias, if it has one). From them follow scores; from these and a bias for the
 * choice, if the model has one, the choice; and from the scores of the chosen, the weights with
 * which their outputs are added up. Logits, scores and what is chosen by are float32 numbers,
 * formed in the order in which transformers forms them, so that what is equal there is equal here,
 * and ties are broken as PyTorch breaks them (topk.h). From there on, weights and gradients are
 * computed in float64 and rounded once.
 *
 * The families' routers, as transformers 5.23 computes them (models/FAMILY/modeling_FAMILY.py).
 * "if" stands before the key of config.json that decides, with its default. Noise on the router's
 * input (router_jitter_noise, input_jitter_noise) is only for training.
 *
 * SOFTMAX
 *   qwen2_moe, qwen3_moe, qwen3_next, olmoe, flex_olmo
 *                         renormalised if norm_topk_prob (false; qwen3_next: true)
 *   mixtral, minimax, hunyuan_v1_moe
 *                         renormalised
 *   jamba                 not renormalised
 *   ernie4_5_moe          renormalised, norm_min = moe_norm_min (1e-12); bias
 *                         moe_statics.e_score_correction_bias
 *   deepseek_v2           not renormalised, whatever norm_topk_prob says; scale; GROUP_MAX and
 *                         MASKED_SCORE if topk_method ("greedy") is "group_limited_greedy"
 *   mistral4              as deepseek_v3, but without a bias and with MASKED_ZERO
 * SIGMOID
 *   deepseek_v3 (Kimi-K2), glm4_moe, glm4_moe_lite, dots1, exaone_moe, solar_open
 *                         GROUP_TOP2, MASKED_OUT; bias gate.e_score_correction_bias; scale; if
 *                         norm_topk_prob (true; dots1: false) renormalised with norm_eps 1e-20
 *   minimax_m2            renormalised; bias e_score_correction_bias
 *   lfm2_moe              if norm_topk_prob (true) renormalised with norm_eps 1e-6; scale; bias
 *                         expert_bias if use_expert_bias (true)
 * CHOSEN_SOFTMAX
 *   gpt_oss, granitemoe, granitemoeshared
 * CHOSEN_SIGMOID
 *   llama4                scales_input
 * SPARSEMIXER
 *   phimoe                jitter = router_jitter_noise (0.01); k = 2, whatever the config says
 *
 * n_experts is num_experts (qwen, olmoe, flex_olmo, hunyuan, jamba, exaone, lfm2),
 * num_local_experts (mixtral, minimax, gpt_oss, granite, llama4, phimoe; qwen3_moe as transformers
 * 5 writes it), n_routed_experts (deepseek, glm4, dots1, solar, mistral4) or moe_num_experts
 * (ernie). k is num_experts_per_tok, moe_k (ernie) or moe_topk (hunyuan, whose num_experts and
 * moe_topk may be lists with a number for each layer). scale is routed_scaling_factor; n_groups
 * and k_groups are n_group and topk_group. */
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
    /* SparseMixer-v2 without noise (arXiv 2409.12136, as PhiMoE has it), for k = 2. The first
     * expert is that of the largest logit; its weight is the softmax over the logits that are
     * within a relative distance of 2 jitter. The second is found in the same way among the
     * others. There are no groups, no bias, no scale and nothing is renormalised. */
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

/* dlogits (n_experts), all of which are set, from dweights (k), for what perta_route_forward made
 * of logits: as PyTorch differentiates transformers' code. The choice has no gradient. */
void perta_route_backward(const struct perta_router *r, const float *logits, const uint32_t *which,
                          const float *weights, const float *dweights, float *dlogits);

#endif
