"""Does it last: each method forgets as much as the gold model does not know; then the model is
rounded to fewer bits, and taught a quarter of the forgotten samples again.

    python bench/quality/lasting.py BUILD WORKDIR --model small|verbatim|tofu01 [--seeds 1,2,3]
        [--tofu DIR] [--methods "tv;own gradient"] [--only edit,measure,teach]

Takes the models that run.py makes, and makes them if they are not there. Writes MODEL.json and
MODEL.md to bench/results/quality-lasting/, part by part; what is there already is not done again.
`--again "own gradient"` removes a method's rows first. docs/quality-figures.md explains the figures.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import curves
import lasting_page
import methods
import reteach
import rivals
import torch
import train

FORMATS = ("nf4", "int8", "int4", "q4_0", "fp8")
MEASURES = ("probability", "exact_memorization", "extraction_strength")
RATES = {"small": (1e-4, 3e-4, 1e-3), "large": (1e-5, 2e-5, 5e-5)}  # of the rivals, but these:
OTHER_RATES = {"SimNPO + retain": {"small": (3e-5, 1e-4, 3e-4)},
               rivals.RMU: {"small": (3e-3, 1e-2), "large": (1e-3, 3e-3)}}  # fmt: skip
SURVIVE = f"{methods.OWN}, survive nf4,int4,reteach, steps 30"
FACTOR = "reteach-factor"
AS_GOLD = f"{methods.OWN}, survive reteach, {FACTOR} gold, steps 24"
NAMES = ("tv", "grad, base", "fisher, base", *rivals.NAMES, methods.HELD, methods.OWN, SURVIVE, AS_GOLD)
STEPS = ("edit", "measure", "teach")


def forget_probability(b: curves.Bench, *how: object) -> float:
    return b.run("eval", "--data", "forget.jsonl", "--compute", b.compute, *how)["probability"]


def by_alpha(b: curves.Bench, name: str, spec: train.Spec, gold: float, patch: Path) -> dict:
    """The smallest α that forgets enough, to 1/50: from the grid of the curves, and by halving."""
    words = methods.one_step_words(b, name)

    def left(alpha: float) -> float:
        b.run(*words, "--alpha", f"{alpha:.5g}", "--patch", patch, "--force")
        return forget_probability(b, "--model", "full", "--patch", patch)

    low, high = 0.0, 0.125
    while left(high) > gold:
        low, high = high, high * spec.alpha_ratio
        if high > spec.max_alpha:
            return {"reached": False, "x": low}
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= gold else (middle, high)
    left(high)
    return {"reached": True, "x": high}


def with_factor(name: str, gold: dict) -> str:
    """"reteach-factor gold": what is not taught may be known as well as by gold at most, after any
    attack."""
    most = max((p for of in gold.get("taught", {}).values() for p in reteach.rest_of(of)), default=0)
    return name.replace(f"{FACTOR} gold", f"{FACTOR} {most / gold['asked']['forget']:.3g}")


def by_rule(b: curves.Bench, name: str, spec: train.Spec, gold: float, patch: Path) -> dict:
    tau = methods.task_vector(b, name, spec)[0]
    steps = [] if "steps" in methods.options_of(name)[1] else ["--steps", spec.held_steps]
    run = b.run(*methods.words_of(b, name, tau), *steps, "--stop-probability", gold, "--patch", patch)
    return {"reached": run["reached"], "x": run["chosen"], "path": run["path"]}


def by_training(b: curves.Bench, name: str, spec: train.Spec, gold: float, to: Path) -> dict:
    """The first model of the training that forgets enough, as it is on disk; or how little was known
    at least."""
    done, least = 0, 1.0
    for done, model, known in rivals.updates(b, methods.options_of(name)[0], methods.rate_of(name, spec), spec):
        least = min(least, known)
        if known > 1.02 * gold:
            continue
        methods.put_model(b, model, spec)
        if forget_probability(b, "--model", "out") <= gold:
            shutil.rmtree(to, ignore_errors=True)
            (b.work / "out").rename(to)
            return {"reached": True, "x": done}
    return {"reached": False, "x": done, "least": least}


def edit(b: curves.Bench, name: str, spec: train.Spec, of_gold: dict) -> dict:
    """Leaves WORK/edits/NAME: a patch of full, or a model (is_model)."""
    to, started, gold = b.work / "edits" / name, time.monotonic(), of_gold["asked"]["forget"]
    to.parent.mkdir(exist_ok=True)
    method = name.split(", ")[0]
    if name in methods.ONE_STEP:
        row = by_alpha(b, name, spec, gold, to)
    elif method in rivals.NAMES:
        row = by_training(b, name, spec, gold, to) | {"is_model": True}
    else:
        row = by_rule(b, with_factor(name, of_gold), spec, gold, to)
    return row | {"seconds": time.monotonic() - started}


def how_to_read(b: curves.Bench, name: str, row: dict) -> tuple[str, list]:
    """The model and flags with which perta reads an edit, or one of the models."""
    if name in ("base", *train.MODELS):
        return name, []
    path = b.work / "edits" / name
    return (str(path), []) if row.get("is_model") else ("full", ["--patch", path])


def measure(b: curves.Bench, name: str, row: dict) -> None:
    model, flags = how_to_read(b, name, row)
    for part in ("forget", "held_out"):
        run = b.run("eval", "--model", model, *flags, "--data", f"{part}.jsonl", "--compute", b.compute)
        row.setdefault("measures", {})[part] = {key: run.get(key) for key in MEASURES}
    for kind in FORMATS:
        row.setdefault("rounded", {})[kind] = forget_probability(
            b, "--model", model, *flags, "--quantize", kind
        )


def teach(b: curves.Bench, name: str, row: dict, draws: int, spec: train.Spec, done) -> None:
    model, flags = how_to_read(b, name, row)
    have = row.setdefault("taught", {})
    if all(len(have.get(str(a), [])) >= draws for a in reteach.SIZES[reteach.size_of(spec)].attacks):
        return
    with tempfile.TemporaryDirectory(dir=b.work) as folder:
        if flags:
            b.run("apply", "full", flags[1], "--out", f"{folder}/edited")
            model = f"{folder}/edited"
        start = train.load(b.work / model)
    reteach.curves(start, b.parts.forget, draws, spec, have, done)


def rated(name: str, spec: train.Spec) -> list[str]:
    """A rival without a rate is tried at several."""
    if name not in rivals.NAMES:
        return [name]
    size = reteach.size_of(spec)
    return [f"{name}, rate {rate:g}" for rate in OTHER_RATES.get(name, {}).get(size, RATES[size])]


def best_of(rows: dict[str, dict], names: list[str]) -> str:
    """The rate that keeps most, of those that forget enough."""
    return max(names, key=lambda n: (rows[n]["reached"], rows[n].get("asked", {}).get("held_out", 0)))


def forget_all(b: curves.Bench, names: list[str], spec: train.Spec, seed: dict, done) -> list[str]:
    """Does the edits. Returns those to look at further, one for each method."""
    rows, chosen = seed.setdefault("edits", {}), []
    for name in names:
        tried = rated(name, spec)
        for each in tried:
            if each not in rows:
                row = edit(b, each, spec, seed["gold"])
                if (b.work / "edits" / each).exists():
                    model, flags = how_to_read(b, each, row)
                    row["asked"] = b.ask(model, *flags)
                rows[each] = row
                print(f"{each}: {row.get('asked')}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)
                done()
        best = best_of(rows, tried)
        chosen += [best] if "asked" in rows[best] else []
    return chosen


def one_seed(b: curves.Bench, a: argparse.Namespace, spec: train.Spec, seed: dict, done) -> None:
    b.write_data()
    for name in ("base", "full", "gold"):
        if name not in seed:
            seed[name] = {"asked": b.ask(name)}
            done()
    if any(f"{FACTOR} gold" in name for name in a.methods):
        teach(b, "gold", seed["gold"], a.draws, spec, done)
    if "edit" in a.only:
        seed["chosen"] = list(dict.fromkeys([*seed.get("chosen", []), *forget_all(b, a.methods, spec, seed, done)]))
        done()
    rows = {name: seed[name] for name in ("base", "full", "gold")}
    rows |= {name: seed["edits"][name] for name in seed.get("chosen", [])}
    for name, row in rows.items():
        started = time.monotonic()
        if "measure" in a.only and "rounded" not in row:
            measure(b, name, row)
            done()
        if "teach" in a.only and name != "full":
            teach(b, name, row, a.draws, spec, done)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def forgotten(b: curves.Bench, seed: dict, name: str) -> None:
    """Removes a method's rows and edits, so that it is done again."""
    for each in [n for n in seed.get("edits", {}) if n == name or n.startswith(f"{name}, rate ")]:
        del seed["edits"][each]
        seed["chosen"] = [n for n in seed.get("chosen", []) if n != each]
        shutil.rmtree(b.work / "edits" / each, ignore_errors=True)


