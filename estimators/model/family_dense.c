/* Dense families whose blocks are Llama's but for what a layer, queries, norms or the MLP have:
 * windows and rotary positions in some layers, scaled queries, norms after rotation, no gate. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#define NORMS_AFTER PERTA_OWN_1

/* ---- windows ---- */

const struct perta_family perta_ministral = {
    .model_type = "ministral",
    .architecture = "MinistralForCausalLM",
    PERTA_LLAMA_LINE,
    .n_kv_heads = 8,
    .max_positions = 131072,
    .windows = PERTA_WINDOWS_EVERYWHERE,
};

/* "layer_types" is not read: with a window, all layers have it. */
const struct perta_family perta_ministral3 = {
    .model_type = "ministral3",
    .architecture = "Ministral3ForCausalLM",
    PERTA_LLAMA_LINE,
    .pad = 11 + 1,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 262144,
    .norm_eps = 1e-5,
    .rope = {.parameters = "{\"type\": \"yarn\", \"rope_theta\": 1e6, \"factor\": 16.0,"
                           " \"original_max_position_embeddings\": 16384, \"beta_fast\": 32.0,"
                           " \"beta_slow\": 1.0, \"mscale_all_dim\": 1.0, \"mscale\": 1.0,"
                           " \"llama_4_scaling_beta\": 0.1}",
             .query_scale = true},
    .windows = PERTA_WINDOWS_ASKED,
};

/* Without "layer_types": in every layer but each fourth one, from the first one on. */
static void read_cwm(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *size = json_object_get(r->config, "sliding_window");
    if (json_is_null(size))
        perta_config_refuse(r, "sliding_window", "is null, which is not a number; leave it out");
    llm->window = perta_config_count(r, "sliding_window", 8192);
    if (perta_config_has(r->config, "layer_types")) {
        perta_config_layer_types(r, llm);
        return;
    }
    for (uint32_t l = 0; l < llm->n_layers; l++)
        llm->layers[l] |= l % 4 ? PERTA_LAYER_WINDOW : 0;
}

const struct perta_family perta_cwm = {
    .model_type = "cwm",
    .architecture = "CwmForCausalLM",
    PERTA_LLAMA_LINE,
    .reads_mlp_bias = true,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 1e6,
             .parameters = "{\"rope_type\": \"llama3\", \"rope_theta\": 1e6, \"factor\": 16.0,"
                           " \"high_freq_factor\": 4.0, \"low_freq_factor\": 1.0,"
                           " \"original_max_position_embeddings\": 8192}"},
    .windows = PERTA_WINDOWS_OWN,
    .read = read_cwm,
};

/* ---- layers without rotary positions ---- */

/* no_rope_layers says with 1 which layers have them; without it, each interval-th has none. */
static void read_rotated(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *rotated = json_object_get(r->config, "no_rope_layers");
    uint32_t interval = perta_config_count(r, "no_rope_layer_interval", 4);
    bool listed = perta_config_has(r->config, "no_rope_layers");
    if (listed && (!json_is_array(rotated) || json_array_size(rotated) < llm->n_layers))
        perta_config_refuse(r, "no_rope_layers", "is not a list with a number for each layer");
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        const json_t *item = json_array_get(rotated, l);
        if (listed && !json_is_integer(item))
            perta_config_refuse(r, "no_rope_layers", "is not a list with a number for each layer");
        if (listed ? !json_integer_value(item) : !((l + 1) % interval))
            llm->layers[l] |= PERTA_LAYER_UNROTATED;
    }
}

/* Windows, if use_sliding_window says so: in layers that layer_types says, otherwise in those
 * without rotary positions. */
static void read_smollm3(struct perta_config_reader *r, struct perta_llm *llm)
{
    bool windows = perta_config_bool(r, "use_sliding_window");
    read_rotated(r, llm);
    if (windows && perta_config_has(r->config, "sliding_window"))
        llm->window = perta_config_count(r, "sliding_window", 0);
    if (perta_config_has(r->config, "layer_types")) {
        perta_config_layer_types(r, llm);
        return;
    }
    for (uint32_t l = 0; l < llm->n_layers; l++)
        if (llm->window && perta_llm_has(llm, l, PERTA_LAYER_UNROTATED))
            llm->layers[l] |= PERTA_LAYER_WINDOW;
}

static const char *const smollm3_keys[] = {"no_rope_layers", "no_rope_layer_interval", NULL};

