"""`perta unlearn --steps --survive`: points of the path under other conditions, beside the commands
that do the same one by one, and gradients beside PyTorch's."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import SANITIZED, part
from llama import write_llama
from reference import random_weight, shuffled
from rounding import FORMATS
from test_box import BOX, make_model
from test_eval import evaluate, write_lines
from test_limits import peak_mib
from test_resume import contents
from test_same_bytes import settings
from test_steps import HOLD, STEPS, make_folders, tensors_of
from test_steps_lora import LORA
from test_steps_lora import make as make_lora
from verbs import LLAMA, stop_at

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

SURVIVE = ["--stop-probability", "1e-9", "--survive", "reteach"]
TAUGHT = (
    "--rank 8 --lora-alpha 16 --target-modules all-linear --learning-rate 1e-2 --lr-scheduler constant "
    "--max-grad-norm 0 --steps 5 --batch-size 1000000"
).split()


def parts(samples, k):
    """docs/steps.md: what is taught again at point k, and the rest."""
    n = len(samples)
    order, size = shuffled(n, 0, k), max(1, n // 4)
    return [samples[i] for i in sorted(order[:size])], [samples[i] for i in sorted(order[size:])]


def more_lines(tmp_path, lines, n=9):
    """A forget set of which a quarter is more than one sample."""
    generator = torch.Generator().manual_seed(11)
    lines["forget"] = [
        {"input_ids": torch.randint(0, 150, (5 + 2 * i,), generator=generator).tolist()} for i in range(n)
    ]
    write_lines(tmp_path / "forget.jsonl", lines["forget"])


def taught(perta, tmp_path, model, lines, k):
    """The probability of the rest after a part is taught by hand; the adapter's folder."""
    some, rest = parts(lines["forget"], k)
    write_lines(tmp_path / f"some-{k}.jsonl", some)
    write_lines(tmp_path / f"rest-{k}.jsonl", rest)
    adapter = f"adapter-{k}"
    perta(*f"tune --model {model} --data some-{k}.jsonl --out {adapter} --compute f32".split(), *TAUGHT, "--seed", k)
    words = f"eval --model {model} --adapter {adapter} --data rest-{k}.jsonl --compute f32 --json"
    return json.loads(perta(*words.split()).stdout)["probability"], adapter


def learned(perta, model, adapter, k):
    """The probability of what was taught."""
    words = f"eval --model {model} --adapter {adapter} --data some-{k}.jsonl --compute f32 --json"
    return json.loads(perta(*words.split()).stdout)["probability"]


def changed(perta, tmp_path, model, k, condition):
    """The probability with half of the edit taken back, or rounded; the model's folder."""
    folder = tmp_path / f"{condition}-{k}"
    shutil.copytree(tmp_path / model, folder)
    full, out = tensors_of(tmp_path / "full"), tensors_of(folder)
    for name, x in full.items():
        if condition == "drop":
            taken_back = random_weight(k, name, tuple(x.shape), np.float32) < 0.5
            out[name] = torch.where(torch.tensor(taken_back), x, out[name])
        elif "proj" in name:
            out[name] = torch.tensor(FORMATS[condition](out[name].numpy()))
    for path in folder.glob("*.safetensors"):
        save_file({name: out[name] for name in load_file(path)}, path, {"format": "pt"})
    words = f"eval --model {folder.name} --data forget.jsonl --compute f32 --json"
    return json.loads(perta(*words.split()).stdout)["probability"], folder.name


def with_adapter(theta, adapter):
    factors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in factors.items():
            if ".lora_A." in name:
                b = factors[name.replace("lora_A", "lora_B")]
                key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                theta[key] += 2 * b.double() @ a.double()


def gradients_of(tmp_path, model, samples, adapter=None, by_probability=True):
    """Of the model's own weights, at the model with the adapter beside it: of minus the mean
    probability of the samples, or of their loss."""
    at = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / model, dtype=torch.float64)
    theta = dict(at.named_parameters())
    if adapter:
        with_adapter(theta, tmp_path / adapter)
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        loss = at(input_ids=ids, labels=ids).loss
        ((-torch.exp(-loss) if by_probability else loss) / len(samples)).backward()
    return {name: p.grad for name, p in theta.items()}


