"""`perta ask`: answers are transformers' to the model's chat template, recall is rouge-score's."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
sys.path += [str(ROOT / "examples"), str(ROOT / "python")]
from made_up_facts import make_facts, make_tokenizer
from perta import rouge
from test_forget import TEMPLATE
from tiny_llama import new_model, save_model, teach

os.environ["PERTA_PYTHON"] = sys.executable
F32 = ("--compute", "f32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that knows some people, less well than it could, and their facts."""
    folder = tmp_path_factory.mktemp("ask")
    facts = make_facts(7, 8, 4, 20, 1)
    tokenizer = make_tokenizer(facts.words)
    tokenizer.chat_template = TEMPLATE
    model = new_model(tokenizer, 7)
    teach(model, tokenizer, facts.general + facts.retain, steps=40, seed=7)
    save_model(model, tokenizer, folder / "model")
    teach(model, tokenizer, facts.forget, steps=20, seed=8)
    save_model(model, tokenizer, folder / "tuned")
    return folder, facts.retain[:6]


@pytest.fixture
def ask(perta, made, tmp_path):
    def run(*words, **kw):
        (tmp_path / "model").exists() or (tmp_path / "model").symlink_to(made[0] / "model")
        return perta("ask", "model", *words, **kw)

    return run


@torch.no_grad()
def says(folder, question, n=64, plain=False):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if plain:
        ids = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    else:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                            return_dict=False)  # fmt: skip
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n,
                         pad_token_id=0)[0, len(ids):]  # fmt: skip
    return tokenizer.decode(out, skip_special_tokens=True)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_answers_are_transformers(ask, made, tmp_path):
    folder, facts = made
    questions = [fact.question for fact in facts[:3]]
    result = ask(*questions, *F32)
    want = [says(folder / "model", question).strip() for question in questions]
    for question, answer in zip(questions, want, strict=True):
        assert f"Question: {question}\nAnswer:   {answer}" in result.stdout
    assert "Right:" not in result.stdout and "probability" not in result.stdout
    found = json.loads(ask(*questions, "--json", *F32).stdout)
    assert [item["generated"] for item in found["per_sample"]] == want
    assert found["samples"] == 3 and not {"probability", "rougeL_recall"} & found.keys()
    assert all("answer" not in item and "loss" not in item for item in found["per_sample"])


def test_questions_may_stand_before_and_after_options(ask, made, tmp_path):
    one, two, three = (fact.question for fact in made[1][:3])
    write(tmp_path / "q.jsonl", [{"question": three}])
    words = ("--max-new-tokens", 2, one, "--data", "q.jsonl", "--json", "--", two)
    found = json.loads(ask(*words).stdout)["per_sample"]
    assert [item["question"] for item in found] == [one, two, three]


def test_right_answers_are_compared(ask, made, perta, tmp_path):
    """Recall as open-unlearning has it; and the numbers of eval of the data that tokenize makes."""
    folder, facts = made
    records = [{"question": fact.question, "answer": fact.answer} for fact in facts]
    write(tmp_path / "q.jsonl", [*records[:-1], {"question": records[-1]["question"]}])
    found = json.loads(ask("--data", "q.jsonl", "--json", "--max-new-tokens", 9, *F32).stdout)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    write(tmp_path / "known.jsonl", records[:-1])
    perta("tokenize", "model", "known.jsonl", "ids.jsonl")
    numbers = json.loads(perta("eval", "--model", "model", "--data", "ids.jsonl", "--per-sample", "--json", *F32).stdout)
    for item, record, own in zip(found["per_sample"], records, numbers["per_sample"], strict=False):
        said = says(folder / "model", record["question"], 9)
        assert item["generated"] == said.strip()
        score = scorer.score(record["answer"], said)
        assert item["rougeL_recall"] == pytest.approx(score["rougeL"].recall)
        assert item["rouge1_recall"] == pytest.approx(score["rouge1"].recall)
        assert item["rougeL_f1"] == pytest.approx(score["rougeL"].fmeasure)
        assert item["answer"] == record["answer"]
        assert {key: item[key] for key in own} == {key: pytest.approx(value) for key, value in own.items()}
    known, last = found["per_sample"][:-1], found["per_sample"][-1]
    assert not {"answer", "probability", "rougeL_recall", "rouge1_recall"} & last.keys()
    for key in ("rougeL_recall", "rouge1_recall", "probability"):
        assert found[key] == pytest.approx(sum(item[key] for item in known) / len(known))
    text = ask("--data", "q.jsonl", "--max-new-tokens", 9, *F32).stdout
    assert f"{len(known)} right answers: mean probability {found['probability']:.4f}, ROUGE-L recall" in text


def test_metrics_read_it(ask, made, perta, tmp_path):
    """With other answers, as eval of the data that tokenize makes; so both are about the same lines."""
    facts = made[1]
    records = [{"question": fact.question, "answer": fact.answer, "paraphrased_answer": facts[0].answer,
                "perturbed_answer": [facts[1].answer, facts[2].answer]} for fact in facts]  # fmt: skip
    write(tmp_path / "q.jsonl", records)
    said = ask("--data", "q.jsonl", "--json", "--max-new-tokens", 5).stdout
    perta("tokenize", "model", "q.jsonl", "ids.jsonl")
    (tmp_path / "said.json").write_text(said)
    numbers = perta("eval", "--model", "model", "--data", "ids.jsonl", "--per-sample", "--json").stdout
    (tmp_path / "numbers.json").write_text(numbers)
    for files in (("said.json",), ("numbers.json", "said.json")):
        perta("metrics", "--forget", *files, "--out", "m.json")
        found = json.loads((tmp_path / "m.json").read_text())
        assert found["forget_Q_A_ROUGE"]["agg_value"] == pytest.approx(json.loads(said)["rougeL_recall"])
        assert "rougeL_f1" in found["forget_Q_A_ROUGE"]["value_by_index"]["0"]
        (tmp_path / "m.json").unlink()


