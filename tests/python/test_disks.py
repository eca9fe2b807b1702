"""Real disks that are full, read-only, cut off, smaller than they look, or that return less than
was asked for. Tests that need root or a missing tool are skipped, with the reason.

The long tier (PERTA_LONG=1) cuts a disk off at every step of a job, not at a few."""

import ctypes.util
import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import HANGS, LONG, part
from reference import folder_bytes
from verbs import EAGER, FAULTY, VERBS, make_inputs, run

FEW = list(VERBS) if LONG else part([v for v in ("unlearn-both", "accumulate", "estimate") if v in VERBS], sanitized=2)
MIB = 1 << 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("disks"), large=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("large"), large=True)


@pytest.fixture(autouse=True)
def inputs_stay(inputs):
    before = folder_bytes(inputs)
    yield
    assert folder_bytes(inputs) == before


def system(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


@contextmanager
def mounted(disk, *mount):
    """Mount a disk at that folder; skip if that is not permitted."""
    disk.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *map(str, mount), disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        system("umount", disk)


def image(path, kind, size=None):
    """A file system in a sparse file."""
    make = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"]}[kind]
    if not shutil.which(make[0]):
        pytest.skip(f"no {make[0]} here (Debian: {'e2fsprogs' if kind == 'ext4' else 'xfsprogs'})")
    with open(path, "wb") as file:
        file.truncate(size or {"ext4": 16 * MIB, "xfs": 300 * MIB}[kind])
    system(*make, path)
    return path


def onto(disk, command):
    """The same command with its outputs on that disk."""
    return [f"{disk}/{word}" if word.partition("/")[0] == "out" else word for word in command]


def wanted(folder, command):
    run(folder, *command)
    files = folder_bytes(folder / "out")
    shutil.rmtree(folder / "out")
    return files


# --- full, read-only


@pytest.mark.parametrize("verb", FEW)
def test_full_and_then_with_room_it_goes_on(inputs, tmp_path, verb):
    want = wanted(inputs, VERBS[verb])
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=28k", "none") as disk:
        command = onto(disk, VERBS[verb])
        said = run(inputs, *command, status=4).stderr
        assert "No space left on device" in said and str(disk) in said
        assert not [p for p in folder_bytes(disk) if ".perta-" not in p]
        system("mount", "-o", "remount,size=16m", disk)
        run(inputs, *command, "--resume")
        assert folder_bytes(disk / "out") == want


def test_a_read_only_disk_is_said_and_may_hold_the_inputs(inputs, tmp_path):
    command = VERBS["unlearn-both"]
    want = wanted(inputs, command)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "none") as disk:
        shutil.copytree(inputs, disk / "inputs")
        system("mount", "-o", "remount,ro", disk)
        said = run(inputs, *onto(disk, command), status=4).stderr
        assert "Read-only file system" in said and str(disk) in said
        assert [path.name for path in disk.iterdir()] == ["inputs"]
        run(disk / "inputs", *onto(tmp_path, command))
        assert folder_bytes(tmp_path / "out") == want


@pytest.mark.parametrize("verb", FEW)
@pytest.mark.parametrize("limit", part([16, 32, 12, 24], 2, 1))
def test_few_open_files_will_do_or_are_said(inputs, tmp_path, verb, limit):
    want = wanted(inputs, VERBS[verb])

    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    done = run(inputs, *onto(tmp_path, VERBS[verb]), status=None, preexec_fn=lower)
    if done.returncode:
        assert done.returncode == 4 and "Too many open files" in done.stderr
        run(inputs, *onto(tmp_path, VERBS[verb]), "--resume")
    assert folder_bytes(tmp_path / "out") == want
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- power cuts


def steps(folder, command, tmp_path):
    """The number of operations of a run that change a file system."""
    count = tmp_path / "count"
    env = EAGER | {"PERTA_FAULTS": f"fast=1,count={count}"}
    run(folder, *onto(tmp_path, command), "--io", "pread", env=env, perta=FAULTY)
    shutil.rmtree(tmp_path / "out")
    counts = dict(line.split() for line in count.read_text().splitlines())
    kinds = ("create", "mkdir", "rename", "unlink", "put", "pwrite", "sync", "truncate", "allocate")
    return sum(int(counts.get(kind, 0)) for kind in kinds)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("verb", [v for v in ("unlearn", "accumulate", "apply", "estimate") if v in VERBS] if LONG else ["unlearn"])
