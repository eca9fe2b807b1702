#include "io/format/quantised.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/format/quant_config.h"
#include "io/text.h"

#define WHAT_TO_DO "dequantise the model to BF16 first"

/* ---- what the folder says ---- */

static int refuse_key(const struct perta_checkpoint *ck, const char *key, const json_t *value,
                      struct perta_err *err)
{
    const char *method = json_string_value(json_object_get(value, "quant_method"));
    struct perta_quant_config known;
    struct perta_err why = {0};
    bool can = !perta_quant_config_parse(ck, key, value, &known, &why);
    return perta_fail(err, PERTA_EINPUT,
                      "%s: \"%s\"%s%.100s: the weights are quantised; " WHAT_TO_DO
                      "%s, or, where full weights are stored, remove that key",
                      ck->config_path, key, method ? " " : "", method ? method : "",
                      can ? " (perta dequantize MODEL --out DIR)" : "");
}

/* Older tools announce it in a file of their own. */
static int check_files(const struct perta_checkpoint *ck, struct perta_err *err)
{
    static const char *const names[] = {"hf_quant_config.json", "quantize_config.json",
                                        "quant_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", ck->path, names[i]) < 0)
            return perta_fail_sys(err, ENOMEM, "%s", ck->path);
        bool there = !access(path, F_OK);
        free(path);
        if (there)
            return perta_fail(err, PERTA_EINPUT,
                              "%s/%s: the weights are quantised; " WHAT_TO_DO
                              ", or, where full weights are stored, remove that file",
                              ck->path, names[i]);
    }
    return 0;
}

/* ---- what the tensors say ---- */

static bool is_f8(enum perta_dtype dtype)
{
    return dtype == PERTA_F4 || dtype == PERTA_F6_E2M3 || dtype == PERTA_F6_E3M2 ||
           dtype == PERTA_F8_E4M3 || dtype == PERTA_F8_E5M2 || dtype == PERTA_F8_E8M0;
}

/* Can codes have this dtype? BOOL and complex numbers cannot. */
static bool is_integer(enum perta_dtype dtype)
{
    return !perta_dtype_is_editable(dtype) && !is_f8(dtype) && dtype != PERTA_BOOL &&
           dtype != PERTA_C64;
}

static bool ends_in_any(const char *name, const char *const *endings)
{
    while (*endings && !perta_text_ends_in(name, *endings))
        endings++;
    return *endings;
}

