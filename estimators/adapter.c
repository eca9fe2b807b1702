#include "estimators/adapter.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "stream/naming.h"

#define PREFIX "base_model.model."
typedef unsigned long long ull;

/* ---- adapter_config.json ---- */

struct config {
    const char *path; /* of the folder, for messages */
    const json_t *json;
    const json_t *rank_pattern, *alpha_pattern; /* objects, or NULL */
    uint64_t r;
    double alpha;
    bool use_rslora;
};

static int refuse_key(const struct config *c, const char *key, const char *why,
                      struct perta_err *err)
{
    return perta_fail(err, PERTA_EINPUT, "%s/" PERTA_ADAPTER_CONFIG ": %.200s: %s", c->path,
                      key, why);
}

/* Not what keys hold that a model does without. */
static bool is_set(const json_t *value)
{
    return value && !json_is_null(value) && !json_is_false(value) &&
           !(json_is_string(value) && !json_string_length(value)) &&
           !((json_is_array(value) && !json_array_size(value)) ||
             (json_is_object(value) && !json_object_size(value)));
}

/* What changes the result in ways that A, B and scaling do not say. */
static int refuse_kinds(const struct config *c, struct perta_err *err)
{
    static const char *const refused[] = {
        "use_dora",          "use_qalora",   "use_bdlora",        "fan_in_fan_out",
        "lora_bias",         "arrow_config", "layer_replication", "alora_invocation_tokens",
        "monteclora_config", "kasa_config",  "megatron_config",   "trainable_token_indices",
        "target_parameters",
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (is_set(json_object_get(c->json, refused[i])))
            return refuse_key(
                c, refused[i],
                "set, which perta does not do; merge the adapter into its base "
                "(merge_and_unload, save_pretrained) and give that as --tuned",
                err);
    return 0;
}

/* Some initialisations take from the base what they put into A and B: then scaling * (B A)
 * is not all that sets the tuned model apart from the base. */
static int check_init(const struct config *c, struct perta_err *err)
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
        "path_initial_model_for_weight_conversion, which makes a plain LoRA of it, "
        "or merge it",
        err);
}

/* Is text a module's name, in which a dot stands for anything, maybe with ^ or $ around it?
 * Of regular expressions these alone are read. */
static bool is_name_pattern(const char *text)
{
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

/* As PEFT does: re.match(rf"(.*\.)?({pattern})$", module (m characters)). */
static bool pattern_matches(const char *pattern, const char *module, size_t m)
{
    bool from_start = *pattern == '^';
    size_t n = 0;
    pattern += from_start;
    for (const char *p = pattern; *p && *p != '$'; p++)
        n += *p != '\\';
    if (n > m || (from_start && n < m) || (n < m && module[m - n - 1] != '.'))
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
    json_object_foreach((json_t *)patterns, pattern, value)
    {
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

#define RANK_TEXT "a whole number from 1 is needed"
#define ALPHA_TEXT "a number is needed"

static int get_patterns(const struct config *c, const char *key,
                        bool (*is_good)(const json_t *value), const char *why,
                        const json_t **out, struct perta_err *err)
{
    json_t *patterns = json_object_get(c->json, key), *value;
    const char *pattern;
    *out = NULL;
    if (!is_set(patterns))
        return 0;
    if (!json_is_object(patterns))
        return refuse_key(c, key, "not an object", err);
    json_object_foreach(patterns, pattern, value)
    {
        if (!is_name_pattern(pattern))
            return perta_fail(err, PERTA_EINPUT,
                              "%s/" PERTA_ADAPTER_CONFIG
                              ": %s: \"%.200s\": names of modules are "
                              "read, but no other regular expressions; merge the adapter",
                              c->path, key, pattern);
        if (!is_good(value))
            return perta_fail(err, PERTA_EINPUT,
                              "%s/" PERTA_ADAPTER_CONFIG ": %s: \"%.200s\": %s", c->path,
                              key, pattern, why);
    }
    *out = patterns;
    return 0;
}

static int check_bias(const struct config *c, struct perta_err *err)
{
    const json_t *bias = json_object_get(c->json, "bias");
    const char *kind = json_string_value(bias);
    if (!bias || (kind && (!strcmp(kind, "none") || !strcmp(kind, "all") ||
                           !strcmp(kind, "lora_only"))))
        return 0;
    return refuse_key(c, "bias", "none, all or lora_only is needed", err);
}

static int read_config(struct config *c, const struct perta_checkpoint *ck,
                       struct perta_err *err)
{
    *c = (struct config){.path = ck->path, .json = ck->config};
    const char *type = json_string_value(json_object_get(c->json, "peft_type"));
    const json_t *r = json_object_get(c->json, "r");
    const json_t *alpha = json_object_get(c->json, "lora_alpha");
    const json_t *rs = json_object_get(c->json, "use_rslora");
    if (!json_is_object(c->json))
        return perta_fail(err, PERTA_EINPUT, "%s/" PERTA_ADAPTER_CONFIG ": not an object",
                          c->path);
    if (!type || strcmp(type, "LORA"))
        return refuse_key(c, "peft_type",
                          "\"LORA\" is needed; merge other kinds into their base", err);
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

json_t *perta_adapter_recipe(const struct perta_checkpoint *ck)
{
    static const char *const keys[] = {"r", "lora_alpha", "use_rslora", "rank_pattern",
                                       "alpha_pattern"};
    json_t *recipe = json_object();
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (is_set(json_object_get(ck->config, keys[i])))
            json_object_set_new(recipe, keys[i],
                                json_deep_copy(json_object_get(ck->config, keys[i])));
    return recipe;
}

/* Keys of newer versions of PEFT may say things that perta ought to know. */
static void note_unknown(const struct config *c, json_t *notes)
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
        "task_type",
        "use_rslora",
        "velora_config",
    };
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)c->json, key, value)
    {
        bool is_known = !is_set(value);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is_known |= !strcmp(key, known[i]);
        if (!is_known)
            json_array_append_new(notes,
                                  json_sprintf("%s/" PERTA_ADAPTER_CONFIG
                                               ": %.200s is not a key that perta knows; "
                                               "taken as without effect on the weights",
                                               c->path, key));
    }
}

