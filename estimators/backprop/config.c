#include "estimators/backprop/config.h"

#include <math.h>
#include <string.h>

static const struct family {
    const char *architecture;
    bool qkv_bias, qk_norm, takes_bias_keys;
} families[] = {
    {"LlamaForCausalLM", false, false, true},
    {"MistralForCausalLM", false, false, false},
    {"Qwen2ForCausalLM", true, false, false},
    {"Qwen3ForCausalLM", false, true, true},
};

static const struct family *find_family(const json_t *config, const char **name)
{
    *name = json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    for (size_t i = 0; *name && i < sizeof families / sizeof *families; i++)
        if (!strcmp(*name, families[i].architecture))
            return &families[i];
    return NULL;
}

struct reader {
    const json_t *config;
    const char *path;
    struct perta_err *err;
    int rc;
};

/* A whole number from 1; fallback 0: the key must be there. null is as if it were not. */
static uint32_t get_count(struct reader *r, const char *key, uint32_t fallback)
{
    const json_t *value = json_object_get(r->config, key);
    if (!value || json_is_null(value)) {
        if (!fallback && !r->rc)
            r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: no \"%s\"", r->path, key);
        return fallback;
    }
    json_int_t n = json_integer_value(value);
    if (!json_is_integer(value) || n < 1 || n > INT32_MAX) {
        if (!r->rc)
            r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: \"%s\" is no whole number from 1",
                               r->path, key);
        return 1;
    }
    return (uint32_t)n;
}

static double get_number(struct reader *r, const json_t *object, const char *key, double fallback)
{
    const json_t *value = json_object_get(object, key);
    if (!value || json_is_null(value))
        return fallback;
    double x = json_number_value(value);
    if ((!json_is_number(value) || !((float)x > 0) || !isfinite((float)x)) && !r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: \"%s\" is no float32 above 0", r->path, key);
    return x;
}

static bool get_bool(const json_t *config, const char *key, bool fallback)
{
    const json_t *value = json_object_get(config, key);
    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

/* Older files have rope_theta and rope_scaling, newer ones rope_parameters with both. */
static void read_rope(struct reader *r, struct perta_rope *rope)
{
    const json_t *scaling = json_object_get(r->config, "rope_parameters");
    if (!json_is_object(scaling))
        scaling = json_object_get(r->config, "rope_scaling");
    rope->theta = get_number(r, r->config, "rope_theta", 10000.0);
    rope->theta = get_number(r, scaling, "rope_theta", rope->theta);
    const char *kind = json_string_value(json_object_get(scaling, "rope_type"));
    if (!kind)
        kind = json_string_value(json_object_get(scaling, "type"));
    rope->factor = get_number(r, scaling, "factor", 1.0);
    rope->low_freq_factor = get_number(r, scaling, "low_freq_factor", 1.0);
    rope->high_freq_factor = get_number(r, scaling, "high_freq_factor", 4.0);
    rope->original_positions = get_number(
        r, scaling, "original_max_position_embeddings",
        get_number(r, r->config, "max_position_embeddings", 8192));
    if (!kind || !strcmp(kind, "default"))
        rope->kind = PERTA_ROPE_DEFAULT;
    else if (!strcmp(kind, "linear"))
        rope->kind = PERTA_ROPE_LINEAR;
    else if (!strcmp(kind, "llama3"))
        rope->kind = PERTA_ROPE_LLAMA3;
    else if (!r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: rope type \"%s\" is not supported; default, linear and llama3 "
                           "are",
                           r->path, kind);
    if (!r->rc && rope->kind == PERTA_ROPE_LLAMA3 &&
        !(rope->high_freq_factor > rope->low_freq_factor))
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"high_freq_factor\" is not above \"low_freq_factor\"", r->path);
}

/* Mistral: everywhere. Qwen: where use_sliding_window says so, from max_window_layers on. Where
 * the key is missing transformers has 4096; null is none. */
static void read_window(struct reader *r, bool qwen, struct perta_llm *llm)
{
    if (json_is_null(json_object_get(r->config, "sliding_window")) ||
        (qwen && !get_bool(r->config, "use_sliding_window", false)))
        return;
    llm->window = get_count(r, "sliding_window", 4096);
    const json_t *first = json_object_get(r->config, "max_window_layers");
    if (qwen && !(json_is_integer(first) && !json_integer_value(first)))
        llm->window_first = get_count(r, "max_window_layers", 28);
}

