#include "estimators/model/family.h"

#include <stdio.h>

#include "estimators/model/config.h"
#include "estimators/model/part.h"

#define HIDDEN PERTA_WIDTH_HIDDEN
#define INNER PERTA_WIDTH_INTERMEDIATE
#define QUERIES PERTA_WIDTH_QUERIES
#define KEYS PERTA_WIDTH_KEYS
#define HEAD PERTA_WIDTH_HEAD
#define VECTOR PERTA_WIDTH_NONE

/* LlamaForCausalLM in transformers, and the models derived from it. */
static const struct perta_param_row llama[] = {
    {PERTA_Q, "self_attn.q_proj.weight", QUERIES, HIDDEN, PERTA_ALWAYS},
    {PERTA_Q_BIAS, "self_attn.q_proj.bias", VECTOR, QUERIES, PERTA_IF_QKV_BIAS},
    {PERTA_K, "self_attn.k_proj.weight", KEYS, HIDDEN, PERTA_ALWAYS},
    {PERTA_K_BIAS, "self_attn.k_proj.bias", VECTOR, KEYS, PERTA_IF_QKV_BIAS},
    {PERTA_V, "self_attn.v_proj.weight", KEYS, HIDDEN, PERTA_ALWAYS},
    {PERTA_V_BIAS, "self_attn.v_proj.bias", VECTOR, KEYS, PERTA_IF_QKV_BIAS},
    {PERTA_O, "self_attn.o_proj.weight", HIDDEN, QUERIES, PERTA_ALWAYS},
    {PERTA_O_BIAS, "self_attn.o_proj.bias", VECTOR, HIDDEN, PERTA_IF_O_BIAS},
    {PERTA_GATE, "mlp.gate_proj.weight", INNER, HIDDEN, PERTA_ALWAYS},
    {PERTA_GATE_BIAS, "mlp.gate_proj.bias", VECTOR, INNER, PERTA_IF_MLP_BIAS},
    {PERTA_UP, "mlp.up_proj.weight", INNER, HIDDEN, PERTA_ALWAYS},
    {PERTA_UP_BIAS, "mlp.up_proj.bias", VECTOR, INNER, PERTA_IF_MLP_BIAS},
    {PERTA_DOWN, "mlp.down_proj.weight", HIDDEN, INNER, PERTA_ALWAYS},
    {PERTA_DOWN_BIAS, "mlp.down_proj.bias", VECTOR, HIDDEN, PERTA_IF_MLP_BIAS},
    {PERTA_NORM_1, "input_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS},
    {PERTA_NORM_2, "post_attention_layernorm.weight", VECTOR, HIDDEN, PERTA_ALWAYS},
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, HEAD, PERTA_IF_QK_NORM},
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, HEAD, PERTA_IF_QK_NORM},
};

/* Tensors and parts that these families share. */
#define LLAMA_LINE                                                                       \
    .layers = "model.layers", .params = llama, .n_params = sizeof llama / sizeof *llama, \
    .embedding = "model.embed_tokens.weight", .head = "lm_head.weight",                  \
    .final_norm = "model.norm.weight", .norm = &perta_rmsnorm_part,                      \
    .attention = &perta_attention_part, .mlp = &perta_gated_mlp_part

const struct perta_family perta_families[] = {
    {.model_type = "llama",
     .architecture = "LlamaForCausalLM",
     LLAMA_LINE,
     .reads_attention_bias = true,
     .reads_mlp_bias = true,
     .max_positions = 2048},
    {.model_type = "mistral",
     .architecture = "MistralForCausalLM",
     LLAMA_LINE,
     .n_kv_heads = 8,
     .max_positions = 131072,
     .windows = PERTA_WINDOWS_EVERYWHERE},
    {.model_type = "qwen2",
     .architecture = "Qwen2ForCausalLM",
     LLAMA_LINE,
     .qkv_bias = true,
     .n_kv_heads = 32,
     .max_positions = 32768,
     .windows = PERTA_WINDOWS_QWEN},
    {.model_type = "qwen3",
     .architecture = "Qwen3ForCausalLM",
     LLAMA_LINE,
     .qk_norm = true,
     .reads_attention_bias = true,
     .n_kv_heads = 32,
     .max_positions = 32768,
     .windows = PERTA_WINDOWS_QWEN},
};
const size_t perta_n_families = sizeof perta_families / sizeof *perta_families;

