#include "estimators/edit/adapter.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/edit/adapter_config.h"
#include "io/format/naming.h"
#include "io/format/tied.h"
#include "io/text.h"

#define PREFIX "base_model.model."
typedef unsigned long long ull;

/* ---- names ---- */

enum kind { KIND_A, KIND_B, KIND_EMBEDDING_A, KIND_EMBEDDING_B, KIND_BASE_LAYER, KIND_WHOLE };

/* One tensor of the adapter. */
struct part {
    char *target; /* the tensor of the model that it changes */
    enum kind kind;
    const struct perta_ref *ref;
};

/* Endings of PEFT's names: with the default adapter name in them, and without it, as PEFT saves. */
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

static int read_name(const struct perta_checkpoint *ck, const struct perta_ref *ref,
                     struct part *part, struct perta_err *err)
{
    const char *name = ref->tensor->name, *bare = name;
    if (!strncmp(bare, PREFIX, strlen(PREFIX)))
        bare += strlen(PREFIX);
    const struct ending *e = endings;
    while (!perta_text_ends_in(bare, e->text))
        e++;
    if (!*e->text && strstr(bare, "lora_"))
        return perta_fail(
            err, PERTA_EINPUT,
            "%s: tensor %s: an unknown kind of adapter tensor; merge the adapter into "
            "its base (merge_and_unload, save_pretrained)",
            ck->shards[0].path, name);
    part->kind = e->kind;
    part->ref = ref;
    if (asprintf(&part->target, "%.*s%s", (int)(strlen(bare) - strlen(e->text)), bare, e->instead) <
        0) {
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

/* Combine the n parts that share one target into a change. */
static int join_parts(const struct perta_checkpoint *ck, struct part *parts, size_t n,
                      struct perta_change *change, struct perta_err *err)
{
    const struct perta_ref *of[KIND_WHOLE + 1] = {0};
    const char *path = ck->shards[0].path;
    for (size_t i = 0; i < n; i++) {
        if (of[parts[i].kind])
            return perta_fail(err, PERTA_EINPUT, "%s: tensors %s and %s are duplicates", path,
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
        .is_swapped = embedding,
        .n_experts = 1,
        .n_matrices = 1,
    };
    parts[0].target = NULL; /* now owned by the change */
    const char *name = parts[0].ref->tensor->name;
    if (embedding + linear + (of[KIND_WHOLE] != NULL) > 1)
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: %s changes the same weight in another way", path, name,
                          parts[n - 1].ref->tensor->name);
    if (!change->whole && (!change->a || !change->b))
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: no matching %s", path, name,
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
        rc = join_parts(adapter->ck, parts + i, end - i, &adapter->changes[adapter->n_changes++],
                        err);
    }
    return rc;
}

static int read_names(struct perta_adapter *adapter, struct perta_err *err)
{
    const struct perta_checkpoint *ck = adapter->ck;
    struct part *parts = calloc(ck->n_tensors + 1, sizeof *parts);
    adapter->changes = calloc(ck->n_tensors + 1, sizeof *adapter->changes);
    uint64_t n = 0;
    int rc = parts && adapter->changes ? 0 : perta_fail_sys(err, ENOMEM, "%s", ck->path);
    for (uint64_t i = 0; i < ck->n_tensors && !rc; i++)
        if (!perta_is_buffer(ck->by_name[i].tensor))
            rc = read_name(ck, &ck->by_name[i], &parts[n++], err);
    if (!rc)
        rc = join_all(adapter, parts, n, err);
    for (uint64_t i = 0; parts && i < ck->n_tensors; i++)
        free(parts[i].target);
    free(parts);
    return rc;
}

/* ---- in the names of the model's files ---- */

/* The name that the adapter's config goes by. */
static const char *said_of(const struct perta_change *change)
{
    return change->said ? change->said : change->target;
}

/* The names of a model around a language model are those in memory. */
static int rename_change(const struct perta_checkpoint *model, bool tied,
                         struct perta_change *change, struct perta_err *err)
{
    const struct perta_ref *ref = perta_tied_find(model, change->target, tied)
                                      ? NULL
                                      : perta_around_find(model, change->target);
    char *target = ref ? strdup(ref->tensor->name) : NULL;
    if (ref && !target)
        return perta_fail_sys(err, ENOMEM, "%s", model->path);
    if (!ref)
        return 0;
    change->said = change->target;
    change->target = target;
    return 0;
}

/* ---- against the model ---- */

static int check_factor(const struct perta_adapter *adapter, const struct perta_change *change,
                        const struct perta_tensor *factor, uint64_t n_rows, uint64_t n_columns,
                        struct perta_err *err)
{
    const char *path = adapter->ck->shards[0].path;
    if (!perta_dtype_is_editable(factor->dtype) || factor->dtype == PERTA_F64)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s is %s; BF16, F16 or F32 needed", path,
                          factor->name, perta_dtype_name(factor->dtype));
    if (factor->n_dims == 2 && factor->shape[0] == n_rows && factor->shape[1] == n_columns)
        return 0;
    char shape[128];
    perta_shape_print(shape, sizeof shape, factor);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: tensor %s: shape %s, but [%llu, %llu] is needed: %s is [%llu, %llu] "
                      "in --model, and its rank is %llu in " PERTA_ADAPTER_CONFIG,
                      path, factor->name, shape, (ull)n_rows, (ull)n_columns, change->target,
                      (ull)change->rows, (ull)change->width, (ull)change->r);
}

