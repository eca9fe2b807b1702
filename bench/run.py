"""Measure everything: `make bench`. BENCH_GB= sets the size of the inputs (15.4 for 1.1 billion
parameters). How time grows is measured up to ten times that, for which the disk must have
room.

    python bench/run.py BUILD WORKDIR [--gb 4] [--rounds 5] [--results DIR] [--peers VENV]

Writes results.json, results.md and plots to bench/results/. Needs root for cold caches. Programs that
are not installed (fio, zstd, xdelta3, the peers' environment) are left out, as results.md says.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import codec
import jobs
import measure
import models
import report

BYTES_A_PARAMETER = 14  # three in BF16, two in F32


def said(*command: object) -> str:
    """The first line that a command prints; empty if it is not installed."""
    try:
        result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    except OSError:
        return ""
    return (result.stdout + result.stderr).strip().partition("\n")[0]


def machine(build: Path, work: Path, peers: Path | None) -> dict:
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().split("\n")
           if line.startswith("model name")]  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "CPU": f"{os.cpu_count()} × {cpu[0] if cpu else platform.machine()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "file system": said("stat", "-f", "-c", "%T", work),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "perta": said(build / "perta", "--version"),
    }
    for program, flag in (("fio", "--version"), ("zstd", "--version"), ("xdelta3", "-V")):
        facts |= {program: said(program, flag)} if measure.found(program) else {}
    if peers:
        listed = subprocess.run([peers / "bin/python", "-m", "pip", "list", "--format=freeze"],
                                capture_output=True, text=True).stdout.split()  # fmt: skip
        wanted = ("mergekit", "zipnn", "reminis", "torch", "safetensors")
        facts["peers"] = ", ".join(p for p in listed if p.partition("==")[0] in wanted)
    return facts


def missing(peers: Path | None) -> list[str]:
    out = [f"{program} (not installed)" for program in ("fio", "zstd", "xdelta3", "fincore")
           if not measure.found(program)]  # fmt: skip
    out += [] if peers else ["mergekit, PyTorch, zipnn, reminis (no environment for them: --peers)"]
    out += [] if measure.drop_cache() else ["cold caches (--warm, or not root)"]
    return [*out, "deltatensors (its patches are lossy)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--warm", action="store_true", help="do not drop the page cache")
    a = parser.parse_args()
    measure.keep_cache = a.warm
    build, work, peers = a.build.resolve(), a.workdir.resolve(), a.peers and a.peers.absolute()
    for folder in (work, a.results):
        folder.mkdir(parents=True, exist_ok=True)
    n = int(a.gb * 1e9 / BYTES_A_PARAMETER)
    python = peers and peers / "bin/python"
    results = {"command": " ".join(["python", *sys.argv]), "machine": machine(build, work, peers),
               "missing": missing(peers)}  # fmt: skip

    def done(part: str, what: object) -> None:
        """Write results part by part, so that an interrupted run leaves what it has."""
        results[part] = what
        (a.results / "results.json").write_text(json.dumps(results, indent=1))
        report.write(results, a.results)
        print(part, "done", file=sys.stderr)

    done("codec", codec.regimes(build, work / "codec", min(n, 1 << 23), a.rounds, python))
    layers, hidden = models.sized(n)
    models.make(work / "set", layers, hidden)
    s = jobs.Set(work / "set", build / "perta")
    if measure.found("fio") and measure.found("fincore"):
        done("disk", jobs.against_disk(s, a.rounds))
        done("warm_verify", jobs.warm_verify(s, a.rounds))
    if peers:
        done("peers", jobs.against_peers(s, a.rounds, peers / "bin/mergekit-yaml", python))
    shutil.rmtree(work / "set")
    done("growth", jobs.growth(build / "perta", work / "growth", n, a.rounds))
    report.draw(results, a.results)
    print((a.results / "results.md").read_text())


if __name__ == "__main__":
    main()
