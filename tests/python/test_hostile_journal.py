"""Leftovers of an interrupted run are resumed only if they make sense. A malicious journal, or a
malicious folder beside it, is refused, and nothing outside the output is written."""

import hashlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess

import numpy as np
import pytest
import xxhash
from conftest import PERTA
from llama import write_llama
from reference import folder_bytes, write_folder
from verbs import EAGER, records_of, stop_at, write_records


def interrupt(perta, *command, at):
    """Run until a file would exceed that many bytes, which fails like a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))

    perta(*command, check=4, env=EAGER, preexec_fn=limit)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Folders a and b, p, and the leftovers of an apply and a diff that were interrupted."""
    path = tmp_path_factory.mktemp("left")

    def perta(*args, check=0, env=None, **kw):
        done = subprocess.run([PERTA, *args], cwd=path, env=os.environ | (env or {}), **kw)
        assert done.returncode == check

    rng = np.random.default_rng(5)
    before = {f"t{i}": rng.standard_normal(30_000).astype(np.float32) for i in range(8)}
    after = {name: rng.permutation(array) for name, array in before.items()}
    write_folder(path / "a", before, shards=2)
    write_folder(path / "b", after, shards=2)
    perta("diff", "a", "b", "--patch", "whole")
    interrupt(perta, "diff", "a", "b", "--patch", "p", at=250_000)
    interrupt(perta, "apply", "a", "whole", "--out", "o", at=300_000)
    return path


@pytest.fixture
def here(left, tmp_path):
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    return tmp_path


RUNS = {"p": "diff a b --patch p --resume", "o": "apply a whole --out o --resume"}


def test_what_is_left_can_be_gone_on_with(perta, here):
    for out, want in ("p", "whole"), ("o", "b"):
        assert len(records_of(here / f"{out}.perta-journal")) > 2
        perta(*RUNS[out].split())
        assert folder_bytes(here / out) == folder_bytes(here / want)


def put(*path):
    """In the last record, put the last argument where the others lead to."""
    *keys, last, value = path

    def change(record):
        for key in keys:
            record = record[key]
        record[last] = value

    return change


