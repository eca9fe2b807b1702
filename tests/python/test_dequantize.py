"""perta dequantize: the weights are those that transformers dequantises to, bit for bit."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import needed, part
from llama import shapes_of
from reference import folder_bytes
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

E4M3 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UP = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}
REST = {"model.norm.weight": torch.ones(8).bfloat16(), "model.layers.0.mlp.gate.bias": torch.ones(3)}


def codes_of(rng, *shape):
    """E4M3 of any value except NaN."""
    codes = rng.integers(0, 256, shape, "u1")
    codes[codes & 127 == 127] = 0x80
    return torch.from_numpy(codes).view(E4M3)


def scales_of(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(np.asarray(rng.lognormal(-6, 2, shape), "f4")).to(dtype)


def powers_of(rng, *shape):
    return torch.from_numpy(rng.integers(100, 150, shape, "u1"))


def write(folder, tensors, config, *, dtype="bfloat16", shards=None, **more):
    """A folder with config.json; shards: names in each of several, instead of one."""
    folder.mkdir()
    tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
    quantised = {} if config is None else {"quantization_config": config}
    config = {"architectures": ["X"], "dtype": dtype} | quantised | {"eps": 1e-05} | more
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    if not shards:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(result, expected):
    assert result.keys() == expected.keys()
    for name, t in expected.items():
        assert (result[name].dtype, result[name].shape) == (t.dtype, t.shape), name
        bits = torch.int32 if t.dtype == torch.float32 else torch.int16
        assert torch.equal(result[name].view(bits), t.contiguous().view(bits)), name


def check(perta, tmp_path, tensors, config, expected, dtype="bfloat16"):
    write(tmp_path / "m", tensors | REST, config, dtype=dtype)
    perta("dequantize", "m", "--out", "o")
    same(load_file(tmp_path / "o/model.safetensors"), expected | REST)


def transformers_fp8(codes, scales, dtype):
    return Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)


GRIDS = {
    "whole blocks": ((256, 384), (2, 3)),
    "smaller than a block": ((40, 24), (1, 1)),
    "a chunk and more": ((1280, 1408), (10, 11)),
    "a scale for 32 columns": ((6, 96), (6, 3)),
    "other blocks": ((60, 30), (3, 5)),
    "a scale for a row": ((7, 11), (7, 1)),
    "a scale for a column": ((7, 11), (1, 11)),
    "a scale for each": ((5, 3), (5, 3)),
    "one column": ((300, 1), (300, 1)),
    "one scale": ((9, 5), (1,)),
    "a scalar": ((9, 5), ()),
    "experts in one": ((3, 256, 128), (3, 2, 1)),
    "experts in one, one scale": ((3, 8, 4), (3, 1, 1)),
    "empty": ((0, 5), (0, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRIDS)
def test_fp8_is_transformers(perta, tmp_path, kind, dtype):
    rng = np.random.default_rng(len(kind))
    shape, grid = GRIDS[kind]
    codes, scales = codes_of(rng, *shape), scales_of(rng, *grid)
    if dtype == "float16":  # whose largest number is small
        scales = scales.clamp(max=100)
    name = f"{EXPERTS}.up_proj" if len(shape) > 2 else f"{UP}.weight"
    expected = torch.empty(shape, dtype=DTYPES[dtype])
    if codes.numel():
        expected = transformers_fp8(codes, scales, DTYPES[dtype])
    check(perta, tmp_path, {name: codes, f"{name}_scale_inv": scales}, FP8, {name: expected}, dtype)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu])
def test_scales_of_every_dtype(perta, tmp_path, scale_dtype):
    rng = np.random.default_rng(1)
    codes = codes_of(rng, 6, 96)
    scales = powers_of(rng, 6, 3)
    if scale_dtype == torch.float8_e8m0fnu:
        scales = scales.view(scale_dtype)
    elif scale_dtype != torch.uint8:
        scales = scales_of(rng, 6, 3, dtype=scale_dtype)
    expected = {f"{UP}.weight": transformers_fp8(codes, scales, torch.bfloat16)}
    method = {"quant_method": "mxfp8", "scale_fmt": "ue8m0"}
    check(perta, tmp_path, {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scales}, method, expected)


def test_every_code_with_extreme_scales(perta, tmp_path):
    """Subnormal codes, scales and results, zeros of both signs, and ties."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = torch.tensor([0, 128], dtype=torch.uint8)
    scales = torch.tensor(
        [1e-45, 3e-39, 1.2e-38, 2.0**-126, 0, -0.0, 1, 1.00390625, 1.0078125, -3.3, 1e35, 7.5e35, 2**-9 / 3]
    )
    codes = codes.view(E4M3).repeat(len(scales), 1)
    expected = {f"{UP}.weight": transformers_fp8(codes, scales[:, None], torch.bfloat16)}
    check(perta, tmp_path, {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scales[:, None]}, FP8, expected)


