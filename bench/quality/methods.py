"""The methods: each yields the points of its curve, from little forgetting to much."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import rivals
import torch
import train
from curves import Bench
from safetensors.torch import load_file, save_file

# name: (flags of perta unlearn, statistic, the model where gradients are taken, mask)
ONE_STEP = {
    "tv": (["--method", "tv"], None, None, False),
    "constant": (["--method", "constant", "--weight", "0.5"], None, None, False),
    "random": (["--method", "random", "--seed", "1"], None, None, False),
    "grad, base": (["--method", "grad"], "mean", "base", False),
    "grad, full": (["--method", "grad"], "mean", "full", False),
    "fisher, base": (["--method", "fisher"], "mean", "base", False),
    "fisher, full": (["--method", "fisher"], "mean", "full", False),
    "fisher per sample, base": (["--method", "fisher"], "meansq", "base", False),
    "fisher per sample, full": (["--method", "fisher"], "meansq", "full", False),
    "tv, conflict-aware": (["--method", "tv"], None, "full", True),
    "grad, full, conflict-aware": (["--method", "grad"], "mean", "full", True),
}
FORGOTTEN = 0.5  # a curve ends below this share of the gold model's forget level


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for f in sorted(folder.glob("*.safetensors")) for k, x in load_file(f).items()}


def put_tensors(model: Path, tensors: dict[str, torch.Tensor], out: Path) -> None:
    """A copy of the folder with these weights, in one shard."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({k: x.contiguous() for k, x in tensors.items()}, out / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def importance(b: Bench, at: str) -> None:
    for part in ("forget", "retain"):
        out = b.work / f"importance-{at}/{part}"
        if not out.exists():
            b.run("estimate", "--model", at, "--data", f"{part}.jsonl", "--out", out,
                  "--stat", "mean,meansq", "--compute", b.compute)  # fmt: skip


def masked(b: Bench, at: str) -> str:
    """tuned, set back to base where moving along base - tuned raises the retain loss."""
    if not (b.work / "masked").exists():
        tuned, base = tensors_of(b.work / "tuned"), tensors_of(b.work / "base")
        g = tensors_of(b.work / f"importance-{at}/retain/mean")
        kept = {k: torch.where(g[k] * (x.float() - base[k].float()) < 0, base[k], x)
                for k, x in tuned.items()}  # fmt: skip
        put_tensors(b.work / "tuned", kept, b.work / "masked")
    return "masked"


def one_step_words(b: Bench, name: str) -> list[str]:
    """The command without --alpha and --patch. Computes the importance, unless it is there."""
    flags, stat, at, mask = ONE_STEP[name]
    if at:
        importance(b, at)
    if stat:
        for part in ("forget", "retain"):
            flags = [*flags, f"--{part}", f"importance-{at}/{part}/{stat}"]
    tuned = masked(b, at) if mask else "tuned"
    return ["unlearn", "--model", "full", "--tuned", tuned, "--base", "base", *flags]


def one_step(b: Bench, name: str, spec: train.Spec, enough: float) -> Iterator[dict]:
    words, evaluations = one_step_words(b, name), 1 if ONE_STEP[name][2] else 0
    alpha = 0.125
    while alpha <= spec.max_alpha:
        patch = b.work / "patch"
        b.run(*words, "--alpha", f"{alpha:.5g}", "--patch", patch, "--force")
        point = b.point(alpha, evaluations, "full", patch)
        yield point
        if point["forget"] < enough:
            return
        alpha *= spec.alpha_ratio


STEPS = ("signed", "signed-backoff")
HELD = "signed-hold"
OWN, LORA = "own gradient", "tuned by LoRA"  # signed-hold with another task vector
TUNE = ("rank", "learning-rate", "epochs", "batch-size")  # options of perta tune


def options_of(name: str) -> tuple[str, dict[str, str]]:
    """Options follow the name of the method: "signed-backoff, step 0.2, back-off 0.4"."""
    method, *options = name.split(", ")
    return method, dict(option.split() for option in options)


def flags_of(options: dict[str, str]) -> list[str]:
    return [word for option, value in options.items() for word in (f"--{option}", value)]


def adapter(b: Bench, spec: train.Spec, options: dict[str, str]) -> tuple[str, int]:
    """full tuned on the forget set, as a LoRA of all linear modules; kept. Returns its folder and
    the number of epochs."""
    chosen = dict(zip(TUNE, map(str, spec.lora), strict=True)) | options
    folder = "-".join(["lora", *chosen.values()])
    if not (b.work / folder).exists():
        b.run("tune", "--model", "full", "--data", "forget.jsonl", "--target-modules", "all-linear",
              *flags_of(chosen), "--compute", b.compute, "--out", folder)  # fmt: skip
    return folder, int(chosen["epochs"])


