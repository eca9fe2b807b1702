"""apply and revert --in-place: exact; refused without changes; and complete again after any
kill.

Power cuts are replayed: tests/trace_writes.c records every write and sync, and folders are rebuilt
as a disk might hold them that lost, or tore, any write that was not synced yet."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import LONG, PERTA, ROOT, SANITIZED
from reference import BF16, CHUNK, folder_bytes, narrow, write_folder
from test_crash import kill_after
from verbs import operations, run, stop_at

KILLS = 600 if LONG else 12
JOURNAL = "perta-in-place.journal"


def model(rng):
    """Tensors that begin and end anywhere in a block, of every width, some larger than a chunk."""
    shapes = {"a.big": (CHUNK + 301,), "b.odd": (77, 91), "c.byte": (5001,), "d.empty": (0, 3), "e.two": (2 * CHUNK,), "f.three": (3 * CHUNK,)}
    dtypes = {"c.byte": np.dtype("u1"), "b.odd": np.dtype("f4")}
    dtypes |= {f"layers.{i}": np.dtype(t) for i, t in enumerate(["f2", "f8", "i8", "i4", "i2", "i1", "?"])}
    tensors = {}
    for name, shape in (shapes | {f"layers.{i}": (5 + i,) for i in range(30)}).items():
        x = rng.standard_normal(shape, "f4")
        dtype = dtypes.get(name, BF16)
        tensors[name] = narrow(x.astype("f8" if dtype == "f8" else "f4"), dtype) if dtype.kind == "f" or dtype == BF16 else (9 * x).astype("i8").astype(dtype)
    return tensors


def changed(rng, tensors):
    """Some tensors stay unchanged, others change in part."""
    new = {}
    for i, (name, x) in enumerate(tensors.items()):
        y = x.copy()
        if i % 3 and y.size:
            flat = y.reshape(-1)
            flat[rng.integers(0, flat.size, 1 + flat.size // 3)] = flat[0]
        new[name] = y
    return new


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in-place")
    rng = np.random.default_rng(5)
    old = model(rng)
    write_folder(folder / "old", old, shards=3)
    write_folder(folder / "new", changed(rng, old), shards=3)
    for name in ("old", "new"):
        (folder / name / "config.json").write_text("{}")
    subprocess.run([PERTA, "diff", "old", "new", "--patch", "p"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def work(pair, tmp_path):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    shutil.copytree(pair / "old", tmp_path / "m")
    return tmp_path


@pytest.mark.parametrize("io, threads", [("direct", 1), ("mmap", 2), ("pread", 4)])
@pytest.mark.parametrize("memory", ["1G", "least"])
def test_there_and_back_byte_for_byte(perta, work, io, threads, memory):
    flags = ["--in-place", "--io", io, "--threads", threads, "--memory"]
    if memory == "least":
        refusal = perta("apply", "m", "p", *flags, "4M", check=2).stderr
        memory = re.search(r"needs (\d+M)", refusal)[1]
        assert folder_bytes(work / "m") == folder_bytes(work / "old")
    perta("apply", "m", "p", *flags, memory)
    assert folder_bytes(work / "m") == folder_bytes(work / "new")
    perta("verify", "m", "--patch", "p", "--applied")
    perta("revert", "m", "p", *flags, memory)
    assert folder_bytes(work / "m") == folder_bytes(work / "old")


def untouched(work, perta, message, check, *flags):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (work / "m").iterdir()}
    said = perta("apply", "m", "p", "--in-place", *flags, check=check)
    assert message in said.stderr
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (work / "m").iterdir()} == before


def test_nothing_is_touched_unless_every_chunk_fits(perta, work):
    last = sorted((work / "m").glob("*.safetensors"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    untouched(work, perta, "it is for another model, or one of the two is damaged", 1)
    shutil.rmtree(work / "m")
    shutil.copytree(work / "new", work / "m")
    untouched(work, perta, "here the patch is applied already", 1)


def test_a_damaged_patch_is_found_before_anything_is_touched(perta, work):
    path = max((work / "p").glob("*.perta"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    untouched(work, perta, path.name, 1)


def test_links_and_what_may_not_be_written_are_refused(perta, work):
    shard = sorted((work / "m").glob("*.safetensors"))[1]
    os.link(shard, work / "other-name")
    untouched(work, perta, "has 2 names (hard links)", 2)
    (work / "other-name").unlink()
    shard.chmod(0o444)
    untouched(work, perta, "may not be written; change that (chmod u+w)", 2)
    shard.chmod(0o644)
    cache = work / "hub/snapshots/m"
    cache.mkdir(parents=True)
    (work / "hub/blobs").mkdir()
    for i, path in enumerate(sorted((work / "m").iterdir())):
        shutil.copy(path, work / f"hub/blobs/{i}")
        (cache / path.name).symlink_to(f"../../blobs/{i}")
    said = perta("apply", cache, "p", "--in-place", check=2).stderr
    assert "a symbolic link, as in a Hugging Face cache" in said and "cp -rL" in said


def test_a_patch_that_changes_headers_is_refused(perta, work):
    rng = np.random.default_rng(5)
    tensors = model(rng)
    write_folder(work / "noted", tensors, shards=3, metadata={"format": "pt"})
    shutil.rmtree(work / "p")
    perta("diff", "old", "noted", "--patch", "p")
    untouched(work, perta, "changes the header of this shard", 2)


def test_one_process_at_a_time(perta, work):
    folder = os.open(work / "m", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    untouched(work, perta, "another process edits it in place", 2)
    os.close(folder)
    perta("apply", "m", "p", "--in-place")


def test_flags_that_make_no_sense(perta, work):
    untouched(work, perta, "either --out DIR or --in-place", 2, "--out", "o")
    assert "either --out DIR or --in-place" in perta("apply", "m", "p", check=2).stderr
    perta("apply", "m", "p", "--in-place", "--dry-run")
    assert folder_bytes(work / "m") == folder_bytes(work / "old")
    shard = next((work / "m").glob("*.safetensors"))
    assert "--in-place is for folders" in perta("apply", shard, "p", "--in-place", check=2).stderr


def test_a_full_disk_leaves_the_model_as_it_was(perta, work):
    limit = 1 << 20  # the journal is larger; the shards exist already
    command = ["prlimit", f"--fsize={limit}", PERTA, "apply", "m", "p", "--in-place"]
    full = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert full.returncode == 4 and "no room for" in full.stderr
    assert folder_bytes(work / "m") == folder_bytes(work / "old")


# --- killed


EDIT = "m p --in-place --memory 64M".split()


@pytest.mark.parametrize("kind, begun", [("read", False), ("pwrite", True)])
def test_interrupted_it_says_what_to_do(work, kind, begun):
    """Before the first byte is written nothing has changed; after that the message names both
    directions."""
    command = "apply m p --in-place --io pread --memory".split() + ["128M" if SANITIZED else "64M"]
    status, said = stop_at(work, command, kind, 1, signal.SIGINT)
    assert status == 130 and "interrupted" in said
    assert begun == (work / "m" / JOURNAL).exists()
    assert begun == ("the same command completes the edit, revert reverts it" in said)
    assert begun or folder_bytes(work / "m") == folder_bytes(work / "old")
    run(work, *command)
    assert folder_bytes(work / "m") == folder_bytes(work / "new")


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
def test_killed_at_any_operation_it_goes_on_or_back(work):
    n = operations(work, ["apply", *EDIT], work / "count")["any"]
    rng = random.Random(1)
    kill_and_go_on_or_back(work, rng, lambda verb: stop_at(work, [verb, *EDIT], "any", rng.randint(1, n)))


@pytest.mark.skipif(SANITIZED or not LONG, reason="the long tier's; sanitizers take memory too")
def test_killed_at_random_instants_it_goes_on_or_back(work):
    """At any instant, also within an operation."""
    start = time.monotonic()
    run(work, "apply", *EDIT)
    whole = time.monotonic() - start
    rng = random.Random(1)
    kill_and_go_on_or_back(work, rng, lambda verb: kill_after(work, [verb, *EDIT], rng.uniform(0, whole)))


def kill_and_go_on_or_back(work, rng, run_and_kill):
    old, new = folder_bytes(work / "old"), folder_bytes(work / "new")
    side, kills, in_the_middle = new, 0, 0
    while kills < KILLS or (in_the_middle <= KILLS // 10 and kills < 10 * KILLS):
        verb = "revert" if side == new else "apply"
        status, said = run_and_kill(verb)
        assert status in (0, -signal.SIGKILL), said
        kills += status != 0
        in_the_middle += (work / "m" / JOURNAL).exists()
        if rng.random() < 0.5:  # forwards or backwards
            verb = "apply" if verb == "revert" else "revert"
        wanted = new if verb == "apply" else old
        done = run(work, verb, *EDIT, status=None)
        have = folder_bytes(work / "m")
        # Before anything was changed, or after the end, there is nothing to undo.
        assert done.returncode == 0 or ("here the patch is" in done.stderr and have == wanted), done.stderr
        assert have == wanted
        side = wanted
    assert in_the_middle > KILLS // 10


# --- power cuts


@pytest.fixture(scope="module")
def tracer(tmp_path_factory):
    """A library that records what a process writes."""
    library = tmp_path_factory.mktemp("tracer") / "trace_writes.so"
    compiled = subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, ROOT / "tests/trace_writes.c"])
    assert compiled.returncode == 0
    return library


def read_trace(path):
    """The recorded operations: [what, file, offset, bytes]."""
    acts = []
    data = path.read_bytes()
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        head = json.loads(data[at:end])
        at = end + 1
        head["data"] = data[at : at + head["bytes"]]
        at += len(head["data"])
        acts.append(head)
    return acts


def after_a_cut(rng, old, acts):
    """Files as a disk might hold them: what was synced, and any part of the rest, sector by
    sector; of names, those that the folder had when it was synced, and perhaps later ones."""
    contents = {name: bytearray(data) for name, data in old.items()}
    names = {name: name for name in old}  # the current names, and for each the first name
    last_sync = {}
    for i, act in enumerate(acts):
        if act["what"] == "sync":
            last_sync[act["file"]] = i
        elif act["what"] == "rename":  # its synced bytes move with it
            last_sync[act["data"].decode()] = last_sync.get(act["file"], -1)
    for i, act in enumerate(acts):
        name = act["file"]
        certain = i < last_sync.get(".", -1)
        if act["what"] == "unlink" and (certain or rng.random() < 0.5):
            names.pop(name, None)
        if act["what"] == "rename":
            first = names.pop(name)
            names[act["data"].decode() if certain or rng.random() < 0.5 else name] = first
        if act["what"] != "write":
            continue
        first = names.setdefault(name, name)
        data, file = act["data"], contents.setdefault(first, bytearray())
        file.extend(bytes(max(0, act["offset"] + len(data) - len(file))))
        for at in range(0, len(data), 512):
            if i < last_sync.get(name, -1) or rng.random() < 0.5:
                file[act["offset"] + at : act["offset"] + at + 512] = data[at : at + 512]
    return {name: contents[first] for name, first in names.items()}


def record(perta, work, tracer, verb):
    """What the run writes, operation by operation, and the model before."""
    shutil.rmtree(work / "m")
    shutil.copytree(work / ("old" if verb == "apply" else "new"), work / "m")
    start = folder_bytes(work / "m")
    trace = work / "trace"
    env = {"LD_PRELOAD": str(tracer), "TRACE_WRITES": str(trace), "TRACE_FOLDER": str(work / "m")}
    perta(verb, "m", "p", "--in-place", "--memory", "64M", env=env)
    return start, read_trace(trace)


def cut(work, rng, start, acts):
    files = after_a_cut(rng, start, acts)
    shutil.rmtree(work / "m")
    (work / "m").mkdir()
    for name, data in files.items():
        (work / "m" / name).write_bytes(data)


NO_TRACE = pytest.mark.skipif(SANITIZED, reason="a preloaded library and the sanitizers' own do not mix")


@NO_TRACE
def test_half_edited_it_is_refused_by_others_who_say_what_to_do(perta, work, tracer):
    start, acts = record(perta, work, tracer, "apply")
    cut(work, random.Random(4), start, acts[: len(acts) // 2])
    half = folder_bytes(work / "m")
    assert JOURNAL in half
    for command in (["inspect", "m"], ["diff", "m", "new", "--patch", "q"], ["apply", "m", "p", "--out", "o"]):
        said = perta(*command, check=3).stderr
        assert f"`perta apply m {work}/p --in-place' completes it, revert instead of apply reverts it" in said
    perta("diff", "old", "old", "--patch", "q")
    said = perta("apply", "m", "q", "--in-place", check=2).stderr
    assert f"an edit by the patch {work}/p was interrupted here" in said
    said = perta("apply", "m", "p", "--in-place", "--dry-run").stdout
    assert "an interrupted run would be completed" in said
    assert folder_bytes(work / "m") == half
    perta("apply", "m", "p", "--in-place")
    assert folder_bytes(work / "m") == folder_bytes(work / "new")


@NO_TRACE
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_power_cut_at_any_write_leaves_what_goes_on_or_back(perta, work, tracer, verb):
    start, acts = record(perta, work, tracer, verb)
    assert sum(a["what"] == "write" for a in acts) > 5 and sum(a["what"] == "sync" for a in acts) > 4
    rng = random.Random(verb)
    cuts = [*range(len(acts) + 1)] * 8 if LONG else rng.sample(range(len(acts) + 1), min(6, len(acts)))
    sides = {"apply": folder_bytes(work / "new"), "revert": folder_bytes(work / "old")}
    for n in cuts:
        cut(work, rng, start, acts[:n])
        then = rng.choice(["apply", "revert"])
        said = perta(then, "m", "p", "--in-place", check=None)
        if said.returncode:  # it had finished, or not begun, and there was no journal
            assert said.returncode == 1 and "here the patch is" in said.stderr, (n, said.stderr)
        assert folder_bytes(work / "m") == sides[then], n
