"""`perta unlearn --box` compared with the same procedure in PyTorch; bytes that do not depend on
how it runs; resuming after a kill; arguments."""

import json
import math
import shutil
import signal

import pytest
from conftest import SANITIZED, part
from test_estimate import make_model as write_model
from test_resume import contents
from test_same_bytes import settings
from test_steps import (
    STEPS,
    check_path,
    gradients,
    make_folders,
    procedure,
    survives_kills,
    tensors_of,
)
from verbs import stop_at

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

BOX = ["unlearn", "--model", "full", *STEPS[7:-1], "--box", "0.15", "--steps"]
OWN = [word for word in BOX if word not in ("--box", "0.15")]
HOLD = ["--method", "signed-hold", "--stop-probability"]


def make_model(tmp_path, name="llama, tied", dtype=torch.float32):
    lines = make_folders(tmp_path, name)
    for other in ("tuned", "base"):
        shutil.rmtree(tmp_path / other)
    for path in (tmp_path / "full").glob("*.safetensors"):
        save_file({k: x.to(dtype) for k, x in load_file(path).items()}, path, {"format": "pt"})
    return lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama, tied", "qwen3"])
def test_box_and_model_are_pytorchs(perta, tmp_path, name, dtype):
    """Parameter by parameter, where the signs of all gradients are certain."""
    lines = make_model(tmp_path, name, dtype)
    summary = json.loads(perta(*BOX, "4", "--max-scale", "1", "--out", "out").stdout)
    models, s, sure, path = procedure(tmp_path, lines, 4, 0.2, max_scale=1.0, box=0.15)
    check_path(summary["path"], path)
    out = tensors_of(tmp_path / "out")
    differ = total = 0
    for key, x in models[4].items():
        same = out[key] == x
        if x.dim() != 2:
            assert torch.equal(out[key], tensors_of(tmp_path / "full")[key]), key
            continue
        assert same[sure[key]].all(), key
        differ += (~same).sum().item()
        total += same.numel()
    assert differ < 0.003 * total
    want = sum(x.double().sum().item() for x in s.values()) / total
    assert summary["path"][-1]["mean_scale"] == pytest.approx(want, rel=1e-3)
    before, after = (summary["path"][k]["forget_probability"] for k in (0, 1))
    assert after < before


def found_box(folder, lines, level, step=0.4):
    """docs/steps.md: the size with which the first step goes a third of the way to level, and the
    number of trials."""
    full = tensors_of(folder)
    (_, before), forget = gradients(folder, full, lines["forget"], True)
    _, retain = gradients(folder, full, lines["retain"], False)
    way = {k: torch.zeros(x.shape) for k, x in full.items()}
    fall = 0.0
    for key, x in full.items():
        if x.dim() == 2:
            moves = (forget[key] * retain[key] <= 0) & (forget[key] != 0)
            rms = x.double().square().mean().sqrt()
            way[key] = step * rms.float() * (moves * -forget[key].sign()).float()
            fall += step * (rms * forget[key].abs()[moves].sum()).item()
    p = [math.exp(-gradients(folder, full, [line], False)[0][0]) for line in lines["forget"]]
    wanted = before - (before - level) / 3
    trials = {}

    def above(c):
        if c not in trials:
            theta = {k: (x.float() - c * way[k]).to(x.dtype) for k, x in full.items()}
            trials[c] = gradients(folder, theta, lines["forget"], True)[0][1]
        return trials[c] > wanted

    c = float(f"{6 * sum(x * (1 - x) for x in p) / len(p) / fall:.2e}")
    while above(c):
        c *= 2
    while not above(c / 2):
        c /= 2
    a, b = trials[c / 2], trials[c]
    return c / 2 * 2 ** ((a - wanted) / (a - b)), len(trials)


