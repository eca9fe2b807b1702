"""The states of an output, and what the next run does in each: the table of docs/outputs.md."""

import random
import shutil
import signal

import pytest
from conftest import LONG
from reference import folder_bytes
from verbs import EAGER, FAULTY, SIDES, make_inputs, operations, records_of, run, stop_at

# Syncing takes long, and no power is cut here.
QUICK = {"env": EAGER | {"PERTA_FAULTS": "fast=1"}, "perta": FAULTY}

# Outputs in the order in which they are published; the journal is beside the last.
RUNS = {
    "diff": ("diff model tuned --patch p".split(), ["p"]),
    "unlearn": (["unlearn", *SIDES, "--patch", "p", "--out", "m"], ["p", "m"]),
}
# Exit status of the same command again, in each state, with each of these flags.
FLAGS = [[], ["--resume"], ["--force"]]
NEXT = {
    "nothing": (0, 0, 0),
    "started": (2, 0, 0),
    "committed": (2, 0, 0),
    "written": (2, 0, 0),
    "renaming": (2, 0, 0),
    "published": (2, 2, 0),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("states"), large=False)


def outputs(folder, names):
    return {name: folder_bytes(folder / name) for name in names}


def clean(folder, names):
    for name in names:
        for path in folder.glob(f"{name}.perta-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(folder / name, ignore_errors=True)


def complete_records(journal):
    """Those of a journal whose last line may be incomplete."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")
    journal.write_bytes(whole[0] + whole[1])
    return records_of(journal)


def state(folder, names):
    journal = folder / f"{names[-1]}.perta-journal"
    records = complete_records(journal)
    if records and "publish" in records[-1]:
        return "renaming" if any((folder / name).exists() for name in names) else "written"
    if len(records) > 1:
        return "committed"
    if any((folder / f"{name}.perta-partial").exists() for name in names):
        return "started"
    return "published" if all((folder / name).exists() for name in names) else "nothing"


@pytest.mark.parametrize("verb", RUNS)
def test_killed_in_any_state_the_next_run_does_what_the_table_says(inputs, tmp_path, verb):
    command, names = RUNS[verb]
    n = operations(inputs, command, tmp_path / "count")["any"]
    rng = random.Random(verb)
    first, last = range(1, 9), range(n - 9, n + 1)
    kills = range(1, n + 1) if LONG else sorted({*first, *rng.sample(range(9, n - 9), 4), *last})
    want = outputs(inputs, names)
    clean(inputs, names)
    seen = set()
    for at in kills:
        for flags in FLAGS:
            stop_at(inputs, command, "any", at, signal.SIGKILL)
            found = state(inputs, names)
            seen.add(found)
            status = NEXT[found][FLAGS.index(flags)]
            run(inputs, *command, *flags, status=status, **QUICK)
            if status == 0 or found == "published":
                assert outputs(inputs, names) == want
                assert not list(inputs.glob("*.perta-*"))
            clean(inputs, names)
    run(inputs, *command, **QUICK)
    assert state(inputs, names) == "published"
    for flags in FLAGS:
        status = NEXT["published"][FLAGS.index(flags)]
        run(inputs, *command, *flags, status=status, **QUICK)
        assert outputs(inputs, names) == want
    assert seen >= NEXT.keys() - {"published", "renaming"}
    clean(inputs, names)
