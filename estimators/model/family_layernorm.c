/* Models with LayerNorm and rotary positions: Phi, GPT-NeoX, StarCoder2, StableLM, Cohere,
 * Nemotron. Most have an MLP without a gate, or attention and MLP beside each other. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#define ALWAYS PERTA_ALWAYS
#define QKV_BIAS PERTA_QKV_HAS_BIAS
#define O_BIAS PERTA_O_HAS_BIAS
#define MLP_BIAS PERTA_MLP_HAS_BIAS
#define ALL_BIASES (PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS | PERTA_MLP_HAS_BIAS)
#define SECOND_NORM PERTA_OWN_1 /* the MLP has a norm of its own */

/* A linear layer in tensors at.weight and at.bias. */
#define LINEAR(param, at, out, in, biased)                   \
    {param, at ".weight", out, in, ALWAYS, false},           \
    {                                                        \
        param##_BIAS, at ".bias", VECTOR, out, biased, false \
    }
#define NORM(param, at, width, when)                         \
    {param, at ".weight", VECTOR, width, when, false},       \
    {                                                        \
        param##_BIAS, at ".bias", VECTOR, width, when, false \
    }

#define APART(o)                                                       \
    LINEAR(PERTA_Q, "self_attn.q_proj", QUERIES, HIDDEN, QKV_BIAS),    \
        LINEAR(PERTA_K, "self_attn.k_proj", KEYS, HIDDEN, QKV_BIAS),   \
        LINEAR(PERTA_V, "self_attn.v_proj", VALUES, HIDDEN, QKV_BIAS), \
        LINEAR(PERTA_O, "self_attn." o, HIDDEN, ATTENDED, O_BIAS)
#define PLAIN_MLP(up, down)                               \
    LINEAR(PERTA_UP, "mlp." up, INNER, HIDDEN, MLP_BIAS), \
        LINEAR(PERTA_DOWN, "mlp." down, HIDDEN, INNER, MLP_BIAS)
#define GATED_MLP                                                        \
    {PERTA_GATE, "mlp.gate_proj.weight", INNER, HIDDEN, ALWAYS, false},  \
        {PERTA_UP, "mlp.up_proj.weight", INNER, HIDDEN, ALWAYS, false},  \
    {                                                                    \
        PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, ALWAYS, false \
    }

#define PARTS .norm = &perta_layernorm_part, .attention = &perta_attention_part
#define NAMES                                                                \
    .base = "model", .layers = "layers", .embedding = "embed_tokens.weight", \
    .head = "lm_head.weight", PARTS
#define WITH_BIAS(norm) .final_norm = norm ".weight", .final_norm_bias = norm ".bias"

/* A switch that is on if the key is missing. */
static bool is_on(struct perta_config_reader *r, const char *key)
{
    return json_object_get(r->config, key) ? perta_config_bool(r, key) : true;
}

/* ---- Phi ---- */

static const struct perta_param_row phi_params[] = {
    APART("dense"),
    PLAIN_MLP("fc1", "fc2"),
    NORM(PERTA_NORM_1, "input_layernorm", HIDDEN, ALWAYS),
    NORM(PERTA_NORM_Q, "self_attn.q_layernorm", HEAD, PERTA_QK_NORM),
    NORM(PERTA_NORM_K, "self_attn.k_layernorm", HEAD, PERTA_QK_NORM),
};

static void read_phi(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->parallel = true;
    llm->options |= perta_config_bool(r, "qk_layernorm") ? PERTA_QK_NORM : 0;
}

static const char *const phi_keys[] = {"layer_norm_eps", "qk_layernorm", NULL};

const struct perta_family perta_phi = {
    .model_type = "phi",
    .architecture = "PhiForCausalLM",
    NAMES,
    WITH_BIAS("final_layernorm"),
    .head_bias = "lm_head.bias",
    PARAMS(phi_params),
    .keys = {.norm_eps = "layer_norm_eps"},
    .own_keys = phi_keys,
    .options = ALL_BIASES,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .act = "gelu_new",
    .rope = {.partial = 0.5},
    .windows = PERTA_WINDOWS_NONE,
    .read = read_phi,
};

/* ---- GPT-NeoX ---- */

