#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "estimators/model/config.h"
#include "io/engine.h"
#include "io/format/checkpoint.h"
#include "io/format/dequantise.h"
#include "io/format/quant_config.h"
#include "io/format/quantised.h"
#include "io/text.h"
#include "stream/patch/patch_in.h"
#include "tools/cli.h"

enum { KEY_IO = CLI_KEY_OWN, KEY_JSON, KEY_TENSORS };

struct args {
    struct cli cli;
    const char *path;
    bool io, tensors;
};

/* --io takes no value here: it reports what `auto' would pick. */
static const struct argp_option options[] = {
    {"io", KEY_IO, NULL, 0, "Print how the files would be read, and why", 1},
    {"tensors", KEY_TENSORS, NULL, 0, "List every tensor", 1},
    {"json", KEY_JSON, NULL, 0, "Print the result as one JSON object", 1},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct args *args = state->input;
    switch (key) {
    case KEY_IO:
        args->io = true;
        return 0;
    case KEY_TENSORS:
        args->tensors = true;
        return 0;
    case KEY_JSON:
        args->cli.json = true;
        return 0;
    }
    return cli_one_argument(key, arg, state, &args->path,
                            "PATH is missing: what should be inspected?");
}

static const struct argp argp = {options,
                                 parse,
                                 "PATH",
                                 "Show what is in a checkpoint, an importance folder or a patch."
                                 "\v"
                                 "Examples:\n"
                                 "  perta inspect model\n"
                                 "  perta inspect --io model\n"
                                 "  perta inspect --tensors patches/alpha-1",
                                 NULL,
                                 NULL,
                                 NULL};

static json_t *shape_json(const struct perta_tensor *tensor)
{
    json_t *shape = json_array();
    for (uint32_t i = 0; i < tensor->n_dims; i++)
        perta_json_append(&shape, json_integer((json_int_t)tensor->shape[i]));
    return shape;
}

static json_t *checkpoint_json(const struct perta_checkpoint *ck)
{
    json_t *shards = json_array(), *tensors = json_array(), *dtypes = json_object();
    json_int_t parameters = 0, bytes = 0;
    for (uint32_t s = 0; s < ck->n_shards; s++) {
        const struct perta_shard *shard = &ck->shards[s];
        for (uint64_t t = 0; t < shard->header->n_tensors; t++) {
            const struct perta_tensor *tensor = &shard->header->tensors[t];
            const char *dtype = perta_dtype_name(tensor->dtype);
            json_int_t so_far = json_integer_value(json_object_get(dtypes, dtype));
            perta_json_set(&dtypes, dtype, json_integer(so_far + (json_int_t)tensor->n_elems));
            parameters += (json_int_t)tensor->n_elems;
            perta_json_append(&tensors,
                              json_pack("{s:s, s:s, s:o, s:s}", "name", tensor->name, "dtype",
                                        dtype, "shape", shape_json(tensor), "shard", shard->name));
        }
        bytes += (json_int_t)shard->size_bytes;
        perta_json_append(&shards, json_pack("{s:s, s:I, s:I, s:O?}", "name", shard->name, "bytes",
                                             (json_int_t)shard->size_bytes, "tensors",
                                             (json_int_t)shard->header->n_tensors, "metadata",
                                             shard->header->metadata));
    }
    const char *stat =
        ck->n_shards
            ? json_string_value(json_object_get(ck->shards[0].header->metadata, "perta.stat"))
            : NULL;
    return json_pack("{s:s, s:I, s:I, s:o, s:o, s:o}", "kind",
                     ck->is_adapter ? "adapter"
                     : stat         ? "importance"
                                    : "checkpoint",
                     "parameters", parameters, "bytes", bytes, "dtypes", dtypes, "shards", shards,
                     "tensors", tensors);
}

/* Add in which format its weights are quantised, and how many tensors of it can be dequantised, or
 * why not. Turns ck into the dequantised checkpoint. PERTA_ESYS is an error. */
static int add_quantised(json_t **result, struct perta_checkpoint *ck, struct perta_err *err)
{
    const json_t *value;
    struct perta_err why = {0};
    struct perta_dequantise *how = NULL;
    bool is_said = perta_quant_config_key(ck->config, &value);
    const char *method = json_string_value(json_object_get(is_said ? value : NULL, "quant_method"));
    int rc = perta_dequantise_open(ck, &how, &why);
    if (how)
        perta_json_set(
            result, "quantised",
            json_pack("{s:s?, s:I}", "method", method, "tensors", (json_int_t)how->n_coded));
    else if (rc)
        perta_json_set(
            result, "quantised",
            json_pack("{s:s?, s:o}", "method", method, "why", perta_text_json("%s", why.msg)));
    perta_dequantise_close(how);
    if (rc == PERTA_ESYS)
        *err = why;
    return rc == PERTA_ESYS ? rc : 0;
}

