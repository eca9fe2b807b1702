/* Models with latent attention (mla.c): DeepSeek-V2 and V3 (Kimi-K2 is one), GLM-4.7-Flash,
 * Youtu-LLM, MiniCPM3. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#include <math.h>
#include <string.h>

#define Q_LORA PERTA_WIDTH_Q_LORA
#define KV_LORA PERTA_WIDTH_KV_LORA
#define KV_A PERTA_WIDTH_KV_A
#define ALWAYS PERTA_ALWAYS
#define DENSE PERTA_LAYER_DENSE
#define BIASED_DENSE (PERTA_LAYER_DENSE | PERTA_MLP_HAS_BIAS)
#define MIXTURE PERTA_LAYER_MIXTURE
#define BIASED_MIXTURE (PERTA_LAYER_MIXTURE | PERTA_MLP_HAS_BIAS)
#define APART (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_APART)
#define TOGETHER (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_TOGETHER)
#define LATENT PERTA_Q_LORA
#define BIASED_LATENT (PERTA_Q_LORA | PERTA_QKV_HAS_BIAS)

static const struct perta_param_row params[] = {
    {PERTA_Q, "self_attn.q_proj.weight", QUERIES, HIDDEN, PERTA_Q_PLAIN, false},
    {PERTA_Q_A, "self_attn.q_a_proj.weight", Q_LORA, HIDDEN, LATENT, false},
    {PERTA_Q_A_BIAS, "self_attn.q_a_proj.bias", VECTOR, Q_LORA, BIASED_LATENT, false},
    {PERTA_NORM_Q_A, "self_attn.q_a_layernorm.weight", VECTOR, Q_LORA, LATENT, false},
    {PERTA_Q, "self_attn.q_b_proj.weight", QUERIES, Q_LORA, LATENT, false},
    {PERTA_KV_A, "self_attn.kv_a_proj_with_mqa.weight", KV_A, HIDDEN, ALWAYS, false},
    {PERTA_KV_A_BIAS, "self_attn.kv_a_proj_with_mqa.bias", VECTOR, KV_A, PERTA_QKV_HAS_BIAS, false},
    {PERTA_NORM_KV_A, "self_attn.kv_a_layernorm.weight", VECTOR, KV_LORA, ALWAYS, false},
    {PERTA_KV_B, "self_attn.kv_b_proj.weight", PERTA_WIDTH_KV_B, KV_LORA, ALWAYS, false},
    {PERTA_O, "self_attn.o_proj.weight", HIDDEN, ATTENDED, ALWAYS, false},
    {PERTA_O_BIAS, "self_attn.o_proj.bias", VECTOR, HIDDEN, PERTA_O_HAS_BIAS, false},
    {PERTA_GATE, "mlp.gate_proj.weight", INNER, HIDDEN, DENSE, false},
    {PERTA_GATE_BIAS, "mlp.gate_proj.bias", VECTOR, INNER, BIASED_DENSE, false},
    {PERTA_UP, "mlp.up_proj.weight", INNER, HIDDEN, DENSE, false},
    {PERTA_UP_BIAS, "mlp.up_proj.bias", VECTOR, INNER, BIASED_DENSE, false},
    {PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, DENSE, false},
    {PERTA_DOWN_BIAS, "mlp.down_proj.bias", VECTOR, HIDDEN, BIASED_DENSE, false},
    {PERTA_ROUTER, "mlp.gate.weight", EXPERTS, HIDDEN, MIXTURE, false},
    {PERTA_ROUTER_CORRECTION, "mlp.gate.e_score_correction_bias", VECTOR, EXPERTS,
     MIXTURE | PERTA_HAS_CORRECTION, false},
    {PERTA_EXPERT_GATE, "mlp.experts.%u.gate_proj.weight", EXPERT, HIDDEN, APART, false},
    {PERTA_EXPERT_UP, "mlp.experts.%u.up_proj.weight", EXPERT, HIDDEN, APART, false},
    {PERTA_EXPERT_DOWN, "mlp.experts.%u.down_proj.weight", HIDDEN, EXPERT, APART, false},
    {PERTA_EXPERT_GATE_UP, "mlp.experts.gate_up_proj", PERTA_WIDTH_EXPERT_GATE_UP, HIDDEN, TOGETHER,
     false},
    {PERTA_EXPERT_DOWN, "mlp.experts.down_proj", HIDDEN, EXPERT, TOGETHER, false},
    {PERTA_SHARED_GATE, "mlp.shared_experts.gate_proj.weight", SHARED, HIDDEN, MIXTURE, false},
    {PERTA_SHARED_GATE_BIAS, "mlp.shared_experts.gate_proj.bias", VECTOR, SHARED, BIASED_MIXTURE,
     false},
    {PERTA_SHARED_UP, "mlp.shared_experts.up_proj.weight", SHARED, HIDDEN, MIXTURE, false},
    {PERTA_SHARED_UP_BIAS, "mlp.shared_experts.up_proj.bias", VECTOR, SHARED, BIASED_MIXTURE,
     false},
    {PERTA_SHARED_DOWN, "mlp.shared_experts.down_proj.weight", HIDDEN, SHARED, MIXTURE, false},
    {PERTA_SHARED_DOWN_BIAS, "mlp.shared_experts.down_proj.bias", VECTOR, HIDDEN, BIASED_MIXTURE,
     false},
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, ALWAYS, false},
    {PERTA_NORM_2, "post_attention_layernorm.weight", VECTOR, HIDDEN, ALWAYS, false},
};

#define LATENT_LINE                                                                     \
    .base = "model", .layers = "layers", .embedding = "embed_tokens.weight",            \
    .head = "lm_head.weight", .final_norm = "norm.weight", .norm = &perta_rmsnorm_part, \
    .attention = &perta_latent_attention_part, .params = params,                        \
    .n_params = sizeof params / sizeof *params, .reads_attention_bias = true

/* ---- attention ---- */