BOTH = {
    "no record": lambda r: r.clear(),
    "no place": lambda r: r.pop("place"),
    "place is no array": put("place", 7),
    "shard -1": put("place", 0, -1),
    "shard 2": put("place", 0, 2),
    "shard 2^32": put("place", 0, 1 << 32),
    "tensor -1": put("place", 1, -1),
    "tensor 4": put("place", 1, 4),
    "tensor before": lambda r: put("place", 1, r["place"][1] - 1)(r),
    "unit 0": put("place", 2, 0),
    "unit in a chunk": put("place", 2, 5),
    "unit after the end": put("place", 2, 30_001),
    "unit 2^63 - 1": put("place", 2, (1 << 63) - 1),
    "read -1": put("read", -1),
    "no outputs": put("outputs", []),
    "finished too many": lambda r: r["outputs"][0]["finished"].append({"name": "x"}),
    "finished is a number": put("outputs", 0, "finished", 1),
    "no digest": lambda r: r["outputs"][0].pop("digest"),
    "digest of ff": lambda r: put("digest", "ff" * (len(r["outputs"][0]["digest"]) // 2))(
        r["outputs"][0]
    ),
}
PATCH = {
    "inputs of input -1": put("inputs", 0, "input", -1),
    "inputs of input 9": put("inputs", 0, "input", 9),
    "inputs of shard -1": put("inputs", 0, "shard", -1),
    "inputs of shard 9": put("inputs", 0, "shard", 9),
    "inputs seen 2^62": put("inputs", 0, "seen", 1 << 62),
    "inputs read 2^62": put("inputs", 0, "read", 1 << 62),
    "inputs read -1": put("inputs", 0, "read", -1),
    "inputs of no digest": put("inputs", 0, "digest", ""),
    "inputs of a digest of ff": put("inputs", 0, "digest", "ff" * 768),
    "output of shard -1": put("outputs", 0, "shard", -1),
    "output of shard 1": put("outputs", 0, "shard", 1),
    "output of shard 2": put("outputs", 0, "shard", 2),
    "begun 0": put("outputs", 0, "begun", 0),
    "begun -1": put("outputs", 0, "begun", -1),
    "begun 99": put("outputs", 0, "begun", 99),
    "frames at 0": put("outputs", 0, "frames_at", 0),
    "frames at -1": put("outputs", 0, "frames_at", -1),
    "tensors from -1": put("outputs", 0, "tensors", "first", -1),
    "tensors from 2^60": put("outputs", 0, "tensors", "first", 1 << 60),
    "counts of nothing": put("outputs", 0, "tensors", "counts", ""),
    "counts of much": put("outputs", 0, "tensors", "counts", "00" * 32 * 40),
    "entries from -1": put("outputs", 0, "entries", "first", -1),
    "entries from 0": put("outputs", 0, "entries", "first", 0),
    "entries from 2^60": put("outputs", 0, "entries", "first", 1 << 60),
    "entries of ff": lambda r: put("entries", "ff" * 48)(r["outputs"][0]["entries"]),
    "entries of half a byte": lambda r: put("entries", "f")(r["outputs"][0]["entries"]),
    "encoded too short": put("outputs", 0, "encoded", "00"),
    "no model": lambda r: r["outputs"][0].pop("model"),
}
CASES = [(out, name) for out in RUNS for name in BOTH | (PATCH if out == "p" else {})]


@pytest.mark.parametrize("out, name", CASES, ids=[f"{out}: {name}" for out, name in CASES])
def test_a_record_that_makes_no_sense_is_refused(perta, here, out, name):
    journal = here / f"{out}.perta-journal"
    records = records_of(journal)
    (BOTH | PATCH)[name](records[-1])
    write_records(journal, records)
    refusal = perta(*RUNS[out].split(), check=3).stderr
    assert "--force starts over" in refusal
    assert not (here / out).exists()


def test_a_folder_that_is_not_the_one_on_record_gets_no_name(perta, here):
    records = records_of(here / "p.perta-journal")
    write_records(here / "p.perta-journal", records + [{"publish": [1], "summary": {}}])
    assert "another folder" in perta(*RUNS["p"].split(), check=3).stderr
    assert not (here / "p").exists()
    for summary in {}, {"summary": "none"}:
        write_records(here / "p.perta-journal", records + [{"publish": [1]} | summary])
        assert "damaged; --force starts over: there is no summary" in perta(*RUNS["p"].split(), check=3).stderr


@pytest.mark.parametrize("kind", ["FIFO", "hard link", "symbolic link"])
def test_a_journal_that_is_another_file_is_refused(perta, here, kind):
    journal, precious = here / "p.perta-journal", here / "precious"
    precious.write_text("precious")
    journal.unlink()
    if kind == "FIFO":
        os.mkfifo(journal)
    elif kind == "hard link":
        journal.hardlink_to(precious)
    else:
        journal.symlink_to(precious)
    for flag in [], ["--resume"], ["--force"]:
        perta("diff", "a", "b", "--patch", "p", *flag, check=None)
    assert precious.read_text() == "precious"
    assert not (here / "p").exists()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_left_behind_that_is_another_is_not_written_to(perta, here, link):
    for out in RUNS:
        (file,) = [p for p in (here / f"{out}.perta-partial").iterdir() if p.is_file()][-1:]
        file.rename(here / f"{out}.precious")
        link(here / f"{out}.precious", file)
        precious = (here / f"{out}.precious").read_bytes()
        assert perta(*RUNS[out].split(), check=None).returncode in (3, 4)
        assert (here / f"{out}.precious").read_bytes() == precious


# --- in place


IN_PLACE = "perta-in-place.journal"


def ahead_head(subject, patch_id=b"0" * 64):
    head = b"PERTAWAL" + struct.pack("<II64s3072s", 1, 0, patch_id, subject)
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))


@pytest.mark.parametrize(
    "subject, shown",
    [
        (b"patches/alpha-1", "patches/alpha-1"),
        (b"p; rm -rf ~", "PATCH"),
        (b"$(id)", "PATCH"),
        (b"`id`", "PATCH"),
        (b"--model", "PATCH"),
        (b"", "PATCH"),
    ],
)
def test_a_command_that_is_shown_runs_nothing_else(perta, here, subject, shown):
    (here / "a" / IN_PLACE).write_bytes(ahead_head(subject))
    assert f"`perta apply a {shown} --in-place'" in perta("inspect", "a", check=3).stderr
    refusal = perta("apply", "a", "whole", "--in-place", check=2).stderr
    assert f"the patch {shown} was interrupted" in refusal


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("other"), lambda p: p.mkdir(),
                                  lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\xff" * 9000)])
def test_what_is_no_journal_of_an_edit_in_place_is_refused(perta, here, make):
    (here / "other").write_bytes(ahead_head(b"p"))
    make(here / "a" / IN_PLACE)
    before = folder_bytes(here / "b")
    for command in "inspect a", "apply a whole --in-place", "revert a whole --in-place":
        assert perta(*command.split(), check=None).returncode in (1, 3, 4)
    assert folder_bytes(here / "b") == before


