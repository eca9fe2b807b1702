#include "io/format/quant_config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/file.h"
#include "io/format/plain.h"
#include "io/format/python_json.h"
#include "io/text.h"

#define METHODS "fp8, mxfp8, fbgemm_fp8, mxfp4, and compressed-tensors with format float-quantized"

/* ---- the key ---- */

/* Is it neither null nor empty? transformers treats those as absent. */
static bool says_something(const json_t *value)
{
    return value && !json_is_null(value) && !json_is_false(value) &&
           !(json_is_object(value) && !json_object_size(value)) &&
           !(json_is_array(value) && !json_array_size(value)) &&
           !(json_is_string(value) && !json_string_length(value));
}

static const char *const keys[] = {"quantization_config", "compression_config"};

const char *perta_quant_config_key(const json_t *config, const json_t **value)
{
    const char *key;
    json_t *part;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (says_something(*value = json_object_get(config, keys[i])))
            return keys[i];
    json_object_foreach ((json_t *)config, key, part) {
        const char *found = json_is_object(part) ? perta_quant_config_key(part, value) : NULL;
        if (found)
            return found;
    }
    return NULL;
}

/* ---- its value ---- */

struct said {
    const struct perta_checkpoint *ck;
    const char *key;
};

/* Refuse what a key below it says. */
static int refuse(const struct said *said, const char *what, const json_t *value,
                  struct perta_err *err)
{
    char *text = value ? perta_json_text(value, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    if (value && !text)
        return perta_fail_sys(err, ENOMEM, "%s", said->ck->config_path);
    int rc = perta_fail(err, PERTA_EINPUT,
                        "%s: \"%s\" has %s %.100s; perta dequantises " METHODS
                        " (one scale for a tensor, a row or a block)",
                        said->ck->config_path, said->key, what, text ? text : "missing");
    free(text);
    return rc;
}

static bool is_word(const json_t *value, const char *word)
{
    return json_is_string(value) && !strcmp(json_string_value(value), word);
}

/* A block's two sides, or nothing. */
static int parse_block(const struct said *said, const char *what, const json_t *value,
                       uint64_t block[2], struct perta_err *err)
{
    if (!says_something(value))
        return 0;
    for (size_t i = 0; i < 2; i++) {
        json_int_t side = json_integer_value(json_array_get(value, i));
        if (json_array_size(value) != 2 || side < 1)
            return refuse(said, what, value, err);
        block[i] = (uint64_t)side;
    }
    return 0;
}

/* One of compressed-tensors' config_groups. */
static int parse_group(const struct said *said, const json_t *group, const json_t *format,
                       struct perta_quant_config *out, struct perta_err *err)
{
    const json_t *weights = json_object_get(group, "weights");
    const json_t *own = json_object_get(group, "format");
    uint64_t block[2] = {0, 0};
    format = says_something(own) ? own : format;
    if (!is_word(format, "float-quantized") && !is_word(format, "naive-quantized"))
        return refuse(said, "format", format, err);
    if (!is_word(json_object_get(weights, "type"), "float") ||
        json_integer_value(json_object_get(weights, "num_bits")) != 8 ||
        json_is_false(json_object_get(weights, "symmetric")))
        return refuse(said, "weights", weights, err);
    const json_t *structure = json_object_get(weights, "block_structure");
    int rc = parse_block(said, "block_structure", structure, block, err);
    if (!rc && block[0] && out->block[0] && memcmp(block, out->block, sizeof block))
        rc = refuse(said, "another block_structure", structure, err);
    if (!rc && block[0])
        memcpy(out->block, block, sizeof block);
    return rc;
}

static int parse_compressed(const struct said *said, const json_t *value,
                            struct perta_quant_config *out, struct perta_err *err)
{
    static const char *const must_be_empty[] = {"sparsity_config", "transform_config"};
    const json_t *groups = json_object_get(value, "config_groups");
    const char *name;
    json_t *group;
    int rc = 0;
    for (size_t i = 0; i < 2; i++) {
        const json_t *part = json_object_get(value, must_be_empty[i]);
        if (says_something(part) && !is_word(json_object_get(part, "format"), "dense"))
            return refuse(said, must_be_empty[i], part, err);
    }
    if (!json_object_size(groups))
        return refuse(said, "config_groups", groups, err);
    json_object_foreach ((json_t *)groups, name, group)
        if (!rc)
            rc = parse_group(said, group, json_object_get(value, "format"), out, err);
    return rc;
}

/* The dtype of the model's parameters, into which transformers dequantises. */
static int parse_dtype(const struct perta_checkpoint *ck, enum perta_dtype *dtype,
                       struct perta_err *err)
{
    static const struct {
        const char *word;
        enum perta_dtype dtype;
    } all[] = {{"bfloat16", PERTA_BF16}, {"float16", PERTA_F16}, {"float32", PERTA_F32}};
    static const char *const words[] = {"dtype", "torch_dtype"};
    const json_t *of[] = {ck->config, json_object_get(ck->config, "text_config")}, *value = NULL;
    for (size_t i = 0; i < 4 && !says_something(value); i++)
        value = json_object_get(of[i / 2], words[i % 2]);
    *dtype = PERTA_BF16;
    if (!says_something(value))
        return 0;
    const char *word = json_is_string(value) ? json_string_value(value) : "(not a string)";
    word += strncmp(word, "torch.", 6) ? 0 : 6;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(word, all[i].word)) {
            *dtype = all[i].dtype;
            return 0;
        }
    return perta_fail(err, PERTA_EINPUT,
                      "%s: \"dtype\" %.100s; weights are dequantised to bfloat16, float16 or "
                      "float32",
                      ck->config_path, word);
}

