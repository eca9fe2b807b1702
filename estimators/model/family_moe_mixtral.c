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

/* ---- Phi-3.5-MoE ---- */

#define PHIMOE_NORM(norm, name)                                        \
    {norm, name ".weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},       \
    {                                                                  \
        norm##_BIAS, name ".bias", VECTOR, HIDDEN, PERTA_ALWAYS, false \
    }

static const struct perta_param_row phimoe_params[] = {
    ATTENTION,
    {PERTA_ROUTER, "block_sparse_moe.gate.weight", EXPERTS, HIDDEN, APART, false},
    {PERTA_ROUTER, "mlp.router.weight", EXPERTS, HIDDEN, TOGETHER, false},
    MIXTRAL_EXPERT_MLP,
    PHIMOE_NORM(PERTA_NORM_1, "input_layernorm"),
    PHIMOE_NORM(PERTA_NORM_2, "post_attention_layernorm"),
};

static void read_phimoe(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *jitter = json_object_get(r->config, "router_jitter_noise");
    bool is_zero = json_is_number(jitter) && json_number_value(jitter) == 0;
    read_mixtral(r, llm);
    llm->n_experts = perta_config_experts(r, "num_experts", 16);
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = 2,
        .scoring = PERTA_SCORE_SPARSEMIXER,
        .jitter = is_zero ? 0 : perta_config_number(r, r->config, "router_jitter_noise", 0.01),
        .scale = 1,
    };
    perta_config_only(r, "num_experts_per_tok", "2"); /* the router has no other number */
    if (!perta_config_bool(r, "lm_head_bias"))
        llm->options |= PERTA_NO_HEAD_BIAS;
}

/* The noise of the input is for training; that of the router says which logits are far apart. */
static const char *const phimoe_keys[] = {"num_experts",
                                          "num_local_experts",
                                          "num_experts_per_tok",
                                          "router_jitter_noise",
                                          "input_jitter_noise",
                                          "lm_head_bias",
                                          NULL};

const struct perta_family perta_phimoe = {
    .model_type = "phimoe",
    .architecture = "PhimoeForCausalLM",
    .base = "model",
    .layers = "layers",
    PARAMS(phimoe_params),
    .embedding = "embed_tokens.weight",
    .head = "lm_head.weight",
    .head_bias = "lm_head.bias",
    .final_norm = "norm.weight",
    .final_norm_bias = "norm.bias",
    .norm = &perta_layernorm_part,
    .attention = &perta_attention_part,
    .own_keys = phimoe_keys,
    .reads_attention_bias = true,
    .n_kv_heads = 8,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 1000000, .short_mscale = true},
    .windows = PERTA_WINDOWS_ASKED,
    .read = read_phimoe,
};

/* ---- Granite: all experts in one tensor, and multipliers ---- */

static const struct perta_param_row granitemoe_params[] = {
    ATTENTION,
    {PERTA_ROUTER, "block_sparse_moe.router.layer.weight", EXPERTS, HIDDEN, APART, false},
    {PERTA_ROUTER, "block_sparse_moe.router.weight", EXPERTS, HIDDEN, TOGETHER, false},
    {PERTA_EXPERT_GATE_UP, "block_sparse_moe.input_linear.weight", EXPERT_BOTH, HIDDEN, APART,
     false},
    {PERTA_EXPERT_DOWN, "block_sparse_moe.output_linear.weight", HIDDEN, EXPERT, APART, false},
    FUSED_EXPERTS("block_sparse_moe"),
    NORMS,
};

static void read_granitemoe(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_mixtral(r, llm);
    llm->router.scoring = PERTA_SCORE_CHOSEN_SOFTMAX;
    llm->router.renormalise = false;
    perta_config_granite(r, llm);
}

static const char *const granitemoe_keys[] = {
    "num_experts",          "num_local_experts", "num_experts_per_tok", "attention_multiplier",
    "embedding_multiplier", "logits_scaling",    "residual_multiplier", NULL};

const struct perta_family perta_granitemoe = {
    .model_type = "granitemoe",
    .architecture = "GraniteMoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(granitemoe_params),
    .own_keys = granitemoe_keys,
    .reads_attention_bias = true,
    .max_positions = 2048,
    .read = read_granitemoe,
};
