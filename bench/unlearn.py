"""Measure the main job against the disk: unlearn, verify, apply, revert on a generated model.

    python bench/unlearn.py PERTA WORKDIR [--layers 22] [--memory 256M] [--rounds 3]

Each round drops the page cache and first reads the same files raw (fio, io_uring, O_DIRECT, 4 MiB,
depth 8), so that ratios compare one moment of one machine. Needs root, to drop the cache, and fio.
Figures are medians; peak memory is the most resident at once (ru_maxrss), file pages included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import models


@dataclass
class Figures:
    read_bytes: int
    written_bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def size_of(*folders: Path) -> int:
    return sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())


def measure(command: list[str], read: list[Path], written: list[Path]) -> Figures:
    for folder in written:
        shutil.rmtree(folder, ignore_errors=True)
    drop_cache()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise SystemExit(f"{command}: exit {os.waitstatus_to_exitcode(status)}")
    return Figures(size_of(*read), size_of(*written), seconds, usage.ru_utime + usage.ru_stime,
                   usage.ru_maxrss * 1024)  # fmt: skip


def raw_read(folders: list[Path]) -> Figures:
    files = [str(f) for folder in folders for f in sorted(folder.glob("*.safetensors"))]
    command = ["fio", "--name=raw", "--readonly", "--rw=read", "--direct=1", "--bs=4M",
               "--ioengine=io_uring", "--iodepth=8", "--file_service_type=sequential",
               "--filename=" + ":".join(files)]  # fmt: skip
    return measure(command, folders, [])


def bits_by_encoding(patch: Path) -> None:
    encodings = json.loads((patch / "manifest.json").read_text())["encodings"]
    print("\nencoding   chunks   parameters   bits a parameter")
    for name, e in encodings.items():
        bits = 8 * e["bytes"] / e["elements"] if e["elements"] else 0
        print(f"{name:9}{e['chunks']:8}{e['elements']:13}{bits:15.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("perta", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    perta, work = str(arguments.perta.resolve()), arguments.workdir.resolve()
    n_parameters = models.make(work, arguments.layers)

    inputs = {kind: work / kind for kind in ("model", "tuned", "base", "forget", "retain")}
    patch, out, back = work / "patch", work / "out", work / "back"
    common = ["--memory", arguments.memory, "--quiet"]
    unlearn = [perta, "unlearn", *common, "--patch", str(patch)]
    for kind, folder in inputs.items():
        unlearn += [f"--{kind}", str(folder)]
    model = inputs["model"]
    everything = list(inputs.values())
    jobs = {
        "raw read (fio)": lambda: raw_read(everything),
        "unlearn": lambda: measure(unlearn, everything, [patch]),
        "unlearn --out": lambda: measure([*unlearn, "--out", str(out)], everything, [patch, out]),
        "verify": lambda: measure([perta, "verify", *common, str(patch)], [patch], []),
        "apply": lambda: measure([perta, "apply", *common, str(model), str(patch), "--out",
                                  str(back)], [model, patch], [back]),
        "revert": lambda: measure([perta, "revert", *common, str(out), str(patch), "--out",
                                   str(back)], [out, patch], [back]),
    }  # fmt: skip
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(arguments.rounds)]
    for shard in sorted(model.glob("*.safetensors")):
        subprocess.run(["cmp", shard, back / shard.name], check=True)

    print(f"{n_parameters:,} parameters, --memory {arguments.memory}, {os.cpu_count()} CPUs, "
          f"medians of {arguments.rounds} rounds")  # fmt: skip
    print(f"\n{'':16} read GB  written GB  seconds  read GB/s  of raw read  CPU s  peak MiB")
    for name in jobs:
        runs = [r[name] for r in rounds]
        seconds = statistics.median(r.seconds for r in runs)
        ratio = statistics.median(
            (r[name].read_bytes / r[name].seconds)
            / (r["raw read (fio)"].read_bytes / r["raw read (fio)"].seconds)
            for r in rounds
        )
        print(f"{name:16}{runs[0].read_bytes / 1e9:8.2f}{runs[0].written_bytes / 1e9:12.2f}"
              f"{seconds:9.2f}{runs[0].read_bytes / 1e9 / seconds:11.2f}{ratio:12.0%}"
              f"{statistics.median(r.cpu_seconds for r in runs):8.1f}"
              f"{max(r.peak_bytes for r in runs) / 2**20:10.0f}")  # fmt: skip
    bits_by_encoding(patch)


if __name__ == "__main__":
    main()
