"""`perta demo`: the methods compare as it says, and transformers agrees about the models in its
folders."""

import json
import re
import signal

import pytest
from conftest import LONG, PERTA, SANITIZED
from verbs import stop_at

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PARTS = ("forget", "retain", "held-out")
pytestmark = pytest.mark.skipif(SANITIZED, reason="training is slow there")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    import subprocess

    folder = tmp_path_factory.mktemp("demo")
    command = [str(PERTA), "demo", "d", "--json"]
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return folder / "d", json.loads(run.stdout)


def ask(folder, data):
    """The share of samples whose two labels are the most probable tokens, and the probability of
    the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right, probability, lines = 0, 0.0, data.read_text().splitlines()
    for line in lines:
        ids = torch.tensor(json.loads(line)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        right += bool((logits[-3:-1].argmax(-1) == ids[-2:]).all())
        probability += logits[-3].softmax(-1)[ids[-2]].item() / len(lines)
    return right / len(lines), probability


@pytest.mark.parametrize("name", ["full", "models/own-gradient/left-0.1", "models/fisher/alpha-0.5", "models/signed-backoff/step-2"])
def test_transformers_gets_the_same_answers(demo, name):
    folder, summary = demo
    method, point = name.split("/")[1:] if "/" in name else ("full", "alpha-0")
    axis, value = point.split("-")
    (score,) = [s for s in summary["scores"] if s["method"] == method and s.get(axis) == value]
    for i, part in enumerate(PARTS):
        right, probability = ask(folder / name, folder / f"data/{part}.jsonl")
        # If two answers are almost equally probable, either may win.
        assert abs(score["right"][i] - right) <= 0.02, part
        assert abs(score["probability"][i] - probability) <= 1e-3, part


def test_the_tokenizer_reads_the_facts_as_they_were_learned(demo):
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo[0] / "full")
    for line in (demo[0] / "data/forget.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert tokenizer(sample["text"])["input_ids"] == sample["input_ids"][:-1]
        assert sample["labels"] == [-100] * (len(sample["labels"]) - 2) + sample["input_ids"][-2:]
    facts = {
        part: set(re.findall(r"(?:was|does) (\w+ \w+) ", (demo[0] / f"data/{part}.jsonl").read_text()))
        for part in PARTS
    }
    assert [len(facts[part]) for part in PARTS] == [15, 68, 67]
    assert not facts["forget"] & (facts["retain"] | facts["held-out"])


def test_the_model_learned_and_weighing_keeps_more(demo):
    scores = {(s["method"], next(s[axis] for axis in ("alpha", "step", "left") if axis in s)): s
              for s in demo[1]["scores"]}
    assert min(scores["full", "0"]["right"]) > 0.9
    for method in ("tv", "grad", "fisher"):
        assert scores[method, "1.5"]["right"][0] < 0.2  # the facts are forgotten
    # At the same alpha the weighted edits are smaller: they keep more and forget less.
    for part in range(3):
        assert scores["grad", "0.5"]["right"][part] > scores["tv", "0.5"]["right"][part]
    # Here steps forget more than any of the weighted edits, and still keep more.
    steps, grad = scores["signed-backoff", "3"]["right"], scores["grad", "0.75"]["right"]
    assert steps[0] < grad[0] and steps[1] > grad[1] and steps[2] > grad[2]
    # The requested level is held, and most is kept of what the model was never shown.
    for left in ("0.5", "0.1"):
        held = scores["signed-hold", left]
        assert held["probability"][0] < float(left)  # of the answer; the steps also count the end
    backed_off = [s["right"] for (method, _), s in scores.items() if method == "signed-backoff"]
    assert held["right"][2] > max(kept for left, _, kept in backed_off if left < 0.15)


def test_the_model_and_two_files_are_enough(demo):
    """Without a tuned model, steps keep as much as with one, and more than edits do."""
    folder, summary = demo
    left = {s["left"]: s for s in summary["scores"] if s["method"] == "own-gradient"}
    assert list(left) == ["0.5", "0.1"]
    for level, score in left.items():
        assert score["probability"][0] < float(level)
        record = json.loads((folder / f"patches/own-gradient/left-{level}/manifest.json").read_text())
        assert set(record["inputs"]) == {"model", "box", "scale"}
        assert record["recipe"]["stop_probability"] == float(level)
    full, after = (next(s["right"] for s in summary["scores"] if s["method"] == "full"), left["0.1"]["right"])
    assert after[0] < 0.1 and after[1] > full[1] - 0.02 and after[2] > 0.8 * full[2]
    for score in summary["scores"]:
        if score["method"] in ("tv", "grad", "fisher") and score["right"][0] < 0.2:
            assert score["right"][2] < after[2] - 0.2


@pytest.mark.skipif(not LONG, reason="it trains the models once more")
def test_an_interrupted_demo_begins_again(perta, demo, tmp_path):
    """At the first commit point of the steps. What can be resumed is that job, not the demo."""
    status, said = stop_at(tmp_path, ["demo", "d"], "commit", 4, signal.SIGINT)
    assert (status, said) == (130, "perta demo: interrupted\n")
    again = json.loads(perta("demo", "d", "--force", "--json").stdout)
    assert again["scores"] == demo[1]["scores"]


def test_a_demo_is_not_written_over(perta, demo):
    folder = demo[0].parent
    before = sorted(folder.rglob("*"))
    assert "--force" in perta("demo", "d", check=2, cwd=folder).stderr
    assert sorted(folder.rglob("*")) == before


def test_a_file_that_no_demo_wrote_is_not_written_over(perta, tmp_path):
    (tmp_path / "d/data").mkdir(parents=True)
    mine = tmp_path / "d/data/general.jsonl"
    mine.write_text('{"input_ids": [1, 2]}\n')
    assert "general.jsonl: exists, but was not written by a demo" in perta("demo", "d", "--force", check=2).stderr
    assert mine.read_text() == '{"input_ids": [1, 2]}\n'
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "d", mine.parent, mine]
