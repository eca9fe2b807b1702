#include "estimators/model/sample_keys.h"

#include <math.h>
#include <string.h>

#include "estimators/model/samples.h"

static const struct key {
    const char *name;
    enum perta_key_rule rule;
} keys[] = {
    {"input_ids", PERTA_KEY_READ},
    {"labels", PERTA_KEY_READ},
    {"attention_mask", PERTA_KEY_READ},
    {"position_ids", PERTA_KEY_READ},
    {"paraphrased", PERTA_KEY_ANSWERS},
    {"perturbed", PERTA_KEY_ANSWERS},
    /* other inputs of models */
    {"inputs_embeds", PERTA_KEY_ABSENT},
    {"past_key_values", PERTA_KEY_ABSENT},
    {"shift_labels", PERTA_KEY_ABSENT},
    {"num_items_in_batch", PERTA_KEY_ABSENT},
    {"logits_to_keep", PERTA_KEY_ABSENT},
    {"head_mask", PERTA_KEY_ABSENT},
    {"block_sequence_ids", PERTA_KEY_ABSENT},
    {"decoder_input_ids", PERTA_KEY_ABSENT},
    {"decoder_attention_mask", PERTA_KEY_ABSENT},
    {"decoder_inputs_embeds", PERTA_KEY_ABSENT},
    {"encoder_outputs", PERTA_KEY_ABSENT},
    {"encoder_hidden_states", PERTA_KEY_ABSENT},
    {"pixel_values", PERTA_KEY_ABSENT},
    {"pixel_values_videos", PERTA_KEY_ABSENT},
    {"pixel_attention_mask", PERTA_KEY_ABSENT},
    {"image_sizes", PERTA_KEY_ABSENT},
    {"image_grid_thw", PERTA_KEY_ABSENT},
    {"video_grid_thw", PERTA_KEY_ABSENT},
    {"image_embeds", PERTA_KEY_ABSENT},
    {"cross_attention_mask", PERTA_KEY_ABSENT},
    {"input_features", PERTA_KEY_ABSENT},
    {"input_values", PERTA_KEY_ABSENT},
    {"feature_attention_mask", PERTA_KEY_ABSENT},
    {"rope_deltas", PERTA_KEY_ABSENT},
    {"cache_position", PERTA_KEY_COUNTS},
    {"attn_mask", PERTA_KEY_HIDES},
    {"attention_masks", PERTA_KEY_HIDES},
    {"padding_mask", PERTA_KEY_HIDES},
    {"positions", PERTA_KEY_PLACES},
    {"pos_ids", PERTA_KEY_PLACES},
    {"input_pos", PERTA_KEY_PLACES},
    {"is_causal", PERTA_KEY_CAUSAL},
    /* labels and weights, as trainers and collators make them */
    {"loss_mask", PERTA_KEY_CHOOSES},
    {"loss_masks", PERTA_KEY_CHOOSES},
    {"assistant_mask", PERTA_KEY_CHOOSES},
    {"assistant_masks", PERTA_KEY_CHOOSES},
    {"assistant_tokens_mask", PERTA_KEY_CHOOSES},
    {"completion_mask", PERTA_KEY_CHOOSES},
    {"response_mask", PERTA_KEY_CHOOSES},
    {"answer_mask", PERTA_KEY_CHOOSES},
    {"target_mask", PERTA_KEY_CHOOSES},
    {"label_mask", PERTA_KEY_CHOOSES},
    {"labels_mask", PERTA_KEY_CHOOSES},
    {"train_mask", PERTA_KEY_CHOOSES},
    {"generation_mask", PERTA_KEY_CHOOSES},
    {"action_mask", PERTA_KEY_CHOOSES},
    {"loss_weight", PERTA_KEY_WEIGHS},
    {"loss_weights", PERTA_KEY_WEIGHS},
    {"weight", PERTA_KEY_WEIGHS},
    {"weights", PERTA_KEY_WEIGHS},
    {"sample_weight", PERTA_KEY_WEIGHS},
    {"sample_weights", PERTA_KEY_WEIGHS},
    {"token_weight", PERTA_KEY_WEIGHS},
    {"token_weights", PERTA_KEY_WEIGHS},
    {"loss_scale", PERTA_KEY_WEIGHS},
    {"label", PERTA_KEY_LABELS},
    {"label_ids", PERTA_KEY_LABELS},
    {"lm_labels", PERTA_KEY_LABELS},
    {"target_ids", PERTA_KEY_LABELS},
    /* blocks of packed samples */
    {"cu_seq_lens_q", PERTA_KEY_BOUNDS},
    {"cu_seq_lens_k", PERTA_KEY_BOUNDS},
    {"cu_seqlens", PERTA_KEY_BOUNDS},
    {"seq_lengths", PERTA_KEY_LENGTHS},
    {"seq_lens", PERTA_KEY_LENGTHS},
    {"seqlens", PERTA_KEY_LENGTHS},
    {"packed_seq_lens", PERTA_KEY_LENGTHS},
    {"sequence_lengths", PERTA_KEY_LENGTHS},
    {"length", PERTA_KEY_LENGTH},
    {"lengths", PERTA_KEY_LENGTH},
    {"seq_idx", PERTA_KEY_NUMBERS},
    {"segment_ids", PERTA_KEY_NUMBERS},
    {"sequence_ids", PERTA_KEY_NUMBERS},
    {"document_ids", PERTA_KEY_NUMBERS},
    {"doc_ids", PERTA_KEY_NUMBERS},
    {"sample_ids", PERTA_KEY_NUMBERS},
    /* not used to compute a loss of these models */
    {"token_type_ids", PERTA_KEY_NEUTRAL},
    {"special_tokens_mask", PERTA_KEY_NEUTRAL},
    {"offset_mapping", PERTA_KEY_NEUTRAL},
    {"overflow_to_sample_mapping", PERTA_KEY_NEUTRAL},
    {"overflowing_tokens", PERTA_KEY_NEUTRAL},
    {"num_truncated_tokens", PERTA_KEY_NEUTRAL},
    {"max_length_q", PERTA_KEY_NEUTRAL},
    {"max_length_k", PERTA_KEY_NEUTRAL},
    {"use_cache", PERTA_KEY_NEUTRAL},
    {"return_loss", PERTA_KEY_NEUTRAL},
    {"num_tokens", PERTA_KEY_NEUTRAL},
    {"n_tokens", PERTA_KEY_NEUTRAL},
    {"token_count", PERTA_KEY_NEUTRAL},
    {"tokens", PERTA_KEY_NEUTRAL},
    {"id", PERTA_KEY_NEUTRAL},
    {"ids", PERTA_KEY_NEUTRAL},
    {"_id", PERTA_KEY_NEUTRAL},
    {"idx", PERTA_KEY_NEUTRAL},
    {"index", PERTA_KEY_NEUTRAL},
    {"uuid", PERTA_KEY_NEUTRAL},
    {"hash", PERTA_KEY_NEUTRAL},
    {"__index_level_0__", PERTA_KEY_NEUTRAL},
    {"name", PERTA_KEY_NEUTRAL},
    {"title", PERTA_KEY_NEUTRAL},
    {"url", PERTA_KEY_NEUTRAL},
    {"source", PERTA_KEY_NEUTRAL},
    {"dataset", PERTA_KEY_NEUTRAL},
    {"split", PERTA_KEY_NEUTRAL},
    {"task", PERTA_KEY_NEUTRAL},
    {"category", PERTA_KEY_NEUTRAL},
    {"subject", PERTA_KEY_NEUTRAL},
    {"topic", PERTA_KEY_NEUTRAL},
    {"language", PERTA_KEY_NEUTRAL},
    {"lang", PERTA_KEY_NEUTRAL},
    {"date", PERTA_KEY_NEUTRAL},
    {"timestamp", PERTA_KEY_NEUTRAL},
    {"meta", PERTA_KEY_NEUTRAL},
    {"metadata", PERTA_KEY_NEUTRAL},
    {"text", PERTA_KEY_NEUTRAL},
    {"texts", PERTA_KEY_NEUTRAL},
    {"content", PERTA_KEY_NEUTRAL},
    {"prompt", PERTA_KEY_NEUTRAL},
    {"completion", PERTA_KEY_NEUTRAL},
    {"instruction", PERTA_KEY_NEUTRAL},
    {"input", PERTA_KEY_NEUTRAL},
    {"output", PERTA_KEY_NEUTRAL},
    {"response", PERTA_KEY_NEUTRAL},
    {"target", PERTA_KEY_NEUTRAL},
    {"context", PERTA_KEY_NEUTRAL},
    {"messages", PERTA_KEY_NEUTRAL},
    {"conversations", PERTA_KEY_NEUTRAL},
    {"question", PERTA_KEY_NEUTRAL},
    {"answer", PERTA_KEY_NEUTRAL},
    {"answers", PERTA_KEY_NEUTRAL},
    {"original_answer", PERTA_KEY_NEUTRAL},
    {"paraphrased_question", PERTA_KEY_NEUTRAL},
    {"paraphrased_answer", PERTA_KEY_NEUTRAL},
    {"perturbed_answer", PERTA_KEY_NEUTRAL},
};

