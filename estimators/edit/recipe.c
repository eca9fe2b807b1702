#include "estimators/edit/recipe.h"

#include <stdio.h>
#include <string.h>

#include "estimators/edit/adapter.h"
#include "io/text.h"

const char *perta_method_name(enum perta_method method)
{
    static const char *const names[] = {"grad",     "fisher", "power", "tv",
                                        "constant", "random", "scale"};
    return names[method];
}

const char *perta_stat_name(enum perta_stat stat)
{
    return stat == PERTA_STAT_MEAN ? "mean" : "meansq";
}

static const char *metadata_of(const struct perta_shard *shard, const char *key)
{
    return json_string_value(json_object_get(shard->header->metadata, key));
}

int perta_stat_of(const struct perta_checkpoint *ck, enum perta_stat *stat, json_t *notes,
                  struct perta_err *err)
{
    const char *first = NULL;
    for (uint32_t i = 0; i < ck->n_shards; i++) {
        const char *says = metadata_of(&ck->shards[i], "perta.stat");
        const char *kind = says ? says : "mean";
        if (strcmp(kind, "mean") && strcmp(kind, "meansq"))
            return perta_fail(err, PERTA_EINPUT,
                              "%s: metadata perta.stat is \"%s\"; mean or meansq is expected",
                              ck->shards[i].path, kind);
        if (first && strcmp(first, kind))
            return perta_fail(err, PERTA_EINPUT, "%s: holds %s, but other shards hold %s",
                              ck->shards[i].path, kind, first);
        if (!says && ck->config)
            return perta_fail(
                err, PERTA_EINPUT,
                "%s: this is a model (it has a config.json, and no perta.stat in its "
                "metadata), but an importance is needed; perta estimate and perta accumulate "
                "make one. If these are gradients, remove the config.json",
                ck->path);
        if (!says && !i)
            perta_note(notes,
                       "%s does not record what it holds (metadata perta.stat); "
                       "perta takes it as mean gradients",
                       ck->path);
        first = kind;
    }
    *stat = first && !strcmp(first, "meansq") ? PERTA_STAT_MEANSQ : PERTA_STAT_MEAN;
    return 0;
}

static json_t *strings(const char *const *list, unsigned n)
{
    json_t *array = json_array();
    for (unsigned i = 0; i < n; i++)
        perta_json_append(&array, perta_text_json("%s", list[i]));
    return array;
}

/* Copy what the importance records about its data: "forget_samples" from "perta.samples", and so
 * on. */
static void add_data(json_t **recipe, const char *set, const struct perta_input *input)
{
    static const char *const facts[] = {"samples", "tokens", "data_hmac_sha256", "quantize"};
    for (size_t i = 0; input->ck && input->ck->n_shards && i < sizeof facts / sizeof *facts; i++) {
        char key[64], meta[64];
        snprintf(key, sizeof key, "%s_%s", set, facts[i]);
        snprintf(meta, sizeof meta, "perta.%s", facts[i]);
        const char *fact = metadata_of(&input->ck->shards[0], meta);
        if (fact)
            perta_json_set(recipe, key, json_string(fact));
    }
}

json_t *perta_recipe_json(const struct perta_unlearn *unlearn, const struct perta_rule *rule,
                          unsigned a, const struct perta_input *inputs)
{
    static const char *const missing[] = {"error", "tv", "keep"};
    json_t *recipe =
        json_pack("{s:s, s:s, s:s, s:f, s:s, s:s, s:o, s:o}", "command", "unlearn", "method",
                  perta_method_name(rule->method), "alpha", unlearn->alphas[a].text,
                  "alpha_float32", (double)unlearn->alphas[a].value, "missing",
                  missing[unlearn->missing], "nonfinite", rule->keep_nonfinite ? "keep" : "error",
                  "include", strings(unlearn->globs.include, unlearn->globs.n_include), "exclude",
                  strings(unlearn->globs.exclude, unlearn->globs.n_exclude));
    if (unlearn->one_way)
        perta_json_set(&recipe, "one_way", json_true());
    if (rule->method == PERTA_POWER)
        perta_json_set(&recipe, "power", json_real(rule->power));
    if (rule->method == PERTA_CONSTANT)
        perta_json_set(&recipe, "weight", json_real(rule->weight));
    if (rule->method == PERTA_RANDOM)
        perta_json_set(&recipe, "seed", json_sprintf("%llu", (unsigned long long)rule->seed));
    if (perta_rule_needs_importance(rule)) {
        perta_json_set(&recipe, "stat", json_string(perta_stat_name(rule->stat)));
        add_data(&recipe, "forget", &inputs[PERTA_ROLE_FORGET]);
        add_data(&recipe, "retain", &inputs[PERTA_ROLE_RETAIN]);
    }
    if (inputs[PERTA_ROLE_TUNED].ck->is_adapter) {
        perta_json_set(&recipe, "tuned", json_string("lora"));
        perta_json_set(&recipe, "lora", perta_adapter_recipe(inputs[PERTA_ROLE_TUNED].ck));
    }
    if (unlearn->steps)
        perta_json_update(&recipe, unlearn->steps);
    return recipe;
}
