/* Mixtures of experts with experts that all tokens go to, beside the others: in transformers one MLP
 * of their widths together. */
#include "estimators/model/family_moe.h"

#define CORRECTION \
    {PERTA_ROUTER_CORRECTION, "mlp.gate.e_score_correction_bias", VECTOR, EXPERTS, MIXTURE, false}

/* ---- GLM-4.5, dots.llm1 ---- */

static const struct perta_param_row glm4_moe_params[] = {
    ATTENTION,  DENSE_MLP,
    ROUTER,     CORRECTION,
    EXPERT_MLP, SHARED_MLP("mlp.shared_experts"),
    NORMS,      HEAD_NORMS(PERTA_QK_NORM),
};

static void read_shared(struct perta_config_reader *r, struct perta_llm *llm, uint32_t n_shared)
{
    uint32_t n = perta_config_count(r, "n_shared_experts", n_shared);
    llm->expert_intermediate = perta_config_count(r, "moe_intermediate_size", 1408);
    if ((uint64_t)n * llm->expert_intermediate > INT32_MAX)
        perta_config_refuse(r, "n_shared_experts", "is too large");
    else
        llm->shared_intermediate = n * llm->expert_intermediate;
}

static void read_glm4_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->n_experts = perta_config_experts(r, "n_routed_experts", 128);
    read_shared(r, llm, 1);
    perta_moe_grouped_router(r, llm, 8, true);
    perta_moe_dense_first(r, llm, 1);
    if (perta_config_bool(r, "attention_bias"))
        llm->options |= PERTA_QKV_HAS_BIAS;
    if (perta_config_bool(r, "use_qk_norm"))
        llm->options |= PERTA_QK_NORM;
    llm->n_extra_layers = perta_config_whole(r, "num_nextn_predict_layers", 1);
}

static const char *const glm4_moe_keys[] = {"n_routed_experts",
                                            "num_local_experts",
                                            "num_experts_per_tok",
                                            "n_shared_experts",
                                            "moe_intermediate_size",
                                            "norm_topk_prob",
                                            "n_group",
                                            "topk_group",
                                            "routed_scaling_factor",
                                            "first_k_dense_replace",
                                            "use_qk_norm",
                                            "num_nextn_predict_layers",
                                            NULL};

const struct perta_family perta_glm4_moe = {
    .model_type = "glm4_moe",
    .architecture = "Glm4MoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(glm4_moe_params),
    .own_keys = glm4_moe_keys,
    .options = PERTA_HAS_SHARED,
    .n_kv_heads = 8,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.partial = 0.5},
    .read = read_glm4_moe,
};

static void read_dots1(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->n_experts = perta_config_experts(r, "n_routed_experts", 0);
    read_shared(r, llm, 0);
    perta_moe_grouped_router(r, llm, 0, false);
    perta_moe_dense_first(r, llm, 0);
    perta_config_only(r, "moe_layer_freq", "1");
    perta_config_only(r, "scoring_func", "\"noaux_tc\""); /* as published */
}

static const char *const dots1_keys[] = {"n_routed_experts",
                                         "num_local_experts",
                                         "num_experts_per_tok",
                                         "n_shared_experts",
                                         "moe_intermediate_size",
                                         "norm_topk_prob",
                                         "n_group",
                                         "topk_group",
                                         "routed_scaling_factor",
                                         "first_k_dense_replace",
                                         "moe_layer_freq",
                                         "scoring_func",
                                         NULL};

const struct perta_family perta_dots1 = {
    .model_type = "dots1",
    .architecture = "Dots1ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(glm4_moe_params),
    .own_keys = dots1_keys,
    .options = PERTA_HAS_SHARED | PERTA_QK_NORM,
    .reads_attention_bias = true,
    .n_kv_heads = 32,
    .max_positions = 2048,
    .windows = PERTA_WINDOWS_UPPER,
    .read = read_dots1,
};

