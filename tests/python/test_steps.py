"""`perta unlearn --steps` compared with the same procedure in PyTorch; stop rules; resuming
after a kill."""

import hmac
import json
import shutil
import signal

import pytest
from conftest import part
from reference import shuffled
from test_estimate import MODELS, VOCABULARY, make_model
from test_eval import evaluate, write_lines
from test_resume import contents
from verbs import stop_at

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

STEPS = (
    "unlearn --model full --tuned tuned --base base --patch patch --compute f32 --json "
    "--data-forget forget.jsonl --data-retain retain.jsonl --steps"
).split()
KEY = b"sixteen bytes, or more"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def make_folders(tmp_path, name="llama, tied"):
    """full; base, and tuned, which differs a little from it; data that share some tokens."""
    family, changes = MODELS[name]
    make_model(tmp_path / "full", family, changes | SMALL)
    generator = torch.Generator().manual_seed(8)
    for folder, size in (("base", 0.01), ("tuned", 0.03)):
        shutil.copytree(tmp_path / "full", tmp_path / folder)
        for path in (tmp_path / folder).glob("*.safetensors"):
            tensors = load_file(path)
            for key, x in tensors.items():
                tensors[key] = x + size * torch.randn(x.shape, generator=generator)
            save_file(tensors, path, {"format": "pt"})
    lines = {}
    for side, first in (("forget", 0), ("retain", 100)):
        lines[side] = [
            {"input_ids": torch.randint(first, first + 150, (n,), generator=generator).tolist()}
            for n in (9, 20, 14)
        ]
        write_lines(tmp_path / f"{side}.jsonl", lines[side])
    return lines


