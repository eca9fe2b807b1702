/* Models without rotary positions, and Falcon, which has them or none: GPT-2 and OPT with learned
 * positions, Bloom and Falcon with ALiBi. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#define ALWAYS PERTA_ALWAYS
#define QKV_BIAS PERTA_QKV_HAS_BIAS
#define O_BIAS PERTA_O_HAS_BIAS
#define MLP_BIAS PERTA_MLP_HAS_BIAS
#define ALL_BIASES (PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS | PERTA_MLP_HAS_BIAS)

/* A linear layer in tensors at.weight and at.bias. */
#define LINEAR(param, at, out, in, biased, transposed)       \
    {param, at ".weight", out, in, ALWAYS, transposed},      \
    {                                                        \
        param##_BIAS, at ".bias", VECTOR, out, biased, false \
    }
#define NORM(param, at, when)                                 \
    {param, at ".weight", VECTOR, HIDDEN, when, false},       \
    {                                                         \
        param##_BIAS, at ".bias", VECTOR, HIDDEN, when, false \
    }

#define PARTS .norm = &perta_layernorm_part, .attention = &perta_attention_part
#define WITH_BIAS(norm) .final_norm = norm ".weight", .final_norm_bias = norm ".bias"
#define IN_TRANSFORMER                                                                       \
    .base = "transformer", .other_base = "", .layers = "h", .head = "lm_head.weight", PARTS, \
    WITH_BIAS("ln_f")

static bool is_on(struct perta_config_reader *r, const char *key)
{
    return json_object_get(r->config, key) ? perta_config_bool(r, key) : true;
}

/* ---- GPT-2 ---- */

/* Conv1D stores its weight as (in, out). */
static const struct perta_param_row gpt2_params[] = {
    LINEAR(PERTA_QKV, "attn.c_attn", QKV, HIDDEN, QKV_BIAS, true),
    LINEAR(PERTA_O, "attn.c_proj", HIDDEN, ATTENDED, O_BIAS, true),
    LINEAR(PERTA_UP, "mlp.c_fc", INNER, HIDDEN, MLP_BIAS, true),
    LINEAR(PERTA_DOWN, "mlp.c_proj", HIDDEN, INNER, MLP_BIAS, true),
    NORM(PERTA_NORM_1, "ln_1", ALWAYS),
    NORM(PERTA_NORM_2, "ln_2", ALWAYS),
};

static void read_gpt2(struct perta_config_reader *r, struct perta_llm *llm)
{
    const char *key = "n_positions", *usual = "max_position_embeddings";
    bool own = perta_config_has(r->config, key) || !perta_config_has(r->config, usual);
    llm->n_positions = perta_config_count(r, own ? key : usual, 1024);
    llm->attention_scale = is_on(r, "scale_attn_weights") ? 0 : 1;
    llm->scale_by_number = perta_config_bool(r, "scale_attn_by_inverse_layer_idx");
    perta_config_unrotated(llm);
}

/* Of summaries, for other heads; reorder_and_upcast_attn is another order of the same operations;
 * n_ctx is not used. */
static const char *const gpt2_keys[] = {"activation_function",
                                        "layer_norm_epsilon",
                                        "n_ctx",
                                        "n_embd",
                                        "n_head",
                                        "n_inner",
                                        "n_layer",
                                        "n_positions",
                                        "reorder_and_upcast_attn",
                                        "scale_attn_by_inverse_layer_idx",
                                        "scale_attn_weights",
                                        "summary_activation",
                                        "summary_first_dropout",
                                        "summary_proj_to_labels",
                                        "summary_type",
                                        "summary_use_proj",
                                        NULL};

const struct perta_family perta_gpt2 = {
    .model_type = "gpt2",
    .architecture = "GPT2LMHeadModel",
    IN_TRANSFORMER,
    .embedding = "wte.weight",
    .positions = "wpe.weight",
    PARAMS(gpt2_params),
    .keys = {.layers = "n_layer",
             .hidden = "n_embd",
             .intermediate = "n_inner",
             .heads = "n_head",
             .kv_heads = "",
             .norm_eps = "layer_norm_epsilon",
             .act = "activation_function"},
    .own_keys = gpt2_keys,
    .options = ALL_BIASES,
    .tied = true,
    .no_padding = true,
    .intermediate = 4,
    .norm_eps = 1e-5,
    .act = "gelu_new",
    .windows = PERTA_WINDOWS_NONE,
    .read = read_gpt2,
};

/* ---- OPT ---- */

