"""The sets of `perta forget`: what is to be forgotten, what is to stay, and the part of that which
the method is not shown. Spec: docs/forget.md, "Sets"."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta.command import IGNORED, Problem
from perta.samples import Encoder, Sample, read_samples


@dataclass
class Sets:
    forget: list[Sample]
    retain: list[Sample]  # shown to the method
    held_out: list[Sample]

    def named(self) -> dict[str, list[Sample]]:
        return {"forget": self.forget, "retain": self.retain, "held-out": self.held_out}

    def retain_batch(self) -> int:
        """Retain samples whose gradients a step takes: as many as are to be forgotten, and no fewer
        than 32. docs/steps.md, "Batches of the retain set"."""
        return max(32, len(self.forget))

    def tokens(self, name: str) -> int:
        return sum(len(sample.ids) for sample in self.named()[name])

    def asked(self) -> list[dict[str, Any]]:
        """The lines of all sets, one after another."""
        return [sample.line() for samples in self.named().values() for sample in samples]


def prompt_length(sample: Sample) -> int:
    return next((i for i, label in enumerate(sample.labels) if label != IGNORED), 0)


def key_of(sample: Sample) -> tuple:
    return tuple(sample.ids), prompt_length(sample)


def note_duplicates(path: Path, samples: list[Sample], note: Callable[[str], None]) -> None:
    first: dict[tuple, Sample] = {}
    twice = [(first[key], s) for s in samples if (key := key_of(s)) in first or first.update({key: s})]
    if twice:
        pairs = ", ".join(f"{b.where} is {a.where}" for a, b in twice[:3])
        more = f", and {len(twice) - 3} more" if len(twice) > 3 else ""
        note(f"{path}: the same sample more than once: {pairs}{more}")


def refuse_overlap(forget: tuple[Path, list[Sample]], retain: tuple[Path, list[Sample]]) -> None:
    """The same token ids, or the same text but for case and spaces."""
    seen: dict[object, Sample] = {}
    for sample in forget[1]:
        seen.setdefault(key_of(sample), sample)
        if sample.text:
            seen.setdefault(sample.text, sample)
    for sample in retain[1]:
        other = seen.get(key_of(sample)) or (seen.get(sample.text) if sample.text else None)
        if other:
            raise Problem(f"the same sample is to be forgotten and to be retained: {forget[0]}: "
                          f"{other.where}, and {retain[0]}: {sample.where}")  # fmt: skip


def groups_of(samples: list[Sample]) -> list[list[int]]:
    """The indices of samples that must not be parted: of one group, or with the same tokens."""
    root = list(range(len(samples)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    first: dict[object, int] = {}
    for i, sample in enumerate(samples):
        for key in (("group", str(sample.group)), key_of(sample)):
            root[find(i)] = find(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(samples)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def part(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out about that share of the samples: whole groups, in an order that the seed decides, as
    long as they fit; at least one group if the share is above 0, and never all."""
    groups = groups_of(samples)
    if len(groups) < 2 and share > 0:
        return samples, []
    rng = random.Random(seed)
    order = sorted(groups, key=lambda group: (rng.random(), group))
    most, held = round(share * len(samples)), set()
    for group in order[:-1]:
        if share > 0 and (not held or len(held) + len(group) <= most):
            held |= set(group)
    return (
        [sample for i, sample in enumerate(samples) if i not in held],
        [sample for i, sample in enumerate(samples) if i in held],
    )


def read_sets(
    forget: Path, retain: Path, encoder: Encoder, share: float, seed: int, note: Callable[[str], None]
) -> Sets:
    samples = {path: read_samples(path, encoder, note) for path in (forget, retain)}
    for path in samples:
        note_duplicates(path, samples[path], note)
    refuse_overlap((forget, samples[forget]), (retain, samples[retain]))
    shown, held_out = part(samples[retain], share, seed)
    if share > 0 and not held_out:
        note(f"{retain}: all of it is one group, so nothing of it can be held out")
    return Sets(samples[forget], shown, held_out)
