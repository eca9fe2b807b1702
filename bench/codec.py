"""Patch sizes and the speed of the patch coder on one thread, compared with other programs on
the same two files."""

import json
import shutil
from pathlib import Path

import measure
import ml_dtypes
import models
import numpy as np

# Learning rates for tuning (16 steps): small, usual and large changes; then rates that leave about
# 66, 31 and 8 % of the values unchanged.
REGIMES = {"light": 2.3e-6, "medium": 1.3e-5, "heavy": 7.5e-5,
           "66 %": 7e-6, "31 %": 4e-5, "8 %": 2.8e-4}  # fmt: skip
OTHER_DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

SHARD = "model-00001-of-00001.safetensors"

ZIPNN = """
import sys, time, zipnn
data = open(sys.argv[1], "rb").read()
start = time.process_time()
coder = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
packed = coder.compress(bytearray(data))  # it works in place
middle = time.process_time()
same = bytes(coder.decompress(packed)) == data
print(len(packed), middle - start, time.process_time() - middle, same)
"""


def raw(shard: Path, to: Path) -> Path:
    """Only the bytes of the tensors."""
    data = shard.read_bytes()
    to.write_bytes(data[8 + int.from_bytes(data[:8], "little") :])
    return to


def edited(perta: Path, work: Path, dtype: np.dtype, rate: float, n: int) -> tuple[Path, Path]:
    """The raw bytes of a model before and after perta's own edit."""
    shutil.rmtree(work, ignore_errors=True)
    models.write(work, {"w": (n,)}, rate=rate, dtype=dtype)
    command = [perta, "unlearn", "--patch", work / "patch", "--out", work / "out", "--quiet"]
    for kind in models.KINDS:
        command += [f"--{kind}", work / kind]
    measure.run(command)
    return raw(work / "model" / SHARD, work / "before"), raw(work / "out" / SHARD, work / "after")


def row(coder: str, packed: int, units: int, size: int, encode: float, decode: float) -> dict:
    rate = lambda seconds: [round(size / 1e9 / seconds, 3)] * 3
    return {coder: {"bits": 8 * packed / units, "encode_gb_s": rate(encode),
                    "decode_gb_s": rate(decode)}}  # fmt: skip


def command_line(name: str, before: Path, after: Path, encode: list, decode: list) -> dict:
    """A program that makes a file PATCH and from it a file BACK; measured in CPU time."""
    patch, back = after.with_name("patch.bin"), after.with_name("back.bin")
    words = lambda line: [{"OLD": before, "NEW": after, "PATCH": patch, "BACK": back}.get(w, w)
                          for w in line]  # fmt: skip
    there = measure.run(words(encode))
    and_back = measure.run(words(decode))
    if back.read_bytes() != after.read_bytes():
        raise measure.Failed(f"{name} does not restore its input")
    n = measure.bytes_of(after)
    return row(name, measure.bytes_of(patch), n // 2, n, there.cpu_seconds, and_back.cpu_seconds)


def reminis(work: Path, program: Path) -> dict:
    """Its databases of both models, and the pack between them; apply checks the digests itself."""
    old, new, pack = work / "old.db", work / "new.db", work / "pack.bin"
    for shard, database in ((work / "model" / SHARD, old), (work / "out" / SHARD, new)):
        measure.run([program, "convert", "-q", shard, "-o", database])
    there = measure.run([program, "diff", "-q", old, new, "-o", pack])
    back = measure.run([program, "apply", "-q", old, pack, "-o", work / "back.db"])
    n = measure.bytes_of(work / "after")
    return row("reminis diff", measure.bytes_of(pack), n // 2, n, there.cpu_seconds,
               back.cpu_seconds)  # fmt: skip


def peers(before: Path, after: Path, python: Path | None) -> dict:
    rows = {}
    if python:
        rows |= reminis(after.parent, python.with_name("reminis"))
        out = measure.run([python, "-W", "ignore", "-c", ZIPNN, after]).output.split()
        if out[3] != "True":
            raise measure.Failed("zipnn does not restore its input")
        n = measure.bytes_of(after)
        rows |= row("zipnn", int(out[0]), n // 2, n, float(out[1]), float(out[2]))
    if measure.found("zstd"):
        at = "--patch-from=" + str(before)
        rows |= command_line("zstd -1 --patch-from", before, after,
                             ["zstd", "-q", "-f", "-1", "--single-thread", at, "NEW", "-o", "PATCH"],
                             ["zstd", "-q", "-f", "-d", "--long=31", at, "PATCH", "-o", "BACK"])  # fmt: skip
    if measure.found("xdelta3"):
        rows |= command_line("xdelta3 -1", before, after,
                             ["xdelta3", "-f", "-e", "-1", "-s", "OLD", "NEW", "PATCH"],
                             ["xdelta3", "-f", "-d", "-s", "OLD", "PATCH", "BACK"])  # fmt: skip
    return rows


def measured(build: Path, dtype: str, before: Path, after: Path, rounds: int) -> dict:
    command = [build / "bench/bench_codec", dtype, before, after, str(rounds)]
    return json.loads(measure.run(command).output)


def regimes(build: Path, work: Path, n: int, rounds: int, python: Path | None) -> list[dict]:
    """One entry for each regime and dtype."""
    table = []
    cases = [("BF16", np.dtype(ml_dtypes.bfloat16), name) for name in REGIMES]
    cases += [(dtype, numbers, "medium") for dtype, numbers in OTHER_DTYPES.items()]
    for dtype, numbers, name in cases:
        pair = edited(build / "perta", work, numbers, REGIMES[name], n)
        result = {"dtype": dtype, "regime": name, "rate": REGIMES[name]}
        result |= measured(build, dtype, *pair, rounds)
        if dtype == "BF16" and name in ("light", "medium", "heavy"):
            result["coders"] |= peers(*pair, python)
        table.append(result)
    shutil.rmtree(work, ignore_errors=True)
    return table