/* ---- ERNIE 4.5 ---- */

static const struct perta_param_row ernie4_5_moe_params[] = {
    ATTENTION,
    DENSE_MLP,
    ROUTER,
    {PERTA_ROUTER_CORRECTION, "mlp.moe_statics.e_score_correction_bias", PERTA_WIDTH_ROW, EXPERTS,
     APART, false},
    {PERTA_ROUTER_CORRECTION, "mlp.gate.moe_statics.e_score_correction_bias", PERTA_WIDTH_ROW,
     EXPERTS, TOGETHER, false},
    EXPERT_MLP,
    SHARED_MLP("mlp.shared_experts"),
    NORMS,
};

/* Which layers have experts: every interval-th of those from start to end. */
static void read_ernie_layers(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *last = json_object_get(r->config, "moe_layer_end_index");
    uint32_t start = perta_config_whole(r, "moe_layer_start_index", 1);
    uint32_t step = perta_config_count(r, "moe_layer_interval", 1);
    uint32_t end = json_is_integer(last) && json_integer_value(last) == -1
                       ? llm->n_layers - 1
                       : perta_config_whole(r, "moe_layer_end_index", llm->n_layers - 1);
    for (uint32_t l = start; l < llm->n_layers && l <= end; l++)
        perta_config_mixture(llm, l, (l + 1) % step == 0);
}

static void read_ernie4_5_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    uint32_t n_shared = perta_config_whole(r, "moe_num_shared_experts", 2);
    perta_moe_no_aux_loss(r);
    llm->n_experts = perta_config_count(r, "moe_num_experts", 64);
    llm->expert_intermediate = perta_config_count(r, "moe_intermediate_size", 1536);
    if ((uint64_t)n_shared * llm->expert_intermediate > INT32_MAX)
        perta_config_refuse(r, "moe_num_shared_experts", "is too large");
    llm->shared_intermediate = r->rc ? 0 : n_shared * llm->expert_intermediate;
    if (n_shared)
        llm->options |= PERTA_HAS_SHARED;
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "moe_k", 6),
        .scoring = PERTA_SCORE_SOFTMAX,
        .renormalise = true,
        .norm_min = perta_config_number(r, r->config, "moe_norm_min", 1e-12),
        .scale = 1,
    };
    if (perta_config_bool(r, "use_bias"))
        llm->options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS | PERTA_MLP_HAS_BIAS;
    else
        llm->options |= PERTA_NO_HEAD_BIAS;
    read_ernie_layers(r, llm);
    perta_config_only(r, "moe_gate", "\"topk\"");
    perta_config_only(r, "moe_use_aux_free", "true");
}

/* Capacity limits training; layers that predict further tokens are in tensors of other names. */
static const char *const ernie4_5_moe_keys[] = {"moe_num_experts",
                                                "moe_k",
                                                "moe_intermediate_size",
                                                "moe_num_shared_experts",
                                                "moe_layer_start_index",
                                                "moe_layer_end_index",
                                                "moe_layer_interval",
                                                "moe_norm_min",
                                                "use_bias",
                                                "moe_gate",
                                                "moe_use_aux_free",
                                                "moe_capacity",
                                                "num_nextn_predict_layers",
                                                NULL};

const struct perta_family perta_ernie4_5_moe = {
    .model_type = "ernie4_5_moe",
    .architecture = "Ernie4_5_MoeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(ernie4_5_moe_params),
    .head_bias = "lm_head.bias",
    .extra = "mtp_",
    .own_keys = ernie4_5_moe_keys,
    .tied = true,
    .pad = 0 + 1,
    .n_kv_heads = 4,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 500000, .interleaved = true},
    .read = read_ernie4_5_moe,
};

/* ---- HunYuan ---- */

