"""The measurements of bench/run.py as Markdown and as plots."""

import statistics
from pathlib import Path


def spread(values: list[float], digits: int = 2) -> str:
    """Median (minimum to maximum)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def machine_lines(machine: dict) -> list[str]:
    return ["## Machine", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]


def codec_lines(table: list[dict]) -> list[str]:
    out = ["## Patches: bits a value, and speed of one thread", "",
           "Entropy is of order 0, of the integer difference. GB are of the model's bytes; CPU "
           "time. Programs started for one file count with their start.", "",
           "| dtype, changes | unchanged | entropy | coder | bits | of entropy | encode GB/s | "
           "decode GB/s |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in table:
        entropy = r.get("entropy")
        for coder, c in r["coders"].items():
            of = f"{c['bits'] / entropy:.3f}" if entropy else ""
            rates = [f"{c[k][0]:.2f} ({c[k][1]:.2f}–{c[k][2]:.2f})"
                     for k in ("encode_gb_s", "decode_gb_s")]  # fmt: skip
            out.append(f"| {r['dtype']}, {r['regime']} | {r['unchanged']:.1%} | "
                       f"{f'{entropy:.3f}' if entropy else ''} | {coder} | {c['bits']:.3f} | "
                       f"{of} | {rates[0]} | {rates[1]} |")  # fmt: skip
    return [*out, ""]


def disk_lines(table: list[dict]) -> list[str]:
    out = ["## Jobs against the disk", "",
           "Cold caches; fio (io_uring, O_DIRECT, 4 MiB, depth 8) reads the same files and writes "
           "as many bytes right after each, and syncs them, as perta does. Of fio its own count of "
           "seconds, without its start; of perta all from start to end.", "",
           "| job | GB read | GB written | seconds | GB/s | of fio | CPU s per GB | peak MiB | "
           "MiB left in page cache |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in table:
        runs = row["runs"]
        moved = [(r["read"] + r["written"]) / 1e9 for r in runs]
        out.append(
            f"| {row['job']} | {runs[0]['read'] / 1e9:.2f} | {runs[0]['written'] / 1e9:.2f} | "
            f"{spread([r['seconds'] for r in runs])} | "
            f"{spread([m / r['seconds'] for m, r in zip(moved, runs, strict=True)])} | "
            f"{spread([r['of_fio'] for r in runs])} | "
            f"{spread([r['cpu'] / m for m, r in zip(moved, runs, strict=True)])} | "
            f"{max(r['peak_mib'] for r in runs):.0f} | "
            f"{max(r['cached'] for r in runs) / 2**20:.0f} |")  # fmt: skip
    return [*out, ""]


def warm_lines(table: dict[str, list[float]]) -> list[str]:
    out = ["## verify from the page cache", "", "| what | GB/s |", "|---|---|"]
    return [*out, *(f"| {what} | {spread(rates)} |" for what, rates in table.items()), ""]


def peer_lines(table: list[dict]) -> list[str]:
    out = ["## Against other programs", "", "In turn, cold caches, the whole new model each time. "
           "perta also writes the patch. Peak memory counts mapped file pages.", "",
           "| other | its seconds | perta's | times faster | its peak MiB | perta's | share |",
           "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in table:
        ours, theirs = ([r[who] for r in row["runs"]] for who in ("perta", "other"))
        seconds = [[r["seconds"] for r in runs] for runs in (theirs, ours)]
        peaks = [max(r["peak_mib"] for r in runs) for runs in (theirs, ours)]
        out.append(f"| {row['other']} | {spread(seconds[0])} | {spread(seconds[1])} | "
                   f"{spread([a / b for a, b in zip(*seconds, strict=True)], 1)} | {peaks[0]:.0f} | "
                   f"{peaks[1]:.0f} | 1/{peaks[0] / peaks[1]:.0f} |")  # fmt: skip
    return [*out, ""]


def growth_lines(growth: dict) -> list[str]:
    out = ["## How time grows", "", "| tensors | GB read | seconds | peak MiB |", "|---|---|---|---|"]
    for p in growth["sizes"] + growth["tensors"]:
        out.append(f"| {p['tensors']} | {p['read'] / 1e9:.3f} | {spread(p['seconds'])} | "
                   f"{p['peak_mib']:.0f} |")  # fmt: skip
    f = growth["fit"]
    return [*out, "", f"Fit over sizes: {f['seconds']:.2f} s + {f['seconds_per_gb']:.3f} s/GB; the "
            f"worst point is {f['worst']:.0%} off.", ""]  # fmt: skip


def write(results: dict, to: Path) -> None:
    lines = ["# Measurements", "", f"`{results['command']}`", "",
             "Median (least to most) of all rounds.", ""]  # fmt: skip
    lines += machine_lines(results["machine"])
    lines += [f"- not measured: {what}" for what in results["missing"]] + [""]
    parts = {"codec": codec_lines, "disk": disk_lines, "warm_verify": warm_lines,
             "peers": peer_lines, "growth": growth_lines}  # fmt: skip
    for part, of in parts.items():
        lines += of(results[part]) if part in results else []
    (to / "results.md").write_text("\n".join(lines))


def draw(results: dict, to: Path) -> None:
    """codec.svg, growth.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "perta"
    from matplotlib import pyplot

    table = [r for r in results["codec"] if r.get("entropy") and r["dtype"] == "BF16"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for coder in table[0]["coders"]:
        points = [(r["entropy"], r["coders"][coder]["bits"]) for r in table if coder in r["coders"]]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=coder)
    ends = [0, max(r["entropy"] for r in table)]
    axes.plot(ends, ends, color="grey", linestyle=":", label="order-0 entropy")
    axes.set(xlabel="entropy of the difference, bits a value", ylabel="patch, bits a value",
             title="Patch size, BF16", ylim=(0, 16))  # fmt: skip
    axes.legend()
    figure.savefig(to / "codec.svg", metadata={"Date": None})
    sizes = results.get("growth", {}).get("sizes", [])
    if sizes:
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        x = [p["read"] / 1e9 for p in sizes]
        axes.plot(x, [statistics.median(p["seconds"]) for p in sizes], marker="o")
        axes.set(xlabel="GB read", ylabel="seconds", title="perta unlearn", xlim=0, ylim=0)
        figure.savefig(to / "growth.svg", metadata={"Date": None})
