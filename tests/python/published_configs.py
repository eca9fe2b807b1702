"""config.json of published models: their keys and values as they stand there, without the sizes.
`small` puts small sizes in their place, so that every key keeps its meaning."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# A size is written as in `small`; None where the file says null.
USUAL = {"vocab_size": 0, "hidden_size": 0, "intermediate_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0}
GQA = USUAL | {"num_key_value_heads": 2}
MHA = USUAL | {"num_key_value_heads": 4}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "ffn_dim": 40,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 32,
    "sliding_window": 5,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "attention_chunk_size": 6,
    "intermediate_size_mlp": 44,
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def small(config):
    """The file with small sizes, and ids of tokens that are in the vocabulary."""
    made = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = small(value)
        elif key in SIZES and value is not None:
            value = SIZES[key]
        elif key in TOKENS and value is not None:
            ids = [id % 61 for id in value] if isinstance(value, list) else value % 61
            value = ids
        elif key == "layer_types":
            value = value[:4]
        made[key] = value
    return made


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
DEEPSEEK_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}
SHORT, LONG = [1.0, 1.05, 1.1, 1.2], [1.0, 2.5, 9.0, 30.0]

TOWER = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
PUBLISHED = {
    "llama": {
        "Llama-2-7b": MHA | {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True},
        "Llama-3.1-8B-Instruct": GQA | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True},
        "Llama-3.2-1B": GQA | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "mistral": {
        "Mistral-7B-v0.1": GQA | {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        "Mistral-Nemo-Base-2407": GQA | {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 12, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "qwen2": {
        "Qwen2.5-7B-Instruct": GQA | {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False},
    },
    "qwen3": {
        "Qwen3-8B": GQA | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False},
        "Qwen3-8B with yarn": GQA | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False},
    },
    "qwen3_moe": {
        "Qwen3-30B-A3B": GQA | {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 3, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False},
    },
    "mixtral": {
        "Mixtral-8x7B-v0.1": GQA | {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "qwen2_moe": {
        "Qwen1.5-MoE-A2.7B": MHA | {"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 3, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False},
    },
    "olmoe": {
        "OLMoE-1B-7B-0924": MHA | {"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 3, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "glm4_moe": {
        "GLM-4.5-Air": GQA | {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 8, "hidden_act": "silu", "partial_rotary_factor": 0.5, "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "pad_token_id": 151329, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": False},
        "GLM-4.5": GQA | {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 8, "hidden_act": "silu", "partial_rotary_factor": 0.5, "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1536, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 160, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "pad_token_id": 151329, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True},
    },
    "minimax_m2": {
        "MiniMax-M2": GQA | {"architectures": ["MiniMaxM2ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": [1, 1, 1, 1], "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config", "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"}, "bos_token_id": None, "eos_token_id": None, "head_dim": 12, "hidden_act": "silu", "initializer_range": 0.02, "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0, "max_position_embeddings": 196608, "mlp_intermediate_size": 8192, "model_type": "minimax_m2", "mtp_transformer_layers": 1, "num_experts_per_tok": 3, "num_local_experts": 256, "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 6, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False, "use_cache": True, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True},
    },
    "dots1": {
        "dots.llm1.base": MHA | {"architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 151643, "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 62, "model_type": "dots1", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 2, "norm_topk_prob": True, "num_experts_per_tok": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False},
    },
    "ernie4_5": {
        "ERNIE-4.5-0.3B-PT": GQA | {"architectures": ["Ernie4_5ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 131072, "model_type": "ernie4_5", "head_dim": 16, "pad_token_id": 0, "rms_norm_eps": 1e-05, "use_cache": False, "rope_theta": 500000, "use_bias": False, "use_flash_attention": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    },
    "ernie4_5_moe": {
        "ERNIE-4.5-21B-A3B-PT": GQA | {"architectures": ["Ernie4_5_MoeForCausalLM"], "attention_probs_dropout_prob": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_dropout_prob": 0.0, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 3, "moe_layer_end_index": 3, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": False},
    },
    "hunyuan_v1_moe": {
        "Hunyuan-A13B-Instruct": GQA | {"add_classification_head": False, "anyres_pooling_size": 2, "architectures": ["HunYuanMoEV1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_head_dim": 8, "bos_token_id": 1, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "eod_token_id": 3, "eos_token_id": 2, "group_limited_greedy": False, "hidden_act": "silu", "head_dim": 8, "initializer_range": 0.02, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "hunyuan_v1_moe", "moe_drop_tokens": False, "moe_intermediate_size": [40, 40, 40, 40], "moe_layer_num_skipped": 0, "moe_random_routing_dropped_token": False, "moe_topk": [2, 2, 2, 2], "norm_topk_prob": True, "norm_type": "rms", "num_experts": 64, "num_shared_expert": [1, 1, 1, 1], "pad_token_id": 0, "pretraining_tp": 1, "qk_norm": True, "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "type": "dynamic"}, "rope_theta": 10000.0, "routed_scaling_factor": 1.0, "sep_token_id": 4, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_cla": False, "use_mixed_mlp_moe": True, "use_mla": False, "use_qk_norm": True},
    },
    "hunyuan_v1_dense": {
        "Hunyuan-7B-Instruct": GQA | {"add_classification_head": False, "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_head_dim": 8, "bos_token_id": 1, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "eod_token_id": 3, "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "hunyuan_v1_dense", "norm_type": "rms", "pad_token_id": 0, "pretraining_tp": 1, "qk_norm": True, "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "type": "dynamic"}, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_cla": False, "use_qk_norm": True},
    },
    "granite": {
        "granite-3.1-8b-instruct": GQA | {"architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.02, "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "granitemoe": {
        "granite-3.1-3b-a800m": GQA | {"architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.02, "logits_scaling": 6.0, "max_position_embeddings": 131072, "model_type": "granitemoe", "num_experts_per_tok": 3, "num_local_experts": 40, "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000.0, "router_aux_loss_coef": 0.001, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "phimoe": {
        "Phi-3.5-MoE-instruct": GQA | {"architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig", "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}, "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0, "initializer_range": 0.02, "input_jitter_noise": 0.01, "lm_head_bias": True, "max_position_embeddings": 131072, "model_type": "phimoe", "num_experts_per_tok": 2, "num_local_experts": 16, "original_max_position_embeddings": 4096, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": LONG, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096, "short_factor": SHORT, "short_mscale": 1.243163121016122, "type": "longrope"}, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gemma": {
        "gemma-2b": USUAL | {"num_key_value_heads": 1, "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None, "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "gemma", "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gemma2": {
        "gemma-2-9b-it": GQA | {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "gemma2", "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gemma3_text": {
        "gemma-3-1b-it": USUAL | {"num_key_value_heads": 1, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 3, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "olmo": {
        "OLMo-1B-hf": MHA | {"architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "olmo", "pad_token_id": 1, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32", "use_cache": True},
        "OLMo-7B-hf": MHA | {"architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": 0.5, "eos_token_id": 50279, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "olmo", "pad_token_id": 1, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True},
    },
    "olmo2": {
        "OLMo-2-1124-7B": MHA | {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "olmo2", "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False},
    },
    "olmo3": {
        "Olmo-3-1025-7B": MHA | {"architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "initializer_range": 0.02, "layer_types": [SLIDING, SLIDING, SLIDING, FULL], "max_position_embeddings": 65536, "model_type": "olmo3", "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "dtype": "bfloat16", "use_cache": False},
    },
    "exaone4": {
        "EXAONE-4.0-32B": GQA | {"architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 361, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "layer_types": [SLIDING, SLIDING, SLIDING, FULL], "max_position_embeddings": 131072, "model_type": "exaone4", "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3 | {"factor": 16.0}, "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        "EXAONE-4.0-1.2B": GQA | {"architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 361, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "layer_types": [FULL] * 4, "max_position_embeddings": 65536, "model_type": "exaone4", "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3 | {"factor": 16.0}, "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "smollm3": {
        "SmolLM3-3B": GQA | {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "initializer_range": 0.02, "layer_types": [FULL] * 4, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False},
    },
    "seed_oss": {
        "Seed-OSS-36B-Instruct": GQA | {"architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1, "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 524288, "mlp_bias": False, "model_type": "seed_oss", "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "arcee": {
        "AFM-4.5B": GQA | {"architectures": ["ArceeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 127997, "eos_token_id": 127999, "head_dim": 8, "hidden_act": "relu2", "initializer_range": 0.02, "max_position_embeddings": 65536, "mlp_bias": False, "model_type": "arcee", "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"}, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False},
    },
    "phi3": {
        "Phi-3-mini-4k-instruct": MHA | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        "Phi-3.5-mini-instruct": MHA | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
        "Phi-4-mini-instruct": GQA | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "initializer_range": 0.02, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 1.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "glm4": {
        "GLM-4-9B-0414": GQA | {"architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "model_type": "glm4", "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gpt_oss": {
        "gpt-oss-20b": GQA | {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 8, "hidden_act": "silu", "initial_context_length": 4096, "initializer_range": 0.02, "layer_types": [SLIDING, FULL, SLIDING, FULL], "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_experts_per_tok": 4, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True},
    },
    "glm": {
        "glm-4-9b-chat-hf": GQA | {"architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "glm", "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gemma3": {  # the text model has the default vocabulary, heads and sizes of heads
        "gemma-3-4b-it": {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 4, "model_type": "gemma3", "text_config": {"hidden_size": 0, "intermediate_size": 0, "model_type": "gemma3_text", "num_hidden_layers": 0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}, "torch_dtype": "bfloat16", "vision_config": TOWER | {"image_size": 28, "patch_size": 14}},
    },
    "mistral3": {
        "Mistral-Small-3.1-24B-Instruct-2503": {"architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2, "text_config": GQA | {"attention_dropout": 0.0, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True}, "torch_dtype": "bfloat16", "vision_config": PIXTRAL, "vision_feature_layer": -1},
    },
    "qwen2_5_vl": {
        "Qwen2.5-VL-7B-Instruct": GQA | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 57, "vision_end_token_id": 58, "vision_token_id": 56, "image_token_id": 60, "video_token_id": 59, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vision_config": {"depth": 1, "hidden_act": "silu", "hidden_size": 0, "intermediate_size": 0, "num_heads": 2, "in_chans": 3, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [0], "tokens_per_second": 2, "temporal_patch_size": 2}, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    },
    "qwen2_vl": {
        "Qwen2-VL-2B-Instruct": GQA | {"architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 57, "vision_end_token_id": 58, "vision_token_id": 56, "image_token_id": 60, "video_token_id": 59, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vision_config": {"depth": 1, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 0, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    },
    "llava": {
        "llava-1.5-7b-hf": {"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 60, "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": USUAL | {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16"}, "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 16, "image_size": 28, "patch_size": 14}, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    },
    "llama4": {
        "Llama-4-Scout-17B-16E-Instruct": {"architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 58, "eoi_token_index": 59, "image_token_index": 60, "model_type": "llama4", "text_config": GQA | {"_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": True, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008], "floor_scale": 8, "for_llm_compressor": False, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 16384, "layer_types": [CHUNKED, CHUNKED, CHUNKED, FULL], "max_position_embeddings": 10485760, "model_type": "llama4_text", "moe_layers": [0, 1, 2, 3], "no_rope_layers": [1, 1, 1, 0], "num_experts_per_tok": 1, "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True}, "torch_dtype": "bfloat16", "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28, "patch_size": 14}},
    },
    "deepseek_v2": {
        "DeepSeek-V2-Lite": MHA | {"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model", "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 3, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128},
        "DeepSeek-V2": MHA | {"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 3, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 2, "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128},
    },
    "deepseek_v3": {
        "DeepSeek-V3 in BF16": MHA | {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model", "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 3, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": DEEPSEEK_YARN, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 2, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128},
    },
    "glm4_moe_lite": {
        "GLM-4.7-Flash": MHA | {"architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "max_position_embeddings": 202752, "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16", "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
    },
    "phi": {
        "phi-1_5": USUAL | {"architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": None, "embd_pdrop": 0.0, "eos_token_id": None, "hidden_act": "gelu_new", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi", "num_key_value_heads": None, "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.0, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True},
        "phi-2": MHA | {"architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "hidden_act": "gelu_new", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi", "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True},
    },
    "gpt_neox": {
        "pythia-1.4b": USUAL | {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True},
        "gpt-neox-20b": USUAL | {"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True},
    },
    "starcoder2": {
        "starcoder2-3b": GQA | {"architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.018042, "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm", "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "sliding_window": 4096, "torch_dtype": "float32", "use_bias": True, "use_cache": True},
    },
    "stablelm": {
        "stablelm-2-1_6b": MHA | {"architectures": ["StableLmForCausalLM"], "bos_token_id": 100257, "eos_token_id": 100257, "hidden_act": "silu", "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm", "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "use_qkv_bias": True},
        "stablelm-2-12b": GQA | {"architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 100257, "eos_token_id": 100257, "hidden_act": "silu", "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm", "partial_rotary_factor": 0.25, "qk_layernorm": True, "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_parallel_residual": True, "use_qkv_bias": False},
    },
    "falcon": {
        "falcon-7b": {"vocab_size": 0, "hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig", "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"}, "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": True},
        "falcon-40b": {"vocab_size": 0, "hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "num_kv_heads": 2, "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": True, "new_decoder_architecture": True, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True},
        "falcon-rw-1b": {"vocab_size": 0, "hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "alibi": True, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "cohere": {
        "c4ai-command-r-v01": MHA | {"architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id": 255001, "hidden_act": "silu", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "logit_scale": 0.0625, "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere", "pad_token_id": 0, "pretraining_tp": 1, "rope_theta": 8000000.0, "torch_dtype": "float16", "use_cache": True},
        "c4ai-command-r-plus": GQA | {"architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id": 255001, "hidden_act": "silu", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "logit_scale": 0.8333333333333334, "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere", "pad_token_id": 0, "rope_theta": 75000000.0, "tie_word_embeddings": True, "torch_dtype": "float16", "use_cache": True, "use_qk_norm": True},
    },
    "cohere2": {
        "c4ai-command-r7b-12-2024": GQA | {"architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5, "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192, "model_type": "cohere2", "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0, "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4, "torch_dtype": "bfloat16", "use_cache": True, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True},
    },
    "nemotron": {
        "Minitron-4B-Base": GQA | {"architectures": ["NemotronForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 3, "head_dim": 8, "hidden_act": "relu2", "initializer_range": 0.0134, "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "nemotron", "norm_eps": 1e-05, "rope_theta": 10000, "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    },
    "gpt2": {
        "gpt2": {"vocab_size": 0, "n_embd": 0, "n_head": 0, "n_layer": 0, "n_positions": 0, "n_ctx": 0, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    },
    "opt": {
        "opt-1.3b": {"vocab_size": 0, "hidden_size": 0, "ffn_dim": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "max_position_embeddings": 0, "word_embed_proj_dim": 32, "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "init_std": 0.02, "layerdrop": 0.0, "model_type": "opt", "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "use_cache": True},
        "opt-350m": {"vocab_size": 0, "hidden_size": 0, "ffn_dim": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "max_position_embeddings": 0, "word_embed_proj_dim": 20, "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False, "dropout": 0.1, "eos_token_id": 2, "init_std": 0.02, "layerdrop": 0.0, "model_type": "opt", "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "use_cache": True},
    },
    "bloom": {
        "bloom-560m": {"vocab_size": 0, "n_layer": 0, "hidden_size": 0, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "architectures": ["BloomForCausalLM"], "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_inner": None, "num_attention_heads": 0, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True, "skip_bias_add_qkv": False, "unk_token_id": 0, "use_cache": True},
    },
}  # fmt: skip


def files(family):
    """For families.py: the published files of a family, small."""
    return [{"_name": name, "_file": small(config)} for name, config in PUBLISHED.get(family, {}).items()]
