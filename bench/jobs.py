"""perta's jobs compared with the disk and with other programs; how time grows with size."""

import json
import statistics
from pathlib import Path

import measure
import models
from measure import Figures

MEMORY = "256M"

# PerTA as one would write it with PyTorch: shard by shard, tensor by tensor, with mapped files.
PYTORCH = """
import json, os, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
folders, out = sys.argv[1:6], sys.argv[6]
os.makedirs(out)
index = json.load(open(folders[0] + "/model.safetensors.index.json"))["weight_map"]
where = [json.load(open(f + "/model.safetensors.index.json"))["weight_map"] for f in folders]
for shard in sorted(set(index.values())):
    made = {}
    for name in (n for n, s in index.items() if s == shard):
        t = []
        for folder, of in zip(folders, where):
            with safe_open(folder + "/" + of[name], "pt") as file:
                t.append(file.get_tensor(name).float())
        model, tuned, base, forget, retain = t
        w = 1 / (1 + retain.abs() / forget.abs())
        w = torch.where(forget == 0, 0, w)
        made[name] = (model - w * (tuned - base)).bfloat16()
    save_file(made, out + "/" + shard, {"format": "pt"})
"""


class Set:
    """The folders of one set of models."""

    def __init__(self, work: Path, perta: Path) -> None:
        self.work, self.perta = work, perta
        self.inputs = {kind: work / kind for kind in models.KINDS}
        self.patch, self.out, self.back = work / "patch", work / "out", work / "back"

    def folders(self, *kinds: str) -> list[Path]:
        return [self.inputs[kind] for kind in kinds or models.KINDS]

    def unlearn(self, *flags: object, method: str = "grad") -> list:
        kinds = models.KINDS[:3] if method == "tv" else models.KINDS
        command = [self.perta, "unlearn", "--memory", MEMORY, "--quiet", "--method", method]
        for kind in kinds:
            command += [f"--{kind}", self.inputs[kind]]
        return [*command, *flags]

    def other(self, verb: str, *rest: object) -> list:
        return [self.perta, verb, "--memory", MEMORY, "--quiet", *rest]


Job = tuple[str, list, list[Path], list[Path]]  # name, command, folders read, folders made


def jobs_of(s: Set) -> list[Job]:
    everything, model = s.folders(), s.inputs["model"]
    return [
        ("unlearn", s.unlearn("--patch", s.patch), everything, [s.patch]),
        ("unlearn --out", s.unlearn("--patch", s.patch, "--out", s.out), everything,
         [s.patch, s.out]),
        *verifications(s),
        ("apply", s.other("apply", model, s.patch, "--out", s.back), [model, s.patch], [s.back]),
        ("revert", s.other("revert", s.out, s.patch, "--out", s.back), [s.out, s.patch],
         [s.back]),
    ]  # fmt: skip


def against_disk(s: Set, rounds: int) -> list[dict]:
    """Each job in turn with fio, which reads the same files and writes as many bytes."""
    results: dict[str, list[dict]] = {}
    for round_ in range(rounds + 1):  # the first makes inputs of others and does not count
        for name, command, reads, makes in jobs_of(s):
            job = measure.cold(command, makes)
            cached = measure.cached_bytes(*reads, *makes)
            read, written = measure.bytes_of(*reads), measure.bytes_of(*makes)
            disk = measure.fio(reads, written, s.work / "fio.bin")
            if round_:
                results.setdefault(name, []).append({
                    "read": read, "written": written, "seconds": job.seconds,
                    "cpu": job.cpu_seconds, "peak_mib": job.peak_mib, "cached": cached,
                    "fio_seconds": disk,
                    "of_fio": disk / job.seconds})  # fmt: skip
    return [{"job": name, "runs": runs} for name, runs in results.items()]


def verifications(s: Set) -> list[Job]:
    model = s.inputs["model"]
    return [
        ("verify PATCH (SHA-256)", s.other("verify", s.patch), [s.patch], []),
        ("verify MODEL --manifest (SHA-256, XXH3)",
         s.other("verify", model, "--manifest", sums(s, True)), [model], []),
        ("verify MODEL --manifest (XXH3)",
         s.other("verify", model, "--manifest", sums(s, False)), [model], []),
        ("verify MODEL --patch --applied",
         s.other("verify", s.out, "--patch", s.patch, "--applied"), [s.out], []),
    ]  # fmt: skip


