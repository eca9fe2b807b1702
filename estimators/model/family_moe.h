/* family_moe.h - what families with mixtures of experts share: rows of parameters, and keys of
 * config.json. Only the families' files include it. */
#ifndef PERTA_ESTIMATORS_MODEL_FAMILY_MOE_H
#define PERTA_ESTIMATORS_MODEL_FAMILY_MOE_H

#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#define EXPERT_BOTH PERTA_WIDTH_EXPERT_GATE_UP
#define DENSE PERTA_LAYER_DENSE
#define MIXTURE PERTA_LAYER_MIXTURE
#define WITH_SHARED (PERTA_LAYER_MIXTURE | PERTA_HAS_SHARED)
#define APART (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_APART)
#define TOGETHER (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_TOGETHER)

/* clang-format off */

/* Of each head's queries and keys, and of all of them together. */
#define HEAD_NORMS(when)                                                                   \
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, HEAD, when, false},                  \
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, HEAD, when, false}
#define WIDE_NORMS                                                                         \
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, QUERIES, PERTA_ALWAYS, false},       \
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, KEYS, PERTA_ALWAYS, false}
/* The MLP of a layer without experts. */
#define DENSE_MLP GATED(DENSE)
#define ROUTER {PERTA_ROUTER, "mlp.gate.weight", EXPERTS, HIDDEN, MIXTURE, false}
#define SHARED_MLP(of)                                                                     \
    {PERTA_SHARED_GATE, of ".gate_proj.weight", SHARED, HIDDEN, WITH_SHARED, false},       \
    {PERTA_SHARED_GATE_BIAS, of ".gate_proj.bias", VECTOR, SHARED, WITH_SHARED | PERTA_MLP_HAS_BIAS, false}, \
    {PERTA_SHARED_UP, of ".up_proj.weight", SHARED, HIDDEN, WITH_SHARED, false},           \
    {PERTA_SHARED_UP_BIAS, of ".up_proj.bias", VECTOR, SHARED, WITH_SHARED | PERTA_MLP_HAS_BIAS, false}, \
    {PERTA_SHARED_DOWN, of ".down_proj.weight", HIDDEN, SHARED, WITH_SHARED, false},       \
    {PERTA_SHARED_DOWN_BIAS, of ".down_proj.bias", VECTOR, HIDDEN, WITH_SHARED | PERTA_MLP_HAS_BIAS, false}
/* All experts in one tensor, as transformers 5 has them in memory. */
#define FUSED_EXPERTS(of)                                                                  \
    {PERTA_EXPERT_GATE_UP, of ".experts.gate_up_proj", EXPERT_BOTH, HIDDEN, TOGETHER, false}, \
    {PERTA_EXPERT_DOWN, of ".experts.down_proj", HIDDEN, EXPERT, TOGETHER, false}
/* Experts as published files have them, and fused. */
#define EXPERT_MLP                                                                         \
    {PERTA_EXPERT_GATE, "mlp.experts.%u.gate_proj.weight", EXPERT, HIDDEN, APART, false},  \
    {PERTA_EXPERT_UP, "mlp.experts.%u.up_proj.weight", EXPERT, HIDDEN, APART, false},      \
    {PERTA_EXPERT_DOWN, "mlp.experts.%u.down_proj.weight", HIDDEN, EXPERT, APART, false},  \
    FUSED_EXPERTS("mlp")
#define MIXTRAL_EXPERT_MLP                                                                 \
    {PERTA_EXPERT_GATE, "block_sparse_moe.experts.%u.w1.weight", EXPERT, HIDDEN, APART, false}, \
    {PERTA_EXPERT_DOWN, "block_sparse_moe.experts.%u.w2.weight", HIDDEN, EXPERT, APART, false}, \
    {PERTA_EXPERT_UP, "block_sparse_moe.experts.%u.w3.weight", EXPERT, HIDDEN, APART, false}, \
    FUSED_EXPERTS("mlp")

/* clang-format on */

/* ---- keys (family_moe.c) ---- */

/* Refuse output_router_logits, with which transformers adds an auxiliary loss to the loss. */
void perta_moe_no_aux_loss(struct perta_config_reader *r);
/* All layers have experts. */
void perta_moe_everywhere(struct perta_llm *llm);
/* All but the first first_k_dense_replace layers have; fallback if there is no such key. */
void perta_moe_dense_first(struct perta_config_reader *r, struct perta_llm *llm, uint32_t fallback);
/* The router of DeepSeek-V3 and those derived from it: sigmoids, a correction, groups.
 * renormalise: the default of norm_topk_prob; k: that of num_experts_per_tok, 0 if there is none. */
void perta_moe_grouped_router(struct perta_config_reader *r, struct perta_llm *llm, uint32_t k,
                              bool renormalise);

#endif
