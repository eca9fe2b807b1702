/* Follows transformers' modeling_rope_utils.py (convert_rope_params_to_dict,
 * standardize_rope_params), and the families' own versions of these: the same option may be in
 * several places. */
#include "estimators/model/config_read.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "estimators/model/family.h"
#include "io/text.h"

#define N(list) (sizeof(list) / sizeof *(list))

static const char original_key[] = "original_max_position_embeddings";
static const char partial_key[] = "partial_rotary_factor";
static const char *const layer_types[] = {"full_attention", "sliding_attention"}; /* llm->ropes */

/* enum perta_rope_kind */
static const char *const kinds[] = {"default", "linear",   "llama3",      "dynamic",
                                    "yarn",    "longrope", "proportional"};

/* Whether a value is false in Python: null, false, 0, "", [], {}. */
static bool is_empty(const json_t *value)
{
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_number(value) && json_number_value(value) == 0) ||
           (json_is_string(value) && !json_string_length(value)) ||
           (json_is_array(value) && !json_array_size(value)) ||
           (json_is_object(value) && !json_object_size(value));
}

static const json_t *rope_object(const json_t *config, const char **key)
{
    const json_t *scaling = json_object_get(config, "rope_scaling");
    *key = is_empty(scaling) ? "rope_parameters" : "rope_scaling";
    scaling = json_object_get(config, *key);
    return scaling && !json_is_null(scaling) ? scaling : NULL;
}

/* ---- one table ---- */

/* What a table is read from, and where it goes. */
struct source {
    struct perta_config_reader *r;
    const struct perta_rope_family *family;
    const json_t *rope;    /* the object with its options; NULL: none */
    const char *theta_key; /* in the config, where rope has no theta; NULL: not there either */
    double theta;          /* if it is nowhere; 0: 10000 */
    uint32_t max_positions, head_dim;
    bool by_layer_type; /* rope is one of several */
    struct perta_rope *to;
};

/* As "value or fallback" in Python. */
static double number_or(const struct source *s, const char *key, double fallback)
{
    return is_empty(json_object_get(s->rope, key))
               ? fallback
               : perta_config_number(s->r, s->rope, key, fallback);
}

static double theta_of(const struct source *s)
{
    double fallback = s->theta > 0 ? s->theta : 10000;
    const json_t *from = json_object_get(s->rope, "rope_theta") ? s->rope : s->r->config;
    if (from == s->rope)
        return perta_config_number(s->r, from, "rope_theta", 0);
    return s->theta_key ? perta_config_number(s->r, from, s->theta_key, fallback) : fallback;
}

static bool is_named(const struct source *s, const char *name, size_t kind)
{
    if (s->family->mrope && kind == PERTA_ROPE_DEFAULT && !strcmp(name, "mrope"))
        return true;
    if (s->family->yarn_is_longrope && (kind == PERTA_ROPE_YARN || kind == PERTA_ROPE_LONGROPE)) {
        bool is = !strcmp(name, "su") || !strcmp(name, "yarn") || !strcmp(name, "longrope");
        return is && kind == PERTA_ROPE_LONGROPE;
    }
    return !strcmp(name, kinds[kind]);
}

static void read_kind(const struct source *s)
{
    struct perta_config_reader *r = s->r;
    const char *key = json_object_get(s->rope, "rope_type") ? "rope_type" : "type";
    const json_t *value = json_object_get(s->rope, key);
    const char *name = value ? json_string_value(value) : "default";
    for (size_t i = 0; name && i < N(kinds); i++)
        if (is_named(s, name, i)) {
            s->to->kind = (enum perta_rope_kind)i;
            return;
        }
    if (!name)
        perta_config_refuse(r, key, "is not a string");
    else if (!r->rc)
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"%s\": rope type \"%s\" is not supported; default, linear, "
                           "llama3, dynamic, yarn, longrope and proportional are",
                           r->path, r->within, name);
}

/* A family whose heads are rotated as a whole ignores the share with default positions, and fails
 * with others. */
static void check_whole(const struct source *s)
{
    const json_t *value = json_object_get(s->rope, partial_key);
    value = value ? value : json_object_get(s->r->config, partial_key);
    if (value && !json_is_null(value) &&
        (!json_is_number(value) || json_number_value(value) != 1.0))
        perta_config_refuse(s->r, partial_key,
                            "is not 1; rotating part of a head is not supported here");
}