def sums(s: Set, with_sha256: bool) -> Path:
    """The manifest of the model, made if it does not exist."""
    to = s.work / f"sums-{'sha256' if with_sha256 else 'xxh3'}.json"
    if not to.exists():
        manifest = json.loads(measure.run(s.other("manifest", s.inputs["model"])).output)
        for file in [] if with_sha256 else manifest["files"]:
            del file["sha256"]
        to.write_text(json.dumps(manifest))
    return to


def warm_verify(s: Set, rounds: int) -> dict[str, list[float]]:
    """GB/s of each kind of verify when its inputs are in the page cache."""
    rates: dict[str, list[float]] = {}
    for name, command, (folder,), _ in verifications(s):
        for f in folder.iterdir():
            with f.open("rb") as file:
                while file.read(1 << 24):
                    pass
        size = measure.bytes_of(folder)
        rates[name] = [size / 1e9 / measure.run(command).seconds for _ in range(rounds)]
    return rates


def mergekit_config(s: Set, to: Path) -> Path:
    """theta - (tuned - base), as task arithmetic over base: 1 * (theta - base) - (tuned - base)."""
    models_ = [{"model": str(s.inputs["model"]), "parameters": {"weight": 1.0}},
               {"model": str(s.inputs["tuned"]), "parameters": {"weight": -1.0}}]  # fmt: skip
    config = {"merge_method": "task_arithmetic", "base_model": str(s.inputs["base"]),
              "models": models_, "dtype": "bfloat16"}  # fmt: skip
    to.write_text(json.dumps(config))
    return to


def against_peers(s: Set, rounds: int, mergekit: Path | None, python: Path | None) -> list[dict]:
    """perta and the other program in turn, each making the whole new model, from a cold cache."""
    pairs: list[tuple[str, list, list]] = []
    other = s.work / "other"
    if mergekit:
        command = [mergekit, mergekit_config(s, s.work / "mergekit.yaml"), other, "--quiet",
                   "--lazy-unpickle", "--async-write", "--no-copy-tokenizer",
                   "--no-write-model-card", "--out-shard-size", "1B"]  # fmt: skip
        ours = s.unlearn("--patch", s.patch, "--out", s.out, method="tv")
        pairs.append(("mergekit task_arithmetic", command, ours))
    if python:
        order = [s.inputs[kind] for kind in ("model", "tuned", "base", "forget", "retain")]
        pairs.append(("PyTorch script for PerTA", [python, "-c", PYTORCH, *order, other],
                      s.unlearn("--patch", s.patch, "--out", s.out)))  # fmt: skip
    table = []
    for name, theirs, ours in pairs:
        runs = []
        for _ in range(rounds):
            a = measure.cold(ours, [s.patch, s.out])
            b = measure.cold(theirs, [other])
            runs.append({"perta": vars(a) | {"output": ""}, "other": vars(b) | {"output": ""}})
        measure.cold(["true"], [other])
        table.append({"other": name, "runs": runs})
    return table


def growth(perta: Path, work: Path, n_parameters: int, rounds: int) -> dict:
    """Seconds against bytes, from a quarter of the parameters to ten times as many; and against
    the number of tensors with a constant total."""
    sizes, counts = [], []
    for n in (1, 4, 10, 40):
        shapes = {f"t{i}": (n_parameters // 4,) for i in range(n)}
        sizes.append(timed(perta, work, shapes, rounds))
    for n in (10, 1000, 100_000):
        each = n_parameters // 8 // n
        if each:
            counts.append(timed(perta, work, {f"t{i:06}": (each,) for i in range(n)}, rounds))
    return {"sizes": sizes, "tensors": counts, "fit": fit(sizes)}


def timed(perta: Path, work: Path, shapes: models.Shapes, rounds: int) -> dict:
    measure.cold(["true"], [work])
    models.write(work, shapes)
    s = Set(work, perta)
    runs: list[Figures] = [measure.cold(s.unlearn("--patch", s.patch), [s.patch])
                           for _ in range(rounds)]  # fmt: skip
    size = measure.bytes_of(*s.folders())
    measure.cold(["true"], [work])
    return {"tensors": len(shapes), "read": size, "seconds": sorted(r.seconds for r in runs),
            "peak_mib": max(r.peak_mib for r in runs)}  # fmt: skip


def fit(points: list[dict]) -> dict:
    """Least squares of median seconds = a + b * GB, and the largest deviation."""
    x = [p["read"] / 1e9 for p in points]
    y = [statistics.median(p["seconds"]) for p in points]
    line = statistics.linear_regression(x, y)
    worst = max(abs(line.intercept + line.slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"seconds": line.intercept, "seconds_per_gb": line.slope, "worst": worst}
