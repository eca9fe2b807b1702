"""A run that was killed is resumed with --resume, and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess

import pytest
from conftest import PERTA, needed, part
from llama import write_llama
from verbs import EAGER, FAULTY, stop_at

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
# With little memory, data goes to files from the start: another way to the same result.
BUDGETS = ["1G", "little"]


def budget_of(perta, budget):
    """little: the budget that a refusal names."""
    return needed(perta, ESTIMATE[:-1], "20M") if budget == "little" else budget


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
    """By budget: what an undisturbed run writes."""
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
    """A published folder: if the run was killed while renaming, it may be one of two folders,
    but is complete."""
    return {
        name: data
        for name, data in contents(folder / "imp").items()
        if name.partition("/")[0] in ("mean", "meansq")
    }


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_estimate_that_is_killed_goes_on(perta, folder, budget):
    little, budget = budget == "little", budget_of(perta, budget)
    said = json.loads(perta(*ESTIMATE, budget, "--json").stdout)
    assert (said["scratch_bytes"] > 0) == little
    want = contents(folder / "imp")
    perta(*ESTIMATE, budget, "--force", "--resume")  # nothing to resume: from the start
    (folder / "imp").rename(folder / "first")
    kills = 0
    while (stopped := stop_at(folder, [*ESTIMATE, budget, "--resume"], "commit", 3))[0]:
        assert stopped == (-signal.SIGKILL, "")  # killed; it did not fail
        kills += 1
        assert finished(folder).items() <= want.items()
    assert kills >= 3
    assert contents(folder / "imp") == want == contents(folder / "first")


def test_an_interrupted_estimate_says_how_to_go_on(perta, folder, whole):
    want = whole(folder, "1G")
    status, message = stop_at(folder, [*ESTIMATE, "1G"], "commit", 3, signal.SIGINT)
    assert status == 130 and "--resume continues it: interrupted" in message
    refusal = perta(*ESTIMATE, "1G", check=2).stderr
    assert "--resume continues it, --force starts over" in refusal
    perta(*ESTIMATE, "1G", "--resume")
    assert contents(folder / "imp") == want


@pytest.mark.parametrize(
    "change, message",
    part(sanitized=2, cases=[
        (["--stat", "meansq"], "flags: mean was true, is now false"),
        ("data", "data: bytes was "),
        ("model", "model: model.safetensors: "),
        ("config", "config.json was "),
    ]),
)  # fmt: skip
def test_a_changed_input_or_flag_is_refused(perta, folder, change, message):
    journal = folder / "imp/meansq.perta-journal"
    stop_at(folder, [*ESTIMATE, "1G"], "commit", 3)
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
    assert "--resume cannot continue: " in refusal and message in refusal
    assert contents(folder / "imp") == before
    if change == "data":
        perta(*ESTIMATE, "1G", "--force")  # starts over
        assert not journal.exists()


def test_two_processes_do_not_work_on_the_same(perta, folder):
    env = EAGER | {"PERTA_FAULTS": f"signal=commit:2:{int(signal.SIGSTOP)}"}
    with subprocess.Popen([FAULTY, *ESTIMATE, "1G"], cwd=folder, env=env, stdout=subprocess.DEVNULL) as run:
        assert os.WIFSTOPPED(os.waitpid(run.pid, os.WUNTRACED)[1])
        for flag in ("--resume", "--force"):
            assert "another process" in perta(*ESTIMATE, "1G", flag, check=2).stderr
        run.send_signal(signal.SIGCONT)
        assert run.wait() == 0


def test_a_torn_record_does_not_count(perta, folder, whole):
    want = whole(folder, "1G")
    journal = folder / "imp/meansq.perta-journal"
    stop_at(folder, [*ESTIMATE, "1G"], "commit", 5)
    text = journal.read_bytes()
    assert text.count(b"\n") >= 6
    journal.write_bytes(text[:-9] + b"\0\0\0")
    perta(*ESTIMATE, "1G", "--resume")
    assert contents(folder / "imp") == want


def test_scratch_elsewhere_is_used_and_left_clean(perta, folder, whole):
    little = budget_of(perta, "little")
    want = whole(folder, little)
    (folder / "scratch").mkdir()
    (folder / "scratch/mine").write_text("stays")
    flags = [little, "--scratch", "scratch"]
    stop_at(folder, [*ESTIMATE, *flags], "commit", 5)
    assert any((folder / "scratch").glob("perta-scratch-*/x-*"))
    perta(*ESTIMATE, *flags, "--resume")
    assert contents(folder / "imp") == want
    assert [p.name for p in (folder / "scratch").iterdir()] == ["mine"]