@pytest.mark.parametrize("condition", ["nf4", "int4", "drop", "reteach"])
def test_points_are_those_of_other_commands_and_gradients_are_pytorchs(perta, tmp_path, condition):
    """Step by step: the probability bit for bit; a scale moves as the signs there say, wherever these
    are certain in float32."""
    lines = make_folders(tmp_path)
    more_lines(tmp_path, lines)
    full, tuned, base = (tensors_of(tmp_path / name) for name in ("full", "tuned", "base"))
    paths, models = [], []
    for k in (1, 2, 3):
        words = [*STEPS, k, *SURVIVE[:-1], condition, "--method", "signed", "--patch", f"patch-{k}"]
        summary = json.loads(perta(*words, "--out", f"out-{k}", check=1).stdout)
        paths.append(summary["path"])
        models.append(tensors_of(tmp_path / f"out-{k}"))
    assert paths[0] == paths[2][:2] and paths[1] == paths[2][:3]
    models.insert(0, full)
    for k, model in ((0, "full"), (1, "out-1"), (2, "out-2")):
        if condition != "reteach":
            probability, folder = changed(perta, tmp_path, model, k, condition)
            at = (folder, lines["forget"])
        else:
            probability, adapter = taught(perta, tmp_path, model, lines, k)
            at = (model, parts(lines["forget"], k)[1], adapter)
            assert paths[2][k]["taught"] == learned(perta, model, adapter, k)
        assert paths[2][k]["survive"] == {condition: probability}
        g = gradients_of(tmp_path, *at)
        retain = gradients_of(tmp_path, model, lines["retain"], by_probability=False)
        checked = 0
        for key, x in models[k].items():
            tau = tuned[key] - base[key]
            grows = ((-g[key].sign() * tau.sign()) > 0) & ~((-retain[key].sign() * tau.sign()) > 0)
            far = models[k + 1][key] != x
            # A scale at its largest does not grow; in two steps of 0.4 none gets there.
            sure = torch.ones_like(grows)
            for one in (g[key], retain[key]):
                sure &= (one == 0) | (one.abs() > 1e-2 * one.square().mean().sqrt())
            sure &= tau.abs() > 1e-4
            assert (far == grows)[sure].all(), (k, key)
            checked += sure.sum().item()
        assert checked > 10000


def level_of(perta, conditions, *words):
    """A level that a later step reaches under all conditions, and none before it; that step."""
    path = json.loads(perta(*words, *SURVIVE[:-1], conditions, "--patch", "first", check=1).stdout)["path"]
    far = [max(point["forget_probability"], *point["survive"].values()) for point in path]
    step = next(k for k in range(2, len(far)) if far[k] < min(far[:k]))
    return str((far[step] + min(far[:step])) / 2), step


def test_a_level_is_held_under_every_condition(perta, tmp_path):
    lines = make_model(tmp_path)
    more_lines(tmp_path, lines)
    level, first = level_of(perta, "reteach", *BOX, "5")
    command = [*BOX, "8", *HOLD, level, "--survive", "reteach"]
    summary = json.loads(perta(*command, check=None).stdout)
    path, chosen, p = summary["path"], summary["chosen"], float(level)
    mean = path.pop()
    assert mean["mean_from"] == first and len(path) == 9
    enough = [
        k for k, at in enumerate(path) if at["forget_probability"] <= p and at["survive"]["reteach"] <= p
    ]
    assert enough[0] == first
    held = [at["mean_scale"] for at in path[first:]]
    assert mean["mean_scale"] == pytest.approx(sum(held) / len(held), rel=1e-3)
    path.append(mean)
    assert chosen == (
        9 if mean["forget_probability"] <= p else max(enough, key=lambda k: (-path[k]["retain_loss"], k))
    )
    found = {"as it is": path[chosen]["forget_probability"], "reteach": path[chosen]["survive"]["reteach"]}
    end = {name: (probability, p, probability <= p) for name, probability in found.items()}
    assert summary["reached"] == all(holds for _, _, holds in end.values())
    have = [(c["condition"], (c["probability"], c["limit"], c["holds"])) for c in summary["conditions"]]
    assert have == sorted(end.items(), key=lambda item: -item[1][0] / item[1][1])
    # The patch leads to the model that was measured.
    perta("apply", "full", "patch", "--out", "out")
    assert evaluate(perta, "out", "--data", "forget.jsonl", "--compute", "f32")["probability"] == path[chosen]["forget_probability"]
    assert taught(perta, tmp_path, "out", lines, chosen)[0] == path[chosen]["survive"]["reteach"]
    recipe = json.loads((tmp_path / "patch/manifest.json").read_text())["recipe"]
    assert recipe["survive"] == {
        "conditions": ["reteach"],
        "reteach": {"samples": 2, "rank": 8, "lora_alpha": 16.0, "updates": 5, "learning_rate": 1e-2,
                    "factor": 1.0, "seed": 0},
    }  # fmt: skip
    assert (recipe["path"], recipe["conditions"]) == (path, summary["conditions"])
    said = perta(*(word for word in command if word != "--json"), "--force", check=None).stdout
    assert "mean scale      reteach\n" in said and "reteach: probability 0." in said and "\nmean  " in said
    perta("report", "patch", "--html", "patch.html")
    perta("inspect", "patch")