@pytest.mark.parametrize("shape", [(300, 200), (576, 256), (129, 1), (192, 192), (2000, 1030), (2, 200, 130)])
@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_the_last_blocks_may_be_smaller(perta, tmp_path, shape, method):
    """DeepSeek's own dequantisation: blocks of 128 from the first row and column on."""
    rng = np.random.default_rng(2)
    grid = shape[:-2] + tuple(-(-n // 128) for n in shape[-2:])
    codes, scales = codes_of(rng, *shape), scales_of(rng, *grid)
    of_each = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    expected = {f"{UP}.weight": (codes.float() * of_each).bfloat16()}
    blocks = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | {"block_structure": [128, 128]}}}
    config = FP8 if method == "fp8" else COMPRESSED | {"config_groups": blocks}
    scale = "weight_scale_inv" if method == "fp8" else "weight_scale"
    check(perta, tmp_path, {f"{UP}.weight": codes, f"{UP}.{scale}": scales}, config, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(), (1,), (12, 1), (12, 4), (3, 2)], ids=str)
def test_compressed_tensors_multiplies_in_the_scales_dtype(perta, tmp_path, grid, scale_dtype, dtype):
    """compressed_tensors' dequantize() as decompress() calls it; experts as transformers has them."""
    rng = np.random.default_rng(3)
    codes = {name: codes_of(rng, 12, 8) for name in (f"{UP}.weight", f"{EXPERTS}.3.up_proj.weight")}
    scales = {name: scales_of(rng, *grid).clamp(1e-4, 100).to(scale_dtype) for name in codes}
    expected = {}
    for name, c in codes.items():
        s = scales[name]
        if s.ndim == 2:
            s = s.repeat_interleave(12 // s.shape[0], 0).repeat_interleave(8 // s.shape[1], 1)
        product = c.float() * s.float() if ".experts." in name else c.to(scale_dtype) * s
        expected[name] = product.to(DTYPES[dtype])
    tensors = codes | {f"{name}_scale": s for name, s in scales.items()}
    check(perta, tmp_path, tensors, COMPRESSED, expected, dtype)


def test_scales_of_activations_are_left_out(perta, tmp_path):
    rng = np.random.default_rng(4)
    q, one = "model.layers.0.self_attn", torch.tensor(0.5)
    codes = {f"{UP}.weight": codes_of(rng, 4, 4), f"{q}.q_proj.weight": codes_of(rng, 4, 4)}
    tensors = codes | {f"{name}_scale": scales_of(rng, 4, 1) for name in codes}
    gone = {f"{UP}.input_scale": one, f"{UP}.output_scale": one[None], f"{q}.k_scale": one, f"{q}.v_scale": one}
    write(tmp_path / "m", tensors | gone, {"quant_method": "fp8", "activation_scheme": "static"})
    summary = json.loads(perta("dequantize", "m", "--out", "o", "--json").stdout)
    assert (summary["dequantised"], summary["scales"], summary["dropped"]) == (2, 2, 4)
    same(
        load_file(tmp_path / "o/model.safetensors"),
        {name: transformers_fp8(c, tensors[f"{name}_scale"], torch.bfloat16) for name, c in codes.items()},
    )
    assert "left out: 4 scales" in perta("dequantize", "m", "--out", "o2").stdout


@pytest.mark.parametrize(
    "name, scale",
    [
        (f"{UP}.weight", f"{UP}.scale"),
        (f"{UP}.weight", f"{UP}.qscale_weight"),
        (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_scale_inv"),
        ("weight", "weight_scale"),
    ],
)
def test_names_of_scales(perta, tmp_path, name, scale):
    rng = np.random.default_rng(5)
    codes, scales = codes_of(rng, 6, 4), scales_of(rng, 3, 2)
    expected = {name: transformers_fp8(codes, scales, torch.bfloat16)}
    check(perta, tmp_path, {name: codes, scale: scales}, {"quant_method": "fp8"}, expected)


def test_fbgemm_experts_have_a_scale_for_a_column(perta, tmp_path):
    rng = np.random.default_rng(6)
    codes = {f"{EXPERTS}.gate_up_proj": codes_of(rng, 2, 5, 6), f"{UP}.weight": codes_of(rng, 5, 6)}
    scales = {f"{EXPERTS}.gate_up_proj": scales_of(rng, 2, 1, 6), f"{UP}.weight": scales_of(rng, 5, 1)}
    expected = {name: (c.float() * scales[name]).bfloat16() for name, c in codes.items()}
    tensors = codes | {f"{name}_scale": s for name, s in scales.items()}
    check(perta, tmp_path, tensors, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 6, 3), (3, 70, 5), (1, 33, 32), (2, 1200, 20)], ids=str)
