"""`perta estimate` compared with PyTorch: the loss and every gradient, for every architecture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, PERTA, SANITIZED, in_a_larger_process, needed
from llama import write_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 301
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, scaled positions": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear positions": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, wide heads": ("Llama", {"head_dim": 24}),
    "llama, every head its own": ("Llama", {"num_key_value_heads": 8}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, a window in the second block": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 9}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    "olmo": ("Olmo", {"clip_qkv": 0.8}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 0.4, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    ),
}
IN_BF16 = {n: m for n, m in MODELS.items() if LONG or n in ("llama, wide heads", "qwen3")}
LENGTHS = (2, 3, 17, 66, 1 + 64, 130)


def samples():
    """Samples of different lengths; the first third of each is not learned, like a question."""
    generator = torch.Generator().manual_seed(1)
    for n in LENGTHS:
        ids = torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3 :]}


def make_model(folder, family, changes, dtype=torch.float32):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def loss_of(model, sample):
    ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
    return model(input_ids=ids, labels=labels).loss


def gradients(model, lines=None, loss_of=loss_of):
    """The mean loss, and the mean and mean square of each sample's gradient, in float64."""
    lines = list(lines or samples())
    loss, mean, meansq = 0.0, {}, {}
    for line in lines:
        model.zero_grad()
        one = loss_of(model, line)
        one.backward()
        loss += one.item() / len(lines)
        for name, parameter in model.named_parameters():
            g = parameter.grad.double()
            mean[name] = mean.get(name, 0) + g / len(lines)
            meansq[name] = meansq.get(name, 0) + g * g / len(lines)
    return loss, mean, meansq


def read(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).double() for name in file.keys()}
            assert file.metadata()["perta.stat"] == folder.name
            assert file.metadata()["perta.samples"] == str(len(LENGTHS))
    return tensors


def write_data(path, repeat=1):
    text = "".join(json.dumps(sample) + "\n" for sample in samples())
    path.write_text(text * repeat)


def estimate(perta, *flags):
    words = "estimate --model model --data data.jsonl --out imp --stat mean,meansq --json".split()
    return json.loads(perta(*words, *flags).stdout)


def assert_close(have, want, relative, cosine):
    assert have.keys() == want.keys()
    for name, g in want.items():
        error = (have[name] - g).norm() / g.norm()
        assert error <= relative, f"{name}: {error}"
        assert torch.cosine_similarity(have[name].ravel(), g.ravel(), 0) >= cosine, name


@pytest.mark.parametrize("family, changes", MODELS.values(), ids=MODELS.keys())
def test_loss_and_gradients_are_pytorchs(perta, tmp_path, family, changes):
    loss, mean, meansq = gradients(make_model(tmp_path / "model", family, changes))
    write_data(tmp_path / "data.jsonl")
    summary = estimate(perta, "--compute", "f32")
    assert abs(summary["loss"] - loss) < 1e-5
    assert_close(read(tmp_path / "imp/mean"), mean, relative=1e-4, cosine=0.99999)
    assert_close(read(tmp_path / "imp/meansq"), meansq, relative=1e-4, cosine=0.99999)