def test_samples_that_are_not_learned_are_said(perta, tmp_path):
    make_model(tmp_path)
    write_lines(tmp_path / "forget.jsonl", [{"input_ids": [7 + i] * (9 + i)} for i in range(4)])
    for shard in (tmp_path / "full").glob("*.safetensors"):  # so that it can be certain of a token
        tensors = load_file(shard)
        save_file({n: x * (30 if n == "model.norm.weight" else 1) for n, x in tensors.items()}, shard, {"format": "pt"})
    words = [*BOX, "2", *SURVIVE]
    idle = json.loads(perta(*words, "--reteach-rate", "1e-6", check=None).stdout)
    taught = idle["path"][idle["chosen"]]["taught"]
    assert taught < 0.5 and taught in [c.get("taught") for c in idle["conditions"]]
    assert any("have a probability of only" in note and "--reteach-rate" in note for note in idle["notes"])
    learns = json.loads(perta(*words, "--force", "--reteach-updates", "40", check=None).stdout)
    assert learns["path"][learns["chosen"]]["taught"] > 0.5
    assert not any("--reteach-rate" in note for note in learns["notes"])


def test_a_level_that_does_not_hold_is_said(perta, tmp_path):
    make_model(tmp_path)
    never = perta(*BOX, "1", *SURVIVE, check=1)
    summary = json.loads(never.stdout)
    p, under = (summary["path"][1][key] for key in ("forget_probability", "survive"))
    under = under["reteach"]
    assert summary["reached"] is False
    assert {c["condition"]: c["holds"] for c in summary["conditions"]} == {"reteach": False, "as it is": False}
    assert f" and --survive reteach (probability is {under:.5f} of at most 1e-09), not reached" in never.stderr
    # One of the two is enough to miss the level.
    low = min(p, under) * 1.0001
    again = perta(*BOX, "1", "--stop-probability", low, "--survive", "reteach", "--force", check=1)
    worst, best = json.loads(again.stdout)["conditions"]
    assert worst["condition"] == ("as it is" if p > under else "reteach")
    assert (worst["holds"], best["holds"]) == (False, True)


@pytest.mark.parametrize("apart", part([3, 4], plain=2, sanitized=1))
def test_a_run_that_is_killed_goes_on(perta, tmp_path, apart):
    """At any commit point, and each time that many later; up to the mean."""
    lines = make_model(tmp_path)
    more_lines(tmp_path, lines, 6)
    level, first = level_of(perta, "nf4,drop,reteach", *BOX, "4")
    command = [*BOX, str(first + 2), *HOLD, level, "--survive", "nf4,drop,reteach"]
    done = perta(*command, check=None)
    assert "mean_from" in json.loads(done.stdout)["path"][-1]
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    kills = 0
    while (status := stop_at(tmp_path, [*command, "--resume"], "commit", apart)[0]) < 0:
        assert status == -signal.SIGKILL
        kills += 1
    assert status == done.returncode and kills > 9
    assert contents(tmp_path / "patch") == want
    assert not list(tmp_path.glob("patch*perta-*"))


def test_a_leftover_is_resumed_refused_or_replaced(perta, tmp_path):
    """Killed while some is taught again."""
    make_model(tmp_path)
    command = [*BOX, "1", *SURVIVE, "--method", "signed"]
    perta(*command, check=1)
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    work = tmp_path / "patch.steps.perta-partial"
    n, seen = 1, set()
    while not {"taught-0", "taught-0.perta-partial"} <= seen:
        assert stop_at(tmp_path, command, "any", n) == (-signal.SIGKILL, "")
        names = {path.name for path in work.glob("*")}
        if names - seen:
            seen |= names
            refusal = perta(*command, check=2).stderr
            assert "--resume continues it" in refusal
            if "taught-0" in names:
                perta(*command, "--resume", check=1)
                assert contents(tmp_path / "patch") == want
        perta(*command, "--force", check=1)
        assert contents(tmp_path / "patch") == want
        shutil.rmtree(tmp_path / "patch")
        n += 23


