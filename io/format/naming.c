#include "io/format/naming.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/text.h"

static bool any_matches(const char *const *globs, unsigned n, const char *name)
{
    for (unsigned i = 0; i < n; i++)
        if (!fnmatch(globs[i], name, 0))
            return true;
    return false;
}

bool perta_globs_match(const struct perta_globs *globs, const char *name)
{
    if (any_matches(globs->exclude, globs->n_exclude, name))
        return false;
    return !globs->n_include || any_matches(globs->include, globs->n_include, name);
}

/* ---- tied embeddings ---- */

static const struct {
    const char *embedding, *head;
} ties[] = {
    {"model.embed_tokens.weight", PERTA_HEAD_NAME},
    {"model.language_model.embed_tokens.weight", PERTA_HEAD_NAME},
    {"model.text_model.embed_tokens.weight", PERTA_HEAD_NAME},
    {"model.decoder.embed_tokens.weight", PERTA_HEAD_NAME},
    {"transformer.wte.weight", PERTA_HEAD_NAME},
    {"wte.weight", PERTA_HEAD_NAME},
    {"transformer.word_embeddings.weight", PERTA_HEAD_NAME},
    {"word_embeddings.weight", PERTA_HEAD_NAME},
    {"transformer.tokens_embed.weight", PERTA_HEAD_NAME},
    {"transformer.w.weight", PERTA_HEAD_NAME},
    {"backbone.embeddings.weight", PERTA_HEAD_NAME},
    {"shared.weight", PERTA_HEAD_NAME},
    {"model.shared.weight", PERTA_HEAD_NAME},
    {"gpt_neox.embed_in.weight", "embed_out.weight"},
    {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"},
    {"language_model.model.embed_tokens.weight", PERTA_HEAD_NAME},
};
#define N_TIES (sizeof ties / sizeof *ties)

const char *perta_tied_name(const struct perta_checkpoint *ck, const char *name)
{
    const char *first = NULL;
    for (size_t i = 0; i < N_TIES; i++) {
        if (!strcmp(name, ties[i].embedding))
            return ties[i].head;
        if (strcmp(name, ties[i].head))
            continue;
        if (perta_checkpoint_find(ck, ties[i].embedding))
            return ties[i].embedding;
        first = first ? first : ties[i].embedding;
    }
    return first;
}

bool perta_tied_is_embedding(const char *name)
{
    for (size_t i = 0; i < N_TIES; i++)
        if (!strcmp(name, ties[i].embedding))
            return true;
    return false;
}

const struct perta_ref *perta_tied_find(const struct perta_checkpoint *ck, const char *name,
                                        bool tied)
{
    const struct perta_ref *ref = perta_checkpoint_find(ck, name);
    const char *other = tied ? perta_tied_name(ck, name) : NULL;
    return ref || !other ? ref : perta_checkpoint_find(ck, other);
}

bool perta_tied_pair(const struct perta_checkpoint *ck, const struct perta_ref **embedding,
                     const struct perta_ref **head)
{
    for (size_t i = 0; i < N_TIES; i++) {
        *embedding = perta_checkpoint_find(ck, ties[i].embedding);
        *head = perta_checkpoint_find(ck, ties[i].head);
        if (*embedding && *head)
            return true;
    }
    return false;
}

/* Model types whose embeddings transformers ties unless config.json says otherwise. */
static bool is_tied_by_default(const char *type)
{
    static const char *const types[] = {
        "biogpt",   "bloom",        "cohere",     "cohere2",      "cohere2_moe", "ctrl",
        "ernie4_5", "ernie4_5_moe", "falcon",     "falcon_mamba", "gemma",       "gemma2",
        "gemma3",   "gemma3_text",  "gemma3n",    "gemma3n_text", "gemma4",      "gemma4_text",
        "gpt2",     "gpt_bigcode",  "gpt_neo",    "jetmoe",       "lfm2",        "lfm2_moe",
        "mamba",    "minicpm3",     "mpt",        "openai-gpt",   "opt",         "recurrent_gemma",
        "smollm3",  "starcoder2",   "vaultgemma", "xglm",         "youtu",       "zamba",
        "zamba2",   "granite_swa",
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(type, types[i]))
            return true;
    return false;
}

/* A classifier, or a model of layers alone, has no head to tie. */
static bool may_have_head(const json_t *config)
{
    const char *name =
        json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    return !name || strstr(name, "LM") || strstr(name, "Generation");
}

static bool is_one_of(const char *type, const char *const *types)
{
    while (*types && (!type || strcmp(type, *types)))
        types++;
    return *types;
}

/* Models around a language model: the key in "text_config" alone counts; it counts, too; the
 * embeddings are tied by default. */
static const char *const tied_within[] = {"llama4", NULL};
static const char *const tied_by_either[] = {"llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl",
                                             NULL};
static const char *const tied_around[] = {"aya_vision", "internvl", "mistral3", NULL};

bool perta_is_tied_by(const json_t *config)
{
    static const char key[] = "tie_word_embeddings";
    const json_t *tie = json_object_get(config, key);
    const json_t *within = json_object_get(json_object_get(config, "text_config"), key);
    const char *type = json_string_value(json_object_get(config, "model_type"));
    if (is_one_of(type, tied_within))
        return json_is_true(within);
    if (json_is_true(within) && is_one_of(type, tied_by_either))
        return true;
    if (tie && !json_is_null(tie))
        return json_is_true(tie);
    return type && (is_tied_by_default(type) || is_one_of(type, tied_around)) &&
           may_have_head(config);
}

bool perta_is_tied(const struct perta_checkpoint *ck)
{
    const char *type = json_string_value(json_object_get(ck->config, "model_type"));
    const json_t *tie = json_object_get(ck->config, "tie_word_embeddings");
    const struct perta_ref *embedding, *head;
    bool is_said = tie && !json_is_null(tie);
    return perta_is_tied_by(ck->config) &&
           (is_said || !is_one_of(type, tied_around) || !perta_tied_pair(ck, &embedding, &head));
}

/* ---- models around a language model ---- */

#define N_FRONTS 3
/* What the names of a part begin with, in the layouts that there are. */
static const char *const fronts[][N_FRONTS] = {
    {"model.language_model.", "language_model.model.", "model."},
    {"lm_head.", "language_model.lm_head.", NULL},
    {"model.vision_tower.", "vision_tower.", NULL},
    {"model.vision_model.", "vision_model.", NULL},
    {"model.visual.", "visual.", NULL},
    {"model.multi_modal_projector.", "multi_modal_projector.", NULL},
};

static bool is_around(const json_t *config)
{
    return json_is_object(json_object_get(config, "text_config")) ||
           json_is_object(json_object_get(config, "vision_config"));
}

/* name begins with front: look for it with the other fronts of that part. */
static const struct perta_ref *find_with_others(const struct perta_checkpoint *ck,
                                                const char *const of[N_FRONTS], const char *front,
                                                const char *name)
{
    const struct perta_ref *ref = NULL;
    for (size_t i = 0; i < N_FRONTS && of[i] && !ref; i++) {
        char *other = NULL;
        if (of[i] == front || asprintf(&other, "%s%s", of[i], name + strlen(front)) < 0)
            continue;
        ref = perta_checkpoint_find(ck, other);
        free(other);
    }
    return ref;
}

const struct perta_ref *perta_around_find(const struct perta_checkpoint *ck, const char *name)
{
    const struct perta_ref *ref = NULL;
    for (size_t p = 0; is_around(ck->config) && p < sizeof fronts / sizeof *fronts && !ref; p++)
        for (size_t i = 0; i < N_FRONTS && fronts[p][i] && !ref; i++)
            if (!strncmp(name, fronts[p][i], strlen(fronts[p][i])))
                ref = find_with_others(ck, fronts[p], fronts[p][i], name);
    return ref;
}

/* ---- buffers ---- */

bool perta_is_buffer_name(const char *name)
{
    static const char *const parts[] = {"inv_freq",   "original_inv_freq", "masked_bias",
                                        "cos_cached", "sin_cached",        "position_ids"};
    const char *dot = strrchr(name, '.'), *last = dot ? dot + 1 : name;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(last, parts[i]))
            return true;
    return false;
}