def test_mxfp4_is_transformers(perta, tmp_path, shape, dtype):
    rng = np.random.default_rng(7)
    blocks = torch.from_numpy(rng.integers(0, 256, (*shape, 16), "u1"))
    tensors, expected = {}, {}
    for proj, low, high in (("gate_up_proj", 0, 253), ("down_proj", 2, 253)):  # results are normal numbers, or not all
        low, high = (90, 139) if dtype == "float16" else (low, high)
        scales = torch.from_numpy(rng.integers(low, high, shape, "u1"))
        tensors |= {f"{EXPERTS}.{proj}_blocks": blocks, f"{EXPERTS}.{proj}_scales": scales}
        expected[f"{EXPERTS}.{proj}"] = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[dtype])
        tensors[f"{EXPERTS}.{proj}_bias"] = expected[f"{EXPERTS}.{proj}_bias"] = torch.ones(2).bfloat16()
    check(perta, tmp_path, tensors, MXFP4, expected, dtype)


# --- the folder


def put_sharded(folder):
    """Scales in other shards than their codes, and a shard of nothing but scales."""
    rng = np.random.default_rng(8)
    tensors, expected = dict(REST), dict(REST)
    for i in range(4):
        name = f"model.layers.{i}.w.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = codes_of(rng, 1300, 900), scales_of(rng, 11, 8)
        s = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:1300, :900]
        expected[name] = (tensors[name].float() * s).bfloat16()
    names = [f"model.layers.{i}.w.weight" for i in range(4)]
    scales = [f"{name}_scale_inv" for name in names]
    shards = [[names[0], scales[1], scales[0], *REST], scales[2:], names[1:3], names[3:]]
    write(folder, tensors, FP8, shards=shards)
    return expected


def load_folder(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values())
    tensors = {}
    for file in files:
        of_file = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in of_file)
        tensors |= of_file
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    return tensors


def test_shards_index_and_other_files(perta, tmp_path):
    expected = put_sharded(tmp_path / "m")
    (tmp_path / "m/LICENSE").write_text("free")
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "m/consolidated.pth").write_bytes(b"x")
    before = folder_bytes(tmp_path / "m")
    summary = json.loads(perta("dequantize", "m", "--out", "o", "--json").stdout)
    assert folder_bytes(tmp_path / "m") == before
    same(load_folder(tmp_path / "o"), expected)
    assert summary["left_behind"] == ["consolidated.pth"]
    for name in ("LICENSE", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "o" / name).read_bytes() == before[name]
    assert [s["name"] for s in summary["shards"]] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 3, 4)]
    perta("verify", "o", "--manifest", "o.json", check=None)
    old = json.loads(before["config.json"])
    del old["quantization_config"]
    assert json.loads((tmp_path / "o/config.json").read_text()) == old
    assert '"eps": 1e-05' in (tmp_path / "o/config.json").read_text()
    perta(*"diff o o --patch p".split())


def test_the_bytes_depend_on_neither_threads_nor_memory_nor_reading(perta, tmp_path):
    put_sharded(tmp_path / "m")
    least = needed(perta, "dequantize m --out o0".split())
    runs = [["--threads", 1], ["--threads", 3], ["--memory", least], ["--io", "mmap"], ["--io", "pread"]]
    for i, flags in enumerate(part(runs, sanitized=3)):
        perta("dequantize", "m", "--out", f"o{i}", *flags)
        assert folder_bytes(tmp_path / f"o{i}") == folder_bytes(tmp_path / "o0")
    for isa in ("v2", "v3"):
        perta("dequantize", "m", "--out", isa, env={"PERTA_ISA": isa})
        assert folder_bytes(tmp_path / isa) == folder_bytes(tmp_path / "o0")


CONFIG_TEXTS = [
    '{"quantization_config": %s}',
    '{"quantization_config":%s,"a":1}',
    '{"a":1,"quantization_config":%s}',
    '{"a": [1, {"b": 2}], "quantization_config": %s , "c": "x, }", "n": NaN, "i": -Infinity}',
    '{"x": {"quantization_config": null, "y": 1}, "z": {"compression_config": {}}, "quantization_config": %s}',
    '{"text_config": {"a": 1,\n "quantization_config": %s\n}, "b": {}}',
    '\n{"dtype": "bfloat16"\n,\n"quantization_config": %s,\n"quantization_config": %s}\n',
]


def without(tree):
    if not isinstance(tree, dict):
        return tree
    gone = ("quantization_config", "compression_config")
    return {key: without(value) for key, value in tree.items() if key not in gone}


@pytest.mark.parametrize("text", CONFIG_TEXTS)
def test_the_config_loses_one_key(perta, tmp_path, text):
    rng = np.random.default_rng(9)
    write(tmp_path / "m", {"a.weight": codes_of(rng, 4, 4), "a.weight_scale_inv": scales_of(rng, 1, 1)}, None)
    text = text.replace("%s", json.dumps(FP8, indent=1))
    (tmp_path / "m/config.json").write_text(text)
    perta("dequantize", "m", "--out", "o")
    result = json.loads((tmp_path / "o/config.json").read_text())
    assert repr(result) == repr(without(json.loads(text)))


def test_a_file_is_a_model_too(perta, tmp_path):
    rng = np.random.default_rng(10)
    tensors = {"a.weight": codes_of(rng, 4, 4), "a.weight_scale_inv": scales_of(rng, 1, 1)}
    write(tmp_path / "m", tensors, FP8)
    perta("dequantize", "m", "--out", "whole")
    perta("dequantize", "m/model.safetensors", "--out", "o")
    whole = folder_bytes(tmp_path / "whole")
    del whole["tokenizer.json"]
    assert folder_bytes(tmp_path / "o") == whole


