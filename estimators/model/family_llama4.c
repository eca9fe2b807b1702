/* Llama 4: layers with rotary positions, whose attention is in chunks and whose queries and keys
 * are normalised after the rotation, and layers without, whose queries are scaled by their
 * position; mixtures of experts, with a shared one, whose inputs are scaled. */
#include "estimators/model/config_read.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

#include <string.h>

#define GATES_AND_UPS PERTA_WIDTH_EXPERT_GATE_UP
#define DENSE PERTA_LAYER_DENSE
#define MIXTURE PERTA_LAYER_MIXTURE

static const struct perta_param_row params[] = {
    ATTENTION,
    {PERTA_GATE, "feed_forward.gate_proj.weight", INNER, HIDDEN, DENSE, false},
    {PERTA_UP, "feed_forward.up_proj.weight", INNER, HIDDEN, DENSE, false},
    {PERTA_DOWN, "feed_forward.down_proj.weight", HIDDEN, INNER, DENSE, false},
    {PERTA_EXPERT_GATE_UP, "feed_forward.experts.gate_up_proj", GATES_AND_UPS, HIDDEN, MIXTURE,
     true},
    {PERTA_EXPERT_DOWN, "feed_forward.experts.down_proj", HIDDEN, EXPERT, MIXTURE, true},
    {PERTA_ROUTER, "feed_forward.router.weight", PERTA_WIDTH_EXPERTS, HIDDEN, MIXTURE, false},
    {PERTA_SHARED_GATE, "feed_forward.shared_expert.gate_proj.weight", SHARED, HIDDEN, MIXTURE,
     false},
    {PERTA_SHARED_UP, "feed_forward.shared_expert.up_proj.weight", SHARED, HIDDEN, MIXTURE, false},
    {PERTA_SHARED_DOWN, "feed_forward.shared_expert.down_proj.weight", HIDDEN, SHARED, MIXTURE,
     false},
    NORMS,
};

/* Is layer in the list of numbers of layers? */
static bool is_listed(const json_t *list, uint32_t layer)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (json_integer_value(json_array_get(list, i)) == (json_int_t)layer)
            return true;
    return false;
}

static void read_mixtures(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *list = json_object_get(r->config, "moe_layers");
    uint32_t step = perta_config_count(r, "interleave_moe_layer_step", 1);
    bool has_list = perta_config_has(r->config, "moe_layers");
    bool is_list = json_is_array(list);
    for (size_t i = 0; i < json_array_size(list); i++)
        is_list &= json_is_integer(json_array_get(list, i));
    if (has_list && !is_list)
        perta_config_refuse(r, "moe_layers", "is not a list of layers");
    for (uint32_t l = 0; l < llm->n_layers; l++)
        perta_config_mixture(llm, l, has_list ? is_listed(list, l) : !((l + 1) % step));
}

/* An entry of no_rope_layers that is not 0 means that the layer has rotary positions. */
static void read_rotated(struct perta_config_reader *r, struct perta_llm *llm)
{
    static const char key[] = "no_rope_layers";
    const json_t *list = json_object_get(r->config, key);
    uint32_t interval = perta_config_count(r, "no_rope_layer_interval", 4);
    size_t n = json_array_size(list);
    if (perta_config_has(r->config, key) && (!json_is_array(list) || (n && n != llm->n_layers)))
        perta_config_refuse(r, key, "is not a list with a number for each layer");
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        const json_t *entry = json_array_get(list, l);
        bool is_off =
            json_is_false(entry) || (json_is_integer(entry) && !json_integer_value(entry));
        if (entry && !json_is_integer(entry) && !json_is_boolean(entry))
            perta_config_refuse(r, key, "is not a list with a number for each layer");
        if (n ? is_off : !((l + 1) % interval))
            llm->layers[l] |= PERTA_LAYER_UNROTATED;
    }
}

