#include "estimators/edit/adapter_config.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/adapter.h"
#include "io/text.h"

static int refuse_key(const struct perta_adapter_config *c, const char *key, const char *why,
                      struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s/" PERTA_ADAPTER_CONFIG ": %.200s: %s", c->path, key,
                      why);
}

/* Is the key used? Its value is not null, false, or an empty string, list or object. */
static bool is_set(const json_t *value)
{
    return value && !json_is_null(value) && !json_is_false(value) &&
           !(json_is_string(value) && !json_string_length(value)) &&
           !((json_is_array(value) && !json_array_size(value)) ||
             (json_is_object(value) && !json_object_size(value)));
}

/* A config object of one of these kinds selects that kind, even if it is empty and all its keys
 * have their defaults. */
static bool is_kind(const struct perta_adapter_config *c, const char *key)
{
    static const char *const kinds[] = {"use_bdlora", "arrow_config", "monteclora_config",
                                        "kasa_config"};
    bool found = false;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        found |= !strcmp(key, kinds[i]);
    return found && json_is_object(json_object_get(c->json, key));
}

#define NOT_SUPPORTED                                                        \
    "is set, which perta does not support; merge the adapter into its base " \
    "(merge_and_unload, save_pretrained) and use that model"

/* Refuse settings that change the result in a way that A, B and scaling do not describe. */
static int refuse_kinds(const struct perta_adapter_config *c, struct perta_err *err)
{
    static const char *const refused[] = {
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "lora_bias",
        "arrow_config",
        "layer_replication",
        "alora_invocation_tokens",
        "monteclora_config",
        "kasa_config",
        "megatron_config",
        "trainable_token_indices",
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (is_set(json_object_get(c->json, refused[i])) || is_kind(c, refused[i]))
            return refuse_key(c, refused[i], NOT_SUPPORTED, err);
    return 0;
}

int perta_adapter_config_plain(const struct perta_adapter_config *c, struct perta_err *err)
{
    const char *const key = "fan_in_fan_out";
    return is_set(json_object_get(c->json, key)) ? refuse_key(c, key, NOT_SUPPORTED, err) : 0;
}

/* Some initialisations move part of the base model into A and B. Then scaling * (B A) is not the
 * whole difference between the tuned model and the base. */
static int check_init(const struct perta_adapter_config *c, struct perta_err *err)
{
    static const char *const plain[] = {"gaussian", "eva", "orthogonal"};
    const json_t *init = json_object_get(c->json, "init_lora_weights");
    if (!init || json_is_null(init) || json_is_boolean(init))
        return 0;
    const char *name = json_string_value(init);
    for (size_t i = 0; name && i < sizeof plain / sizeof *plain; i++)
        if (!strcmp(name, plain[i]))
            return 0;
    return refuse_key(
        c, "init_lora_weights",
        "an initialisation that changes the base model too; save the adapter with "
        "path_initial_model_for_weight_conversion, which converts it to a plain LoRA, "
        "or merge it",
        err);
}

/* transformers writes patterns for the parameters of experts that begin with "anything and a dot",
 * which PEFT's own match begins with, too. */
static const char *bare_pattern(const char *text)
{
    static const char any[] = ".*\\.";
    return strncmp(text, any, strlen(any)) ? text : text + strlen(any);
}

/* Is text a module name, in which a dot matches any character, optionally with ^ before it or $
 * after it? No other regular expressions are supported. */
static bool is_name_pattern(const char *text)
{
    text = bare_pattern(text);
    text += *text == '^';
    bool has_text = false;
    for (; *text; text++) {
        if (*text == '$' && !text[1])
            break;
        if (*text == '\\' && text[1] == '.')
            text++;
        if (!isalnum((unsigned char)*text) && !strchr("_-/.", *text))
            return false;
        has_text = true;
    }
    return has_text;
}

/* Matches like PEFT: re.match(rf"(.*\.)?({pattern})$", module), where module has m characters. */
static bool pattern_matches(const char *pattern, const char *module, size_t m)
{
    const char *bare = bare_pattern(pattern);
    bool needs_dot = bare != pattern, from_start = *bare == '^';
    size_t n = 0;
    pattern = bare;
    pattern += from_start;
    for (const char *p = pattern; *p && *p != '$'; p++)
        n += *p != '\\';
    if (n > m || (needs_dot && n == m) || (from_start && n < m) ||
        (n < m && module[m - n - 1] != '.'))
        return false;
    for (const char *p = pattern, *q = module + m - n; q < module + m; p++, q++) {
        bool literal = *p == '\\';
        p += literal;
        if (*p != *q && (literal || *p != '.'))
            return false;
    }
    return true;
}

static const json_t *pattern_find(const json_t *patterns, const char *module, size_t m)
{
    const char *pattern;
    json_t *value;
    json_object_foreach ((json_t *)patterns, pattern, value) {
        if (pattern_matches(pattern, module, m))
            return value;
    }
    return NULL;
}

static bool is_rank(const json_t *value)
{
    return json_is_integer(value) && json_integer_value(value) > 0;
}

static bool is_alpha(const json_t *value)
{
    return json_is_number(value) && isfinite(json_number_value(value));
}

#define RANK_TEXT "a whole number of at least 1 is needed"
#define ALPHA_TEXT "a number is needed"

static int get_patterns(const struct perta_adapter_config *c, const char *key,
                        bool (*is_good)(const json_t *value), const char *why, const json_t **out,
                        struct perta_err *err)
{
    json_t *patterns = json_object_get(c->json, key), *value;
    const char *pattern;
    *out = NULL;
    if (!is_set(patterns))
        return 0;
    if (!json_is_object(patterns))
        return refuse_key(c, key, "not an object", err);
    json_object_foreach (patterns, pattern, value) {
        if (!is_name_pattern(pattern))
            return perta_fail(err, PERTA_EINPUT,
                              "%s/" PERTA_ADAPTER_CONFIG ": %s: \"%.200s\": module names are "
                              "supported, other regular expressions are not; merge the adapter",
                              c->path, key, pattern);
        if (!is_good(value))
            return perta_fail(err, PERTA_EINPUT, "%s/" PERTA_ADAPTER_CONFIG ": %s: \"%.200s\": %s",
                              c->path, key, pattern, why);
    }
    *out = patterns;
    return 0;
}

static int check_bias(const struct perta_adapter_config *c, struct perta_err *err)
{
    const json_t *bias = json_object_get(c->json, "bias");
    const char *kind = json_string_value(bias);
    if (!bias ||
        (kind && (!strcmp(kind, "none") || !strcmp(kind, "all") || !strcmp(kind, "lora_only"))))
        return 0;
    return refuse_key(c, "bias", "none, all or lora_only is needed", err);
}

int perta_adapter_config_read(struct perta_adapter_config *c, const struct perta_checkpoint *ck,
                              struct perta_err *err)
{
    *c = (struct perta_adapter_config){.path = ck->path, .json = ck->config};
    const char *type = json_string_value(json_object_get(c->json, "peft_type"));
    const json_t *r = json_object_get(c->json, "r");
    const json_t *alpha = json_object_get(c->json, "lora_alpha");
    const json_t *rs = json_object_get(c->json, "use_rslora");
    if (!json_is_object(c->json))
        return perta_fail(err, PERTA_EINPUT, "%s/" PERTA_ADAPTER_CONFIG ": not an object", c->path);
    if (!type || strcmp(type, "LORA"))
        return refuse_key(c, "peft_type",
                          "\"LORA\" is needed; merge adapters of other kinds into their base", err);
    int rc = refuse_kinds(c, err);
    if (!rc)
        rc = check_init(c, err);
    if (!rc)
        rc = check_bias(c, err);
    if (!rc && !is_rank(r))
        rc = refuse_key(c, "r", RANK_TEXT, err);
    if (!rc && !is_alpha(alpha))
        rc = refuse_key(c, "lora_alpha", ALPHA_TEXT, err);
    if (!rc && rs && !json_is_boolean(rs) && !json_is_null(rs))
        rc = refuse_key(c, "use_rslora", "true or false is needed", err);
    if (!rc)
        rc = get_patterns(c, "rank_pattern", is_rank, RANK_TEXT, &c->rank_pattern, err);
    if (!rc)
        rc = get_patterns(c, "alpha_pattern", is_alpha, ALPHA_TEXT, &c->alpha_pattern, err);
    c->r = (uint64_t)json_integer_value(r);
    c->alpha = json_number_value(alpha);
    c->use_rslora = json_is_true(rs);
    return rc;
}

/* ---- which modules ---- */

/* Does name equal the module's name (len characters), or end it after a dot? */
static bool is_name_of(const char *name, const char *module, size_t len)
{
    size_t n = strlen(name);
    return n <= len && !memcmp(module + len - n, name, n) &&
           (n == len || module[len - n - 1] == '.');
}

/* Does name match the module, or a module that contains it? */
static bool is_name_around(const char *name, const char *module, size_t len)
{
    for (size_t end = len; end; end--)
        if ((end == len || module[end] == '.') && is_name_of(name, module, end))
            return true;
    return false;
}

bool perta_adapter_is_within(const char *tensor, const char *module)
{
    const char *dot = strrchr(tensor, '.');
    return dot && is_name_around(module, tensor, (size_t)(dot - tensor));
}

static bool is_name(const char *name, const char *module, size_t len)
{
    return strlen(name) == len && !memcmp(name, module, len);
}

static bool any_name(const json_t *names, const char *module, size_t len,
                     bool (*fits)(const char *name, const char *module, size_t len))
{
    size_t i;
    json_t *name;
    json_array_foreach (names, i, name)
        if (json_is_string(name) && fits(json_string_value(name), module, len))
            return true;
    return false;
}

/* The number after the first ".NAME." in module where NAME is one of patterns, or -1. If patterns
 * is null or empty, any NAME counts. A NAME from patterns may also be at the very start. */
static json_int_t layer_of(const json_t *patterns, const char *module, size_t len)
{
    bool any = !is_set(patterns);
    for (size_t at = 1; at < len; at++) {
        if (module[at - 1] != '.' || !isdigit((unsigned char)module[at]))
            continue;
        size_t end = at, start = at - 1;
        while (end < len && isdigit((unsigned char)module[end]))
            end++;
        while (start && module[start - 1] != '.')
            start--;
        if (end == len || module[end] != '.' || (any && !start))
            continue;
        char name[128];
        snprintf(name, sizeof name, "%.*s", (int)(at - 1 - start), module + start);
        if (any || any_name(patterns, name, strlen(name), is_name_of) ||
            (json_is_string(patterns) && !strcmp(json_string_value(patterns), name)))
            return strtoll(module + at, NULL, 10);
    }
    return -1;
}

static bool is_among(const json_t *layers, json_int_t layer)
{
    size_t i;
    json_t *one;
    json_array_foreach (layers, i, one)
        if (json_is_integer(one) && json_integer_value(one) == layer)
            return true;
    return json_is_integer(layers) && json_integer_value(layers) == layer;
}

int perta_adapter_config_allows(const struct perta_adapter_config *c, const char *module,
                                size_t len, struct perta_err *err)
{
    const json_t *layers = json_object_get(c->json, "layers_to_transform");
    const json_t *patterns = json_object_get(c->json, "layers_pattern");
    const char *key = NULL;
    if (any_name(json_object_get(c->json, "exclude_modules"), module, len, is_name_of))
        key = "exclude_modules";
    else if (any_name(json_object_get(c->json, "modules_to_save"), module, len, is_name_around))
        key = "modules_to_save";
    else if (is_set(layers) && !is_among(layers, layer_of(patterns, module, len)) &&
             !any_name(json_object_get(c->json, "target_modules"), module, len, is_name))
        key = "layers_to_transform";
    return key ? perta_fail(err, PERTA_EINPUT,
                            "%s/" PERTA_ADAPTER_CONFIG
                            ": %s: excludes %.*s from having a LoRA, but the "
                            "file has one for it; correct the key, or merge the adapter",
                            c->path, key, (int)len, module)
               : 0;
}

bool perta_adapter_config_targets_parameter(const struct perta_adapter_config *c,
                                            const char *tensor)
{
    static const char *const parts[] = {".experts.", "put_linear.", ".gate.", ".router."};
    const json_t *parameters = json_object_get(c->json, "target_parameters");
    bool found = any_name(parameters, tensor, strlen(tensor), is_name_of);
    for (size_t i = 0; is_set(parameters) && i < sizeof parts / sizeof *parts; i++)
        found |= strstr(tensor, parts[i]) != NULL;
    return found;
}

bool perta_adapter_config_targets(const struct perta_adapter_config *c, const char *module,
                                  size_t len)
{
    const json_t *targets = json_object_get(c->json, "target_modules");
    return !json_is_array(targets) || any_name(targets, module, len, is_name_of);
}

/* ---- for the record ---- */

json_t *perta_adapter_recipe(const struct perta_checkpoint *ck)
{
    static const char *const keys[] = {"r", "lora_alpha", "use_rslora", "rank_pattern",
                                       "alpha_pattern"};
    json_t *recipe = json_object();
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (is_set(json_object_get(ck->config, keys[i])))
            perta_json_set(&recipe, keys[i], json_deep_copy(json_object_get(ck->config, keys[i])));
    return recipe;
}

void perta_adapter_config_note(const struct perta_adapter_config *c, json_t *notes)
{
    static const char *const known[] = {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
        "velora_config",
    };
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)c->json, key, value) {
        bool is_known = !is_set(value);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is_known |= !strcmp(key, known[i]);
        if (!is_known)
            perta_note(notes,
                       "%s/" PERTA_ADAPTER_CONFIG ": unknown key %.200s; perta assumes "
                       "that it has no effect on the weights",
                       c->path, key);
    }
}

int perta_adapter_config_scale(const struct perta_adapter_config *c, const char *module, size_t len,
                               uint64_t *rank, float *scaling, struct perta_err *err)
{
    const json_t *r = pattern_find(c->rank_pattern, module, len);
    const json_t *alpha = pattern_find(c->alpha_pattern, module, len);
    *rank = r ? (uint64_t)json_integer_value(r) : c->r;
    double n = (double)*rank;
    *scaling =
        (float)((alpha ? json_number_value(alpha) : c->alpha) / (c->use_rslora ? sqrt(n) : n));
    return isfinite(*scaling) ? 0
                              : refuse_key(c, alpha ? "alpha_pattern" : "lora_alpha",
                                           "the scaling overflows float32", err);
}
