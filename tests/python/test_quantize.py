"""`--quantize`: weights rounded to the formats in which models are served. The formats, bit for bit,
are those of rounding.py; a model that is rounded while it is read gives the numbers of a checkpoint
that NumPy rounded."""

import ctypes
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import PERTA, SANITIZED, needed, part
from llama import shapes_of
from rounding import FORMATS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from verbs import EAGER, stop_at

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


def test_neither_threads_nor_memory_nor_reading_change_the_numbers(perta, tmp_path):
    """And rounding needs no memory of its own."""
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl", n=12)
    plain = "eval --model model --data data.jsonl".split()
    words = [*plain, "--quantize", "nf4"]
    little = needed(perta, words, "20M")
    assert little == needed(perta, plain, "20M")
    little = f"{int(little[:-1]) + (100 if SANITIZED else 0)}M"
    runs = []
    for threads, memory, io in ((1, "2G", "pread"), (3, little, "mmap"), (2, little, "direct"), (2, "1G", "auto")):  # fmt: skip
        flags = ["--threads", threads, "--memory", memory, "--io", io]
        runs.append(evaluate(perta, "--model", "model", "--quantize", "nf4", *flags)["per_sample"])
    for isa in ("v2", "v3"):
        runs.append(json.loads(perta(*words, "--json", "--per-sample", env={"PERTA_ISA": isa}).stdout)["per_sample"])  # fmt: skip
    assert all(run == runs[0] for run in runs)


# ---- estimate and tune ----


def tensors_of(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys() and a
    return all(a[file][name].tobytes() == x.tobytes() for file in b for name, x in b[file].items())


@pytest.mark.parametrize("name", part(FORMATS, sanitized=1))
def test_gradients_are_those_at_the_rounded_weights(perta, tmp_path, name):
    tensors = write_model(tmp_path / "model")
    write_tensors(tmp_path / "rounded", rounded(tensors, name))
    write_data(tmp_path / "data.jsonl")
    words = "estimate --data data.jsonl --stat mean,meansq --json".split()
    have = json.loads(perta(*words, "--model", "model", "--quantize", name, "--out", "a").stdout)
    want = json.loads(perta(*words, "--model", "rounded", "--out", "b").stdout)
    assert have["loss"] == want["loss"] and have["quantize"] == name
    for stat in ("mean", "meansq"):
        assert same_tensors(tmp_path / "a" / stat, tmp_path / "b" / stat)
        for folder, format in (("a", name), ("b", None)):
            path = next((tmp_path / folder / stat).glob("*.safetensors"))
            with safe_open(path, "np") as file:
                assert file.metadata().get("perta.quantize") == format
    sides = "--tuned rounded --base model --forget a/mean --retain b/mean --patch p --json".split()
    perta("unlearn", "--model", "model", *sides)
    recipe = json.loads((tmp_path / "p/manifest.json").read_text())["recipe"]
    assert recipe["forget_quantize"] == name and "retain_quantize" not in recipe


def test_a_run_at_other_weights_is_not_continued(perta, tmp_path):
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    words = "estimate --model model --data data.jsonl --out".split()
    nf4 = ["--quantize", "nf4"]
    assert stop_at(tmp_path, [*words, "imp", *nf4], "commit", 3)[0]
    for other in (["--quantize", "fp8"], []):
        refusal = perta(*words, "imp", *other, "--resume", check=2).stderr
        assert "--resume cannot continue: quantize" in refusal
    perta(*words, "imp", *nf4, "--resume", env=EAGER)
    perta(*words, "whole", *nf4)
    assert same_tensors(tmp_path / "imp/mean", tmp_path / "whole/mean")


def test_an_adapter_is_trained_beside_rounded_weights(perta, tmp_path):
    tensors = write_model(tmp_path / "model")
    write_tensors(tmp_path / "rounded", rounded(tensors, "nf4"))
    write_data(tmp_path / "data.jsonl")
    words = "tune --data data.jsonl --steps 3 --learning-rate 1e-2 --target-modules all-linear --json".split()  # fmt: skip
    have = json.loads(perta(*words, "--model", "model", "--quantize", "nf4", "--out", "a").stdout)
    want = json.loads(perta(*words, "--model", "rounded", "--out", "b").stdout)
    assert have["updates"] == want["updates"]
    assert have["recipe"] == want["recipe"] | {"quantize": "nf4"}
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    have = evaluate(perta, "--model", "model", "--quantize", "nf4", "--adapter", "a")
    assert same_but_for_rounding(have, evaluate(perta, "--model", "rounded", "--adapter", "a"), "nf4")  # fmt: skip


# ---- what is refused ----


def one_bad(tmp_path, value, dtype=BF16):
    tensors = write_model(tmp_path / "model", dtype)
    tensors["model.layers.1.mlp.up_proj.weight"][100, 7] = value
    shutil.rmtree(tmp_path / "model")
    write_tensors(tmp_path / "model", tensors)
    write_data(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", part(FORMATS, sanitized=1))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(perta, tmp_path, name, value):
    one_bad(tmp_path, value)
    words = f"eval --model model --data data.jsonl --quantize {name}".split()
    message = perta(*words, check=3).stderr
    assert ".safetensors: tensor model.layers.1.mlp.up_proj.weight, element 9607: not a finite number\n" in message  # fmt: skip


def test_a_weight_that_the_format_cannot_hold_is_named(perta, tmp_path):
    """bitsandbytes takes float16."""
    one_bad(tmp_path, 1e5)
    words = "estimate --model model --data data.jsonl --out imp --quantize int8".split()
    message = perta(*words, check=3).stderr
    assert "up_proj.weight, element 9607: not a finite number once it is rounded to int8" in message
    assert not (tmp_path / "imp/mean").exists()


def test_rows_that_are_not_whole_blocks_are_refused_with_q4_0(perta, tmp_path):
    sizes = SIZES | {"intermediate_size": 100}
    tensors = write_model(tmp_path / "model", sizes=sizes)
    write_data(tmp_path / "data.jsonl")
    words = "eval --model model --data data.jsonl --json --quantize".split()
    message = perta(*words, "q4_0", check=3).stderr
    assert "model: tensor model.layers.0.mlp.down_proj.weight: its rows of 100 elements are not whole blocks of q4_0 (32 elements)" in message  # fmt: skip
    write_tensors(tmp_path / "rounded", rounded(tensors, "int4"), sizes)
    want = perta("eval", "--model", "rounded", *words[3:-1]).stdout
    assert json.loads(perta(*words, "int4").stdout)["loss"] == json.loads(want)["loss"]


def test_other_names_are_refused(perta, tmp_path):
    message = perta(*"eval --model m --data d --quantize nf3".split(), check=2).stderr
    assert "--quantize: nf3 is not one of nf4, int8, int4, q4_0, fp8" in message