const struct perta_family perta_smollm3 = {
    .model_type = "smollm3",
    .architecture = "SmolLM3ForCausalLM",
    PERTA_LLAMA_LINE,
    .own_keys = smollm3_keys,
    .reads_attention_bias = true,
    .reads_mlp_bias = true,
    .tied = true,
    .pad = 128004 + 1,
    .n_kv_heads = 4,
    .max_positions = 32768,
    .rope = {.theta = 2e6},
    .windows = PERTA_WINDOWS_OWN,
    .read = read_smollm3,
};

/* ---- Llama's class, other defaults ---- */

/* true or false, at one of two keys that mean the same. */
static bool read_either(struct perta_config_reader *r, const char *key, const char *other)
{
    bool is = perta_config_flag(r, key, perta_config_bool(r, other));
    if (json_object_get(r->config, other) && perta_config_bool(r, other) != is)
        perta_config_refuse(r, key, "contradicts another key for the same");
    return is;
}

/* transformers has biases in attention and the MLP, or in neither. */
static void read_internlm3(struct perta_config_reader *r, struct perta_llm *llm)
{
    bool attention = read_either(r, "qkv_bias", "attention_bias");
    if (read_either(r, "bias", "mlp_bias") != attention)
        perta_config_refuse(r, "qkv_bias", "is not \"bias\", which is not supported");
    if (attention)
        llm->options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS | PERTA_MLP_HAS_BIAS;
}

static const char *const internlm3_keys[] = {"qkv_bias", "bias", NULL};

const struct perta_family perta_internlm3 = {
    .model_type = "internlm3",
    .architecture = "InternLM3ForCausalLM",
    .saved_as = "LlamaForCausalLM",
    PERTA_LLAMA_LINE,
    .own_keys = internlm3_keys,
    .pad = 2 + 1,
    .n_kv_heads = 2,
    .head_dim = 128,
    .max_positions = 32768,
    .norm_eps = 1e-5,
    .read = read_internlm3,
};

static void read_iquestcoder(struct perta_config_reader *r, struct perta_llm *llm)
{
    (void)llm;
    perta_config_only(r, "use_sliding_window", "false");
}

const struct perta_family perta_iquestcoder = {
    .model_type = "iquestcoder",
    .architecture = "IQuestCoderForCausalLM",
    .saved_as = "LlamaForCausalLM",
    PERTA_LLAMA_LINE,
    .reads_attention_bias = true,
    .reads_mlp_bias = true,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .read = read_iquestcoder,
};

/* ---- biases ---- */

static void read_seed_oss(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_flag(r, "attention_bias", true))
        llm->options |= PERTA_QKV_HAS_BIAS;
    if (perta_config_bool(r, "attention_out_bias"))
        llm->options |= PERTA_O_HAS_BIAS;
}

static const char *const seed_oss_keys[] = {"attention_out_bias", NULL};

const struct perta_family perta_seed_oss = {
    .model_type = "seed_oss",
    .architecture = "SeedOssForCausalLM",
    PERTA_LLAMA_LINE,
    .own_keys = seed_oss_keys,
    .reads_mlp_bias = true,
    .pad = 1 + 1,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 524288,
    .read = read_seed_oss,
};

static void read_ernie4_5(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_bool(r, "use_bias"))
        llm->options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS | PERTA_MLP_HAS_BIAS;
}

static const char *const ernie4_5_keys[] = {"use_bias", NULL};

const struct perta_family perta_ernie4_5 = {
    .model_type = "ernie4_5",
    .architecture = "Ernie4_5ForCausalLM",
    PERTA_LLAMA_LINE,
    .own_keys = ernie4_5_keys,
    .tied = true,
    .pad = 0 + 1,
    .n_kv_heads = 2,
    .head_dim = 128,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 5e5, .interleaved = true},
    .read = read_ernie4_5,
};

/* The output of attention has no bias. */
static void read_helium(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_bool(r, "attention_bias"))
        llm->options |= PERTA_QKV_HAS_BIAS;
}

const struct perta_family perta_helium = {
    .model_type = "helium",
    .architecture = "HeliumForCausalLM",
    PERTA_LLAMA_LINE,
    .reads_mlp_bias = true,
    .pad = 3 + 1,
    .n_kv_heads = 20,
    .head_dim = 128,
    .max_positions = 4096,
    .norm_eps = 1e-8,
    .rope = {.theta = 1e5, .interleaved = true},
    .read = read_helium,
};

/* ---- other norms, another MLP ---- */