enum perta_key_rule perta_key_rule(const char *key)
{
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!strcmp(keys[i].name, key))
            return keys[i].rule;
    return PERTA_KEY_UNKNOWN;
}

/* ---- does it change anything? ---- */

static bool is_empty(const json_t *value)
{
    return json_is_null(value) || (json_is_array(value) && !json_array_size(value)) ||
           (json_is_object(value) && !json_object_size(value));
}

/* The number that value is, or that all of its n elements are; true and false are 1 and 0.
 * Otherwise NaN. */
static double number(const json_t *value, size_t i)
{
    const json_t *of = json_is_array(value) ? json_array_get(value, i) : value;
    return json_is_boolean(of)  ? json_is_true(of)
           : json_is_number(of) ? json_number_value(of)
                                : (double)NAN;
}

/* Whether value is an array of numbers, one for each token. */
static bool is_row(const struct perta_draft *d, const json_t *value)
{
    return json_array_size(value) == d->n;
}

static bool chooses_nothing_else(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value);
    for (size_t t = 1; same && t < d->n; t++) /* the first token is never learned */
        same = number(value, t) == 1 || (number(value, t) == 0 && d->labels[t] == PERTA_IGNORED);
    return same;
}

static bool weighs_alike(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value) || !json_is_array(value);
    for (size_t t = 0; same && t < d->n; t++)
        same = number(value, t) == 1;
    return same;
}