int perta_quant_config_parse(const struct perta_checkpoint *ck, const char *key,
                             const json_t *value, struct perta_quant_config *out,
                             struct perta_err *err)
{
    static const struct {
        const char *word;
        enum perta_quant_method method;
    } all[] = {{"fp8", PERTA_QUANT_FP8},
               {"mxfp8", PERTA_QUANT_FP8},
               {"fbgemm_fp8", PERTA_QUANT_FBGEMM},
               {"compressed-tensors", PERTA_QUANT_COMPRESSED},
               {"mxfp4", PERTA_QUANT_MXFP4}};
    const struct said said = {ck, key};
    const json_t *method = json_object_get(value, "quant_method");
    size_t i = 0, n = sizeof all / sizeof *all;
    while (i < n && !is_word(method, all[i].word))
        i++;
    if (i == n || strcmp(key, "quantization_config"))
        return refuse(&said, "quant_method", method, err);
    *out = (struct perta_quant_config){.method = all[i].method};
    int rc = parse_dtype(ck, &out->dtype, err);
    if (!rc && out->method == PERTA_QUANT_FP8)
        rc = parse_block(&said, "weight_block_size", json_object_get(value, "weight_block_size"),
                         out->block, err);
    if (!rc && out->method == PERTA_QUANT_COMPRESSED)
        rc = parse_compressed(&said, value, out, err);
    return rc;
}

/* ---- config.json without it ---- */

/* Remove the text from byte `from` of it up to where p is, and go on there. */
static void cut(char *text, struct perta_plain *p, size_t from)
{
    size_t n = (size_t)(p->end - p->at);
    memmove(text + from, p->at, n);
    p->at = text + from;
    p->end = p->at + n;
}

static bool cut_object(char *text, struct perta_plain *p);

/* Pass a member of an object, and the comma behind it if there is one. Cut it if it is one of the
 * keys, else what is to be cut within it. *comma: the one before the member, or NULL; then that
 * behind it. *more: there is another member. */
static bool cut_member(char *text, struct perta_plain *p, const char **comma, bool *more)
{
    const char *name;
    size_t len, from = (size_t)(p->at - text);
    if (!perta_plain_raw(p, &name, &len) || !perta_plain_word(p, ":"))
        return false;
    bool gone = perta_plain_is(name, len, keys[0]) || perta_plain_is(name, len, keys[1]);
    struct perta_plain value = *p;
    bool is_object = !gone && perta_plain_word(&value, "{");
    if (is_object ? !cut_object(text, p) : !perta_plain_pass(p))
        return false;
    struct perta_plain behind = *p;
    *more = perta_plain_word(&behind, ",");
    if (gone && !*more && *comma) { /* the last member takes the comma before it along */
        cut(text, p, (size_t)(*comma - text));
        return true;
    }
    if (*more)
        *p = behind;
    if (gone)
        cut(text, p, from);
    else
        *comma = *more ? p->at - 1 : NULL;
    return true;
}

/* False if p is not at an object. */
static bool cut_object(char *text, struct perta_plain *p)
{
    const char *comma = NULL;
    if (!perta_plain_word(p, "{"))
        return false;
    for (bool more = !perta_plain_word(p, "}"); more;) {
        if (!cut_member(text, p, &comma, &more) || (!more && !perta_plain_word(p, "}")))
            return false;
    }
    return true;
}

int perta_quant_config_cut(const struct perta_checkpoint *ck, char **text, size_t *len,
                           struct perta_err *err)
{
    json_t *rest = NULL;
    const json_t *value;
    int rc = perta_file_text(ck->config_path, text, len, err);
    if (rc)
        return rc;
    struct perta_plain p = {*text, *text + *len};
    if (!strncmp(*text, "\xef\xbb\xbf", 3))
        p.at += 3;
    bool is_cut = cut_object(*text, &p) && perta_plain_word(&p, "");
    *len = (size_t)(p.end - *text);
    /* A key may be written in ways that are not plain. */
    rc = is_cut ? perta_python_json_parse(*text, *len, ck->config_path, &rest, err) : 0;
    if (!rc && (!is_cut || perta_quant_config_key(rest, &value)))
        rc = perta_fail(err, PERTA_EINPUT, "%s: \"quantization_config\" cannot be cut out of it",
                        ck->config_path);
    json_decref(rest);
    if (rc) {
        free(*text);
        *text = NULL;
    }
    return rc;
}
