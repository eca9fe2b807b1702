#include "estimators/model/family.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "estimators/model/config.h"
#include "estimators/model/family_rows.h"
#include "estimators/model/part.h"

/* LlamaForCausalLM in transformers, and the models derived from it. */
const struct perta_param_row perta_llama_params[PERTA_N_LLAMA_PARAMS] = {
    ATTENTION,
    GATED(PERTA_ALWAYS),
    NORMS,
    {PERTA_NORM_Q, "self_attn.q_norm.weight", VECTOR, HEAD, PERTA_QK_NORM, false},
    {PERTA_NORM_K, "self_attn.k_norm.weight", VECTOR, HEAD, PERTA_QK_NORM, false},
};

static const struct perta_family llama = {.model_type = "llama",
                                          .architecture = "LlamaForCausalLM",
                                          PERTA_LLAMA_LINE,
                                          .reads_attention_bias = true,
                                          .reads_mlp_bias = true,
                                          .max_positions = 2048};
static const struct perta_family mistral = {.model_type = "mistral",
                                            .architecture = "MistralForCausalLM",
                                            PERTA_LLAMA_LINE,
                                            .n_kv_heads = 8,
                                            .max_positions = 131072,
                                            .windows = PERTA_WINDOWS_EVERYWHERE};
static const struct perta_family qwen2 = {.model_type = "qwen2",
                                          .architecture = "Qwen2ForCausalLM",
                                          PERTA_LLAMA_LINE,
                                          .options = PERTA_QKV_HAS_BIAS,
                                          .n_kv_heads = 32,
                                          .max_positions = 32768,
                                          .windows = PERTA_WINDOWS_QWEN};
static const struct perta_family qwen3 = {.model_type = "qwen3",
                                          .architecture = "Qwen3ForCausalLM",
                                          PERTA_LLAMA_LINE,
                                          .options = PERTA_QK_NORM,
                                          .reads_attention_bias = true,
                                          .n_kv_heads = 32,
                                          .head_dim = 128,
                                          .max_positions = 32768,
                                          .windows = PERTA_WINDOWS_QWEN};

extern const struct perta_family perta_ministral, perta_ministral3, perta_cwm; /* family_dense.c */
extern const struct perta_family perta_smollm3, perta_seed_oss, perta_ernie4_5, perta_helium;
extern const struct perta_family perta_hunyuan_v1_dense, perta_arcee, perta_jais2;
extern const struct perta_family perta_internlm3, perta_iquestcoder, perta_hyperclovax;
extern const struct perta_family perta_phi3, perta_glm, perta_glm4; /* family_fused.c */
extern const struct perta_family perta_gpt_oss, perta_llama4_text;
/* mixtures of experts */
extern const struct perta_family perta_qwen2_moe, perta_qwen3_moe, perta_olmoe, perta_flex_olmo;
extern const struct perta_family perta_mixtral, perta_minimax_m2, perta_phimoe, perta_granitemoe;
extern const struct perta_family perta_glm4_moe, perta_dots1, perta_ernie4_5_moe,
    perta_hunyuan_v1_moe;
/* LayerNorm; positions that are learned, or by ALiBi */
extern const struct perta_family perta_phi, perta_gpt_neox, perta_starcoder2, perta_stablelm,
    perta_cohere, perta_cohere2, perta_nemotron;
extern const struct perta_family perta_gpt2, perta_opt, perta_bloom, perta_falcon;
extern const struct perta_family perta_deepseek_v2, perta_deepseek_v3, perta_glm4_moe_lite,
    perta_youtu, perta_minicpm3; /* family_mla.c */
/* family_norms.c */
extern const struct perta_family perta_gemma, perta_gemma2, perta_gemma3, perta_vaultgemma;
extern const struct perta_family perta_olmo, perta_olmo2, perta_olmo3, perta_exaone4, perta_granite,
    perta_granite_swa;

