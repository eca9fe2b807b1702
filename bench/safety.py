"""What safety costs: unlearn, writing a patch and a model, with and without commit points,
syncing and digests.

    python bench/safety.py BUILD WORKDIR [--gb 4] [--rounds 7] [--keep]

Each round runs every variant from a cold cache, in changing order; figures are medians of the ratios
within a round. "unsafe" is build/bench/perta_unsafe: no fsync, no digests, no commit points, and
therefore no usable record.
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path

import measure
import models
from run import BYTES_A_PARAMETER

SIDES = ("model", "tuned", "base", "forget", "retain")
# The program, and the seconds between commit points.
WAYS = {
    "unsafe": ("bench/perta_unsafe", "1e9"),
    "safe": ("perta", "10"),
    "without commit points": ("perta", "1e9"),
    "commit points every second": ("perta", "1"),
}


def command(build: Path, work: Path, program: str) -> list:
    sides = [word for side in SIDES for word in (f"--{side}", work / side)]
    outputs = ["--patch", work / "patch", "--out", work / "out"]
    return [build / program, "unlearn", *sides, *outputs, "--io", "direct",
            "--nonfinite", "keep", "--quiet"]  # fmt: skip


def one_round(build: Path, work: Path, order: list[str]) -> dict[str, float]:
    seconds = {}
    for way in order:
        program, between = WAYS[way]
        os.environ["PERTA_COMMIT_SECONDS"] = between
        made = [work / "patch", work / "out"]
        seconds[way] = measure.cold(command(build, work, program), made).seconds
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "retain").exists():
        models.make(args.work, *models.sized(args.gb * 1e9 / BYTES_A_PARAMETER))
    ways, rounds = list(WAYS), []
    for n in range(args.rounds):
        at = n % len(ways)
        rounds.append(one_round(args.build, args.work, ways[at:] + ways[:at]))
        print("  ".join(f"{way}: {s:.2f} s" for way, s in rounds[-1].items()), flush=True)
    for way in ways:
        ratios = [r[way] / r["unsafe"] for r in rounds]
        print(f"{way}: {statistics.median(r[way] for r in rounds):.2f} s, "
              f"{statistics.median(ratios):.3f} of unsafe ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