/* Conv1D layers (GPT-2 and similar models) store W as (in, out). PEFT transposes them whatever the
 * config says, and the shape of a square matrix does not show it. */
static bool is_conv1d(const struct perta_checkpoint *model, const char *target)
{
    static const char *const types[] = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer",
                                        "clvp"};
    const char *type = json_string_value(json_object_get(model->config, "model_type"));
    for (size_t i = 0; type && i < sizeof types / sizeof *types; i++)
        if (!strcmp(type, types[i]))
            return strncmp(target, "lm_head.", 8) && strncmp(target, "score.", 6);
    return false;
}

/* W (rows, width) += scaling * (B A), or scaling * (B A)^T if it is transposed. */
static int check_lora(const struct perta_adapter *adapter,
                      const struct perta_adapter_config *config, struct perta_change *change,
                      const struct perta_tensor *tensor, struct perta_err *err)
{
    const struct perta_checkpoint *ck = adapter->ck;
    if (tensor->n_dims != 2)
        return perta_fail(err, PERTA_EINPUT, "%s: tensor %s: %s is not a matrix in --model",
                          ck->shards[0].path, change->a->tensor->name, tensor->name);
    change->rows = tensor->shape[0];
    change->width = tensor->shape[1];
    const char *said = said_of(change);
    size_t module_len = strlen(said) - strlen(".weight");
    int rc = perta_adapter_config_allows(config, said, module_len, err);
    if (!rc)
        rc =
            perta_adapter_config_scale(config, said, module_len, &change->r, &change->scaling, err);
    uint64_t r = change->r, rows = change->rows, width = change->width;
    if (!rc)
        rc = check_factor(adapter, change, change->a->tensor, r, change->is_swapped ? rows : width,
                          err);
    if (!rc)
        rc = check_factor(adapter, change, change->b->tensor, change->is_swapped ? width : rows, r,
                          err);
    if (rc || !change->base_layer)
        return rc;
    rc = perta_shapes_agree("--model", tensor, "--tuned", change->base_layer->tensor, err);
    return rc ? perta_err_context(err, "%s: tensor %s", ck->shards[0].path,
                                  change->base_layer->tensor->name)
              : 0;
}