/* ---- names ---- */

enum kind {
    KIND_A,
    KIND_B,
    KIND_EMBEDDING_A,
    KIND_EMBEDDING_B,
    KIND_BASE_LAYER,
    KIND_WHOLE
};

/* One tensor of the adapter. */
struct part {
    char *target; /* the tensor of the model that it is about */
    enum kind kind;
    const struct perta_ref *ref;
};

/* With the name that PEFT gives an adapter by default, or without one, as it saves. */
static const struct ending {
    const char *text;
    enum kind kind;
    const char *instead;
} endings[] = {
    {".lora_A.weight", KIND_A, ".weight"},
    {".lora_A.default.weight", KIND_A, ".weight"},
    {".lora_B.weight", KIND_B, ".weight"},
    {".lora_B.default.weight", KIND_B, ".weight"},
    {".lora_embedding_A", KIND_EMBEDDING_A, ".weight"},
    {".lora_embedding_A.default", KIND_EMBEDDING_A, ".weight"},
    {".lora_embedding_B", KIND_EMBEDDING_B, ".weight"},
    {".lora_embedding_B.default", KIND_EMBEDDING_B, ".weight"},
    {".base_layer.weight", KIND_BASE_LAYER, ".weight"},
    {".base_layer.bias", KIND_WHOLE, ".bias"},
    {"", KIND_WHOLE, ""},
};

static bool ends_in(const char *name, const char *ending)
{
    size_t n = strlen(name), m = strlen(ending);
    return n >= m && !strcmp(name + n - m, ending);
}

static int read_name(const struct perta_checkpoint *ck, const struct perta_ref *ref,
                     struct part *part, struct perta_err *err)
{
    const char *name = ref->tensor->name, *bare = name;
    if (!strncmp(bare, PREFIX, strlen(PREFIX)))
        bare += strlen(PREFIX);
    const struct ending *e = endings;
    while (!ends_in(bare, e->text))
        e++;
    if (!*e->text && strstr(bare, "lora_"))
        return perta_fail(
            err, PERTA_EINPUT,
            "%s: tensor %s: a kind that perta does not know; merge the adapter into "
            "its base (merge_and_unload, save_pretrained)",
            ck->shards[0].path, name);
    part->kind = e->kind;
    part->ref = ref;
    if (asprintf(&part->target, "%.*s%s", (int)(strlen(bare) - strlen(e->text)), bare,
                 e->instead) < 0) {
        part->target = NULL;
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    }
    return 0;
}

static int compare_parts(const void *a, const void *b)
{
    const struct part *x = a, *y = b;
    int order = strcmp(x->target, y->target);
    return order ? order : (int)x->kind - (int)y->kind;
}

