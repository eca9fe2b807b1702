"""Llama checkpoints of random weights, of any size, without a framework."""

import json
import math
from pathlib import Path

import numpy as np

MIB = 1 << 20


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    all_of_it = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        all_of_it |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    all_of_it["model.norm"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        all_of_it["lm_head"] = all_of_it["model.embed_tokens"]
    return {f"{name}.weight": shape for name, shape in all_of_it.items()}


def write_llama(folder: Path, config: dict) -> int:
    return write_noise(folder, config, shapes_of(config))


def write_noise(folder: Path, config: dict, shapes: dict) -> int:
    """Weights in bf16: one mebibyte of noise, repeated. Returns the number of bytes of the
    weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = (np.random.default_rng(0).standard_normal(MIB // 2) * 0.02).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, MIB):
            file.write(block[: end - at])
    return end