/* The part after the last dot. */
static const char *last_part(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

/* Integers with these names are weights, whatever is beside them. */
static bool is_named_as_codes(const char *name)
{
    static const char *const endings[] = {"weight", "weight_packed", "qdata", "._data", NULL};
    static const char *const parts[] = {"qweight",       "qzeros", "q_weight", "W_q",    "codes",
                                        "dense_weights", "Qidxs",  "trellis",  "blocks", NULL};
    const char *last = last_part(name);
    for (size_t i = 0; parts[i]; i++)
        if (!strcmp(last, parts[i]))
            return true;
    return ends_in_any(name, endings) || perta_text_ends_in(name, "_blocks");
}

/* Integer matrices with these names are codes too: Marlin, sparse weights, VPTQ. */
static bool is_matrix_of_codes(const struct perta_tensor *t)
{
    static const char *const parts[] = {"B", "B_24", "bitmask", "indices", NULL};
    for (size_t i = 0; t->n_dims >= 2 && parts[i]; i++)
        if (!strcmp(last_part(t->name), parts[i]))
            return true;
    return false;
}

/* Integers that models have beside a scale without being codes: positions and masks. */
static bool is_named_as_buffer(const char *name)
{
    static const char *const endings[] = {"_ids",   "index", "bias",    "mask",
                                          "counts", "count", "tracked", NULL};
    return ends_in_any(last_part(name), endings);
}

/* Is it named as what turns codes into weights? */
static bool is_named_as_scale(const char *name)
{
    static const char *const words[] = {"scale",       "scaling",  "absmax",   "scb",
                                        "quant_map",   "codebook", "centroid", "zero_point",
                                        "quant_state", NULL};
    for (size_t i = 0; words[i]; i++)
        if (strcasestr(last_part(name), words[i]))
            return true;
    return false;
}

static bool may_be_codes(const struct perta_tensor *t)
{
    bool is_matrix = is_integer(t->dtype) && t->n_dims >= 2 && !is_named_as_buffer(t->name);
    return (is_f8(t->dtype) || is_matrix) && !is_named_as_scale(t->name);
}

/* Tensors named as scales, sorted by module. */
struct scales {
    const struct perta_tensor **of; /* (n) */
    uint64_t n;
};

/* Compare the module of name, up to its last dot, with module (len characters). */
static int compare_module(const char *name, const char *module, size_t len)
{
    size_t own = (size_t)(last_part(name) - name);
    int order = memcmp(name, module, own < len ? own : len);
    return order ? order : (own > len) - (own < len);
}

static int by_module(const void *a, const void *b)
{
    const struct perta_tensor *x = *(const struct perta_tensor *const *)a,
                              *y = *(const struct perta_tensor *const *)b;
    return compare_module(x->name, y->name, (size_t)(last_part(y->name) - y->name));
}

static int list_scales(struct scales *scales, const struct perta_checkpoint *ck,
                       struct perta_err *err)
{
    scales->of = calloc(ck->n_tensors + 1, sizeof *scales->of);
    if (!scales->of)
        return perta_fail_sys(err, ENOMEM, "%s", ck->path);
    for (uint64_t i = 0; i < ck->n_tensors; i++)
        if (is_named_as_scale(ck->by_name[i].tensor->name))
            scales->of[scales->n++] = ck->by_name[i].tensor;
    qsort(scales->of, scales->n, sizeof *scales->of, by_module);
    return 0;
}

/* A scale in that module (len characters, with its dot) other than the codes themselves; or
 * NULL. */
static const struct perta_tensor *find_in_module(const struct scales *scales, const char *module,
                                                 size_t len, const struct perta_tensor *codes)
{
    uint64_t low = 0, high = scales->n;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (compare_module(scales->of[middle]->name, module, len) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    low += low < scales->n && scales->of[low] == codes;
    return low < scales->n && !compare_module(scales->of[low]->name, module, len) ? scales->of[low]
                                                                                  : NULL;
}

/* Find the scale of codes: in the same module (mlp.weight, mlp.scale), or below the codes' own name
 * (mlp.weight.absmax). *scale is NULL if there is none. */
static int find_scale(const struct scales *scales, const struct perta_tensor *codes,
                      const struct perta_tensor **scale, struct perta_err *err)
{
    size_t module = (size_t)(last_part(codes->name) - codes->name);
    char *below = NULL;
    *scale = find_in_module(scales, codes->name, module, codes);
    if (*scale)
        return 0;
    if (asprintf(&below, "%s.", codes->name) < 0)
        return perta_fail_sys(err, ENOMEM, "%s", codes->name);
    *scale = find_in_module(scales, below, strlen(below), codes);
    free(below);
    return 0;
}

static int check_tensor(const struct perta_checkpoint *ck, const struct scales *scales,
                        const struct perta_ref *ref, struct perta_err *err)
{
    const struct perta_tensor *t = ref->tensor, *scale = NULL;
    const char *path = ck->shards[ref->shard].path;
    int rc = may_be_codes(t) ? find_scale(scales, t, &scale, err) : 0;
    if (rc)
        return rc;
    if (scale)
        return perta_fail(
            err, PERTA_EINPUT,
            "%s: tensor %s is %s, with %s beside it: the weights are quantised; " WHAT_TO_DO, path,
            t->name, perta_dtype_name(t->dtype), scale->name);
    if (is_integer(t->dtype) && t->n_dims && (is_named_as_codes(t->name) || is_matrix_of_codes(t)))
        return perta_fail(err, PERTA_EINPUT,
                          "%s: tensor %s is %s: the weights are quantised; " WHAT_TO_DO, path,
                          t->name, perta_dtype_name(t->dtype));
    return 0;
}

int perta_quantised_refuse_tensors(const struct perta_checkpoint *ck, struct perta_err *err)
{
    struct scales scales = {0};
    int rc = check_files(ck, err);
    if (!rc)
        rc = list_scales(&scales, ck, err);
    for (uint64_t i = 0; i < ck->n_tensors && !rc; i++)
        rc = check_tensor(ck, &scales, &ck->by_name[i], err);
    free(scales.of);
    return rc;
}

int perta_quantised_refuse(const struct perta_checkpoint *ck, struct perta_err *err)
{
    const json_t *value;
    const char *key = perta_quant_config_key(ck->config, &value);
    return key ? refuse_key(ck, key, value, err) : perta_quantised_refuse_tensors(ck, err);
}