/* The share of a head that is rotated, in (0, 1]. */
static double partial_of(const struct source *s)
{
    const struct perta_rope_family *f = s->family;
    const char *key = f->partial_key ? f->partial_key : partial_key;
    const json_t *config = s->r->config;
    double share = f->partial > 0 ? f->partial : 1;
    if (json_object_get(s->rope, partial_key))
        share = perta_config_number(s->r, s->rope, key = partial_key, 0);
    else if (json_object_get(config, key))
        share = perta_config_number(s->r, config, key, 0);
    else if (f->elements_key && perta_config_has(config, f->elements_key))
        share = perta_config_count(s->r, key = f->elements_key, 0) / (double)s->head_dim;
    if (share > 1)
        perta_config_refuse(s->r, key, "is more than a whole head");
    return share;
}

static void read_rotated(const struct source *s)
{
    struct perta_rope *to = s->to;
    to->rotated = s->head_dim;
    if (to->kind == PERTA_ROPE_PROPORTIONAL) {
        double share = partial_of(s);
        to->n_moving = s->r->rc ? 0 : (uint32_t)floor(share * s->head_dim / 2);
        return;
    }
    if (!(s->family->partial > 0)) {
        check_whole(s);
        return;
    }
    double share = partial_of(s);
    if (s->r->rc)
        return;
    to->rotated = (uint32_t)(s->head_dim * share);
    if (!s->r->rc && (!to->rotated || to->rotated % 2))
        s->r->rc =
            perta_fail(s->r->err, PERTA_EINPUT,
                       "%s: %u of %u elements of a head would be rotated (\"%s\"), which are "
                       "no pairs",
                       s->r->path, to->rotated, s->head_dim, partial_key);
}

/* The key at the top level takes precedence over the one in the object. */
static double original_positions(const struct source *s)
{
    struct perta_config_reader *r = s->r;
    double fallback = perta_config_count(r, "max_position_embeddings", s->max_positions);
    if (s->by_layer_type)
        return perta_config_number(r, s->rope, original_key, fallback);
    bool above = json_object_get(r->config, original_key);
    if (!above && s->family->original_positions)
        return s->family->original_positions;
    return perta_config_number(r, above ? r->config : s->rope, original_key, fallback);
}

static void read_llama3(const struct source *s)
{
    struct perta_rope *to = s->to;
    to->low_freq_factor = perta_config_number(s->r, s->rope, "low_freq_factor", 0);
    to->high_freq_factor = perta_config_number(s->r, s->rope, "high_freq_factor", 0);
    to->original_positions = original_positions(s);
    if (to->high_freq_factor < to->low_freq_factor)
        perta_config_refuse(s->r, "high_freq_factor", "is below \"low_freq_factor\"");
}

/* The ratio of the lengths, where factor is null. */
static double ratio(const struct source *s)
{
    return perta_config_count(s->r, "max_position_embeddings", s->max_positions) /
           s->to->original_positions;
}

static void set_scale(const struct source *s, double derived)
{
    bool is_given = perta_config_has(s->rope, "attention_factor");
    s->to->scale =
        (float)(is_given ? perta_config_number(s->r, s->rope, "attention_factor", 0) : derived);
    if (!(s->to->scale > 0) || !isfinite(s->to->scale))
        perta_config_refuse(s->r, "attention_factor", "follows from the others, and is no number");
}

static void read_yarn(const struct source *s)
{
    struct perta_rope *to = s->to;
    const json_t *truncate = json_object_get(s->rope, "truncate");
    to->original_positions = original_positions(s);
    to->factor = json_is_null(json_object_get(s->rope, "factor"))
                     ? ratio(s)
                     : perta_config_number(s->r, s->rope, "factor", 0);
    to->beta_fast = number_or(s, "beta_fast", 32);
    to->beta_slow = number_or(s, "beta_slow", 1);
    to->truncate = !truncate || !is_empty(truncate);
    if (s->by_layer_type && !to->truncate)
        perta_config_refuse(s->r, "truncate",
                            "is false, which transformers does not see at this place");
    if (to->theta == 1)
        perta_config_refuse(s->r, "rope_theta", "is 1, which yarn cannot have");
    double mscale = number_or(s, "mscale", 0), all = number_or(s, "mscale_all_dim", 0);
    to->mscale_all_dim = all;
    set_scale(s, mscale > 0 && all > 0
                     ? perta_rope_mscale(to->factor, mscale) / perta_rope_mscale(to->factor, all)
                     : perta_rope_mscale(to->factor, 1));
}

