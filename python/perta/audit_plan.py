"""What a run of `perta audit` will take, from a short measurement. Spec: docs/audit.md, "What it
takes"."""

import json
from typing import Any

from perta.children import duration
from perta.forget_plan import START, inspected, rates, size, speed
from perta.samples import Sample


def figures(audit: Any) -> dict[str, Any]:
    parameters, model_bytes = inspected(audit)
    lines = [value for name in audit.asked() for value in audit.sets[name].values]
    samples = [Sample(value["input_ids"], value.get("labels", value["input_ids"])) for value in lines]
    reading, token, _ = rates(audit, samples, model_bytes)
    parts = audit.parts()
    trainings = [part.training for part in parts if part.training]
    updates = sum(t.updates for t in trainings)
    passes = len(parts) + 2 * updates  # over the model's weights: an update reads them twice
    work = sum(audit.stages().values())
    return {
        "dry_run": True, "parameters": parameters, "model_bytes": model_bytes,
        "asked": len(parts), "trainings": len(trainings), "updates": updates,
        "read_bytes": model_bytes * passes, "flop": 2 * parameters * work,
        "seconds": (len(parts) + len(trainings)) * START + passes * reading + work * token,
        "read_bytes_per_second": model_bytes / reading if reading else None,
        "tokens_per_second": 1 / token if token else None,
        "memory": audit.a.memory or "1G", "notes": audit.notes,
    }  # fmt: skip


def said(audit: Any) -> str:
    f = figures(audit)
    return (f"{f['asked']} times a model is asked, {f['trainings']} of them after a training, of {f['updates']} updates in "
            f"all: about {duration(f['seconds'])}")  # fmt: skip


def rows(f: dict[str, Any]) -> list[str]:
    """The table."""
    found = speed(f) | {
        "asks": f"{f['asked']} times a model, {f['trainings']} of them after a training",
        "trains": f"{f['updates']} updates in all",
        "reads": size(f["read_bytes"]),
        "arithmetic": f"{f['flop']:.1e} FLOP",
        "memory": f"{f['memory']} (--memory), and about 50 MB for Python",
    }
    return [f"{name:11} {text}" for name, text in found.items()]


def plan(audit: Any) -> int:
    """Measure, print the table, and write nothing."""
    f = figures(audit)
    if audit.a.json:
        print(json.dumps(f, indent=1))
    audit.say("\n".join(rows(f)))
    audit.say("dry run: nothing was written")
    return 0
