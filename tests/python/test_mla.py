"""Models with latent attention beyond loss and gradients (test_families.py): adapters of `perta
tune` beside PEFT, what `perta unlearn` makes of them, and steps."""

import json

import pytest
from conftest import PERTA

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from families import FAMILIES, loss_of, make_model, run, samples, write_lines
from safetensors.torch import load_file

torch.set_num_threads(1)

PLAIN = "q_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
LATENT = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
# A family, the number of its configuration, and the linears of its attention. With layers of
# multi-token prediction in the files: deepseek_v3 4.
CASES = [("deepseek_v3", 4, LATENT), ("deepseek_v2", 1, PLAIN), ("glm4_moe_lite", 0, LATENT)]


def make(tmp_path, family, i):
    how = FAMILIES[family][i]
    model = make_model(tmp_path / "model", family, how)
    lines = samples(how["vocab_size"])
    write_lines(tmp_path / "forget.jsonl", lines[:2])
    write_lines(tmp_path / "retain.jsonl", lines[2:])
    write_lines(tmp_path / "data.jsonl", lines)
    return model, lines


def tune(tmp_path, modules, *more):
    words = f"tune --model model --data data.jsonl --rank 4 --epochs 4 --batch-size 2 --learning-rate 0.02 --compute f32 --target-modules {modules}"
    return run(PERTA, tmp_path, *words.split(), *more)


def loss(tmp_path, *more):
    words = "eval --model model --data data.jsonl --json --per-sample --compute f32"
    found = json.loads(run(PERTA, tmp_path, *words.split(), *more).stdout)["per_sample"]
    return sum(item["loss"] for item in found) / len(found)


@pytest.mark.parametrize("family, i, modules", CASES)
def test_adapters_are_pefts(tmp_path, family, i, modules):
    model, lines = make(tmp_path, family, i)
    tune(tmp_path, modules, "--out", "lora", "--threads", 1)
    tune(tmp_path, modules, "--out", "again", "--threads", 2)
    name = "adapter_model.safetensors"
    assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    before = loss(tmp_path)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    with torch.no_grad():
        want = sum(loss_of(tuned, line).item() for line in lines) / len(lines)
    assert want < before - 0.5
    assert loss(tmp_path, "--adapter", "lora") == pytest.approx(want, abs=1e-5)
    words = "unlearn --model model --base model --tuned lora --method tv --alpha=-1 --patch patch"
    run(PERTA, tmp_path, *words.split())
    assert loss(tmp_path, "--patch", "patch") == pytest.approx(want, abs=1e-5)


def test_all_linear_is_what_peft_finds_again(tmp_path):
    """Not the shared expert's gate_proj, which PEFT would take for that of the experts."""
    make(tmp_path, "deepseek_v3", 0)
    tune(tmp_path, "all-linear", "--out", "lora")
    said = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert set(said) == set(LATENT.split(","))
    words = "tune --model model --data data.jsonl --out other --target-modules gate_proj"
    refused = run(PERTA, tmp_path, *words.split(), check=False)
    assert (
        refused.returncode == 2 and "gate_proj: the layers of model have no such" in refused.stderr
    )


REFUSED = [
    ("deepseek_v2", 0, "topk_method", "noaux_tc", "is neither greedy nor group_limited_greedy"),
    ("deepseek_v2", 0, "scoring_func", "sigmoid", "nothing else is supported"),
    ("deepseek_v2", 0, "num_key_value_heads", 2, "have keys of their own"),
    ("deepseek_v2", 0, "num_experts_per_tok", None, "is null"),
    ("deepseek_v2", 0, "n_shared_experts", None, "is null"),
    ("deepseek_v2", 0, "moe_layer_freq", 2, "nothing else is supported"),
    ("deepseek_v2", 0, "qk_rope_head_dim", 5, "5 is odd"),
    ("deepseek_v3", 0, "topk_method", "greedy", "nothing else is supported"),
    ("deepseek_v3", 0, "scoring_func", "softmax", "nothing else is supported"),
    ("deepseek_v3", 0, "head_dim", 8, "is not"),
    ("deepseek_v3", 0, "q_lora_rank", 0, "is not a whole number from 1"),
    ("deepseek_v3", 0, "first_k_dense_replace", None, "is null"),
    (
        "deepseek_v3",
        0,
        "rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0},
        "is only supported with yarn",
    ),
    ("glm4_moe_lite", 0, "mlp_layer_types", ["dense", "none"], "neither dense nor sparse"),
    ("glm4_moe_lite", 0, "mlp_layer_types", ["dense"], "is not a list of a kind for each layer"),
    ("glm4_moe_lite", 0, "head_dim", 4, "is not"),
]


@pytest.mark.parametrize("family, i, key, value, why", REFUSED)
def test_what_is_not_computed_is_refused(tmp_path, family, i, key, value, why):
    make(tmp_path, family, i)
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    words = "eval --model model --data data.jsonl"
    refused = run(PERTA, tmp_path, *words.split(), check=False)
    named = "mscale_all_dim" if key == "rope_parameters" else key
    assert refused.returncode == 3 and why in refused.stderr and named in refused.stderr


@pytest.mark.parametrize("family, i, modules", CASES)
def test_edits(tmp_path, family, i, modules):
    """By importance, and in steps: what was tuned in is edited, everything else stays as it is,
    and threads change nothing."""
    make(tmp_path, family, i)
    tune(tmp_path, modules, "--out", "lora")
    common = "unlearn --model model --base model --tuned lora --force --patch patch"
    for name in ("forget", "retain"):
        words = f"estimate --model model --data {name}.jsonl --out {name} --stat mean --compute f32"
        run(PERTA, tmp_path, *words.split())
    edits = {
        "edited": "--forget forget/mean --retain retain/mean --alpha 0.5",
        "stepped": "--data-forget forget.jsonl --data-retain retain.jsonl --steps 2 --compute f32",
    }
    (path,) = (tmp_path / "model").glob("*.safetensors")
    before = load_file(path)
    for name, words in edits.items():
        made = []
        for threads in (1, 2):
            run(
                PERTA,
                tmp_path,
                *common.split(),
                *words.split(),
                "--out",
                name,
                "--threads",
                threads,
            )
            made.append((tmp_path / name / path.name).read_bytes())
        assert made[0] == made[1]
        after = load_file(tmp_path / name / path.name)
        moved = {key for key, x in before.items() if not torch.equal(x, after[key])}
        assert before.keys() == after.keys()
        assert {key.split(".")[-2] for key in moved} == set(modules.split(","))
