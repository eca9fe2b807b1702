"""Mixtures of experts: memory, bytes, and what verbs make of tensors that have no gradient."""

import json
import subprocess

import pytest
from conftest import PERTA, SANITIZED, needed
from llama import write_noise

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
from families import make_model, outputs, samples, write_lines
from family_configs import FAMILIES
from rounding import FORMATS
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)

LARGE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 768,
    "num_experts": 184,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def shapes_of(c):
    """Of the tensors of a Qwen3-MoE, without MLPs."""
    H, inner, D = c["hidden_size"], c["moe_intermediate_size"], c["head_dim"]
    Q, K = D * c["num_attention_heads"], D * c["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], H], "model.norm.weight": [H]}
    for layer in range(c["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        shapes |= {
            of + f"self_attn.{x}_proj.weight": [n, H] for x, n in (("q", Q), ("k", K), ("v", K))
        }
        shapes |= {
            of + "self_attn.o_proj.weight": [H, Q],
            of + "mlp.gate.weight": [c["num_experts"], H],
        }
        shapes |= {of + f"self_attn.{x}_norm.weight": [D] for x in "qk"}
        shapes |= {of + f"{x}_layernorm.weight": [H] for x in ("input", "post_attention")}
        for e in range(c["num_experts"]):
            shapes |= {of + f"mlp.experts.{e}.{x}_proj.weight": [inner, H] for x in ("gate", "up")}
            shapes[of + f"mlp.experts.{e}.down_proj.weight"] = [H, inner]
    return shapes


VERBS = {
    "estimate": "estimate --model model --data data.jsonl --out out --stat mean,meansq",
    "eval": "eval --model model --data data.jsonl --generate 3",
    "tune": "tune --model model --data data.jsonl --out out --steps 2 --batch-size 2",
}


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_of_four_times_the_memory_runs_under_a_hard_limit(perta, tmp_path, verb):
    layer = write_noise(tmp_path / "model", LARGE, shapes_of(LARGE))
    write_lines(tmp_path / "data.jsonl", samples(512))
    words = VERBS[verb].split()
    budget = layer // 4 >> 20
    assert int(needed(perta, [*words, "--threads", "2"])[:-1]) <= budget
    limited = [*words, "--memory", f"{budget}M", "--threads", "2", "--json"]
    command = ["prlimit", f"--data={(budget + 64) << 20}", str(PERTA), *limited]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)
    (tmp_path / "model/model.safetensors").unlink()


def qwen3_moe_with(key, value):
    """The family, and which of its configurations has that."""
    found = (i for i, how in enumerate(FAMILIES["qwen3_moe"]) if how.get(key) == value)
    return "qwen3_moe", next(found)


FUSED = qwen3_moe_with("_layout", "fused")
MIXTURES = {
    "all tokens on one expert": qwen3_moe_with("_router", "one"),
    "an expert without tokens": qwen3_moe_with("_router", "none"),
    "three dimensions": FUSED,
    "a shared expert with a gate": ("qwen2_moe", 0),
    "norms after": ("flex_olmo", 0),
    "inputs scaled, dense layers": ("ernie4_5_moe", 0),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_bytes_do_not_depend_on_memory_threads_and_io(perta, tmp_path, kind):
    """With 2G, activations stay in memory; with the least, those of so many lines are in files."""
    family, i = MIXTURES[kind]
    make_model(tmp_path / "model", family, FAMILIES[family][i])
    write_lines(tmp_path / "data.jsonl", samples(61) * 600)
    words = "estimate --model model --data data.jsonl --out imp --stat mean,meansq".split()
    least = needed(perta, words)
    _, want = outputs(PERTA, tmp_path, "--memory", "2G", "--threads", 1)
    for flags in (["--threads", 3, "--io", "pread"], ["--threads", 2, "--io", "mmap"]):
        summary, have = outputs(PERTA, tmp_path, "--memory", least, *flags)
        assert have == want, flags
        assert summary["scratch_bytes"] > 0 and summary["batches"] > 1


# --- tensors without a gradient


def edit(perta, *flags, check=0):
    words = "unlearn --model model --tuned model --base base --retain imp/mean --patch p --force --json".split()
    return perta(*words, "--forget", "imp/mean", *flags, check=check)


@pytest.mark.parametrize(
    "family, i, extra", [("glm4_moe", 3, "model.layers.2."), ("ernie4_5_moe", 2, "mtp_")]
)
def test_what_has_no_importance_is_kept(perta, tmp_path, family, i, extra):
    """What predicts further tokens has none; the corrections of routers' scores have zeros."""
    make_model(tmp_path / "model", family, FAMILIES[family][i])
    make_model(tmp_path / "base", family, FAMILIES[family][i] | {"_seed": 6})
    write_lines(tmp_path / "data.jsonl", samples(61))
    perta(*"estimate --model model --data data.jsonl --out imp --stat mean".split())
    have = load_file(tmp_path / "imp/mean/model.safetensors")
    names = load_file(tmp_path / "model/model.safetensors").keys()
    left_out = {name for name in names if extra in name}
    assert left_out and not left_out & have.keys()
    corrections = {name for name in names if "e_score_correction_bias" in name}
    assert corrections and not any(have[name].count_nonzero() for name in corrections)
    assert "--missing" in edit(perta, check=3).stderr
    edit(perta, "--missing", "keep")
    perta(*"apply model p --out after".split())
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "after")
    )
    assert all(torch.equal(before[name], after[name]) for name in left_out | corrections)
    assert any(not torch.equal(before[name], after[name]) for name in names)


# --- rounded


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family, i", [("qwen2_moe", 0), ("mixtral", 0), FUSED])
def test_experts_are_rounded_and_routers_are_not(perta, tmp_path, family, i, form):
    """As in a checkpoint whose matrices were rounded before."""
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    how = FAMILIES[family][i] | {"intermediate_size": 32}
    make_model(tmp_path / "model", family, how | {key: n for key, n in sizes.items() if key in how})
    write_lines(tmp_path / "data.jsonl", samples(61))
    words = "eval --data data.jsonl --compute f32 --json --model".split()
    plain = json.loads(perta(*words, "model").stdout)
    have = json.loads(perta(*words, "model", "--quantize", form).stdout)
    tensors = load_file(tmp_path / "model/model.safetensors")
    n = 0
    for name, x in tensors.items():
        if x.ndim == 1 or "embed_tokens" in name or "lm_head" in name or "gate.weight" in name:
            continue
        for matrix in x if x.ndim == 3 else [x]:
            matrix[:] = torch.from_numpy(FORMATS[form](matrix.numpy()))
        n += x.numel()
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    want = json.loads(perta(*words, "model").stdout)
    assert have["rounded_parameters"] == n
    assert have["loss"] == want["loss"] != plain["loss"]


def test_experts_that_are_stored_transposed_are_not_rounded(perta, tmp_path):
    make_model(tmp_path / "model", "gpt_oss", FAMILIES["gpt_oss"][0])
    write_lines(tmp_path / "data.jsonl", samples(61))
    message = perta(*"eval --model model --data data.jsonl --quantize nf4".split(), check=3).stderr
    assert "model.layers.0.mlp.experts.gate_up_proj is stored transposed" in message
