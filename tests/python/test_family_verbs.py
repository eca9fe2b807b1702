"""Verbs other than estimate and eval, on families other than Llama's: adapters beside PEFT, `tune`,
steps and `eval --patch`."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from families import make_model, samples, write_lines
from family_configs import FAMILIES
from safetensors.torch import load_file
from test_families import is_not_yet
from test_tune import ALL, compare, load, loss_of

torch.set_num_threads(1)

# Beside a dense one: a mixture with experts apart and one with experts in three dimensions, a model with soft caps and
# two norms more, one with fused tensors, MLA, and one with linears stored as (in, out).
KINDS = ["qwen3", "qwen3_moe", "mixtral", "gpt_oss", "gemma2", "phi3", "deepseek_v3", "gpt2"]
EVAL = "eval --data data.jsonl --compute f32 --json".split()


@pytest.fixture(params=KINDS)
def family(request):
    if is_not_yet(request.param, 0):
        pytest.skip("not yet")
    return request.param


def model_of(tmp_path, family):
    make_model(tmp_path / "model", family, FAMILIES[family][0])
    lines = samples(61) + samples(61, longest=17, seed=2)[1:]
    write_lines(tmp_path / "data.jsonl", lines)
    return lines


def loss_by(perta, *flags):
    return json.loads(perta(*EVAL, *flags).stdout)["loss"]


@torch.no_grad()
def mean_loss(model, lines):
    return sum(loss_of(model, [line]).item() for line in lines) / len(lines)


def test_tune_is_pefts(perta, tmp_path, family):
    model_of(tmp_path, family)
    compare(perta, tmp_path, ALL, ["--learning-rate", 1e-3], size=3, rate=1e-3)


def adapter_of(tmp_path, **config):
    """One by PEFT, all of whose parameters changed; the model with it."""
    keys = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load(tmp_path / "model"), peft.LoraConfig(**keys | config))
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def test_an_adapter_is_pefts(perta, tmp_path, family):
    lines = model_of(tmp_path, family)
    want = mean_loss(adapter_of(tmp_path, target_modules="all-linear"), lines)
    plain = loss_by(perta, "--model", "model")
    assert abs(loss_by(perta, "--model", "model", "--adapter", "adapter") - want) <= 1e-5 < abs(plain - want)


@pytest.mark.parametrize("mixture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("where", ["gate_up_proj", "down_proj"])
def test_an_adapter_of_experts_is_pefts(perta, tmp_path, mixture, where):
    """target_parameters: one factor for all experts of a layer, over tensors in three dimensions."""
    if is_not_yet(mixture, 0):
        pytest.skip("not yet")
    lines = model_of(tmp_path, mixture)
    config = {"target_modules": ["q_proj", "q_b_proj"], "target_parameters": [f"mlp.experts.{where}"]}
    want = mean_loss(adapter_of(tmp_path, **config), lines)
    plain = loss_by(perta, "--model", "model")
    assert abs(loss_by(perta, "--model", "model", "--adapter", "adapter") - want) <= 1e-5 < abs(plain - want)


def test_steps_lead_to_a_model_that_transformers_loads(perta, tmp_path, family):
    """eval --patch, eval of the model that apply writes, and transformers say the same; the forget
    set has become less likely; and every matrix that had a gradient has moved."""
    lines = model_of(tmp_path, family)
    write_lines(tmp_path / "forget.jsonl", lines[:2])
    write_lines(tmp_path / "retain.jsonl", lines[2:])
    words = "unlearn --model model --data-forget forget.jsonl --data-retain retain.jsonl --patch patch"
    perta(*words.split(), *"--method signed --steps 3 --compute f32 --json".split())
    perta(*"apply model patch --out after".split())
    have = loss_by(perta, "--model", "model", "--patch", "patch")
    assert have == loss_by(perta, "--model", "after")
    assert abs(have - mean_loss(load(tmp_path / "after"), lines)) <= 1e-5 * max(1, have)
    forgotten = [loss_by(perta, "--model", folder, "--data", "forget.jsonl") for folder in ("model", "after")]
    assert forgotten[1] > forgotten[0]
    perta(*"estimate --model model --data forget.jsonl --out imp --stat meansq --compute f32".split())
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "after"))
    seen = load_file(tmp_path / "imp/meansq/model.safetensors")
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    still = {n for n, g in seen.items() if g.ndim > 1 and "bias" not in n and g.count_nonzero()} - moved
    assert moved and not still