static const struct perta_param_row opt_params[] = {
    LINEAR(PERTA_Q, "self_attn.q_proj", QUERIES, HIDDEN, QKV_BIAS, false),
    LINEAR(PERTA_K, "self_attn.k_proj", KEYS, HIDDEN, QKV_BIAS, false),
    LINEAR(PERTA_V, "self_attn.v_proj", VALUES, HIDDEN, QKV_BIAS, false),
    LINEAR(PERTA_O, "self_attn.out_proj", HIDDEN, ATTENDED, O_BIAS, false),
    LINEAR(PERTA_UP, "fc1", INNER, HIDDEN, MLP_BIAS, false),
    LINEAR(PERTA_DOWN, "fc2", HIDDEN, INNER, MLP_BIAS, false),
    NORM(PERTA_NORM_1, "self_attn_layer_norm", ALWAYS),
    NORM(PERTA_NORM_2, "final_layer_norm", ALWAYS),
};

static void read_opt(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->n_positions = perta_config_count(r, "max_position_embeddings", 2048);
    llm->position_offset = 2;
    llm->options |= is_on(r, "enable_bias") ? ALL_BIASES : 0;
    if (!is_on(r, "do_layer_norm_before"))
        perta_config_refuse(r, "do_layer_norm_before",
                            "is false: norms after attention and MLP are not supported here");
    if (perta_config_count(r, "word_embed_proj_dim", llm->hidden) != llm->hidden)
        perta_config_refuse(r, "word_embed_proj_dim",
                            "is not \"hidden_size\": projections of the embedding are not "
                            "supported");
    if (!is_on(r, "layer_norm_elementwise_affine"))
        perta_config_refuse(r, "layer_norm_elementwise_affine",
                            "is false: norms without weights are not supported here");
    if (perta_config_bool(r, "_remove_final_layer_norm"))
        perta_config_refuse(r, "_remove_final_layer_norm",
                            "is true: a model without a final norm is not supported");
    perta_config_unrotated(llm);
}

static const char *const opt_keys[] = {"_remove_final_layer_norm",
                                       "activation_dropout",
                                       "activation_function",
                                       "do_layer_norm_before",
                                       "enable_bias",
                                       "ffn_dim",
                                       "layer_norm_elementwise_affine",
                                       "layerdrop",
                                       "word_embed_proj_dim",
                                       NULL};

const struct perta_family perta_opt = {
    .model_type = "opt",
    .architecture = "OPTForCausalLM",
    .base = "model.decoder",
    .other_base = "decoder",
    .layers = "layers",
    .embedding = "embed_tokens.weight",
    .positions = "embed_positions.weight",
    .head = "lm_head.weight",
    WITH_BIAS("final_layer_norm"),
    PARTS,
    PARAMS(opt_params),
    .keys = {.intermediate = "ffn_dim",
             .kv_heads = "",
             .norm_eps = "",
             .act = "activation_function"},
    .own_keys = opt_keys,
    .tied = true,
    .norm_eps = 1e-5,
    .act = "relu",
    .windows = PERTA_WINDOWS_NONE,
    .position_ids = {.no_blocks = true, .count_seen = true},
    .read = read_opt,
};

/* ---- Bloom, Falcon ---- */

#define OF_BLOOM                                                                       \
    LINEAR(PERTA_QKV, "self_attention.query_key_value", QKV, HIDDEN, QKV_BIAS, false), \
        LINEAR(PERTA_O, "self_attention.dense", HIDDEN, ATTENDED, O_BIAS, false),      \
        LINEAR(PERTA_UP, "mlp.dense_h_to_4h", INNER, HIDDEN, MLP_BIAS, false),         \
        LINEAR(PERTA_DOWN, "mlp.dense_4h_to_h", HIDDEN, INNER, MLP_BIAS, false)

static const struct perta_param_row bloom_params[] = {
    OF_BLOOM,
    NORM(PERTA_NORM_1, "input_layernorm", ALWAYS),
    NORM(PERTA_NORM_2, "post_attention_layernorm", ALWAYS),
};

static void read_bloom(struct perta_config_reader *r, struct perta_llm *llm)
{
    if (perta_config_bool(r, "apply_residual_connection_post_layernorm"))
        perta_config_refuse(r, "apply_residual_connection_post_layernorm",
                            "is true, which is not supported");
    llm->qkv_by_group = true;
    llm->alibi = true;
    perta_config_unrotated(llm);
}

/* What Megatron's files say, and transformers passes over; slow_but_exact is another order of the
 * same additions. */
static const char *const bloom_keys[] = {"apply_residual_connection_post_layernorm",
                                         "attention_softmax_in_fp32",
                                         "bias_dropout_fusion",
                                         "layer_norm_epsilon",
                                         "masked_softmax_fusion",
                                         "n_embed",
                                         "n_head",
                                         "n_inner",
                                         "n_layer",
                                         "offset_alibi",
                                         "seq_length",
                                         "skip_bias_add",
                                         "skip_bias_add_qkv",
                                         "slow_but_exact",
                                         NULL};