/* Is this a token embedding? Decided by its name, or by its shape: one row for each token. */
static bool is_embedding(const struct perta_checkpoint *model, const char *name)
{
    static const char *const names[] = {"embed_tokens.weight", "wte.weight",
                                        "embed_in.weight",     "word_embeddings.weight",
                                        "shared.weight",       ".embeddings.weight",
                                        "tokens_embed.weight", "tok_embeddings.weight"};
    const json_t *n = json_object_get(model->config, "vocab_size");
    const struct perta_tensor *t = perta_checkpoint_find(model, name)->tensor;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (perta_text_ends_in(name, names[i]))
            return true;
    return perta_tied_is_embedding(name) || (json_is_integer(n) && t->n_dims == 2 &&
                                             t->shape[0] == (uint64_t)json_integer_value(n) &&
                                             strcasestr(name, "emb") && !strstr(name, "pos"));
}

static bool has_head(const struct perta_checkpoint *model)
{
    static const char *const heads[] = {"lm_head.", "embed_out.", "output.", "head.", "decoder."};
    for (uint64_t i = 0; i < model->n_tensors; i++)
        for (size_t k = 0; k < sizeof heads / sizeof *heads; k++) {
            const char *found = strstr(model->by_name[i].tensor->name, heads[k]);
            if (found && !strcmp(found + strlen(heads[k]), "weight"))
                return true;
        }
    return false;
}

/* Does the model use this tensor a second time, as its head or its embedding? Either config.json
 * says so; or it leaves this to the architecture, the tensor is a language model's embedding, and
 * no separate head is stored. */
static bool is_shared(const struct perta_checkpoint *model, const char *name)
{
    const json_t *tie = json_object_get(model->config, "tie_word_embeddings");
    const char *architecture =
        json_string_value(json_array_get(json_object_get(model->config, "architectures"), 0));
    bool is_lm =
        json_is_true(tie) ||
        (architecture && (strstr(architecture, "LM") || strstr(architecture, "Generation")));
    if (perta_tied_name(model, name) && perta_is_tied(model))
        return true;
    return !json_is_false(tie) && is_lm && perta_checkpoint_find(model, name) &&
           is_embedding(model, name) && !has_head(model);
}

/* A live adapter changes only one of embedding and head, a merged adapter changes both. Which of
 * the two is meant cannot be known, unless the adapter stores both whole and byte-identical. */
static int check_tied(const struct perta_adapter *adapter, const struct perta_checkpoint *model,
                      const struct perta_change *change, struct perta_err *err)
{
    const char *other_name = perta_tied_name(model, change->target);
    const struct perta_change *other = other_name ? perta_adapter_find(adapter, other_name) : NULL;
    bool same = false;
    if (!is_shared(model, change->target))
        return 0;
    int rc =
        other && other->whole && change->whole
            ? perta_tied_compare(adapter->ck, change->whole, adapter->ck, other->whole, &same, err)
            : 0;
    if (rc || same)
        return rc;
    const struct perta_ref *part = change->whole ? change->whole : change->a;
    return perta_fail(
        err, PERTA_EINPUT,
        "%s: tensor %s changes %s, which --model %s ties to %s; %s. Give --model and --base a head "
        "of its own (store it, and set \"tie_word_embeddings\" in config.json to false), or tune "
        "without it",
        adapter->ck->shards[0].path, part->tensor->name, change->target, model->path,
        other_name ? other_name : "its head",
        other ? "the adapter changes that tensor in another way"
              : "the adapter does not change that tensor, and the model has one matrix for both");
}

/* Names the possible cause: transformers gives the parts of a vision-language model other names
 * than the files do. */
static int no_target(const struct perta_adapter *adapter, const struct perta_change *change,
                     const struct perta_checkpoint *model, struct perta_err *err)
{
    const struct perta_ref *part = change->whole ? change->whole : change->a;
    const char *const outer = "language_model.";
    bool wraps = strstr(change->target, outer);
    for (uint64_t i = 0; i < model->n_tensors && !wraps; i++)
        wraps = strstr(model->by_name[i].tensor->name, outer);
    return perta_fail(
        err, PERTA_EINPUT, "%s: tensor %s: %s is not in --model %s; %s",
        adapter->ck->shards[0].path, part->tensor->name, change->target, model->path,
        wraps ? "one of the two uses the names of a vision-language model "
                "(language_model) and the other does not; merge the adapter into its base "
                "(merge_and_unload, save_pretrained) and use that model"
              : "is it a different architecture?");
}

