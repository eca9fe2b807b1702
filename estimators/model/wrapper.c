#include "estimators/model/wrapper.h"

#include <stdio.h>
#include <string.h>

#include "estimators/model/config.h"
#include "estimators/model/family.h"
#include "io/format/naming.h"
#include "io/text.h"

#define N(list) (sizeof(list) / sizeof *(list))

extern const struct perta_family perta_qwen2_vl_text, perta_qwen2_5_vl_text;

const struct perta_wrapper perta_wrappers[] = {
    {"gemma3", "Gemma3ForConditionalGeneration", "gemma3_text", true, false, true, NULL},
    {"mistral3", "Mistral3ForConditionalGeneration", "mistral", false, false, true, NULL},
    {"llama4", "Llama4ForConditionalGeneration", "llama4_text", true, false, false, NULL},
    {"qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2_vl_text", true, true, true,
     &perta_qwen2_vl_text},
    {"qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", true, true, true,
     &perta_qwen2_5_vl_text},
    {"llava", "LlavaForConditionalGeneration", "llama", false, false, true, NULL},
    {"llava_next", "LlavaNextForConditionalGeneration", "llama", false, false, true, NULL},
    {"llava_onevision", "LlavaOnevisionForConditionalGeneration", "qwen2", false, false, true,
     NULL},
    {"vipllava", "VipLlavaForConditionalGeneration", "llama", false, false, true, NULL},
    {"internvl", "InternVLForConditionalGeneration", "qwen2", false, false, true, NULL},
};
const size_t perta_n_wrappers = N(perta_wrappers);

/* Keys beside "text_config". */
static const char *const own_keys[] = {
    "boi_token_id",
    "boi_token_index",
    "downsample_factor",
    "downsample_ratio",
    "eoi_token_id",
    "eoi_token_index",
    "ignore_index",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "image_newline_init",
    "image_seq_length",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "multimodal_projector_bias",
    "projection_dim",
    "projector_hidden_act",
    "projector_layernorm_eps",
    "spatial_merge_size",
    "text_config",
    "use_image_newline_parameter",
    "video_token_id",
    "video_token_index",
    "vision_aspect_ratio",
    "vision_config",
    "vision_end_token_id",
    "vision_feature_layer",
    "vision_feature_layers",
    "vision_feature_select_strategy",
    "vision_start_token_id",
    "vision_token_id",
};

/* Files leave out sizes of the text model that are transformers' defaults for its model_type. */
static const struct {
    const char *model_type, *sizes;
} defaults[] = {
    {"llama", "{\"hidden_size\": 4096, \"intermediate_size\": 11008, \"num_hidden_layers\": 32, "
              "\"num_attention_heads\": 32, \"vocab_size\": 32000}"},
    {"mistral", "{\"hidden_size\": 4096, \"intermediate_size\": 14336, \"num_hidden_layers\": 32, "
                "\"num_attention_heads\": 32, \"vocab_size\": 32000}"},
    {"qwen2", "{\"hidden_size\": 4096, \"intermediate_size\": 22016, \"num_hidden_layers\": 32, "
              "\"num_attention_heads\": 32, \"vocab_size\": 151936}"},
    {"gemma3_text", "{\"hidden_size\": 2304, \"intermediate_size\": 9216, "
                    "\"num_hidden_layers\": 26, \"num_attention_heads\": 8, "
                    "\"vocab_size\": 262208}"},
    {"llama4_text", "{\"hidden_size\": 5120, \"intermediate_size\": 8192, "
                    "\"num_hidden_layers\": 48, \"num_attention_heads\": 40, "
                    "\"vocab_size\": 202048}"},
};

/* ---- config.json ---- */

const struct perta_wrapper *perta_wrapper_find(const json_t *config)
{
    const char *type = json_string_value(json_object_get(config, "model_type"));
    const char *name =
        json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    for (size_t i = 0; i < perta_n_wrappers; i++)
        if (name ? !strcmp(name, perta_wrappers[i].architecture)
                 : type && !strcmp(type, perta_wrappers[i].model_type))
            return &perta_wrappers[i];
    return NULL;
}

bool perta_wrapper_has_key(const char *key)
{
    for (size_t i = 0; i < N(own_keys); i++)
        if (!strcmp(key, own_keys[i]))
            return true;
    return false;
}

/* The top level without what is not the text model's. */
static json_t *copy_of_top(const json_t *config)
{
    json_t *text = json_object(), *value;
    const char *key;
    json_object_foreach ((json_t *)(uintptr_t)config, key, value)
        if (!perta_wrapper_has_key(key) && strcmp(key, "model_type"))
            perta_json_set(&text, key, json_incref(value));
    return text;
}

static int add_sizes(json_t *text, const char *type)
{
    int rc = 0;
    for (size_t i = 0; i < N(defaults); i++)
        if (type && !strcmp(type, defaults[i].model_type)) {
            json_t *sizes = json_loads(defaults[i].sizes, 0, NULL);
            rc = sizes ? json_object_update_missing(text, sizes) : -1;
            json_decref(sizes);
        }
    return rc;
}

json_t *perta_wrapper_text(const struct perta_wrapper *wrapper, const json_t *config)
{
    const json_t *within = json_object_get(config, "text_config");
    bool is_within = json_is_object(within);
    json_t *text = is_within          ? json_copy((json_t *)(uintptr_t)within)
                   : wrapper->is_flat ? copy_of_top(config)
                                      : NULL;
    int rc = 0;
    /* in text_config, which transformers does not look at; at the top, the wrapper's */
    json_object_del(text, "architectures");
    if (text && wrapper->text_type && !json_object_get(text, "model_type"))
        rc = json_object_set_new(text, "model_type", json_string(wrapper->text_type));
    if (text && !rc && is_within)
        rc = add_sizes(text, json_string_value(json_object_get(text, "model_type")));
    if (rc) {
        json_decref(text);
        return NULL;
    }
    return text;
}

/* ---- tensors ---- */

/* Where the text model's layers and its head are: in published files, as transformers since 4.52
 * writes them, and in Qwen2-VL's. */
static const struct {
    const char *base, *head;
} layouts[] = {
    {"language_model.model", "language_model"},
    {"model.language_model", ""},
    {"model", ""},
};

/* Other parts, which may follow "model.". */
static const char *const others[] = {"vision_tower.", "vision_model.", "visual.",
                                     "multi_modal_projector.", "image_newline"};

void perta_wrapper_names(struct perta_llm *llm, const struct perta_checkpoint *ck)
{
    size_t i = 0;
    for (; i < N(layouts); i++) {
        perta_llm_set_names(llm, layouts[i].base, layouts[i].head);
        if (perta_checkpoint_find(ck, llm->names.embedding) ||
            perta_checkpoint_find(ck, llm->names.final_norm))
            break;
    }
    i = i < N(layouts) ? i : 0;
    perta_llm_set_names(llm, layouts[i].base, layouts[i].head);
}

bool perta_wrapper_is_other(const char *name)
{
    static const char base[] = "model.";
    if (!strncmp(name, base, sizeof base - 1))
        name += sizeof base - 1;
    for (size_t i = 0; i < N(others); i++)
        if (!strncmp(name, others[i], strlen(others[i])))
            return true;
    return false;
}
