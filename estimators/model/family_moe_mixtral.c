/* Mixtures of experts with the names of Mixtral's tensors. */
#include "estimators/model/family_moe.h"

/* Published files, and transformers 5 in memory. */
#define MIXTRAL_ROUTER                                                             \
    {PERTA_ROUTER, "block_sparse_moe.gate.weight", EXPERTS, HIDDEN, APART, false}, \
    {                                                                              \
        PERTA_ROUTER, "mlp.gate.weight", EXPERTS, HIDDEN, TOGETHER, false          \
    }

/* ---- Mixtral ---- */

static const struct perta_param_row mixtral_params[] = {
    ATTENTION,
    MIXTRAL_ROUTER,
    MIXTRAL_EXPERT_MLP,
    NORMS,
};

static void read_mixtral(struct perta_config_reader *r, struct perta_llm *llm)
{
    perta_moe_no_aux_loss(r);
    llm->n_experts = perta_config_experts(r, "num_experts", 8);
    llm->expert_intermediate = llm->intermediate;
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", 2),
        .scoring = PERTA_SCORE_SOFTMAX,
        .renormalise = true,
        .scale = 1,
    };
    perta_moe_everywhere(llm);
}

/* The noise is for training. */
static const char *const mixtral_keys[] = {"num_experts", "num_local_experts",
                                           "num_experts_per_tok", "router_jitter_noise", NULL};

const struct perta_family perta_mixtral = {
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(mixtral_params),
    .own_keys = mixtral_keys,
    .n_kv_heads = 8,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 1000000},
    .windows = PERTA_WINDOWS_ASKED,
    .read = read_mixtral,
};

/* ---- MiniMax-M2 ---- */

static const struct perta_param_row minimax_m2_params[] = {
    ATTENTION,
    MIXTRAL_ROUTER,
    {PERTA_ROUTER_CORRECTION, "block_sparse_moe.e_score_correction_bias", VECTOR, EXPERTS, APART,
     false},
    {PERTA_ROUTER_CORRECTION, "mlp.e_score_correction_bias", VECTOR, EXPERTS, TOGETHER, false},
    MIXTRAL_EXPERT_MLP,
    NORMS,
    WIDE_NORMS,
};

static void read_minimax_m2(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_mixtral(r, llm);
    llm->n_experts = perta_config_experts(r, "num_experts", 256);
    llm->router.n_experts = llm->n_experts;
    llm->router.k = perta_config_count(r, "num_experts_per_tok", 8);
    llm->router.scoring = PERTA_SCORE_SIGMOID;
    perta_config_only(r, "use_qk_norm", "true");
    perta_config_only(r, "qk_norm_type", "\"per_layer\"");
    perta_config_only(r, "scoring_func", "\"sigmoid\"");
    perta_config_only(r, "use_routing_bias", "true");
    perta_config_only(r, "shared_intermediate_size", "0");
}

static const char *const minimax_m2_keys[] = {"num_experts",
                                              "num_local_experts",
                                              "num_experts_per_tok",
                                              "router_jitter_noise",
                                              "use_qk_norm",
                                              "qk_norm_type",
                                              "scoring_func",
                                              "use_routing_bias",
                                              "shared_intermediate_size",
                                              NULL};

const struct perta_family perta_minimax_m2 = {
    .model_type = "minimax_m2",
    .architecture = "MiniMaxM2ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(minimax_m2_params),
    .own_keys = minimax_m2_keys,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 196608,
    .rope = {.theta = 5000000, .partial = 1, .elements_key = "rotary_dim"},
    .read = read_minimax_m2,
};