/* All parts (n) of one target. */
static int join_parts(const struct perta_checkpoint *ck, struct part *parts, size_t n,
                      struct perta_change *change, struct perta_err *err)
{
    const struct perta_ref *of[KIND_WHOLE + 1] = {0};
    const char *path = ck->shards[0].path;
    for (size_t i = 0; i < n; i++) {
        if (of[parts[i].kind])
            return perta_fail(err, PERTA_EINPUT, "%s: tensors %s and %s say the same", path,
                              of[parts[i].kind]->tensor->name, parts[i].ref->tensor->name);
        of[parts[i].kind] = parts[i].ref;
    }
    bool embedding = of[KIND_EMBEDDING_A] || of[KIND_EMBEDDING_B];
    bool linear = of[KIND_A] || of[KIND_B];
    *change = (struct perta_change){
        .target = parts[0].target,
        .a = of[embedding ? KIND_EMBEDDING_A : KIND_A],
        .b = of[embedding ? KIND_EMBEDDING_B : KIND_B],
        .whole = of[KIND_WHOLE],
        .base_layer = of[KIND_BASE_LAYER],
        .is_embedding = embedding,
    };
    parts[0].target = NULL; /* it is the change's now */
    const char *name = parts[0].ref->tensor->name;
    if (embedding + linear + (of[KIND_WHOLE] != NULL) > 1)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: %s changes the same one in another way", path,
                          name, parts[n - 1].ref->tensor->name);
    if (!change->whole && (!change->a || !change->b))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no %s to it", path, name,
                          change->a   ? "lora_B"
                          : change->b ? "lora_A"
                                      : "lora_A and lora_B");
    return 0;
}

static int join_all(struct perta_adapter *adapter, struct part *parts, size_t n,
                    struct perta_err *err)
{
    int rc = 0;
    qsort(parts, n, sizeof *parts, compare_parts);
    for (size_t i = 0, end; i < n && !rc; i = end) {
        for (end = i + 1; end < n && !strcmp(parts[i].target, parts[end].target);)
            end++;
        rc = join_parts(adapter->ck, parts + i, end - i,
                        &adapter->changes[adapter->n_changes++], err);
    }
    return rc;
}

static int read_names(struct perta_adapter *adapter, struct perta_err *err)
{
    const struct perta_checkpoint *ck = adapter->ck;
    struct part *parts = calloc(ck->n_tensors + 1, sizeof *parts);
    adapter->changes = calloc(ck->n_tensors + 1, sizeof *adapter->changes);
    int rc = parts && adapter->changes ? 0 : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    for (uint64_t i = 0; i < ck->n_tensors && !rc; i++)
        rc = read_name(ck, &ck->by_name[i], &parts[i], err);
    if (!rc)
        rc = join_all(adapter, parts, ck->n_tensors, err);
    for (uint64_t i = 0; parts && i < ck->n_tensors; i++)
        free(parts[i].target);
    free(parts);
    return rc;
}

/* ---- against the model ---- */

static int check_factor(const struct perta_adapter *adapter,
                        const struct perta_change *change,
                        const struct perta_tensor *factor, uint64_t n_rows,
                        uint64_t n_columns, struct perta_err *err)
{
    const char *path = adapter->ck->shards[0].path;
    if (!perta_dtype_is_editable(factor->dtype) || factor->dtype == PERTA_F64)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16 or F32 needed",
                          path, factor->name, perta_dtype_name(factor->dtype));
    if (factor->n_dims == 2 && factor->shape[0] == n_rows && factor->shape[1] == n_columns)
        return 0;
    char shape[128];
    perta_shape_print(shape, sizeof shape, factor);
    return perta_fail(
        err, PERTA_EINPUT,
        "%s: tensor %s: shape %s, where [%llu, %llu] is needed: %s is [%llu, %llu] "
        "in --model, its rank %llu in " PERTA_ADAPTER_CONFIG,
        path, factor->name, shape, (ull)n_rows, (ull)n_columns, change->target,
        (ull)change->rows, (ull)change->width, (ull)change->r);
}

static int set_scaling(const struct config *config, struct perta_change *change,
                       struct perta_err *err)
{
    size_t m = strlen(change->target) - strlen(".weight"); /* the module's name */
    const json_t *r = pattern_find(config->rank_pattern, change->target, m);
    const json_t *alpha = pattern_find(config->alpha_pattern, change->target, m);
    change->r = r ? (uint64_t)json_integer_value(r) : config->r;
    double n = (double)change->r;
    double scaling = (alpha ? json_number_value(alpha) : config->alpha) /
                     (config->use_rslora ? sqrt(n) : n);
    change->scaling = (float)scaling;
    return isfinite(change->scaling)
               ? 0
               : refuse_key(config, alpha ? "alpha_pattern" : "lora_alpha",
                            "the scaling is beyond float32", err);
}