const struct perta_family perta_bloom = {
    .model_type = "bloom",
    .architecture = "BloomForCausalLM",
    IN_TRANSFORMER,
    .embedding = "word_embeddings.weight",
    .embedding_norm = "word_embeddings_layernorm.weight",
    .embedding_norm_bias = "word_embeddings_layernorm.bias",
    PARAMS(bloom_params),
    .keys = {.layers = "n_layer",
             .hidden = "n_embed",
             .intermediate = "",
             .heads = "n_head",
             .kv_heads = "",
             .norm_eps = "layer_norm_epsilon",
             .act = ""},
    .own_keys = bloom_keys,
    .options = ALL_BIASES,
    .tied = true,
    .no_padding = true,
    .intermediate = 4,
    .norm_eps = 1e-5,
    .act = "gelu_pytorch_tanh",
    .windows = PERTA_WINDOWS_NONE,
    .position_ids = {.refused = true},
    .read = read_bloom,
};

#define TWO_IN_TURN PERTA_OWN_1 /* attention, then the MLP, each with a norm */
#define TWO_BESIDE PERTA_OWN_2  /* beside each other, each with a norm */
#define ONE PERTA_OWN_3         /* one norm for both */

static const struct perta_param_row falcon_params[] = {
    OF_BLOOM,
    NORM(PERTA_NORM_1, "input_layernorm", ONE),
    NORM(PERTA_NORM_1, "input_layernorm", TWO_IN_TURN),
    NORM(PERTA_NORM_2, "post_attention_layernorm", TWO_IN_TURN),
    NORM(PERTA_NORM_1, "ln_attn", TWO_BESIDE),
    NORM(PERTA_NORM_2, "ln_mlp", TWO_BESIDE),
};

/* The norms. Combinations with which transformers' own model fails are refused. */
static void read_falcon_norms(struct perta_config_reader *r, struct perta_llm *llm, bool new)
{
    const char *key = "num_ln_in_parallel_attn";
    bool beside = is_on(r, "parallel_attn");
    uint32_t n = perta_config_count(r, key, new ? 2 : 1);
    if (new && !beside)
        perta_config_refuse(r, "parallel_attn",
                            "is false, which a new_decoder_architecture is not");
    if (n > 2 || (n == 2 && !new))
        perta_config_refuse(r, key, "is not the number of norms of a layer of this kind");
    llm->parallel = beside;
    llm->options |= !beside ? TWO_IN_TURN : n == 2 ? TWO_BESIDE : ONE;
}

static void read_falcon(struct perta_config_reader *r, struct perta_llm *llm)
{
    bool new = perta_config_bool(r, "new_decoder_architecture");
    bool shared = !new && is_on(r, "multi_query");
    llm->n_kv_heads = shared ? 1 : llm->n_kv_heads;
    if (!new && !shared && llm->n_kv_heads != llm->n_heads)
        perta_config_refuse(r, "num_kv_heads", "is not \"num_attention_heads\"");
    llm->qkv_by_group = true;
    llm->options |= perta_config_bool(r, "bias") ? ALL_BIASES : 0;
    llm->alibi = llm->alibi_bf16 = perta_config_bool(r, "alibi");
    read_falcon_norms(r, llm, new);
    if (llm->alibi)
        perta_config_unrotated(llm);
}

static const char *const falcon_keys[] = {"activation",
                                          "alibi",
                                          "apply_residual_connection_post_layernorm",
                                          "bias",
                                          "ffn_hidden_size",
                                          "layer_norm_epsilon",
                                          "multi_query",
                                          "n_embed",
                                          "new_decoder_architecture",
                                          "num_kv_heads",
                                          "num_ln_in_parallel_attn",
                                          "parallel_attn",
                                          NULL};

const struct perta_family perta_falcon = {
    .model_type = "falcon",
    .architecture = "FalconForCausalLM",
    IN_TRANSFORMER,
    .embedding = "word_embeddings.weight",
    PARAMS(falcon_params),
    .keys = {.hidden = "n_embed",
             .intermediate = "ffn_hidden_size",
             .kv_heads = "num_kv_heads",
             .norm_eps = "layer_norm_epsilon",
             .act = "activation"},
    .own_keys = falcon_keys,
    .tied = true,
    .no_padding = true,
    .intermediate = 4,
    .max_positions = 2048,
    .norm_eps = 1e-5,
    .act = "gelu",
    .windows = PERTA_WINDOWS_NONE,
    .position_ids = {.no_blocks = true},
    .read = read_falcon,
};
