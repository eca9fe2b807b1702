/* config.json: numbers that make no sense are refused, naming the key. */
#include "estimators/model/config.h"

#include "io/format/naming.h"
#include "tests/gradient.h"

static const char base[] = "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,"
                           "\"intermediate_size\":96,\"vocab_size\":9,\"num_hidden_layers\":1,"
                           "\"num_attention_heads\":4";

/* The config with more keys; says: part of the message, or NULL if it is accepted. */
static void parse(const char *more, const char *says, struct perta_llm *llm)
{
    char text[1024];
    struct perta_err err = {0};
    snprintf(text, sizeof text, "%s%s}", base, more);
    json_t *config = json_loads(text, 0, NULL);
    ck_assert_msg(config, "%s", text);
    int rc = perta_llm_parse(config, "config.json", llm, &err);
    ck_assert_msg(rc == (says ? PERTA_EINPUT : 0), "%s: %s", more, err.msg);
    ck_assert_msg(!says || strstr(err.msg, says), "%s: %s", more, err.msg);
    json_decref(config);
}

START_TEST(a_number_that_float32_does_not_hold_is_refused)
{
    struct perta_llm llm;
    parse(",\"rms_norm_eps\":1e-300", "rms_norm_eps", &llm);
    parse(",\"rms_norm_eps\":0", "rms_norm_eps", &llm);
    parse(",\"rms_norm_eps\":1e39", "rms_norm_eps", &llm);
    parse(",\"rope_theta\":1e300", "rope_theta", &llm);
    parse(",\"rope_theta\":-1", "rope_theta", &llm);
    parse(",\"rms_norm_eps\":1e-30,\"rope_theta\":1e30", NULL, &llm);
    ck_assert(llm.norm_eps > 0);
}
END_TEST

START_TEST(a_count_is_a_whole_number_of_31_bits)
{
    struct perta_llm llm;
    parse(",\"num_key_value_heads\":0", "num_key_value_heads", &llm);
    parse(",\"num_key_value_heads\":-4", "num_key_value_heads", &llm);
    parse(",\"num_key_value_heads\":2.0", "num_key_value_heads", &llm);
    parse(",\"num_key_value_heads\":4294967297", "num_key_value_heads", &llm);
    parse(",\"num_key_value_heads\":3", "cannot share", &llm);
    parse(",\"head_dim\":2147483648", "head_dim", &llm);
    parse(",\"head_dim\":3", "odd", &llm);
    parse(",\"head_dim\":1,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}", "odd", &llm);
}
END_TEST

