#include "estimators/model/config_read.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "estimators/model/family.h"
#include "estimators/model/wrapper.h"
#include "io/format/naming.h"
#include "io/text.h"

/* ---- values ---- */

bool perta_config_has(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value);
}

void perta_config_refuse(struct perta_config_reader *r, const char *key, const char *what)
{
    const char *of = r->within;
    if (!r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: %s%s%s\"%s\" %s", r->path, of ? "\"" : "",
                           of ? of : "", of ? "\": " : "", key, what);
}

uint32_t perta_config_count(struct perta_config_reader *r, const char *key, uint32_t fallback)
{
    const json_t *value = json_object_get(r->config, key);
    if (!perta_config_has(r->config, key)) {
        if (!fallback && !r->rc)
            r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: no \"%s\"", r->path, key);
        return fallback ? fallback : 1;
    }
    json_int_t n = json_integer_value(value);
    if (json_is_integer(value) && n >= 1 && n <= INT32_MAX)
        return (uint32_t)n;
    perta_config_refuse(r, key, "is not a whole number from 1");
    return 1;
}

double perta_config_number(struct perta_config_reader *r, const json_t *object, const char *key,
                           double fallback)
{
    const json_t *value = json_object_get(object, key);
    if (!value && fallback > 0)
        return fallback;
    double x = json_number_value(value);
    const char *within = r->within;
    r->within = object == r->config ? NULL : within;
    if (!value)
        perta_config_refuse(r, key, "is needed here, and missing");
    else if (!json_is_number(value) || !((float)x > 0) || !isfinite((float)x))
        perta_config_refuse(r, key, "is not a float32 above 0");
    r->within = within;
    return x;
}

uint32_t perta_config_whole(struct perta_config_reader *r, const char *key, uint32_t fallback)
{
    const json_t *value = json_object_get(r->config, key);
    json_int_t n = json_integer_value(value);
    if (!perta_config_has(r->config, key))
        return fallback;
    if (json_is_integer(value) && n >= 0 && n <= INT32_MAX)
        return (uint32_t)n;
    perta_config_refuse(r, key, "is not a whole number from 0");
    return fallback;
}

bool perta_config_flag(struct perta_config_reader *r, const char *key, bool fallback)
{
    return json_object_get(r->config, key) ? perta_config_bool(r, key) : fallback;
}

void perta_config_only(struct perta_config_reader *r, const char *key, const char *value)
{
    char what[128];
    json_t *only = json_loads(value, JSON_DECODE_ANY, NULL);
    const json_t *have = json_object_get(r->config, key);
    bool same = json_is_number(only)
                    ? json_is_number(have) && json_number_value(have) == json_number_value(only)
                    : json_equal(have, only);
    json_decref(only);
    snprintf(what, sizeof what, "is not %s; nothing else is supported", value);
    if (perta_config_has(r->config, key) && !same)
        perta_config_refuse(r, key, what);
}

float perta_config_optional(struct perta_config_reader *r, const char *key, double fallback)
{
    if (!json_object_get(r->config, key))
        return (float)fallback;
    return perta_config_has(r->config, key) ? (float)perta_config_number(r, r->config, key, 0) : 0;
}

bool perta_config_bool(struct perta_config_reader *r, const char *key)
{
    const json_t *value = json_object_get(r->config, key);
    if (perta_config_has(r->config, key) && !json_is_boolean(value))
        perta_config_refuse(r, key, "is neither true nor false");
    return json_is_true(value);
}

/* ---- which model it is ---- */

static const struct perta_family *find_type(const char *type)
{
    for (size_t i = 0; type && i < perta_n_families; i++)
        if (!strcmp(type, perta_families[i]->model_type) ||
            (perta_families[i]->other_type && !strcmp(type, perta_families[i]->other_type)))
            return perta_families[i];
    return NULL;
}

/* Also accepts the spelling of the first checkpoints (LLaMAForCausalLM), and the prefix that FSDP2
 * adds. */
