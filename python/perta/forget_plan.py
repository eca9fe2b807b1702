"""What a run of `perta forget` will take, from a short measurement: --dry-run. Spec:
docs/forget.md, "What it takes"."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from perta.children import duration
from perta.command import SYSTEM, Problem, say
from perta.forget_sets import Sets
from perta.long_run import json_lines
from perta.samples import Sample

MEASURED_TOKENS = 512  # of the larger of the two measurements
QUICK = 5.0  # seconds: a measurement that is as quick is repeated, with the files in the page cache

# Bytes for each parameter and step beside the model's: both gradients (float32) are written and
# read, scales (bfloat16) read and written, and scales and the box's signs read with each weight.
STATE_READ, STATE_WRITTEN = 2 * 4 + 2 + 1 + 2 * 2 * 3, 2 * 4 + 2
STATE_KEPT = 17  # docs/steps.md: signed-hold with a box
UPDATES = 5  # docs/steps.md: --reteach-updates
START = 0.06  # seconds of a pass that are neither reading nor arithmetic
STATE_RATE = 1e9  # bytes a second, at most: it is synced to the disk


def measured(forget: Any, samples: list[Sample], folder: Path) -> float:
    """Seconds that `perta eval` takes for these samples."""
    path = folder / "sample.jsonl"
    path.write_text(json_lines(sample.line() for sample in samples), encoding="utf-8")
    words = ["eval", "--model", str(forget.a.model), "--data", str(path), "--scratch", str(folder), *forget.how()]
    seconds = []
    while not seconds or (len(seconds) < 2 and seconds[0] < QUICK):
        _, result = forget.children.run(words, say=forget.passed_on)
        seconds.append(result["seconds"])
    return min(seconds)


def rates(run: Any, samples: list[Sample], model_bytes: int) -> tuple[float, float, float]:
    """Seconds to read the model once, of each token in a forward pass, and of each byte of state:
    from one sample, and from several."""
    samples = sorted(samples, key=lambda sample: len(sample.ids))
    few, more = samples[:1], []
    for sample in samples:
        if sum(len(one.ids) for one in more) < MEASURED_TOKENS:
            more.append(sample)
    with tempfile.TemporaryDirectory(prefix=f"perta-{run.verb}-") as folder:
        first, second = (measured(run, part, Path(folder)) for part in (few, more))
    n_few, n_more = (sum(len(one.ids) for one in part) for part in (few, more))
    token = max(0.0, (second - first) / (n_more - n_few)) if n_more > n_few else 0.0
    reading = max(0.0, first - START - token * n_few)
    return reading, token, max(reading / model_bytes, 1 / STATE_RATE)


def inspected(forget: Any) -> tuple[int, int]:
    """Parameters and bytes of the model."""
    words = ["inspect", str(forget.a.model)]
    _, result = forget.children.run(words, say=forget.passed_on)
    return result["parameters"], result["bytes"]


def figures(forget: Any, sets: Sets) -> dict[str, Any]:
    a = forget.a
    parameters, model_bytes = inspected(forget)
    reading, token, state = rates(forget, sets.forget + sets.retain, model_bytes)
    tokens = {name: sets.tokens(name) for name in sets.named()}
    asked = 2 * sum(tokens.values()) + (tokens["forget"] if a.base else 0)
    share = min(1.0, sets.retain_batch() / len(sets.retain))  # of the retain set, in a step's gradients
    learned = a.steps * (tokens["forget"] + share * tokens["retain"])
    evals = 2 + (a.base is not None) + 2  # before, after; --base; both sets at the last point
    if share < 1:  # the whole set is asked wherever enough is forgotten: half of the points, say
        asked += a.steps / 2 * tokens["retain"]
        evals += a.steps / 2
    survive = a.survive.split(",") if a.survive else []
    asked += a.steps * len(survive) * tokens["forget"]
    evals += a.steps * len(survive)
    gradients = 2 * a.steps  # each reads the model twice, and computes four times as much
    if "reteach" in survive:  # docs/steps.md: so many updates over a quarter of the forget set
        gradients += UPDATES * a.steps
        learned += UPDATES * a.steps * tokens["forget"] / 4
    state_read, state_written = (n * parameters * a.steps for n in (STATE_READ, STATE_WRITTEN))
    seconds = (
        (evals + gradients) * START + (evals + 2 * gradients) * reading
        + (state_read + state_written) * state + (asked + 4 * learned) * token
    )  # fmt: skip
    return {
        "dry_run": True, "parameters": parameters, "model_bytes": model_bytes,
        "tokens": tokens, "steps": a.steps, "read_bytes": model_bytes * (evals + 2 * gradients) + state_read,
        "written_bytes": state_written,
        "flop": 2 * parameters * (asked + 4 * learned), "seconds": seconds,
        "read_bytes_per_second": model_bytes / reading if reading else None,
        "tokens_per_second": 1 / token if token else None,
        "disk_bytes": STATE_KEPT * parameters + model_bytes,
        "disk_free_bytes": shutil.disk_usage(forget.folder.out.parent).free,
        "memory": a.memory or "1G", "notes": forget.notes,
    }  # fmt: skip


def size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""


def speed(f: dict[str, Any]) -> dict[str, str]:
    """The first rows of the table."""
    read, tokens = f["read_bytes_per_second"], f["tokens_per_second"]
    rates = [f"{size(read)}/s read"] if read else []
    rates += [f"{tokens:.0f} tokens/s forward"] if tokens else []
    return {
        "time": f"about {duration(f['seconds'])} (half or twice as much is possible)",
        "measured": ", ".join(rates) or "too quick to measure",
    }


def rows(f: dict[str, Any]) -> list[str]:
    """The table."""
    found = speed(f) | {
        "reads": size(f["read_bytes"]),
        "writes": f"{size(f['written_bytes'])} (gradients and scales of {f['steps']} steps)",
        "arithmetic": f"{f['flop']:.1e} FLOP",
        "disk": f"up to {size(f['disk_bytes'])} while it runs; {size(f['disk_free_bytes'])} free",
        "memory": f"{f['memory']} (--memory), and about 100 MB for Python",
    }
    return [f"{name:11} {text}" for name, text in found.items()]


def plan(forget: Any, sets: Sets) -> int:
    """Measure, print the table, and write nothing."""
    f = figures(forget, sets)
    if forget.a.json:
        print(json.dumps(f, indent=1))
    forget.say("\n".join(rows(f)))
    forget.say("dry run: nothing was written")
    if f["disk_bytes"] > f["disk_free_bytes"]:
        raise Problem(f"{forget.folder.out.parent}: {size(f['disk_bytes'])} may be needed, "
                      f"{size(f['disk_free_bytes'])} are free", SYSTEM)  # fmt: skip
    if sum(f["tokens"].values()) and f["seconds"] > 30 * 86400:
        say("forget", "note: this would take more than a month; fewer samples or steps take less")
    return 0
