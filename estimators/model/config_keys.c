/* All known keys of config.json, and how each is treated. Keys that are not listed are reported to
 * the user (perta_llm_unknown_keys), because they may change what the model computes. */
#include "estimators/model/config_read.h"

#include <stdlib.h>
#include <string.h>

#include "estimators/model/family.h"
#include "estimators/model/wrapper.h"
#include "io/text.h"

/* Keys that perta_llm_parse reads, or the reader of checkpoints. */
static const char *const read_keys[] = {
    "architectures",
    "attention_bias",
    "compression_config",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
};

/* Keys that do not affect losses and gradients of a model that is not being trained: tokens, text
 * and generation, dropout and initial weights, labels of classifiers, and how the model is run or
 * was written. */
static const char *const plain_keys[] = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_from_model_config",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cls_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "init_std",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "min_p",
    "model_max_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "penalty_alpha",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_flash_attn",
};

/* Keys of models that are not supported: refused unless null or neutral. */
static const struct {
    const char *key;
    const char *neutral; /* neutral value, as JSON; NULL: false, 0 and empty values */
} changing_keys[] = {
    /* caps, scales */
    {"attention_logit_cap", NULL},
    {"attn_logit_softcapping", NULL},
    {"final_logit_softcapping", NULL},
    {"logit_softcapping", NULL},
    {"logits_soft_cap", NULL},
    {"output_logit_cap", NULL},
    {"attention_multiplier", NULL},
    {"attention_scale", NULL},
    {"attention_in_multiplier", "1"},
    {"attention_out_multiplier", "1"},
    {"attn_scale", NULL},
    {"dim_model_base", NULL},
    {"embed_scale", "1"},
    {"embedding_multiplier", "1"},
    {"embedding_scale", "1"},
    {"key_multiplier", "1"},
    {"lm_head_multiplier", "1"},
    {"logit_scale", "1"},
    {"logits_scaling", "1"},
    {"mlp_multipliers", NULL},
    {"mup_embeddings_multiplier", "1"},
    {"mup_attn_multiplier", "1"},
    {"mup_width_scale", "1"},
    {"mup_width_multiplier", "1"},
    {"normalize_embedding", NULL},
    {"query_pre_attn_scalar", NULL},
    {"residual_multiplier", "1"},
    {"residual_scale", "1"},
    {"scale_attn_by_inverse_layer_idx", NULL},
    {"scale_attn_weights", "true"},
    {"scale_depth", NULL},
    {"scale_emb", "1"},
    {"scale_embedding", NULL},
    {"softmax_scale", NULL},
    {"width_multiplier", "1"},
    /* norms, activations, order of operations */
    {"activation_function", "\"silu\""},
    {"attn_qk_norm", NULL},
    {"clip_qkv", NULL},
    {"hidden_activation", "\"silu\""},
    {"mlp_activation", "\"silu\""},
    {"parallel_attn", NULL},
    {"post_norm", NULL},
    {"qk_layernorm", NULL},
    {"qk_norm", NULL},
    {"query_key_norm", NULL},
    {"use_ngpt", NULL},
    {"use_parallel_residual", NULL},
    {"use_post_norm", NULL},
    {"use_qk_layernorm", NULL},
    {"use_qk_norm", NULL},
    {"use_rms_norm", "true"},
    /* positions */
    {"alibi", NULL},
    {"attn_temperature_tuning", NULL},
    {"floor_scale", NULL},
    {"global_rope_theta", NULL},
    {"llama_4_scaling", NULL},
    {"local_rope_theta", NULL},
    {"mrope_section", NULL},
    {"no_rope_layer_interval", NULL},
    {"no_rope_layers", NULL},
    {"nope_layer_interval", NULL},
    {"position_embedding_type", "\"rope\""},
    {"rope_condense_ratio", "1"},
    {"rope_interleave", NULL},
    {"rope_interleaved", NULL},
    {"rope_local_base_freq", NULL},
    {"rope_percentage", "1"},
    {"rope_ratio", "1"},
    {"rope_scaling_factor", "1"},
    {"rope_type", "\"default\""},
    {"rotary_dim", NULL},
    {"rotary_emb_base", NULL},
    {"rotary_pct", "1"},
    {"rotary_percent", "1"},
    {"use_alibi", NULL},
    {"use_dynamic_ntk", NULL},
    {"use_logn_attn", NULL},
    {"use_mrope", NULL},
    {"use_nope", NULL},
    {"use_rope", "true"},
    /* attention masks */
    {"add_cross_attention", NULL},
    {"attention_chunk_size", NULL},
    {"attention_sinks", NULL},
    {"attention_window_size", NULL},
    {"attn_sinks", NULL},
    {"bidirectional", NULL},
    {"cla_share_factor", "1"},
    {"cross_attention_layers", NULL},
    {"is_causal", "true"},
    {"is_encoder_decoder", NULL},
    {"num_kv_shared_layers", NULL},
    {"num_sink_tokens", NULL},
    {"sink_size", NULL},
    {"sliding_window_pattern", NULL},
    {"use_attention_sinks", NULL},
    {"use_bidirectional_attention", NULL},
    {"use_cla", NULL},
    {"use_sinks", NULL},
    /* other kinds of layers, or different ones */
    {"block_configs", NULL},
    {"fusion_config", NULL},
    {"hybrid_override_pattern", NULL},
    {"kv_lora_rank", NULL},
    {"layers_block_type", NULL},
    {"mlp_only_layers", NULL},
    {"moe_intermediate_size", NULL},
    {"moe_layer_freq", NULL},
    {"moe_num_experts", NULL},
    {"n_loops", "1"},
    {"n_routed_experts", NULL},
    {"n_shared_experts", NULL},
    {"num_experts", NULL},
    {"num_experts_per_tok", NULL},
    {"num_local_experts", NULL},
    {"num_loops", "1"},
    {"per_layer_config", NULL},
    {"pruned_heads", NULL},
    {"q_lora_rank", NULL},
    {"qk_nope_head_dim", NULL},
    {"qk_rope_head_dim", NULL},
    {"ssm_cfg", NULL},
    {"total_ut_steps", "1"},
    {"v_head_dim", NULL},
    /* other files, other models */
    {"audio_config", NULL},
    {"text_config", NULL},
    {"transformers_weights", NULL},
    {"vision_config", NULL},
};

