"""A run that was killed goes on with --resume, and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
from conftest import PERTA, part
from llama import write_llama

VOCABULARY, HIDDEN = 300, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ESTIMATE = "estimate --model model --data data.jsonl --out imp --stat mean,meansq --memory".split()
# Commit at every chance, not every ten seconds.
EAGER = os.environ | {"PERTA_COMMIT_SECONDS": "0"}
# What does not fit in memory is in files from the start: another way to the same end.
BUDGETS = ["1G", "140M"]


@pytest.fixture
def folder(tmp_path):
    write_llama(tmp_path / "model", CONFIG)
    rng = random.Random(2)
    lines = [
        {"input_ids": [rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 90))]}
        for _ in range(100)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By budget: what a run that nobody stops writes."""
    made = {}

    def of(folder, budget):
        if budget not in made:
            path = tmp_path_factory.mktemp("whole")
            command = [str(PERTA), *ESTIMATE, budget, "--out", str(path / "imp")]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            made[budget] = contents(path / "imp")
        return made[budget]

    return of


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(folder):
    """What has its name: killed while names are given, it may be one of two folders, but whole."""
    return {
        name: data
        for name, data in contents(folder / "imp").items()
        if name.partition("/")[0] in ("mean", "meansq")
    }


def start(command, folder):
    return subprocess.Popen(
        [str(PERTA), *command, "--progress", "none"],
        cwd=folder,
        env=EAGER,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(journal):
    return journal.read_text().count("\n") if journal.exists() else 0


def stop_after(command, folder, journal, n, number=signal.SIGKILL):
    """Start, and send a signal once the journal has n records more. False: it had ended."""
    wanted = records(journal) + n
    with start(command, folder) as run:
        while run.poll() is None and records(journal) < wanted:
            time.sleep(0.001)
        if run.poll() is None:
            run.send_signal(number)
        return run.wait() != 0, run.stderr.read()


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_estimate_that_is_killed_goes_on(perta, folder, budget):
    said = json.loads(perta(*ESTIMATE, budget, "--json").stdout)
    assert (said["scratch_bytes"] > 0) == (budget == "140M")
    want = contents(folder / "imp")
    perta(*ESTIMATE, budget, "--force", "--resume")  # nothing to go on with: from the start
    (folder / "imp").rename(folder / "first")
    journal = folder / "imp/meansq.perta-journal"
    kills = 0
    while (stopped := stop_after([*ESTIMATE, budget, "--resume"], folder, journal, 3))[0]:
        assert not stopped[1]  # killed, not failed
        kills += 1
        assert finished(folder).items() <= want.items()
        if not journal.exists():  # after its last act
            break
    assert kills >= 3
    assert contents(folder / "imp") == want == contents(folder / "first")


def test_an_interrupted_estimate_says_how_to_go_on(perta, folder, whole):
    want = whole(folder, "1G")
    journal = folder / "imp/meansq.perta-journal"
    stopped, message = stop_after([*ESTIMATE, "1G"], folder, journal, 4, signal.SIGINT)
    assert stopped and "--resume goes on with it: interrupted" in message
    refusal = perta(*ESTIMATE, "1G", check=2).stderr
    assert "--resume goes on with it, --force starts over" in refusal
    perta(*ESTIMATE, "1G", "--resume")
    assert contents(folder / "imp") == want


@pytest.mark.parametrize(
    "change, message",
    part(sanitized=2, cases=[
        (["--stat", "meansq"], "flags: mean was true, is now false"),
        (["--memory", "900M"], "flags: memory was 1073741824, is now 943718400"),
        (["--compute", "f32", "--threads", "1"], "flags: "),
        ("data", "data: bytes was "),
        ("model", "model: model.safetensors: "),
        ("config", "config.json was "),
    ]),
)  # fmt: skip
def test_a_changed_input_or_flag_is_refused(perta, folder, change, message):
    journal = folder / "imp/meansq.perta-journal"
    stop_after([*ESTIMATE, "1G"], folder, journal, 4)
    before = contents(folder / "imp")
    flags = []
    if change == "data":
        with open(folder / "data.jsonl", "a") as file:
            file.write('\n{"input_ids": [1, 2]}')
    elif change == "model":
        os.utime(folder / "model/model.safetensors", (1, 1))
    elif change == "config":
        (folder / "model/config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-5}))
    else:
        flags = change
    refusal = perta(*ESTIMATE, "1G", "--resume", *flags, check=2).stderr
    assert "--resume cannot go on: " in refusal and message in refusal
    assert contents(folder / "imp") == before
    if change == "data":
        perta(*ESTIMATE, "1G", "--force")  # starts over
        assert not journal.exists()


def test_two_processes_do_not_work_on_the_same(perta, folder):
    journal = folder / "imp/meansq.perta-journal"
    with start([*ESTIMATE, "1G"], folder) as run:
        while run.poll() is None and records(journal) < 3:
            time.sleep(0.001)
        run.send_signal(signal.SIGSTOP)
        for flag in ("--resume", "--force"):
            assert "another process" in perta(*ESTIMATE, "1G", flag, check=2).stderr
        run.send_signal(signal.SIGCONT)
        assert run.wait() == 0


def test_a_torn_record_does_not_count(perta, folder, whole):
    want = whole(folder, "1G")
    journal = folder / "imp/meansq.perta-journal"
    stop_after([*ESTIMATE, "1G"], folder, journal, 6)
    text = journal.read_bytes()
    assert text.count(b"\n") >= 6
    journal.write_bytes(text[:-9] + b"\0\0\0")
    perta(*ESTIMATE, "1G", "--resume")
    assert contents(folder / "imp") == want


def test_scratch_elsewhere_is_used_and_left_clean(perta, folder, whole):
    want = whole(folder, "140M")
    (folder / "scratch").mkdir()
    (folder / "scratch/mine").write_text("stays")
    flags = ["140M", "--scratch", "scratch"]
    journal = folder / "imp/meansq.perta-journal"
    stop_after([*ESTIMATE, *flags], folder, journal, 6)
    assert any((folder / "scratch").glob("perta-scratch-*/x-*"))
    perta(*ESTIMATE, *flags, "--resume")
    assert contents(folder / "imp") == want
    assert [p.name for p in (folder / "scratch").iterdir()] == ["mine"]