/* clang-format off */
const struct perta_family *const perta_families[] = {
    &llama, &mistral, &qwen2, &qwen3,
    &perta_ministral, &perta_ministral3, &perta_cwm, &perta_smollm3,
    &perta_seed_oss, &perta_ernie4_5, &perta_helium, &perta_hunyuan_v1_dense, &perta_arcee,
    &perta_jais2, &perta_internlm3, &perta_iquestcoder, &perta_hyperclovax,
    &perta_phi3, &perta_glm, &perta_glm4, &perta_gpt_oss, &perta_llama4_text,
    &perta_qwen3_moe, &perta_qwen2_moe, &perta_olmoe, &perta_flex_olmo,
    &perta_mixtral, &perta_minimax_m2, &perta_phimoe, &perta_granitemoe,
    &perta_glm4_moe, &perta_dots1, &perta_ernie4_5_moe, &perta_hunyuan_v1_moe,
    &perta_phi, &perta_gpt_neox, &perta_starcoder2, &perta_stablelm,
    &perta_cohere, &perta_cohere2, &perta_nemotron,
    &perta_gpt2, &perta_opt, &perta_bloom, &perta_falcon,
    &perta_deepseek_v2, &perta_deepseek_v3, &perta_glm4_moe_lite, &perta_youtu, &perta_minicpm3,
    &perta_gemma, &perta_gemma2, &perta_gemma3, &perta_vaultgemma,
    &perta_olmo, &perta_olmo2, &perta_olmo3, &perta_exaone4, &perta_granite,
    &perta_granite_swa,
};
/* clang-format on */
const size_t perta_n_families = sizeof perta_families / sizeof *perta_families;

/* ---- spelling ---- */

/* How many letters are added, left out or replaced between two names (Levenshtein), or a larger
 * number than most. */
static int distance(const char *a, const char *b, int most)
{
    if (!*a || !*b || most < 0)
        return (int)(strlen(a) + strlen(b));
    if (tolower((unsigned char)*a) == tolower((unsigned char)*b))
        return distance(a + 1, b + 1, most);
    int replaced = distance(a + 1, b + 1, most - 1), added = distance(a, b + 1, most - 1),
        left_out = distance(a + 1, b, most - 1);
    int least = added < left_out ? added : left_out;
    return 1 + (replaced < least ? replaced : least);
}

const char *perta_family_nearest(const char *architecture, const char *model_type)
{
    const char *name = architecture ? architecture : model_type;
    const int most = strlen(name) > 5 ? 2 : 1;
    int least = most + 1;
    const char *nearest = NULL;
    for (size_t i = 0; i < perta_n_families; i++) {
        const struct perta_family *family = perta_families[i];
        const char *other = architecture ? family->architecture : family->model_type;
        int d = distance(name, other, most);
        if (d < least) {
            least = d;
            nearest = other;
        }
    }
    return nearest;
}

/* ---- rows ---- */

static bool has(const struct perta_llm *llm, uint32_t layer, const struct perta_param_row *row)
{
    uint32_t of_layer = layer == PERTA_ANY_LAYER    ? llm->any_layer
                        : layer < PERTA_MOST_LAYERS ? llm->layers[layer]
                                                    : 0;
    return !(row->when & ~(llm->options | of_layer));
}

const struct perta_param_row *perta_llm_param(const struct perta_llm *llm, uint32_t layer,
                                              enum perta_param param)
{
    const struct perta_family *family = llm->family;
    for (size_t i = 0; i < family->n_params; i++)
        if (family->params[i].param == param && has(llm, layer, &family->params[i]))
            return &family->params[i];
    return NULL;
}