/* Why edits refuse its weights; NULL: they do not. */
static json_t *why_not_edited(const struct perta_checkpoint *ck)
{
    struct perta_err why = {0};
    if (perta_quantised_refuse(ck, &why))
        return perta_text_json("%s", why.msg);
    for (uint64_t i = 0; i < ck->n_tensors; i++)
        if (perta_dtype_is_editable(ck->by_name[i].tensor->dtype))
            return NULL;
    return perta_text_json("%s: has no tensor of BF16, F16, F32 or F64", ck->path);
}

/* Add whether it can be edited, and whether estimate, eval and tune accept it, which look at
 * config.json, names and shapes; or why not; and which keys of config.json these would ignore. */
static void add_uses(json_t **result, const struct perta_checkpoint *ck, json_t *not_edited)
{
    struct perta_err why = {0};
    bool is_computed = !cli_check_model(ck->path, &why);
    perta_json_set(result, "can",
                   json_pack("{s:b, s:b, s:b}", "edit", !not_edited, "estimate", is_computed,
                             "tune", is_computed));
    if (not_edited)
        perta_json_set(result, "not_edited", not_edited);
    if (!is_computed)
        perta_json_set(result, "not_computed", perta_text_json("%s", why.msg));
    else
        perta_json_set(result, "unknown_config_keys", perta_llm_unknown_keys(ck->config));
}

static json_t *choice_json(const char *const *paths, size_t n)
{
    static const char *const names[] = {"auto", "io_uring", "mmap", "pread"};
    struct perta_io_choice choice;
    struct perta_err err = {0};
    if (perta_engine_choose(PERTA_IO_AUTO, paths, n, &choice, &err))
        return json_pack("{s:s}", "why", err.msg);
    return json_pack("{s:s, s:s}", "engine", names[choice.mode], "why", choice.why);
}

static int inspect_checkpoint(const struct args *args, json_t **result, struct perta_err *err)
{
    struct perta_checkpoint *ck = NULL;
    int rc = perta_checkpoint_is_adapter(args->path)
                 ? perta_checkpoint_open_adapter(args->path, &ck, err)
                 : perta_checkpoint_open(args->path, &ck, err);
    if (rc)
        return rc;
    *result = checkpoint_json(ck);
    if (ck->is_adapter) {
        perta_json_set(result, "config", json_incref(ck->config));
    } else {
        json_t *not_edited = why_not_edited(ck);
        rc = add_quantised(result, ck, err);
        const char *kind = json_string_value(json_object_get(*result, "kind"));
        if (!rc && kind && !strcmp(kind, "checkpoint"))
            add_uses(result, ck, not_edited);
        else
            json_decref(not_edited);
    }
    const char **paths = calloc(ck->n_shards + 1, sizeof *paths);
    for (uint32_t i = 0; paths && i < ck->n_shards; i++)
        paths[i] = ck->shards[i].path;
    if (args->io)
        perta_json_set(result, "io", paths ? choice_json(paths, ck->n_shards) : NULL);
    free(paths);
    perta_checkpoint_close(ck);
    return rc;
}

/* The result is the patch's whole manifest. */
static int inspect_patch(const struct args *args, json_t **result, struct perta_err *err)
{
    struct perta_patch_in patch = {0};
    int rc = perta_patch_in_open(&patch, args->path, err);
    if (!rc)
        rc = perta_patch_in_manifest(&patch, result, err);
    if (!rc) {
        perta_json_set(result, "kind", json_string("patch"));
        const char **paths = calloc(patch.n_shards + 1, sizeof *paths);
        for (uint32_t i = 0; paths && i < patch.n_shards; i++)
            paths[i] = patch.shards[i].path;
        if (args->io)
            perta_json_set(result, "io", paths ? choice_json(paths, patch.n_shards) : NULL);
        free(paths);
    }
    perta_patch_in_close(&patch);
    return rc;
}

static const char *text(const json_t *object, const char *key)
{
    const char *value = json_string_value(json_object_get(object, key));
    return value ? value : "?";
}

#define SHOWN_BYTES 80

/* Print a value from a file of unknown origin, which may have megabytes. */
static void say_clipped(const struct cli *cli, const char *before, const char *key,
                        const char *after, const char *value)
{
    size_t len = strlen(value), key_len = strlen(key);
    int shown = SHOWN_BYTES; /* do not cut within a character */
    while (len > SHOWN_BYTES && shown && (value[shown] & 0xc0) == 0x80)
        shown--;
    cli_say(cli, "%s%.*s%s%s%.*s", before, SHOWN_BYTES, key, key_len > SHOWN_BYTES ? "..." : "",
            after, shown, value);
    if (len > SHOWN_BYTES)
        cli_say(cli, "... (%zu bytes)", len);
}