def test_words_count_not_spaces_before_marks():
    scores = rouge.Rouge().scores("She was n't born in Rome , Italy .", "She wasn't born in Italy, Rome")
    assert scores == {"rougeL_recall": 6 / 7, "rouge1_recall": 1.0, "rougeL_f1": 6 / 7}
    scores = rouge.Rouge().scores("writing", "She writes")  # stems
    assert scores == {"rougeL_recall": 1.0, "rouge1_recall": 1.0, "rougeL_f1": pytest.approx(2 / 3)}
    assert set(rouge.Rouge().scores("a", "").values()) == {0.0}


def test_other_templates_and_prompts(ask, made, tmp_path):
    folder, facts = made
    question = facts[0].question
    found = json.loads(ask(question, "--template", "plain", "--json", *F32).stdout)["per_sample"][0]
    assert found["generated"] == says(folder / "model", question, plain=True).strip()
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": question, "mood": 1}, {"question": [question], "answer": ["x"]}]))
    result = ask("--data", "p.json", "--json", *F32)
    assert "ask: note: p.json: keys that perta does not know are ignored: mood" in result.stderr
    items = json.loads(result.stdout)["per_sample"]
    assert [item["question"] for item in items] == [question] * 2 and "answer" in items[1]


def test_a_patch_and_an_answer_that_is_cut(ask, perta, made, tmp_path):
    folder, facts = made
    for name in ("full", "tuned"):
        (tmp_path / name).symlink_to(folder / {"full": "model"}.get(name, name))
    perta("diff", "full", "tuned", "--patch", "patch")
    result = ask(facts[0].question, "--patch", "patch", "--max-new-tokens", 1, *F32)
    assert f"Answer:   {says(folder / 'tuned', facts[0].question, 1).strip()} ...\n" in result.stdout
    rounded = ask(facts[0].question, "--patch", "patch", "--quantize", "int4", "--json")
    assert json.loads(rounded.stdout)["quantize"] == "int4"
    assert "--quantize" in ask(facts[0].question, "--quantize", "int3", check=2).stderr
    other = ask(facts[0].question, "--patch", "nowhere", check=3)
    assert "nowhere" in other.stderr and "failed, as it says above" in other.stderr


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"text": "hello"}, "line 2: text: perta ask needs a question, or a prompt"),
        ({"answer": "hello"}, "line 2: answer is present without question"),
        ({"question": " "}, "line 2: question is empty"),
        ({"question": "a", "prompt": "b"}, "line 2: question and answer or prompt and completion are both present"),
        ({"input_ids": [1, 2]}, "line 2: input_ids: this has been tokenised already"),
        ([3], "line 2: not an object"),
    ],
)
def test_what_is_no_question_is_refused_by_line(ask, tmp_path, record, why):
    write(tmp_path / "q.jsonl", [{"question": "Who?"}, record])
    assert f"perta ask: q.jsonl: {why}" in ask("--data", "q.jsonl", check=3).stderr


def test_wrong_arguments(ask, perta, tmp_path):
    assert "no question" in ask(check=2).stderr
    assert "an argument: empty" in ask("", check=2).stderr
    assert "question 1: question is empty" in ask(" ", check=2).stderr
    assert "--max-new-tokens" in ask("Who?", "--max-new-tokens", 0, check=2).stderr
    assert "nowhere.jsonl" in ask("--data", "nowhere.jsonl", check=4).stderr
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl: no questions" in ask("--data", "empty.jsonl", check=3).stderr
    assert "needs" in ask("Who?", "--memory", "1M", check=2).stderr
    assert "no such folder" in perta("ask", "nowhere", "Who?", check=3).stderr


def test_without_rouge(ask, tmp_path, monkeypatch):
    """A note says so before the model is asked, and how to install it."""
    (tmp_path / "rouge").mkdir()
    (tmp_path / "rouge/sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rouge_score' else find(name, *a)\n"
    )
    write(tmp_path / "q.jsonl", [{"question": "Who?", "answer": "Ada"}])
    result = ask("--data", "q.jsonl", "--json", env={"PYTHONPATH": str(tmp_path / "rouge")})
    assert "note: without ROUGE: the Python package rouge-score is missing; to install it:" in result.stderr
    found = json.loads(result.stdout)
    assert "probability" in found and "rougeL_recall" not in found


def test_control_characters_do_not_reach_the_terminal(ask):
    assert "Question: a?[31mb" in ask("a\x1b[31mb").stdout


def test_ctrl_c(made, tmp_path):
    """While the command that it runs is at work, which here never ends by itself."""
    folder, facts = made
    slow = tmp_path / "perta"
    slow.write_text(f"#!/bin/sh\n: >'{tmp_path}/started'\nexec sleep 1000\n")
    slow.chmod(0o755)
    words = [sys.executable, "-m", "perta.ask", str(folder / "model"), facts[0].question, "--template", "plain"]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT / "python",
                             env=os.environ | {"PERTA": str(slow)})  # fmt: skip
    while not (tmp_path / "started").exists() and child.poll() is None:
        pass
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=100)
    assert (child.returncode, out) == (130, "") and "perta ask: interrupted" in err
