"""Every verb that writes folders, killed at random operations: --resume ends with the same
bytes.

The long tier (PERTA_LONG=1, set by `make check-long`) kills ten times as often, and also at random
instants."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from conftest import LONG, PERTA, SANITIZED, part
from reference import folder_bytes
from verbs import EAGER, VERBS, make_inputs, operations, run, stop_at

KILLS = 70 if LONG else 1 if SANITIZED else 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("crash"), large=True)


@pytest.fixture
def job(request, inputs, tmp_path):
    """The verb's command, and the files that an undisturbed run writes. Its inputs stay
    unchanged."""
    command = VERBS[request.param]
    before = folder_bytes(inputs)
    run(inputs, *command, env=os.environ)
    want = folder_bytes(inputs / "out")
    shutil.rmtree(inputs / "out")
    yield inputs, command, want
    for left in inputs.glob("out*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert folder_bytes(inputs) == before


EVERY = pytest.mark.parametrize("job", VERBS, indirect=True)


def leftovers(folder):
    return list(folder.rglob("*.perta-*"))


@EVERY
def test_killed_at_any_operation_it_ends_with_the_same_bytes(job, tmp_path):
    folder, command, _want = job
    n = operations(folder, command, tmp_path / "count")["any"]
    shutil.rmtree(folder / "out")
    rng = random.Random(str(command))
    kill_and_go_on(job, lambda: stop_at(folder, [*command, "--resume"], "any", rng.randint(1, n)))


@pytest.mark.skipif(not LONG, reason="the long tier's")
@EVERY
def test_killed_at_random_instants_it_ends_with_the_same_bytes(job):
    """At any instant, also within an operation."""
    folder, command, _want = job
    start = time.monotonic()
    run(folder, *command)
    whole = time.monotonic() - start
    shutil.rmtree(folder / "out")
    rng = random.Random(str(command))
    kill_and_go_on(job, lambda: kill_after(folder, [*command, "--resume"], rng.uniform(0, whole)))


def kill_and_go_on(job, run_and_kill):
    folder, command, want = job
    kills = 0
    while kills < KILLS:
        status, said = run_and_kill()
        if status == -signal.SIGKILL:
            kills += 1
            if leftovers(folder) or not folder_bytes(folder / "out"):
                continue  # otherwise it was killed after its last operation
        else:
            assert status == 0, said
        assert folder_bytes(folder / "out") == want and not leftovers(folder)
        shutil.rmtree(folder / "out")
    run(folder, *command, "--resume")
    assert folder_bytes(folder / "out") == want and not leftovers(folder)


def kill_after(folder, command, seconds):
    """Exit status and output."""
    with subprocess.Popen(
        [str(PERTA), *command, "--progress", "none"],
        cwd=folder, env=EAGER, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait(), process.stderr.read()


def stop_between(folder, command, log, number=signal.SIGKILL):
    """Stop the run between its first commit point and its end."""
    n = operations(folder, command, log)["commit"]
    shutil.rmtree(folder / "out")
    return stop_at(folder, command, "commit", max(1, n // 2), number)


@pytest.mark.parametrize("job", part(VERBS, sanitized=3), indirect=True)
def test_interrupted_it_names_the_way_to_go_on_and_refuses_to_mix(job, tmp_path):
    folder, command, want = job
    status, said = stop_between(folder, command, tmp_path / "count", signal.SIGINT)
    assert "--resume continues it" in said
    assert status == 130
    refused = run(folder, *command, status=2)
    assert "--resume continues it, --force starts over" in refused.stderr
    for text in (said, refused.stderr):
        how = text.splitlines()[-1].partition(": to resume: ")[2]
        assert shlex.split(how)[1:] == [*command, "--progress", "none", "--resume"]
    named = {n: b for n, b in folder_bytes(folder / "out").items() if ".perta-" not in n}
    assert named.items() <= want.items()
    subprocess.run(how, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    assert folder_bytes(folder / "out") == want and not leftovers(folder)


@EVERY
def test_on_a_disk_that_was_full_it_goes_on_once_there_is_room(job):
    folder, command, want = job
    size = max(len(data) for data in want.values())
    limit = ["prlimit", f"--fsize={size // 2 & -4096}", str(PERTA), *command, "--progress", "none"]
    full = subprocess.run(limit, cwd=folder, env=EAGER, capture_output=True, text=True)
    assert full.returncode == 4 and "File too large" in full.stderr
    flags = [] if command[0] == "estimate" else "--threads 3 --memory 400M --io pread".split()
    run(folder, *command, *flags, "--resume")  # these do not affect the bytes
    assert folder_bytes(folder / "out") == want and not leftovers(folder)


CHANGES = {
    "unlearn": (["--alpha", "3"], "flags: recipes was "),
    "diff": (["touch"], "inputs: before: model-00001-of-00003.safetensors: "),
    "apply": (["touch"], "inputs: model: model-00001-of-00003.safetensors: "),
    "compose": (["touch"], "inputs: model: model-00001-of-00003.safetensors: "),
    "accumulate": (["base"], "flags: gradients was 3, is now 4"),
}


@pytest.mark.parametrize("job", CHANGES, indirect=True)
def test_changed_inputs_and_flags_are_refused(job, tmp_path):
    folder, command, want = job
    change, says = CHANGES[command[0]]
    stop_between(folder, command, tmp_path / "count")
    shard = folder / "model/model-00001-of-00003.safetensors"
    times = shard.stat()
    if change == ["touch"]:
        os.utime(shard, (1, 1))
    flags = [] if change == ["touch"] else change
    refused = run(folder, *command, *flags, "--resume", status=2)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "--resume cannot continue: " in refused.stderr and says in refused.stderr
    run(folder, *command, "--resume")
    assert folder_bytes(folder / "out") == want and not leftovers(folder)