bool perta_is_buffer(const struct perta_tensor *t)
{
    /* GPT-2's mask is called bias. */
    bool is_mask =
        t->n_dims == 4 && t->shape[0] == 1 && t->shape[1] == 1 && t->shape[2] == t->shape[3];
    return perta_is_buffer_name(t->name) ||
           (is_mask && (perta_text_ends_in(t->name, "attn.bias") ||
                        perta_text_ends_in(t->name, "attention.bias")));
}

/* ---- prefixes ---- */

/* Prefixes of torch.compile, DataParallel, FSDP and PEFT, and of a model around its layers. */
static const char *const prefixes[] = {"_orig_mod.", "module.", "_fsdp_wrapped_module.",
                                       "base_model.model.", "model."};
#define N_PREFIXES (sizeof prefixes / sizeof *prefixes)

/* Parts of names left by wrappers around single layers: FSDP, checkpointed activations,
 * torch.compile, PEFT. */
static const char *const wrappers[] = {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
                                       "_orig_mod.", "base_layer.", NULL};

/* A wrapper that occurs within names, not only in front of all of them; or NULL. */
static const char *wrapper_within(const struct perta_checkpoint *ck)
{
    for (uint64_t i = 0; i < ck->n_tensors; i++)
        for (const char *const *w = wrappers; *w; w++) {
            const char *name = ck->by_name[i].tensor->name, *found = strstr(name, *w);
            if (found && (found == name || found[-1] == '.'))
                return *w;
        }
    return NULL;
}