static size_t width_of(const struct perta_llm *llm, enum perta_width width)
{
    const size_t queries = (size_t)llm->n_heads * llm->head_dim;
    const size_t keys = (size_t)llm->n_kv_heads * llm->head_dim;
    const size_t values = (size_t)llm->n_kv_heads * llm->value_dim;
    const size_t of[PERTA_N_WIDTHS] = {
        [PERTA_WIDTH_HIDDEN] = llm->hidden,
        [PERTA_WIDTH_INTERMEDIATE] = llm->intermediate,
        [PERTA_WIDTH_GATE_UP] = 2 * (size_t)llm->intermediate,
        [PERTA_WIDTH_QUERIES] = queries,
        [PERTA_WIDTH_KEYS] = keys,
        [PERTA_WIDTH_VALUES] = values,
        [PERTA_WIDTH_QKV] = queries + keys + values,
        [PERTA_WIDTH_ATTENDED] = (size_t)llm->n_heads * llm->value_dim,
        [PERTA_WIDTH_HEAD] = llm->head_dim,
        [PERTA_WIDTH_HEADS] = llm->n_heads,
        [PERTA_WIDTH_Q_LORA] = llm->q_lora,
        [PERTA_WIDTH_KV_LORA] = llm->kv_lora,
        [PERTA_WIDTH_KV_A] = (size_t)llm->kv_lora + llm->rotary_dim,
        [PERTA_WIDTH_KV_B] =
            (size_t)llm->n_heads * (llm->head_dim - llm->rotary_dim + llm->value_dim),
        [PERTA_WIDTH_EXPERTS] = llm->n_experts,
        [PERTA_WIDTH_EXPERT] = llm->expert_intermediate,
        [PERTA_WIDTH_EXPERT_GATE_UP] = 2 * (size_t)llm->expert_intermediate,
        [PERTA_WIDTH_SHARED] = llm->shared_intermediate,
        [PERTA_WIDTH_SHARED_GATE_UP] = 2 * (size_t)llm->shared_intermediate,
        [PERTA_WIDTH_ONE] = 1,
        [PERTA_WIDTH_EACH_QUERY] = queries,
        [PERTA_WIDTH_EACH_KEY] = keys,
    };
    return of[width];
}

void perta_llm_shape(const struct perta_llm *llm, const struct perta_param_row *row, size_t *out,
                     size_t *in)
{
    *out = width_of(llm, row->out);
    *in = width_of(llm, row->in);
}

void perta_llm_stored(const struct perta_llm *llm, const struct perta_param_row *row, size_t *rows,
                      size_t *cols)
{
    if (row->transposed)
        perta_llm_shape(llm, row, cols, rows);
    else
        perta_llm_shape(llm, row, rows, cols);
}

