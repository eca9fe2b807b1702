"""Unreliable disks, by seed: transfers that stop half way, are interrupted, arrive late and out
of order; a failing operation; inputs that change while they are read (tests/faults/faults.h).
A run either ends with the right bytes, or says what failed, leaves its inputs unchanged and
can be resumed.

The long tier (PERTA_LONG=1) takes two thousand seeds; PERTA_SEEDS=FROM-TO takes those."""

import errno
import itertools
import json
import os
import random
import shutil

import pytest
from conftest import LONG, MODEL
from reference import folder_bytes
from verbs import EAGER, FAULTY, VERBS, make_inputs, run, started_long_ago

N_SEEDS = 2000 if LONG else 32
FIRST, LAST = map(int, os.environ.get("PERTA_SEEDS", f"1-{N_SEEDS}").split("-"))
GROUPS = 8  # of seeds; each group is a test with its own inputs
ERRORS = {
    "read": [errno.EIO, errno.ENOMEM],
    "write": [errno.EIO, errno.ENOSPC, errno.EDQUOT],
    "put": [errno.EIO, errno.ENOSPC],
    "pread": [errno.EIO],
    "text": [errno.EIO],
    "list": [errno.EIO],
    "sync": [errno.EIO, errno.ENOSPC],
    "create": [errno.ENOSPC, errno.EMFILE, errno.EROFS],
    "mkdir": [errno.ENOSPC, errno.EACCES],
    "rename": [errno.EIO, errno.ENOSPC],
    "unlink": [errno.EIO, errno.EROFS],
    "truncate": [errno.EIO],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("faults"), large=True)


@pytest.fixture(scope="module")
def wanted(inputs):
    """What an undisturbed run of each verb writes."""
    files = {}
    for verb, command in VERBS.items():
        run(inputs, *command)
        files[verb] = folder_bytes(inputs / "out")
        clear(inputs)
    return files


def leftovers(folder):
    return [*folder.glob("out*/**/*.perta-*"), *folder.glob("out.perta-*")]