static int find_target(struct perta_adapter *adapter, const struct perta_adapter_config *config,
                       const struct perta_checkpoint *model, bool tied, struct perta_change *change,
                       struct perta_err *err)
{
    const struct perta_ref *part = change->whole ? change->whole : change->a;
    const struct perta_ref *ref = perta_tied_find(model, change->target, tied);
    if (!ref)
        return no_target(adapter, change, model, err);
    if (!perta_dtype_is_editable(ref->tensor->dtype))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s: %s is %s in --model; BF16, F16, F32 or F64 needed",
                          adapter->ck->shards[0].path, part->tensor->name, ref->tensor->name,
                          perta_dtype_name(ref->tensor->dtype));
    if (change->rows) /* an expert's: it is known to fit */
        return 0;
    int rc = check_tied(adapter, model, change, err);
    bool conv1d = !change->is_swapped && is_conv1d(model, change->target);
    if (!rc && !change->whole && !conv1d)
        rc = perta_adapter_config_plain(config, err);
    change->is_swapped |= conv1d;
    if (!rc && !change->whole)
        rc = check_lora(adapter, config, change, ref->tensor, err);
    return rc;
}

static int compare_changes(const void *a, const void *b)
{
    return strcmp(((const struct perta_change *)a)->target,
                  ((const struct perta_change *)b)->target);
}

static int find_targets(struct perta_adapter *adapter, const struct perta_adapter_config *config,
                        const struct perta_checkpoint *model, struct perta_err *err)
{
    bool tied = perta_is_tied(model);
    int rc = 0;
    for (uint64_t i = 0; i < adapter->n_changes && !rc; i++)
        rc = rename_change(model, tied, &adapter->changes[i], err);
    if (!rc)
        rc = perta_adapter_expand(adapter, config, model, err);
    qsort(adapter->changes, adapter->n_changes, sizeof *adapter->changes, compare_changes);
    for (uint64_t i = 1; i < adapter->n_changes && !rc; i++)
        if (!strcmp(adapter->changes[i - 1].target, adapter->changes[i].target))
            rc = perta_fail(err, PERTA_EINPUT, "%s: %s is changed twice",
                            adapter->ck->shards[0].path, adapter->changes[i].target);
    for (uint64_t i = 0; i < adapter->n_changes && !rc; i++)
        rc = find_target(adapter, config, model, tied, &adapter->changes[i], err);
    return rc;
}

/* Warn of LoRAs that target_modules does not name: PEFT ignores those. */
static void note_targets(const struct perta_adapter *adapter,
                         const struct perta_adapter_config *config, json_t *notes)
{
    const char *first = NULL;
    uint64_t n = 0;
    for (uint64_t i = 0; i < adapter->n_changes; i++) {
        const struct perta_change *c = &adapter->changes[i];
        size_t len = strlen(said_of(c)) - (c->whole ? 0 : strlen(".weight"));
        if (!c->whole && !perta_adapter_config_targets(config, said_of(c), len) &&
            !perta_adapter_config_targets_parameter(config, said_of(c)) && !n++)
            first = said_of(c);
    }
    if (n)
        perta_note(
            notes,
            "%s/" PERTA_ADAPTER_CONFIG ": target_modules does not name %llu modules that the "
            "file has a LoRA for, the first of them %s: PEFT would ignore them, perta applies them",
            adapter->ck->path, (ull)n, first);
}

