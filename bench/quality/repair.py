"""Does training on retain after an edit give back what the edit lost, without bringing back what
was forgotten? `perta tune` on the edited model, with the retain samples that the edit was shown.

    python bench/quality/repair.py BUILD WORKDIR [--model small] [--seeds 1,2,3]

Takes the models that run.py made, and writes MODEL-repair.json and .md to --results.
"""

import argparse
import json
import statistics
from pathlib import Path

import curves
import methods
import train

EDITS = ("own gradient", "tv", "own gradient, half")
RATES = {"small": (3e-3, 1e-2), "tiny": (3e-3, 1e-2), "smollm2": (1e-4, 1e-3)}
ASKED = ("forget", "retain", "held_out", "other")


def trainings(model: str) -> list[tuple[int, float, int]]:
    """Rank, learning rate and updates."""
    low, high = RATES[model]
    return [*((8, rate, n) for rate in (low, high) for n in (4, 8, 16)), (4, high, 8)]


def edit(b: curves.Bench, name: str, spec: train.Spec, gold: float) -> None:
    """Leaves the patch that forgets as much as gold (or half of what gold knows) in WORK/patch."""
    level = methods.FORGOTTEN * gold if name.endswith("half") else gold
    if name == "tv":
        for point in methods.one_step(b, name, spec, 0):
            if point["forget"] <= level:
                return
        raise RuntimeError(f"tv does not reach {level}")
    flags = methods.words_of(b, name.split(", ")[0], [])
    b.run(*flags, "--steps", spec.held_steps, "--stop-probability", level, "--patch", "patch")


def repairs(b: curves.Bench, model: str) -> list[dict]:
    spec, rows = train.SPECS[model], []
    for rank, rate, updates in trainings(model):
        b.run("tune", "--model", "edited", "--data", "retain.jsonl", "--target-modules",
              "all-linear", "--rank", rank, "--learning-rate", rate, "--steps", updates,
              "--batch-size", 32, "--compute", spec.compute, "--out", "repair",
              "--force")  # fmt: skip
        of = {"rank": rank, "rate": rate, "updates": updates}
        rows.append(of | b.ask("edited", "--adapter", "repair"))
    return rows


def one_seed(b: curves.Bench, model: str, seed: dict, done) -> None:
    b.write_data()
    spec = train.SPECS[model]
    for name in ("full", "gold"):
        seed[name] = seed.get(name) or b.ask(name)
    for name in EDITS:
        if name not in seed:
            edit(b, name, spec, seed["gold"]["forget"])
            b.run("apply", "full", "patch", "--out", "edited", "--force")
            seed[name] = [{"updates": 0} | b.ask("edited"), *repairs(b, model)]
            done()


def mean(rows: list[dict]) -> str:
    return " | ".join(f"{statistics.mean(row[key] for row in rows):.3f}" for key in ASKED)


def text(seeds: list[dict]) -> str:
    lines = [f"Mean of {len(seeds)} seeds.", "",
             "| after | rank | rate | updates | forget | retain shown | held out | other |",
             "|---" * 8 + "|"]  # fmt: skip
    for name in ("full", "gold"):
        lines.append(f"| {name} | | | | {mean([seed[name] for seed in seeds])} |")
    for name in EDITS:
        of = [seed[name] for seed in seeds if name in seed]
        for rows in zip(*of, strict=True):
            how = " | ".join(str(rows[0].get(key, "")) for key in ("rank", "rate", "updates"))
            lines.append(f"| {name} | {how} | {mean(rows)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--model", choices=RATES, default="small")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--tofu", type=Path, help="the TOFU benchmark's JSON lines, for smollm2")
    parser.add_argument("--results", type=Path,
                        default=Path(__file__).parents[1] / "results/quality")  # fmt: skip
    a = parser.parse_args()
    path = a.results / f"{a.model}-repair.json"
    seeds = json.loads(path.read_text()) if path.exists() else {}

    def done() -> None:
        path.write_text(json.dumps(seeds, indent=1) + "\n")

    for number in a.seeds.split(","):
        work = a.workdir.resolve() / f"{a.model}-{number}"
        parts = train.make_models(a.model, int(number), work, a.tofu)
        bench = curves.Bench(a.build.resolve() / "perta", work, parts, train.SPECS[a.model].compute)
        one_seed(bench, a.model, seeds.setdefault(number, {}), done)
    (a.results / f"{a.model}-repair.md").write_text(text(list(seeds.values())))


if __name__ == "__main__":
    main()
