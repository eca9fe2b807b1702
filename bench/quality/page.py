"""The measurements as Markdown, and as a plot for each model."""

import statistics
from pathlib import Path

import curves

COLUMNS = {"area": "area", "held_out_at_gold": "held-out retain at gold's forget",
           "held_out_at_0.06": "at forget 0.06", "held_out_at_0.03": "at forget 0.03",
           "other_at_gold": "other knowledge at gold's",
           "evaluations": "gradients"}  # fmt: skip


def cell(values: list[float | None]) -> str:
    """Mean (minimum to maximum) over seeds; and how many did not reach the level."""
    there = [v for v in values if v is not None]
    if not there:
        return "not reached"
    out = f"{statistics.mean(there):.3g}"
    out += f" ({min(there):.3g}–{max(there):.3g})" if len(there) > 1 else ""
    missing = len(values) - len(there)
    return out + (f", {missing} not reached" if missing else "")


def finished(results: dict) -> dict:
    """Seeds under way have no figures yet."""
    return {number: seed for number, seed in results["seeds"].items() if "full" in seed}


def names_of(seeds: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for seed in seeds for name in seed["curves"]))


def text(model: str, results: dict) -> str:
    seeds = list(finished(results).values())
    lines = [f"# {model}", "", *(f"    {command}" for command in results["commands"]), "",
             f"Seeds: {', '.join(finished(results))}. Mean (least to most).", "",
             "| | forget | retain | held out | other | text loss |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name in ("base", "full", "gold"):
        values = [cell([s[name].get(key) for s in seeds])
                  for key in ("forget", "retain", "held_out", "other", "text")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(v.replace('not reached', '') for v in values)} |")
    lines += ["", f"| method | seeds | {' | '.join(COLUMNS.values())} |", "|---" * 8 + "|"]
    rows = []
    for name in names_of(seeds):
        of = [curves.figures(s["curves"][name], s["full"], s["gold"]) for s in seeds
              if name in s["curves"]]  # fmt: skip
        cells = [cell([f[key] for f in of]) for key in COLUMNS]
        row = f"| {name} | {len(of)} | {' | '.join(cells)} |"
        rows.append((statistics.mean(f["area"] for f in of), row))
    return "\n".join([*lines, *(row for _, row in sorted(rows, reverse=True)), ""])


def draw(model: str, results: dict, to: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "perta"
    from matplotlib import pyplot

    seeds = finished(results)
    figure, axes = pyplot.subplots(1, len(seeds), figsize=(5 * len(seeds) + 3, 5), sharey=True,
                                   squeeze=False, layout="constrained")  # fmt: skip
    names, styles = names_of(list(seeds.values())), ["-", "--", ":"]
    for ax, (number, seed) in zip(axes[0], seeds.items(), strict=True):
        for i, name in enumerate(names):
            points = seed["curves"].get(name, [])
            ax.plot([p["forget"] for p in points], [p["held_out"] for p in points], label=name,
                    linestyle=styles[i // 10], color=f"C{i % 10}")  # fmt: skip
        ax.plot(seed["gold"]["forget"], seed["gold"]["held_out"], "k*", markersize=12, label="gold")
        ax.set(xlabel="forget", title=f"{model}, seed {number}", ylim=(0, 1.02))
    axes[0][0].set_ylabel("held-out retain")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(to / f"{model}.svg", metadata={"Date": None})


def write(model: str, results: dict, to: Path) -> None:
    (to / f"{model}.md").write_text(text(model, results))
