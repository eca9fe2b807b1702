/* Phi-3 and Phi-4, GLM and GLM-4: linears that are several in one tensor. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#define NORMS_AFTER PERTA_OWN_1

static const struct perta_param_row phi3_params[] = {
    {PERTA_QKV, "self_attn.qkv_proj.weight", PERTA_WIDTH_QKV, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_O, "self_attn.o_proj.weight", HIDDEN, ATTENDED, PERTA_ALWAYS, false},
    {PERTA_GATE_UP, "mlp.gate_up_proj.weight", PERTA_WIDTH_GATE_UP, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, PERTA_ALWAYS, false},
    NORMS,
};

const struct perta_family perta_phi3 = {
    .model_type = "phi3",
    .architecture = "Phi3ForCausalLM",
    PERTA_LLAMA_NAMES,
    PARAMS(phi3_params),
    .pad = 32000 + 1,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .rope = {.partial = 1, .original_positions = 4096, .yarn_is_longrope = true},
    .windows = PERTA_WINDOWS_ASKED,
};

/* GLM-4 has two more norms, whose names say what they follow. */
static const struct perta_param_row glm_params[] = {
    {PERTA_Q, "self_attn.q_proj.weight", QUERIES, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_Q_BIAS, "self_attn.q_proj.bias", VECTOR, QUERIES, PERTA_QKV_HAS_BIAS, false},
    {PERTA_K, "self_attn.k_proj.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_K_BIAS, "self_attn.k_proj.bias", VECTOR, KEYS, PERTA_QKV_HAS_BIAS, false},
    {PERTA_V, "self_attn.v_proj.weight", VALUES, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_V_BIAS, "self_attn.v_proj.bias", VECTOR, VALUES, PERTA_QKV_HAS_BIAS, false},
    {PERTA_O, "self_attn.o_proj.weight", HIDDEN, ATTENDED, PERTA_ALWAYS, false},
    {PERTA_GATE_UP, "mlp.gate_up_proj.weight", PERTA_WIDTH_GATE_UP, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, PERTA_ALWAYS, false},
    NORMS,
    {PERTA_NORM_1_AFTER, "post_self_attn_layernorm.weight", VECTOR, HIDDEN, NORMS_AFTER, false},
    {PERTA_NORM_2_AFTER, "post_mlp_layernorm.weight", VECTOR, HIDDEN, NORMS_AFTER, false},
};

static void read_glm(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_flag(r, "attention_bias", true))
        llm->options |= PERTA_QKV_HAS_BIAS;
}

#define GLM_LINE                                                                                \
    PERTA_LLAMA_NAMES, PARAMS(glm_params), .pad = 151329 + 1, .n_kv_heads = 2, .head_dim = 128, \
        .max_positions = 131072, .norm_eps = 1.5625e-7,                                         \
        .rope = {.partial = 0.5, .interleaved = true}, .read = read_glm

const struct perta_family perta_glm = {
    .model_type = "glm", .architecture = "GlmForCausalLM", GLM_LINE};
const struct perta_family perta_glm4 = {
    .model_type = "glm4", .architecture = "Glm4ForCausalLM", GLM_LINE, .options = NORMS_AFTER};