START_TEST(a_window_is_where_transformers_has_one)
{
    struct perta_llm llm;
    const char *const mistral = ",\"architectures\":[\"MistralForCausalLM\"],"
                                "\"num_key_value_heads\":2";
    const char *const qwen = ",\"architectures\":[\"Qwen2ForCausalLM\"],\"max_window_layers\":0,"
                             "\"num_key_value_heads\":2";
    const struct {
        const char *of, *more;
        uint32_t window;
    } cases[] = {
        {mistral, "", 4096},
        {mistral, ",\"sliding_window\":null", UINT32_MAX},
        {mistral, ",\"sliding_window\":7", 7},
        {qwen, "", UINT32_MAX},
        {qwen, ",\"sliding_window\":7", UINT32_MAX},
        {qwen, ",\"use_sliding_window\":true", 4096},
        {qwen, ",\"use_sliding_window\":true,\"sliding_window\":7", 7},
        {"", ",\"sliding_window\":7", UINT32_MAX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char more[256];
        snprintf(more, sizeof more, "%s%s", cases[i].of, cases[i].more);
        parse(more, NULL, &llm);
        ck_assert_msg(perta_llm_window(&llm, 0) == cases[i].window, "%s: %u", more,
                      perta_llm_window(&llm, 0));
    }
    char more[256];
    snprintf(more, sizeof more, "%s,\"sliding_window\":7.0", mistral);
    parse(more, "sliding_window", &llm);
}
END_TEST

START_TEST(layer_types_say_it_layer_by_layer)
{
    struct perta_llm llm;
    const char *const qwen = ",\"architectures\":[\"Qwen3ForCausalLM\"],\"num_key_value_heads\":2,"
                             "\"use_sliding_window\":true,\"sliding_window\":7";
    char more[512];
    snprintf(more, sizeof more,
             "%s,\"num_hidden_layers\":3,\"layer_types\":[\"full_attention\","
             "\"sliding_attention\",\"attention\"]",
             qwen);
    parse(more, NULL, &llm);
    for (uint32_t l = 0; l < 3; l++)
        ck_assert_uint_eq(perta_llm_window(&llm, l), l == 1 ? 7 : UINT32_MAX);
    snprintf(more, sizeof more, "%s,\"num_hidden_layers\":1024,\"max_window_layers\":1000", qwen);
    parse(more, NULL, &llm);
    ck_assert_uint_eq(perta_llm_window(&llm, 999), UINT32_MAX);
    ck_assert_uint_eq(perta_llm_window(&llm, 1023), 7);
    snprintf(more, sizeof more, "%s,\"num_hidden_layers\":1025", qwen);
    parse(more, "num_hidden_layers", &llm);
}
END_TEST

#define OF(name) ",\"architectures\":[\"" name "ForCausalLM\"],\"num_key_value_heads\":2"

/* What Gemma, OLMo, EXAONE 4 and Granite have, and the keys that switch it. */
START_TEST(norms_caps_and_multipliers)
{
    struct perta_llm llm;
    parse(OF("Gemma2"), NULL, &llm);
    ck_assert(llm.attention_softcap == 50 && llm.logit_softcap == 30 && llm.norm_plus == 1);
    ck_assert(llm.attention_scale == 1.0f / 16 && llm.embedding_multiplier == 8 && llm.tied);
    ck_assert(llm.pad == 0 && llm.head_dim == 256 && perta_llm_window(&llm, 0) == 4096);
    ck_assert(llm.activation.kind == PERTA_GELU_TANH);
    parse(OF("Gemma2") ",\"attn_logit_softcapping\":null,\"final_logit_softcapping\":2.5", NULL,
          &llm);
    ck_assert(llm.attention_softcap == 0 && llm.logit_softcap == 2.5f);
    parse(OF("Gemma") ",\"hidden_act\":\"gelu\"", NULL, &llm);
    ck_assert(llm.activation.kind == PERTA_GELU_TANH && llm.logit_softcap == 0);
    parse(OF("Olmo") ",\"clip_qkv\":8,\"pad_token_id\":null", NULL, &llm);
    ck_assert(llm.clip_qkv == 8 && llm.norm_eps == 1e-5f && llm.pad == PERTA_NO_PAD);
    ck_assert_str_eq(llm.names.final_norm, "");
    parse(OF("Granite") ",\"logits_scaling\":8,\"residual_multiplier\":0.5", NULL, &llm);
    ck_assert(llm.logit_multiplier == 0.125f && llm.residual_multiplier == 0.5f);
    ck_assert(llm.attention_scale == 1 && llm.embedding_multiplier == 1);
    parse(OF("Exaone4"), NULL, &llm);
    ck_assert(llm.layers[0] & PERTA_LAYER_WINDOW && !(llm.layers[0] & PERTA_LAYER_UNROTATED));
    parse(OF("Exaone4") ",\"sliding_window_pattern\":1", NULL, &llm);
    ck_assert(!(llm.layers[0] & PERTA_LAYER_WINDOW) && llm.layers[0] & PERTA_LAYER_UNROTATED);
}
END_TEST

START_TEST(what_these_families_do_not_have_is_refused)
{
    struct perta_llm llm;
    parse(OF("Gemma2") ",\"final_logit_softcapping\":-1", "final_logit_softcapping", &llm);
    parse(OF("Gemma2") ",\"query_pre_attn_scalar\":0", "query_pre_attn_scalar", &llm);
    parse(OF("Gemma2") ",\"sliding_window\":null", "sliding_window", &llm);
    parse(OF("Gemma2") ",\"hidden_act\":\"silu\"", "hidden_act", &llm);
    parse(OF("Gemma2") ",\"use_bidirectional_attention\":true", "use_bidirectional_attention",
          &llm);
    parse(OF("Gemma3") ",\"attn_logit_softcapping\":50", "attn_logit_softcapping", &llm);
    parse(OF("Gemma3") ",\"sliding_window_pattern\":0", "sliding_window_pattern", &llm);
    parse(OF("Gemma") ",\"hidden_activation\":\"relu\"", "hidden_activation", &llm);
    parse(OF("Gemma") ",\"final_logit_softcapping\":30", "final_logit_softcapping", &llm);
    parse(OF("Olmo") ",\"rms_norm_eps\":1e-6", "rms_norm_eps", &llm);
    parse(OF("Olmo2") ",\"clip_qkv\":8", "clip_qkv", &llm);
    parse(OF("Exaone4") ",\"sliding_window_pattern\":\"LLLG\"", "sliding_window_pattern", &llm);
    parse(OF("Exaone4") ",\"logits_scaling\":2", "logits_scaling", &llm);
    parse(OF("Granite") ",\"logits_scaling\":0", "logits_scaling", &llm);
    parse(OF("Granite") ",\"final_logit_softcapping\":3", "final_logit_softcapping", &llm);
}
END_TEST

/* transformers passes over the key here: all layers have the window, or none. */
START_TEST(a_mixture_with_a_window_everywhere_has_no_layer_types)
{
    const char *some = OF("Qwen3Moe") ",\"use_sliding_window\":true,\"layer_types\":"
                                      "[\"sliding_attention\",\"full_attention\"]";
    struct perta_llm llm;
    char more[512];
    snprintf(more, sizeof more, "%s,\"num_hidden_layers\":2", some);
    parse(more, "layer_types", &llm);
    parse(OF("Qwen3Moe") ",\"use_sliding_window\":true,\"sliding_window\":7", NULL, &llm);
    for (uint32_t l = 0; l < llm.n_layers; l++)
        ck_assert_uint_eq(perta_llm_window(&llm, l), 7);
}
END_TEST

START_TEST(what_is_no_number_of_a_layer_is_refused)
{
    struct perta_llm llm;
    parse(OF("Qwen3Moe") ",\"mlp_only_layers\":[0.5]", "mlp_only_layers", &llm);
    parse(OF("Qwen3Moe") ",\"mlp_only_layers\":[\"1\"]", "mlp_only_layers", &llm);
    parse(OF("Llama4") ",\"moe_layers\":[null]", "moe_layers", &llm);
}
END_TEST

/* How many experts there are is then not checked, and no room is made for them. */
START_TEST(a_model_whose_layers_have_no_mixture_has_no_experts)
{
    struct perta_llm llm;
    parse(OF("Qwen3Moe") ",\"mlp_only_layers\":[0],\"num_experts\":2000000000", NULL, &llm);
    ck_assert_uint_eq(llm.n_experts, 0);
    parse(OF("Qwen3Moe") ",\"num_experts\":1025", "1025 experts", &llm);
}
END_TEST

/* Bloom's MLP is 4 times as wide, which is not said. */
START_TEST(a_default_width_that_overflows_is_refused)
{
    static const char text[] = "{\"architectures\":[\"BloomForCausalLM\"],\"n_layer\":1,"
                               "\"vocab_size\":9,\"n_head\":1,\"n_embed\":1073741824}";
    json_t *config = json_loads(text, 0, NULL);
    struct perta_llm llm;
    struct perta_err err = {0};
    ck_assert_int_eq(perta_llm_parse(config, "config.json", &llm, &err), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(err.msg, "n_embed"));
    json_decref(config);
}
END_TEST

/* Readers of checkpoints, which know no families, tie the same ones without tie_word_embeddings. */
START_TEST(a_family_is_tied_for_every_reader)
{
    for (size_t i = 0; i < perta_n_families; i++) {
        const struct perta_family *family = perta_families[i];
        struct perta_checkpoint ck = {.config =
                                          json_pack("{s:s,s:[s]}", "model_type", family->model_type,
                                                    "architectures", family->architecture)};
        ck_assert_msg(perta_is_tied(&ck) == family->tied, "%s", family->model_type);
        json_decref(ck.config);
    }
}
END_TEST

START_TEST(a_padding_is_a_row_of_the_embedding)
{
    struct perta_llm llm;
    parse("", NULL, &llm);
    ck_assert_uint_eq(llm.pad, PERTA_NO_PAD);
    parse(",\"pad_token_id\":8", NULL, &llm);
    ck_assert_uint_eq(llm.pad, 8);
    parse(",\"pad_token_id\":-1", NULL, &llm);
    ck_assert_uint_eq(llm.pad, 8);
    parse(",\"pad_token_id\":-9", NULL, &llm);
    ck_assert_uint_eq(llm.pad, 0);
    parse(",\"pad_token_id\":9", "pad_token_id", &llm);
    parse(",\"pad_token_id\":-10", "pad_token_id", &llm);
}
END_TEST

START_TEST(keys_are_known_or_named)
{
    struct perta_llm llm;
    parse(",\"is_causal\":false", "\"is_causal\" is false", &llm);
    parse(",\"is_causal\":true,\"logit_scale\":1,\"num_experts\":0,\"clip_qkv\":null", NULL, &llm);
    parse(",\"logit_scale\":0", "\"logit_scale\" is 0", &llm);
    json_t *config = json_loads("{\"use_cache\":1,\"x\":2,\"is_causal\":0,\"rope_scaling\":"
                                "{\"factor\":1,\"y\":2},\"rope_parameters\":{\"z\":3}}",
                                0, NULL);
    json_t *keys = perta_llm_unknown_keys(config);
    char *text = json_dumps(keys, JSON_COMPACT);
    ck_assert_str_eq(text, "[\"x\",\"rope_scaling.y\"]");
    free(text);
    json_decref(keys);
    json_decref(config);
}
END_TEST

START_TEST(frequencies_are_numbers)
{
    struct perta_llm llm;
    float freq[8];
    parse(",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":5,"
          "\"high_freq_factor\":4,\"original_max_position_embeddings\":64}",
          "high_freq_factor", &llm);
    parse(",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
          "\"high_freq_factor\":4,\"original_max_position_embeddings\":64}",
          NULL, &llm);
    perta_rope_frequencies(&llm.ropes[0], false, freq);
    for (int i = 0; i < 8; i++)
        ck_assert_msg(freq[i] > 0 && freq[i] <= 1, "%g", (double)freq[i]);
}
END_TEST

/* As transformers 5.23 computes them for heads of 8 elements and max_position_embeddings 512. */
static const struct {
    const char *scaling;
    float inv_freq[4], scale;
} tables[] = {
    {"\"default\"", {1, 0.100000001f, 0.00999999978f, 0.00100000005f}, 1},
    {"\"linear\",\"factor\":4", {0.25f, 0.0250000004f, 0.00249999994f, 0.000250000012f}, 1},
    {"\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
     "\"original_max_position_embeddings\":64,\"rope_theta\":500",
     {1, 0.0976166278f, 0.00559017016f, 0.00118217699f},
     1},
    {"\"dynamic\",\"factor\":3.3,\"rope_theta\":500",
     {1, 0.21147424f, 0.0447213612f, 0.0094574159f},
     1},
    {"\"yarn\",\"factor\":4,\"original_max_position_embeddings\":64,\"beta_fast\":8",
     {1, 0.0625f, 0.00249999994f, 0.000250000012f},
     1.13862944f},
    {"\"yarn\",\"factor\":4,\"original_max_position_embeddings\":64,\"truncate\":false,"
     "\"mscale\":0.7,\"mscale_all_dim\":1.1",
     {1, 0.0255952496f, 0.00249999994f, 0.000250000012f},
     0.951885343f},
    {"\"longrope\",\"short_factor\":[1,1.5,2,3],\"long_factor\":[2,2,3,4],"
     "\"original_max_position_embeddings\":64",
     {1, 0.0666666701f, 0.00499999989f, 0.00033333333f},
     1.22474492f},
    {"\"proportional\",\"partial_rotary_factor\":0.5,\"factor\":2", {0.5f, 0.0500000007f, 0, 0}, 1},
};

START_TEST(frequencies_are_those_of_transformers)
{
    struct perta_llm llm;
    char more[512];
    float have[4];
    snprintf(more, sizeof more,
             ",\"head_dim\":8,\"max_position_embeddings\":512,\"rope_scaling\":{\"rope_type\":%s}",
             tables[_i].scaling);
    parse(more, NULL, &llm);
    ck_assert_uint_eq(llm.ropes[0].rotated, 8);
    ck_assert_float_eq_tol(llm.ropes[0].scale, tables[_i].scale, 1e-6f);
    for (int layers = 0; layers < 2; layers++) {
        perta_rope_frequencies(&llm.ropes[layers], false, have);
        for (int i = 0; i < 4; i++)
            ck_assert_float_eq_tol(have[i], tables[_i].inv_freq[i],
                                   2e-6f * tables[_i].inv_freq[i] + 1e-30f);
    }
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("config");
    tcase_add_test(tests, a_number_that_float32_does_not_hold_is_refused);
    tcase_add_test(tests, a_count_is_a_whole_number_of_31_bits);
    tcase_add_test(tests, a_window_is_where_transformers_has_one);
    tcase_add_test(tests, layer_types_say_it_layer_by_layer);
    tcase_add_test(tests, norms_caps_and_multipliers);
    tcase_add_test(tests, what_these_families_do_not_have_is_refused);
    tcase_add_test(tests, a_mixture_with_a_window_everywhere_has_no_layer_types);
    tcase_add_test(tests, what_is_no_number_of_a_layer_is_refused);
    tcase_add_test(tests, a_model_whose_layers_have_no_mixture_has_no_experts);
    tcase_add_test(tests, a_default_width_that_overflows_is_refused);
    tcase_add_test(tests, a_family_is_tied_for_every_reader);
    tcase_add_test(tests, a_padding_is_a_row_of_the_embedding);
    tcase_add_test(tests, keys_are_known_or_named);
    tcase_add_test(tests, frequencies_are_numbers);
    tcase_add_loop_test(tests, frequencies_are_those_of_transformers, 0,
                        sizeof tables / sizeof *tables);
    return run_suite("config", tests);
}