static const struct perta_param_row hunyuan_v1_moe_params[] = {
    ATTENTION,
    {PERTA_ROUTER, "mlp.gate.wg.weight", EXPERTS, HIDDEN, MIXTURE, false},
    EXPERT_MLP,
    SHARED_MLP("mlp.shared_mlp"),
    NORMS,
    {PERTA_NORM_Q, "self_attn.query_layernorm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
    {PERTA_NORM_K, "self_attn.key_layernorm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
};

/* A whole number, or a list with one for each layer, which must all be the same. */
static uint32_t read_for_layers(struct perta_config_reader *r, const struct perta_llm *llm,
                                const char *key, uint32_t fallback)
{
    const json_t *list = json_object_get(r->config, key);
    json_int_t n = json_integer_value(json_array_get(list, 0));
    if (!json_is_array(list))
        return perta_config_count(r, key, fallback);
    bool same = n >= 1 && n <= INT32_MAX && json_array_size(list) >= llm->n_layers;
    for (size_t i = 0; same && i < llm->n_layers; i++)
        same = json_is_integer(json_array_get(list, i)) &&
               json_integer_value(json_array_get(list, i)) == n;
    if (!same)
        perta_config_refuse(r, key, "is not the same whole number from 1 for each layer");
    return same ? (uint32_t)n : 1;
}

static void read_hunyuan_v1_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->n_experts = perta_config_experts(r, "num_experts", 1);
    llm->expert_intermediate = llm->shared_intermediate = llm->intermediate;
    llm->qk_norm_after_rope = true;
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = read_for_layers(r, llm, "moe_topk", 1),
        .scoring = PERTA_SCORE_SOFTMAX,
        .renormalise = true,
        .scale = 1,
    };
    perta_moe_everywhere(llm);
    /* what published files say beside, and transformers does not read */
    if (read_for_layers(r, llm, "num_shared_expert", 1) != 1)
        perta_config_refuse(r, "num_shared_expert", "is not 1");
    perta_config_only(r, "use_qk_norm", "true");
    perta_config_only(r, "qk_norm", "true");
    perta_config_only(r, "use_cla", "false"); /* without which cla_share_factor means nothing */
    perta_config_only(r, "use_mla", "false");
    perta_config_only(r, "use_mixed_mlp_moe", "true");
    perta_config_only(r, "norm_topk_prob", "true");
    perta_config_only(r, "norm_type", "\"rms\"");
    perta_config_only(r, "group_limited_greedy", "false");
    perta_config_only(r, "routed_scaling_factor", "1");
    perta_config_only(r, "moe_layer_num_skipped", "0");
    if (perta_config_count(r, "attention_head_dim", llm->head_dim) != llm->head_dim)
        perta_config_refuse(r, "attention_head_dim", "is not \"head_dim\"");
}

/* moe_intermediate_size: experts have "intermediate_size", which the tensors' shapes confirm. */
static const char *const hunyuan_v1_moe_keys[] = {"num_experts",
                                                  "num_local_experts",
                                                  "moe_topk",
                                                  "moe_intermediate_size",
                                                  "num_shared_expert",
                                                  "use_qk_norm",
                                                  "qk_norm",
                                                  "use_cla",
                                                  "cla_share_factor",
                                                  "use_mla",
                                                  "use_mixed_mlp_moe",
                                                  "norm_topk_prob",
                                                  "norm_type",
                                                  "group_limited_greedy",
                                                  "routed_scaling_factor",
                                                  "moe_layer_num_skipped",
                                                  "attention_head_dim",
                                                  NULL};

const struct perta_family perta_hunyuan_v1_moe = {
    .model_type = "hunyuan_v1_moe",
    .architecture = "HunYuanMoEV1ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(hunyuan_v1_moe_params),
    .own_keys = hunyuan_v1_moe_keys,
    .options = PERTA_HAS_SHARED,
    .reads_attention_bias = true,
    .pad = 0 + 1,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .rope = {.alpha = true},
    .read = read_hunyuan_v1_moe,
};