def clear(folder):
    for left in folder.glob("out*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def draw(rng, seed):
    """The faults to inject, and the errno that the run may fail with; None: it must not fail."""
    faults, error = [f"seed={seed}", "fast=1"], None
    for name in ("short", "again", "late"):
        faults.append(f"{name}={rng.choice([0, 0, 30, 300])}")
    if rng.random() < 0.6:
        kind = rng.choice(list(ERRORS))
        error = rng.choice(ERRORS[kind])
        faults.append(f"fail={kind}:{int(2 ** rng.uniform(0, 7))}:{error}")
        if kind != "sync" and error in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            faults.append(f"forever={rng.randrange(2)}")
    return ",".join(faults), error


def check_seed(folder, wanted, seed):
    rng = random.Random(seed)
    verb, io = rng.choice(list(VERBS)), rng.choice(["direct", "pread", "mmap"])
    faults, error = draw(rng, seed)
    command = [*VERBS[verb], "--threads", str(rng.choice([1, 2, 5]))]
    env = EAGER if rng.random() < 0.7 else os.environ
    seen = f"seed {seed}: PERTA_FAULTS={faults} perta {' '.join(command)} --io {io}"
    done = run(folder, *command, "--io", io, env=env | {"PERTA_FAULTS": faults}, perta=FAULTY, status=None)
    if done.returncode == 0:
        assert folder_bytes(folder / "out") == wanted[verb] and not leftovers(folder), seen
        return False
    assert error and done.returncode == 4, (seen, done)
    assert os.strerror(error) in done.stderr, (seen, done)
    again = run(folder, *command, "--resume", status=None)
    if again.returncode:  # it had finished when it failed
        assert again.returncode == 2 and ": exists;" in again.stderr, (seen, done, again)
    assert folder_bytes(folder / "out") == wanted[verb] and not leftovers(folder), (seen, done)
    return True


@pytest.mark.parametrize("group", range(GROUPS))
def test_right_bytes_or_an_error(inputs, wanted, group):
    before = folder_bytes(inputs)
    failed = 0
    for seed in range(FIRST + group, LAST + 1, GROUPS):
        try:
            failed += check_seed(inputs, wanted, seed)
        finally:
            clear(inputs)
    assert folder_bytes(inputs) == before
    assert failed or LAST - FIRST < 20 * GROUPS  # otherwise nothing was tested


@pytest.mark.skipif(not MODEL, reason="this build has no matrix products")
def test_scratch_that_cannot_be_removed_is_not_published(inputs, wanted):
    env = EAGER | {"PERTA_FAULTS": f"fast=1,fail=unlink:1:{errno.EROFS},forever=1"}
    said = run(inputs, *VERBS["estimate"], env=env, perta=FAULTY, status=4).stderr
    assert f"perta-scratch: remove: {os.strerror(errno.EROFS)}" in said
    assert not any((inputs / "out" / name).exists() for name in ("mean", "meansq"))
    run(inputs, *VERBS["estimate"], "--resume")
    assert folder_bytes(inputs / "out") == wanted["estimate"] and not leftovers(inputs)
    clear(inputs)


KINDS = ["read", "write", "pread", "pwrite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["unlearn", "estimate", "apply"])
def test_a_direct_transfer_refused_late_goes_through_the_page_cache(inputs, wanted, verb, kind):
    """Some file systems accept O_DIRECT when opening, and refuse it (EINVAL) when it is used."""
    for io, n in itertools.product(["direct", "pread"], [1, 2, 7]):
        env = os.environ | {"PERTA_FAULTS": f"fast=1,fail={kind}:{n}:{errno.EINVAL}"}
        run(inputs, *VERBS[verb], "--io", io, env=env, perta=FAULTY)
        assert folder_bytes(inputs / "out") == wanted[verb] and not leftovers(inputs), (io, n)
        clear(inputs)


@pytest.mark.parametrize("kind", [*KINDS, "put"])
def test_again_without_end_is_an_error_that_names_it(inputs, kind):
    """EAGAIN from a regular file is retried, but not forever."""
    for io in ("direct", "pread", "mmap"):
        env = os.environ | {"PERTA_FAULTS": f"fast=1,fail={kind}:2:{errno.EAGAIN},forever=1"}
        done = run(inputs, *VERBS["unlearn"], "--io", io, env=env, perta=FAULTY, status=None)
        if (kind, io) in {("read", "mmap"), ("pwrite", "direct")}:  # there are no such operations
            assert done.returncode == 0, done
        else:
            assert done.returncode == 4 and os.strerror(errno.EAGAIN) in done.stderr, (io, done)
        clear(inputs)


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_ring_that_fails_ends_the_run_when_nothing_is_in_flight(inputs, wanted, verb):
    """Whether or not the kernel had taken the requests; sanitizers detect memory that is freed
    too early."""
    failed = 0
    for n in (1, 2, 3, 5, 9, 30):
        faults = f"fast=1,late=300,seed={n},fail=enter:{n}:{errno.ENOMEM},forever=1"
        done = run(
            inputs, *VERBS[verb], "--io", "direct", "--threads", "2",
            env=EAGER | {"PERTA_FAULTS": faults}, perta=FAULTY, status=None,
        )  # fmt: skip
        assert done.returncode in (0, 4), (n, done)
        if done.returncode == 4:
            failed += 1
            assert os.strerror(errno.ENOMEM) in done.stderr, (n, done)
            again = run(inputs, *VERBS[verb], "--resume", status=None)
            assert again.returncode == 0, (n, done, again)
        assert folder_bytes(inputs / "out") == wanted[verb] and not leftovers(inputs), (n, done)
        clear(inputs)
    assert failed


def test_a_folder_is_replaced_where_two_cannot_change_places_at_once(inputs, wanted):
    """As on NFS."""
    run(inputs, "diff", "model", "base", "--patch", "out")
    env = os.environ | {"PERTA_FAULTS": f"fast=1,fail=rename:1:{errno.EINVAL}"}
    run(inputs, *VERBS["diff"], "--force", env=env, perta=FAULTY)
    assert folder_bytes(inputs / "out") == wanted["diff"] and not leftovers(inputs)
    clear(inputs)


def test_what_is_in_the_way_of_that_stays_and_the_result_is_kept(inputs, wanted):
    run(inputs, "diff", "model", "base", "--patch", "out")
    before = folder_bytes(inputs / "out")
    aside = inputs / "out.perta-replaced"
    aside.mkdir()
    (aside / "diary").write_text("mine")
    env = os.environ | {"PERTA_FAULTS": f"fast=1,fail=rename:1:{errno.EINVAL}"}
    done = run(inputs, *VERBS["diff"], "--force", env=env, perta=FAULTY, status=4)
    assert "out.perta-replaced: " in done.stderr and "diary" in done.stderr
    assert (aside / "diary").read_text() == "mine" and folder_bytes(inputs / "out") == before
    (aside / "diary").unlink()
    aside.rmdir()
    run(inputs, *VERBS["diff"], "--force", "--resume")
    assert folder_bytes(inputs / "out") == wanted["diff"] and not leftovers(inputs)
    clear(inputs)


def test_a_journal_that_cannot_be_read_is_not_started_over(inputs, wanted):
    env = EAGER | {"PERTA_FAULTS": f"fast=1,fail=write:4:{errno.ENOSPC}"}
    run(inputs, *VERBS["unlearn"], "--io", "pread", env=env, perta=FAULTY, status=4)
    journal, partial = inputs / "out.perta-journal", inputs / "out.perta-partial"
    started_long_ago(journal)
    kept, files = journal.read_bytes(), folder_bytes(partial)
    lines = kept.count(b"\n") + 1  # plus one for the end; the journal is read four times
    assert lines > 2
    failed = 0
    for n in (1, 2, lines + 1, 2 * lines + 1, 2 * lines + 2, 3 * lines + 2):
        clear(inputs)
        partial.mkdir()
        for name, data in files.items():
            (partial / name).write_bytes(data)
        journal.write_bytes(kept)
        env = EAGER | {"PERTA_FAULTS": f"fast=1,fail=text:{n}:{errno.EIO}"}
        said = run(inputs, *VERBS["unlearn"], "--resume", "--json", env=env, perta=FAULTY, status=None)
        if said.returncode:
            assert said.returncode == 4 and os.strerror(errno.EIO) in said.stderr
            assert journal.read_bytes() == kept
        else:
            assert folder_bytes(inputs / "out") == wanted["unlearn"] and not leftovers(inputs)
            assert json.loads(said.stdout)["started"] == 1000
        failed += said.returncode != 0
    assert failed
    clear(inputs)


def test_in_place_a_journal_that_cannot_be_read_is_no_damage(inputs):
    """The journal must not be ignored: the model would then be neither of the two."""
    half, command = inputs / "out-half", ["out", "p1", "--in-place", "--io", "direct"]
    shutil.copytree(inputs / "model", inputs / "out")
    env = os.environ | {"PERTA_FAULTS": f"fast=1,fail=pwrite:4:{errno.EIO}"}
    run(inputs, "apply", *command, env=env, perta=FAULTY, status=4)
    (inputs / "out").rename(half)
    failed = 0
    for n in range(1, 50):
        shutil.copytree(half, inputs / "out")
        env = os.environ | {"PERTA_FAULTS": f"fast=1,fail=pread:{n}:{errno.EIO}"}
        done = run(inputs, "apply", *command, env=env, perta=FAULTY, status=None)
        assert done.returncode in (0, 4), done
        assert not done.returncode or os.strerror(errno.EIO) in done.stderr, done
        if done.returncode:
            run(inputs, "apply", *command)
        assert folder_bytes(inputs / "out") == folder_bytes(inputs / "tuned")
        shutil.rmtree(inputs / "out")
        failed += done.returncode != 0
    assert failed > 10
    clear(inputs)


def test_in_place_a_direct_write_refused_late_goes_through_the_page_cache(inputs):
    for n in range(1, 9):
        shutil.copytree(inputs / "model", inputs / "out")
        env = os.environ | {"PERTA_FAULTS": f"fast=1,fail=pwrite:{n}:{errno.EINVAL}"}
        run(inputs, "apply", "out", "p1", "--in-place", "--io", "direct", env=env, perta=FAULTY)
        assert folder_bytes(inputs / "out") == folder_bytes(inputs / "tuned"), n
        clear(inputs)


def check_in_place(folder, sides, seed):
    """The edit ends, or it fails and is completed or undone, from any state."""
    rng = random.Random(seed)
    verb, back = rng.sample(["apply", "revert"], 2)
    faults, error = draw(rng, seed)
    shutil.copytree(folder / ("model" if verb == "apply" else "tuned"), folder / "out")
    command = ["out", "p1", "--in-place", "--threads", str(rng.choice([1, 2, 5]))]
    io = rng.choice(["direct", "pread", "mmap"])
    env = os.environ | {"PERTA_FAULTS": faults}
    seen = f"seed {seed}: PERTA_FAULTS={faults} perta {verb} {' '.join(command)} --io {io}"
    done = run(folder, verb, *command, "--io", io, env=env, perta=FAULTY, status=None)
    if done.returncode:
        assert error and done.returncode == 4, (seen, done)
        assert os.strerror(error) in done.stderr, (seen, done)
        verb = rng.choice([verb, back])
        again = run(folder, verb, *command, status=None)
        # Before it changed anything there is nothing to undo, and after its end nothing to
        # complete.
        assert not again.returncode or "here the patch is" in again.stderr, (seen, done, again)
    assert folder_bytes(folder / "out") == sides[verb], (seen, done)
    return done.returncode != 0


@pytest.mark.parametrize("group", range(GROUPS))
def test_in_place_it_goes_on_or_back(inputs, group):
    before = folder_bytes(inputs)
    sides = {"apply": folder_bytes(inputs / "tuned"), "revert": folder_bytes(inputs / "model")}
    failed = 0
    for seed in range(FIRST + group, LAST + 1, GROUPS * (4 if LONG else 1)):
        try:
            failed += check_in_place(inputs, sides, seed)
        finally:
            clear(inputs)
    assert folder_bytes(inputs) == before
    assert failed or LAST - FIRST < 20 * GROUPS


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "revert"] if LONG else [v for v in ("unlearn", "apply", "estimate") if v in VERBS])
@pytest.mark.parametrize("io", ["direct", "pread", "mmap"])
@pytest.mark.parametrize("change", ["shrink", "touch"])
def test_an_input_that_changes_while_it_is_read(inputs, tmp_path, verb, io, change):
    """Nothing computed from it becomes a result, and nothing is kept to be resumed."""
    victim = {"accumulate": "forget", "estimate": "llama"}.get(verb, "model")
    for name in ("model", "tuned", "base", "forget", "retain", "p1", "p2", "llama"):
        if name != victim:
            (tmp_path / name).symlink_to(inputs / name)
    shutil.copytree(inputs / victim, tmp_path / victim)
    shutil.copy(inputs / "data.jsonl", tmp_path)
    shard = max((tmp_path / victim).glob("*.safetensors"), key=lambda p: p.stat().st_size)
    before = folder_bytes(inputs)
    for n in (1, 4):
        data = shard.read_bytes()
        # With commit points at every chance, or with none.
        env = (EAGER if n > 1 else os.environ) | {"PERTA_FAULTS": f"fast=1,{change}={n}:{shard}"}
        said = run(tmp_path, *VERBS[verb], "--io", io, env=env, perta=FAULTY, status=None)
        assert said.returncode in (1, 3), said
        assert "changed while it was read" in said.stderr or "ends at byte" in said.stderr or (
            said.returncode == 1 and victim in said.stderr  # not the model that the patch is for
        ), said
        assert shard.read_bytes() != data
        assert not folder_bytes(tmp_path / "out") and not leftovers(tmp_path)
        shard.write_bytes(data)
    assert folder_bytes(inputs) == before