size_t perta_llm_norm_width(const struct perta_llm *llm, const struct perta_param_row *row)
{
    size_t out, in;
    perta_llm_shape(llm, row, &out, &in);
    return perta_is_by_head(row) ? llm->head_dim : in;
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

/* Are all experts in one tensor? */
static bool is_together(const struct perta_param_row *row)
{
    return perta_is_of_expert(row->param) && !strstr(row->name, "%u");
}

const char *perta_llm_name(const struct perta_llm *llm, struct perta_site site,
                           const struct perta_param_row *row, char buf[PERTA_NAME_BYTES])
{
    int n = snprintf(buf, PERTA_NAME_BYTES, "%s.%u.", llm->names.layers, site.layer);
    const char *number = strstr(row->name, "%u");
    if (number)
        snprintf(buf + n, PERTA_NAME_BYTES - (size_t)n, "%.*s%u%s", (int)(number - row->name),
                 row->name, site.expert - 1, number + 2);
    else
        snprintf(buf + n, PERTA_NAME_BYTES - (size_t)n, "%s", row->name);
    return buf;
}

bool perta_llm_is_matrix(const struct perta_llm *llm, const char *name, size_t n_dims)
{
    size_t n = strlen(llm->names.layers);
    const char *of_layer =
        strncmp(name, llm->names.layers, n) || name[n] != '.' ? NULL : name + n + 1;
    of_layer = of_layer ? strchr(of_layer, '.') : NULL;
    for (size_t i = 0; of_layer && i < llm->family->n_params; i++) {
        const struct perta_param_row *row = &llm->family->params[i];
        if (row->out == PERTA_WIDTH_NONE && !strcmp(row->name, of_layer + 1))
            return false;
    }
    return n_dims >= 2;
}

uint64_t perta_llm_first(const struct perta_llm *llm, struct perta_site site,
                         const struct perta_param_row *row)
{
    size_t out, in;
    perta_llm_shape(llm, row, &out, &in);
    return is_together(row) ? (uint64_t)(site.expert - 1) * (out ? out : 1) * in : 0;
}

/* "base.name"; base may be empty. name NULL: "". */
static void join(char *to, size_t room, const char *base, const char *name)
{
    snprintf(to, room, "%s%s%s", name ? base : "", name && *base ? "." : "", name ? name : "");
}

void perta_llm_set_names(struct perta_llm *llm, const char *base, const char *head_base)
{
    const struct perta_family *family = llm->family;
    struct perta_llm_names *to = &llm->names;
    join(to->layers, sizeof to->layers, base, family->layers);
    join(to->embedding, sizeof to->embedding, base, family->embedding);
    join(to->final_norm, sizeof to->final_norm, base, family->final_norm);
    join(to->final_norm_bias, sizeof to->final_norm_bias, base, family->final_norm_bias);
    join(to->positions, sizeof to->positions, base, family->positions);
    join(to->embedding_norm, sizeof to->embedding_norm, base, family->embedding_norm);
    join(to->embedding_norm_bias, sizeof to->embedding_norm_bias, base,
         family->embedding_norm_bias);
    join(to->head, sizeof to->head, head_base, family->head);
    bool has_bias = !(llm->options & PERTA_NO_HEAD_BIAS);
    join(to->head_bias, sizeof to->head_bias, head_base, has_bias ? family->head_bias : NULL);
}

/* ---- all tensors ---- */

static int param_of_layer(const struct perta_llm *llm, uint32_t layer,
                          const struct perta_param_row *row, perta_tensor_fn *tensor, void *ctx,
                          struct perta_err *err)
{
    struct perta_tensor_shape shape = {0};
    size_t rows, cols;
    char name[PERTA_NAME_BYTES];
    bool apart = perta_is_of_expert(row->param) && !is_together(row);
    int rc = 0;
    perta_llm_stored(llm, row, &rows, &cols);
    if (perta_is_by_head(row)) {
        rows = cols / llm->head_dim;
        cols = llm->head_dim;
    }
    if (is_together(row))
        shape.dims[shape.n_dims++] = llm->n_experts;
    if (rows || row->out == PERTA_WIDTH_ROW)
        shape.dims[shape.n_dims++] = rows ? rows : 1;
    shape.dims[shape.n_dims++] = cols;
    for (uint32_t e = 0; e < (apart ? llm->n_experts : 1) && !rc; e++)
        rc = tensor(ctx, perta_llm_name(llm, perta_site_of_expert(layer, e), row, name), &shape,
                    err);
    return rc;
}

static int each_of_layer(const struct perta_llm *llm, uint32_t layer, perta_tensor_fn *tensor,
                         void *ctx, struct perta_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < llm->family->n_params && !rc; i++)
        if (has(llm, layer, &llm->family->params[i]))
            rc = param_of_layer(llm, layer, &llm->family->params[i], tensor, ctx, err);
    return rc;
}

int perta_llm_each(const struct perta_llm *llm, perta_tensor_fn *tensor, void *ctx,
                   struct perta_err *err)
{
    const struct perta_llm_names *names = &llm->names;
    const struct perta_tensor_shape vocabulary = {2, {llm->vocab, llm->hidden, 0}};
    const struct perta_tensor_shape vector = {1, {llm->hidden, 0, 0}},
                                    rows = {1, {llm->vocab, 0, 0}};
    const struct perta_tensor_shape positions = {
        2, {llm->n_positions + llm->position_offset, llm->hidden, 0}};
    int rc = tensor(ctx, names->embedding, &vocabulary, err);
    if (!rc && *names->positions)
        rc = tensor(ctx, names->positions, &positions, err);
    if (!rc && *names->embedding_norm)
        rc = tensor(ctx, names->embedding_norm, &vector, err);
    if (!rc && *names->embedding_norm_bias)
        rc = tensor(ctx, names->embedding_norm_bias, &vector, err);
    for (uint32_t l = 0; l < llm->n_layers && !rc; l++)
        rc = each_of_layer(llm, l, tensor, ctx, err);
    if (!rc && *names->final_norm)
        rc = tensor(ctx, names->final_norm, &vector, err);
    if (!rc && *names->final_norm_bias)
        rc = tensor(ctx, names->final_norm_bias, &vector, err);
    if (!rc && !llm->tied)
        rc = tensor(ctx, names->head, &vocabulary, err);
    return rc || !*names->head_bias ? rc : tensor(ctx, names->head_bias, &rows, err);
}