static const struct perta_param_row hunyuan_params[] = {
    ATTENTION,
    GATED(PERTA_ALWAYS),
    NORMS,
    {PERTA_NORM_Q, "self_attn.query_layernorm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
    {PERTA_NORM_K, "self_attn.key_layernorm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
};

static void read_hunyuan(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->qk_norm_after_rope = true;
    /* what published files say beside, and transformers does not read */
    perta_config_only(r, "use_qk_norm", "true");
    perta_config_only(r, "qk_norm", "true");
    perta_config_only(r, "use_cla", "false"); /* without which cla_share_factor means nothing */
    perta_config_only(r, "norm_type", "\"rms\"");
    if (perta_config_count(r, "attention_head_dim", llm->head_dim) != llm->head_dim)
        perta_config_refuse(r, "attention_head_dim", "is not \"head_dim\"");
}

static const char *const hunyuan_keys[] = {
    "use_qk_norm",        "qk_norm", "use_cla", "cla_share_factor", "norm_type",
    "attention_head_dim", NULL};

const struct perta_family perta_hunyuan_v1_dense = {
    .model_type = "hunyuan_v1_dense",
    .architecture = "HunYuanDenseV1ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(hunyuan_params),
    .own_keys = hunyuan_keys,
    .reads_attention_bias = true,
    .pad = 0 + 1,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .rope = {.alpha = true},
    .read = read_hunyuan,
};

static const struct perta_param_row arcee_params[] = {
    ATTENTION,
    UNGATED(PERTA_ALWAYS),
    NORMS,
};

const struct perta_family perta_arcee = {
    .model_type = "arcee",
    .architecture = "ArceeForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(arcee_params),
    .reads_attention_bias = true,
    .reads_mlp_bias = true,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .act = "relu2",
};

/* LayerNorms. */
static const struct perta_param_row jais2_params[] = {
    ATTENTION,
    UNGATED(PERTA_ALWAYS),
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_1_BIAS, "input_layernorm.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_2, "post_attention_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_NORM_2_BIAS, "post_attention_layernorm.bias", VECTOR, HIDDEN, PERTA_ALWAYS, false},
};

static void read_jais2(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_flag(r, "attention_bias", true))
        llm->options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS;
    if (perta_config_flag(r, "mlp_bias", true))
        llm->options |= PERTA_MLP_HAS_BIAS;
}

static const char *const jais2_keys[] = {"layer_norm_eps", NULL};

const struct perta_family perta_jais2 = {
    .model_type = "jais2",
    .architecture = "Jais2ForCausalLM",
    .base = "model",
    .layers = "layers",
    PARAMS(jais2_params),
    .embedding = "embed_tokens.weight",
    .head = "lm_head.weight",
    .final_norm = "norm.weight",
    .final_norm_bias = "norm.bias",
    .norm = &perta_layernorm_part,
    .attention = &perta_attention_part,
    .keys = {.norm_eps = "layer_norm_eps"},
    .own_keys = jais2_keys,
    .max_positions = 8192,
    .norm_eps = 1e-5,
    .act = "relu2",
    .read = read_jais2,
};

/* Multipliers as Granite has them, but logits are multiplied, and norms after each part. */
static const struct perta_param_row hyperclovax_params[] = {
    ATTENTION,
    GATED(PERTA_ALWAYS),
    NORMS,
    {PERTA_NORM_1_AFTER, "post_norm1.weight", VECTOR, HIDDEN, NORMS_AFTER, false},
    {PERTA_NORM_2_AFTER, "post_norm2.weight", VECTOR, HIDDEN, NORMS_AFTER, false},
};

static void read_hyperclovax(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->embedding_multiplier = (float)perta_config_number(r, r->config, "embedding_multiplier", 1);
    llm->residual_multiplier = (float)perta_config_number(r, r->config, "residual_multiplier", 1);
    llm->logit_multiplier = (float)perta_config_number(r, r->config, "logits_scaling", 1);
    if (perta_config_has(r->config, "attention_multiplier"))
        llm->attention_scale = (float)perta_config_number(r, r->config, "attention_multiplier", 1);
    if (perta_config_flag(r, "use_post_norm", true))
        llm->options |= NORMS_AFTER;
}

static const char *const hyperclovax_keys[] = {"attention_multiplier", "embedding_multiplier",
                                               "logits_scaling",       "residual_multiplier",
                                               "use_post_norm",        NULL};

const struct perta_family perta_hyperclovax = {
    .model_type = "hyperclovax",
    .architecture = "HyperCLOVAXForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(hyperclovax_params),
    .own_keys = hyperclovax_keys,
    .reads_attention_bias = true,
    .reads_mlp_bias = true,
    .max_positions = 2048,
    .read = read_hyperclovax,
};
