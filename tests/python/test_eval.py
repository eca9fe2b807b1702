"""`perta eval` compared with transformers: losses, and what the model would answer; and with a
patch, compared with the model that the patch leads to, bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SANITIZED
from llama import MIB, write_llama
from open_unlearning import measures
from test_estimate import BIG, MODELS, VOCABULARY, make_model
from test_limits import peak_mib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

MEASURES = ("exact_memorization", "extraction_strength", "min_k", "min_k_plus_plus")
GENERATOR = torch.Generator().manual_seed(5)


def answer(model, n, right=0.5):
    """A sample whose last half is learned; some labels are what the model would say."""
    ids = torch.randint(0, VOCABULARY, (n,), generator=GENERATOR)
    for t in range(n // 2, n):
        if torch.rand((), generator=GENERATOR) < right:
            ids[t] = model(ids[None, :t]).logits[0, -1].argmax()
    ids = ids.tolist()
    return {"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]}


def random_line(n):
    return {"input_ids": torch.randint(0, VOCABULARY, (n,), generator=GENERATOR).tolist()}


@torch.no_grad()
def make_lines(model):
    lines = [answer(model, n, right) for n, right in ((2, 1), (9, 1), (33, 0.5), (70, 0.9))]
    lines[1] |= {"perturbed": [answer(model, n, 0.2) for n in (5, 12, 20)]}
    lines[2] |= {
        "perturbed": [answer(model, 8, 0.0)],
        "paraphrased": answer(model, 11, 1),
        "question": "not perta's",
    }
    lines[3] |= {"paraphrased": answer(model, 7)}
    return lines


@torch.no_grad()
def score(model, sample):
    ids = torch.tensor([sample["input_ids"]])
    labels = torch.tensor([sample["labels"]])
    out = model(input_ids=ids, labels=labels)
    learned = labels[0, 1:] != -100
    right = (out.logits[0, :-1].argmax(-1) == labels[0, 1:])[learned]
    return out.loss.item(), right.float().mean().item()


def expected(model, lines):
    """As defined in docs/eval.md."""
    for number, line in enumerate(lines, 1):
        loss, accuracy = score(model, line)
        item = {"line": number, "loss": loss, "probability": torch.tensor(-loss).exp().item()}
        item |= {"accuracy": accuracy, "exact_match": accuracy == 1}
        item |= measures(model, line)
        item["labels"] = sum(label != -100 for label in line["labels"][1:])
        best = loss
        if "paraphrased" in line:
            best = item["paraphrased_loss"] = score(model, line["paraphrased"])[0]
        if "perturbed" in line:
            losses = torch.tensor([score(model, other)[0] for other in line["perturbed"]])
            item["perturbed_loss"] = losses.tolist()
            item["truth_ratio"] = (best - losses.mean()).exp().item()
            own = torch.tensor(-loss).exp()
            item["choice_probability"] = (own / (own + (-losses).exp().sum())).item()
        yield item


def evaluate(perta, model, *flags):
    words = ["eval", "--model", model, "--data", "data.jsonl", "--json", "--per-sample", *flags]
    summary = json.loads(perta(*words).stdout)
    assert summary.pop("seconds") >= 0
    return summary


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "name, changes",
    # the second has tied embeddings; the third, a vocabulary of several blocks; the fourth, capped
    # logits
    [("llama", {}), ("qwen2", {}), ("llama", {"vocab_size": 2500}), ("gemma2", {"vocab_size": 2500})],
)
def test_numbers_are_transformers(perta, tmp_path, name, changes):
    family, more = MODELS[name]
    model = make_model(tmp_path / "model", family, more | changes)
    lines = make_lines(model)
    write_lines(tmp_path / "data.jsonl", lines)
    have = evaluate(perta, "model", "--compute", "f32")
    want = list(expected(model, lines))
    assert {item["exact_match"] for item in want} == {True, False}
    for a, b in zip(have["per_sample"], want, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if value is None:
                assert a.pop(key) is None
                continue
            assert a[key] == pytest.approx(value, abs=2e-5, rel=1e-5), (key, b["line"])

    def mean(key, of=lambda x: x):
        values = [of(item[key]) for item in want if item.get(key) is not None]
        return pytest.approx(sum(values) / len(values), abs=2e-5, rel=1e-5)

    assert sum(item["exact_memorization"] is None for item in want) == 1
    for key in ("loss", "probability", "exact_match", "accuracy", "choice_probability", *MEASURES):
        assert have[key] == mean(key), key
    assert have["truth_ratio"] == mean("truth_ratio")
    assert have["truth_ratio_forget"] == mean("truth_ratio", lambda r: min(r, 1 / r))
    assert have["truth_ratio_retain"] == mean("truth_ratio", lambda r: max(0, 1 - r))
    assert (have["samples"], have["perturbed_samples"]) == (4, 2)


def test_lines_are_listed_where_they_are_wanted(perta, tmp_path):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    write_lines(tmp_path / "data.jsonl", [random_line(5), random_line(9)])
    words = ["eval", "--model", "model", "--data", "data.jsonl"]
    plain = json.loads(perta(*words, "--json").stdout)
    assert "per_sample" not in plain
    items = evaluate(perta, "model")["per_sample"]
    assert [item["line"] for item in items] == [1, 2]
    text, listed = perta(*words).stdout, perta(*words, "--per-sample").stdout
    assert listed.endswith(text) and len(text.splitlines()) == 5
    for row, item in zip(listed.splitlines()[1:3], items, strict=True):
        assert [float(x) for x in row.split()[:4]] == pytest.approx(
            [item[key] for key in ("line", "labels", "loss", "probability")], abs=1e-6)  # fmt: skip
        assert [float(x) for x in row.split()[4:8]] == pytest.approx(
            [item[key] for key in ("accuracy", *MEASURES[1:])], abs=1e-3)  # fmt: skip


def test_what_no_line_has_is_not_printed_as_0(perta, tmp_path):
    """Without the last label there is nothing to remember."""
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    write_lines(tmp_path / "data.jsonl", [random_line(2), random_line(2)])
    words = ["eval", "--model", "model", "--data", "data.jsonl"]
    assert "exact_memorization" not in json.loads(perta(*words, "--json").stdout)
    assert re.search(r"^memorization +- \(extraction strength: 0\.0+\)$", perta(*words).stdout, re.M)


def test_the_last_label_is_left_out_and_extraction_begins_after_the_last_wrong_one(perta, tmp_path):
    model = make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    lines = []
    for wrong in ({}, {9}, {4}, {4, 6}, {4, 8}, {8}):  # labels 4 .. 9; the last is at 9
        ids = [1, 2, 3, 4]
        for at in range(4, 10):
            said = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append((said + (at in wrong)) % VOCABULARY)
        lines.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    write_lines(tmp_path / "data.jsonl", lines)
    have = evaluate(perta, "model", "--compute", "f32")["per_sample"]
    assert [item["exact_match"] for item in have] == [True] + [False] * 5
    assert [item["exact_memorization"] for item in have] == [1, 1, 0.8, 0.6, 0.6, 0.8]
    assert [item["extraction_strength"] for item in have] == pytest.approx(
        [1, 1, 0.8, 0.4, 0.2, 0.2])  # fmt: skip


def changed_copy(tmp_path, change):
    """tuned: a copy of full, shard by shard, with each tensor changed."""
    shutil.copytree(tmp_path / "full", tmp_path / "tuned")
    for path in (tmp_path / "tuned").glob("*.safetensors"):
        tensors = {name: change(name, x) for name, x in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_patch_is_as_the_model_it_leads_to(perta, tmp_path, name):
    """An embedding of more than one chunk, and shards that the patch does not change."""
    family, changes = MODELS[name]
    big = changes | {"vocab_size": 17000, "num_hidden_layers": 1}
    make_model(tmp_path / "full", family, big)
    changed_copy(
        tmp_path,
        lambda name, x: x if "mlp" in name else x + 0.02 * torch.randn(x.shape),
    )
    write_lines(tmp_path / "data.jsonl", [random_line(n) | {"paraphrased": random_line(5)}
                                          for n in (3, 30, 60)])
    perta("diff", "full", "tuned", "--patch", "patch")
    full = evaluate(perta, "full")
    after = evaluate(perta, "tuned")
    patched = evaluate(perta, "full", "--patch", "patch")
    assert after["loss"] != full["loss"]
    assert patched.pop("read_bytes") > after.pop("read_bytes")
    assert patched == after
    for io in ("pread", "mmap", "direct"):
        again = evaluate(perta, "full", "--patch", "patch", "--io", io)
        assert again["per_sample"] == after["per_sample"]


def test_a_patch_for_another_model_is_refused(perta, tmp_path):
    write_lines(tmp_path / "data.jsonl", [{"input_ids": [1, 2, 3]}])
    make_model(tmp_path / "full", "Llama", {"num_hidden_layers": 1})
    changed_copy(tmp_path, lambda name, x: x + 1 if "up_proj" in name else x)
    perta("diff", "full", "tuned", "--patch", "patch")
    words = ["eval", "--model", "tuned", "--patch", "patch", "--data", "data.jsonl"]
    stderr = perta(*words, check=1).stderr
    assert "model.layers.0.mlp.up_proj.weight" in stderr and "applied already" in stderr


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
def test_a_patched_model_larger_than_memory(perta, tmp_path):
    """In batches, with the rows of all tokens in a file; by measured peak memory, everything
    included."""
    big = BIG | {"num_hidden_layers": 8, "tie_word_embeddings": True}
    size = write_llama(tmp_path / "full", big)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/config.json").write_text(json.dumps(big))
    weights = bytearray((tmp_path / "full/model.safetensors").read_bytes())
    weights[-64 * MIB :: 64] = bytes(byte ^ 1 for byte in weights[-64 * MIB :: 64])
    (tmp_path / "tuned/model.safetensors").write_bytes(weights)
    perta("diff", "full", "tuned", "--patch", "patch")
    write_lines(tmp_path / "data.jsonl", [random_line(200) for _ in range(5)])
    words = "eval --model full --patch patch --data data.jsonl --json --per-sample --compute f32 --memory"
    words = words.split()
    least = int(re.search(r"needs (\d+)M", perta(*words, "60M", check=2).stderr)[1]) + 2
    assert size > 1.5 * least * MIB
    small = json.loads(perta(*words, f"{least}M").stdout)
    assert small["batches"] == 5
    assert peak_mib([*words, f"{least}M", "--io", "direct"], tmp_path) <= least
    whole = evaluate(perta, "tuned", "--compute", "f32")
    assert whole["batches"] == 1
    assert small["per_sample"] == whole["per_sample"]
    (tmp_path / "full/model.safetensors").unlink()
    (tmp_path / "tuned/model.safetensors").unlink()


GOOD = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    "line, message",
    [
        (GOOD | {"perturbed": []}, 'line 2: "perturbed": no array with answers'),
        (GOOD | {"perturbed": GOOD}, 'line 2: "perturbed": no array with answers'),
        (GOOD | {"perturbed": [GOOD, 7]}, 'line 2: "perturbed": no array "input_ids"'),
        (GOOD | {"perturbed": [{"input_ids": [1]}]}, 'line 2: "perturbed": no label'),
        (GOOD | {"paraphrased": [GOOD]}, 'line 2: "paraphrased": no array "input_ids"'),
        (GOOD | {"paraphrased": {"input_ids": [1, VOCABULARY]}}, 'line 2: "paraphrased": token id'),
        ({"input_ids": [1, 2], "labels": [1]}, 'line 2: "labels" is not as long'),
    ],
)
def test_bad_data_is_named_by_its_line(perta, tmp_path, line, message):
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    write_lines(tmp_path / "data.jsonl", [GOOD, line])
    words = ["eval", "--model", "model", "--data", "data.jsonl"]
    assert message in perta(*words, check=3).stderr
    assert message in perta(*words, "--dry-run", check=3).stderr


def test_a_dry_run_reads_no_weights(perta, tmp_path):
    write_lines(tmp_path / "data.jsonl", [GOOD, GOOD])
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    for weights in (tmp_path / "model").glob("*.safetensors"):
        whole = weights.read_bytes()
        weights.write_bytes(whole[: -(1 << 10)] + b"\xff" * (1 << 10))  # not finite
    words = "eval --model model --data data.jsonl --json".split()
    perta(*words, check=3)
    result = json.loads(perta(*words, "--dry-run").stdout)
    assert result["samples"] == 2 and "loss" not in result
    assert "only headers and data were read" in perta(*words[:-1], "--dry-run").stdout


def tokenize(tmp_path, lines, check=True):
    """perta.tokenize's data for these lines, with a small model made here; on an error, its
    message."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    words = ["<s>", "</s>", "Question", "Answer", ":", "who", "?", "me", "some", "text"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "model")
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "text.jsonl").write_text(text, encoding="utf-8-sig")
    command = [sys.executable, "-m", "perta.tokenize", "model", "text.jsonl", "data.jsonl"]
    path = {"PYTHONPATH": str(Path(__file__).parents[2] / "python")}
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | path, check=check, stderr=subprocess.PIPE, text=True
    )
    if result.returncode:
        return result.stderr
    return [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]


