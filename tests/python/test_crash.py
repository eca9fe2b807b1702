"""Every verb that writes folders, killed at random instants: --resume ends with the same bytes.

The long tier (PERTA_LONG=1, set by `make check-long`) kills ten times as often."""

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
from verbs import EAGER, VERBS, make_inputs, run

KILLS = 70 if LONG else 1 if SANITIZED else 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("crash"), large=True)


@pytest.fixture
def job(request, inputs, tmp_path):
    """The verb's command, and the files that an undisturbed run writes. Its inputs stay as they are."""
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
    return [p for p in folder.rglob("*.perta-*")]


def kill_after(folder, command, seconds, number=signal.SIGKILL):
    """Exit status, and what was said."""
    with subprocess.Popen(
        [str(PERTA), *command, "--progress", "none"],
        cwd=folder, env=EAGER, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        return process.wait(), process.stderr.read()


def one_run_takes(folder, command):
    start = time.monotonic()
    run(folder, *command)
    shutil.rmtree(folder / "out")
    return time.monotonic() - start


@EVERY
def test_killed_at_random_instants_it_ends_with_the_same_bytes(job):
    folder, command, want = job
    whole = one_run_takes(folder, command)
    rng = random.Random(str(command))
    kills = 0
    while kills < KILLS:
        status, said = kill_after(folder, [*command, "--resume"], rng.uniform(0, whole))
        if status == -signal.SIGKILL:
            kills += 1
            if leftovers(folder) or not folder_bytes(folder / "out"):
                continue  # else after its last act
        else:
            assert status == 0, said
        assert folder_bytes(folder / "out") == want and not leftovers(folder)
        shutil.rmtree(folder / "out")
    run(folder, *command, "--resume")
    assert folder_bytes(folder / "out") == want and not leftovers(folder)


@pytest.mark.parametrize("job", part(VERBS, sanitized=3), indirect=True)
def test_interrupted_it_names_the_way_to_go_on_and_refuses_to_mix(job):
    folder, command, want = job
    whole = one_run_takes(folder, command)
    for part in (0.5, 0.7, 0.3, 0.9, 0.6, 0.4, 0.8):
        status, said = kill_after(folder, command, part * whole, signal.SIGINT)
        if "--resume goes on with it" in said:
            break
        assert status in (0, 130)
        shutil.rmtree(folder / "out", ignore_errors=True)
    else:
        pytest.skip("too fast to be interrupted here after its first commit point")
    assert status == 130
    refused = run(folder, *command, status=2)
    assert "--resume goes on with it, --force starts over" in refused.stderr
    for text in (said, refused.stderr):
        how = text.splitlines()[-1].partition(": to go on: ")[2]
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
    run(folder, *command, *flags, "--resume")  # these decide no byte
    assert folder_bytes(folder / "out") == want and not leftovers(folder)


CHANGES = {
    "unlearn": (["--alpha", "3"], "flags: recipes was "),
    "diff": (["touch"], "inputs: before: model-00001-of-00003.safetensors: "),
    "apply": (["touch"], "inputs: model: model-00001-of-00003.safetensors: "),
    "compose": (["touch"], "inputs: model: model-00001-of-00003.safetensors: "),
    "accumulate": (["base"], "flags: gradients was 3, is now 4"),
}


def leave_a_part(folder, command, whole):
    """Kill it between its first commit point and its end."""
    while True:
        status, _ = kill_after(folder, command, 0.6 * whole)
        if any(p.read_bytes().count(b"\n") > 1 for p in folder.rglob("*.perta-journal")):
            return
        for left in folder.glob("out*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.mark.parametrize("job", CHANGES, indirect=True)
def test_changed_inputs_and_flags_are_refused(job):
    folder, command, want = job
    change, says = CHANGES[command[0]]
    leave_a_part(folder, command, one_run_takes(folder, command))
    shard = folder / "model/model-00001-of-00003.safetensors"
    times = shard.stat()
    if change == ["touch"]:
        os.utime(shard, (1, 1))
    flags = [] if change == ["touch"] else change
    refused = run(folder, *command, *flags, "--resume", status=2)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "--resume cannot go on: " in refused.stderr and says in refused.stderr
    run(folder, *command, "--resume")
    assert folder_bytes(folder / "out") == want and not leftovers(folder)