def test_nothing_is_written_by_a_dry_run(perta, tmp_path):
    put_sharded(tmp_path / "m")
    assert "dry run: 4 tensors would be dequantised to BF16" in perta("dequantize", "m", "--out", "o", "--dry-run").stdout
    summary = json.loads(perta("dequantize", "m", "--out", "o", "--dry-run", "--json").stdout)
    assert not (tmp_path / "o").exists()
    perta("dequantize", "m", "--out", "o")
    assert summary["model_bytes"] == sum(f.stat().st_size for f in (tmp_path / "o").glob("*.safetensors"))


def test_outputs_are_replaced_by_force_only(perta, tmp_path):
    put_sharded(tmp_path / "m")
    perta("dequantize", "m", "--out", "o")
    first = folder_bytes(tmp_path / "o")
    assert "--force" in perta("dequantize", "m", "--out", "o", check=2).stderr
    perta("dequantize", "m", "--out", "o", "--force")
    assert folder_bytes(tmp_path / "o") == first
    perta("dequantize", "m", "--out", "m", "--force", check=2)
    perta("dequantize", "m", "--out", "m/o", check=2)
    assert "nothing to dequantise" in perta("dequantize", "o", "--out", "again", check=3).stderr


# --- what is refused


def fp8_pair(shape=(4, 4), grid=(1, 1)):
    rng = np.random.default_rng(11)
    return {f"{UP}.weight": codes_of(rng, *shape), f"{UP}.weight_scale_inv": scales_of(rng, *grid)}


def mxfp4_pair(codes=(2, 3, 1, 16), scales=(2, 3, 1)):
    blocks = {f"{EXPERTS}.down_proj_blocks": torch.zeros(codes, dtype=torch.uint8)}
    return blocks | {f"{EXPERTS}.down_proj_scales": torch.zeros(scales, dtype=torch.uint8)}


def only(tensors, end):
    return {name: t for name, t in tensors.items() if name.endswith(end)}


WEIGHT, SCALE = f"tensor {UP}.weight ", f"tensor {UP}.weight_scale_inv "
REFUSED = {
    "a scale is missing": (only(fp8_pair(), ".weight"), FP8, WEIGHT + "is F8_E4M3, but no scale is beside it"),
    "codes are missing": (only(fp8_pair(), "_inv"), FP8, SCALE + "is F32: a scale, or the like, of no tensor"),
    "BF16 with a scale": (
        fp8_pair() | {f"{UP}.weight": torch.ones(4, 4).bfloat16()},
        FP8,
        SCALE + "is F32: a scale, or the like, of no tensor",
    ),
    "a grid that does not divide": (fp8_pair((5, 4), (2, 1)), FP8, WEIGHT + "of shape (5, 4) does not fit"),
    "a grid of nothing": (fp8_pair((4, 4), (0, 1)), FP8, "of shape (0, 1)"),
    "a grid of one dimension": (fp8_pair((4, 4), (4,)), FP8, "of shape (4)"),
    "a grid of three": (fp8_pair((4, 4), (1, 1, 1)), FP8, "of shape (1, 1, 1)"),
    "a vector": (fp8_pair((4,), (1,)), FP8, WEIGHT + "of shape (4) does not fit"),
    "other experts": (fp8_pair((2, 4, 4), (3, 1, 1)), FP8, "(3, 1, 1)"),
    "scales of F64": (
        fp8_pair() | {f"{UP}.weight_scale_inv": torch.ones(1, 1).double()},
        FP8,
        SCALE + "is F64; scales are",
    ),
    "two scales": (fp8_pair() | {f"{UP}.weight_scale": torch.ones(1, 1)}, FP8, WEIGHT + "has two scales"),
    "a zero point": (
        fp8_pair() | {f"{UP}.weight_zero_point": torch.zeros(1, 1)},
        FP8,
        f"tensor {UP}.weight_zero_point is F32: a scale",
    ),
    "scales of activations alone": (
        fp8_pair() | {"other.input_scale": torch.ones(1)},
        FP8,
        "tensor other.input_scale is F32: a scale",
    ),
    "integers beside": (
        fp8_pair() | {"other.qweight": torch.zeros(4, 4, dtype=torch.int32)},
        FP8,
        "tensor other.qweight is I32: the weights are quantised",
    ),
    "FP8 of another kind": (
        fp8_pair() | {"o.weight": torch.zeros(4, 4).to(torch.float8_e5m2), "o.weight_scale": torch.ones(1)},
        FP8,
        "tensor o.weight",
    ),
    "a scale of FP8": (
        fp8_pair() | {f"{UP}.weight_scale_inv": torch.ones(1, 1).to(E4M3)},
        FP8,
        f"{UP}.weight",
    ),
    "nothing quantised": (dict(REST), FP8, 'no tensor is quantised as "quantization_config" says'),
    "FP8 said to be MXFP4": (fp8_pair(), MXFP4, f"tensor {UP}.weight_scale_inv is F32"),
    "MXFP4 said to be FP8": (mxfp4_pair(), FP8, "down_proj"),
    "blocks of another width": (mxfp4_pair((2, 3, 1, 8)), MXFP4, "(2, 3, 1, 8) does not fit"),
    "scales of another shape": (mxfp4_pair(scales=(2, 1, 3)), MXFP4, "(2, 1, 3)"),
    "blocks without scales": (only(mxfp4_pair(), "_blocks"), MXFP4, "down_proj_blocks is U8, but no scale"),
    "scales without blocks": (only(mxfp4_pair(), "_scales"), MXFP4, "down_proj_scales is U8: a scale"),
    "scales of F32": (
        mxfp4_pair() | {f"{EXPERTS}.down_proj_scales": torch.ones(2, 3, 1)},
        MXFP4,
        "is F32; scales of MXFP4 are U8",
    ),
    "the name is taken": (
        mxfp4_pair() | {f"{EXPERTS}.down_proj": torch.ones(2)},
        MXFP4,
        f"tensor {EXPERTS}.down_proj is in",
    ),
}