/* transformers' defaults. value 0: hidden / heads, also for null. */
struct latent_sizes {
    uint32_t q_lora, kv_lora, nope, rotary, value;
};

/* As perta_config_count, where null is no value that transformers takes. */
static uint32_t read_count(struct perta_config_reader *r, const char *key, uint32_t fallback)
{
    if (json_is_null(json_object_get(r->config, key)))
        perta_config_refuse(r, key, "is null");
    return perta_config_count(r, key, fallback);
}

/* mscale_all_dim scales attention with any kind of positions but the default one; perta_config_rope
 * reads it with yarn. */
static void refuse_mscale(struct perta_config_reader *r)
{
    static const char *const objects[] = {"rope_scaling", "rope_parameters"};
    for (size_t i = 0; i < sizeof objects / sizeof *objects; i++) {
        const json_t *rope = json_object_get(r->config, objects[i]);
        const json_t *value = json_object_get(rope, "rope_type");
        const char *type = json_string_value(value ? value : json_object_get(rope, "type"));
        const json_t *mscale = json_object_get(rope, "mscale_all_dim");
        r->within = objects[i];
        if (type && strcmp(type, "default") && strcmp(type, "yarn") && mscale &&
            !(json_is_number(mscale) && json_number_value(mscale) == 0))
            perta_config_refuse(r, "mscale_all_dim", "is only supported with yarn");
        r->within = NULL;
    }
}

static void read_latent(struct perta_config_reader *r, struct perta_llm *llm,
                        const struct latent_sizes *defaults)
{
    const json_t *q_lora = json_object_get(r->config, "q_lora_rank");
    uint32_t width = llm->hidden / llm->n_heads;
    if (!json_is_null(q_lora))
        llm->q_lora = perta_config_count(r, "q_lora_rank", defaults->q_lora);
    llm->options |= llm->q_lora ? PERTA_Q_LORA : PERTA_Q_PLAIN;
    llm->kv_lora = read_count(r, "kv_lora_rank", defaults->kv_lora);
    llm->rotary_dim = read_count(r, "qk_rope_head_dim", defaults->rotary);
    llm->head_dim = read_count(r, "qk_nope_head_dim", defaults->nope) + llm->rotary_dim;
    llm->value_dim = defaults->value ? read_count(r, "v_head_dim", defaults->value)
                                     : perta_config_count(r, "v_head_dim", width ? width : 1);
    if (llm->n_kv_heads != llm->n_heads)
        perta_config_refuse(r, "num_key_value_heads",
                            "is not \"num_attention_heads\": all heads have keys of their own");
    llm->n_kv_heads = llm->n_heads;
    refuse_mscale(r);
}

/* The number of elements that positions rotate, in transformers, if the key is there. DeepSeek-V2
 * does not read it. */
static void check_head_dim(struct perta_config_reader *r, const struct perta_llm *llm)
{
    const json_t *head_dim = json_object_get(r->config, "head_dim");
    if (head_dim && json_integer_value(head_dim) != (json_int_t)llm->rotary_dim)
        perta_config_refuse(r, "head_dim", "is not \"qk_rope_head_dim\"");
}

#define LATENT_KEYS                                                                      \
    "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", \
        "qk_head_dim"

/* ---- experts ---- */

struct mixture_sizes {
    uint32_t experts, k, intermediate, shared;
    double scale;
};