/* Warn of names without PEFT's prefix: PEFT ignores those tensors. */
static void note_names(const struct perta_adapter *adapter, json_t *notes)
{
    const char *first = NULL;
    uint64_t n = 0;
    for (uint64_t i = 0; i < adapter->ck->n_tensors; i++) {
        const struct perta_tensor *t = adapter->ck->by_name[i].tensor;
        if (!perta_is_buffer(t) && strncmp(t->name, PREFIX, strlen(PREFIX)) && !n++)
            first = t->name;
    }
    if (n)
        perta_note(notes,
                   "%s: the names of %llu tensors, the first of them %s, do not begin with " PREFIX
                   ": PEFT would ignore them, perta applies them",
                   adapter->ck->shards[0].path, (ull)n, first);
}

static int check_any(const struct perta_adapter *adapter, struct perta_err *err)
{
    return adapter->n_changes
               ? 0
               : perta_fail(
                     err, PERTA_EINPUT,
                     "%s: no tensors; an adapter of a compiled or sharded model can be saved "
                     "like this: save it again, from the whole model",
                     adapter->ck->n_shards ? adapter->ck->shards[0].path : adapter->ck->path);
}

/* Does the adapter store a whole tensor in the module of that name? */
static bool holds_module(const struct perta_adapter *adapter, const char *module)
{
    for (uint64_t i = 0; i < adapter->n_changes; i++)
        if (adapter->changes[i].whole &&
            perta_adapter_is_within(adapter->changes[i].target, module))
            return true;
    return false;
}

/* Everything that modules_to_save names and the model has must be in the file. An adapter without
 * it is incomplete, and PEFT does not load it. */
static int check_saved(const struct perta_adapter *adapter, const struct perta_checkpoint *model,
                       struct perta_err *err)
{
    size_t k;
    json_t *module;
    json_array_foreach (json_object_get(adapter->ck->config, "modules_to_save"), k, module)
        for (uint64_t i = 0; json_is_string(module) && i < model->n_tensors; i++) {
            const struct perta_tensor *t = model->by_name[i].tensor;
            if (perta_is_buffer(t) || !perta_adapter_is_within(t->name, json_string_value(module)))
                continue;
            if (!holds_module(adapter, json_string_value(module)))
                return perta_fail(
                    err, PERTA_EINPUT,
                    "%s/" PERTA_ADAPTER_CONFIG ": modules_to_save: %.200s is not in %s, "
                    "although --model has %s; is the adapter complete? Save it again, or "
                    "remove that name",
                    adapter->ck->path, json_string_value(module), adapter->ck->shards[0].name,
                    t->name);
            break;
        }
    return 0;
}

int perta_adapter_open(const struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                       struct perta_adapter **out, json_t *notes, struct perta_err *err)
{
    struct perta_adapter_config config;
    struct perta_adapter *adapter = calloc(1, sizeof *adapter);
    if (!adapter)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    adapter->ck = ck;
    int rc = perta_adapter_config_read(&config, ck, err);
    if (!rc)
        rc = read_names(adapter, err);
    if (!rc)
        rc = check_any(adapter, err);
    if (!rc)
        rc = find_targets(adapter, &config, model, err);
    if (!rc)
        rc = check_saved(adapter, model, err);
    if (rc) {
        perta_adapter_close(adapter);
        return rc;
    }
    if (notes) {
        perta_adapter_config_note(&config, notes);
        note_targets(adapter, &config, notes);
        note_names(adapter, notes);
    }
    *out = adapter;
    return 0;
}

void perta_adapter_close(struct perta_adapter *adapter)
{
    if (!adapter)
        return;
    for (uint64_t i = 0; i < adapter->n_changes; i++) {
        free(adapter->changes[i].target);
        free(adapter->changes[i].said);
    }
    free(adapter->changes);
    perta_adapter_end(adapter);
    free(adapter);
}

static int compare_target(const void *name, const void *change)
{
    return strcmp(name, ((const struct perta_change *)change)->target);
}

const struct perta_change *perta_adapter_find(const struct perta_adapter *adapter, const char *name)
{
    return bsearch(name, adapter->changes, adapter->n_changes, sizeof *adapter->changes,
                   compare_target);
}