/* The prefix that all names of ck share, from character strip on; NULL if there is none. */
static const char *shared_prefix(const struct perta_checkpoint *ck, size_t strip)
{
    for (size_t p = 0; p < N_PREFIXES; p++) {
        uint64_t n = 0;
        while (n < ck->n_tensors &&
               !strncmp(ck->by_name[n].tensor->name + strip, prefixes[p], strlen(prefixes[p])))
            n++;
        if (n && n == ck->n_tensors)
            return prefixes[p];
    }
    return NULL;
}

/* How many tensors of ck would be found in model with strip characters removed and add prepended.
 * UINT64_MAX when out of memory. */
static uint64_t count_found(const struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                            size_t strip, const char *add)
{
    uint64_t n = 0;
    bool tied = perta_is_tied(model);
    for (uint64_t i = 0; i < ck->n_tensors; i++) {
        const char *bare = ck->by_name[i].tensor->name + strip;
        char *name = NULL;
        if (*add && asprintf(&name, "%s%s", add, bare) < 0)
            return UINT64_MAX;
        n += perta_tied_find(model, name ? name : bare, tied) || perta_is_buffer_name(bare);
        free(name);
    }
    return n;
}

/* Find the prefix with which most tensors are found: *strip characters to remove, *add to
 * prepend. */
static uint64_t find_prefix(const struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                            size_t *strip, const char **add)
{
    uint64_t most = count_found(ck, model, 0, "");
    const char *prefix = "";
    *strip = 0;
    *add = "";
    for (size_t at = 0; prefix && most < ck->n_tensors; at += prefix ? strlen(prefix) : 0) {
        for (size_t p = 0; p <= N_PREFIXES; p++) {
            const char *in_front = p ? prefixes[p - 1] : "";
            uint64_t n = count_found(ck, model, at, in_front);
            if (n <= most)
                continue;
            most = n;
            *strip = at;
            *add = in_front;
        }
        prefix = most < ck->n_tensors ? shared_prefix(ck, at) : NULL;
    }
    return most;
}

int perta_names_align(struct perta_checkpoint *ck, const struct perta_checkpoint *model,
                      char prefix[PERTA_PREFIX_ROOM], const char **add, const char **wrapper,
                      struct perta_err *err)
{
    size_t strip;
    uint64_t most = find_prefix(ck, model, &strip, add);
    *wrapper = most < ck->n_tensors ? wrapper_within(ck) : NULL;
    if (*wrapper) {
        int rc = perta_checkpoint_drop(ck, wrappers, err);
        if (rc)
            return rc;
        most = find_prefix(ck, model, &strip, add);
    }
    if (most == UINT64_MAX)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    snprintf(prefix, PERTA_PREFIX_ROOM, "%.*s", (int)strip,
             ck->n_tensors ? ck->by_name[0].tensor->name : "");
    return strip || **add ? perta_checkpoint_rename(ck, strip, *add, err) : 0;
}

/* ---- shapes ---- */

void perta_shape_print(char *to, size_t room, const struct perta_tensor *t)
{
    size_t n = (size_t)snprintf(to, room, "[");
    for (uint32_t i = 0; i < t->n_dims && n < room; i++)
        n += (size_t)snprintf(to + n, room - n, "%s%llu", i ? ", " : "",
                              (unsigned long long)t->shape[i]);
    if (n < room)
        snprintf(to + n, room - n, "]");
}

static bool is_vocabulary(const struct perta_tensor *a, const struct perta_tensor *b)
{
    return a->n_dims == 2 && b->n_dims == 2 && a->shape[1] == b->shape[1] &&
           (strstr(a->name, "embed") || strstr(a->name, "lm_head") || strstr(a->name, "wte"));
}

int perta_shapes_agree(const char *a_role, const struct perta_tensor *a, const char *b_role,
                       const struct perta_tensor *b, struct perta_err *err)
{
    bool same = a->n_dims == b->n_dims;
    for (uint32_t i = 0; same && i < a->n_dims; i++)
        same = a->shape[i] == b->shape[i];
    if (same)
        return 0;
    char a_shape[128], b_shape[128];
    perta_shape_print(a_shape, sizeof a_shape, a);
    perta_shape_print(b_shape, sizeof b_shape, b);
    if (is_vocabulary(a, b))
        return perta_fail(err, PERTA_EINPUT,
                          "tensor %s: the vocabulary differs: %llu rows in %s, %llu in %s; "
                          "resize one of them so that both have the same tokens",
                          a->name, (unsigned long long)a->shape[0], a_role,
                          (unsigned long long)b->shape[0], b_role);
    return perta_fail(err, PERTA_EINPUT, "tensor %s: shape %s in %s, %s in %s", a->name, a_shape,
                      a_role, b_shape, b_role);
}
