"""Small configurations of each family, for families.py: keyword arguments of the family's own
config class in transformers, such that every path of the family matters in some of them.

Keys that begin with an underscore are for families.py:
_type      the config's model_type, where the row is named otherwise
_class     the model's class, if it is not the one that the config's class leads to
_json      keys written into config.json afterwards, as published files spell them
_without   keys left out of config.json
_names     patterns, and what replaces them in the names of tensors
_late      True: transformers does not know these files; it loads what it wrote itself
_layout    "fused": experts in three-dimensional tensors, as transformers has them in memory
_router    "ties": all experts are equally good, "twins": each is as good as its neighbour;
           "one": all tokens choose expert 1, "none": no token does
_extra     other tensors of the file, and their shapes
_shard     transformers' max_shard_size
_file      config.json itself, as `_name` has it, with small sizes"""

from published_configs import CHUNKED, FULL, SLIDING, files

__all__ = ["CHUNKED", "FAMILIES", "FULL", "PAD", "SIZES", "SLIDING"]

PAD = 7
ENDS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
SIZES = ENDS | {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# One key-value head for five queries; sizes that are no multiples of anything.
ODD = {"vocab_size": 97, "hidden_size": 45, "intermediate_size": 37, "num_attention_heads": 5, "num_key_value_heads": 1}
THREE = {"num_hidden_layers": 3}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED, APART = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}


def rope(kind="default", theta=500.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | more}


def published(kind="default", theta=500.0, **more):
    """As files of transformers 4 have it: rope_theta and rope_scaling."""
    scaling = {"rope_type": kind} | more if kind != "default" else None
    return {"_json": {"rope_theta": theta, "rope_scaling": scaling}, "_without": ["rope_parameters"]}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
PARTIAL = rope(partial_rotary_factor=0.5)


