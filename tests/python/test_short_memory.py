"""The command when memory runs out: each allocation in turn fails (tests/faults/memory.c). The
command either exits with status 4 and an error, or prints and writes what an undisturbed run
does, byte for byte. The library's verbs are tested in tests/test_short_memory.c; this file
tests what the command adds: results as JSON and as text, statements, reports."""

import errno
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import HANGS, PERTA, part, skip_what_needs_a_model
from reference import folder_bytes
from verbs import EAGER, FAULTY, make_inputs

COMMANDS = {
    "inspect": "inspect model --tensors --io",
    "inspect-json": "inspect model --io --json",
    "inspect-patch": "inspect p1 --tensors",
    "inspect-patch-json": "inspect p1 --json",
    "report": "report p1 --html out/page.html --json",
    "manifest": "manifest model --threads 1",
    "manifest-sums": "manifest model --threads 1 --format sha256sum",
    "verify": "verify p1 --json --threads 1",
    "verify-model": "verify model --patch p1 --original --json --threads 1",
    "diff": "diff model tuned --patch out/p --statement --json --threads 1",
    "unlearn": "unlearn --model model --tuned tuned --base base --method tv --patch out/p --threads 1",
    "eval": "eval --model llama --data data.jsonl --json --threads 1",
    "eval-generate": "eval --model llama --data data.jsonl --generate 3 --threads 1",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("memory"), large=False)


def steady(text):
    """Without times, and without what depends on them."""
    text = re.sub(r'("(seconds|started|startedOn|finishedOn)": )[^,\n}]+', r"\1", text)
    return re.sub(r"(in )?[\d.]+ s\b|\([\d.]+ .?B/s\)", "", text)


def result(folder, command, faults):
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    env = EAGER | {"PERTA_FAULTS": f"fast=1,{faults}"}
    return subprocess.run(
        [FAULTY, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS
    )


def written(folder):
    return {name: steady(text.decode(errors="replace")) for name, text in folder_bytes(folder / "out").items()}


@pytest.mark.parametrize(
    "command",
    [
        "diff model tuned --patch out/%s --json",
        "unlearn --model model --tuned tuned --base base --method tv --patch out/%s --out out/m%s --json",
        "apply model p1 --out out/%s --json",
        "accumulate in-%s base --out out/%s --json",
        "manifest in-%s",
    ],
)
def test_a_name_that_is_not_utf_8_is_no_lack_of_memory(inputs, command):
    """Paths are bytes; in JSON, those that are not UTF-8 become question marks."""
    name = os.fsdecode(b"\xff")
    shutil.rmtree(inputs / "out", ignore_errors=True)
    shutil.copytree(inputs / "model", inputs / f"in-{name}", dirs_exist_ok=True)
    done = subprocess.run(
        [PERTA, *command.replace("%s", name).split()], cwd=inputs, capture_output=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert "out" not in command or (inputs / "out" / name).is_dir()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_is_whole_or_an_error(inputs, name):
    command = COMMANDS[name].split()
    skip_what_needs_a_model(command)
    wanted = result(inputs, command, "count=count")
    files = written(inputs)
    n = int(re.search(r"^memory (\d+)$", (inputs / "count").read_text(), re.M)[1])
    before = {folder: folder_bytes(inputs / folder) for folder in ("model", "p1", "llama")}
    failed = 0
    for at in part(range(1, n + 1), 25, 5):
        done = result(inputs, command, f"fail=memory:{at}:{errno.ENOMEM}")
        if done.returncode == 4:
            assert done.stderr.startswith(f"perta {command[0]}: "), (at, done.stderr)
            failed += 1
            continue
        assert done.returncode == wanted.returncode, (at, done.returncode, done.stderr)
        assert steady(done.stdout) == steady(wanted.stdout), at
        assert written(inputs) == files, at
    assert failed
    assert before == {folder: folder_bytes(inputs / folder) for folder in before}