static void read_mixture(struct perta_config_reader *r, struct perta_llm *llm,
                         const struct mixture_sizes *defaults)
{
    uint32_t n_shared = read_count(r, "n_shared_experts", defaults->shared);
    llm->expert_intermediate = read_count(r, "moe_intermediate_size", defaults->intermediate);
    if ((uint64_t)n_shared * llm->expert_intermediate > INT32_MAX)
        perta_config_refuse(r, "n_shared_experts", "is too large");
    else
        llm->shared_intermediate = n_shared * llm->expert_intermediate;
    llm->options |= PERTA_HAS_SHARED;
    llm->router.n_experts = llm->n_experts;
    llm->router.k = read_count(r, "num_experts_per_tok", defaults->k);
    llm->router.scale = perta_config_number(r, r->config, "routed_scaling_factor", defaults->scale);
    perta_config_only(r, "moe_layer_freq", "1");
}

/* Layers from first_k_dense_replace on are mixtures. */
static void read_first_mixture(struct perta_config_reader *r, struct perta_llm *llm,
                               uint32_t fallback)
{
    const char *const key = "first_k_dense_replace";
    uint32_t first = perta_config_whole(r, key, fallback);
    if (json_is_null(json_object_get(r->config, key)))
        perta_config_refuse(r, key, "is null");
    for (uint32_t l = 0; l < llm->n_layers; l++)
        perta_config_mixture(llm, l, l >= first);
}

#define MIXTURE_KEYS                                                                            \
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",     \
        "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group", "topk_method",      \
        "first_k_dense_replace", "moe_layer_freq", "scoring_func", "aux_loss_alpha", "seq_aux", \
        "ep_size", "num_nextn_predict_layers"

/* ---- DeepSeek-V2 ---- */

static void read_v2_groups(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *method = json_object_get(r->config, "topk_method");
    const char *name = method ? json_string_value(method) : "greedy";
    if (name && !strcmp(name, "group_limited_greedy")) {
        llm->router.grouping = PERTA_GROUP_MAX;
        llm->router.n_groups = read_count(r, "n_group", 0);
        llm->router.k_groups = read_count(r, "topk_group", 0);
    } else if (!name || strcmp(name, "greedy")) {
        perta_config_refuse(r, "topk_method", "is neither greedy nor group_limited_greedy");
    }
}

/* norm_topk_prob is in the files and not read by transformers. */
static void read_deepseek_v2(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_latent(r, llm, &(struct latent_sizes){1536, 512, 128, 64, 128});
    llm->n_experts = read_count(r, "n_routed_experts", 64);
    llm->router =
        (struct perta_router){.scoring = PERTA_SCORE_SOFTMAX, .masked = PERTA_MASKED_SCORE};
    read_mixture(r, llm, &(struct mixture_sizes){64, 0, 1407, 2, 1.0});
    read_v2_groups(r, llm);
    perta_config_only(r, "scoring_func", "\"softmax\"");
    read_first_mixture(r, llm, 0);
}

static const char *const deepseek_keys[] = {LATENT_KEYS, MIXTURE_KEYS, NULL};

const struct perta_family perta_deepseek_v2 = {
    .model_type = "deepseek_v2",
    .architecture = "DeepseekV2ForCausalLM",
    LATENT_LINE,
    .own_keys = deepseek_keys,
    .reads_mlp_bias = true,
    .max_positions = 2048,
    .rope = {.interleaved = true},
    .read = read_deepseek_v2,
};

/* ---- DeepSeek-V3 ---- */

static void read_v3_mixture(struct perta_config_reader *r, struct perta_llm *llm,
                            const struct mixture_sizes *defaults, uint32_t n_groups,
                            uint32_t k_groups)
{
    llm->n_experts = perta_config_experts(r, "n_routed_experts", defaults->experts);
    llm->router = (struct perta_router){
        .scoring = PERTA_SCORE_SIGMOID,
        .grouping = PERTA_GROUP_TOP2,
        .masked = PERTA_MASKED_OUT,
        .n_groups = read_count(r, "n_group", n_groups),
        .k_groups = read_count(r, "topk_group", k_groups),
        .renormalise = perta_config_flag(r, "norm_topk_prob", true),
        .norm_eps = 1e-20,
    };
    llm->options |= PERTA_HAS_CORRECTION;
    llm->n_extra_layers = perta_config_whole(r, "num_nextn_predict_layers",
                                             perta_config_whole(r, "num_mtp_layers", 1));
    read_mixture(r, llm, defaults);
    perta_config_only(r, "scoring_func", "\"sigmoid\"");
    perta_config_only(r, "topk_method", "\"noaux_tc\"");
}

static void read_deepseek_v3(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_latent(r, llm, &(struct latent_sizes){1536, 512, 128, 64, 128});
    check_head_dim(r, llm);
    read_v3_mixture(r, llm, &(struct mixture_sizes){256, 8, 2048, 1, 2.5}, 8, 4);
    read_first_mixture(r, llm, 3);
}

static const char *const deepseek_v3_keys[] = {LATENT_KEYS, MIXTURE_KEYS, "num_local_experts",
                                               "num_mtp_layers", NULL};