#define N(list) (sizeof(list) / sizeof *(list))

/* Whether a family reads the key itself. */
static bool is_own(const struct perta_family *family, const char *key)
{
    for (const char *const *own = family ? family->own_keys : NULL; own && *own; own++)
        if (!strcmp(*own, key))
            return true;
    return false;
}

/* ---- refused ---- */

static bool is_off(const json_t *value)
{
    return json_is_false(value) || (json_is_number(value) && json_number_value(value) == 0) ||
           (json_is_array(value) && !json_array_size(value)) ||
           (json_is_object(value) && !json_object_size(value));
}

static bool is_neutral(const json_t *value, const char *neutral)
{
    if (!neutral)
        return is_off(value);
    json_t *other = json_loads(neutral, JSON_DECODE_ANY, NULL);
    bool same = json_is_number(other)
                    ? json_is_number(value) && json_number_value(value) == json_number_value(other)
                    : json_equal(value, other);
    json_decref(other);
    return same;
}

void perta_config_refuse_keys(struct perta_config_reader *r)
{
    for (size_t i = 0; i < N(changing_keys) && !r->rc; i++) {
        const char *key = changing_keys[i].key;
        const json_t *value = json_object_get(r->config, key);
        if (!perta_config_has(r->config, key) || is_own(r->family, key) ||
            perta_config_rope_reads(&r->family->rope, key) ||
            is_neutral(value, changing_keys[i].neutral))
            continue;
        char *text =
            perta_json_text(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(15));
        r->rc = perta_fail(r->err, PERTA_EINPUT,
                           "%s: \"%s\" is %.100s: it changes what some models compute, and is not "
                           "supported; if this one does without it, remove it there",
                           r->path, key, text ? text : "set");
        free(text);
    }
}

/* ---- not known ---- */

static bool is_in(const char *key, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(key, list[i]))
            return true;
    return false;
}

static bool is_known(const char *key)
{
    for (size_t i = 0; i < N(changing_keys); i++)
        if (!strcmp(key, changing_keys[i].key))
            return true;
    return is_in(key, read_keys, N(read_keys)) || is_in(key, plain_keys, N(plain_keys));
}

static void add_unknown(const json_t *config, const struct perta_family *family, const char *within,
                        json_t **list)
{
    const char *key;
    json_t *value;
    json_object_foreach ((json_t *)(uintptr_t)config, key, value)
        if (!is_known(key) && !is_own(family, key))
            perta_json_append(list, perta_text_json("%s%s", within, key));
}

/* Beside the text model's config, all known keys are ignored, as by transformers. */
static void add_unknown_around(const struct perta_wrapper *wrapper, const json_t *config,
                               json_t **list)
{
    json_t *text = perta_wrapper_text(wrapper, config), *value;
    const char *key;
    bool is_within = json_object_get(config, "text_config");
    json_object_foreach ((json_t *)(uintptr_t)config, key, value)
        if (is_within && !is_known(key) && !perta_wrapper_has_key(key))
            perta_json_append(list, perta_text_json("%s", key));
    add_unknown(text, wrapper->text ? wrapper->text : perta_config_family(text),
                is_within ? "text_config." : "", list);
    perta_config_rope_unknown(text, list);
    json_decref(text);
}

json_t *perta_llm_unknown_keys(const json_t *config)
{
    json_t *list = json_array();
    const struct perta_wrapper *wrapper = perta_wrapper_find(config);
    if (wrapper) {
        add_unknown_around(wrapper, config, &list);
        return list;
    }
    add_unknown(config, perta_config_family(config), "", &list);
    perta_config_rope_unknown(config, &list);
    return list;
}
