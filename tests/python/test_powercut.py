"""Every verb under power cuts: at any instant, with what was not synced lost or torn.

The long tier (PERTA_LONG=1, set by `make check-long`) cuts the power fifty times as often."""

import os
import random
import shutil

import pytest
from conftest import LONG, SANITIZED
from powercut import Disk
from reference import folder_bytes
from verbs import EAGER, FAULTY, VERBS, make_inputs, run

CUTS = 150 if LONG else 1 if SANITIZED else 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("powercut"), large=False)


def leftovers(folder):
    return [*folder.rglob("*.perta-*")]


def clear(folder):
    for left in [*folder.glob("out*"), *folder.glob("log*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.mark.parametrize("verb", VERBS)
def test_it_goes_on_to_the_same_bytes(inputs, verb):
    folder, command, log = inputs, VERBS[verb], inputs / "log"
    run(folder, *command, env=os.environ)
    want = folder_bytes(folder / "out")
    clear(folder)
    rng = random.Random(verb)
    logged = EAGER | {"PERTA_FAULTS": f"fast=1,log={log}"}
    unlogged = EAGER | {"PERTA_FAULTS": "fast=1"}
    # Threads write, so that everything is logged.
    go_on = [*command, "--io", "pread", "--resume"]

    def is_done():
        return folder_bytes(folder / "out") == want and not leftovers(folder)

    for cut in range(CUTS):
        for _ in range(3):  # cut off again before it ends
            disk = Disk(folder)
            run(folder, *go_on, env=logged, perta=FAULTY)
            ended = disk.cut_power(log, rng)
            if is_done():
                break
            assert not ended, f"cut {cut}: it had said that it was done"
        else:
            run(folder, *go_on, env=unlogged, perta=FAULTY)
        assert folder_bytes(folder / "out") == want, f"cut {cut}"
        assert not leftovers(folder), f"cut {cut}"
        clear(folder)
