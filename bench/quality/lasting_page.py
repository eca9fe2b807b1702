"""What lasting.py measured, as Markdown. Everything beside the gold model, which never knew."""

import statistics
from collections.abc import Callable

import reteach

Rows = list[tuple[dict, dict]]  # of one method: its row and its seed


def cell(of: Rows, value: Callable[[dict, dict], float | None]) -> str:
    """Mean (least to most) over the seeds that have it."""
    values = [v for row, seed in of if (v := value(row, seed)) is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g}–{max(values):.3g})"


def asked(part: str, share: bool = False) -> Callable:
    """The mean probability, or its share of the full model's."""
    return lambda row, seed: row["asked"][part] / (seed["full"]["asked"][part] if share else 1)


def measured(key: str) -> Callable:
    """Answers of one label have neither measure of memorization."""

    def of(row: dict, _: dict) -> float | None:
        values = row.get("measures", {}).get("forget", {})
        return None if values.get("exact_memorization") is None else values[key]

    return of


def more_than_gold(row: dict, seed: dict) -> float | None:
    """Extraction strength above the gold model's."""
    key = measured("extraction_strength")
    return None if key(row, seed) is None or key(seed["gold"], seed) is None else key(row, seed) - key(seed["gold"], seed)


def rounded(kind: str) -> Callable:
    """The forget probability of the rounded model, as a multiple of that of gold, rounded alike."""
    return lambda row, seed: row["rounded"][kind] / seed["gold"]["rounded"][kind] if "rounded" in row else None


def worst_rounding(row: dict, seed: dict) -> float | None:
    return max(rounded(kind)(row, seed) for kind in row["rounded"]) if "rounded" in row else None


def taught(name: str, as_it_is: bool = False) -> Callable:
    """The largest multiple, over the numbers of updates, of what gold shows after the same; as_it_is:
    or of what gold shows as it is, if that is more."""

    def of(row: dict, seed: dict) -> float | None:
        curves, gold = row.get("taught", {}).get(name), seed["gold"].get("taught", {}).get(name)
        if not curves or not gold:
            return None
        n = min(len(curves), len(gold))  # draws
        least = seed["gold"]["asked"]["forget"] if as_it_is else 0
        pairs = zip(reteach.rest_of(curves[:n]), reteach.rest_of(gold[:n]), strict=True)
        return max(row_p / max(gold_p, least) for row_p, gold_p in pairs)

    return of


def worst_teaching(as_it_is: bool = False) -> Callable:
    def of(row: dict, seed: dict) -> float | None:
        values = [taught(name, as_it_is)(row, seed) for name in row.get("taught", {})]
        return max((v for v in values if v is not None), default=None)

    return of


def rest_at_most(row: dict, seed: dict) -> float | None:
    """The largest probability of the rest after any attack and number of updates."""
    return max((p for of in row.get("taught", {}).values() if of for p in reteach.rest_of(of)), default=None)


def table(methods: dict[str, Rows], columns: dict[str, Callable]) -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, of in methods.items():
        lines.append(f"| {name} | {' | '.join(cell(of, value) for value in columns.values())} |")
    return [*lines, ""]


def plain(name: str, seed: dict) -> str:
    """Without the rate, where several were tried."""
    method = name.split(", rate ")[0]
    return method if sum(n.startswith(f"{method}, rate ") for n in seed["edits"]) > 1 else name


def by_method(seeds: list[dict]) -> dict[str, Rows]:
    methods: dict[str, Rows] = {name: [(seed[name], seed) for seed in seeds] for name in ("full", "base", "gold")}
    for seed in seeds:
        for name in seed.get("chosen", []):
            methods.setdefault(plain(name, seed), []).append((seed["edits"][name], seed))
    return methods


SUMMARY: dict[str, Callable] = {
    "forget": asked("forget"),
    "held out, share of full's": asked("held_out", share=True),
    "other": asked("other"),
    "extraction strength": measured("extraction_strength"),
    "above gold's": more_than_gold,
    "worst rounding, × gold's": worst_rounding,
    "worst re-teaching, × gold's after the same": worst_teaching(),
    "or gold's as it is": worst_teaching(as_it_is=True),
    "rest at most": rest_at_most,
}


EXPLAINED = [
    "*above gold's*: extraction strength minus gold's. *worst rounding*, *worst re-teaching*: the largest multiple,",
    "over formats, and over attacks and numbers of updates (mean over draws). *or gold's as it is*: the same, as a",
    "multiple of what gold shows before it is taught, if that is more than after: teaching at a high rate lowers all",
    "probabilities, and a multiple of next to nothing says little. *rest at most*: the probability itself.", "",
]  # fmt: skip


def of_kind(seeds: list[dict], key: str) -> list[str]:
    """The formats or attacks that were measured."""
    rows = [row for of in by_method(seeds).values() for row, _ in of]
    return list(dict.fromkeys(name for row in rows for name in row.get(key, {})))


def curve_table(methods: dict[str, Rows], name: str) -> list[str]:
    """The rest's probability itself, mean over seeds and draws, after each number of updates."""
    lines = [f"After {name}:", ""]
    updates: tuple[int, ...] = ()
    for method, of in methods.items():
        each = [reteach.rest_of(row["taught"][name]) for row, _ in of if row.get("taught", {}).get(name)]
        if not each:
            continue
        if not updates:
            how = next(h for h in reteach.SIZES.values() if name in map(str, h.attacks))
            updates = how.updates
            lines += [f"| | {' | '.join(map(str, updates))} |", "|---" * (len(updates) + 1) + "|"]
        means = [statistics.mean(values) for values in zip(*each, strict=True)]
        lines.append(f"| {method} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return [*lines, ""]


def tried(seeds: list[dict]) -> list[str]:
    """All rates of the rivals, and how long the edits took."""
    lines = ["| edit | seed | reached | forget | held out | seconds |", "|---" * 6 + "|"]
    for number, seed in enumerate(seeds, 1):
        for name, row in seed.get("edits", {}).items():
            p = row.get("asked", {"forget": row["least"]} if "least" in row else {})
            values = [f"{p[k]:.3f}" if k in p else "" for k in ("forget", "held_out")]
            lines.append(f"| {name} | {number} | {'yes' if row['reached'] else 'no'} | {' | '.join(values)} | {row['seconds']:.0f} |")
    return [*lines, ""]


def text(model: str, results: dict) -> str:
    seeds = [seed for seed in results["seeds"].values() if "gold" in seed]
    methods = by_method(seeds)
    lines = [f"# {model}: does it last", "", *(f"    {c}" for c in results["commands"]), "",
             f"Seeds: {', '.join(results['seeds'])}. Mean (least to most) over seeds.", "",
             *table(methods, SUMMARY), *EXPLAINED, "## Rounded", "", "Forget probability, as a multiple of gold's in the same format.", "",
             *table(methods, {kind: rounded(kind) for kind in of_kind(seeds, "rounded")}),
             "## Taught a quarter again", "",
             "The rest's probability, as a multiple of gold's after the same; the worst number of updates.", "",
             *table(methods, {name: taught(name) for name in of_kind(seeds, "taught")})]  # fmt: skip
    for name in of_kind(seeds, "taught"):
        lines += curve_table(methods, name)
    return "\n".join([*lines, "## All that was tried", "", *tried(seeds)])