def test_text_becomes_data_with_questions_masked(perta, tmp_path):
    """Also with TOFU's keys: of its forget set, and of real authors, without a paraphrased
    answer."""
    lines = [
        {"question": "who ?", "answer": "me", "paraphrased_answer": "some me"}
        | {"perturbed_answer": ["text", "some text"], "paraphrased_question": "who who ?"},
        {"question": "?", "answer": "me", "perturbed_answer": ["text"]} | {"original_answer": "who"},
        {"text": "some\u2028text"},  # a line end in Python, not in JSON
    ]
    question, short = [2, 4, 5, 6, 3, 4], [2, 4, 6, 3, 4]

    def sample(prompt, *said):
        return {"input_ids": [*prompt, *said], "labels": [-100] * len(prompt) + list(said)}

    others = {
        "paraphrased": sample(question, 8, 7, 1),
        "perturbed": [sample(question, 9, 1), sample(question, 8, 9, 1)],
    }
    assert tokenize(tmp_path, lines) == [
        sample(question, 7, 1) | others,
        sample(short, 7, 1) | {"perturbed": [sample(short, 9, 1)]},
        sample([], 8, 9),
    ]
    assert evaluate(perta, "model")["perturbed_samples"] == 2
    words = "estimate --model model --data data.jsonl --out imp --json".split()
    assert json.loads(perta(*words).stdout)["tokens"] == 8 + 7 + 2  # the lines' own answers