/* ---- rows ---- */

static bool has(const struct perta_llm *llm, enum perta_option option)
{
    switch (option) {
    case PERTA_IF_QKV_BIAS:
        return llm->qkv_bias;
    case PERTA_IF_O_BIAS:
        return llm->o_bias;
    case PERTA_IF_MLP_BIAS:
        return llm->mlp_bias;
    case PERTA_IF_QK_NORM:
        return llm->qk_norm;
    case PERTA_ALWAYS:
        break;
    }
    return true;
}

const struct perta_param_row *perta_llm_param(const struct perta_llm *llm, enum perta_param param)
{
    const struct perta_family *family = llm->family;
    for (size_t i = 0; i < family->n_params; i++)
        if (family->params[i].param == param)
            return has(llm, family->params[i].when) ? &family->params[i] : NULL;
    return NULL;
}

static size_t width_of(const struct perta_llm *llm, enum perta_width width)
{
    switch (width) {
    case PERTA_WIDTH_HIDDEN:
        return llm->hidden;
    case PERTA_WIDTH_INTERMEDIATE:
        return llm->intermediate;
    case PERTA_WIDTH_QUERIES:
        return (size_t)llm->n_heads * llm->head_dim;
    case PERTA_WIDTH_KEYS:
        return (size_t)llm->n_kv_heads * llm->head_dim;
    case PERTA_WIDTH_HEAD:
        return llm->head_dim;
    case PERTA_WIDTH_NONE:
        break;
    }
    return 0;
}

void perta_llm_shape(const struct perta_llm *llm, const struct perta_param_row *row, size_t *out,
                     size_t *in)
{
    *out = width_of(llm, row->out);
    *in = width_of(llm, row->in);
}

size_t perta_llm_widest(const struct perta_llm *llm)
{
    size_t widest = 0;
    for (size_t i = 0; i < llm->family->n_params; i++) {
        size_t out, in;
        perta_llm_shape(llm, &llm->family->params[i], &out, &in);
        widest = out > widest ? out : widest;
        widest = in > widest ? in : widest;
    }
    return widest;
}

/* ---- names ---- */

const char *perta_llm_name(const struct perta_llm *llm, uint32_t layer,
                           const struct perta_param_row *row, char buf[PERTA_NAME_BYTES])
{
    snprintf(buf, PERTA_NAME_BYTES, "%s.%u.%s", llm->family->layers, layer, row->name);
    return buf;
}

static int each_of_layer(const struct perta_llm *llm, uint32_t layer, perta_tensor_fn *tensor,
                         void *ctx, struct perta_err *err)
{
    char name[PERTA_NAME_BYTES];
    int rc = 0;
    for (size_t i = 0; i < llm->family->n_params && !rc; i++) {
        const struct perta_param_row *row = &llm->family->params[i];
        size_t out, in;
        perta_llm_shape(llm, row, &out, &in);
        if (has(llm, row->when))
            rc = tensor(ctx, perta_llm_name(llm, layer, row, name), out, in, err);
    }
    return rc;
}

int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err)
{
    const struct perta_family *family = llm->family;
    int rc = tensor(ctx, family->embedding, llm->vocab, llm->hidden, err);
    for (uint32_t l = 0; l < llm->n_layers && !rc; l++)
        rc = each_of_layer(llm, l, tensor, ctx, err);
    if (!rc)
        rc = tensor(ctx, family->final_norm, 0, llm->hidden, err);
    if (!rc && family->final_norm_bias)
        rc = tensor(ctx, family->final_norm_bias, 0, llm->hidden, err);
    return rc || llm->tied ? rc : tensor(ctx, family->head, llm->vocab, llm->hidden, err);
}