@pytest.mark.parametrize("name, level", [("llama, tied", None), ("qwen3", 0.003)])
def test_the_size_is_found(perta, tmp_path, name, level):
    """Without --box, from trials of the first step; the rest is as if it had been given."""
    lines = make_model(tmp_path, name)
    command = [*OWN, "6", *(["--stop-probability", level] if level else [])]
    summary = json.loads(perta(*command).stdout)
    want, _ = found_box(tmp_path / "full", lines, level or 0)
    assert summary["box"] == pytest.approx(want, rel=0.02)
    recipe = json.loads((tmp_path / "patch/manifest.json").read_text())["recipe"]
    assert recipe["box"] == summary["box"]
    given = [*command, "--box", repr(summary["box"]), "--patch", "given"]
    assert json.loads(perta(*given).stdout)["path"] == summary["path"]
    assert contents(tmp_path / "given") == contents(tmp_path / "patch")
    plain = [word for word in command if word != "--json"]
    assert f"box {summary['box']:.5g}: task vector" in perta(*plain, "--force").stdout


def test_every_run_finds_the_same_size(perta, tmp_path):
    make_model(tmp_path)
    runs = [patch_bytes(tmp_path, perta, OWN, *f) for f in settings(perta, [*OWN, "3"], False)]
    assert len(runs) > 1 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize("scale", [1e-3, 30])
