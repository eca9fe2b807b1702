/* Mixtures of experts whose blocks are otherwise Llama's. */
#include "estimators/model/config_read.h"
#include "estimators/model/part.h"

#define HIDDEN PERTA_WIDTH_HIDDEN
#define INNER PERTA_WIDTH_INTERMEDIATE
#define QUERIES PERTA_WIDTH_QUERIES
#define KEYS PERTA_WIDTH_KEYS
#define VALUES PERTA_WIDTH_VALUES
#define ATTENDED PERTA_WIDTH_ATTENDED
#define HEAD PERTA_WIDTH_HEAD
#define EXPERTS PERTA_WIDTH_EXPERTS
#define EXPERT PERTA_WIDTH_EXPERT
#define VECTOR PERTA_WIDTH_NONE
#define DENSE PERTA_LAYER_DENSE
#define MIXTURE PERTA_LAYER_MIXTURE
#define APART (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_APART)
#define TOGETHER (PERTA_LAYER_MIXTURE | PERTA_EXPERTS_TOGETHER)

/* Attention and norms, as in Llama. */
#define ATTENTION                                                                            \
    {PERTA_Q, "self_attn.q_proj.weight", QUERIES, HIDDEN, PERTA_ALWAYS, false},              \
        {PERTA_Q_BIAS, "self_attn.q_proj.bias", VECTOR, QUERIES, PERTA_QKV_HAS_BIAS, false}, \
        {PERTA_K, "self_attn.k_proj.weight", KEYS, HIDDEN, PERTA_ALWAYS, false},             \
        {PERTA_K_BIAS, "self_attn.k_proj.bias", VECTOR, KEYS, PERTA_QKV_HAS_BIAS, false},    \
        {PERTA_V, "self_attn.v_proj.weight", VALUES, HIDDEN, PERTA_ALWAYS, false},           \
        {PERTA_V_BIAS, "self_attn.v_proj.bias", VECTOR, VALUES, PERTA_QKV_HAS_BIAS, false},  \
        {PERTA_O, "self_attn.o_proj.weight", HIDDEN, ATTENDED, PERTA_ALWAYS, false},         \
    {                                                                                        \
        PERTA_O_BIAS, "self_attn.o_proj.bias", VECTOR, HIDDEN, PERTA_O_HAS_BIAS, false       \
    }
#define NORMS                                                                                \
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false},           \
    {                                                                                        \
        PERTA_NORM_2, "post_attention_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS, false \
    }
#define DENSE_MLP                                                       \
    {PERTA_GATE, "mlp.gate_proj.weight", INNER, HIDDEN, DENSE, false},  \
        {PERTA_UP, "mlp.up_proj.weight", INNER, HIDDEN, DENSE, false},  \
    {                                                                   \
        PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, DENSE, false \
    }
/* Experts in tensors of their own, or all in one. */
#define EXPERT_MLP(of)                                                                        \
    {PERTA_EXPERT_GATE, of ".experts.%u.gate_proj.weight", EXPERT, HIDDEN, APART, false},     \
        {PERTA_EXPERT_UP, of ".experts.%u.up_proj.weight", EXPERT, HIDDEN, APART, false},     \
        {PERTA_EXPERT_GATE_UP,                                                                \
         of ".experts.gate_up_proj",                                                          \
         PERTA_WIDTH_EXPERT_GATE_UP,                                                          \
         HIDDEN,                                                                              \
         TOGETHER,                                                                            \
         false},                                                                              \
        {PERTA_EXPERT_DOWN, of ".experts.%u.down_proj.weight", HIDDEN, EXPERT, APART, false}, \
    {                                                                                         \
        PERTA_EXPERT_DOWN, of ".experts.down_proj", HIDDEN, EXPERT, TOGETHER, false           \
    }

static const struct perta_param_row qwen3_moe_params[] = {
    ATTENTION,
    DENSE_MLP,
    {PERTA_ROUTER, "mlp.gate.weight", EXPERTS, HIDDEN, MIXTURE, false},
    EXPERT_MLP("mlp"),
    NORMS,
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, HEAD, PERTA_ALWAYS, false},
};

#define PARAMS(rows) .params = rows, .n_params = sizeof rows / sizeof *rows

/* ---- layers ---- */

/* mlp_only_layers and decoder_sparse_step: which layers have experts. */
static void read_sparse_layers(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *only = json_object_get(r->config, "mlp_only_layers");
    uint32_t step = perta_config_count(r, "decoder_sparse_step", 1);
    if (perta_config_has(r->config, "mlp_only_layers") && !json_is_array(only))
        perta_config_refuse(r, "mlp_only_layers", "is not a list of layers");
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        bool dense = (l + 1) % step;
        for (size_t i = 0; i < json_array_size(only); i++)
            dense |= json_integer_value(json_array_get(only, i)) == (json_int_t)l;
        perta_config_mixture(llm, l, !dense);
    }
}

static void read_qwen3_moe(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->n_experts = perta_config_experts(r, "num_experts", 128);
    llm->expert_intermediate = perta_config_count(r, "moe_intermediate_size", 768);
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", 8),
        .scoring = PERTA_SCORE_SOFTMAX,
        .renormalise = perta_config_bool(r, "norm_topk_prob"),
        .scale = 1,
    };
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
