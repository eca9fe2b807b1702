"""Resource limits: memory, a full disk, interruption, and what a machine may forbid."""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import LONG, PERTA, SANITIZED, in_a_larger_process, needed, part
from llama import write_llama
from reference import BF16, folder_bytes, write_folder
from verbs import COMPUTING, IN_PLACE, LLAMA, STREAM, make_inputs, stop_at

MIB = 1 << 20
UNLEARN = "unlearn --model model --tuned tuned --base base --forget forget --retain retain".split()


def make_set(path, n_params, seed=0):
    """Folders for UNLEARN; tensors of 12 Mi elements, larger than their share of the budget."""
    rng = np.random.default_rng(seed)
    sizes = [n_params // 4] * 4
    base = {f"layer.{i}": rng.standard_normal(n, np.float32) for i, n in enumerate(sizes)}

    def tuned():
        return {
            name: (x * np.float32(1 + 1e-3)).astype(BF16) if i % 2 else x.astype(BF16)
            for i, (name, x) in enumerate(base.items())
        }

    write_folder(path / "base", {name: x.astype(BF16) for name, x in base.items()})
    write_folder(path / "model", tuned(), shards=2)
    write_folder(path / "tuned", tuned(), shards=2)
    for folder in ("forget", "retain"):
        values = {name: np.roll(x, 7) for name, x in base.items()}
        write_folder(path / folder, values, metadata={"perta.stat": "mean"})


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """600 MiB of inputs."""
    path = tmp_path_factory.mktemp("big")
    make_set(path, 44 * MIB)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    make_set(path, MIB)
    return path


def peak_mib(command, cwd, status=0):
    """The peak of resident memory. The child is small at first, because peaks are inherited over
    fork."""
    helper = (
        "import os, resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", helper, str(PERTA), *command]
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    found, peak = map(int, done.stdout.split())
    assert found == status, done.stderr
    return peak / 1024


JOBS = {
    "unlearn": [*UNLEARN, "--patch", "p", "--out", "o"],
    "diff": "diff tuned model --patch p".split(),
    "accumulate": "accumulate --stat mean,meansq --out i forget retain".split(),
    "manifest": "manifest forget".split(),
}
# These read patches.
PATCHED = {
    "apply": "apply model p1 --out o".split(),
    "revert": "revert tuned p1 --out o".split(),
    "compose": "compose p1 p2 --model model --patch p".split(),
    "verify": "verify p1".split(),
    "verify --applied": "verify tuned --patch p1 --applied".split(),
    # Two headers differ.
    "revert p3": "revert named p3 --out o".split(),
    "verify --original": "verify forget --patch p3 --original".split(),
}
sanitized = pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")


@sanitized
@pytest.mark.parametrize("io, threads", [("direct", "2"), ("pread", "2"), ("pread", "128")])
@pytest.mark.parametrize("job", JOBS)
def test_memory_bounds_the_whole_process(big, tmp_path, job, io, threads):
    """Mapped files count as page cache, so that way of reading is left out."""
    for folder in ("model", "tuned", "base", "forget", "retain"):
        (tmp_path / folder).symlink_to(big / folder)
    command = [*JOBS[job], "--memory", "128M", "--io", io, "--threads", threads]
    assert peak_mib(command, tmp_path) <= 128


@pytest.mark.parametrize("job", JOBS)
def test_what_a_refusal_names_is_enough(perta, small, tmp_path, job):
    """Resident memory varies between runs; this run has 2 MiB more than the refused one."""
    for folder in ("model", "tuned", "base", "forget", "retain"):
        (tmp_path / folder).symlink_to(small / folder)
    perta(*JOBS[job], "--memory", needed(perta, JOBS[job]), **in_a_larger_process())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), large=True)


THREADS = [1, 2, 16, 64, 128]


@sanitized
@pytest.mark.parametrize("verb", [*STREAM, *COMPUTING, *IN_PLACE])
def test_a_budget_is_for_any_number_of_threads(perta, inputs, tmp_path, verb):
    """A small budget means fewer workers, never a refusal, and the same result."""
    for entry in inputs.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    model, command = IN_PLACE.get(verb) or (None, (STREAM | COMPUTING)[verb])
    out = tmp_path / "out"

    def start_over():
        if out.is_dir():
            shutil.rmtree(out)
        if model:
            shutil.copytree(inputs / model, out)

    start_over()
    named = [int(needed(perta, [*command, "--threads", n])[:-1]) for n in ("1", "128")]
    least, enough = min(named), min(named) + 150  # for one worker, and for several
    results = []
    for threads, budget in ((1, least), (128, least), *((n, enough) for n in THREADS[1:])):
        start_over()
        flags = ["--threads", str(threads), "--memory", f"{budget}M", "--io", "pread"]
        assert peak_mib([*command, *flags], tmp_path) <= budget
        results.append(out.is_dir() and folder_bytes(out))
    assert all(one == results[0] for one in results)