/* A list of a number for each frequency. */
static void read_list(const struct source *s, const char *key, float *values)
{
    const json_t *list = json_object_get(s->rope, key);
    size_t n = s->to->rotated / 2;
    bool is = json_is_array(list) && json_array_size(list) == n && n <= PERTA_ROPE_FREQUENCIES;
    for (size_t i = 0; is && i < n; i++) {
        const json_t *value = json_array_get(list, i);
        is = json_is_number(value);
        values[i] = (float)json_number_value(value);
    }
    if (!is)
        perta_config_refuse(s->r, key, "is not a list of a number for each pair of a head");
}

/* Phi-3.5-MoE has a scale of its own for long sequences instead of the long factors. */
static void read_longrope(const struct source *s)
{
    struct perta_rope *to = s->to;
    to->original_positions = original_positions(s);
    to->factor = perta_config_has(s->rope, "factor")
                     ? perta_config_number(s->r, s->rope, "factor", 0)
                     : ratio(s);
    read_list(s, "short_factor", to->short_factors);
    read_list(s, "long_factor", to->long_factors);
    if (s->family->short_mscale) {
        to->scale = (float)perta_config_number(s->r, s->rope, "short_mscale", 0);
        to->long_scale = (float)perta_config_number(s->r, s->rope, "long_mscale", 0);
        memcpy(to->long_factors, to->short_factors, sizeof to->long_factors);
        return;
    }
    set_scale(s, to->factor <= 1 ? 1 : sqrt(1 + log(to->factor) / log(to->original_positions)));
    to->long_scale = to->scale;
}

/* HunYuan's kind that is called dynamic, too: with alpha, theta is another one, for any length. */
static void read_alpha(const struct source *s)
{
    struct perta_rope *to = s->to;
    double alpha = number_or(s, "alpha", 0), D = to->rotated;
    if (!(alpha > 0) || s->r->rc)
        return;
    to->kind = PERTA_ROPE_DEFAULT;
    to->theta *= pow(alpha, D / (D - 2));
    if (!s->family->alpha)
        perta_config_refuse(s->r, "alpha", "is not supported");
    else if (!isfinite((float)to->theta))
        perta_config_refuse(s->r, "alpha", "is too large");
}

static void read_options(const struct source *s)
{
    struct perta_rope *to = s->to;
    switch (to->kind) {
    case PERTA_ROPE_LLAMA3:
        to->factor = perta_config_number(s->r, s->rope, "factor", 0);
        read_llama3(s);
        return;
    case PERTA_ROPE_LINEAR:
        to->factor = perta_config_number(s->r, s->rope, "factor", 0);
        return;
    case PERTA_ROPE_DYNAMIC:
        to->factor = perta_config_number(s->r, s->rope, "factor", 0);
        to->max_positions = perta_config_count(s->r, "max_position_embeddings", s->max_positions);
        if (to->rotated == 2)
            perta_config_refuse(s->r, "rope_type",
                                "cannot be dynamic with a single pair to rotate");
        read_alpha(s);
        return;
    case PERTA_ROPE_YARN:
        read_yarn(s);
        return;
    case PERTA_ROPE_LONGROPE:
        read_longrope(s);
        return;
    case PERTA_ROPE_PROPORTIONAL:
        to->factor = perta_config_number(s->r, s->rope, "factor", 1);
        return;
    case PERTA_ROPE_DEFAULT:
        return;
    }
}

/* Ministral3's scale of queries. Its positions are those of the object, or what the kind has. */
static void read_query_scale(const struct source *s)
{
    static const char key[] = "llama_4_scaling_beta";
    struct perta_rope *to = s->to;
    if (!s->family->query_scale) {
        if (perta_config_has(s->rope, key))
            perta_config_refuse(s->r, key, "is not supported");
        return;
    }
    const json_t *beta = json_object_get(s->rope, key);
    bool is_off = json_is_number(beta) && json_number_value(beta) == 0;
    to->query_beta = is_off ? 0 : perta_config_number(s->r, s->rope, key, 0);
    to->query_positions = to->original_positions > 0
                              ? to->original_positions
                              : perta_config_number(s->r, s->rope, original_key, 0);
}

/* Images have positions with three axes, one for each of these parts of a head; text has three
 * equal ones, so that for text this is no other rotation. Other families ignore it. */
