"""`perta forget` on SmolLM2-135M, from the text of TOFU: one model and two files, nothing else.

    python bench/quality/from_text.py BUILD WORKDIR --tofu DIR [--seeds 1,2,3]

Uses the models that bench/quality/run.py made in WORKDIR (--model smollm2). Writes forget.json and
forget.md to bench/results/quality/. A run is done once; WORKDIR/smollm2-SEED/from-text has what it
left.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import data
import train
from transformers import AutoTokenizer

SPEC = train.SPECS["smollm2"]
OPTIONS = ["--model", "full", "--forget", "forget-text.jsonl", "--retain", "retain-text.jsonl",
           "--template", "plain", "--holdout", "0.5", "--out", "from-text"]  # fmt: skip


def write_text(work: Path, tofu: Path, seed: int) -> None:
    """Questions and answers; an author's are one group."""
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    for name, authors in zip(("forget", "retain"), data.tofu_authors(tofu, seed, SPEC.authors), strict=True):
        items = [{"question": item["question"], "answer": item["answer"], "group": f"{name} {i}"}
                 for i, of in enumerate(authors)
                 for item in data.shortest_items(of, tokenizer, SPEC.questions)]  # fmt: skip
        data.write(work / f"{name}-text.jsonl", items)


def perta(build: Path, work: Path, *words: str) -> dict:
    """The result, with the seconds that it took."""
    started = time.monotonic()
    env = os.environ | {"PERTA_PYTHON": sys.executable}
    done = subprocess.run([build / "perta", *words, "--json", "--quiet"], cwd=work, env=env,
                          stdout=subprocess.PIPE, check=True)  # fmt: skip
    return json.loads(done.stdout) | {"took": time.monotonic() - started}


def one_seed(build: Path, work: Path, tofu: Path, seed: int) -> dict:
    n_questions = (SPEC.forget_questions, SPEC.questions)
    parts = data.tofu(tofu, AutoTokenizer.from_pretrained(work / "base"), seed, SPEC.authors, n_questions)
    write_text(work, tofu, seed)
    plan = perta(build, work, "forget", *OPTIONS, "--dry-run")
    summary = perta(build, work, "forget", *OPTIONS, "--resume")
    data.write(work / "other.jsonl", parts.other)
    patch = ["--patch", "from-text/patch"]
    other = [perta(build, work, "eval", "--model", "full", "--data", "other.jsonl", *more) for more in ([], patch)]
    forget = ["--data", "from-text/data/forget.jsonl"]
    gold = perta(build, work, "eval", "--model", "gold", *forget)["probability"] if (work / "gold").exists() else None
    row = {name: [one[when]["probability"] for when in ("before", "after")] for name, one in summary["sets"].items()}
    return {
        **row, "other": [one["probability"] for one in other], "gold": gold,
        "target": summary["target"]["probability"], "box": summary["edit"]["box"],
        "seconds": summary["took"], "planned": plan["seconds"],
    }  # fmt: skip


def page(results: dict[str, dict]) -> str:
    def pair(values: list[float]) -> str:
        return f"{values[0]:.3f} → {values[1]:.3f}"

    lines = ["# perta forget on SmolLM2-135M, from text", "",
             "| seed | target | gold | forget | retain, shown | held out | other | minutes (planned) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for seed, r in results.items():
        gold = "–" if r["gold"] is None else f"{r['gold']:.3f}"
        cells = [seed, f"{r['target']:.3f}", gold, *(pair(r[k]) for k in ("forget", "retain", "held-out", "other")),
                 f"{r['seconds'] / 60:.0f} ({r['planned'] / 60:.0f})"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Mean probabilities of the right answer, before → after. The target is the guess."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--tofu", type=Path, required=True, help="the TOFU benchmark's JSON lines")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results/quality")
    a = parser.parse_args()
    path = a.results / "forget.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in a.seeds.split(","):
        if seed not in results:
            work = a.workdir.resolve() / f"smollm2-{seed}"
            results[seed] = one_seed(a.build.resolve(), work, a.tofu, int(seed))
            path.write_text(json.dumps(results, indent=1))
    text = page(results)
    (a.results / "forget.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