def test_cut_off_at_any_step_and_mounted_again_it_goes_on(inputs, tmp_path, kind, verb):
    command, disk = VERBS[verb], tmp_path / "disk"
    want = wanted(inputs, command)
    n = steps(inputs, command, tmp_path)
    at = range(1, n + 1) if LONG else [n // 3, n - 2]
    disk_image = image(tmp_path / "image", kind)
    for step in at:
        with mounted(disk, "-o", "loop", disk_image):
            env = EAGER | {"PERTA_FAULTS": f"shutdown={step}:{disk}"}
            cut = run(inputs, *onto(disk, command), "--io", "pread", env=env, perta=FAULTY, status=None)
            assert cut.returncode == 4, (step, n, cut.stderr)
        with mounted(disk, "-o", "loop", disk_image):
            again = run(inputs, *onto(disk, command), "--resume", status=None)
            done = again.returncode == 2 and ": exists;" in again.stderr  # it had finished
            assert again.returncode == 0 or done, (step, n, cut.stderr, again.stderr)
            assert folder_bytes(disk / "out") == want, (step, n)
            assert not list(disk.rglob("*.perta-*")), (step, n)
            shutil.rmtree(disk / "out")


def test_a_disk_that_is_thinner_than_it_looks(large, tmp_path):
    """The file system of 64 MiB lies on one of 4 MiB: there seems to be room, and then syncing
    fails."""
    command, disk = VERBS["apply"], tmp_path / "disk"
    want = wanted(large, command)
    with mounted(tmp_path / "below", "-t", "tmpfs", "-o", "size=4m", "none") as below:
        disk_image = image(below / "image", "ext4", 64 * MIB)
        with mounted(disk, "-o", "loop", disk_image):
            env = EAGER | {"PERTA_FAULTS": ""}
            said = run(large, *onto(disk, command), env=env, status=4).stderr
            assert "Input/output error" in said or "No space left" in said
            assert not (disk / "out").exists()
        system("mount", "-o", "remount,size=64m", below)
        subprocess.run(["e2fsck", "-fy", disk_image], capture_output=True)
        with mounted(disk, "-o", "loop", disk_image):
            again = run(large, *onto(disk, command), "--resume", status=None)
            if again.returncode:  # e2fsck removed something that was synced
                assert again.returncode in (1, 3) and "--force starts over" in again.stderr
                run(large, *onto(disk, command), "--force")
            assert folder_bytes(disk / "out") == want


# --- short reads


@contextmanager
def short_reads(source, disk, *byte):
    """A folder through FUSE, where no read returns as much as was asked for, or where reads fail
    from a byte on."""
    if not ctypes.util.find_library("fuse3") or not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here (Debian: fuse3)")
    disk.mkdir()
    script = os.path.join(os.path.dirname(__file__), "short_reads.py")
    with subprocess.Popen([sys.executable, script, source, disk, *map(str, byte)], stderr=subprocess.PIPE, text=True) as server:
        try:
            while server.poll() is None and not os.path.ismount(disk):
                time.sleep(0.01)
            if server.poll() is not None:
                pytest.skip(f"FUSE may not mount here: {server.stderr.read().strip()}")
            yield disk
        finally:
            if os.path.ismount(disk):
                system("umount", disk)
            server.wait(HANGS)


@pytest.mark.parametrize("io", ["auto", "direct", "pread"] if LONG else ["auto"])
def test_short_reads_in_the_middle_of_files(inputs, tmp_path, io):
    with short_reads(inputs, tmp_path / "disk") as disk:
        for verb, command in [(verb, VERBS[verb]) for verb in FEW]:
            want = wanted(inputs, command)
            run(disk, *onto(tmp_path, command), "--io", io)
            assert folder_bytes(tmp_path / "out") == want, verb
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("io", ["mmap", "direct", "pread"])
def test_a_disk_that_fails_to_read(inputs, tmp_path, io):
    """Mapped files fail with a signal, on any thread; this is an error like any other. With a
    good file the run can be resumed."""
    byte = 8192  # after the headers
    with short_reads(inputs, tmp_path / "disk", byte) as disk:
        for verb, command in [(verb, VERBS[verb]) for verb in FEW]:
            said = run(disk, *onto(tmp_path, command), "--io", io, status=4).stderr
            assert os.strerror(errno.EIO) in said and ".safetensors" in said, (verb, said)
            assert all(".perta-" in path for path in folder_bytes(tmp_path / "out")), verb
            run(inputs, *onto(tmp_path, command), "--resume")
            assert folder_bytes(tmp_path / "out") == wanted(inputs, command), verb
            shutil.rmtree(tmp_path / "out")
