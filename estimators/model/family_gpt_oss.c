/* GptOss: attention with a sink for each head, in windows in every other layer; a mixture of
 * experts with biases, whose gates and ups alternate in one tensor and are clamped. */
#include "estimators/model/family_moe.h"
#include "estimators/model/part.h"

#define GATES_AND_UPS PERTA_WIDTH_EXPERT_GATE_UP

static const struct perta_param_row params[] = {
    {PERTA_SINKS, "self_attn.sinks", VECTOR, PERTA_WIDTH_HEADS, PERTA_ALWAYS, false},
    ATTENTION,
    {PERTA_ROUTER, "mlp.router.weight", PERTA_WIDTH_EXPERTS, HIDDEN, PERTA_ALWAYS, false},
    {PERTA_ROUTER_BIAS, "mlp.router.bias", VECTOR, PERTA_WIDTH_EXPERTS, PERTA_ALWAYS, false},
    {PERTA_EXPERT_GATE_UP, "mlp.experts.gate_up_proj", GATES_AND_UPS, HIDDEN, TOGETHER, true},
    {PERTA_EXPERT_GATE_UP_BIAS, "mlp.experts.gate_up_proj_bias", VECTOR, GATES_AND_UPS, TOGETHER,
     false},
    {PERTA_EXPERT_DOWN, "mlp.experts.down_proj", HIDDEN, EXPERT, TOGETHER, true},
    {PERTA_EXPERT_DOWN_BIAS, "mlp.experts.down_proj_bias", VECTOR, HIDDEN, TOGETHER, false},
    NORMS,
};

/* Without layer_types: every other layer, from the first one on. */
static void read_windows(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *size = json_object_get(r->config, "sliding_window");
    if (!json_is_null(size))
        llm->window = perta_config_count(r, "sliding_window", 128);
    if (perta_config_has(r->config, "layer_types"))
        perta_config_layer_types(r, llm);
    else if (!llm->window)
        perta_config_refuse(r, "sliding_window", "is null, but every other layer has a window");
    for (uint32_t l = 0; l < llm->n_layers && !perta_config_has(r->config, "layer_types"); l += 2)
        llm->layers[l] |= PERTA_LAYER_WINDOW;
}

static void read(struct perta_config_reader *r, struct perta_llm *llm)
{
    read_windows(r, llm);
    if (perta_config_flag(r, "attention_bias", true))
        llm->options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS;
    llm->options &= ~(uint32_t)PERTA_EXPERTS_APART;
    llm->options |= PERTA_EXPERTS_TOGETHER;
    llm->gate_up_interleaved = true;
    llm->no_blocks = true;
    llm->activation = (struct perta_activation){
        PERTA_CLAMPED_SWIGLU,
        (float)perta_config_number(r, r->config, "swiglu_alpha", 1.702),
        (float)perta_config_number(r, r->config, "swiglu_limit", 7.0),
    };
    llm->n_experts = perta_config_experts(r, "num_experts", 128);
    llm->expert_intermediate = llm->intermediate;
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", 4),
        .scoring = PERTA_SCORE_CHOSEN_SOFTMAX,
        .scale = 1,
    };
    perta_moe_everywhere(llm);
    perta_moe_no_aux_loss(r);
}

static const char *const keys[] = {"num_experts",  "num_local_experts", "num_experts_per_tok",
                                   "swiglu_alpha", "swiglu_limit",      NULL};

const struct perta_family perta_gpt_oss = {
    .model_type = "gpt_oss",
    .architecture = "GptOssForCausalLM",
    PERTA_LLAMA_NAMES,
    .params = params,
    .n_params = sizeof params / sizeof *params,
    .own_keys = keys,
    .n_kv_heads = 8,
    .head_dim = 64,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 150000,
             .parameters = "{\"rope_type\": \"yarn\", \"factor\": 32.0, \"beta_fast\": 32.0, "
                           "\"beta_slow\": 1.0, \"truncate\": false, "
                           "\"original_max_position_embeddings\": 4096}"},
    .windows = PERTA_WINDOWS_OWN,
    .read = read,
};