static double real(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static void say_quantised(const struct cli *cli, const char *path, const json_t *quantised)
{
    if (json_object_get(quantised, "tensors"))
        cli_say(cli,
                "  quantised: %s, %.0f tensors; `perta dequantize %s --out DIR' writes a model "
                "that can be edited\n",
                text(quantised, "method"), real(quantised, "tensors"), path);
    else if (quantised)
        cli_say(cli, "  quantised, and perta cannot dequantise it: %s\n", text(quantised, "why"));
}

/* One line. */
static void say_uses(const struct cli *cli, const json_t *r)
{
    const char *not_edited = json_string_value(json_object_get(r, "not_edited"));
    const char *not_computed = json_string_value(json_object_get(r, "not_computed"));
    if (!json_object_get(r, "can"))
        return;
    if (!not_edited && !not_computed)
        cli_say(cli, "  can be edited, estimated and tuned\n");
    else if (!not_edited)
        cli_say(cli, "  can be edited; estimate, eval and tune refuse it: %s\n", not_computed);
    else if (!not_computed)
        cli_say(cli, "  can be estimated and tuned; edits refuse it: %s\n", not_edited);
    else
        cli_say(cli, "  edits refuse it: %s; estimate, eval and tune refuse it: %s\n", not_edited,
                not_computed);
}

static void say_checkpoint(const struct args *args, const json_t *r)
{
    const struct cli *cli = &args->cli;
    char a[32];
    cli_say(cli, "%s: %.0f parameters, %s in %zu shards\n", text(r, "kind"), real(r, "parameters"),
            cli_bytes(real(r, "bytes"), a), json_array_size(json_object_get(r, "shards")));
    const char *key;
    json_t *item;
    say_uses(cli, r);
    say_quantised(cli, args->path, json_object_get(r, "quantised"));
    json_object_foreach (json_object_get(r, "config"), key, item) {
        char *value = cli_text(item);
        say_clipped(cli, "  ", key, " ", value ? value : "");
        cli_say(cli, "\n");
        free(value);
    }
    json_object_foreach (json_object_get(r, "dtypes"), key, item)
        cli_say(cli, "  %-8s %lld elements\n", key, (long long)json_integer_value(item));
    size_t i;
    json_array_foreach (json_object_get(r, "shards"), i, item) {
        cli_say(cli, "  %s: %s, %.0f tensors", text(item, "name"),
                cli_bytes(real(item, "bytes"), a), real(item, "tensors"));
        json_t *value;
        json_object_foreach (json_object_get(item, "metadata"), key, value)
            say_clipped(cli, ", ", key, "=", json_string_value(value));
        cli_say(cli, "\n");
    }
    json_array_foreach (json_object_get(r, "tensors"), i, item) {
        if (!args->tensors)
            break;
        char *shape = cli_text(json_object_get(item, "shape"));
        cli_say(cli, "  %-8s %-20s %s\n", text(item, "dtype"), shape, text(item, "name"));
        free(shape);
    }
}

static void say_patch(const struct args *args, const json_t *r)
{
    const struct cli *cli = &args->cli;
    const json_t *counts = json_object_get(r, "counts");
    char *recipe = cli_text(json_object_get(r, "recipe"));
    cli_say(cli, "patch by %s\n  recipe %s\n  %.0f of %.0f parameters changed\n", text(r, "tool"),
            recipe, real(counts, "changed"), real(counts, "parameters"));
    free(recipe);
    char a[32];
    const char *key;
    size_t i;
    json_t *item;
    json_object_foreach (json_object_get(r, "encodings"), key, item)
        cli_say(cli, "  %-8s %.0f chunks, %s\n", key, real(item, "chunks"),
                cli_bytes(real(item, "bytes"), a));
    json_array_foreach (json_object_get(json_object_get(r, "outputs"), "patch"), i, item)
        cli_say(cli, "  %s: %s\n", text(item, "name"), cli_bytes(real(item, "bytes"), a));
    json_array_foreach (json_object_get(r, "tensors"), i, item)
        if (args->tensors)
            cli_say(cli, "  %.0f of %.0f changed (%s)  %s\n", real(item, "changed"),
                    real(item, "parameters"), text(item, "action"), text(item, "name"));
}

int cmd_inspect(int argc, char **argv)
{
    struct args args = {0};
    struct perta_err err = {0};
    json_t *result = NULL;
    cli_parse(&args.cli, &argp, argc, argv, &args);
    bool is_patch = perta_patch_in_is_patch(args.path);
    int rc =
        is_patch ? inspect_patch(&args, &result, &err) : inspect_checkpoint(&args, &result, &err);
    if (!rc) {
        if (is_patch)
            say_patch(&args, result);
        else
            say_checkpoint(&args, result);
        cli_note_unknown_keys(&args.cli, result);
        const json_t *io = json_object_get(result, "io");
        if (io)
            cli_say(&args.cli, "read by %s: %s\n", text(io, "engine"), text(io, "why"));
        cli_json(&args.cli, result);
    }
    return cli_status(&args.cli, rc, &err);
}
