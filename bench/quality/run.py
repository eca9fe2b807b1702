"""Does it forget and keep the rest: the whole curve of every method, on models of known
contents.

    python bench/quality/run.py BUILD WORKDIR --model small|smollm2 [--seeds 1,2,3] [--tofu DIR]

Writes MODEL.json, MODEL.md and MODEL.svg to bench/results/quality/, part by part. Models and curves
that exist already are not made again. Needs examples/requirements.txt and bench/requirements.txt.
docs/quality-figures.md explains the figures.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import curves
import methods
import page
import torch
import train


def one_seed(bench: curves.Bench, spec: train.Spec, seed: dict, names: list[str], done) -> None:
    bench.write_data()
    for name in ("base", *train.MODELS):
        seed[name] = seed.get(name) or bench.ask(name)
    have = seed.setdefault("curves", {})
    for name in names:
        if name not in have:
            full = bench.point(0, 0, "full")
            have[name] = [full, *methods.curve(bench, name, spec, seed["gold"]["forget"])]
            done()
            print(f"{name}: {len(have[name])} points", file=sys.stderr, flush=True)


def command_of(a: argparse.Namespace) -> str:
    """The command line, without the folders of this machine."""
    words = ["python", "bench/quality/run.py", "BUILD", "WORKDIR", "--model", a.model]
    words += ["--seeds", a.seeds, "--threads", str(a.threads)]
    words += ["--tofu", "TOFU"] if a.tofu else []
    return shlex.join(words + (["--methods", a.methods] if a.methods else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--model", choices=train.SPECS, default="small")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--tofu", type=Path, help="the TOFU benchmark's JSON lines, for smollm2")
    parser.add_argument("--methods", help="names separated by ; (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch")
    parser.add_argument("--results", type=Path,
                        default=Path(__file__).parents[1] / "results/quality")  # fmt: skip
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.results.mkdir(parents=True, exist_ok=True)
    path = a.results / f"{a.model}.json"
    results = json.loads(path.read_text()) if path.exists() else {"commands": [], "seeds": {}}

    def done() -> None:
        if command_of(a) not in results["commands"]:
            results["commands"].append(command_of(a))
        path.write_text(json.dumps(results, indent=1))
        page.write(a.model, results, a.results)

    spec, names = train.SPECS[a.model], a.methods.split(";") if a.methods else methods.NAMES
    for seed in a.seeds.split(","):
        work = a.workdir.resolve() / f"{a.model}-{seed}"
        parts = train.make_models(a.model, int(seed), work, a.tofu)
        bench = curves.Bench(a.build.resolve() / "perta", work, parts, spec.compute)
        one_seed(bench, spec, results["seeds"].setdefault(seed, {}), names, done)
    page.draw(a.model, results, a.results)
    print((a.results / f"{a.model}.md").read_text())


if __name__ == "__main__":
    main()
