"""The data of `perta audit`: lines of token ids, as `perta eval` reads them, and which of them are
taught again. Spec: docs/audit.md."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta.command import Problem
from perta.samples import decode, unique


@dataclass
class Lines:
    """One file. numbers: of its lines, from 1; empty ones are passed over."""

    path: Path
    values: list[dict[str, Any]]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def tokens(self) -> int:
        return sum(map(tokens_of, self.values))

    def text(self, which: list[int] | None = None) -> str:
        chosen = self.values if which is None else [self.values[i] for i in which]
        return "".join(json.dumps(value) + "\n" for value in chosen)

    def key(self, i: int) -> str:
        """The same for lines of the same tokens and labels."""
        value = self.values[i]
        return json.dumps([value["input_ids"], value.get("labels", value["input_ids"])])


def tokens_of(value: dict[str, Any]) -> int:
    """Also of the other answers of a line."""
    paraphrased = value.get("paraphrased")
    others = [*([paraphrased] if paraphrased else []), *(value.get("perturbed") or [])]
    return len(value["input_ids"]) + sum(tokens_of(other) for other in others)


def read_lines(path: Path) -> Lines:
    """`perta eval` checks the rest, and names the line."""
    found = Lines(path, [], [])
    for number, line in enumerate(decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=unique)
            if not isinstance(value, dict) or not isinstance(value.get("input_ids"), list):
                raise ValueError("no list \"input_ids\"; `perta tokenize' makes such data from text")
            tokens_of(value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Problem(f"{path}: line {number}: {error}") from None
        found.values.append(value)
        found.numbers.append(number)
    if not found.values:
        raise Problem(f"{path}: no samples")
    return found


def refuse_shared(lines: Lines, other: Lines, what: str) -> None:
    """Problem if a sample is in both files. what: the two things that are then said of it."""
    seen = {lines.key(i): lines.numbers[i] for i in reversed(range(len(lines)))}
    for i in range(len(other)):
        if other.key(i) in seen:
            raise Problem(f"the same sample is {what}: {lines.path}: line {seen[other.key(i)]}, "
                          f"and {other.path}: line {other.numbers[i]}")  # fmt: skip


def taught(lines: Lines, share: float, seed: int) -> list[int]:
    """Indices of about that share of the lines, in an order that the seed decides: at least one, and
    never all. Lines that are the same are taught together or not at all. Empty if that cannot be."""
    groups: dict[str, list[int]] = {}
    for i in range(len(lines)):
        groups.setdefault(lines.key(i), []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for group in order[:-1] if share > 0 else []:
        if not chosen or len(chosen) + len(group) <= round(share * len(lines)):
            chosen += group
    return sorted(chosen)


# ---- means


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def measures(answers: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number of `perta eval --per-sample` over the lines that have it; and the
    scores that docs/eval.md makes of them."""
    answers = [answer | derived(answer) for answer in answers]
    keys = dict.fromkeys(key for answer in answers for key in answer if key not in ("line", "labels"))
    found: dict[str, float] = {"samples": len(answers)}
    for key in keys:
        values = [float(answer[key]) for answer in answers if is_number(answer.get(key))]
        if values:
            found[key] = math.fsum(values) / len(values)
    return found


def derived(answer: dict[str, Any]) -> dict[str, float]:
    found, ratio = {}, answer.get("truth_ratio")
    if is_number(ratio):
        found |= {"truth_ratio_forget": min(ratio, 1 / ratio) if ratio else 0.0, "truth_ratio_retain": max(0.0, 1 - ratio)}
    if is_number(answer.get("paraphrased_loss")):
        found["paraphrased_probability"] = math.exp(-answer["paraphrased_loss"])
    return found


def mean_probability(answers: list[dict[str, Any]], which: list[int]) -> float:
    return math.fsum(answers[i]["probability"] for i in which) / len(which)
