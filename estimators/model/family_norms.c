/* Families whose norms are elsewhere than Llama's, or of another kind, and those that multiply or
 * cap what Llama does not: Gemma, OLMo, EXAONE 4, Granite. */
#include <math.h>
#include <string.h>

#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

/* Attention and MLP, as in Llama. */
#define LINEARS ATTENTION, GATED(PERTA_ALWAYS)
/* A vector that every layer has. */
#define NORM(param, name, width) {param, name, VECTOR, width, PERTA_ALWAYS, false}
#define QK_NORMS(q, k)                                \
    NORM(PERTA_NORM_Q, "self_attn.q_norm.weight", q), \
        NORM(PERTA_NORM_K, "self_attn.k_norm.weight", k)

static const struct perta_param_row gemma_params[] = {
    LINEARS,
    NORM(PERTA_NORM_1, "input_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2, "post_attention_layernorm.weight", HIDDEN),
};

static const struct perta_param_row gemma2_params[] = {
    LINEARS,
    NORM(PERTA_NORM_1, "input_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_1_AFTER, "post_attention_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2, "pre_feedforward_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2_AFTER, "post_feedforward_layernorm.weight", HIDDEN),
};

static const struct perta_param_row gemma3_params[] = {
    LINEARS,
    QK_NORMS(HEAD, HEAD),
    NORM(PERTA_NORM_1, "input_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_1_AFTER, "post_attention_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2, "pre_feedforward_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2_AFTER, "post_feedforward_layernorm.weight", HIDDEN),
};

static const struct perta_param_row vaultgemma_params[] = {
    LINEARS,
    NORM(PERTA_NORM_1, "input_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2, "pre_feedforward_layernorm.weight", HIDDEN),
};

static const struct perta_param_row olmo_params[] = {LINEARS};

static const struct perta_param_row olmo2_params[] = {
    LINEARS,
    NORM(PERTA_NORM_1_AFTER, "post_attention_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2_AFTER, "post_feedforward_layernorm.weight", HIDDEN),
    QK_NORMS(QUERIES, KEYS),
};

static const struct perta_param_row exaone4_params[] = {
    LINEARS,
    QK_NORMS(HEAD, HEAD),
    NORM(PERTA_NORM_1_AFTER, "post_attention_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2_AFTER, "post_feedforward_layernorm.weight", HIDDEN),
};

/* Granite with a sink in each head. */
static const struct perta_param_row granite_swa_params[] = {
    LINEARS,
    NORM(PERTA_NORM_1, "input_layernorm.weight", HIDDEN),
    NORM(PERTA_NORM_2, "post_attention_layernorm.weight", HIDDEN),
    NORM(PERTA_SINKS, "self_attn.sinks", PERTA_WIDTH_HEADS),
};

/* ---- Gemma ---- */

static const char tanh_gelu[] = "gelu_pytorch_tanh";

/* Refuse an activation under a key that transformers does not look at, unless it is one that the
 * model has anyway. */
static void check_activation(struct perta_config_reader *r, const struct perta_llm *llm,
                             const char *key)
{
    struct perta_activation other;
    const json_t *value = json_object_get(r->config, key);
    if (!perta_config_has(r->config, key))
        return;
    if (!perta_activation_named(json_string_value(value), &other) ||
        other.kind != llm->activation.kind)
        perta_config_refuse(r, key, "is another activation than that of the key that counts");
}

/* What all have. In float32 as transformers has it: for weights in bfloat16, it rounds the
 * embedding's multiplier to that. */
static void read_any_gemma(struct perta_llm *llm)
{
    llm->norm_plus = 1;
    llm->embedding_multiplier = (float)sqrt((double)llm->hidden);
}

/* "gelu" is the older name of its approximation here. hidden_activation is no longer looked at. */
static void read_gemma(struct perta_config_reader *r, struct perta_llm *llm)
{
    const char *other = json_string_value(json_object_get(r->config, "hidden_activation"));
    read_any_gemma(llm);
    if (llm->activation.kind == PERTA_GELU)
        llm->activation.kind = PERTA_GELU_TANH;
    if (!other || strcmp(other, "gelu"))
        check_activation(r, llm, "hidden_activation");
}

static void read_gemma2(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_any_gemma(llm);
    llm->attention_scale = (float)(1 / sqrt(perta_config_count(r, "query_pre_attn_scalar", 256)));
    llm->attention_softcap = perta_config_optional(r, "attn_logit_softcapping", 50);
    llm->logit_softcap = perta_config_optional(r, "final_logit_softcapping", 30);
    check_activation(r, llm, "hidden_act");
    perta_config_windows(r, llm, 2);
}

/* transformers passes over attn_logit_softcapping when it computes. */
static void read_gemma3(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_any_gemma(llm);
    llm->attention_scale = (float)(1 / sqrt(perta_config_count(r, "query_pre_attn_scalar", 256)));
    if (perta_config_has(r->config, "attn_logit_softcapping"))
        perta_config_refuse(r, "attn_logit_softcapping",
                            "is not null; this architecture has no such cap");
    llm->logit_softcap = perta_config_optional(r, "final_logit_softcapping", 0);
    check_activation(r, llm, "hidden_act");
    perta_config_windows(r, llm, perta_config_count(r, "sliding_window_pattern", 6));
}

static const char *const gemma_keys[] = {"hidden_activation", NULL};
static const char *const gemma2_keys[] = {"attn_logit_softcapping",
                                          "final_logit_softcapping",
                                          "hidden_activation",
                                          "query_pre_attn_scalar",
                                          "sliding_window_pattern",
                                          "_sliding_window_pattern",
                                          NULL};

/* 256: the default of transformers in all of them. */
#define GEMMA                                                                                 \
    PERTA_LLAMA_NAMES, .tied = true, .pad = 1, .head_dim = 256, .reads_attention_bias = true, \
        .act = tanh_gelu

const struct perta_family perta_gemma = {.model_type = "gemma",
                                         .architecture = "GemmaForCausalLM",
                                         GEMMA,
                                         PARAMS(gemma_params),
                                         .own_keys = gemma_keys,
                                         .n_kv_heads = 16,
                                         .max_positions = 8192,
                                         .read = read_gemma};
const struct perta_family perta_gemma2 = {.model_type = "gemma2",
                                          .architecture = "Gemma2ForCausalLM",
                                          GEMMA,
                                          PARAMS(gemma2_params),
                                          .keys.act = "hidden_activation",
                                          .own_keys = gemma2_keys,
                                          .n_kv_heads = 4,
                                          .max_positions = 8192,
                                          .windows = PERTA_WINDOWS_OWN,
                                          .read = read_gemma2};
const struct perta_family perta_gemma3 = {.model_type = "gemma3_text",
                                          .architecture = "Gemma3ForCausalLM",
                                          GEMMA,
                                          PARAMS(gemma3_params),
                                          .keys.act = "hidden_activation",
                                          .own_keys = gemma2_keys,
                                          .n_kv_heads = 4,
                                          .max_positions = 131072,
                                          .rope = {.by_layer_type = true,
                                                   .theta = 1e6,
                                                   .local_theta = 1e4,
                                                   .local_theta_key = "rope_local_base_freq"},
                                          .windows = PERTA_WINDOWS_OWN,
                                          .read = read_gemma3};
const struct perta_family perta_vaultgemma = {.model_type = "vaultgemma",
                                              .architecture = "VaultGemmaForCausalLM",
                                              GEMMA,
                                              PARAMS(vaultgemma_params),
                                              .keys.act = "hidden_activation",
                                              .own_keys = gemma2_keys,
                                              .n_kv_heads = 4,
                                              .max_positions = 8192,
                                              .windows = PERTA_WINDOWS_OWN,
                                              .read = read_gemma2};

/* ---- OLMo, EXAONE 4: norms without weights, or after ---- */

static void read_olmo(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_has(r->config, "rms_norm_eps") && llm->norm_eps != 1e-5f)
        perta_config_refuse(r, "rms_norm_eps", "is not 1e-5, which this architecture always has");
    llm->norm_eps = 1e-5f;
    llm->clip_qkv = perta_config_optional(r, "clip_qkv", 0);
}

static void read_olmo3(struct perta_config_reader *r, struct perta_llm *llm)
{
    perta_config_windows(r, llm, 4);
}

/* Beside layers with a window, those without it have no positions. */
static void read_exaone4(struct perta_config_reader *r, struct perta_llm *llm)
{
    bool listed = perta_config_has(r->config, "layer_types");
    perta_config_windows(r, llm, listed ? 1 : perta_config_count(r, "sliding_window_pattern", 4));
    for (uint32_t l = 0; llm->window && l < llm->n_layers; l++)
        if (!(llm->layers[l] & PERTA_LAYER_WINDOW))
            llm->layers[l] |= PERTA_LAYER_UNROTATED;
}

static const char *const olmo_keys[] = {"clip_qkv", NULL};
static const char *const exaone4_keys[] = {"sliding_window_pattern", NULL};

const struct perta_family perta_olmo = {.model_type = "olmo",
                                        .architecture = "OlmoForCausalLM",
                                        .base = "model",
                                        .layers = "layers",
                                        .embedding = "embed_tokens.weight",
                                        .head = "lm_head.weight",
                                        .norm = &perta_layernorm_part,
                                        .bare_norms = true,
                                        .attention = &perta_attention_part,
                                        PARAMS(olmo_params),
                                        .own_keys = olmo_keys,
                                        .reads_attention_bias = true,
                                        .pad = 2,
                                        .max_positions = 2048,
                                        .read = read_olmo};
const struct perta_family perta_olmo2 = {.model_type = "olmo2",
                                         .architecture = "Olmo2ForCausalLM",
                                         PERTA_LLAMA_NAMES,
                                         PARAMS(olmo2_params),
                                         .reads_attention_bias = true,
                                         .pad = 2,
                                         .max_positions = 2048,
                                         .norm_eps = 1e-5};
const struct perta_family perta_olmo3 = {
    .model_type = "olmo3",
    .architecture = "Olmo3ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(olmo2_params),
    .reads_attention_bias = true,
    .pad = 2,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .rope = {.by_layer_type = true, .theta = 5e5, .local_theta = 5e5},
    .windows = PERTA_WINDOWS_OWN,
    .read = read_olmo3};
const struct perta_family perta_exaone4 = {.model_type = "exaone4",
                                           .architecture = "Exaone4ForCausalLM",
                                           PERTA_LLAMA_NAMES,
                                           PARAMS(exaone4_params),
                                           .own_keys = exaone4_keys,
                                           .n_kv_heads = 32,
                                           .max_positions = 2048,
                                           .norm_eps = 1e-5,
                                           .windows = PERTA_WINDOWS_OWN,
                                           .read = read_exaone4};

/* ---- Granite ---- */

void perta_config_granite(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->embedding_multiplier = (float)perta_config_number(r, r->config, "embedding_multiplier", 1);
    llm->residual_multiplier = (float)perta_config_number(r, r->config, "residual_multiplier", 1);
    llm->attention_scale = (float)perta_config_number(r, r->config, "attention_multiplier", 1);
    llm->logit_multiplier = (float)(1 / perta_config_number(r, r->config, "logits_scaling", 1));
}

static const char *const granite_keys[] = {"attention_multiplier", "embedding_multiplier",
                                           "logits_scaling", "residual_multiplier", NULL};

const struct perta_family perta_granite = {.model_type = "granite",
                                           .architecture = "GraniteForCausalLM",
                                           PERTA_LLAMA_LINE,
                                           .own_keys = granite_keys,
                                           .reads_attention_bias = true,
                                           .reads_mlp_bias = true,
                                           .max_positions = 2048,
                                           .read = perta_config_granite};

/* The theta of rotary positions, where layers have none of their own. */
static double theta_of(const struct perta_config_reader *r)
{
    const json_t *rope = json_object_get(r->config, "rope_scaling");
    if (!json_object_size(rope))
        rope = json_object_get(r->config, "rope_parameters");
    const json_t *theta = json_object_get(rope, "rope_theta");
    if (!theta)
        theta = json_object_get(r->config, "rope_theta");
    return theta ? json_number_value(theta) : 10000;
}

/* layer_rope_theta: 0 for a layer without positions. */
static void read_thetas(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *list = json_object_get(r->config, "layer_rope_theta");
    double theta = theta_of(r);
    if (!perta_config_has(r->config, "layer_rope_theta"))
        return;
    if (json_array_size(list) != llm->n_layers)
        perta_config_refuse(r, "layer_rope_theta", "is not a list of a number for each layer");
    for (uint32_t l = 0; l < llm->n_layers && !r->rc; l++) {
        const json_t *own = json_array_get(list, l);
        if (json_is_number(own) && json_number_value(own) == 0)
            llm->layers[l] |= PERTA_LAYER_UNROTATED;
        else if (!json_is_number(own) || json_number_value(own) != theta)
            perta_config_refuse(r, "layer_rope_theta",
                                "has another number than 0 and \"rope_theta\", which is not "
                                "supported");
    }
}

static void read_granite_swa(struct perta_config_reader *r, struct perta_llm *llm)
{
    perta_config_granite(r, llm);
    llm->window = perta_config_count(r, "sliding_window", 128);
    if (json_is_null(json_object_get(r->config, "sliding_window")))
        perta_config_refuse(r, "sliding_window", "is null");
    if (perta_config_has(r->config, "layer_types"))
        perta_config_layer_types(r, llm);
    for (uint32_t l = 0; !perta_config_has(r->config, "layer_types") && l < llm->n_layers; l++)
        llm->layers[l] |= l % 4 ? PERTA_LAYER_WINDOW : 0;
    read_thetas(r, llm);
}

static const char *const granite_swa_keys[] = {"attention_multiplier", "embedding_multiplier",
                                               "logits_scaling",       "residual_multiplier",
                                               "layer_rope_theta",     NULL};

const struct perta_family perta_granite_swa = {.model_type = "granite_swa",
                                               .architecture = "GraniteSWAForCausalLM",
                                               PERTA_LLAMA_NAMES,
                                               PARAMS(granite_swa_params),
                                               .own_keys = granite_swa_keys,
                                               .reads_attention_bias = true,
                                               .reads_mlp_bias = true,
                                               .tied = true,
                                               .n_kv_heads = 4,
                                               .max_positions = 8192,
                                               .norm_eps = 1e-5,
                                               .windows = PERTA_WINDOWS_OWN,
                                               .read = read_granite_swa};