@sanitized
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("compute", ["f32", "bf16"])
def test_samples_of_many_lengths_are_within_the_budget(perta, tmp_path, compute, threads):
    """Products are compiled for each of their shapes, and each sample length has several."""
    wide = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 2500} if LONG else {}
    write_llama(tmp_path / "llama", LLAMA | {"num_hidden_layers": 1} | wide)
    samples = [{"input_ids": [i % 200 for i in range(n)]} for n in range(2, 900, 13)]
    (tmp_path / "data").write_text("\n".join(json.dumps(sample) for sample in samples))
    command = "estimate --model llama --data data --out o --stat mean,meansq".split()
    command += ["--compute", compute, "--threads", threads]
    if "cannot" in perta(*command, "--memory", "1M", check=2).stderr:
        pytest.skip("this CPU has no bfloat16")
    budget = needed(perta, command)
    assert peak_mib([*command, "--memory", budget], tmp_path) <= int(budget.rstrip("M"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """70,000 tensors of few elements: headers, tables and records take more memory than data."""
    path = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(3)
    values = {f"model.layers.{i:06}.weight": rng.standard_normal(3, np.float32) for i in range(70_000)}
    for i, folder in enumerate(("model", "tuned", "base", "forget", "retain")):
        dtype = BF16 if i < 3 else np.float32
        metadata = None if i < 3 else {"perta.stat": "mean"}
        made = {name: (x + np.float32(i / 100)).astype(dtype) for name, x in values.items()}
        write_folder(path / folder, made, metadata=metadata)
    write_folder(path / "named", values, metadata={"another": "header"})
    for old, new, patch in (("model", "tuned", "p1"), ("tuned", "base", "p2"), ("forget", "named", "p3")):
        subprocess.run([PERTA, "diff", old, new, "--patch", patch, "--quiet"], cwd=path, check=True)
    return path


@sanitized
@pytest.mark.parametrize("commit", [None, 100_000])
@pytest.mark.parametrize("job", JOBS | PATCHED)
def test_a_budget_named_for_very_many_tensors_is_kept(perta, many, tmp_path, job, commit, monkeypatch):
    """The budget that the refusal names is enough and bounds the process, including a record of
    all tensors."""
    for folder in many.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    if commit:
        monkeypatch.setenv("PERTA_COMMIT_BYTES", str(commit))
    command = (JOBS | PATCHED)[job]
    budget = needed(perta, command)
    peak = peak_mib([*command, "--memory", budget, "--io", "pread", "--threads", "2"], tmp_path)
    assert peak <= int(budget.rstrip("M")) <= 256


def damage_every_frame(patch):
    """Those of the only file in the patch; the table says where they are (docs/patch-format.md)."""
    path = patch / "model.safetensors.perta"
    data = bytearray(path.read_bytes())
    (n,) = struct.unpack_from("<Q", data, len(data) - 24)
    for i in range(n):
        at, length = struct.unpack_from("<QI", data, len(data) - 24 - 48 * (n - i))
        if length:
            data[at + length - 1] ^= 1
    path.write_bytes(data)


DIFFERING = {
    "a patch": "verify damaged".split(),
    "a model": "verify model --patch p1 --applied".split(),
    "a folder": "verify model --manifest tuned.json".split(),
}


@sanitized
@pytest.mark.parametrize("what", DIFFERING)
def test_a_list_of_very_many_differences_is_within_the_budget(perta, many, tmp_path, what):
    for folder in many.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    shutil.copytree(many / "p1", tmp_path / "damaged")
    damage_every_frame(tmp_path / "damaged")
    (tmp_path / "tuned.json").write_text(perta("manifest", "tuned").stdout)
    budget = needed(perta, DIFFERING[what])
    command = [*DIFFERING[what], "--memory", budget, "--io", "pread", "--threads", "2"]
    assert peak_mib(command, tmp_path, status=1) <= int(budget.rstrip("M"))


@sanitized
def test_the_budget_holds_under_a_hard_limit_on_the_process(perta, big, tmp_path):
    """The address space, which besides resident memory includes stacks, libraries and arenas."""
    for folder in ("model", "tuned", "base", "forget", "retain"):
        (tmp_path / folder).symlink_to(big / folder)
    limit = (128 + 64) * MIB
    for io, threads in (("direct", "2"), ("pread", "2"), ("direct", "128")):
        perta(
            *UNLEARN, "--patch", "p", "--force", "--memory", "128M", "--threads", threads, "--io", io,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip


# --- interruption


@pytest.mark.parametrize("number", part([signal.SIGINT, signal.SIGTERM], sanitized=1))
@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_an_interrupted_run_leaves_nothing(big, tmp_path, number, io):
    command = [*UNLEARN, "--patch", tmp_path / "p", "--out", tmp_path / "o", "--io", io]
    status, message = stop_at(big, command, "write", 1, number, env=os.environ)
    assert status == 130 and "interrupted" in message
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_leaves_is_reported_and_force_starts_over(perta, small, tmp_path):
    stop_at(small, [*UNLEARN, "--patch", tmp_path / "p"], "write", 1, env=os.environ)
    assert not (tmp_path / "p").exists()
    refusal = perta(*UNLEARN, "--patch", tmp_path / "p", cwd=small, check=2).stderr
    assert "p.perta-partial: left by a run" in refusal and "--force" in refusal
    perta(*UNLEARN, "--patch", tmp_path / "p", "--force", cwd=small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


# --- a full disk


def test_a_full_disk_is_said_and_leaves_nothing(perta, small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", disk]).returncode:
        pytest.skip("may not mount")
    try:
        before = {folder: folder_bytes(small / folder) for folder in ("model", "base")}
        for flags in (["--patch", disk / "p"], ["--patch", tmp_path / "p", "--out", disk / "o"]):
            refusal = perta(*UNLEARN, *flags, cwd=small, check=4).stderr
            assert "No space left on device" in refusal and str(disk) in refusal
            assert not list(disk.iterdir()) and not (tmp_path / "p").exists()
        assert {folder: folder_bytes(small / folder) for folder in before} == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_size_is_an_error_not_a_death(perta, small, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    words = [*UNLEARN, "--patch", tmp_path / "p", "--out", tmp_path / "o"]
    assert "File too large" in perta(*words, cwd=small, check=4, preexec_fn=limit).stderr
    assert not list(tmp_path.iterdir())


# --- permissions that containers and ordinary users lack

IO_URING_SETUP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, EPERM = 425, 38, 22, 1


def forbid_io_uring():
    """Like Docker's default profile: a seccomp filter that answers EPERM."""
    instructions = [
        (0x20, 0, 0, 0),  # load the system call's number
        (0x15, 0, 1, IO_URING_SETUP),
        (0x06, 0, 0, 0x00050000 | EPERM),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, 2, program) == 0, os.strerror(ctypes.get_errno())


def evict(path):
    """Remove it from the page cache, so that auto would read it directly."""
    for file in path.rglob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def test_where_io_uring_is_forbidden_threads_read(perta, small, tmp_path):
    perta(*UNLEARN, "--patch", tmp_path / "p", cwd=small)
    evict(small)
    said = perta("inspect", "--io", "model", cwd=small, preexec_fn=forbid_io_uring).stdout
    assert "pread" in said and "Operation not permitted" in said
    evict(small)
    result = perta(
        *UNLEARN, "--patch", tmp_path / "q", "--json", cwd=small, preexec_fn=forbid_io_uring
    )
    assert json.loads(result.stdout)["io"]["engine"] == "pread"
    assert folder_bytes(tmp_path / "p") == folder_bytes(tmp_path / "q")
    words = [*UNLEARN, "--patch", tmp_path / "r", "--io", "direct"]
    refusal = perta(*words, cwd=small, check=4, preexec_fn=forbid_io_uring).stderr
    assert "io_uring is refused here" in refusal and "--io auto" in refusal


@pytest.mark.parametrize("kib", [0, 64, 8192])
def test_an_ordinary_user_with_little_lockable_memory_gets_the_same(perta, small, tmp_path, kib):
    if os.getuid():
        pytest.skip("only root can become another user")

    def become_nobody():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib * 1024,) * 2)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    for path in [*small.rglob("*.*"), small, *small.parents[:2], *tmp_path.parents[:2]]:
        path.chmod(0o755)
    tmp_path.chmod(0o777)
    perta(*UNLEARN, "--patch", tmp_path / "p", cwd=small)
    if subprocess.run(["test", "-x", PERTA], preexec_fn=become_nobody).returncode:
        pytest.skip(f"others may not run {PERTA}")
    evict(small)
    perta(*UNLEARN, "--patch", tmp_path / "q", cwd=small, preexec_fn=become_nobody)
    assert folder_bytes(tmp_path / "p") == folder_bytes(tmp_path / "q")


# --- --json and --quiet


@pytest.mark.parametrize(
    "words",
    [
        [*UNLEARN, "--patch", "p", "--out", "o"],
        "diff tuned model --patch d".split(),
        "apply model p --out a".split(),
        "revert o p --out r".split(),
        "accumulate --out i forget retain".split(),
        "verify p".split(),
        "verify o --patch p --applied".split(),
        "manifest model".split(),
        "inspect model".split(),
        "inspect p".split(),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_json_is_one_object_and_quiet_is_silent(perta, small, tmp_path, words):
    for folder in ("model", "tuned", "base", "forget", "retain"):
        (tmp_path / folder).symlink_to(small / folder)
    if words[0] in ("apply", "revert", "verify") or words[-1] == "p":
        perta(*UNLEARN, "--patch", "p", "--out", "o")
    assert isinstance(json.loads(perta(*words, "--json").stdout), dict)
    if words[0] not in ("inspect", "manifest"):
        again = [] if words[0] == "verify" else ["--force"]
        result = perta(*words, "--quiet", *again)
        assert not result.stdout and not result.stderr


def test_a_dry_run_writes_nothing(perta, small, tmp_path):
    result = perta(*UNLEARN, "--patch", tmp_path / "p", "--dry-run", cwd=small)
    assert re.search("nothing was written", result.stdout)
    assert not list(tmp_path.iterdir())
