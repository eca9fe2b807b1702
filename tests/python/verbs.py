"""Every verb that writes folders, on small inputs: what the tests of kills and faults run."""

import json
import os
import random
import shutil
import signal
import subprocess

import ml_dtypes
import numpy as np
import xxhash
from conftest import HANGS, MODEL, PERTA, skip_what_needs_a_model
from llama import write_llama
from reference import BF16, CHUNK, narrow, write_folder

# Make a commit point at every chance.
EAGER = os.environ | {"PERTA_COMMIT_SECONDS": "0"}
FAULTY = PERTA.parent / "tests/faults/perta_faulty"  # tests/faults/faults.h
SIDES = "--model model --tuned tuned --base base --forget forget --retain retain".split()
VERBS = {
    "unlearn": ["unlearn", *SIDES, "--patch", "out"],
    "unlearn-both": ["unlearn", *SIDES, "--alpha", "0.5,2", "--patch", "out/p", "--out", "out/m"],
    "diff": "diff model tuned --patch out".split(),
    "apply": "apply model p1 --out out".split(),
    "revert": "revert tuned p1 --out out".split(),
    "compose": "compose p1 p2 --model model --patch out".split(),
    "dequantize": "dequantize quantised --out out".split(),
    "accumulate": "accumulate forget retain base --stat mean,meansq --out out".split(),
    "estimate": "estimate --model llama --data data.jsonl --stat mean,meansq --out out".split(),
    "tune": "tune --model llama --data data.jsonl --steps 4 --target-modules all-linear --out out".split(),
    "steps": (
        "unlearn --model llama --tuned llama-tuned --base llama-base --steps 1,2 --patch out "
        "--data-forget data.jsonl --data-retain other.jsonl"
    ).split(),
    "steps-box": (
        "unlearn --model llama --box 0.1 --steps 1 --patch out "
        "--data-forget data.jsonl --data-retain other.jsonl"
    ).split(),
}
WITH_MODEL = ("estimate", "tune", "steps", "steps-box")
if not MODEL:
    VERBS = {verb: command for verb, command in VERBS.items() if verb not in WITH_MODEL}
# The verbs that use the stream, also those that write no folder, and those that edit the folder
# "out", which is a copy of the folder that they work on.
STREAM = {
    name: VERBS[name]
    for name in "unlearn unlearn-both diff apply revert compose dequantize accumulate".split()
} | {
    "manifest": "manifest model".split(),
    "verify": "verify p1".split(),
    "verify-applied": "verify tuned --patch p1 --applied".split(),
    "verify-manifest": "verify model --manifest model.json".split(),
}
# The verbs that compute with a model.
COMPUTING = {
    name: VERBS[name] for name in WITH_MODEL if name in VERBS
} | ({"eval": "eval --model llama --data data.jsonl".split()} if MODEL else {})
IN_PLACE = {
    "apply-in-place": ("model", "apply out p1 --in-place".split()),
    "revert-in-place": ("tuned", "revert out p1 --in-place".split()),
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LARGE = {"big": (CHUNK + 300,), "two": (2 * CHUNK,)}


def tensors(rng, dtype, large):
    """Tensors of parts of a chunk, of a few bytes, and an empty one; large: also more than a
    chunk."""
    shapes = {"odd": (77, 91), "one": (1,), "empty": (0, 3)} | (LARGE if large else {})
    shapes |= {f"layers.{i}": (5 + 50 * i,) for i in range(20)}
    return {n: narrow(rng.standard_normal(s, "f4"), np.dtype(dtype)) for n, s in shapes.items()}


def write_quantised(folder, rng, large):
    """FP8 in two shards, with one scale for a row."""
    rows = {f"layers.{i}": 3 + 20 * i for i in range(12)} | ({"big": 1400} if large else {})
    F8 = np.dtype(ml_dtypes.float8_e4m3fn)
    weights = {name: rng.standard_normal((n, 800), "f4").astype(F8) for name, n in rows.items()}
    scales = {f"{name}_scale": np.full((n, 1), 1 / n, "f4") for name, n in rows.items()}
    write_folder(folder, weights | scales | {"norm": np.ones(8, BF16)}, shards=2)
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (folder / "config.json").write_text(json.dumps(config))


def make_inputs(folder, large):
    """All inputs of VERBS."""
    rng = np.random.default_rng(7)
    for name in ("model", "tuned", "base"):
        write_folder(folder / name, tensors(rng, BF16, large), shards=3)
    for name, shards in (("forget", 3), ("retain", 2)):
        write_folder(
            folder / name, tensors(rng, "f4", large), shards=shards, metadata={"perta.stat": "mean"}
        )
    write_quantised(folder / "quantised", rng, large)
    run(folder, "diff", "model", "tuned", "--patch", "p1")
    run(folder, "diff", "tuned", "base", "--patch", "p2")
    (folder / "model.json").write_text(run(folder, "manifest", "model").stdout)
    write_llama(folder / "llama", LLAMA)
    ids = [random.Random(n).choices(range(200), k=30) for n in range(26)]
    for name, part in (("data", ids[:20]), ("other", ids[20:])):
        lines = "\n".join(json.dumps({"input_ids": i}) for i in part)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, exclusive in (("llama-tuned", 0x21), ("llama-base", 0x0C)):
        shutil.copytree(folder / "llama", folder / name)
        weights = bytearray((folder / "llama/model.safetensors").read_bytes())
        weights[-1 << 15 :: 2] = bytes(byte ^ exclusive for byte in weights[-1 << 15 :: 2])
        (folder / name / "model.safetensors").write_bytes(weights)
    return folder


def run(folder, *command, status=0, env=EAGER, perta=PERTA, **how):
    """Run, and assert the exit status (None: any)."""
    skip_what_needs_a_model(command)
    command = [str(perta), *command, "--progress", "none"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS, **how)
    assert status is None or done.returncode == status, (done.returncode, done.stderr)
    return done


def stop_at(folder, command, kind, n, number=signal.SIGKILL, env=EAGER):
    """Run, and send a signal at the nth operation of that kind, if there are so many. Returns
    the exit status (-SIGKILL: killed) and the output."""
    faults = {"PERTA_FAULTS": f"fast=1,signal={kind}:{n}:{int(number)}"}
    done = run(folder, *command, env=env | faults, perta=FAULTY, status=None)
    return done.returncode, done.stderr


def operations(folder, command, log, env=EAGER):
    """The number of operations of each kind in a run, counted in the file log."""
    run(folder, *command, env=env | {"PERTA_FAULTS": f"fast=1,count={log}"}, perta=FAULTY)
    counts = dict(line.split() for line in log.read_text().splitlines())
    log.unlink()
    return {kind: int(n) for kind, n in counts.items()}


def records_of(journal):
    return [json.loads(line.split(b" ", 1)[1]) for line in journal.read_bytes().splitlines()]


def write_records(journal, records):
    with open(journal, "wb") as file:
        for record in records:
            text = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
            file.write(b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text))


def started_long_ago(journal):
    """Pretend that the run began long ago, at Unix time 1000."""
    records = records_of(journal)
    for record in (records[0], records[-1].get("summary", {})):
        record["started"] = 1000
    write_records(journal, records)