static bool is_named(const struct perta_family *family, const char *name)
{
    return !strcasecmp(strncmp(name, "FSDP", 4) ? name : name + 4, family->architecture);
}

/* Does a config that names the family by its model_type call it so? */
static bool is_called(const struct perta_family *family, const char *name)
{
    return is_named(family, name) || (family->saved_as && !strcmp(name, family->saved_as));
}

static const struct perta_family *find_architecture(const char *name)
{
    for (size_t i = 0; name && i < perta_n_families; i++)
        if (is_named(perta_families[i], name))
            return perta_families[i];
    return NULL;
}

const struct perta_family *perta_config_family(const json_t *config)
{
    const json_t *names = json_object_get(config, "architectures");
    const char *type = json_string_value(json_object_get(config, "model_type"));
    const struct perta_family *family = find_type(type);
    return family ? family : find_architecture(json_string_value(json_array_get(names, 0)));
}

/* What to tell about an unsupported architecture, from its name and its config. */
static const char *why_not(const json_t *config, const char *name)
{
    static const char *const parts[] = {"vision_config", "audio_config", "text_config"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (json_is_object(json_object_get(config, parts[i])))
            return ". This is a wrapper, as for images or sound, around a language model: save "
                   "that alone as a checkpoint (its text model, with its head)";
    if (perta_text_ends_in(name, "ForConditionalGeneration"))
        return ". This is a wrapper around a language model, or has an encoder beside its "
               "decoder; what is supported are language models alone";
    if (perta_text_ends_in(name, "ForMaskedLM") || perta_text_ends_in(name, "ForPreTraining"))
        return ". This is an encoder, which does not predict the next token";
    if (perta_text_ends_in(name, "Classification") ||
        perta_text_ends_in(name, "ForQuestionAnswering") ||
        perta_text_ends_in(name, "ForMultipleChoice") || strstr(name, "Reward"))
        return ". This has another head than a language model's, so there is no loss of its "
               "next token";
    if (perta_text_ends_in(name, "Model") && !perta_text_ends_in(name, "LMHeadModel"))
        return ". This is a model without a head, or an encoder, so there is no loss; a "
               "language model is saved with its head by AutoModelForCausalLM";
    if (json_object_get(config, "auto_map"))
        return ". It comes with code of its own (\"auto_map\"), which is not run";
    return "";
}

/* The entry of "architectures" that belongs to family, otherwise the first one. NULL if none is
 * named. */
static const char *choose_architecture(struct perta_config_reader *r,
                                       const struct perta_family *family)
{
    const json_t *names = json_object_get(r->config, "architectures");
    if (perta_config_has(r->config, "architectures") && !json_is_array(names))
        perta_config_refuse(r, "architectures", "is not a list of names");
    for (size_t i = 0; i < json_array_size(names); i++) {
        const char *name = json_string_value(json_array_get(names, i));
        if (!name)
            perta_config_refuse(r, "architectures", "is not a list of names");
        else if (family && is_called(family, name))
            return name;
    }
    return json_string_value(json_array_get(names, 0));
}

/* What is supported, for a refusal of an architecture or, without one, a model_type. NULL: neither
 * is named. */
static const char *list_families(const char *architecture, const char *type, char buf[256])
{
    const char *nearest = architecture || type ? perta_family_nearest(architecture, type) : NULL;
    snprintf(buf, 256, "`perta help families' lists those that are%s%s",
             nearest ? ". The nearest name there is " : "", nearest ? nearest : "");
    return buf;
}

/* transformers decides by model_type, others by architectures. They must not contradict each other;
 * one of them is enough. */
static const struct perta_family *find_family(struct perta_config_reader *r)
{
    const json_t *value = json_object_get(r->config, "model_type");
    const char *type = json_string_value(value);
    if (perta_config_has(r->config, "model_type") && !type)
        perta_config_refuse(r, "model_type", "is not a string");
    const struct perta_family *by_type = find_type(type);
    const char *name = choose_architecture(r, by_type);
    bool by_both = by_type && name && is_called(by_type, name);
    const struct perta_family *family = name && !by_both ? find_architecture(name) : by_type;
    char supported[256];
    list_families(name, type, supported);
    if (r->rc)
        return NULL;
    if (!name && !type)
        r->rc =
            perta_fail(r->err, PERTA_EINPUT, "%s: architecture (none named) is not supported; %s",
                       r->path, supported);
    else if (!family && name && perta_config_missing(name))
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: architecture %s is not supported: it has %s",
                           r->path, name, perta_config_missing(name));
    else if (!family && by_type && !*why_not(r->config, name))
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: architecture %s is not supported; %s. \"model_type\" says %s; if "
                           "the model is one, write %s under \"architectures\"",
                           r->path, name, supported, type, by_type->architecture);
    else if (!family)
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: %s %s is not supported; %s%s", r->path,
                           name ? "architecture" : "\"model_type\"", name ? name : type, supported,
                           why_not(r->config, name ? name : ""));
    else if (type && by_type != family)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"model_type\" %s is not that of %s, which \"architectures\" "
                           "names; write %s there if it is one",
                           r->path, type, name, family->model_type);
    return r->rc ? NULL : family;
}

