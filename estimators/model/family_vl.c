/* Text models that exist only within models for images. For text alone, positions on three axes
 * are equal, and those of mrope are the usual ones. */
#include "estimators/model/config_read.h"
#include "estimators/model/part.h"

static void read_qwen2_vl(struct perta_config_reader *r, struct perta_llm *llm)
{
    llm->no_blocks = true;
    if (llm->head_dim != llm->hidden / llm->n_heads)
        perta_config_refuse(r, "head_dim",
                            "is not \"hidden_size\" divided by \"num_attention_heads\"");
    if (llm->window && !perta_config_has(r->config, "max_window_layers") &&
        !perta_config_has(r->config, "layer_types"))
        perta_config_refuse(r, "max_window_layers", "is missing, and needed with windows");
}

#define QWEN2_VL_LINE                                                                           \
    PERTA_LLAMA_LINE, .options = PERTA_QKV_HAS_BIAS, .n_kv_heads = 8, .max_positions = 32768,   \
        .norm_eps = 1e-5, .rope = {.theta = 1e6, .mrope = true}, .windows = PERTA_WINDOWS_QWEN, \
        .read = read_qwen2_vl

const struct perta_family perta_qwen2_vl_text = {.model_type = "qwen2_vl_text",
                                                 .architecture = "Qwen2VLForConditionalGeneration",
                                                 QWEN2_VL_LINE};
const struct perta_family perta_qwen2_5_vl_text = {.model_type = "qwen2_5_vl_text",
                                                   .architecture =
                                                       "Qwen2_5_VLForConditionalGeneration",
                                                   QWEN2_VL_LINE};