/* Newer files say it layer by layer: it must be the same. */
static void check_layer_types(struct reader *r, const struct perta_llm *llm)
{
    const json_t *types = json_object_get(r->config, "layer_types");
    for (size_t l = 0; l < json_array_size(types) && !r->rc; l++) {
        const char *type = json_string_value(json_array_get(types, l));
        bool window = perta_llm_window(llm, (uint32_t)l) != UINT32_MAX;
        if (!type || strcmp(type, window ? "sliding_attention" : "full_attention"))
            r->rc = perta_fail(r->err, PERTA_EINPUT,
                               "%s: \"layer_types\" %zu is %s, not what sliding_window and "
                               "max_window_layers make of it; that is not supported",
                               r->path, l, type ? type : "no string");
    }
}

static void check_sizes(struct reader *r, const struct perta_llm *llm)
{
    const char *act = json_string_value(json_object_get(r->config, "hidden_act"));
    if (r->rc)
        return;
    if (act && strcmp(act, "silu"))
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: hidden_act \"%s\"; only silu is supported",
                           r->path, act);
    else if (llm->n_heads % llm->n_kv_heads)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: %u attention heads cannot share %u key-value heads", r->path,
                           llm->n_heads, llm->n_kv_heads);
    else if (llm->head_dim % 2)
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: head_dim %u is odd", r->path,
                           llm->head_dim);
}

int perta_llm_parse(const json_t *config, const char *path, struct perta_llm *llm,
                    struct perta_err *err)
{
    const char *name;
    const struct family *family = find_family(config, &name);
    if (!family)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: architecture %s is not supported; LlamaForCausalLM, "
                          "MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are",
                          path, name ? name : "(none named)");
    struct reader r = {.config = config, .path = path, .err = err};
    *llm = (struct perta_llm){
        .n_layers = get_count(&r, "num_hidden_layers", 0),
        .hidden = get_count(&r, "hidden_size", 0),
        .intermediate = get_count(&r, "intermediate_size", 0),
        .vocab = get_count(&r, "vocab_size", 0),
        .n_heads = get_count(&r, "num_attention_heads", 0),
        .rms_eps = (float)get_number(&r, config, "rms_norm_eps", 1e-6),
        .tied = get_bool(config, "tie_word_embeddings", false),
        .qk_norm = family->qk_norm,
    };
    if (r.rc)
        return r.rc;
    bool bias = family->takes_bias_keys && get_bool(config, "attention_bias", false);
    llm->qkv_bias = bias || family->qkv_bias;
    llm->o_bias = bias;
    llm->mlp_bias = !strcmp(name, "LlamaForCausalLM") && get_bool(config, "mlp_bias", false);
    llm->n_kv_heads = get_count(&r, "num_key_value_heads", llm->n_heads);
    uint32_t head_dim = llm->hidden / llm->n_heads;
    llm->head_dim = get_count(&r, "head_dim", family->qk_norm ? 128 : head_dim ? head_dim : 1);
    read_rope(&r, &llm->rope);
    if (strcmp(name, "LlamaForCausalLM"))
        read_window(&r, !strncmp(name, "Qwen", 4), llm);
    if (!strncmp(name, "Qwen", 4)) /* the others have none */
        check_layer_types(&r, llm);
    check_sizes(&r, llm);
    return r.rc;
}

void perta_rope_frequencies(const struct perta_llm *llm, float *inv_freq)
{
    const struct perta_rope *rope = &llm->rope;
    const double pi = 3.14159265358979323846;
    for (uint32_t i = 0; i < llm->head_dim / 2; i++) {
        /* float32 step by step, as transformers has it */
        float exponent = (float)(2 * i) / (float)llm->head_dim;
        double f = (double)(1.0f / powf((float)rope->theta, exponent));
        if (rope->kind == PERTA_ROPE_LINEAR)
            f /= rope->factor;
        if (rope->kind == PERTA_ROPE_LLAMA3) {
            double wavelength = 2 * pi / f;
            double low = rope->original_positions / rope->low_freq_factor;
            double high = rope->original_positions / rope->high_freq_factor;
            double smooth = (rope->original_positions / wavelength - rope->low_freq_factor) /
                            (rope->high_freq_factor - rope->low_freq_factor);
            if (wavelength > low)
                f /= rope->factor;
            else if (wavelength >= high)
                f = (1 - smooth) * f / rope->factor + smooth * f;
        }
        inv_freq[i] = (float)f;
    }
}