/* ---- windows ---- */

static void set_windowed(struct perta_llm *llm, uint32_t layer)
{
    llm->layers[layer] |= PERTA_LAYER_WINDOW;
}

/* Older files say "attention" for full_attention. */
static void read_layer_type(struct perta_config_reader *r, const char *type, uint32_t layer,
                            struct perta_llm *llm)
{
    bool window = type && !strcmp(type, "sliding_attention");
    if (window && llm->window)
        set_windowed(llm, layer);
    else if (!r->rc &&
             (window || !type || (strcmp(type, "full_attention") && strcmp(type, "attention"))))
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: \"layer_types\" %u is %s; %s", r->path, layer,
                           type ? type : "no string",
                           window ? "but there is no sliding window here (\"sliding_window\", "
                                    "and what switches it on)"
                                  : "full_attention and sliding_attention are supported");
}

void perta_config_layer_types(struct perta_config_reader *r, struct perta_llm *llm)
{
    const json_t *types = json_object_get(r->config, "layer_types");
    if (!json_is_array(types))
        perta_config_refuse(r, "layer_types", "is not a list");
    for (uint32_t l = 0; l < json_array_size(types) && l < llm->n_layers; l++)
        read_layer_type(r, json_string_value(json_array_get(types, l)), l, llm);
    if (json_array_size(types) != llm->n_layers && !r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"layer_types\" has %zu entries, \"num_hidden_layers\" is %u",
                           r->path, json_array_size(types), llm->n_layers);
}

/* max_window_layers; fallback if the key is missing. */
static uint32_t read_window_layers(struct perta_config_reader *r, uint32_t fallback)
{
    const json_t *first = json_object_get(r->config, "max_window_layers");
    json_int_t n = json_integer_value(first);
    if (!perta_config_has(r->config, "max_window_layers"))
        return fallback;
    if (!json_is_integer(first))
        perta_config_refuse(r, "max_window_layers", "is not a whole number");
    return n < 0 ? 0 : n > INT32_MAX ? INT32_MAX : (uint32_t)n;
}

/* Without layer_types. Defaults of max_window_layers are transformers'. */
static void window_layers(struct perta_config_reader *r, const struct perta_family *family,
                          struct perta_llm *llm)
{
    uint32_t first = 0, end = llm->n_layers, step = 1;
    if (llm->window && family->windows == PERTA_WINDOWS_QWEN)
        first = read_window_layers(r, 28);
    if (llm->window && family->windows == PERTA_WINDOWS_UPPER)
        first = read_window_layers(r, 62);
    if (llm->window && family->windows == PERTA_WINDOWS_ALTERNATE) {
        end = read_window_layers(r, 28);
        step = 2;
    }
    for (uint32_t l = first; llm->window && l < llm->n_layers && l < end; l += step)
        set_windowed(llm, l);
}