def command_of(a: argparse.Namespace) -> str:
    words = ["python", "bench/quality/lasting.py", "BUILD", "WORKDIR", "--model", a.model, "--seeds", a.seeds]
    words += ["--tofu", "TOFU"] if a.tofu else []
    return shlex.join([*words, "--draws", str(a.draws), "--methods", ";".join(a.methods)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--model", choices=train.SPECS, default="small")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--tofu", type=Path, help="the TOFU benchmark's JSON lines, for tofu01")
    parser.add_argument("--methods", type=lambda s: s.split(";"), default=NAMES)
    parser.add_argument("--only", type=lambda s: s.split(","), default=STEPS, help=f"of {','.join(STEPS)}")
    parser.add_argument("--again", type=lambda s: s.split(";"), default=[], help="methods to do anew")
    parser.add_argument("--draws", type=int, help="how many quarters are taught (3; large models: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--results", type=Path,
                        default=Path(__file__).parents[1] / "results/quality-lasting")  # fmt: skip
    a = parser.parse_args()
    a.draws = a.draws or reteach.SIZES[reteach.size_of(train.SPECS[a.model])].draws
    return a


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    a.results.mkdir(parents=True, exist_ok=True)
    path = a.results / f"{a.model}.json"
    results = json.loads(path.read_text()) if path.exists() else {"commands": [], "seeds": {}}

    def done() -> None:
        if command_of(a) not in results["commands"]:
            results["commands"].append(command_of(a))
        path.write_text(json.dumps(results, indent=1) + "\n")

    spec = train.SPECS[a.model]
    for number in a.seeds.split(","):
        work = a.workdir.resolve() / f"{a.model}-{number}"
        parts = train.make_models(a.model, int(number), work, a.tofu)
        bench = curves.Bench(a.build.resolve() / "perta", work, parts, spec.compute)
        seed = results["seeds"].setdefault(number, {})
        for name in a.again:
            forgotten(bench, seed, name)
        one_seed(bench, a, spec, seed, done)
    page = lasting_page.text(a.model, results)
    (a.results / f"{a.model}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