def refuse(perta, tmp_path, message):
    before = folder_bytes(tmp_path)
    said = perta("dequantize", "m", "--out", "o", check=3).stderr
    assert message in said, said
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("tensors, config, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(perta, tmp_path, tensors, config, message):
    write(tmp_path / "m", tensors, config)
    refuse(perta, tmp_path, message)


def groups(**weights):
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}}}


BLOCKS = {"targets": [], "weights": WEIGHTS | {"block_structure": [128, 128]}}
UNKNOWN = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, 'has quant_method "gptq"; perta dequantises fp8'),
    "no method": ({"bits": 4}, "has quant_method missing"),
    "a method that is no word": ({"quant_method": 8}, "has quant_method 8"),
    "a block of one number": (FP8 | {"weight_block_size": [128]}, "has weight_block_size [128]"),
    "a block of nothing": (FP8 | {"weight_block_size": [0, 128]}, "has weight_block_size [0,128]"),
    "a block of words": (FP8 | {"weight_block_size": "big"}, 'has weight_block_size "big"'),
    "packed": (COMPRESSED | {"format": "pack-quantized"}, 'has format "pack-quantized"'),
    "no format": ({k: v for k, v in COMPRESSED.items() if k != "format"}, "has format missing"),
    "int8": (groups(type="int"), "has weights {"),
    "4 bits": (groups(num_bits=4), "has weights {"),
    "not symmetric": (groups(symmetric=False), "has weights {"),
    "no groups": (COMPRESSED | {"config_groups": {}}, "has config_groups {}"),
    "sparse": (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "has sparsity_config"),
    "rotated": (COMPRESSED | {"transform_config": {"config_groups": {"u": {}}}}, "has transform_config"),
    "two kinds of blocks": (
        COMPRESSED | {"config_groups": {"a": BLOCKS, "b": groups(block_structure=[64, 64])["config_groups"]["group_0"]}},
        "has another block_structure [64,64]",
    ),
}


@pytest.mark.parametrize("config, message", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_methods_are_refused(perta, tmp_path, config, message):
    write(tmp_path / "m", fp8_pair(), config)
    refuse(perta, tmp_path, f'm/config.json: "quantization_config" {message}')


def test_a_dtype_of_no_model_is_refused(perta, tmp_path):
    write(tmp_path / "m", fp8_pair(), FP8, dtype="int8")
    refuse(perta, tmp_path, 'm/config.json: "dtype" int8; weights are dequantised to bfloat16')


def test_a_config_that_cannot_be_cut_is_refused_before_the_work(perta, tmp_path):
    write(tmp_path / "m", fp8_pair(), FP8)
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace("quantization_config", "quantization\\u005fconfig"))
    refuse(perta, tmp_path, 'm/config.json: "quantization_config" cannot be cut out of it')
    perta("dequantize", "m", "--out", "o", "--dry-run", check=3)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_another_tools_file_is_refused(perta, tmp_path, name):
    write(tmp_path / "m", fp8_pair(), FP8)
    (tmp_path / "m" / name).write_text("{}")
    refuse(perta, tmp_path, name)


def test_without_a_config_it_is_refused(perta, tmp_path):
    write(tmp_path / "m", fp8_pair(), None)
    refuse(perta, tmp_path, "weight_scale_inv beside it: the weights are quantised")
    (tmp_path / "m/config.json").unlink()
    refuse(perta, tmp_path, "weight_scale_inv beside it: the weights are quantised")