const struct perta_family perta_deepseek_v3 = {
    .model_type = "deepseek_v3",
    .architecture = "DeepseekV3ForCausalLM",
    .other_type = "kimi_k2",
    LATENT_LINE,
    .own_keys = deepseek_v3_keys,
    .n_kv_heads = 128,
    .max_positions = 4096,
    .rope = {.interleaved = true, .interleave_key = "rope_interleave"},
    .read = read_deepseek_v3,
};

/* ---- GLM-4.7-Flash ---- */

/* The kind of each layer; if it is not said, all but the first are mixtures, whatever
 * first_k_dense_replace says. */
static void read_mlp_types(struct perta_config_reader *r, struct perta_llm *llm)
{
    const char *const key = "mlp_layer_types";
    const json_t *types = json_object_get(r->config, key);
    if (!perta_config_has(r->config, key)) {
        perta_config_only(r, "first_k_dense_replace", "1");
        for (uint32_t l = 0; l < llm->n_layers; l++)
            perta_config_mixture(llm, l, l >= 1);
        return;
    }
    if (!json_is_array(types) || json_array_size(types) != llm->n_layers)
        perta_config_refuse(r, key, "is not a list of a kind for each layer");
    for (uint32_t l = 0; l < llm->n_layers && !r->rc; l++) {
        const char *type = json_string_value(json_array_get(types, l));
        if (!type || (strcmp(type, "dense") && strcmp(type, "sparse")))
            perta_config_refuse(r, key, "has an entry that is neither dense nor sparse");
        else
            perta_config_mixture(llm, l, !strcmp(type, "sparse"));
    }
}

static void read_glm4_moe_lite(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_latent(r, llm, &(struct latent_sizes){768, 512, 192, 64, 256});
    check_head_dim(r, llm);
    read_v3_mixture(r, llm, &(struct mixture_sizes){64, 4, 1536, 1, 1.8}, 1, 1);
    read_mlp_types(r, llm);
}

static const char *const glm4_moe_lite_keys[] = {LATENT_KEYS, MIXTURE_KEYS, "num_local_experts",
                                                 "mlp_layer_types", NULL};

const struct perta_family perta_glm4_moe_lite = {
    .model_type = "glm4_moe_lite",
    .architecture = "Glm4MoeLiteForCausalLM",
    LATENT_LINE,
    .own_keys = glm4_moe_lite_keys,
    .n_kv_heads = 20,
    .max_positions = 202752,
    .norm_eps = 1e-5,
    .rope = {.interleaved = true, .interleave_key = "rope_interleave"},
    .read = read_glm4_moe_lite,
};

/* ---- Youtu-LLM ---- */

static void read_youtu(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_latent(r, llm, &(struct latent_sizes){1536, 512, 128, 64, 128});
    check_head_dim(r, llm);
}

static const char *const youtu_keys[] = {LATENT_KEYS, "embedding_initializer_range", NULL};

const struct perta_family perta_youtu = {
    .model_type = "youtu",
    .architecture = "YoutuForCausalLM",
    LATENT_LINE,
    .own_keys = youtu_keys,
    .tied = true,
    .n_kv_heads = 16,
    .max_positions = 131072,
    .rope = {.interleaved = true, .interleave_key = "rope_interleave"},
    .read = read_youtu,
};

/* ---- MiniCPM3 ---- */

/* A number above 0; fallback if the key is missing, neutral if it is null. */
static double number_or(struct perta_config_reader *r, const char *key, double fallback,
                        double neutral)
{
    return json_is_null(json_object_get(r->config, key))
               ? neutral
               : perta_config_number(r, r->config, key, fallback);
}

/* What attention and MLP add is scaled by depth, logits by the width of the model from which the
 * options come. */
static void read_minicpm3(struct perta_config_reader *r, struct perta_llm *llm)
{
    double depth = sqrt((double)llm->n_layers), hidden = llm->hidden;
    read_latent(r, llm, &(struct latent_sizes){768, 256, 64, 32, 0});
    llm->embedding_multiplier = (float)perta_config_number(r, r->config, "scale_emb", 12);
    llm->residual_multiplier = (float)(number_or(r, "scale_depth", 1.4, depth) / depth);
    llm->logit_multiplier = (float)(number_or(r, "dim_model_base", 256, hidden) / hidden);
}

static const char *const minicpm3_keys[] = {LATENT_KEYS, "scale_emb", "scale_depth",
                                            "dim_model_base", NULL};

const struct perta_family perta_minicpm3 = {
    .model_type = "minicpm3",
    .architecture = "MiniCPM3ForCausalLM",
    LATENT_LINE,
    .own_keys = minicpm3_keys,
    .reads_mlp_bias = true,
    .tied = true,
    .n_kv_heads = 40,
    .max_positions = 32768,
    .norm_eps = 1e-5,
    .read = read_minicpm3,
};