void perta_config_windows(struct perta_config_reader *r, struct perta_llm *llm, uint32_t every)
{
    const json_t *size = json_object_get(r->config, "sliding_window");
    llm->window = json_is_null(size) ? 0 : perta_config_count(r, "sliding_window", 4096);
    if (perta_config_has(r->config, "layer_types")) {
        perta_config_layer_types(r, llm);
        return;
    }
    if (!llm->window)
        perta_config_refuse(r, "sliding_window", "is null, and there are no \"layer_types\"");
    for (uint32_t l = 0; l < llm->n_layers; l++)
        if ((l + 1) % every)
            set_windowed(llm, l);
}

/* If sliding_window is missing, transformers uses 4096; null means no window. For a Mistral with
 * layer_types it uses Ministral, a Mistral that respects them. */
static void read_windows(struct perta_config_reader *r, const struct perta_family *family,
                         struct perta_llm *llm)
{
    const json_t *types = json_object_get(r->config, "layer_types");
    const json_t *size = json_object_get(r->config, "sliding_window");
    if (size && !json_is_null(size) && !json_is_integer(size))
        perta_config_refuse(r, "sliding_window", "is not a whole number");
    bool switched = family->windows == PERTA_WINDOWS_QWEN ||
                    family->windows == PERTA_WINDOWS_SWITCHED ||
                    family->windows == PERTA_WINDOWS_ALTERNATE;
    if (!json_is_null(size) && (!switched || perta_config_bool(r, "use_sliding_window")))
        llm->window = perta_config_count(r, "sliding_window", 4096);
    if (family->windows == PERTA_WINDOWS_NONE || (family->windows == PERTA_WINDOWS_ASKED && !size))
        llm->window = 0;
    if (r->rc)
        return;
    if (types && !json_is_null(types)) {
        if (!strcmp(family->model_type, "mistral") && !perta_config_has(r->config, "model_type"))
            perta_config_refuse(r, "layer_types",
                                "is respected by some readers and ignored by "
                                "others without \"model_type\"; write mistral "
                                "there");
        bool all =
            family->windows == PERTA_WINDOWS_ASKED || family->windows == PERTA_WINDOWS_SWITCHED;
        if (all && llm->window)
            perta_config_refuse(r, "layer_types", "is ignored here: all layers have the window");
        perta_config_layer_types(r, llm);
        return;
    }
    window_layers(r, family, llm);
}

/* ---- the rest ---- */

/* The embedding's padding_idx; a negative one counts from the end. */
static void read_pad(struct perta_config_reader *r, const struct perta_family *family,
                     struct perta_llm *llm)
{
    const json_t *value = json_object_get(r->config, "pad_token_id");
    json_int_t n = value ? json_integer_value(value) : (json_int_t)family->pad - 1;
    json_int_t vocab = llm->vocab;
    llm->pad = PERTA_NO_PAD;
    if (family->no_padding || (value ? json_is_null(value) : !family->pad))
        return;
    if ((value && !json_is_integer(value)) || n >= vocab || n < -vocab)
        perta_config_refuse(r, "pad_token_id",
                            "is not a token of the vocabulary (\"vocab_size\"), nor null");
    else
        llm->pad = (uint32_t)(n < 0 ? n + vocab : n);
}

/* The name of a key in this family's config.json. */
static const char *key_or(const char *own, const char *usual)
{
    return own ? own : usual;
}

static void read_activation(struct perta_config_reader *r, const struct perta_family *family,
                            struct perta_llm *llm)
{
    const char *key = key_or(family->keys.act, "hidden_act");
    const json_t *value = *key ? json_object_get(r->config, key) : NULL;
    const char *act = value ? json_string_value(value) : family->act ? family->act : "silu";
    bool known = perta_activation_named(act, &llm->activation);
    if (r->rc)
        return;
    if (!act)
        perta_config_refuse(r, key, "is not a string, such as \"silu\"");
    else if (!known)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: %s \"%s\" is not supported; silu, gelu, relu and others like them "
                           "are",
                           r->path, key, act);
}