def test_every_run_gives_the_same_bytes(perta, tmp_path):
    lines = make_model(tmp_path)
    more_lines(tmp_path, lines, 6)
    level, first = level_of(perta, "nf4,drop,reteach", *BOX, "4")
    command = [*BOX, str(first + 1), *HOLD, level, "--survive", "nf4,drop,reteach"]
    runs = []
    for flags in settings(perta, command, False):
        perta(*command, "--force", *flags, check=None)
        runs.append(contents(tmp_path / "patch"))
    assert len(runs) > 1 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ([*SURVIVE[:-1], "q4_0"], 3, "are not whole blocks of q4_0"),
        (["--survive", "fp5"], 2, "--survive: fp5; must be one or several of nf4, int8, int4, q4_0, fp8, drop, reteach"),
        (["--survive", "reteach,"], 2, "--survive: ; must be one or several of nf4, int8, int4, q4_0, fp8, drop, reteach"),
        (["--survive", "reteach,reteach"], 2, "--survive: reteach is given twice"),
        (["--survive", "reteach", "--stop-probability", "0.5", "--steps", "1,2"], 2, "takes one number of steps"),
        (["--reteach-updates", "3"], 2, "need --survive reteach"),
        ([*SURVIVE, "--reteach-updates", "0"], 2, "--reteach-updates: must be from 1 to 1000"),
        ([*SURVIVE, "--reteach-rate", "0"], 2, "--reteach-rate: 0; must be a finite number above 0"),
        ([*SURVIVE, "--reteach-factor", "0"], 2, "--reteach-factor: 0; must be a finite number above 0"),
        (["--survive", "reteach"], 2, "--survive needs --stop-probability P"),
        (["--survive", "reteach", "--stop-forget", "3"], 2, "--survive needs --stop-probability P"),
        ([*SURVIVE, "--data-forget", "one.jsonl"], 3, "one.jsonl: it has one sample, but --survive reteach"),
    ],
)
def test_what_makes_no_sense_is_refused(perta, tmp_path, flags, code, message):
    lines = make_model(tmp_path)
    write_lines(tmp_path / "one.jsonl", lines["forget"][:1])
    for dry in ([], ["--dry-run"]):
        assert message in perta(*BOX, "2", *flags, *dry, check=code).stderr
    assert not list(tmp_path.glob("patch*"))


def test_it_needs_steps(perta):
    words = "unlearn --model full --tuned tuned --base base --patch patch --survive reteach".split()
    assert "need --steps K" in perta(*words, check=2).stderr


def test_where_all_conditions_hold_the_model_as_it_is_decides(perta, tmp_path):
    """Then the gradients are those of a run without conditions."""
    make_folders(tmp_path)
    words = [*STEPS, "3", "--stop-probability", "1e-9"]
    plain = json.loads(perta(*words, check=1).stdout)["path"]
    want = {path.name: path.read_bytes() for path in tmp_path.glob("patch/*.perta")}
    loose = ["--survive", "reteach", "--reteach-factor", "1e9", "--force"]
    summary = json.loads(perta(*words, *loose, check=1).stdout)
    plain = [point | {"survive": None, "taught": None} for point in plain]
    assert [point | {"survive": None, "taught": None} for point in summary["path"]] == plain
    assert {path.name: path.read_bytes() for path in tmp_path.glob("patch/*.perta")} == want
    assert [c["holds"] for c in summary["conditions"]] == [False, True]


def test_steps_with_an_adapter_are_those_with_the_merged_model(perta, tmp_path):
    """Where merging rounds nothing; one LoRA is the task vector, another is taught beside it."""
    make_lora(tmp_path)
    flags = ["2", *SURVIVE[:-1], "nf4,drop,reteach"]
    found = []
    for words in (STEPS, LORA):
        path = json.loads(perta(*words, *flags, "--force", check=1).stdout)["path"]
        numbers = [(point["forget_loss"], point["retain_loss"], point["survive"]) for point in path]
        found.append((numbers, {file.name: file.read_bytes() for file in tmp_path.glob("patch/*.perta")}))
    assert found[0] == found[1] and found[0][1]


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
def test_memory_bounds_the_process(perta, tmp_path):
    """Also while an adapter is trained, with the least that is accepted there."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
    write_llama(tmp_path / "full", LLAMA | wide)
    for side, first in (("forget", 0), ("retain", 100)):
        write_lines(tmp_path / f"{side}.jsonl", [{"input_ids": [first + i for i in range(40)]}] * 8)
    words = [*BOX, "1", *SURVIVE[:-1], "int4,drop,reteach", "--io", "pread", "--threads", "1", "--force"]
    budget, refusal = "1M", True
    while refusal:
        done = perta(*words, "--memory", budget, check=None)
        refusal = re.search(r"needs (\d+M)", done.stderr)
        budget = refusal[1] if refusal else budget
    assert done.returncode == 1
    assert peak_mib([*words, "--memory", budget], tmp_path, status=1) <= int(budget[:-1])