@pytest.mark.parametrize("at", [0, 3 * 1700 + 5, 1299 * 1700 + 1699])
def test_numbers_that_are_not_finite_are_named(perta, tmp_path, at):
    """A NaN among the codes, a scale that is none, and a product that overflows."""
    pair = fp8_pair((1300, 1700), (11, 14))
    weight, scale = pair[f"{UP}.weight"], pair[f"{UP}.weight_scale_inv"]
    weight.view(torch.uint8).fill_(8)
    row, col = at // 1700 // 128, at % 1700 // 128
    weight.view(torch.uint8).flatten()[at] = 0xFF
    write(tmp_path / "m", pair, FP8)
    refuse(perta, tmp_path, f"tensor {UP}.weight, element {at}: not a finite number\n")
    weight.view(torch.uint8).flatten()[at] = 0x78
    scale[row, col] = 3e37
    save_file(pair, tmp_path / "m/model.safetensors")
    refuse(perta, tmp_path, f"tensor {UP}.weight, element {at}: not a finite number once it is dequantised to BF16")
    for value in (float("nan"), float("-inf")):
        scale[row, col] = value
        save_file(pair, tmp_path / "m/model.safetensors")
        refuse(perta, tmp_path, f"tensor {UP}.weight_scale_inv, element {row * 14 + col}: not a finite number\n")


def test_scales_of_mxfp4_that_are_not_finite_are_named(perta, tmp_path):
    pair = mxfp4_pair((2, 40, 3, 16), (2, 40, 3))
    blocks, scales = pair[f"{EXPERTS}.down_proj_blocks"], pair[f"{EXPERTS}.down_proj_scales"]
    scales[1, 37, 2] = 255
    write(tmp_path / "m", pair, MXFP4)
    refuse(perta, tmp_path, f"{EXPERTS}.down_proj_scales, element {(40 + 37) * 3 + 2}: not a finite number")
    scales[1, 37, 2] = 254
    save_file(pair, tmp_path / "m/model.safetensors")
    perta("dequantize", "m", "--out", "fits")
    blocks[1, 37, 2, 5] = 0x70
    save_file(pair, tmp_path / "m/model.safetensors")
    elem = (96 + 64 + 11) * 40 + 37
    refuse(perta, tmp_path, f"{EXPERTS}.down_proj, element {elem}: not a finite number once it is dequantised to BF16")


def test_damaged_files_are_refused(perta, tmp_path):
    write(tmp_path / "m", fp8_pair(), FP8)
    whole = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(whole[:-1])
    perta("dequantize", "m", "--out", "o", check=3)
    (tmp_path / "m/model.safetensors").write_bytes(whole)
    (tmp_path / "m/config.json").write_text("{")
    perta("dequantize", "m", "--out", "o", check=3)
    assert os.listdir(tmp_path) == ["m"]


def test_wrong_arguments(perta, tmp_path):
    write(tmp_path / "m", fp8_pair(), FP8)
    assert "--out DIR is missing" in perta("dequantize", "m", check=2).stderr
    assert "give the folder of a model" in perta("dequantize", "--out", "o", check=2).stderr
    perta("dequantize", "m", "m", "--out", "o", check=2)
    perta("dequantize", "m", "--out", "", check=2)
    assert "nowhere" in perta("dequantize", "nowhere", "--out", "o", check=3).stderr
    assert re.search(r"--memory .*needs \d+M", perta("dequantize", "m", "--out", "o", "--memory", "1M", check=2).stderr)


# --- read as it is

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def put_llama(tmp_path, dtype="bfloat16", block=32, **sizes):
    """A model of FP8 in square blocks, "m", and data."""
    rng = np.random.default_rng(12)
    config, tensors = LLAMA | sizes, {}
    for name, shape in shapes_of(config).items():
        w = torch.from_numpy(rng.standard_normal(shape, "f4"))
        if "layers" in name and len(shape) == 2:
            tensors[f"{name}_scale_inv"] = torch.rand(*(-(-n // block) for n in shape)) * 0.1
            tensors[name] = w.to(E4M3)
        else:
            tensors[name] = (1 + w / 10 if len(shape) == 1 else w / 10).to(DTYPES[dtype])
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    write(tmp_path / "m", tensors, None, dtype=dtype)
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"dtype": dtype}))
    lines = [{"input_ids": rng.integers(0, 70, n).tolist()} for n in (5, 2, 30, 17)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))


READERS = {
    "estimate": "estimate --model {} --data d.jsonl --stat mean,meansq --out {}-out",
    "eval": "eval --model {} --data d.jsonl --json",
    "eval as it is served": "eval --model {} --data d.jsonl --quantize int8 --gradient-norm --json",
    "tune": "tune --model {} --data d.jsonl --steps 3 --target-modules all-linear --out {}-out",
}


def result_of(perta, tmp_path, words, model, *flags):
    """The tensors that were written, and the summary without what varies."""
    said = perta(*words.format(model, model).split(), *flags).stdout
    out = tmp_path / f"{model}-out"
    files = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.safetensors"))}
    shutil.rmtree(out, ignore_errors=True)
    summary = json.loads(said) if "--json" in words else {}
    return files, {key: value for key, value in summary.items() if key not in VARYING}


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_a_note_says_so(perta, tmp_path, words):
    put_llama(tmp_path)
    result = json.loads(perta(*words.format("m", "m").split(), *([] if "--json" in words else ["--json"])).stdout)
    assert "m: 21 tensors are quantised; they are dequantised as they are read" in result["notes"]