def test_attention_that_has_made_up_its_mind(perta, tmp_path):
    """Weights as large as F16 can hold: one weight in a row of attention is nearly 1, and the
    gradient of its scores is nearly or exactly 0. It is about as close to float64 as
    PyTorch's float32 is."""
    make_model(tmp_path / "model", "Llama", {})
    kind = transformers.LlamaForCausalLM
    model = kind.from_pretrained(tmp_path / "model")
    for name, parameter in model.named_parameters():
        parameter.data.mul_(1 if "norm" in name else 3000)
    model.half().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    write_data(tmp_path / "data.jsonl")
    exact, single = (
        kind.from_pretrained(tmp_path / "model", attn_implementation="eager", dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    (loss, mean, _), (_, nearly, _) = gradients(exact), gradients(single)
    assert estimate(perta, "--compute", "f32")["loss"] == pytest.approx(loss, rel=1e-6)
    have = read(tmp_path / "imp/mean")
    for name, g in mean.items():
        allowed = 10 * (nearly[name] - g).norm() + 1e-5 * g.norm()
        assert (have[name] - g).norm() <= allowed, name


needs_avx512 = pytest.mark.skipif(
    "avx512bw" not in Path("/proc/cpuinfo").read_text(), reason="no AVX-512"
)


@pytest.mark.parametrize("compute", ["f32", pytest.param("bf16", marks=needs_avx512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_weights_of_every_dtype(perta, tmp_path, dtype, compute):
    """The reference in float32, on the weights after rounding."""
    loss, mean, _ = gradients(make_model(tmp_path / "model", "Qwen3", {"head_dim": 16}, dtype))
    write_data(tmp_path / "data.jsonl")
    summary = estimate(perta, "--compute", compute)
    exact = compute == "f32"
    assert abs(summary["loss"] - loss) < (1e-5 if exact else 2e-3)
    relative, cosine = (1e-4, 0.99999) if exact else (0.03, 0.999)
    assert_close(read(tmp_path / "imp/mean"), mean, relative, cosine)


@needs_avx512
@pytest.mark.parametrize("family, changes", IN_BF16.values(), ids=IN_BF16.keys())
def test_bf16_products_stay_near(perta, tmp_path, family, changes):
    """Measured over all models: within 1.4 % of each mean gradient's norm and 2.4 % of each mean
    square's. About twice that is allowed."""
    loss, mean, meansq = gradients(make_model(tmp_path / "model", family, changes))
    write_data(tmp_path / "data.jsonl")
    summary = estimate(perta, "--compute", "bf16")
    assert abs(summary["loss"] - loss) < 2e-3
    assert_close(read(tmp_path / "imp/mean"), mean, relative=0.03, cosine=0.999)
    assert_close(read(tmp_path / "imp/meansq"), meansq, relative=0.06, cosine=0.998)


GOOD = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([GOOD, "{"], "line 2: "),
        ([GOOD, GOOD, [1]], "line 3: a JSON array"),
        ([{"labels": [1]}], 'line 1: no array "input_ids"'),
        ([{"input_ids": []}], 'line 1: no array "input_ids"'),
        ([{"input_ids": [1, -2]}], "line 1: "),
        ([{"input_ids": [1, 2.5]}], "line 1: "),
        ([{"input_ids": [1, VOCABULARY]}], f"token id {VOCABULARY}, but the vocabulary has"),
        ([{"input_ids": [1, 2], "labels": [1]}], 'line 1: "labels" is not as long'),
        ([{"input_ids": [1, 2], "labels": [1, -7]}], "line 1: "),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "line 1: no label"),
        ([{"input_ids": [1]}], "line 1: no label"),
        ([{"input_ids": list(range(1, 60))}], "line 1: 59 tokens, --max-tokens allows 50"),
        ([], "no samples"),
    ],
)
def test_bad_data_is_named_by_its_line(perta, tmp_path, lines, message):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "data.jsonl").write_text("\n".join(text))
    words = "estimate --model model --data data.jsonl --out imp --max-tokens 50".split()
    assert message in perta(*words, check=3).stderr
    assert not list(tmp_path.glob("imp*/*"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["Llama5ForCausalLM"]}, "The nearest name there is LlamaForCausalLM. "),
        ({"architectures": None, "model_type": None}, "(none named) is not supported; `perta help families' lists those that are"),
        ({"architectures": None, "model_type": "llama_5"}, "llama_5 is not supported; `perta help families' lists those that are"),
        ({"architectures": ["MistralForCausalLM"]}, '"model_type" llama is not that of MistralForCausalLM'),
        ({"model_type": "gemma"}, '"model_type" gemma is not that of LlamaForCausalLM'),
        ({"layer_types": ["linear"]}, '"layer_types" 0'),
        ({"hidden_act": "mish"}, 'hidden_act "mish" is not supported'),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.1."),
        ({"hidden_size": 32}, "has not the shape"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, '"axial" is not supported'),
        ({"vocab_size": "many"}, '"vocab_size"'),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_what_cannot_be_computed_is_refused(perta, tmp_path, change, message):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_data(tmp_path / "data.jsonl")
    words = "estimate --model model --data data.jsonl --out imp".split()
    assert message in perta(*words, check=3).stderr
    assert not (tmp_path / "imp").exists() or not list((tmp_path / "imp").iterdir())


def test_too_little_memory_is_said_with_what_is_enough(perta, tmp_path):
    make_model(tmp_path / "model", "Llama", {})
    write_data(tmp_path / "data.jsonl")
    words = "estimate --model model --data data.jsonl --out imp".split()
    perta(*words, "--memory", needed(perta, words, "20M"), **in_a_larger_process())


# --- a model larger than memory

MIB = 1 << 20
BIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
@pytest.mark.parametrize("compute", ["f32", "auto"])
def test_a_model_four_times_larger_than_memory(tmp_path, compute):
    """Under a hard limit on the address space, and by measured peak memory, everything included."""
    budget = 146
    assert write_llama(tmp_path / "model", BIG) > 4 * budget * MIB
    ids = [{"input_ids": list(range(n, n + 30))} for n in range(1, 5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ids)))
    words = f"estimate --model model --data data.jsonl --out imp --memory {budget}M"
    limit = f"--as={(budget + 64) * MIB}"
    command = ["prlimit", limit, str(PERTA), *words.split(), "--io", "direct", "--compute", compute]
    helper = (
        "import resource, subprocess, sys;"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # a small child: peaks are inherited over fork
    run = [sys.executable, "-c", helper, *command]
    output = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True).stdout
    assert int(output) / 1024 <= budget
    (tmp_path / "model/model.safetensors").unlink()
