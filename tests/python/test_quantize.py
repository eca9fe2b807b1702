"""`--quantize`: weights rounded to the formats in which models are served. The formats, bit for bit,
are those of rounding.py; a model that is rounded while it is read gives the numbers of a checkpoint
that NumPy rounded."""

import ctypes
import json

import ml_dtypes
import numpy as np
import pytest
from conftest import PERTA, SANITIZED
from llama import shapes_of
from rounding import FORMATS
from safetensors.numpy import save_file

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F32": F32, "F16": F16, "BF16": BF16}


def evaluate(perta, *flags):
    words = ["eval", "--data", "data.jsonl", "--json", "--per-sample", *flags]
    summary = json.loads(perta(*words).stdout)
    return {key: value for key, value in summary.items() if key not in ("seconds", "read_bytes")}


# ---- the formats ----


def library():
    path = PERTA.parent / "libperta.so"
    if SANITIZED or not path.exists():
        pytest.skip("needs the plain build's library")
    lib = ctypes.CDLL(str(path))
    lib.perta_round.restype = ctypes.c_size_t
    lib.perta_round.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p] + [ctypes.c_size_t] * 2
    lib.perta_rounding_name.restype = lib.perta_dtype_name.restype = ctypes.c_char_p
    return lib


def numbers_of(function, n):
    """The values of an enum, by name."""
    return {function(i).decode(): i for i in range(n)}


def kinds(shape, rng):
    """Weights; numbers between two codes; many zeros, and rows of them; of one sign; tiny; of very
    different sizes."""
    normal = rng.standard_normal(shape)
    yield normal * 0.05
    yield rng.integers(-15, 16, shape) / 15
    yield np.where(rng.random(shape) < 0.5, 0, normal) * (np.arange(shape[0])[:, None] % 3 > 0)
    yield abs(normal)
    yield normal * 1e-6
    yield normal * 2.0 ** rng.integers(-10, 11, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_numpys_bit_for_bit(name, dtype):
    lib = library()
    number = numbers_of(lib.perta_rounding_name, 6)[name]
    of_dtype = numbers_of(lib.perta_dtype_name, 20)[dtype]
    rng = np.random.default_rng(7)
    for shape in ((7, 64), (5, 576), (3, 1536), (4, 200), (3, 33), (2, 2500), (6, 2048)):
        for x in kinds(shape, rng) if name != "q4_0" or shape[1] % 32 == 0 else ():
            w = x.astype(DTYPES[dtype])
            want = FORMATS[name](w)
            assert lib.perta_round(number, of_dtype, w.ctypes.data, *shape) == w.size
            assert w.tobytes() == want.tobytes(), shape


# ---- eval ----

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def is_rounded(name):
    return any(f".{module}.weight" in name for module in LINEAR)


def write_model(folder, dtype=BF16, sizes=SIZES, seed=0):
    """Tensors are written to two shards; weights of linear modules have a few large ones."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes_of(sizes).items():
        x = rng.standard_normal(shape) * 0.08
        x *= np.where(rng.random(shape) < 0.01, 6, 1)
        tensors[name] = (x if len(shape) == 2 else 1 + x).astype(dtype)
    write_tensors(folder, tensors, sizes)
    return tensors


def write_tensors(folder, tensors, sizes=SIZES):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    names = sorted(tensors)
    where = {name: f"model-{1 + i * 2 // len(names):05}-of-00002.safetensors" for i, name in enumerate(names)}  # fmt: skip
    for shard in sorted(set(where.values())):
        save_file({n: tensors[n] for n in names if where[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def rounded(tensors, name):
    return {n: FORMATS[name](x) if is_rounded(n) else x for n, x in tensors.items()}


def write_data(path, n=6):
    rng = np.random.default_rng(3)
    lines = [{"input_ids": rng.integers(0, 301, 9 + 7 * i).tolist()} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def same_but_for_rounding(have, want, name):
    """have is of --quantize, want of a checkpoint that is rounded already."""
    have = dict(have)
    assert have.pop("quantize") == name
    assert have.pop("rounded_parameters") == 2 * (96 * 96 * 2 + 96 * 32 * 2 + 96 * 224 * 3)
    assert "quantize" not in want
    return have == want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_eval_is_that_of_a_checkpoint_that_numpy_rounded(perta, tmp_path, name, dtype):
    tensors = write_model(tmp_path / "model", DTYPES[dtype])
    write_tensors(tmp_path / "rounded", rounded(tensors, name))
    write_data(tmp_path / "data.jsonl")
    have = evaluate(perta, "--model", "model", "--quantize", name)
    assert same_but_for_rounding(have, evaluate(perta, "--model", "rounded"), name)
    assert have["loss"] != evaluate(perta, "--model", "model")["loss"]


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_comes_after_the_patch(perta, tmp_path, name):
    tensors = write_model(tmp_path / "model")
    rng = np.random.default_rng(5)
    tuned = {n: (x + 0.03 * rng.standard_normal(x.shape)).astype(x.dtype) for n, x in tensors.items()}  # fmt: skip
    write_tensors(tmp_path / "tuned", tuned)
    write_tensors(tmp_path / "rounded", rounded(tuned, name))
    write_data(tmp_path / "data.jsonl")
    perta("diff", "model", "tuned", "--patch", "patch")
    have = evaluate(perta, "--model", "model", "--patch", "patch", "--quantize", name)
    assert same_but_for_rounding(have, evaluate(perta, "--model", "rounded"), name)