VARYING = ("seconds", "read_bytes", "model", "notes")


@pytest.mark.parametrize("dtype", part(DTYPES, plain=2, sanitized=1))
@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_weights_are_dequantised_as_they_are_read(perta, tmp_path, words, dtype):
    put_llama(tmp_path, dtype=dtype)
    perta("dequantize", "m", "--out", "plain")
    expected = result_of(perta, tmp_path, words, "plain")
    assert expected[0] or expected[1]
    assert result_of(perta, tmp_path, words, "m") == expected
    for flags in part((["--io", "pread"], ["--io", "mmap", "--threads", "1"]), sanitized=1):
        assert result_of(perta, tmp_path, words, "m", *flags) == expected


def test_large_tensors_are_dequantised_in_pieces(perta, tmp_path):
    """More than 2^22 elements, in blocks that divide neither rows nor columns."""
    put_llama(tmp_path, block=100, hidden_size=512, intermediate_size=8400, num_hidden_layers=1)
    perta("dequantize", "m", "--out", "plain")
    expected = result_of(perta, tmp_path, READERS["eval"], "plain")
    least = needed(perta, READERS["eval"].format("m").split())
    for flags in (["--memory", least], ["--io", "direct"], ["--io", "mmap"], ["--io", "pread"]):
        assert result_of(perta, tmp_path, READERS["eval"], "m", *flags) == expected


QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 12,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}