static void check_sections(const struct source *s)
{
    const json_t *sections = json_object_get(s->rope, "mrope_section");
    json_int_t sum = sections ? 0 : 16 + 24 + 24; /* if they are missing */
    if (!s->family->mrope)
        return;
    for (size_t i = 0; i < json_array_size(sections); i++) {
        const json_t *n = json_array_get(sections, i);
        sum += json_is_integer(n) && json_integer_value(n) > 0 && sum <= UINT32_MAX
                   ? json_integer_value(n)
                   : UINT32_MAX;
    }
    if (sum != s->to->rotated / 2)
        perta_config_refuse(s->r, "mrope_section", "is no list of the parts of half a head");
}

/* Options that make no numbers in float32. The first three kinds were checked by their keys. */
static void check_frequencies(const struct source *s)
{
    float inv_freq[PERTA_ROPE_FREQUENCIES];
    if (s->r->rc || s->to->kind <= PERTA_ROPE_LLAMA3)
        return;
    if (s->to->rotated / 2 > PERTA_ROPE_FREQUENCIES) {
        perta_config_refuse(s->r, "rope_type", "is not supported for heads this large");
        return;
    }
    for (int is_long = 0; is_long < 2 && !s->r->rc; is_long++) {
        perta_rope_frequencies(s->to, is_long, inv_freq);
        for (uint32_t i = 0; i < s->to->rotated / 2; i++)
            if (!isfinite(inv_freq[i]))
                perta_config_refuse(s->r, "rope_type",
                                    "has options whose frequencies are no numbers");
    }
}

static void read_table(const struct source *s)
{
    const char *key = s->family->interleave_key;
    bool interleaved = key && json_object_get(s->r->config, key) ? perta_config_bool(s->r, key)
                                                                 : s->family->interleaved;
    *s->to = (struct perta_rope){.interleaved = interleaved, .scale = 1};
    read_kind(s);
    read_rotated(s);
    s->to->theta = theta_of(s);
    read_options(s);
    if ((s->family->short_mscale || s->family->yarn_is_longrope) &&
        s->to->kind != PERTA_ROPE_LONGROPE && s->to->kind != PERTA_ROPE_DEFAULT)
        perta_config_refuse(s->r, "rope_type", "is neither default nor longrope");
    read_query_scale(s);
    check_sections(s);
    check_frequencies(s);
}

/* ---- one for all layers, or one for each type ---- */

static void no_memory(struct perta_config_reader *r)
{
    if (!r->rc)
        r->rc = perta_fail_sys(r->err, ENOMEM, "%s", r->path);
}

/* Objects for each type of layer are not for families whose layers share one. */
static void check_flat(struct perta_config_reader *r, const json_t *rope)
{
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)(uintptr_t)rope, key, value)
        if (json_is_object(value))
            perta_config_refuse(r, key,
                                "is an object; positions that differ between layers are "
                                "not supported");
}

static void read_flat(struct source *s, struct perta_rope to[2])
{
    const char *of;
    const json_t *rope = rope_object(s->r->config, &of);
    json_t *defaults = NULL;
    if (!rope && s->family->parameters)
        rope = defaults = json_loads(s->family->parameters, 0, NULL);
    if (!rope && s->family->parameters)
        no_memory(s->r);
    if (rope && !json_is_object(rope))
        perta_config_refuse(s->r, of, "is not an object");
    s->r->within = of;
    check_flat(s->r, rope);
    s->rope = rope;
    s->theta_key = s->family->theta_key ? s->family->theta_key : "rope_theta";
    s->theta = s->family->theta;
    s->to = &to[0];
    read_table(s);
    to[1] = to[0];
    s->r->within = NULL;
    json_decref(defaults);
}

/* transformers passes over keys that are beside those of the types. */
static void check_nested(struct perta_config_reader *r, const json_t *parameters)
{
    const char *key;
    json_t *value;
    r->within = "rope_parameters";
    json_object_foreach ((json_t *)(uintptr_t)parameters, key, value)
        if (strcmp(key, layer_types[0]) && strcmp(key, layer_types[1]))
            perta_config_refuse(r, key,
                                "is not of a type of layers; full_attention and "
                                "sliding_attention are, with an object each");
        else if (!json_is_object(value) && !json_is_null(value))
            perta_config_refuse(r, key, "is not an object");
    r->within = NULL;
}