static const struct perta_param_row gpt_neox_params[] = {
    LINEAR(PERTA_QKV, "attention.query_key_value", QKV, HIDDEN, QKV_BIAS),
    LINEAR(PERTA_O, "attention.dense", HIDDEN, ATTENDED, O_BIAS),
    PLAIN_MLP("dense_h_to_4h", "dense_4h_to_h"),
    NORM(PERTA_NORM_1, "input_layernorm", HIDDEN, ALWAYS),
    NORM(PERTA_NORM_2, "post_attention_layernorm", HIDDEN, ALWAYS),
};

static void read_gpt_neox(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->qkv_by_group = true;
    llm->parallel = is_on(r, "use_parallel_residual");
    if (is_on(r, "attention_bias"))
        llm->options |= QKV_BIAS | O_BIAS;
}

static const char *const gpt_neox_keys[] = {"attention_bias", "layer_norm_eps",
                                            "use_parallel_residual", NULL};

const struct perta_family perta_gpt_neox = {
    .model_type = "gpt_neox",
    .architecture = "GPTNeoXForCausalLM",
    .base = "gpt_neox",
    .layers = "layers",
    .embedding = "embed_in.weight",
    .head = "embed_out.weight",
    WITH_BIAS("final_layer_norm"),
    PARTS,
    PARAMS(gpt_neox_params),
    .keys = {.norm_eps = "layer_norm_eps", .kv_heads = ""},
    .own_keys = gpt_neox_keys,
    .options = MLP_BIAS,
    .no_padding = true,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .act = "gelu",
    .rope = {.theta_key = "rotary_emb_base", .partial = 0.25, .partial_key = "rotary_pct"},
    .windows = PERTA_WINDOWS_NONE,
    .read = read_gpt_neox,
};

/* ---- StarCoder2 ---- */

static const struct perta_param_row starcoder2_params[] = {
    APART("o_proj"),
    PLAIN_MLP("c_fc", "c_proj"),
    NORM(PERTA_NORM_1, "input_layernorm", HIDDEN, ALWAYS),
    NORM(PERTA_NORM_2, "post_attention_layernorm", HIDDEN, ALWAYS),
};

/* transformers has no window if the key is missing, and does not look at layer_types. */
static void read_starcoder2(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->options |= is_on(r, "use_bias") ? ALL_BIASES : 0;
    if (!perta_config_has(r->config, "sliding_window"))
        return;
    llm->window = perta_config_count(r, "sliding_window", 0);
    for (uint32_t l = 0; l < llm->n_layers; l++)
        llm->layers[l] |= PERTA_LAYER_WINDOW;
}

static const char *const starcoder2_keys[] = {"norm_epsilon", "use_bias", "norm_type", NULL};

const struct perta_family perta_starcoder2 = {
    .model_type = "starcoder2",
    .architecture = "Starcoder2ForCausalLM",
    NAMES,
    WITH_BIAS("norm"),
    PARAMS(starcoder2_params),
    .keys = {.norm_eps = "norm_epsilon"},
    .own_keys = starcoder2_keys,
    .tied = true,
    .n_kv_heads = 2,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .act = "gelu_pytorch_tanh",
    .windows = PERTA_WINDOWS_OWN,
    .read = read_starcoder2,
};

/* ---- StableLM ---- */

static const struct perta_param_row stablelm_params[] = {
    APART("o_proj"),
    GATED_MLP,
    NORM(PERTA_NORM_1, "input_layernorm", HIDDEN, ALWAYS),
    NORM(PERTA_NORM_2, "post_attention_layernorm", HIDDEN, SECOND_NORM),
};

static void read_stablelm(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->parallel = perta_config_bool(r, "use_parallel_residual");
    llm->options |= llm->parallel ? 0 : SECOND_NORM;
    llm->options |= perta_config_bool(r, "use_qkv_bias") ? QKV_BIAS : 0;
}

static const char *const stablelm_keys[] = {"layer_norm_eps", "use_parallel_residual",
                                            "use_qkv_bias", NULL};

