"""LoRAs of a mixture's experts, by PEFT's target_parameters and as transformers makes them of
"all-linear": as a task vector, and in effect."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from families import make_model, on_disk, reference, samples, write_lines
from family_configs import FAMILIES
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)

FUSED = next(i for i, how in enumerate(FAMILIES["qwen3_moe"]) if how.get("_layout") == "fused")
# Experts in tensors of their own, under both names; in three dimensions as in memory, and stored as
# (in, out). What files call the routers differs as well.
KINDS = {
    "qwen3_moe": ("qwen3_moe", 0),
    "three dimensions": ("qwen3_moe", FUSED),
    "mixtral": ("mixtral", 0),
    "qwen2_moe": ("qwen2_moe", 0),
    "dense layers": ("ernie4_5_moe", 0),
    "gpt_oss": ("gpt_oss", 0),
}
TARGETS = {
    "gate_up": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "both": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "r": 3,
        "use_rslora": True,
    },
    "patterns": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r".*\.gate_up_proj": 11},
    },
    "all-linear": {"target_modules": "all-linear"},
}


def load(folder):
    by = transformers.AutoModelForCausalLM
    model = by.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    return model


def make(tmp_path, kind):
    family, i = KINDS[kind]
    how = FAMILIES[family][i]
    make_model(tmp_path / "model", family, how)
    lines = samples(61)
    write_lines(tmp_path / "data.jsonl", lines)
    return how, lines


def tune(tmp_path, **config):
    """An adapter all of whose parameters changed; the model with it."""
    keys = {
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "o_proj"],
    }
    model = peft.get_peft_model(load(tmp_path / "model"), peft.LoraConfig(**keys | config))
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_task_vector_is_pefts(perta, tmp_path, kind, target):
    how, _ = make(tmp_path, kind)
    merged = tune(tmp_path, **TARGETS[target]).merge_and_unload()
    want = on_disk(merged, how, dict(merged.state_dict()))
    perta(
        *"unlearn --model model --tuned adapter --method tv --alpha=-1 --patch patch --out after".split()
    )
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "after")
    )
    changed = 0
    for name, x in before.items():
        change = want[name] - x if name in want else torch.zeros_like(x)
        assert (after[name] - x - change).abs().max() <= 2e-6 * max(1, x.abs().max()), name
        changed += bool(change.count_nonzero()) and ("experts" in name or target == "all-linear")
    assert changed


@pytest.mark.parametrize("target", ["patterns", "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_pefts(perta, tmp_path, kind, target):
    how, lines = make(tmp_path, kind)
    merged = tune(tmp_path, **TARGETS[target]).merge_and_unload().requires_grad_(True)
    loss, mean, _ = reference(merged, how, lines)
    words = "--model model --adapter adapter --data data.jsonl --compute f32 --json".split()
    seen = json.loads(perta("eval", *words, "--per-sample").stdout)["per_sample"]
    assert abs(sum(item["loss"] for item in seen) / len(lines) - loss) <= 1e-5 * max(1, loss)
    perta("estimate", *words, *"--out imp --stat mean".split())
    have = load_file(tmp_path / "imp/mean/model.safetensors")
    for name, g in mean.items():
        assert (have[name].double() - g).norm() <= 1e-4 * g.norm() + 1e-7, name


def refused(perta, tmp_path, *words):
    message = perta(*words, check=3).stderr
    assert not (tmp_path / "out").exists()
    return message


def change_adapter(tmp_path, change):
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


UNLEARN = "unlearn --model model --tuned adapter --method tv --alpha 1 --patch out".split()
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def test_what_does_not_fit_is_refused_by_name(perta, tmp_path):
    make(tmp_path, "mixtral")
    tune(tmp_path, **TARGETS["down"])
    name = EXPERTS + ".lora_A.weight"
    change_adapter(tmp_path, lambda t: t.update({name: t[name][:-1].contiguous()}))
    assert f"{name} and" in refused(perta, tmp_path, *UNLEARN)
    change_adapter(tmp_path, lambda t: t.update({name: torch.zeros(16, 13)}))
    message = refused(perta, tmp_path, *UNLEARN)
    assert name in message and "no experts" in message
    change_adapter(tmp_path, lambda t: t.pop(name))
    assert "no matching lora_A" in refused(perta, tmp_path, *UNLEARN)


def test_another_rank_than_the_configs_is_refused(perta, tmp_path):
    make(tmp_path, "qwen3_moe")
    tune(tmp_path, **TARGETS["down"])
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rank_pattern": {"experts.down_proj": 3}}))
    message = refused(perta, tmp_path, *UNLEARN)
    assert "experts.down_proj has 8 experts, and its rank is 3" in message


def test_an_expert_of_another_shape_is_refused(perta, tmp_path):
    """It has as many elements, but rows that B does not."""
    make(tmp_path, "mixtral")
    tune(tmp_path, **TARGETS["down"])
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert tensors[name].shape[0] != tensors[name].shape[1]
    save_file(tensors | {name: tensors[name].T.contiguous()}, path, {"format": "pt"})
    assert "different shapes" in refused(perta, tmp_path, *UNLEARN)


def test_a_number_that_is_not_finite_is_named(perta, tmp_path):
    make(tmp_path, "three dimensions")
    tune(tmp_path, **TARGETS["down"])

    def spoil(tensors):
        tensors[EXPERTS + ".lora_B.weight"][3, 5] = torch.nan

    change_adapter(tmp_path, spoil)
    for words in (UNLEARN, "eval --model model --adapter adapter --data data.jsonl".split()):
        message = refused(perta, tmp_path, *words)
        assert EXPERTS + ".lora_B.weight, element 101" in message


def test_tune_does_not_train_experts(perta, tmp_path):
    make(tmp_path, "qwen3_moe")
    tune(tmp_path, **TARGETS["down"])
    message = refused(
        perta, tmp_path, *"tune --model model --adapter adapter --data data.jsonl --out out".split()
    )
    assert "experts, which are not trained" in message
