/* For tests/python/test_rope.py: reads lines {"family": {...}, "max_positions": N, "head_dim": N,
 * "config": {...}} and prints for each what perta makes of it: its two tables of rotary positions,
 * or {"error": ...}. The family's keys are the members of struct perta_rope_family. */
#include <stdio.h>
#include <stdlib.h>

#include "estimators/model/config_read.h"
#include "estimators/model/family.h"

static const char *text(const json_t *family, const char *key)
{
    return json_string_value(json_object_get(family, key));
}

static bool is(const json_t *family, const char *key)
{
    return json_is_true(json_object_get(family, key));
}

static struct perta_rope_family family_of(const json_t *f)
{
    return (struct perta_rope_family){
        .theta = json_number_value(json_object_get(f, "theta")),
        .theta_key = text(f, "theta_key"),
        .partial = json_number_value(json_object_get(f, "partial")),
        .partial_key = text(f, "partial_key"),
        .elements_key = text(f, "elements_key"),
        .parameters = text(f, "parameters"),
        .original_positions =
            (uint32_t)json_integer_value(json_object_get(f, "original_positions")),
        .interleaved = is(f, "interleaved"),
        .interleave_key = text(f, "interleave_key"),
        .alpha = is(f, "alpha"),
        .mrope = is(f, "mrope"),
        .yarn_is_longrope = is(f, "yarn_is_longrope"),
        .short_mscale = is(f, "short_mscale"),
        .query_scale = is(f, "query_scale"),
        .by_layer_type = is(f, "by_layer_type"),
        .local_theta = json_number_value(json_object_get(f, "local_theta")),
        .local_theta_key = text(f, "local_theta_key"),
    };
}

/* Of positions 0, 7, 14, ... */
static json_t *query_scales(const struct perta_rope *rope)
{
    json_t *list = json_array();
    for (uint32_t i = 0; rope->query_beta > 0 && i < 50; i++)
        json_array_append_new(list, json_real((double)perta_rope_query_scale(rope, 7 * i)));
    return list;
}

static json_t *table(const struct perta_rope *rope, bool is_long)
{
    json_t *list = json_array();
    float *inv_freq = calloc(rope->rotated, sizeof *inv_freq);
    perta_rope_frequencies(rope, is_long, inv_freq);
    for (uint32_t i = 0; i < rope->rotated / 2; i++)
        json_array_append_new(list, json_real((double)inv_freq[i]));
    free(inv_freq);
    return json_pack("{s:o,s:b,s:f,s:o,s:I,s:I}", "inv_freq", list, "interleaved",
                     (int)rope->interleaved, "scale",
                     (double)(is_long ? rope->long_scale : rope->scale), "query_scales",
                     query_scales(rope), "short", (json_int_t)perta_rope_short(rope), "longest",
                     (json_int_t)perta_rope_longest(rope));
}

static json_t *result(const json_t *line)
{
    json_int_t head_dim = json_integer_value(json_object_get(line, "head_dim"));
    if (head_dim < 1 || head_dim > 1024)
        return NULL;
    const struct perta_rope_family family = family_of(json_object_get(line, "family"));
    struct perta_err err = {0};
    struct perta_config_reader r = {
        .config = json_object_get(line, "config"), .path = "config.json", .err = &err};
    struct perta_rope ropes[2];
    perta_config_rope(&r, &family,
                      (uint32_t)json_integer_value(json_object_get(line, "max_positions")),
                      (uint32_t)head_dim, ropes);
    return r.rc ? json_pack("{s:s}", "error", err.msg)
                : json_pack("[o,o,o,o]", table(&ropes[0], false), table(&ropes[1], false),
                            table(&ropes[0], true), table(&ropes[1], true));
}

int main(void)
{
    char *text = NULL;
    size_t room = 0;
    int rc = 0;
    while (!rc && getline(&text, &room, stdin) > 0) {
        json_t *line = json_loads(text, 0, NULL), *out = line ? result(line) : NULL;
        rc = !out || json_dumpf(out, stdout, JSON_REAL_PRECISION(17));
        puts("");
        json_decref(out);
        json_decref(line);
    }
    free(text);
    return rc;
}