const struct perta_family perta_stablelm = {
    .model_type = "stablelm",
    .architecture = "StableLmForCausalLM",
    NAMES,
    WITH_BIAS("norm"),
    PARAMS(stablelm_params),
    .keys = {.norm_eps = "layer_norm_eps"},
    .own_keys = stablelm_keys,
    .n_kv_heads = 32,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .rope = {.partial = 0.25},
    .windows = PERTA_WINDOWS_NONE,
    .read = read_stablelm,
};

/* ---- Cohere ---- */

static const struct perta_param_row cohere_params[] = {
    APART("o_proj"),
    GATED_MLP,
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, ALWAYS, false},
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, PERTA_WIDTH_EACH_QUERY, PERTA_QK_NORM, false},
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, PERTA_WIDTH_EACH_KEY, PERTA_QK_NORM, false},
};

static void read_cohere(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->parallel = true;
    llm->options |= perta_config_bool(r, "use_qk_norm") ? PERTA_QK_NORM : 0;
    llm->logit_multiplier = (float)perta_config_number(r, r->config, "logit_scale", 0.0625);
}

/* Layers with a window have rotary positions, the others none. */
static void read_cohere2(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *types = json_object_get(r->config, "layer_types");
    uint32_t pattern = perta_config_count(r, "sliding_window_pattern", 4);
    llm->parallel = true;
    llm->logit_multiplier = (float)perta_config_number(r, r->config, "logit_scale", 0.0625);
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        if (!types || json_is_null(types))
            llm->layers[l] &= (l + 1) % pattern ? ~0u : ~(uint32_t)PERTA_LAYER_WINDOW;
        if (!(llm->layers[l] & PERTA_LAYER_WINDOW))
            llm->layers[l] |= PERTA_LAYER_UNROTATED;
    }
}

static const char *const cohere_keys[] = {"layer_norm_eps", "logit_scale", "use_qk_norm", NULL};
/* What published files say of the model's shape, all of which is so, and transformers passes over. */
static const char *const cohere2_keys[] = {"position_embedding_type", "rotary_pct",
                                           "layer_norm_eps",          "logit_scale",
                                           "sliding_window_pattern",  NULL};

#define COHERE                                                                              \
    NAMES, .final_norm = "norm.weight", PARAMS(cohere_params),                              \
        .keys = {.norm_eps = "layer_norm_eps"}, .reads_attention_bias = true, .tied = true, \
        .max_positions = 8192, .norm_eps = 1e-5

const struct perta_family perta_cohere = {
    .model_type = "cohere",
    .architecture = "CohereForCausalLM",
    COHERE,
    .own_keys = cohere_keys,
    .rope = {.theta = 500000, .interleaved = true},
    .windows = PERTA_WINDOWS_NONE,
    .read = read_cohere,
};

const struct perta_family perta_cohere2 = {
    .model_type = "cohere2",
    .architecture = "Cohere2ForCausalLM",
    COHERE,
    .own_keys = cohere2_keys,
    .rope = {.interleaved = true},
    .windows = PERTA_WINDOWS_EVERYWHERE,
    .read = read_cohere2,
};

/* ---- Nemotron ---- */

static const struct perta_param_row nemotron_params[] = {
    APART("o_proj"),
    PLAIN_MLP("up_proj", "down_proj"),
    NORM(PERTA_NORM_1, "input_layernorm", HIDDEN, ALWAYS),
    NORM(PERTA_NORM_2, "post_attention_layernorm", HIDDEN, ALWAYS),
};

static void read_nemotron(struct perta_config_reader *r, struct perta_llm *llm)
{
    (void)r;
    llm->norm_plus = 1;
}

static const char *const nemotron_keys[] = {"norm_eps", NULL};

const struct perta_family perta_nemotron = {
    .model_type = "nemotron",
    .architecture = "NemotronForCausalLM",
    NAMES,
    WITH_BIAS("norm"),
    PARAMS(nemotron_params),
    .keys = {.norm_eps = "norm_eps"},
    .own_keys = nemotron_keys,
    .reads_attention_bias = true,
    .reads_mlp_bias = true,
    .max_positions = 4096,
    .norm_eps = 1e-5,
    .act = "relu2",
    .rope = {.partial = 0.5},
    .windows = PERTA_WINDOWS_NONE,
    .read = read_nemotron,
};
