/* Follows transformers' modeling_rope_utils.py (convert_rope_params_to_dict,
 * standardize_rope_params): the same option may be in several places. */
#include "estimators/model/config_read.h"

#include <math.h>
#include <string.h>

/* Whether a value is false in Python: null, false, 0, "", [], {}. */
static bool is_empty(const json_t *value)
{
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_number(value) && json_number_value(value) == 0) ||
           (json_is_string(value) && !json_string_length(value)) ||
           (json_is_array(value) && !json_array_size(value)) ||
           (json_is_object(value) && !json_object_size(value));
}

const json_t *perta_config_rope_object(const json_t *config, const char **key)
{
    const json_t *scaling = json_object_get(config, "rope_scaling");
    *key = is_empty(scaling) ? "rope_parameters" : "rope_scaling";
    scaling = json_object_get(config, *key);
    return scaling && !json_is_null(scaling) ? scaling : NULL;
}

/* Objects for each type of layer, and positions with several axes, are not for these families. */
static void check_flat(struct perta_config_reader *r, const json_t *rope)
{
    static const char *const others[] = {"mrope_section", "llama_4_scaling_beta"};
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)(uintptr_t)rope, key, value)
        if (json_is_object(value))
            perta_config_refuse(r, key,
                                "is an object; positions that differ between layers are "
                                "not supported");
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (perta_config_has(rope, others[i]))
            perta_config_refuse(r, others[i], "is not supported");
}

static void read_kind(struct perta_config_reader *r, const json_t *rope, enum perta_rope_kind *kind)
{
    static const char *const names[] = {"default", "linear", "llama3"}; /* enum perta_rope_kind */
    const char *key = json_object_get(rope, "rope_type") ? "rope_type" : "type";
    const json_t *value = json_object_get(rope, key);
    const char *name = value ? json_string_value(value) : "default";
    for (unsigned i = 0; name && i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i])) {
            *kind = (enum perta_rope_kind)i;
            return;
        }
    if (!name)
        perta_config_refuse(r, key, "is not a string");
    else if (!r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"%s\": rope type \"%s\" is not supported; default, linear and "
                           "llama3 are",
                           r->path, r->within, name);
}

/* For these families, transformers ignores it with default positions, and fails with others. */
static void check_partial(struct perta_config_reader *r, const json_t *rope)
{
    const char *const key = "partial_rotary_factor";
    const json_t *value = json_object_get(rope, key);
    value = value ? value : json_object_get(r->config, key);
    if (value && !json_is_null(value) &&
        (!json_is_number(value) || json_number_value(value) != 1.0))
        perta_config_refuse(r, key, "is not 1; rotating part of a head is not supported");
}

/* original_max_position_embeddings at the top level takes precedence over the one in the object. */
static void read_llama3(struct perta_config_reader *r, const json_t *rope, uint32_t max_positions,
                        struct perta_rope *to)
{
    const char *const original = "original_max_position_embeddings";
    to->low_freq_factor = perta_config_number(r, rope, "low_freq_factor", 0);
    to->high_freq_factor = perta_config_number(r, rope, "high_freq_factor", 0);
    to->original_positions =
        perta_config_number(r, json_object_get(r->config, original) ? r->config : rope, original,
                            perta_config_count(r, "max_position_embeddings", max_positions));
    if (!(to->high_freq_factor > to->low_freq_factor))
        perta_config_refuse(r, "high_freq_factor", "is not above \"low_freq_factor\"");
}

void perta_config_rope(struct perta_config_reader *r, uint32_t max_positions, struct perta_rope *to)
{
    const char *of;
    const json_t *rope = perta_config_rope_object(r->config, &of);
    if (rope && !json_is_object(rope))
        perta_config_refuse(r, of, "is not an object");
    r->within = of;
    check_flat(r, rope);
    read_kind(r, rope, &to->kind);
    check_partial(r, rope);
    to->theta = perta_config_number(r, json_object_get(rope, "rope_theta") ? rope : r->config,
                                    "rope_theta", 10000.0);
    if (to->kind != PERTA_ROPE_DEFAULT)
        to->factor = perta_config_number(r, rope, "factor", 0);
    if (to->kind == PERTA_ROPE_LLAMA3)
        read_llama3(r, rope, max_positions, to);
    r->within = NULL;
}

void perta_rope_frequencies(const struct perta_llm *llm, float *inv_freq)
{
    const struct perta_rope *rope = &llm->rope;
    const double pi = 3.14159265358979323846;
    for (uint32_t i = 0; i < llm->head_dim / 2; i++) {
        /* rounded to float32 at each step, as in transformers */
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
