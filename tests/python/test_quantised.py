"""Quantised checkpoints are refused where numbers are edited or computed with, and nowhere else.

Codes pass through an edit but their scales do not, so the result would be neither model."""

import json

import numpy as np
import pytest
from conftest import part
from reference import folder_bytes
from test_lora import PREFIX, write_adapter

F8 = "F8_E4M3"
LINEAR = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"


def write_raw(path, tensors):
    """Zeros of any dtype; tensors maps a name to (dtype, shape)."""
    bits = {"F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U8": 8, "I8": 8, "BOOL": 8, "I16": 16}
    bits |= {"U16": 16, "BF16": 16, "F16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape)) * bits[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


def with_rest(tensors):
    return tensors | {"model.norm.weight": ("BF16", (8,)), "lm_head.weight": ("BF16", (10, 8))}


# What is stored for one layer; the message names the first.
FORMATS = {
    "fp8, blocks": {"weight": (F8, (8, 8)), "weight_scale_inv": ("F32", (1, 1))},
    "fp8, static": {"weight": (F8, (8, 8)), "weight_scale": ("BF16", (8, 1)), "input_scale": ("F32", ())},
    "fp8, as DeepSeek has it": {"weight": (F8, (8, 8)), "scale": ("F32", (1, 1))},
    "fp8, as Mistral has it": {"weight": ("F8_E5M2", (8, 8)), "qscale_weight": ("F32", ())},
    "fp8, as ComfyUI has it": {"weight": (F8, (8, 8)), "scale_weight": ("F32", ())},
    "compressed-tensors int8": {"weight": ("I8", (8, 8)), "weight_scale": ("BF16", (8, 1))},
    "compressed-tensors packed": {
        "weight_packed": ("I32", (8, 1)),
        "weight_scale": ("BF16", (8, 1)),
        "weight_shape": ("I64", (2,)),
    },
    "compressed-tensors nvfp4": {
        "weight_packed": ("U8", (8, 4)),
        "weight_scale": (F8, (8, 1)),
        "weight_global_scale": ("F32", (1,)),
    },
    "nvfp4, as modelopt has it": {
        "weight": ("U8", (8, 4)),
        "weight_scale": (F8, (8, 1)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
    "nvfp4 as F4": {"weight": ("F4", (8, 8)), "weight_scale": (F8, (8, 1))},
    "gptq": {
        "qweight": ("I32", (1, 8)),
        "qzeros": ("I32", (1, 1)),
        "scales": ("F16", (1, 8)),
        "g_idx": ("I32", (8,)),
    },
    "awq": {"qweight": ("I32", (8, 1)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, 8))},
    "marlin": {"B": ("I32", (4, 32)), "s": ("F16", (1, 16)), "workspace": ("I32", (16,))},
    "marlin 2:4": {"B_24": ("I32", (4, 32)), "B_meta": ("I16", (4, 4)), "s": ("F16", (1, 16))},
    "compressed-tensors sparse": {
        "bitmask": ("U8", (8, 1)),
        "compressed": ("BF16", (40,)),
        "row_offsets": ("I64", (8,)),
        "shape": ("I64", (2,)),
    },
    "vptq without norm": {"indices": ("I32", (1, 8, 1)), "centroids.weight": ("F16", (1, 16))},
    "exl2": {"q_weight": ("I32", (4, 8)), "q_scale": ("I32", (1, 1)), "q_scale_max": ("F16", (1,))},
    "exl3": {"trellis": ("I16", (1, 1, 64)), "suh": ("F16", (8,)), "svh": ("F16", (8,))},
    "bitsandbytes nf4": {
        "weight": ("U8", (32, 1)),
        "weight.absmax": ("U8", (1,)),
        "weight.nested_absmax": ("F32", (1,)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
    },
    "bitsandbytes int8": {"weight": ("I8", (8, 8)), "SCB": ("F32", (8,)), "weight_format": ("U8", ())},
    "hqq": {"W_q": ("U8", (4, 8)), "scale": ("F16", (8, 1)), "zero": ("F16", (8, 1))},
    "aqlm": {"codes": ("I8", (8, 1, 1)), "codebooks": ("F16", (1, 256, 1, 8)), "scales": ("F16", (8, 1))},
    "spqr": {"dense_weights": ("I64", (4, 1)), "row_offsets": ("I32", (9,)), "col_vals": ("I32", (3,))},
    "vptq": {"indices": ("I32", (1, 8, 1)), "weight_scale": ("F16", (8,)), "weight_bias": ("F16", (8,))},
    "higgs": {"weight": ("I16", (8, 4)), "scales": ("F16", (8, 1)), "tables": ("F16", (16, 2))},
    "quip": {"Qidxs": ("I64", (8, 1)), "SU": ("F16", (8,)), "SV": ("F16", (8,))},
    "quanto": {"weight._data": ("I8", (8, 8)), "weight._scale": ("BF16", (8, 1)), "input_scale": ("F32", ())},
    "quanto, packed": {"weight._data._data": ("U8", (4, 8)), "weight._scale": ("BF16", (8, 1))},
    "quanto fp8": {"weight._data": (F8, (8, 8)), "weight._scale": ("BF16", (8, 1))},
    "torchao": {"weight_qdata": ("I8", (8, 8)), "weight_scale": ("F32", (8, 1))},
    "eetq": {"weight": ("I8", (8, 8)), "weight_scales": ("F16", (8,))},
    "bitnet": {"weight": ("U8", (2, 8)), "weight_scale": ("BF16", (1,))},
    "mlx": {"weight": ("U32", (8, 1)), "scales": ("F16", (8, 1)), "biases": ("F16", (8, 1))},
    "tensorrt": {"weight": (F8, (8, 8)), "weights_scaling_factor": ("F32", (1,))},
    "integers alone": {"weight": ("I8", (8, 8))},
    "packed to a vector": {"weight": ("U8", (32,)), "weight.absmax": ("F32", (1,))},
}
FORMATS = {kind: {f"{LINEAR}.{name}": of for name, of in parts.items()} for kind, parts in FORMATS.items()}
FORMATS |= {
    "mxfp4": {
        f"{EXPERTS}.gate_up_proj_blocks": ("U8", (2, 4, 1, 16)),
        f"{EXPERTS}.gate_up_proj_bias": ("BF16", (2, 4)),
        f"{EXPERTS}.gate_up_proj_scales": ("U8", (2, 4, 1)),
    },
    "fp8 experts in one": {
        f"{EXPERTS}.gate_up_proj": (F8, (2, 8, 8)),
        f"{EXPERTS}.gate_up_proj_scale_inv": ("F32", (2, 1, 1)),
    },
    "at the top": {"weight": (F8, (8, 8)), "weight_scale": ("F32", ())},
}


def words(model="model", tuned="tuned", base="base"):
    return f"unlearn --model {model} --tuned {tuned} --base {base} --method tv --patch p --out m".split()


def put(tmp_path, tensors, roles=("model", "tuned", "base")):
    for role in roles:
        write_raw(tmp_path / role / "model.safetensors", with_rest(tensors))


@pytest.mark.parametrize("tensors", part(FORMATS.values(), sanitized=12), ids=part(FORMATS, sanitized=12))
def test_codes_are_known_without_a_config(perta, tmp_path, tensors):
    put(tmp_path, tensors)
    before = folder_bytes(tmp_path)
    message = perta(*words(), check=3).stderr
    assert f"tensor {next(iter(tensors))} is " in message and "dequantise the model to BF16 first" in message
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("role", ["model", "tuned", "base"])
def test_each_input_is_looked_at(perta, tmp_path, role):
    plain = {f"{LINEAR}.weight": ("BF16", (8, 8))}
    put(tmp_path, plain, {"model", "tuned", "base"} - {role})
    put(tmp_path, FORMATS["fp8, blocks"], [role])
    message = perta(*words(), check=3).stderr
    assert f"{role}/model.safetensors: tensor {LINEAR}.weight is F8_E4M3, with {LINEAR}.weight_scale_inv" in message


def test_an_adapter_needs_a_plain_model(perta, tmp_path):
    put(tmp_path, FORMATS["bitsandbytes nf4"], ["model"])
    lora = {f"{PREFIX}{LINEAR}.lora_{k}.weight": np.zeros(s, "f4") for k, s in (("A", (4, 8)), ("B", (8, 4)))}
    write_adapter(tmp_path / "adapter", lora)
    assert f"tensor {LINEAR}.weight is U8" in perta(*words(tuned="adapter"), check=3).stderr


CONFIGS = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "of its text": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "compression": {"compression_config": {"format": "pack-quantized"}},
    "without a method": {"quantization_config": {"load_in_4bit": True}},
}


@pytest.mark.parametrize("role", ["model", "tuned", "base"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_says_so(perta, tmp_path, config, role):
    put(tmp_path, {f"{LINEAR}.weight": ("BF16", (8, 8))})
    (tmp_path / role / "config.json").write_text(json.dumps(config))
    message = perta(*words(), check=3).stderr
    key = "compression_config" if "compression_config" in config else "quantization_config"
    assert f'{role}/config.json: "{key}"' in message
    assert "dequantise the model to BF16 first" in message and "remove that key" in message


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_of_its_own_says_so(perta, tmp_path, name):
    put(tmp_path, {f"{LINEAR}.weight": ("BF16", (8, 8))})
    (tmp_path / "tuned" / name).write_text("{}")
    assert f"tuned/{name}: the weights are quantised" in perta(*words(), check=3).stderr


@pytest.mark.parametrize("value", [None, {}, False])
def test_a_config_that_names_none_is_none(perta, tmp_path, value):
    put(tmp_path, {f"{LINEAR}.weight": ("BF16", (8, 8))})
    (tmp_path / "model/config.json").write_text(json.dumps({"quantization_config": value}))
    perta(*words())


PLAIN = {
    "model.embeddings.position_ids": ("I64", (1, 8)),
    "model.norm1.num_batches_tracked": ("I64", ()),
    "model.h.0.attn.bias": ("U8", (1, 1, 8, 8)),
    "model.h.1.attn.bias": ("BOOL", (1, 1, 8, 8)),
    "model.h.1.attn.logit_scale": ("F32", (1,)),
    "model.layers.0.attention.self.relative_position_index": ("I64", (8, 8)),
    "model.layers.0.attention.self.logit_scale": ("F32", (2, 1, 1)),
    "model.layers.0.mlp.router.expert_counts": ("I64", (8,)),
    "model.layers.0.mlp.router.tokens_per_expert": ("I32", (8,)),
    "model.layers.0.mlp.router.indices": ("I64", (8,)),
    "model.layers.0.mlp.router.scale": ("BF16", (8,)),
    "model.layers.0.layer_scalar": ("BF16", (1,)),
    "model.layers.0.attn_mask": ("BOOL", (4, 4)),
    f"{LINEAR}.weight": ("F8_E4M3", (8, 8)),
    "logit_scale": ("F32", ()),
    "vocabulary_index": ("I32", (10, 2)),
}


def test_integers_and_plain_floats_of_8_bits_are_none(perta, tmp_path):
    """They pass through, and the summary says how many."""
    put(tmp_path, PLAIN)
    n = sum(int(np.prod(shape)) for dtype, shape in PLAIN.values() if dtype not in ("BF16", "F32"))
    summary = json.loads(perta(*words(), "--json").stdout)
    assert summary["unedited"]["parameters"] == n
    said = perta(*words(), "--force").stdout
    assert f"unedited: {n} of {summary['unedited']['of']} parameters: " in said
    assert " tensors passed through: not BF16, F16, F32 or F64" in said
    assert "136 in 3 tensors passed through: a buffer" in said


DATA = '{"input_ids": [1, 2, 3]}\n'


def put_llama(tmp_path):
    tensors = FORMATS["fp8, blocks"]
    put(tmp_path, tensors)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 8, "rms_norm_eps": 1e-6}
    for role in ("model", "tuned", "base"):
        (tmp_path / role / "config.json").write_text(json.dumps(config))
    (tmp_path / "d.jsonl").write_text(DATA)


STEPS = "--method signed --steps 2 --data-forget d.jsonl --data-retain d.jsonl --patch p".split()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--model", "model", "--data", "d.jsonl"],
        ["estimate", "--model", "model", "--data", "d.jsonl", "--out", "o"],
        ["unlearn", "--model", "model", "--tuned", "tuned", "--base", "base", *STEPS],
    ],
    ids=lambda command: command[0],
)
def test_what_computes_with_a_model_refuses_it(perta, tmp_path, command):
    put_llama(tmp_path)
    before = folder_bytes(tmp_path)
    assert f"{LINEAR}.weight_scale_inv beside it" in perta(*command, check=3).stderr
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert 'model/config.json: "quantization_config" has quant_method "gptq"' in perta(*command, check=3).stderr
    (tmp_path / "model/config.json").write_bytes(before["model/config.json"])
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("kind", ["fp8, blocks", "gptq", "mxfp4", "bitsandbytes nf4"])
def test_patches_of_quantised_checkpoints_are_exact(perta, tmp_path, kind):
    """diff, apply, verify and inspect move bytes."""
    put(tmp_path, FORMATS[kind], ["old"])
    whole = (tmp_path / "old/model.safetensors").read_bytes()
    at = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/model.safetensors").write_bytes(whole[:at] + rng.bytes(len(whole) - at))
    for role in ("old", "new"):
        (tmp_path / role / "config.json").write_text(json.dumps(CONFIGS["fp8"]))
    perta(*"diff old new --patch p".split())
    perta(*"apply old p --out again".split())
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "new")
    perta(*"revert again p --out back".split())
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "old")
    for command in ("inspect old", "manifest old", "verify p"):
        perta(*command.split())