/* Does any layer have rotary positions? */
static bool is_rotated(const struct perta_llm *llm)
{
    uint32_t l = 0;
    while (l < llm->n_layers && llm->layers[l] & PERTA_LAYER_UNROTATED)
        l++;
    return l < llm->n_layers;
}

static void check_sizes(struct perta_config_reader *r, const struct perta_llm *llm)
{
    if (r->rc)
        return;
    if (llm->n_heads % llm->n_kv_heads)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: %u attention heads cannot share %u key-value heads", r->path,
                           llm->n_heads, llm->n_kv_heads);
    else if (is_rotated(llm) && (llm->rotary_dim ? llm->rotary_dim % 2 : llm->head_dim % 2))
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: %s %u is odd", r->path,
                           llm->rotary_dim ? "qk_rope_head_dim" : "head_dim",
                           llm->rotary_dim ? llm->rotary_dim : llm->head_dim);
}

/* A size whose key is the family's own. Many families of transformers take the usual key for it,
 * too. */
static uint32_t read_size(struct perta_config_reader *r, const char *own, const char *usual,
                          uint32_t fallback)
{
    const char *key = key_or(own, usual);
    if (!own)
        return perta_config_count(r, usual, fallback);
    if (!perta_config_has(r->config, own) && perta_config_has(r->config, usual))
        key = usual;
    uint32_t n = perta_config_count(r, key, fallback);
    if (perta_config_has(r->config, usual) && perta_config_count(r, usual, 1) != n)
        perta_config_refuse(r, usual, "is another size than another key gives");
    return n;
}

static uint32_t read_intermediate(struct perta_config_reader *r, const struct perta_family *family,
                                  uint32_t hidden)
{
    const char *key = family->keys.intermediate;
    uint64_t usual = (uint64_t)family->intermediate * hidden;
    uint32_t fallback = usual <= INT32_MAX ? (uint32_t)usual : 1;
    if (usual > INT32_MAX)
        perta_config_refuse(r, key_or(family->keys.hidden, "hidden_size"), "is too large");
    return key && !*key ? fallback : read_size(r, key, "intermediate_size", fallback);
}

static float read_norm_eps(struct perta_config_reader *r, const struct perta_family *family)
{
    const char *key = key_or(family->keys.norm_eps, "rms_norm_eps");
    double fallback = family->norm_eps > 0 ? family->norm_eps : 1e-6;
    return (float)(*key ? perta_config_number(r, r->config, key, fallback) : fallback);
}

static uint32_t read_layers(struct perta_config_reader *r, const struct perta_family *family)
{
    const char *key = key_or(family->keys.layers, "num_hidden_layers");
    uint32_t n = read_size(r, family->keys.layers, "num_hidden_layers", 0);
    if (n > PERTA_MOST_LAYERS)
        perta_config_refuse(r, key, "is above 1024, which is not supported");
    return n > PERTA_MOST_LAYERS ? 1 : n;
}

static uint32_t read_kv_heads(struct perta_config_reader *r, const struct perta_family *family,
                              uint32_t n_heads)
{
    const char *key = key_or(family->keys.kv_heads, "num_key_value_heads");
    if (!*key)
        return n_heads;
    bool missing = !json_object_get(r->config, key);
    return perta_config_count(r, key, missing && family->n_kv_heads ? family->n_kv_heads : n_heads);
}

static uint32_t read_head_dim(struct perta_config_reader *r, const struct perta_family *family,
                              const struct perta_llm *llm)
{
    uint32_t head_dim = llm->hidden / llm->n_heads;
    bool qwen = family->windows == PERTA_WINDOWS_QWEN;
    bool null = json_is_null(json_object_get(r->config, "head_dim"));
    if (qwen && null)
        perta_config_refuse(r, "head_dim", "is null, which is not a number; leave it out");
    return perta_config_count(r, "head_dim",
                              family->head_dim && !null ? family->head_dim
                              : head_dim                ? head_dim
                                                        : 1);
}