/* W (rows, width) += scaling * (B A), or scaling * (B A)^T for an embedding. */
static int check_lora(const struct perta_adapter *adapter, const struct config *config,
                      struct perta_change *change, const struct perta_tensor *tensor,
                      struct perta_err *err)
{
    const struct perta_checkpoint *ck = adapter->ck;
    if (tensor->n_dims != 2)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: %s is no matrix in --model",
                          ck->shards[0].path, change->a->tensor->name, tensor->name);
    change->rows = tensor->shape[0];
    change->width = tensor->shape[1];
    int rc = set_scaling(config, change, err);
    uint64_t r = change->r, rows = change->rows, width = change->width;
    if (!rc)
        rc = check_factor(adapter, change, change->a->tensor, r,
                          change->is_embedding ? rows : width, err);
    if (!rc)
        rc = check_factor(adapter, change, change->b->tensor,
                          change->is_embedding ? width : rows, r, err);
    if (rc || !change->base_layer)
        return rc;
    rc = perta_shapes_agree("--model", tensor, "--tuned", change->base_layer->tensor, err);
    return rc ? perta_err_context(err, "%s: tensor %s", ck->shards[0].path,
                                  change->base_layer->tensor->name)
              : 0;
}

/* Where a model stores both of two tied tensors, a change of one is one of the other too. */
static int check_tied(const struct perta_checkpoint *model, const struct perta_tensor *tensor,
                      struct perta_err *err)
{
    const char *name = perta_tied_name(tensor->name);
    const struct perta_ref *other = name ? perta_checkpoint_find(model, name) : NULL;
    if (!other || (other->tensor->n_dims == 2 && tensor->n_dims == 2 &&
                   other->tensor->shape[0] == tensor->shape[0] &&
                   other->tensor->shape[1] == tensor->shape[1]))
        return 0;
    return perta_fail(err, PERTA_EINPUT,
                      "--model %s: tensors %s and %s, which its config.json ties, are not "
                      "matrices of one shape",
                      model->path, tensor->name, name);
}

static int find_targets(struct perta_adapter *adapter, const struct config *config,
                        const struct perta_checkpoint *model, struct perta_err *err)
{
    const char *path = adapter->ck->shards[0].path;
    bool tied = perta_is_tied(model);
    const struct perta_change *last = NULL;
    int rc = 0;
    for (uint64_t i = 0; i < adapter->n_changes && !rc; i++) {
        struct perta_change *change = &adapter->changes[i];
        const struct perta_ref *part = change->whole ? change->whole : change->a;
        const struct perta_ref *ref = perta_tied_find(model, change->target, tied);
        if (!ref)
            rc = perta_fail(err, PERTA_EINPUT,
                            "%s: tensor %s: there is no %s in --model %s; is it another "
                            "architecture?",
                            path, part->tensor->name, change->target, model->path);
        else if (!perta_dtype_is_editable(ref->tensor->dtype))
            rc = perta_fail(
                err, PERTA_EINPUT,
                "%s: tensor %s: %s is %s in --model; BF16, F16, F32 or F64 needed", path,
                part->tensor->name, ref->tensor->name,
                perta_dtype_name(ref->tensor->dtype));
        else if (!change->whole)
            rc = check_lora(adapter, config, change, ref->tensor, err);
        if (rc || !tied || !perta_tied_name(change->target))
            continue;
        rc = check_tied(model, ref->tensor, err);
        if (!rc && last && !(last->whole && change->whole))
            rc = perta_fail(
                err, PERTA_EINPUT,
                "%s: changes %s and %s, which --model ties to one; merge the adapter "
                "into its base",
                path, last->target, change->target);
        last = change;
    }
    return rc;
}

int perta_adapter_open(const struct perta_checkpoint *ck,
                       const struct perta_checkpoint *model, struct perta_adapter **out,
                       json_t *notes, struct perta_err *err)
{
    struct config config;
    struct perta_adapter *adapter = calloc(1, sizeof *adapter);
    if (!adapter)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    adapter->ck = ck;
    int rc = read_config(&config, ck, err);
    if (!rc)
        rc = read_names(adapter, err);
    if (!rc)
        rc = find_targets(adapter, &config, model, err);
    if (rc) {
        perta_adapter_close(adapter);
        return rc;
    }
    note_unknown(&config, notes);
    *out = adapter;
    return 0;
}

void perta_adapter_close(struct perta_adapter *adapter)
{
    if (!adapter)
        return;
    for (uint64_t i = 0; i < adapter->n_changes; i++)
        free(adapter->changes[i].target);
    free(adapter->changes);
    perta_adapter_end(adapter);
    free(adapter);
}

static int compare_target(const void *name, const void *change)
{
    return strcmp(name, ((const struct perta_change *)change)->target);
}

const struct perta_change *perta_adapter_find(const struct perta_adapter *adapter,
                                              const char *name, bool tied)
{
    for (; name; name = tied ? perta_tied_name(name) : NULL, tied = false) {
        const struct perta_change *change = bsearch(
            name, adapter->changes, adapter->n_changes, sizeof *change, compare_target);
        if (change)
            return change;
    }
    return NULL;
}