def test_the_size_is_found_from_afar(perta, tmp_path, scale):
    """Where a first-order estimate is far off, several trials lead there."""
    lines = make_model(tmp_path)
    for path in (tmp_path / "full").glob("*.safetensors"):
        tensors = {k: x * scale if x.dim() == 2 else x for k, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    want, trials = found_box(tmp_path / "full", lines, 0)
    assert json.loads(perta(*OWN, "1").stdout)["box"] == pytest.approx(want, rel=0.02)
    assert trials > 2


def test_trials_are_resumed(perta, tmp_path):
    make_model(tmp_path)
    perta(*OWN, "1")
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    kills = 0
    while stop_at(tmp_path, [*OWN, "1", "--resume"], "commit", 2 + kills % 2)[0] < 0:
        kills += 1
    assert kills > 3 and contents(tmp_path / "patch") == want


def test_a_size_that_cannot_be_found_is_asked_for(perta, tmp_path):
    """A model that gives every answer for sure has no gradient to follow."""
    make_model(tmp_path)
    for path in (tmp_path / "full").glob("*.safetensors"):
        tensors = {k: 0 * x for k, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    error = perta(*OWN, "2", check=3).stderr
    assert "no size of the box was found" in error and "--box C" in error
    assert not (tmp_path / "patch").exists()
    # With a size, nothing moves; a run that is killed does not form the box twice.
    perta(*BOX, "2", "--force")
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    while stop_at(tmp_path, [*BOX, "2", "--resume"], "commit", 3)[0] < 0:
        pass
    assert contents(tmp_path / "patch") == want


def test_levels_are_held_in_the_box(perta, tmp_path):
    lines = make_model(tmp_path)
    level = json.loads(perta(*BOX, "2").stdout)["path"][2]["forget_probability"] * (1 + 1e-3)
    summary = json.loads(perta(*BOX, "6", *HOLD, level, "--force").stdout)
    models, _, sure, path = procedure(tmp_path, lines, 6, 0.2, hold=level, box=0.15)
    check_path(summary["path"], path)
    perta("apply", "full", "patch", "--out", "out")
    out = tensors_of(tmp_path / "out")
    for key, x in models[summary["chosen"]].items():
        assert (out[key] == x)[sure[key]].all(), key


def test_the_record_says_so_and_patches_are_like_others(perta, tmp_path):
    make_model(tmp_path)
    before = contents(tmp_path / "full")
    perta(*BOX, "2", "--out", "out")
    manifest = json.loads((tmp_path / "patch/manifest.json").read_text())
    recipe = manifest["recipe"]
    assert (recipe["box"], recipe["method"], recipe["steps"]) == (0.15, "signed-backoff", 2)
    assert (recipe["forget_samples"], recipe["retain_samples"]) == ("3", "3")
    assert set(manifest["inputs"]) == {"model", "box", "scale"}
    actions = {tensor["name"]: tensor["action"] for tensor in manifest["tensors"]}
    assert actions["model.norm.weight"] == "kept: not in the box"
    assert actions["model.embed_tokens.weight"] == "edited"
    assert json.loads(perta("inspect", "patch", "--json").stdout)["recipe"]["box"] == 0.15
    perta("verify", "patch")
    perta("verify", "out", "--patch", "patch", "--applied")
    perta("report", "patch", "--html", "patch.html")
    assert '"box"' in (tmp_path / "patch.html").read_text()
    perta("revert", "out", "patch", "--out", "back")
    assert contents(tmp_path / "full") == before
    for key, x in tensors_of(tmp_path / "full").items():
        assert torch.equal(tensors_of(tmp_path / "back")[key], x)
    assert not list(tmp_path.glob("*.perta*"))
    far = perta(*BOX, "1", "--stop-probability", "1e-9", "--patch", "far", check=1)
    assert "a larger --step, --max-scale or --box would go further" in far.stderr


def patch_bytes(tmp_path, perta, command, *flags):
    perta(*command, "3", "--force", *flags)
    return {path.name: path.read_bytes() for path in (tmp_path / "patch").glob("*.perta")}


def test_every_run_gives_the_same_bytes(perta, tmp_path):
    make_model(tmp_path)
    runs = [patch_bytes(tmp_path, perta, BOX, *flags) for flags in settings(perta, [*BOX, "3"])]
    assert len(runs) > 1 and all(run == runs[0] for run in runs)


def test_tensors_of_several_chunks_have_one_size(perta, tmp_path):
    """The embedding and the head have more than 2^20 elements. After a step of 1, each parameter
    has moved by its tensor's size or not at all."""
    make_folders(tmp_path)
    shutil.rmtree(tmp_path / "full")
    write_model(tmp_path / "full", "Llama", {"vocab_size": 40000, "hidden_size": 32})
    command = [*BOX, "1", "--method", "signed", "--step", "1", "--out", "out", "--force"]
    outs = []
    for flags in settings(perta, command):
        perta(*command, *flags)
        outs.append(tensors_of(tmp_path / "out"))
    moved = 0
    for key, x in tensors_of(tmp_path / "full").items():
        assert all(torch.equal(out[key], outs[0][key]) for out in outs)
        size = torch.tensor(0.15) * x.double().square().mean().sqrt().float()
        differ = outs[0][key] != x
        assert x.dim() == 2 or not differ.any()
        assert (~differ | (outs[0][key] == x - size) | (outs[0][key] == x + size)).all(), key
        moved += differ[2**20 // 32 :].sum().item() if x.numel() > 2**20 else 0
    assert moved > 1000


def test_several_patches_are_those_of_runs_of_their_own(perta, tmp_path):
    make_model(tmp_path)
    for k in (1, 3):
        perta(*BOX, k, "--patch", f"alone/step-{k}")
    perta(*BOX, "3,1")
    assert contents(tmp_path / "patch") == contents(tmp_path / "alone")


def test_ctrl_c_and_dry_run(perta, tmp_path):
    make_model(tmp_path)
    perta(*BOX, "2", "--dry-run")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "forget.jsonl", "retain.jsonl"}
    status, error = stop_at(tmp_path, [*BOX, "2"], "commit", 7, signal.SIGINT)
    assert status == 130 and "--resume" in error
    perta(*BOX, "2", "--resume")
    perta(*BOX, "2", "--patch", "again")
    assert contents(tmp_path / "patch") == contents(tmp_path / "again")


def test_a_model_that_has_forgotten_stays(perta, tmp_path):
    """The path ends at its first point, before any step."""
    make_model(tmp_path)
    summary = json.loads(perta(*BOX, "2", "--stop-probability", "0.9", "--out", "out").stdout)
    assert (summary["chosen"], summary["reached"], len(summary["path"])) == (0, True, 1)
    for key, x in tensors_of(tmp_path / "full").items():
        assert torch.equal(tensors_of(tmp_path / "out")[key], x)


def test_globs_choose_what_moves(perta, tmp_path):
    make_model(tmp_path)
    perta(*BOX, "2", "--include", "*mlp*", "--exclude", "*up_proj*", "--out", "out")
    full, out = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "out")
    changed = {name for name in full if not torch.equal(full[name], out[name])}
    assert changed == {name for name in full if "mlp" in name and "up_proj" not in name}
    for flags in ([], ["--dry-run"]):
        words = [*BOX, "2", "--include", "*norm*", "--patch", "never", *flags]
        assert "leave no matrix to edit" in perta(*words, check=2).stderr
    assert not list(tmp_path.glob("never*"))


@pytest.mark.parametrize("apart", part([3, 4, 7], plain=2, sanitized=1))
def test_a_run_that_is_killed_goes_on(perta, tmp_path, apart):
    """At any commit point, and each time that many later."""
    make_model(tmp_path)
    command = [*BOX, "2", "--out", "out"]
    survives_kills(perta, tmp_path, command, apart)


def test_a_box_that_is_half_written_is_written_again(perta, tmp_path):
    """Killed at operations of any kind; what is left is resumed, refused or replaced."""
    make_model(tmp_path)
    command = [*BOX, "1"]
    perta(*command)
    want = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    partial = tmp_path / "patch.steps.perta-partial"
    seen = set()
    n = 1
    while stop_at(tmp_path, command, "any", n) == (-signal.SIGKILL, ""):
        seen |= {path.name for path in partial.glob("*")}
        perta(*command, "--resume")
        assert contents(tmp_path / "patch") == want
        shutil.rmtree(tmp_path / "patch")
        n += 41 if SANITIZED else 11
    assert n > 200
    assert seen >= {"scales-0", "gradients-0-forget"}
    assert SANITIZED or seen >= {"box", "box.perta-partial"}
    shutil.rmtree(tmp_path / "patch")
    assert stop_at(tmp_path, command, "commit", 6) == (-signal.SIGKILL, "")
    refusal = perta(*command, "--box", "0.2", "--resume", check=2).stderr
    assert "--resume cannot continue: flags: box was 0.1" in refusal
    perta(*command, "--force")
    assert contents(tmp_path / "patch") == want


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tuned", "full"], "cannot be used with --tuned and --base"),
        (["--base", "full"], "cannot be used with --tuned and --base"),
        (["--box", "0"], "--box: 0; must be a finite number above 0"),
        (["--box", "-1"], "--box: -1; must be a finite number above 0"),
        (["--box", "nan"], "--box: nan is not a number"),
        (["--box", "inf"], "--box: inf is not a number"),
        (["--box", "1e39"], "--box: 1e+39; must be a finite number above 0"),
        (["--box", "1e-60"], "--box: 1e-60; must be a finite number above 0"),
        (["--method", "fisher"], "--steps needs --method signed"),
    ],
)
def test_what_makes_no_sense_is_refused(perta, tmp_path, flags, message):
    make_model(tmp_path)
    assert message in perta(*BOX, "2", *flags, check=2).stderr
    assert not list(tmp_path.glob("patch*"))


def test_one_of_two_models_is_not_enough(perta, tmp_path):
    make_model(tmp_path)
    assert "--base DIR" in perta(*OWN, "2", "--tuned", "full", check=2).stderr
    assert "--tuned DIR" in perta(*OWN, "2", "--base", "full", check=2).stderr
    plain = "unlearn --model full --patch patch --box 0.15".split()
    for flags in ([], ["--method", "grad"]):
        assert "--box" in perta(*plain, *flags, check=2).stderr
        assert "need --steps K" in perta(*plain, *flags, check=2).stderr


def test_numbers_that_are_not_finite_are_refused(perta, tmp_path):
    make_model(tmp_path)
    for path in (tmp_path / "full").glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if "embed" in key:
                tensors[key][199, 0] = float("inf")
        save_file(tensors, path, {"format": "pt"})
    assert "not finite" in perta(*BOX, "2", check=3).stderr.replace("not a finite", "not finite")
    assert not (tmp_path / "patch").exists()