static bool read_tied(struct perta_config_reader *r, const struct perta_family *family)
{
    const char *const key = "tie_word_embeddings";
    return json_object_get(r->config, key) ? perta_config_bool(r, key) : family->tied;
}

static uint32_t read_options(struct perta_config_reader *r, const struct perta_family *family)
{
    uint32_t options = family->options | PERTA_EXPERTS_APART;
    if (family->reads_attention_bias && perta_config_bool(r, "attention_bias"))
        options |= PERTA_QKV_HAS_BIAS | PERTA_O_HAS_BIAS;
    if (family->reads_mlp_bias && perta_config_bool(r, "mlp_bias"))
        options |= PERTA_MLP_HAS_BIAS;
    return options;
}

uint32_t perta_config_experts(struct perta_config_reader *r, const char *key, uint32_t fallback)
{
    const char *const other = "num_local_experts";
    bool has_key = perta_config_has(r->config, key), has_other = perta_config_has(r->config, other);
    uint32_t n = perta_config_count(r, has_key || !has_other ? key : other, fallback);
    if (has_key && has_other && perta_config_count(r, other, 1) != n)
        perta_config_refuse(r, other, "is another number of experts than another key gives");
    return n;
}

void perta_config_mixture(struct perta_llm *llm, uint32_t layer, bool is)
{
    llm->layers[layer] &= ~(uint32_t)(PERTA_LAYER_DENSE | PERTA_LAYER_MIXTURE);
    llm->layers[layer] |= is ? PERTA_LAYER_MIXTURE : PERTA_LAYER_DENSE;
}

static void read_sizes(struct perta_config_reader *r, const struct perta_family *family,
                       struct perta_llm *llm)
{
    const struct perta_config_keys *keys = &family->keys;
    *llm = (struct perta_llm){
        .family = family,
        .n_layers = read_layers(r, family),
        .hidden = read_size(r, keys->hidden, "hidden_size", 0),
        .vocab = perta_config_count(r, "vocab_size", 0),
        .n_heads = read_size(r, keys->heads, "num_attention_heads", 0),
        .norm_eps = read_norm_eps(r, family),
        .tied = read_tied(r, family),
        .options = read_options(r, family),
        .embedding_multiplier = 1,
        .residual_multiplier = 1,
        .logit_multiplier = 1,
    };
    llm->intermediate = read_intermediate(r, family, llm->hidden);
    llm->n_kv_heads = read_kv_heads(r, family, llm->n_heads);
    llm->head_dim = llm->value_dim = read_head_dim(r, family, llm);
    for (uint32_t l = 0; l < llm->n_layers; l++)
        llm->layers[l] = PERTA_LAYER_DENSE;
}

void perta_config_unrotated(struct perta_llm *llm)
{
    for (uint32_t l = 0; l < llm->n_layers; l++)
        llm->layers[l] |= PERTA_LAYER_UNROTATED;
}

/* Latent attention multiplies its scores by the square of yarn's mscale for all dimensions, too. */
static void scale_latent(struct perta_llm *llm)
{
    const struct perta_rope *rope = &llm->ropes[0];
    double all = rope->mscale_all_dim;
    double mscale = all > 0 ? perta_rope_mscale(rope->factor, all) : 1;
    llm->attention_scale = (float)(mscale * mscale / sqrt((double)llm->head_dim));
}

static void check_mixture(struct perta_config_reader *r, const struct perta_llm *llm)
{
    struct perta_err why = {0};
    if (perta_router_check(&llm->router, &why))
        r->rc = perta_fail(r->err, PERTA_EINPUT, "%s: %s", r->path, why.msg);
}

