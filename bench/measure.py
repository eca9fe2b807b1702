"""Run and time other programs, from a cold page cache."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# A small process starts the measured program: over fork it would inherit the peak memory of this
# one.
LAUNCHER = """
import os, subprocess, sys, time
start = time.monotonic()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


class Failed(Exception):
    pass


@dataclass
class Figures:
    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str


def run(command: list) -> Figures:
    """Seconds, CPU seconds, peak MiB (including file pages) and standard output of a command."""
    words = [sys.executable, "-c", LAUNCHER, *(str(word) for word in command)]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        raise Failed(f"{command[0]}: {result.stderr[-2000:]}")
    output, _, figures = result.stdout.rstrip("\n").rpartition("\n")
    return Figures(*map(float, figures.split()), output)


keep_cache = False  # for a run that is not measured


def drop_cache() -> bool:
    """Needs root. Returns False without it, and then no figure is from a cold cache."""
    if keep_cache:
        return False
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except PermissionError:
        return False
    return True


def cold(command: list, made: list[Path]) -> Figures:
    """The same, after removing the command's outputs and dropping the page cache."""
    for path in made:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    drop_cache()
    return run(command)


def bytes_of(*paths: Path) -> int:
    files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p])]
    return sum(f.stat().st_size for f in files if f.is_file())


def cached_bytes(*folders: Path) -> int:
    """How much of the files is in the page cache."""
    files = [str(f) for folder in folders for f in folder.rglob("*") if f.is_file()]
    out = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", *files],
                         stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return sum(map(int, out.stdout.split()))


def fio(reads: list[Path], write_bytes: int, scratch: Path) -> float:
    """Seconds, as fio counts them, for the same reads, one file after another, while as many
    bytes as given are written and synced: what the disk does with io_uring, O_DIRECT, 4 MiB
    blocks and depth 8."""
    files = [f for folder in reads for f in sorted(folder.glob("*.safetensors*"))
             if f.suffix != ".json"]  # fmt: skip
    block = min([4 << 20, *(f.stat().st_size for f in files), write_bytes or 4 << 20])
    block = max(block >> 12, 1) << 12
    command = ["fio", "--direct=1", f"--bs={block}", "--ioengine=io_uring", "--iodepth=8",
               "--output-format=json", "--name=read", "--rw=read", "--readonly",
               "--file_service_type=sequential", "--filename=" + ":".join(map(str, files))]  # fmt: skip
    if write_bytes:
        command.remove("--readonly")
        command += ["--name=write", "--rw=write", f"--size={max(write_bytes, block)}",
                    f"--filename={scratch}", "--end_fsync=1"]  # fmt: skip
    output = cold(command, [scratch]).output
    scratch.unlink(missing_ok=True)
    return max(job["job_runtime"] for job in json.loads(output)["jobs"]) / 1000


def found(program: str) -> bool:
    return shutil.which(program) is not None