/* rope_scaling, from before layers had types, is for full attention and has precedence. */
static void read_nested(struct source *s, struct perta_rope to[2])
{
    struct perta_config_reader *r = s->r;
    const json_t *parameters = json_object_get(r->config, "rope_parameters");
    const json_t *scaling = json_object_get(r->config, "rope_scaling");
    if (perta_config_has(r->config, "rope_parameters") && !json_is_object(parameters))
        perta_config_refuse(r, "rope_parameters", "is not an object");
    if (perta_config_has(r->config, "rope_scaling") && !json_is_object(scaling))
        perta_config_refuse(r, "rope_scaling", "is not an object");
    check_nested(r, parameters);
    for (int i = 0; i < 2; i++) {
        json_t *rope = json_object_get(parameters, layer_types[i]);
        rope = json_is_object(rope) ? json_copy(rope) : json_object();
        if (!i && json_is_object(scaling))
            perta_json_update(&rope, scaling);
        if (!rope)
            no_memory(r);
        s->rope = rope;
        s->theta_key = i ? s->family->local_theta_key : "rope_theta";
        s->theta = i ? s->family->local_theta : s->family->theta;
        s->to = &to[i];
        r->within = !i && json_object_size(scaling) ? "rope_scaling" : layer_types[i];
        if (!i && json_object_get(scaling, "type") && !json_object_get(scaling, "rope_type"))
            perta_config_refuse(r, "type",
                                "is not seen by transformers at this place, where "
                                "\"rope_type\" is");
        read_table(s);
        json_decref(rope);
    }
    r->within = NULL;
}

void perta_config_rope(struct perta_config_reader *r, const struct perta_rope_family *family,
                       uint32_t max_positions, uint32_t head_dim, struct perta_rope to[2])
{
    struct source s = {.r = r,
                       .family = family,
                       .max_positions = max_positions,
                       .head_dim = head_dim,
                       .by_layer_type = family->by_layer_type};
    (family->by_layer_type ? read_nested : read_flat)(&s, to);
}

bool perta_config_rope_reads(const struct perta_rope_family *f, const char *key)
{
    const char *const own[] = {f->theta_key, f->local_theta_key, f->partial_key, f->elements_key,
                               f->interleave_key};
    for (size_t i = 0; i < N(own); i++)
        if (own[i] && !strcmp(own[i], key))
            return true;
    return false;
}

/* ---- keys ---- */

/* Keys of the object, and the kinds that read them; NULL: all. */
static const struct {
    const char *key, *kinds;
} known[] = {
    {"alpha", "dynamic"},
    {"attention_factor", "yarn longrope su"},
    {"beta_fast", "yarn"},
    {"beta_slow", "yarn"},
    {"factor", NULL},
    {"finetuned", NULL},
    {"high_freq_factor", NULL},
    {"llama_4_scaling_beta", NULL},
    {"long_factor", "yarn longrope su"},
    {"long_mscale", "longrope su"},
    {"low_freq_factor", NULL},
    {"max_position_embeddings", NULL}, /* which nobody reads there */
    {"mrope_section", NULL},
    {"mscale", "yarn"},
    {"mscale_all_dim", "yarn"},
    {"original_max_position_embeddings", NULL},
    {"partial_rotary_factor", NULL},
    {"rope_theta", NULL},
    {"rope_type", NULL},
    {"short_factor", "yarn longrope su"},
    {"short_mscale", "longrope su"},
    {"truncate", "yarn"},
    {"type", NULL},
};

static bool is_known(const char *key, const char *kind)
{
    for (size_t i = 0; i < N(known); i++)
        if (!strcmp(key, known[i].key))
            return !known[i].kinds || (kind && *kind && strstr(known[i].kinds, kind));
    return false;
}

static void add_unknown(const json_t *rope, const char *of, json_t **list)
{
    const json_t *kind = json_object_get(rope, "rope_type");
    const char *key, *name = json_string_value(kind ? kind : json_object_get(rope, "type"));
    json_t *value;
    json_object_foreach ((json_t *)(uintptr_t)rope, key, value)
        if (json_is_object(value) && !strchr(of, '.') &&
            (!strcmp(key, layer_types[0]) || !strcmp(key, layer_types[1]))) {
            char within[64];
            snprintf(within, sizeof within, "%s.%s", of, key);
            add_unknown(value, within, list);
        } else if (!is_known(key, name))
            perta_json_append(list, perta_text_json("%s.%s", of, key));
}

void perta_config_rope_unknown(const json_t *config, json_t **list)
{
    const char *of;
    const json_t *rope = rope_object(config, &of);
    add_unknown(rope, of, list);
}