def tensors_of(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def gradients(folder, theta, lines, by_probability):
    """Mean loss and probability, and signed mean gradients in float64, of the loss or of
    -probability."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.load_state_dict({k: v.double() for k, v in theta.items()}, strict=False)
    n, means = len(lines), torch.zeros(2)
    for line in lines:
        ids = torch.tensor([line["input_ids"]])
        loss = model(input_ids=ids, labels=ids).loss
        probability = torch.exp(-loss)
        (-probability / n if by_probability else loss / n).backward()
        means += torch.stack([loss, probability]).detach() / n
    return means.tolist(), {k: p.grad for k, p in model.named_parameters()}


def own_box(full, g, c):
    """The task vector from the gradients of minus the forget probability."""
    tau = {k: torch.zeros(x.shape) for k, x in full.items()}
    for k, x in full.items():
        if x.dim() == 2:
            rms = x.double().square().mean().sqrt().float()
            tau[k] = torch.tensor(c) * rms * -g[k].sign().float()
    return tau


def batch_of(samples, size, k):
    """docs/steps.md: the samples of the step from point k."""
    n = len(samples)
    batches = -(-n // size)
    order, b = shuffled(n, 0, k // batches), k % batches
    return [samples[i] for i in sorted(order[b * n // batches : (b + 1) * n // batches])]


def procedure(tmp_path, lines, n_steps, back_off, step=0.4, max_scale=3.0, hold=None, box=None, batch=0):
    """docs/steps.md in PyTorch: the model at each point. If a gradient is too close to zero for
    its sign to be certain in float32, sure is False."""
    full = tensors_of(tmp_path / "full")
    if box is None:
        tuned, base = (tensors_of(tmp_path / name) for name in ("tuned", "base"))
        tau = {k: tuned[k] - base[k] for k in full}
    s = {k: torch.zeros_like(x).bfloat16() for k, x in full.items()}
    sure = {k: torch.ones_like(x, dtype=torch.bool) for k, x in full.items()}
    path, models = [], []
    for k in range(n_steps + 1):
        theta = full
        if k:
            theta = {n: (full[n].float() - s[n].float() * tau[n]).to(full[n].dtype) for n in full}
        means, g = zip(*(gradients(tmp_path / "full", theta, lines[p], p == "forget")
                         for p in ("forget", "retain")), strict=True)  # fmt: skip
        path.append({"forget_loss": means[0][0], "forget_probability": means[0][1],
                     "retain_loss": means[1][0]})  # fmt: skip
        if batch and k < n_steps:
            some = batch_of(lines["retain"], batch, k)
            of_batch, g_batch = gradients(tmp_path / "full", theta, some, False)
            g = [g[0], g_batch]
            decides = k == 0 or (hold is not None and means[0][1] <= hold)
            path[-1]["retain_samples"] = len(lines["retain"] if decides else some)
            path[-1]["retain_loss"] = (means[1] if decides else of_batch)[0]
        models.append(theta)
        if box is not None and not k:
            tau = own_box(full, g[0], box)
        if k == n_steps:
            return models, s, sure, path
        now, back = step, back_off
        if hold is not None:
            enough = [i for i, p in enumerate(path) if p["forget_probability"] <= hold]
            share = 1 - (k - min(enough, default=k)) / (n_steps - min(enough, default=k))
            now, back = 0 if k in enough else step * share, back_off * share
        for name, scale in s.items():
            forget, retain = (-g[i][name].sign() * tau[name].sign() for i in (0, 1))
            moved = scale.float() + now * ((forget > 0) & ~(retain > 0)).float()
            moved = moved - back * (retain > 0).float()
            s[name] = moved.clamp(0, max_scale).bfloat16()
            for one in (g[0][name], g[1][name]):
                sure[name] &= (one == 0) | (one.abs() > 1e-3 * one.square().mean().sqrt())


@pytest.mark.parametrize(
    "name, method, back_off",
    part([("llama, tied", "signed-backoff", 0.2), ("qwen3", "signed", 0.0), ("gemma2", "signed", 0.0)], sanitized=1),
)
def test_scales_and_model_are_pytorchs(perta, tmp_path, name, method, back_off):
    lines = make_folders(tmp_path, name)
    (tmp_path / "key").write_bytes(KEY)
    flags = ["--method", method, "--max-scale", "1", "--data-key", "key"]
    summary = json.loads(perta(*STEPS, "4", *flags, "--out", "out").stdout)
    models, s, sure, path = procedure(tmp_path, lines, 4, back_off, max_scale=1.0)
    check_path(summary["path"], path)
    assert summary["chosen"] == 4
    out = tensors_of(tmp_path / "out")
    differ = total = 0
    for key, x in models[4].items():
        same = out[key] == x  # the same scale gives the same arithmetic
        assert same[sure[key]].all(), key
        differ += (~same).sum().item()
        total += same.numel()
    assert differ < 0.002 * total
    want = sum(x.double().sum().item() for x in s.values()) / total
    assert summary["path"][-1]["mean_scale"] == pytest.approx(want, rel=1e-3)
    assert max(x.max().item() for x in s.values()) == 1.0
    assert 0.05 < summary["path"][-1]["moved"] < 1
    check_record(tmp_path, summary, method)


def check_path(have, want):
    for a, b in zip(have, want, strict=True):
        assert {key: a[key] for key in b} == pytest.approx(b, rel=2e-5)


def check_record(tmp_path, summary, method):
    """The recipe describes the path; nothing else is left behind."""
    recipe = json.loads((tmp_path / "patch/manifest.json").read_text())["recipe"]
    assert (recipe["method"], recipe["steps"], recipe["step"]) == (method, 4, 0.4)
    assert recipe["path"] == summary["path"] and recipe["chosen"] == 4
    assert (recipe["forget_samples"], recipe["retain_tokens"]) == ("3", "43")
    for side in ("forget", "retain"):
        data = (tmp_path / f"{side}.jsonl").read_bytes()
        digest = hmac.digest(KEY, data, "sha256").hex()
        assert recipe[f"{side}_data_hmac_sha256"] == digest
    folders = {"full", "tuned", "base", "patch", "out", "forget.jsonl", "retain.jsonl", "key"}
    assert {path.name for path in tmp_path.iterdir()} == folders


def test_the_way_is_that_of_the_patch(perta, tmp_path):
    """Losses along the path, computed without writing models, equal those of models that are
    written; in bfloat16."""
    make_folders(tmp_path)
    for folder in ("full", "tuned", "base"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            save_file({k: x.bfloat16() for k, x in load_file(path).items()}, path, {"format": "pt"})
    for n in (1, 3):
        summary = json.loads(perta(*STEPS, n, "--force").stdout)
        for side in ("forget", "retain"):
            shutil.copy(tmp_path / f"{side}.jsonl", tmp_path / "data.jsonl")
            after = evaluate(perta, "full", "--patch", "patch", "--compute", "f32")
            assert after["loss"] == summary["path"][-1][f"{side}_loss"]


def test_rules_stop_the_way(perta, tmp_path):
    make_folders(tmp_path)
    path = json.loads(perta(*STEPS, "5").stdout)["path"]
    losses = [point["forget_loss"] for point in path]
    assert sorted(losses) == losses
    flags = ["--force", "--stop-forget", (losses[2] + losses[3]) / 2]
    stopped = json.loads(perta(*STEPS, "5", *flags).stdout)
    assert (stopped["path"], stopped["chosen"]) == (path[:4], 3)
    rises = [point["retain_loss"] - path[0]["retain_loss"] for point in path]
    flags = ["--force", "--stop-probability", path[2]["forget_probability"]]
    stopped = json.loads(perta(*STEPS, "5", *flags).stdout)
    assert (stopped["path"], stopped["chosen"]) == (path[:3], 2)
    flags += ["--stop-forget", losses[4]]  # then both must be reached
    stopped = json.loads(perta(*STEPS, "5", *flags).stdout)
    assert (stopped["path"], stopped["chosen"]) == (path[:5], 4)
    bound = max(rises[:3]) + 1e-9
    after = next((i for i, rise in enumerate(rises) if rise > bound), None)
    flags = ["--force", "--max-retain-rise", bound if after else min(rises[1:]) - 1e-9]
    stopped = json.loads(perta(*STEPS, "5", *flags).stdout)
    after = after or next(i for i in range(1, 6) if rises[i] > min(rises[1:]) - 1e-9)
    assert (stopped["path"], stopped["chosen"]) == (path[: after + 1], after - 1)


HOLD = ["--method", "signed-hold", "--stop-probability"]


def test_what_is_forgotten_is_held(perta, tmp_path):
    """signed-hold equals the procedure in PyTorch: after the first point that forgets enough,
    scales do not grow while enough is forgotten, and changes get smaller. It ends where the
    retain loss is least."""
    lines = make_folders(tmp_path)
    first = json.loads(perta(*STEPS, "3").stdout)["path"]
    level = first[3]["forget_probability"] * (1 + 1e-3)
    summary = json.loads(perta(*STEPS, "8", "--force", *HOLD, level).stdout)
    path, end = summary["path"], summary["chosen"]
    models, _, sure, want = procedure(tmp_path, lines, 8, 0.2, hold=level)
    check_path(path, want)
    assert path[:4] == first
    enough = [k for k, point in enumerate(path) if point["forget_probability"] <= level]
    assert enough[0] == 3 and 1 < len(enough) < 6  # it fell below the level, and reached it again
    assert end == min(enough, key=lambda k: path[k]["retain_loss"])
    recipe = json.loads((tmp_path / "patch/manifest.json").read_text())["recipe"]
    assert (recipe["method"], recipe["chosen"], recipe["stop_probability"]) == (HOLD[1], end, level)
    perta("apply", "full", "patch", "--out", "out")
    out = tensors_of(tmp_path / "out")
    for key, x in models[end].items():
        assert (out[key] == x)[sure[key]].all(), key
    # If enough is never forgotten, the end is the last point, or the one before a limit.
    for flags, chosen in (([], 2), (["--max-retain-rise", "-100"], 0)):
        never = perta(*STEPS, "2", *HOLD, "1e-9", *flags, "--patch", "never", "--force", check=1)
        assert json.loads(never.stdout)["chosen"] == chosen
        assert json.loads(never.stdout)["reached"] is False
        assert "not enough is forgotten: --stop-probability 1e-09 (probability is 0." in never.stderr
        assert (tmp_path / "never/manifest.json").exists()
    shutil.rmtree(tmp_path / "never")
    command = [*STEPS, "8", *HOLD, str(level), "--patch", "again"]
    assert stop_at(tmp_path, command, "commit", 60) == (-signal.SIGKILL, "")
    perta(*command, "--resume")
    assert contents(tmp_path / "again") == contents(tmp_path / "patch")


def test_batches_of_the_retain_set_are_pytorchs(perta, tmp_path):
    """Seven samples in batches of three: epochs of three batches, 2, 2 and 3. All samples decide
    at the first and last point, and wherever enough is forgotten."""
    lines = make_folders(tmp_path)
    generator = torch.Generator().manual_seed(5)
    lines["retain"] = [
        {"input_ids": torch.randint(100, 250, (n,), generator=generator).tolist()}
        for n in (9, 20, 14, 5, 30, 11, 8)
    ]
    write_lines(tmp_path / "retain.jsonl", lines["retain"])
    batch = ["--retain-batch", "3"]
    first = json.loads(perta(*STEPS, "3", *batch).stdout)["path"]
    level = first[3]["forget_probability"] * (1 + 1e-3)
    command = [*STEPS, "7", *HOLD, level, *batch, "--force"]
    summary = json.loads(perta(*command).stdout)
    models, _, sure, want = procedure(tmp_path, lines, 7, 0.2, hold=level, batch=3)
    for have, point in zip(summary["path"][:-1], want[:-1], strict=True):
        assert have["retain_samples"] == point["retain_samples"]
        assert have["retain_loss"] == pytest.approx(point["retain_loss"], rel=2e-5)
        assert have["forget_probability"] == pytest.approx(point["forget_probability"], rel=2e-5)
    assert {point["retain_samples"] for point in summary["path"]} == {2, 3, 7}
    assert summary["path"][-1]["retain_samples"] == 7
    perta("apply", "full", "patch", "--out", "out")
    out = tensors_of(tmp_path / "out")
    for key, x in models[summary["chosen"]].items():
        assert (out[key] == x)[sure[key]].all(), key
    recipe = json.loads((tmp_path / "patch/manifest.json").read_text())["recipe"]
    assert (recipe["retain_batch"], recipe["retain_samples"]) == (3, "7")
    before = contents(tmp_path / "patch")
    shutil.rmtree(tmp_path / "patch")
    kills = 0
    while stop_at(tmp_path, [*map(str, command[:-1]), "--resume"], "commit", 4)[0] < 0:
        kills += 1
    assert kills > 9 and contents(tmp_path / "patch") == before
    # A batch that holds all samples is no batch.
    perta(*STEPS, "2", "--patch", "all", "--retain-batch", "7")
    perta(*STEPS, "2", "--patch", "none")
    assert shards_of(tmp_path / "all") == shards_of(tmp_path / "none")
    assert "--retain-batch: 0; must be 1 or more" in perta(*STEPS, "2", *batch[:1], "0", check=2).stderr


def shards_of(patch):
    return {path.name: path.read_bytes() for path in patch.glob("*.perta")}


def test_gradients_that_no_step_uses_are_not_taken(perta, tmp_path):
    """While enough is forgotten no scale grows, so the forget set's gradients are not taken; nor
    where the path ends. They lie there while the retain set is measured, so a run that is killed
    now and then shows them all."""
    make_folders(tmp_path)
    path = json.loads(perta(*STEPS, "2").stdout)["path"]
    level = str(path[2]["forget_probability"] * (1 + 1e-3))
    for flags in ([*HOLD, level], ["--stop-probability", level]):
        summary = json.loads(perta(*STEPS, "4", *flags, "--force").stdout)
        want = contents(tmp_path / "patch")
        shutil.rmtree(tmp_path / "patch")
        seen = set()
        while stop_at(tmp_path, [*STEPS, "4", *flags, "--resume"], "commit", 3)[0] < 0:
            work = tmp_path / "patch.steps.perta-partial"
            seen |= {folder.parent.name for folder in work.glob("gradients-*-forget/mean")}
        assert contents(tmp_path / "patch") == want
        known = [point["forget_probability"] > float(level) for point in summary["path"]]
        assert not all(known[:-1]) or flags[0] == "--stop-probability"
        assert seen == {f"gradients-{k}-forget" for k in range(len(known) - 1) if known[k]}


def test_a_model_that_has_forgotten_is_left_alone(perta, tmp_path):
    """The path ends at once, and a note says why."""
    make_folders(tmp_path)
    for flags in ([], ["--method", "signed-hold"]):
        done = perta(*STEPS, "3", *flags, "--stop-probability", "0.9", "--force")
        summary = json.loads(done.stdout)
        assert (summary["chosen"], summary["reached"], len(summary["path"])) == (0, True, 1)
        assert any("nothing to forget" in note for note in summary["notes"])
        manifest = json.loads((tmp_path / "patch/manifest.json").read_text())
        assert all(tensor["changed"] == 0 for tensor in manifest["tensors"])


def test_a_sample_in_both_sets_is_refused(perta, tmp_path):
    """Only if labels are the same, too: one may ask a question that the other answers."""
    lines = make_folders(tmp_path)
    shared = lines["forget"][1]
    write_lines(tmp_path / "retain.jsonl", [lines["retain"][0], shared])
    message = "retain.jsonl: line 2 is the same sample as line 2 of forget.jsonl"
    for flags in ([], ["--dry-run"]):
        assert message in perta(*STEPS, "2", *flags, check=3).stderr
    assert not list(tmp_path.glob("patch*"))
    other = shared | {"labels": [-100, *shared["input_ids"][1:-1], -100]}
    write_lines(tmp_path / "retain.jsonl", [lines["retain"][0], other])
    perta(*STEPS, "1")


def test_several_patches_are_those_of_runs_of_their_own(perta, tmp_path):
    """Of every step that is listed, and of the end: whole folders, byte for byte."""
    make_folders(tmp_path)
    for k in (1, 3):
        perta(*STEPS, k, "--patch", f"alone/step-{k}", "--out", f"alone-out/step-{k}")
    summary = json.loads(perta(*STEPS, "3,1", "--out", "out").stdout)
    assert [(r["step"], r["patch"]) for r in summary["results"]] == [
        (k, f"patch/step-{k}") for k in (1, 3)
    ]
    assert contents(tmp_path / "patch") == contents(tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone-out")
    assert "patch/step-1: exists" in perta(*STEPS, "1,3", check=2).stderr
    path = summary["path"]
    rules = ["--stop-forget", (path[1]["forget_loss"] + path[2]["forget_loss"]) / 2]
    said = perta(*STEPS, "1,3", *rules, "--patch", "ruled", "--quiet").stdout
    perta(*STEPS, "3", *rules, "--patch", "alone-ruled")
    assert json.loads(said)["chosen"] == 2
    assert {path.name for path in (tmp_path / "ruled").iterdir()} == {"step-1", "step-2"}
    assert contents(tmp_path / "ruled/step-2") == contents(tmp_path / "alone-ruled")


def test_globs_choose_what_moves(perta, tmp_path):
    make_folders(tmp_path)
    perta(*STEPS, "2", "--include", "*mlp*", "--exclude", "*up_proj*", "--out", "out")
    full, out = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "out")
    changed = {name for name in full if not torch.equal(full[name], out[name])}
    assert changed == {name for name in full if "mlp" in name and "up_proj" not in name}


def survives_kills(perta, tmp_path, command, apart):
    """Killed again and again, that many commit points apart, the command, which writes patch and
    out, gives what it gives in one go, and leaves nothing else."""
    perta(*command)
    want = contents(tmp_path / "patch") | contents(tmp_path / "out")
    for name in ("patch", "out"):
        (tmp_path / name).rename(tmp_path / f"first-{name}")
    kills = 0
    while (status := stop_at(tmp_path, [*command, "--resume"], "commit", apart)[0]) < 0:
        assert status == -signal.SIGKILL
        kills += 1
    assert status == 0 and kills > 3
    assert contents(tmp_path / "patch") | contents(tmp_path / "out") == want
    assert not list(tmp_path.glob("*perta-*"))


def test_a_run_that_is_killed_goes_on(perta, tmp_path):
    """Between steps, within an estimate, and at patches."""
    make_folders(tmp_path)
    command = [*STEPS, "1,3", "--out", "out"]
    perta(*command)
    want = contents(tmp_path / "patch") | contents(tmp_path / "out")
    for name in ("patch", "out"):
        (tmp_path / name).rename(tmp_path / f"first-{name}")
    journals = {
        "patch.steps.perta-journal",
        "patch.steps.perta-partial/gradients-1-retain/mean.perta-journal",
        "out/step-1.perta-journal",
        "out/step-3.perta-journal",
    }
    found = set()
    while found != journals:  # three commit points later each time
        assert stop_at(tmp_path, [*command, "--resume"], "commit", 3) == (-signal.SIGKILL, "")
        found |= {name for name in journals if (tmp_path / name).exists()}
    assert "--resume continues it" in perta(*command, check=2).stderr
    refusal = perta(*command, "--resume", "--step", "0.3", check=2).stderr
    assert "--resume cannot continue: flags: step was 0.4" in refusal
    perta(*command, "--resume")
    assert contents(tmp_path / "patch") | contents(tmp_path / "out") == want
    assert not list(tmp_path.glob("*perta*"))


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--method", "fisher"], 2, "--steps needs --method signed"),
        (["--method", "signed", "--back-off", "0.1"], 2, "never backs off"),
        (["--alpha", "2"], 2, "--alpha, --missing and --nonfinite cannot be used with"),
        (["--step", "0"], 2, "--step: 0; must be from 0.001"),
        (["--method", "signed-hold"], 2, "needs --stop-probability P or --stop-forget L"),
        (["--stop-probability", "1"], 2, "--stop-probability: 1; must be between 0 and 1"),
        (["--steps", "1,2", "--method", "signed-hold"], 2, "takes one number of steps"),
        (["--steps", "1,2", "--retain-batch", "2"], 2, "takes one number of steps"),
        (["--steps", "2,1,2"], 2, "--steps: 2 is given twice"),
        (["--steps", "2,"], 2, "--steps:  is not a whole number"),
        (["--steps", "1,1001"], 2, "--steps: must be from 1 to 1000"),
        (["--include", "nothing"], 2, "leave no tensor to edit"),
        (["--data-forget", "bad.jsonl"], 3, "bad.jsonl: line 2: token id"),
        (["--tuned", "other"], 3, "no tensor model.norm.weight"),
        (["--base", "nan"], 3, "tensor model.norm.weight, element 0"),
    ],
)
def test_what_makes_no_sense_is_refused(perta, tmp_path, flags, code, message):
    make_folders(tmp_path)
    write_lines(tmp_path / "bad.jsonl", [{"input_ids": [1, 2]}, {"input_ids": [1, VOCABULARY]}])
    for name in ("other", "nan"):
        shutil.copytree(tmp_path / "full", tmp_path / name)
    for path in [*tmp_path.glob("other/*.safetensors"), *tmp_path.glob("nan/*.safetensors")]:
        tensors = load_file(path)
        if "model.norm.weight" not in tensors:
            continue
        if path.parent.name == "other":
            del tensors["model.norm.weight"]
        else:
            tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    (tmp_path / "other/model.safetensors.index.json").unlink(missing_ok=True)
    assert message in perta(*STEPS, "2", *flags, check=code).stderr
    assert not list(tmp_path.glob("patch*"))


def test_a_bad_number_that_only_the_patch_reads(perta, tmp_path):
    """In a row of the embedding that no sample uses. Steps have no --nonfinite to recommend."""
    make_folders(tmp_path, "qwen3")
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if "embed" in key:
                tensors[key][VOCABULARY - 1, 0] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    error = perta(*STEPS, "1", check=3).stderr
    assert "embed_tokens.weight, element" in error and "not a finite number" in error
    assert "--nonfinite" not in error


def test_options_of_steps_need_steps(perta):
    words = "unlearn --model full --tuned tuned --base base --patch patch".split()
    for flags in (["--step", "0.4"], ["--method", "signed"], ["--data-forget", "x"]):
        assert "need --steps K" in perta(*words, *flags, check=2).stderr