def put_mixture(tmp_path, together):
    """Experts in FP8 with blocks of 16: in tensors of their own, or all in one."""
    put_llama(tmp_path)
    rng = np.random.default_rng(14)
    tensors = load_file(tmp_path / "m/model.safetensors")
    shutil.rmtree(tmp_path / "m")
    kept = {name: t for name, t in tensors.items() if ".mlp." not in name and ".layers.2." not in name}
    for layer in ("model.layers.0", "model.layers.1"):
        kept |= {f"{layer}.self_attn.{k}_norm.weight": torch.ones(12).bfloat16() for k in "qk"}
        kept[f"{layer}.mlp.gate.weight"] = torch.from_numpy(rng.standard_normal((4, 48), "f4")).bfloat16()
        experts = [(f"experts.{e}.{p}_proj.weight", (40, 48)) for e in range(4) for p in ("gate", "up")]
        experts += [(f"experts.{e}.down_proj.weight", (48, 40)) for e in range(4)]
        if together:
            experts = [("experts.gate_up_proj", (4, 80, 48)), ("experts.down_proj", (4, 48, 40))]
        for name, shape in experts:
            grid = shape[:-2] + tuple(-(-n // 16) for n in shape[-2:])
            kept[f"{layer}.mlp.{name}"] = torch.from_numpy(rng.standard_normal(shape, "f4")).to(E4M3)
            kept[f"{layer}.mlp.{name}_scale_inv"] = scales_of(rng, *grid).clamp(max=0.1)
    write(tmp_path / "m", kept, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    config = json.loads((tmp_path / "m/config.json").read_text()) | QWEN3_MOE
    (tmp_path / "m/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("reader", ["estimate", "eval"])
def test_experts_are_dequantised_as_they_are_read(perta, tmp_path, reader, together):
    put_mixture(tmp_path, together)
    perta("dequantize", "m", "--out", "plain")
    expected = result_of(perta, tmp_path, READERS[reader], "plain")
    assert expected[0] or expected[1]
    assert result_of(perta, tmp_path, READERS[reader], "m") == expected


def test_memory_is_counted(perta, tmp_path):
    put_llama(tmp_path)
    perta("dequantize", "m", "--out", "plain")
    words = READERS["estimate"]
    least = needed(perta, words.format("m", "m").split())
    assert result_of(perta, tmp_path, words, "m", "--memory", least) == result_of(perta, tmp_path, words, "plain")


def test_an_importance_fits_the_dequantised_model(perta, tmp_path):
    """From codes to a patch, with scales in a shard of their own."""
    put_llama(tmp_path)
    tensors = load_file(tmp_path / "m/model.safetensors")
    config = (tmp_path / "m/config.json").read_bytes()
    shutil.rmtree(tmp_path / "m")
    names = [name for name in tensors if not name.endswith("_inv")]
    shards = [names[:9], [name for name in tensors if name.endswith("_inv")], names[9:]]
    write(tmp_path / "m", tensors, None, shards=shards)
    (tmp_path / "m/config.json").write_bytes(config)
    (tmp_path / "r.jsonl").write_text('{"input_ids": [7, 8, 9]}')
    for data in "dr":
        perta(*f"estimate --model m --data {data}.jsonl --out {data}".split())
    perta("dequantize", "m", "--out", "plain")
    perta(*"tune --model m --data d.jsonl --steps 2 --target-modules all-linear --out adapter".split())
    perta(*"unlearn --model plain --tuned adapter --forget d/mean --retain r/mean --patch p".split())
    counts = json.loads((tmp_path / "p/manifest.json").read_text())["counts"]
    assert counts["parameters"] == sum(t.numel() for name, t in tensors.items() if name in names)
    assert counts["changed"] > 0


def test_tied_copies_that_are_codes_are_refused(perta, tmp_path):
    """They are compared as they are stored."""
    put_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "m/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.ones(70, 48).to(E4M3)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "m/model.safetensors")
    said = perta("eval", "--model", "m", "--data", "d.jsonl", check=3).stderr
    assert "m: tensors model.embed_tokens.weight and lm_head.weight are tied, and quantised twice" in said
    del tensors["lm_head.weight"], tensors["lm_head.weight_scale_inv"]
    save_file(tensors, tmp_path / "m/model.safetensors")
    perta("eval", "--model", "m", "--data", "d.jsonl")


def test_what_reads_it_names_numbers_that_are_not_finite(perta, tmp_path):
    put_llama(tmp_path)
    tensors = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, tmp_path / "m/model.safetensors")
    said = perta("eval", "--model", "m", "--data", "d.jsonl", check=3).stderr
    assert f"m/model.safetensors: tensor {name}, element {3 * 80 + 5}: not a finite number" in said


def test_edits_need_the_dequantised_model(perta, tmp_path):
    put_llama(tmp_path)
    perta("dequantize", "m", "--out", "plain")
    perta(*"diff plain plain --patch p".split())
    (tmp_path / "r.jsonl").write_text('{"input_ids": [7, 8, 9]}')
    steps = "unlearn --model m --box 0.1 --steps 1 --patch q --data-forget d.jsonl --data-retain r.jsonl"
    for words in (
        "eval --model m --data d.jsonl --patch p",
        "tune --model m --data d.jsonl --steps 1 --patch p --out o",
        "unlearn --model m --tuned m --base m --method tv --patch q",
        steps,
    ):
        said = perta(*words.split(), check=3).stderr
        assert "m/config.json: " in said and "(perta dequantize MODEL --out DIR)" in said, said
    assert not (tmp_path / "q").exists()


def test_inspect_says_what_it_is(perta, tmp_path):
    put_llama(tmp_path)
    said = perta("inspect", "m").stdout
    assert "quantised: fp8, 21 tensors; `perta dequantize m --out DIR'" in said
    assert "can be estimated and tuned; edits refuse it: m/config.json: " in said
    assert json.loads(perta("inspect", "m", "--json").stdout)["quantised"] == {"method": "fp8", "tensors": 21}
    write(tmp_path / "g", fp8_pair(), {"quant_method": "gptq"})
    quantised = json.loads(perta("inspect", "g", "--json").stdout)["quantised"]
    assert quantised["method"] == "gptq" and "has quant_method" in quantised["why"]
    assert "cannot dequantise it" in perta("inspect", "g").stdout
    perta("dequantize", "m", "--out", "plain")
    assert "quantised" not in json.loads(perta("inspect", "plain", "--json").stdout)


def put_gpt_oss(tmp_path):
    """A GptOss of MXFP4, "m", and data."""
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "full")
    rng = np.random.default_rng(13)
    tensors = {}
    for name, t in load_file(tmp_path / "full/model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, n_in, n_out = t.shape
            shape = (experts, n_out, n_in // 32)
            tensors[f"{name}_blocks"] = torch.from_numpy(rng.integers(0, 256, (*shape, 16), "u1"))
            tensors[f"{name}_scales"] = torch.from_numpy(rng.integers(118, 124, shape, "u1"))
        else:
            tensors[name] = t
    write(tmp_path / "m", tensors, None)
    text = json.loads((tmp_path / "full/config.json").read_text()) | {"quantization_config": MXFP4}
    (tmp_path / "m/config.json").write_text(json.dumps(text))
    lines = [{"input_ids": rng.integers(0, 50, n).tolist()} for n in (5, 2, 30, 17)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_from_pretrained_gives_the_same(perta, tmp_path):
    """transformers' own loader, on codes and on what perta writes."""
    put_gpt_oss(tmp_path)
    perta("dequantize", "m", "--out", "o")
    how = {"dtype": "auto", "output_loading_info": True}
    codes, _ = GptOssForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=Mxfp4Config(dequantize=True), **how
    )
    ours, info = GptOssForCausalLM.from_pretrained(tmp_path / "o", **how)
    assert not any(info.values()), info
    same(ours.state_dict(), codes.state_dict())


@pytest.mark.parametrize("reader", ["estimate", "eval"])
def test_experts_of_mxfp4_are_dequantised_as_they_are_read(perta, tmp_path, reader):
    put_gpt_oss(tmp_path)
    perta("dequantize", "m", "--out", "plain")
    expected = result_of(perta, tmp_path, READERS[reader], "plain")
    assert expected[0] or expected[1]
    assert result_of(perta, tmp_path, READERS[reader], "m") == expected
    least = needed(perta, READERS[reader].format("m", "m").split())
    assert result_of(perta, tmp_path, READERS[reader], "m", "--memory", least, "--io", "pread") == expected
