/* Mixtures of experts with the names of Qwen's tensors; keys of config.json that these and others
 * share. */
#include "estimators/model/family_moe.h"

/* ---- keys ---- */

void perta_moe_no_aux_loss(struct perta_config_reader *r)
{
    const json_t *share = json_object_get(r->config, "router_aux_loss_coef");
    bool is_nothing = json_is_number(share) && json_number_value(share) == 0;
    if (perta_config_bool(r, "output_router_logits") && !is_nothing)
        perta_config_refuse(r, "output_router_logits",
                            "is true: transformers then adds an auxiliary loss, which is not "
                            "supported");
}

void perta_moe_everywhere(struct perta_llm *llm)
{
    for (uint32_t l = 0; l < llm->n_layers; l++)
        perta_config_mixture(llm, l, true);
}

void perta_moe_dense_first(struct perta_config_reader *r, struct perta_llm *llm, uint32_t fallback)
{
    uint32_t dense = perta_config_whole(r, "first_k_dense_replace", fallback);
    for (uint32_t l = dense; l < llm->n_layers; l++)
        perta_config_mixture(llm, l, true);
}

void perta_moe_grouped_router(struct perta_config_reader *r, struct perta_llm *llm, uint32_t k,
                              bool renormalise)
{
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", k),
        .scoring = PERTA_SCORE_SIGMOID,
        .grouping = PERTA_GROUP_TOP2,
        .masked = PERTA_MASKED_OUT,
        .n_groups = perta_config_count(r, "n_group", 1),
        .k_groups = perta_config_count(r, "topk_group", 1),
        .renormalise = perta_config_flag(r, "norm_topk_prob", renormalise),
        .norm_eps = 1e-20,
        .scale = perta_config_number(r, r->config, "routed_scaling_factor", 1),
    };
}

/* mlp_only_layers and decoder_sparse_step: which layers have experts. */
static void read_sparse_layers(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *only = json_object_get(r->config, "mlp_only_layers");
    uint32_t step = perta_config_count(r, "decoder_sparse_step", 1);
    bool is_list = !perta_config_has(r->config, "mlp_only_layers") || json_is_array(only);
    for (size_t i = 0; i < json_array_size(only); i++)
        is_list &= json_is_integer(json_array_get(only, i));
    if (!is_list)
        perta_config_refuse(r, "mlp_only_layers", "is not a list of layers");
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        bool dense = (l + 1) % step;
        for (size_t i = 0; i < json_array_size(only); i++)
            dense |= json_integer_value(json_array_get(only, i)) == (json_int_t)l;
        perta_config_mixture(llm, l, !dense);
    }
}

/* A softmax over all experts. n_experts and k: defaults of the keys. */
static void read_softmax_router(struct perta_config_reader *r, struct perta_llm *llm,
                                uint32_t n_experts, uint32_t k)
{
    perta_moe_no_aux_loss(r);
    llm->n_experts = perta_config_experts(r, "num_experts", n_experts);
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", k),
        .scoring = PERTA_SCORE_SOFTMAX,
        .renormalise = perta_config_bool(r, "norm_topk_prob"),
        .scale = 1,
    };
}

/* ---- Qwen3 ---- */

static const struct perta_param_row qwen3_moe_params[] = {
    ATTENTION, DENSE_MLP, ROUTER, EXPERT_MLP, NORMS, HEAD_NORMS(PERTA_ALWAYS),
};

static void read_qwen3_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_softmax_router(r, llm, 128, 8);
    llm->expert_intermediate = perta_config_count(r, "moe_intermediate_size", 768);
    read_sparse_layers(r, llm);
}

static const char *const qwen3_moe_keys[] = {
    "num_experts",    "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "mlp_only_layers",   "decoder_sparse_step", NULL};

const struct perta_family perta_qwen3_moe = {
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(qwen3_moe_params),
    .own_keys = qwen3_moe_keys,
    .reads_attention_bias = true,
    .n_kv_heads = 4,
    .head_dim = 128,
    .max_positions = 32768,
    .windows = PERTA_WINDOWS_SWITCHED,
    .read = read_qwen3_moe,
};

/* ---- Qwen2: a shared expert with a gate of its own ---- */

static const struct perta_param_row qwen2_moe_params[] = {
    ATTENTION,
    DENSE_MLP,
    ROUTER,
    EXPERT_MLP,
    SHARED_MLP("mlp.shared_expert"),
    {PERTA_SHARED_SCORE, "mlp.shared_expert_gate.weight", PERTA_WIDTH_ONE, HIDDEN, WITH_SHARED,
     false},
    NORMS,
};

static void read_qwen2_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_softmax_router(r, llm, 60, 4);
    llm->expert_intermediate = perta_config_count(r, "moe_intermediate_size", 1408);
    llm->shared_intermediate = perta_config_count(r, "shared_expert_intermediate_size", 5632);
    if (perta_config_flag(r, "qkv_bias", true))
        llm->options |= PERTA_QKV_HAS_BIAS;
    read_sparse_layers(r, llm);
}

static const char *const qwen2_moe_keys[] = {"num_experts",
                                             "num_local_experts",
                                             "num_experts_per_tok",
                                             "moe_intermediate_size",
                                             "shared_expert_intermediate_size",
                                             "norm_topk_prob",
                                             "mlp_only_layers",
                                             "decoder_sparse_step",
                                             "qkv_bias",
                                             NULL};

const struct perta_family perta_qwen2_moe = {
    .model_type = "qwen2_moe",
    .architecture = "Qwen2MoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(qwen2_moe_params),
    .own_keys = qwen2_moe_keys,
    .options = PERTA_HAS_SHARED,
    .n_kv_heads = 16,
    .max_positions = 32768,
    .windows = PERTA_WINDOWS_ALTERNATE,
    .read = read_qwen2_moe,
};

/* ---- OLMoE, FlexOlmo: queries and keys are normalised as a whole ---- */

static const struct perta_param_row olmoe_params[] = {
    ATTENTION, ROUTER, EXPERT_MLP, NORMS, WIDE_NORMS,
};

static void read_olmoe(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_softmax_router(r, llm, 64, 8);
    llm->expert_intermediate = llm->intermediate;
    llm->clip_qkv = perta_config_optional(r, "clip_qkv", 0);
    perta_moe_everywhere(llm);
}

static const char *const olmoe_keys[] = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv", NULL};

const struct perta_family perta_olmoe = {
    .model_type = "olmoe",
    .architecture = "OlmoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(olmoe_params),
    .own_keys = olmoe_keys,
    .reads_attention_bias = true,
    .pad = 1 + 1,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .read = read_olmoe,
};

/* Norms come after attention and after the experts. */
static const struct perta_param_row flex_olmo_params[] = {
    ATTENTION,
    ROUTER,
    EXPERT_MLP,
    {PERTA_NORM_1_AFTER, "post_attention_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_2_AFTER, "post_feedforward_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    WIDE_NORMS,
};

static void read_flex_olmo(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_softmax_router(r, llm, 7, 5);
    llm->expert_intermediate = llm->intermediate;
    perta_moe_everywhere(llm);
}

static const char *const flex_olmo_keys[] = {"num_experts", "num_local_experts",
                                             "num_experts_per_tok", "norm_topk_prob", NULL};

const struct perta_family perta_flex_olmo = {
    .model_type = "flex_olmo",
    .architecture = "FlexOlmoForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(flex_olmo_params),
    .own_keys = flex_olmo_keys,
    .reads_attention_bias = true,
    .pad = 100277 + 1,
    .max_positions = 4096,
    .rope = {.theta = 500000},
    .read = read_flex_olmo,
};
