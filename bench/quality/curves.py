"""The points of a curve, measured by `perta eval`, and the figures derived from it."""

import contextlib
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import data


@dataclass
class Point:
    """x is α, or the number of steps; evaluations counts how often both gradients were computed.
    The others are mean probabilities of answers, except text, which is a loss."""

    x: float
    evaluations: float
    forget: float
    retain: float
    held_out: float
    other: float
    text: float | None = None


@dataclass
class Bench:
    """The models of one seed, and the command under test."""

    perta: Path
    work: Path
    parts: data.Parts
    compute: str

    def command(self, *words: object) -> list[str]:
        return [str(self.perta), *map(str, words), "--json", "--progress", "none"]

    def run(self, *words: object) -> dict:
        command = self.command(*words)
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True)
        if done.returncode and not (done.returncode == 1 and done.stdout):  # 1: a rule not reached
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def started(self, *words: object) -> Iterator[Callable[[], bool]]:
        """A context in which the command runs; it is terminated at the end. Yields a function
        that tells whether it still runs; raises if it failed."""
        command = self.command(*words)
        with subprocess.Popen(command, cwd=self.work, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True) as run:  # fmt: skip

            def is_going() -> bool:
                if run.poll():
                    raise RuntimeError(f"{' '.join(command)}\n{run.stderr.read()}")
                return run.returncode is None

            try:
                yield is_going
            finally:
                run.terminate()

    def write_data(self) -> None:
        asked = self.parts.asked()
        for name, part in asked.items():
            data.write(self.work / f"{name}.jsonl", part)
        data.write(self.work / "asked.jsonl", [s for part in asked.values() for s in part])

    def ask(self, model: str, *how: object) -> dict[str, float]:
        """how: --patch or --adapter, with its folder."""
        words = ["eval", "--model", model, "--data", "asked.jsonl", "--per-sample"]
        words += ["--compute", self.compute]
        answers = self.run(*words, *how)["per_sample"]
        means, start = {}, 0
        for name, part in self.parts.asked().items():
            key = "loss" if name == "text" else "probability"
            of = answers[start : start + len(part)]
            means[name] = sum(answer[key] for answer in of) / len(part)
            start += len(part)
        return means

    def point(self, x: float, evaluations: float, model: str, patch: Path | None = None) -> dict:
        how = ["--patch", patch] if patch else []
        return asdict(Point(x, evaluations, **self.ask(model, *how)))


def best_at(points: list[dict], level: float, key: str) -> float | None:
    """The largest value of key on the curve, which is straight between its points, at forget <=
    level."""
    reached = [p[key] for p in points if p["forget"] <= level]
    for a, b in itertools.pairwise(points):
        if (a["forget"] - level) * (b["forget"] - level) < 0:
            share = (a["forget"] - level) / (a["forget"] - b["forget"])
            reached.append(a[key] + share * (b[key] - a[key]))
    return max(reached, default=None)


def evaluations_at(points: list[dict], level: float) -> float | None:
    return next((p["evaluations"] for p in points if p["forget"] <= level), None)


def figures(points: list[dict], full: dict, gold: dict) -> dict[str, float | None]:
    """area: held-out retain averaged over forget levels from the gold model's to 0.3 of the way
    from there to full's (0 where the curve does not get so low), as a share of full's."""
    span = full["forget"] - gold["forget"]
    levels = [gold["forget"] + 0.3 * span * i / 100 for i in range(101)]
    kept = [best_at(points, level, "held_out") or 0.0 for level in levels]
    at = gold["forget"]
    held_out = best_at(points, at, "held_out")
    return {
        "area": sum(kept) / len(kept) / full["held_out"],
        "held_out_at_gold": None if held_out is None else held_out / full["held_out"],
        "other_at_gold": best_at(points, at, "other"),
        "held_out_at_0.06": best_at(points, 0.06, "held_out"),
        "held_out_at_0.03": best_at(points, 0.03, "held_out"),
        "evaluations": evaluations_at(points, at),
    }