static bool has_the_labels(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value);
    for (size_t t = 1; same && t < d->n; t++)
        same = number(value, t) == d->labels[t];
    return same || !json_is_array(value); /* a class of the whole line */
}

static bool hides_the_same(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value);
    for (size_t t = 0; same && t < d->n; t++)
        same = number(value, t) == d->seen[t];
    return same;
}

static bool has_the_positions(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value);
    for (size_t t = 0; same && t < d->n; t++)
        same = number(value, t) == d->positions[t];
    return same;
}

static bool counts(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value);
    for (size_t t = 0; same && t < d->n; t++)
        same = number(value, t) == (double)t;
    return same;
}

/* Bounds 0, ..., n of blocks, or lengths of blocks. */
static bool has_the_blocks(const struct perta_draft *d, const json_t *value, bool lengths)
{
    size_t i = 0, start = 0;
    bool same = lengths || number(value, i++) == 0;
    for (size_t t = 1; same && t <= d->n; t++) {
        if (t < d->n && !d->begins[t])
            continue;
        same = number(value, i++) == (double)(lengths ? t - start : t);
        start = t;
    }
    return same && i == json_array_size(value);
}

/* Tokenizers write [n] for the whole line. */
static bool is_a_length(const struct perta_draft *d, const json_t *value)
{
    bool whole = json_array_size(value) == 1 && number(value, 0) == (double)d->n;
    return !json_is_array(value) || whole || has_the_blocks(d, value, true);
}

static bool numbers_the_blocks(const struct perta_draft *d, const json_t *value)
{
    bool same = is_row(d, value) || !json_is_array(value); /* of the whole line */
    for (size_t t = 1; same && json_is_array(value) && t < d->n; t++)
        same = (number(value, t) != number(value, t - 1)) == d->begins[t];
    return same;
}

static bool changes_nothing(const struct perta_draft *d, enum perta_key_rule rule,
                            const json_t *value)
{
    switch (rule) {
    case PERTA_KEY_CHOOSES:
        return chooses_nothing_else(d, value);
    case PERTA_KEY_WEIGHS:
        return weighs_alike(d, value);
    case PERTA_KEY_LABELS:
        return has_the_labels(d, value);
    case PERTA_KEY_HIDES:
        return hides_the_same(d, value);
    case PERTA_KEY_PLACES:
        return has_the_positions(d, value);
    case PERTA_KEY_COUNTS:
        return counts(d, value);
    case PERTA_KEY_BOUNDS:
        return has_the_blocks(d, value, false);
    case PERTA_KEY_LENGTHS:
        return has_the_blocks(d, value, true);
    case PERTA_KEY_LENGTH:
        return is_a_length(d, value);
    case PERTA_KEY_NUMBERS:
        return numbers_the_blocks(d, value);
    case PERTA_KEY_CAUSAL:
        return json_is_true(value);
    case PERTA_KEY_ABSENT:
        return false;
    default:
        return true;
    }
}

static const char *advice(enum perta_key_rule rule)
{
    switch (rule) {
    case PERTA_KEY_CHOOSES:
        return "it leaves out what \"labels\" learn; put -100 into \"labels\" there, and remove it";
    case PERTA_KEY_WEIGHS:
        return "weights other than 1 are not supported; remove it to have all count alike";
    case PERTA_KEY_LABELS:
        return "it is not what \"labels\" are; keep the ones that are meant";
    case PERTA_KEY_HIDES:
        return "it hides other tokens than \"attention_mask\" does; if it is meant, name it so";
    case PERTA_KEY_PLACES:
        return "it says other positions than \"position_ids\" do; if it is meant, name it so";
    case PERTA_KEY_BOUNDS:
    case PERTA_KEY_LENGTHS:
    case PERTA_KEY_LENGTH:
    case PERTA_KEY_NUMBERS:
        return "it makes other blocks than \"position_ids\" do; give \"position_ids\" that start "
               "again in each block, without \"attention_mask\"";
    default:
        return "it would change the loss, and is not supported; remove it if it is not meant";
    }
}

int perta_keys_check(const struct perta_line *line, const struct perta_draft *draft, json_t *object,
                     struct perta_err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach (object, key, value) {
        enum perta_key_rule rule = perta_key_rule(key);
        if (!is_empty(value) && !changes_nothing(draft, rule, value))
            return perta_line_fail(line, err, "\"%s\": %s", key, advice(rule));
    }
    return 0;
}