def batch(extents, data, table_at=4096):
    table = b"".join(struct.pack("<IIQQ", *extent) for extent in extents)
    head = b"PERTAWAL" + struct.pack("<IIQQ40s", len(extents), 0, len(data),
                                     xxhash.xxh3_64_intdigest(table),
                                     xxhash.xxh3_128_hexdigest(data).encode())
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    return (head + table).ljust(-(-(80 + 2048 * 24) // 4096) * 4096, b"\0") + data


@pytest.mark.parametrize(
    "extent, length",
    [((0, 0, 0, 4096), 4096), ((2, 0, 0, 4096), 4096), ((1 << 31, 0, 0, 4096), 4096),
     ((0, 0, 4096, (1 << 64) - 4096), 4096), ((0, 0, 1 << 40, 4096), 4096), ((0, 0, 5, 4096), 4096),
     ((0, 0, 0, 4096), 1 << 62), ((0, 0, 0, 0), 0)],
    ids=["the header", "no such shard", "nor such", "overflow", "beyond", "not a block", "long", "none"],
)  # fmt: skip
def test_a_journal_writes_nothing_but_chunks_of_the_model(perta, here, extent, length):
    """Headers come out unchanged, or the edit fails; files do not grow."""
    patch_id = hashlib.sha256((here / "whole/manifest.json").read_bytes()).hexdigest().encode()
    data = b"\xff" * (4096 if length else 0)
    log = ahead_head(b"whole", patch_id).ljust(4096, b"\0") + batch([extent], data)
    if length > 4096:
        log = log.replace(struct.pack("<QQ", 4096, 0)[:8], struct.pack("<Q", length), 1)
    (here / "a" / IN_PLACE).write_bytes(log)
    sizes = {p.name: p.stat().st_size for p in (here / "a").glob("*.safetensors")}
    result = perta("apply", "a", "whole", "--in-place", check=None)
    assert result.returncode in (0, 1, 3), result.stderr
    assert sizes == {p.name: p.stat().st_size for p in (here / "a").glob("*.safetensors")}
    if result.returncode == 0:
        assert folder_bytes(here / "a") == folder_bytes(here / "b")


# --- estimate


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ESTIMATE = "estimate --model model --data data.jsonl --out imp --memory 140M".split()


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    path = tmp_path_factory.mktemp("estimated")
    write_llama(path / "model", CONFIG)
    rng = random.Random(2)
    ids = [{"input_ids": [rng.randrange(300) for _ in range(60)]} for _ in range(200)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, ids)))
    stop_at(path, ESTIMATE, "commit", 2)
    return path


@pytest.fixture
def estimate(estimated, tmp_path):
    shutil.copytree(estimated, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("stage", ["forward", "head", "backward"])
@pytest.mark.parametrize("layer", [-1, 6, 1 << 20, (1 << 32) + 1])
def test_a_layer_that_is_not_there_is_refused(perta, estimate, stage, layer):
    journal = estimate / "imp/mean.perta-journal"
    records = records_of(journal)
    records[-1] |= {"stage": stage, "layer": layer}
    write_records(journal, records)
    assert "no such layer" in perta(*ESTIMATE, "--resume", check=3).stderr


@pytest.mark.parametrize("kind", ["link", "hard link", "folder"])
def test_scratch_that_leads_elsewhere_is_not_written_to(perta, estimate, kind):
    scratch = estimate / "imp/mean.perta-partial/perta-scratch"
    outside = estimate / "outside"
    outside.mkdir()
    for layer in range(7):
        for name in f"x-{layer}", f"dx-{layer}":
            if (scratch / name).exists():
                (scratch / name).rename(outside / name)
            else:
                (outside / name).write_text("precious")
            if kind == "link":
                (scratch / name).symlink_to(outside / name)
            elif kind == "hard link":
                (scratch / name).hardlink_to(outside / name)
    if kind == "folder":
        scratch.rmdir()
        scratch.symlink_to(outside)
    precious = folder_bytes(outside)
    # First with the last record as it is; then from the start, where there is no record to resume
    # from.
    assert perta(*ESTIMATE, "--resume", check=None).returncode in (3, 4)
    write_records(estimate / "imp/mean.perta-journal", records_of(estimate / "imp/mean.perta-journal")[:1])
    perta(*ESTIMATE, "--resume")
    assert folder_bytes(outside) == precious