/* The language model's config. family NULL: the one that it names. */
static int parse(const json_t *config, const char *path, const struct perta_family *family,
                 struct perta_llm *llm, struct perta_err *err)
{
    struct perta_config_reader r = {.config = config, .path = path, .err = err};
    *llm = (struct perta_llm){0};
    if (!json_is_object(config))
        return perta_fail(err, PERTA_EINPUT, "%s: no JSON object", path);
    family = family ? family : find_family(&r);
    if (!family)
        return r.rc;
    r.family = family;
    read_sizes(&r, family, llm);
    if (family->windows != PERTA_WINDOWS_OWN)
        read_windows(&r, family, llm);
    read_pad(&r, family, llm);
    read_activation(&r, family, llm);
    if (family->read && !r.rc)
        family->read(&r, llm);
    if (is_rotated(llm))
        perta_config_rope(&r, &family->rope, family->max_positions,
                          llm->rotary_dim ? llm->rotary_dim : llm->head_dim, llm->ropes);
    if (llm->kv_lora)
        scale_latent(llm);
    check_sizes(&r, llm);
    perta_config_refuse_keys(&r);
    for (uint32_t l = 0; l < llm->n_layers; l++)
        llm->any_layer |= llm->layers[l];
    if (!(llm->any_layer & PERTA_LAYER_MIXTURE))
        llm->n_experts = 0;
    else if (!r.rc)
        check_mixture(&r, llm);
    perta_llm_set_names(llm, family->base, "");
    return r.rc;
}

/* A language model within another model. */
static int parse_within(const struct perta_wrapper *wrapper, const json_t *config, const char *path,
                        struct perta_llm *llm, struct perta_err *err)
{
    struct perta_config_reader r = {.config = config, .path = path, .err = err};
    const json_t *type = json_object_get(config, "model_type");
    json_t *text = perta_wrapper_text(wrapper, config);
    const char *text_type = json_string_value(json_object_get(text, "model_type"));
    char *within = NULL;
    if (type && (!json_is_string(type) || strcmp(json_string_value(type), wrapper->model_type)))
        r.rc = perta_fail(err, PERTA_EINPUT, "%s: \"model_type\" is not that of %s (%s)", path,
                          wrapper->architecture, wrapper->model_type);
    else if (!text)
        r.rc = perta_fail(err, PERTA_EINPUT,
                          "%s: no \"text_config\", which says what its "
                          "language model is",
                          path);
    else if (wrapper->is_fixed && (!text_type || strcmp(text_type, wrapper->text_type)))
        r.rc = perta_fail(err, PERTA_EINPUT,
                          "%s: \"text_config\": \"model_type\" is not %s, the text model of %s",
                          path, wrapper->text_type, wrapper->architecture);
    else if (asprintf(&within, "%s: in \"text_config\"", path) < 0)
        r.rc = perta_fail_sys(err, ENOMEM, "%s", path);
    perta_config_bool(&r, "tie_word_embeddings");
    if (!r.rc)
        r.rc = parse(text, json_object_get(config, "text_config") ? within : path, wrapper->text,
                     llm, err);
    if (!r.rc && wrapper->has_own_head &&
        (llm->logit_softcap > 0 || llm->logit_multiplier != 1 || llm->family->head_bias))
        r.rc = perta_fail(err, PERTA_EINPUT,
                          "%s: its logits are scaled, capped or have a bias, which transformers "
                          "does not do within %s",
                          within, wrapper->architecture);
    if (!r.rc && strcmp(llm->family->base, "model"))
        r.rc = perta_fail(err, PERTA_EINPUT, "%s: a %s within a %s is not supported", path,
                          llm->family->model_type, wrapper->architecture);
    llm->wrapper = wrapper;
    llm->tied = perta_is_tied_by(config);
    json_decref(text);
    free(within);
    return r.rc;
}

int perta_llm_parse(const json_t *config, const char *path, struct perta_llm *llm,
                    struct perta_err *err)
{
    const struct perta_wrapper *wrapper = perta_wrapper_find(config);
    return wrapper ? parse_within(wrapper, config, path, llm, err)
                   : parse(config, path, NULL, llm, err);
}