def test_a_line_that_is_text_and_a_question_is_refused(tmp_path):
    line = {"text": "some", "question": "who ?", "answer": "me"}
    said = tokenize(tmp_path, [line], check=False)
    assert "line 1: " in said and "are both present" in said


def test_text_is_not_overwritten_by_data_made_of_it(tmp_path):
    """OUT is the text's own path; data that was made before is replaced as a whole."""
    mine = tmp_path / "data.jsonl"
    for text in ('{"text": "the only copy"}\n', "x"):
        mine.write_text(text)
        said = tokenize(tmp_path, [{"text": "some text"}], check=False)
        assert "data.jsonl: exists, but was not written by perta.tokenize" in said
        assert mine.read_text() == text
    mine.unlink()
    for words, ids in (("some text", [8, 9]), ("text some", [9, 8])):
        assert [line["input_ids"] for line in tokenize(tmp_path, [{"text": words}])] == [ids]
    before = mine.read_bytes()
    tokenize(tmp_path, [{"text": "some text"}, {"nothing": 1}], check=False)
    assert mine.read_bytes() == before and not list(tmp_path.glob("*.perta-partial"))


def test_a_wrong_answer_that_is_no_list_is_named_by_its_line(tmp_path):
    lines = [{"text": "some text"}, {"question": "who ?", "answer": "me", "perturbed_answer": "text"}]
    assert "line 2: " in tokenize(tmp_path, lines, check=False)