def task_vector(b: Bench, name: str, spec: train.Spec) -> tuple[list[str], float]:
    """Where steps get it from, as flags, and its cost in gradients of both sets."""
    method, options = options_of(name)
    if method == OWN:
        return [], 0
    if method == LORA:
        of_tune = {key: value for key, value in options.items() if key in TUNE}
        folder, epochs = adapter(b, spec, of_tune)
        return ["--tuned", folder], epochs / 2  # the forget set's gradient alone
    return ["--tuned", "tuned", "--base", "base"], 0


def words_of(b: Bench, name: str, tau: list[str]) -> list[str]:
    method, options = options_of(name)
    flags = flags_of({key: value for key, value in options.items() if key not in TUNE})
    rule = HELD if method in (OWN, LORA) else method
    return ["unlearn", "--model", "full", *tau, "--method", rule, *flags, "--data-forget",
            "forget.jsonl", "--data-retain", "retain.jsonl", "--compute", b.compute,
            "--force"]  # fmt: skip


def gradients(path: list[dict], level: float) -> float:
    """What a run of signed-hold computed, in gradients of both sets: at every point but the last
    that of retain, and that of forget where more than level is known."""
    before = path[:-1]
    return (len(before) + sum(point["forget_probability"] > level for point in before)) / 2


def held(b: Bench, name: str, spec: train.Spec, gold: float) -> Iterator[dict]:
    """One point for each run, which holds the gold model's forget level, or half of it."""
    patch, n = b.work / "patch", options_of(name)[1].get("steps", spec.held_steps)
    tau, cost = task_vector(b, name, spec)
    for level in (gold, FORGOTTEN * gold):
        run = b.run(*words_of(b, name, tau), "--steps", n, "--stop-probability", level,
                    "--patch", patch)  # fmt: skip
        yield b.point(level, cost + gradients(run["path"], level), "full", patch)


def steps(b: Bench, name: str, spec: train.Spec, enough: float) -> Iterator[dict]:
    """One point for each step, all of one run, which is ended when it has gone far enough."""
    every = ",".join(str(k + 1) for k in range(spec.max_steps))
    patches = b.work / "patches"
    shutil.rmtree(patches, ignore_errors=True)
    words = words_of(b, name, task_vector(b, name, spec)[0])
    with b.started(*words, "--steps", every, "--patch", patches) as is_going:
        for k in range(1, spec.max_steps + 1):
            patch = patches / f"step-{k}"
            while not patch.exists() and is_going():
                time.sleep(0.05)
            point = b.point(k, k, "full", patch)
            yield point
            if point["forget"] < enough:
                return


def put_model(b: Bench, model, spec: train.Spec) -> None:
    """Leaves a model that was trained from full in WORK/out, in the dtype of checkpoints."""
    now = {k: x.detach().to(spec.dtype) for k, x in model.named_parameters()}
    put_tensors(b.work / "full", now, b.work / "out")


def rate_of(name: str, spec: train.Spec) -> float:
    """"NPO + retain, rate 1e-4" uses another learning rate than spec's."""
    return float(options_of(name)[1].get("rate", spec.reference_rate))


def trained(b: Bench, name: str, spec: train.Spec, enough: float) -> Iterator[dict]:
    """A point for every second update."""
    for step, model, _ in rivals.updates(b, options_of(name)[0], rate_of(name, spec), spec):
        if not step or step % 2:
            continue
        put_model(b, model, spec)
        point = b.point(step, step, "out")
        yield point
        if point["forget"] < enough:
            return


def curve(b: Bench, name: str, spec: train.Spec, gold: float) -> Iterator[dict]:
    """gold is the gold model's forget level; the curve continues some way below it."""
    method = name.split(", ")[0]
    if name in ONE_STEP:
        yield from one_step(b, name, spec, FORGOTTEN * gold)
    elif method in (HELD, OWN, LORA):
        yield from held(b, name, spec, gold)
    else:
        kind = trained if method in rivals.NAMES else steps
        yield from kind(b, name, spec, FORGOTTEN * gold)


NAMES = (*ONE_STEP, *STEPS, HELD, OWN, LORA, *rivals.NAMES)