/* Without layer_types, the layers with rotary positions have chunks. */
static void read_chunks(struct perta_config_reader *r, struct perta_llm *llm)
{
    static const char key[] = "layer_types", size[] = "attention_chunk_size";
    const json_t *types = json_object_get(r->config, key),
                 *chunk = json_object_get(r->config, size);
    bool has_types = perta_config_has(r->config, key);
    if (has_types && (!json_is_array(types) || json_array_size(types) != llm->n_layers))
        perta_config_refuse(r, key, "is not a list with a type for each layer");
    for (uint32_t l = 0; l < llm->n_layers; l++) {
        const char *type = json_string_value(json_array_get(types, l));
        bool chunks = has_types ? type && !strcmp(type, "chunked_attention")
                                : !perta_llm_has(llm, l, PERTA_LAYER_UNROTATED);
        if (has_types && !chunks && (!type || strcmp(type, "full_attention")))
            perta_config_refuse(r, key,
                                "has another type than full_attention and "
                                "chunked_attention");
        if (chunks)
            llm->layers[l] |= PERTA_LAYER_CHUNKS;
    }
    bool any = false;
    for (uint32_t l = 0; l < llm->n_layers && !any; l++)
        any = perta_llm_has(llm, l, PERTA_LAYER_CHUNKS);
    if (any && json_is_null(chunk))
        perta_config_refuse(r, size, "is null, but there are layers with chunks");
    llm->chunk = perta_config_count(r, size, 8192);
}

/* Published files have a number there. */
static bool is_tuned(struct perta_config_reader *r)
{
    static const char key[] = "attn_temperature_tuning";
    const json_t *value = json_object_get(r->config, key);
    return json_is_integer(value) ? json_integer_value(value) : perta_config_flag(r, key, true);
}

static void read(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->expert_intermediate = llm->shared_intermediate = llm->intermediate;
    llm->intermediate = perta_config_count(r, "intermediate_size_mlp", 16384);
    llm->n_experts = perta_config_experts(r, "num_local_experts", 16);
    llm->router = (struct perta_router){
        .n_experts = llm->n_experts,
        .k = perta_config_count(r, "num_experts_per_tok", 1),
        .scoring = PERTA_SCORE_CHOSEN_SIGMOID,
        .scale = 1,
        .scales_input = true,
    };
    llm->qk_norm_after_rope = true;
    llm->no_blocks = true; /* chunks would count from the block's first token */
    read_mixtures(r, llm);
    read_rotated(r, llm);
    read_chunks(r, llm);
    bool normed = perta_config_flag(r, "use_qk_norm", true);
    for (uint32_t l = 0; l < llm->n_layers; l++)
        if (normed && !perta_llm_has(llm, l, PERTA_LAYER_UNROTATED))
            llm->layers[l] |= PERTA_LAYER_QK_NORM;
    if (is_tuned(r)) {
        llm->query_beta = (float)perta_config_number(r, r->config, "attn_scale", 0.1);
        llm->query_floor = (float)perta_config_count(r, "floor_scale", 8192);
    }
}

static const char *const keys[] = {"attention_chunk_size",
                                   "attn_scale",
                                   "attn_temperature_tuning",
                                   "floor_scale",
                                   "interleave_moe_layer_step",
                                   "intermediate_size_mlp",
                                   "moe_layers",
                                   "no_rope_layer_interval",
                                   "no_rope_layers",
                                   "num_experts_per_tok",
                                   "num_local_experts",
                                   "router_jitter_noise", /* nobody reads it */
                                   "use_qk_norm",
                                   NULL};

const struct perta_family perta_llama4_text = {
    .model_type = "llama4_text",
    .architecture = "Llama4ForCausalLM",
    PERTA_LLAMA_NAMES,
    .params = params,
    .n_params = sizeof params / sizeof *params,
    .own_keys = keys,
    .reads_attention_bias = true,
    .n_kv_heads = 8,
    .head_dim = 128,
    .max_positions = 131072,
    .norm_eps = 1e-5,
    .rope = {.theta = 500000, .interleaved = true},
    .windows = PERTA_WINDOWS_OWN,
    .read = read,
};