def longrope(half, original=32, **more):
    """Factors for `half` frequencies. Samples longer than `original` have other frequencies."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(half)], "long_factor": [2.0 + 0.5 * i for i in range(half)]}
    return rope("longrope", **factors, original_max_position_embeddings=original, **more)


def configs(*changes, base=SIZES):
    """Each of the changes on top of the sizes; a change is one dict, or several in a tuple."""
    made = []
    for change in changes:
        how = dict(base)
        for part in change if isinstance(change, tuple) else (change,):
            how |= part
        made.append({key: value for key, value in how.items() if value is not Ellipsis})
    return made


LLAMA = configs(
    {},
    (BIASES, TIED, {"head_dim": 6}),
    (ODD, {"head_dim": 10}),
    YARN,
    (LLAMA3, published("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    rope("linear", factor=3.0),
    (rope("dynamic", factor=2.0), {"max_position_embeddings": 32}),
    longrope(4),
    rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9),
    {"num_key_value_heads": 4, "num_hidden_layers": 1},
    {"_extra": {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}},
    longrope(4, original=16),
)
WINDOWS = {"sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]} | THREE
# n_routed_experts and friends of DeepSeek-V3, which GLM and dots1 have, too
GROUPED = MOE | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
MLA = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20}
BLOCKS = {"vocab_size": 1100}  # several blocks of the head's rows


def bare(*more):
    """Defaults of transformers, with the keys left out."""
    keys = "pad_token_id tie_word_embeddings rms_norm_eps rope_parameters attention_bias hidden_act layer_types"
    return {"_without": [*keys.split(), *more]}


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 16}
DEEPSEEK_V3_YARN = rope(
    "yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1
)


def text(*changes, base=SIZES):
    """The configurations of a language model within another model."""
    return [{"text_config": how} for how in configs(*changes, base=base)]


def wrapped(texts, **around):
    return [dict(around) | how for how in texts]


# Names that transformers since 4.52 wrote.
NEWER = {
    "_names": [
        ("^language_model[.]lm_head", "lm_head"),
        ("^language_model[.]model[.]", "model.language_model."),
        ("^(vision_tower|multi_modal_projector)", r"model.\1"),
    ]
}
NEXTN = {  # a layer that predicts a second token, which transformers leaves out
    "_extra": {
        "model.layers.2.embed_tokens.weight": (61, 32),
        "model.layers.2.enorm.weight": (32,),
        "model.layers.2.eh_proj.weight": (32, 64),
        "model.layers.2.self_attn.o_proj.weight": (32, 56),
        "model.layers.2.shared_head.head.weight": (61, 32),
    }
}

FAMILIES = {
    # --- dense, with what each layer has
    "llama": LLAMA,
    "mistral": configs(
        {"sliding_window": 5},
        (ODD, {"sliding_window": None, "head_dim": 6}, TIED),
        (YARN, {"sliding_window": None}),
    ),
    "ministral": configs(
        WINDOWS | {"head_dim": 8},
        (WINDOWS, ODD, {"head_dim": 10}),
        (WINDOWS, {"head_dim": 8, "_json": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}}),
    ),
    "ministral3": configs(
        rope("yarn", factor=4.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.3) | {"head_dim": 8},
        (ODD, rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1), {"head_dim": 10, "sliding_window": 6}),
    ),
    "cwm": configs((WINDOWS, LLAMA3, {"head_dim": 8}), (ODD, LLAMA3, {"head_dim": 12, "sliding_window": 3}), base=SIZES | {"bos_token_id": 1}),
    "seed_oss": configs(
        {"attention_out_bias": False, "head_dim": 8},
        (ODD, {"attention_out_bias": True, "head_dim": 10, "mlp_bias": True}),
        {"attention_bias": False, "head_dim": 12},
    ),
    "smollm3": configs(
        (THREE, {"no_rope_layers": [1, 0, 1]}),
        (THREE, ODD, BIASES, {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "hidden_size": 50}),
        (WINDOWS, APART, {"no_rope_layers": [0, 1, 1], "use_sliding_window": True}),
    ),
    "ernie4_5": configs({"head_dim": 8}, (ODD, APART, {"use_bias": True, "head_dim": 10})),
    "helium": configs({"head_dim": 8}, (ODD, BIASES, TIED, {"head_dim": 10, "hidden_size": 50})),
    "hunyuan_v1_dense": configs(
        {"head_dim": 8},
        (ODD, BIASES, TIED, {"head_dim": 10}),
        (rope("dynamic", alpha=50.0, factor=1.0), {"head_dim": 8}),
    ),
    "arcee": configs({"head_dim": 8}, (ODD, BIASES, TIED, {"head_dim": 6}), (YARN, {"head_dim": 8})),
    "internlm3": configs({"head_dim": 8}, (ODD, BIASES, {"head_dim": 10})),
    "iquestcoder": configs({"head_dim": 8}, (ODD, BIASES, TIED, {"head_dim": 10})),
    "jais2": configs({"head_dim": 8}, (ODD, TIED, {"head_dim": 10, "attention_bias": False, "mlp_bias": False})),
    "hyperclovax": configs(
        GRANITE | {"head_dim": 8, "logits_scaling": 0.6},
        (ODD, BIASES, TIED, GRANITE, {"hidden_size": 50, "use_post_norm": False, "logits_scaling": 0.4}),
    ),
    "qwen2": configs(
        {},
        (TIED, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        YARN,
        (ODD, {"vocab_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 30}),
    ),
    "qwen3": configs(
        {"head_dim": 8},
        (ODD, TIED, {"head_dim": 10, "attention_bias": True}),
        (YARN, {"head_dim": 8}, published("yarn", factor=4.0, original_max_position_embeddings=16)),
        (THREE, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "head_dim": 16}),
    ),
    # --- mixtures of experts
    "qwen3_moe": configs(
        MOE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8},
        (ODD, MOE, {"num_experts": 5, "num_experts_per_tok": 3, "head_dim": 10, "attention_bias": True, "moe_intermediate_size": 17}),
        (THREE, MOE, TIED, {"num_experts": 8, "decoder_sparse_step": 2, "head_dim": 8}),
        (THREE, MOE, {"num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True, "head_dim": 8}),
        MOE | {"num_experts": 8, "num_experts_per_tok": 1, "head_dim": 8, "_shard": "30KB"},
        MOE | {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True, "head_dim": 8},
        MOE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8, "_router": "ties"},
        MOE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8, "_router": "one"},
        MOE | {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "_router": "twins"},
        MOE | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 4, "num_hidden_layers": 1, "norm_topk_prob": True, "head_dim": 8, "_router": "twins"},
        MOE | {"num_experts": 130, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "num_hidden_layers": 1, "norm_topk_prob": True, "head_dim": 8, "_router": "ties"},
        MOE | {"num_experts": 130, "num_experts_per_tok": 7, "moe_intermediate_size": 4, "num_hidden_layers": 1, "norm_topk_prob": True, "head_dim": 8, "_router": "ties"},
        MOE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8, "_router": "none"},
        MOE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8, "_layout": "fused"},
        (YARN, MOE, {"num_experts": 8, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5}),
        (MOE, {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}, {"_json": {"num_experts": 8}, "_without": ["num_local_experts"]}),
    ),
    "mixtral": configs(
        {"num_local_experts": 4},
        (ODD, TIED, {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 10, "sliding_window": 5}),
        {"num_local_experts": 4, "num_experts_per_tok": 1},
        {"num_local_experts": 4, "_router": "ties"},
        {"num_local_experts": 6, "num_experts_per_tok": 3, "_router": "twins"},
        {"num_local_experts": 4, "_layout": "fused"},
    ),
    "qwen2_moe": configs(
        MOE | {"num_experts": 6, "shared_expert_intermediate_size": 20},
        (THREE, MOE, {"num_experts": 6, "shared_expert_intermediate_size": 28, "norm_topk_prob": True, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (MOE, TIED, {"num_experts": 5, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 20, "qkv_bias": False, "decoder_sparse_step": 2}),
        MOE | {"num_experts": 6, "shared_expert_intermediate_size": 20, "_router": "one"},
    ),
    "olmoe": configs(
        {"num_experts": 6, "num_experts_per_tok": 2},
        {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "clip_qkv": 0.6, "num_key_value_heads": 4},
        (ODD, {"num_experts": 5, "num_experts_per_tok": 2, "attention_bias": True, "hidden_size": 50}),
    ),
    "glm4_moe": configs(
        (GROUPED, PARTIAL, {"use_qk_norm": True, "head_dim": 8}),
        (THREE, GROUPED, GROUPS, PARTIAL, {"attention_bias": True, "head_dim": 12, "n_shared_experts": 2}),
        (GROUPED, PARTIAL, TIED, {"norm_topk_prob": False, "first_k_dense_replace": 0, "head_dim": 8}),
        (GROUPED, PARTIAL, {"head_dim": 8}, NEXTN),
        (GROUPED, GROUPS, PARTIAL, {"head_dim": 8, "_router": "ties"}),
        (GROUPED, PARTIAL, {"head_dim": 8, "num_experts_per_tok": 3, "_router": "twins"}),
    ),
    "minimax_m2": configs(
        (PARTIAL, {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}),
        (ODD, TIED, {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 12, "rotary_dim": 6}),
        (PARTIAL, {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "_router": "twins"}),
    ),
    "dots1": configs(
        (GROUPED, {"head_dim": 8}),
        (THREE, GROUPED, GROUPS, WINDOWS, {"head_dim": 10, "n_shared_experts": 2}),
        (GROUPED, TIED, {"norm_topk_prob": False, "first_k_dense_replace": 0, "attention_bias": True}),
    ),
    "ernie4_5_moe": configs(
        {"moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        (THREE, APART, {"moe_intermediate_size": 20, "moe_k": 3, "moe_num_experts": 6, "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 2, "use_bias": True, "head_dim": 10}),
        {"moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 6, "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_layer_end_index": -1, "_extra": {"model.mtp_emb_norm.0.weight": (32,), "model.mtp_block.0.self_attn.q_proj.weight": (32, 32)}},
        {"moe_intermediate_size": 24, "moe_k": 3, "moe_num_experts": 6, "moe_layer_start_index": 0, "moe_layer_end_index": -1, "_router": "twins"},
    ),
    "hunyuan_v1_moe": configs(
        {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
        (ODD, TIED, {"num_experts": 5, "moe_topk": 3, "head_dim": 10, "attention_bias": True}),
        {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 8},
    ),
    "granitemoe": configs(
        GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 2},
        (ODD, TIED, GRANITE, {"num_local_experts": 5, "num_experts_per_tok": 3, "attention_bias": True, "hidden_size": 50}),
        {"num_local_experts": 4, "num_experts_per_tok": 2, "_router": "ties"},
    ),
    "phimoe": configs(
        {"num_local_experts": 6, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.4},
        {"num_local_experts": 4, "sliding_window": 5},
        {"num_local_experts": 6, "router_jitter_noise": 0.4, "_router": "twins"},
        {"num_local_experts": 6, "_router": "ties"},
        (longrope(4, short_mscale=1.1, long_mscale=1.3), {"num_local_experts": 4, "attention_bias": True, "router_jitter_noise": 0.4}),
    ),
    # --- norms and scalars
    "gemma": configs({"head_dim": 12}, (ODD, {"head_dim": 10, "attention_bias": True}), {"head_dim": 8, "hidden_act": "gelu"}, (bare("head_dim", "num_key_value_heads"), {"head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 16})),
    "gemma2": configs(
        (GEMMA, {"sliding_window": 5}),
        (THREE, ODD, GEMMA, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 4}),
        (GEMMA, {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}),
        (GEMMA, BLOCKS, {"sliding_window": 5, "tie_word_embeddings": False, "final_logit_softcapping": 3.0}),
        (bare("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation"), {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4}),
    ),
    "vaultgemma": configs(
        (GEMMA, {"sliding_window": 5}),
        (THREE, ODD, GEMMA, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 4, "tie_word_embeddings": False}),
    ),
    "gemma3_text": configs(
        (WINDOWS, GEMMA),
        (ODD, GEMMA, {"num_hidden_layers": 4, "sliding_window": 4, "layer_types": [SLIDING, SLIDING, FULL, SLIDING], "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}}}),
        (WINDOWS, GEMMA, {"_json": {"rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "_without": ["rope_parameters"]}),
        (bare("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "final_logit_softcapping", "hidden_activation"), {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4, "num_hidden_layers": 7}),
        (GEMMA, {"sliding_window": 4, "num_hidden_layers": 4, "final_logit_softcapping": 3.0, "_json": {"sliding_window_pattern": 3}, "_without": ["layer_types"]}),
    ),
    "olmo2": configs({}, (ODD, TIED, {"attention_bias": True, "hidden_size": 50}), bare()),
    "olmo3": configs(WINDOWS, (ODD, TIED, {"num_hidden_layers": 4, "hidden_size": 50, "sliding_window": 4, "attention_bias": True}), (WINDOWS, YARN), (bare(), {"sliding_window": 4, "num_hidden_layers": 5})),
    "flex_olmo": configs(
        {"num_experts": 4, "num_experts_per_tok": 2},
        (ODD, TIED, {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True, "hidden_size": 50, "attention_bias": True}),
    ),
    "exaone4": configs(
        (WINDOWS, {"head_dim": 8}),
        (ODD, TIED, {"sliding_window": None, "head_dim": 10, "layer_types": [FULL] * 2, "_json": {"sliding_window_pattern": None}}),
        (LLAMA3, {"num_hidden_layers": 4, "sliding_window": 5, "layer_types": [SLIDING, FULL] * 2, "_json": {"sliding_window_pattern": "LG"}}),
    ),
    "granite": configs(GRANITE, (ODD, BIASES, TIED, GRANITE, {"hidden_size": 50}), rope("linear", factor=2.0), (GRANITE, BLOCKS, TIED), bare(*GRANITE)),
    "granite_swa": configs(
        (THREE, GRANITE, {"sliding_window": 5}),
        (ODD, BIASES, GRANITE, rope(theta=700.0), {"hidden_size": 50, "num_hidden_layers": 4, "sliding_window": 4, "layer_types": [SLIDING, FULL] * 2, "layer_rope_theta": [700.0, 0, 0, 700.0], "tie_word_embeddings": False}),
        (bare(*GRANITE, "num_key_value_heads"), {"num_hidden_layers": 5, "sliding_window": 4, "num_key_value_heads": 4, "_json": {"layer_rope_theta": None}}),
    ),
    "olmo": configs({}, (ODD, TIED, {"clip_qkv": 0.6, "attention_bias": True, "hidden_size": 50}), (BLOCKS, bare(), {"clip_qkv": 0.4})),
    # --- language models within others, and fused tensors
    "gemma3": wrapped(
        [*text((WINDOWS, GEMMA, {"model_type": "gemma3_text"}), (ODD, WINDOWS, GEMMA, {"model_type": "gemma3_text"})), NEWER | text((WINDOWS, GEMMA, {"model_type": "gemma3_text"}))[0]],
        vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=60, boi_token_index=58, eoi_token_index=59,
    ),
    "mistral3": wrapped(
        [*text({"model_type": "mistral", "head_dim": 8, "sliding_window": None}, (ODD, {"model_type": "mistral", "head_dim": 10})), NEWER | text({"model_type": "mistral", "head_dim": 8, "sliding_window": None})[0]],
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
        image_token_index=60, tie_word_embeddings=False,
    ),
    "qwen2_5_vl": wrapped(
        text({"model_type": "qwen2_5_vl_text"} | rope(mrope_section=[1, 1, 2]), ({"model_type": "qwen2_5_vl_text", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} | rope(mrope_section=[2, 1, 1]))),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        image_token_id=60, video_token_id=59, vision_start_token_id=58, vision_end_token_id=57,
    ),
    "qwen2_vl": wrapped(
        text({"model_type": "qwen2_vl_text"} | rope(mrope_section=[1, 1, 2])),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        image_token_id=60, video_token_id=59, vision_start_token_id=58, vision_end_token_id=57, tie_word_embeddings=True,
    ),
    "llava": wrapped(
        text({"model_type": "llama"}, (ODD, {"model_type": "mistral", "head_dim": 10, "sliding_window": 5}), ({"model_type": "qwen2"}, TIED)),
        vision_config=CLIP, image_token_index=60,
    ),
    "llava_next": wrapped(text({"model_type": "mistral", "sliding_window": None}), vision_config=CLIP, image_token_index=60),
    "llava_onevision": wrapped(text(({"model_type": "qwen2"}, TIED)), vision_config=SIGLIP, image_token_index=60, video_token_index=59),
    "vipllava": wrapped(text({"model_type": "llama"}), vision_config=CLIP, image_token_index=60, vision_feature_layers=[-1]),
    "internvl": wrapped(
        text({"model_type": "qwen2"}),
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=60, tie_word_embeddings=False,
    ),
    "llama4": wrapped(
        text(
            {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 44, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 6, "interleave_moe_layer_step": 2, "num_hidden_layers": 4, "floor_scale": 4, "attn_scale": 0.3},
            {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 44, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_chunk_size": 5, "use_qk_norm": False, "no_rope_layers": [0, 1], "attn_temperature_tuning": False},
        ),
        vision_config={"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28, "patch_size": 14},
        image_token_index=60, boi_token_index=58, eoi_token_index=59, pad_token_id=PAD,
    ),
    "llama4_text": configs(
        {"head_dim": 8, "intermediate_size_mlp": 44, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 6, "num_hidden_layers": 4, "floor_scale": 4, "attn_scale": 0.3},
        (ODD, LLAMA3, {"head_dim": 12, "intermediate_size_mlp": 33, "num_local_experts": 3, "num_experts_per_tok": 2, "attention_chunk_size": 5, "attention_bias": True, "moe_layers": [1]}),
    ),
    "phi3": configs(
        rope(),
        (ODD, TIED, rope(), {"sliding_window": 5, "hidden_size": 50}),
        (longrope(4), {"original_max_position_embeddings": 32}),
        (rope(partial_rotary_factor=0.5), {"num_key_value_heads": 4}),
    ),
    "glm": configs((PARTIAL, {"head_dim": 8}), (ODD, PARTIAL, TIED, {"head_dim": 12, "attention_bias": False})),
    "glm4": configs((PARTIAL, {"head_dim": 8}), (ODD, PARTIAL, TIED, {"head_dim": 12, "attention_bias": False})),
    # --- sinks
    "gpt_oss": configs(
        (YARN, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5}),
        (ODD, THREE, rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False, beta_fast=32.0, beta_slow=1.0), {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 10, "sliding_window": 4, "layer_types": [FULL, SLIDING, SLIDING], "swiglu_limit": 0.8}),
        (rope(), {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "attention_bias": False, "_router": "ties"}),
    ),
    # --- MLA
    "deepseek_v2": configs(
        (MLA, MOE, {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}),
        (THREE, MLA, MOE, {"n_routed_experts": 8, "n_shared_experts": 1, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0, "attention_bias": True}),
        (MLA, MOE, DEEPSEEK_V3_YARN, {"n_routed_experts": 6, "n_shared_experts": 1, "norm_topk_prob": True}),
        (MLA, MOE, {"n_routed_experts": 8, "n_shared_experts": 1, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "_router": "twins"}),
    ),
    "deepseek_v3": configs(
        (MLA, GROUPED, GROUPS, rope()),
        (THREE, MLA, GROUPED, rope(), {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 0.8}),
        (MLA, GROUPED, GROUPS, DEEPSEEK_V3_YARN),
        (MLA, GROUPED, GROUPS, rope(), {"rope_interleave": False}, TIED),
        (MLA, GROUPED, GROUPS, rope(), NEXTN),
        (MLA, GROUPED, GROUPS, rope(), {"_router": "twins"}),
        (MLA, GROUPED, GROUPS, rope(), {"_router": "ties", "n_routed_experts": 16, "num_experts_per_tok": 5}),
    ),
    "kimi_k2": configs(
        (MLA, GROUPED, DEEPSEEK_V3_YARN, {"_type": "deepseek_v3", "_class": "DeepseekV3ForCausalLM"}, {"_json": {"model_type": "kimi_k2", "rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}}, "_without": ["rope_parameters"], "_late": True}),
    ),
    "glm4_moe_lite": configs((MLA, GROUPED), (THREE, MLA, GROUPED, GROUPS, {"q_lora_rank": None, "attention_bias": True}), (MLA, GROUPED, NEXTN)),
    # With a padding token, transformers sets its row of the embedding to 0 whenever it loads one.
    "youtu": configs(
        (MLA, {"pad_token_id": None}),
        (THREE, MLA, APART, {"pad_token_id": None, "q_lora_rank": None, "attention_bias": True}),
        (ODD, MLA, YARN, {"pad_token_id": None, "rope_interleave": False, "num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 7}),
    ),
    "minicpm3": configs(
        MLA,
        (THREE, MLA, APART, BIASES, {"q_lora_rank": None, "v_head_dim": None, "scale_emb": 3, "scale_depth": None, "dim_model_base": 20}),
        (ODD, MLA, longrope(3), {"num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 7, "scale_depth": 0.7, "dim_model_base": None}),
    ),
    # --- LayerNorm, parallel blocks, no gate, learned positions, ALiBi
    "phi": configs(
        PARTIAL,
        (PARTIAL, {"qk_layernorm": True, "num_key_value_heads": 4}),
        (rope(partial_rotary_factor=0.4), {"vocab_size": 97, "hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": False}),
    ),
    "gpt_neox": configs(
        rope(partial_rotary_factor=0.25),
        (rope(partial_rotary_factor=0.5), {"use_parallel_residual": False, "hidden_size": 40, "num_attention_heads": 5}),
        (rope(partial_rotary_factor=1.0), TIED, {"attention_bias": False, "hidden_act": "gelu_new"}),
        rope(partial_rotary_factor=0.25) | {"_extra": {"gpt_neox.layers.0.attention.bias": (1, 1, 64, 64), "gpt_neox.layers.0.attention.masked_bias": (), "gpt_neox.layers.1.attention.rotary_emb.inv_freq": (1,)}},
        base=SIZES | {"num_key_value_heads": ...},
    ),
    "starcoder2": configs(
        {},
        (ODD, {"hidden_size": 50, "sliding_window": 5, "use_bias": False}),
        (APART, {"hidden_act": "gelu"}),
    ),
    "stablelm": configs(
        rope(partial_rotary_factor=0.25),
        (PARTIAL, {"use_qkv_bias": True, "qk_layernorm": True}),
        (PARTIAL, TIED, {"use_parallel_residual": True, "num_key_value_heads": 4}),
    ),
    "falcon": configs(
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2} | rope("linear", factor=2.0),
        {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        {"multi_query": True, "parallel_attn": False, "bias": True},
        {"multi_query": False, "num_attention_heads": 3, "hidden_size": 30, "alibi": True} | APART,
        base=SIZES | {"num_key_value_heads": ..., "intermediate_size": ...},
    ),
    "cohere": configs({"logit_scale": 0.5}, {"use_qk_norm": True, "logit_scale": 2.0}, (ODD, APART, {"attention_bias": True, "hidden_size": 50})),
    "cohere2": configs((WINDOWS, {"logit_scale": 0.5}), (ODD, {"num_hidden_layers": 4, "sliding_window": 4, "hidden_size": 50, "attention_bias": True, "head_dim": 10})),
    "nemotron": configs((PARTIAL, {"head_dim": 8}), (ODD, BIASES, TIED, PARTIAL, {"head_dim": 12})),
    "gpt2": configs(
        {},
        {"n_inner": 50, "scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"n_head": 5, "n_embd": 45, "scale_attn_weights": False, "activation_function": "gelu"} | APART,
        {"reorder_and_upcast_attn": True},
        {"_names": [("^transformer[.]", "")], "_extra": {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()}},
        base=ENDS | {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "opt": configs(
        {},
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
        {"enable_bias": False, "activation_function": "gelu", "num_attention_heads": 5, "hidden_size": 45, "word_embed_proj_dim": 45},
        {"layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True} | APART,
        {"_names": [("^model[.]decoder", "decoder")]},
        base=ENDS | {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": configs(
        {},
        {"apply_residual_connection_post_layernorm": True},
        {"_names": [("^transformer[.]", "")]},
        {"n_head": 5, "hidden_size": 45, "vocab_size": 97} | APART,
        base=ENDS | {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}  # fmt: skip

# Families that differ from one above in a key, a name or a norm.
NO_KV = {"num_key_value_heads": ...}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
GPT = ENDS | {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES |= {
    "granitemoeshared": configs(GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 20}, GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "solar_open": configs((GROUPED, {"head_dim": 8}), (GROUPED, GROUPS, TIED, {"head_dim": 10})),
    "exaone_moe": configs(
        (WINDOWS, MOE, {"num_experts": 8, "head_dim": 8}),
        (WINDOWS, MOE, {"num_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "num_shared_experts": 2}),
    ),
    "axk1": configs((MLA, GROUPED, GROUPS, {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": ...})),
    "qwen2_vl": wrapped(
        text({"model_type": "qwen2_vl_text"} | rope(mrope_section=[1, 1, 2])),
        vision_config=QWEN_VISION | {"embed_dim": 16, "hidden_size": 32}, **QWEN_TOKENS,
    ),
    "qwen3_vl": wrapped(
        text({"model_type": "qwen3_vl_text", "head_dim": 8} | rope(mrope_section=[2, 1, 1], mrope_interleaved=True)),
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **QWEN_TOKENS,
    ),
    "qwen3_vl_moe": wrapped(
        text({"model_type": "qwen3_vl_moe_text", "head_dim": 8, "num_local_experts": 6} | MOE | rope(mrope_section=[2, 1, 1], mrope_interleaved=True)),
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **QWEN_TOKENS,
    ),
    "gpt_bigcode": configs({}, {"multi_query": False, "n_inner": 50}, base=GPT),
    "gptj": configs({"rotary_dim": 6}, {"rotary_dim": 4, "n_inner": 50} | TIED, base=GPT),
    "codegen": configs({"rotary_dim": 6}, base=GPT),
    "gpt_neo": configs(
        {"attention_types": [[["global", "local"], 1]], "window_size": 5},
        base=ENDS | {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64},
    ),
    "mpt": configs({}, {"attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.2}}, base=ENDS | {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "persimmon": configs({}, {"qk_layernorm": False} | TIED, base=SIZES | NO_KV),
    "biogpt": configs({}, base=SIZES | NO_KV),
}  # fmt: skip

for family, hows in FAMILIES.items():
    hows += files(family)
