"""`perta eval --gradient-norm` compared with open-unlearning's GradNorm attack in PyTorch."""

import json
import re

import pytest
from conftest import SANITIZED
from llama import write_llama
from test_estimate import BIG, MODELS, VOCABULARY, make_model
from test_eval import changed_copy, evaluate, random_line, write_lines
from test_limits import peak_mib

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from open_unlearning import gradient_norm


def lines_of(lengths, vocabulary=VOCABULARY):
    lines = [random_line(n) for n in lengths]
    for line in lines:
        n = len(line["input_ids"])
        line["labels"] = [-100] * (n // 3 or 1) + line["input_ids"][n // 3 or 1 :]
    return lines


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_pytorchs(perta, tmp_path, name):
    family, changes = MODELS[name]
    model = make_model(tmp_path / "model", family, changes)
    lines = lines_of([9, 2, 33, 70])  # the second has a single label
    lines[0] |= {"perturbed": [random_line(5)], "paraphrased": random_line(4)}
    write_lines(tmp_path / "data.jsonl", lines)
    have = evaluate(perta, "model", "--compute", "f32", "--gradient-norm")
    want = [gradient_norm(model, line) for line in lines]
    assert want[1] is None and have["per_sample"][1]["gradient_norm"] is None
    known = [value for value in want if value is not None]
    assert [item["gradient_norm"] for item in have["per_sample"] if item["line"] != 2] == pytest.approx(known, rel=1e-5)
    assert have["gradient_norm"] == pytest.approx(sum(known) / 3, rel=1e-5)
    words = ["eval", "--model", "model", "--data", "data.jsonl", "--compute", "f32", "--gradient-norm", "--per-sample"]
    rows = [row.split() for row in perta(*words).stdout.splitlines()[1:5]]
    assert rows[1][8] == "-" and [float(rows[i][8]) for i in (0, 2, 3)] == pytest.approx(known, rel=1e-5)
    without = evaluate(perta, "model", "--compute", "f32")
    for item in [have, *have["per_sample"]]:
        del item["gradient_norm"]
    assert have == without


def test_long_samples_batches_threads_and_memory_give_the_same_bits(perta, tmp_path):
    """Samples of several chunks, in one batch and in several, with operands in memory and in
    files; matrices of several tiles."""
    sizes = {"hidden_size": 640, "intermediate_size": 700, "vocab_size": 1500, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 2048, "tie_word_embeddings": True}
    model = make_model(tmp_path / "model", "Llama", sizes)
    lines = lines_of([1100, 40, 300, 250, 9, 200])
    write_lines(tmp_path / "data.jsonl", lines)
    words = ["--compute", "f32", "--gradient-norm"]
    want = evaluate(perta, "model", *words, "--threads", "2", "--memory", "2G")
    norms = [item["gradient_norm"] for item in want["per_sample"]]
    assert norms == pytest.approx([gradient_norm(model, line) for line in lines], rel=1e-4)
    assert want["batches"] == 1
    small = perta("eval", "--model", "model", "--data", "data.jsonl", *words, "--memory", "60M", check=2).stderr
    least = re.search(r"needs (\d+M)", small)[1]
    for more in (["--threads", "1"], ["--threads", "1", "--memory", least]):
        have = evaluate(perta, "model", *words, *more)
        assert have["per_sample"] == want["per_sample"], more
    assert have["batches"] > 1 and have["scratch_bytes"] > 0


@pytest.mark.skipif(SANITIZED, reason="sanitizers take memory too")
def test_the_budget_holds(perta, tmp_path):
    write_llama(tmp_path / "model", BIG | {"num_hidden_layers": 6})
    write_lines(tmp_path / "data.jsonl", [random_line(150) for _ in range(6)])
    words = "eval --model model --data data.jsonl --json --gradient-norm --compute f32 --io direct --memory".split()
    least = int(re.search(r"needs (\d+)M", perta(*words, "60M", check=2).stderr)[1])
    assert peak_mib([*words, f"{least}M"], tmp_path) <= least
    (tmp_path / "model/model.safetensors").unlink()


def test_a_patch_and_an_adapter_are_part_of_the_model(perta, tmp_path):
    make_model(tmp_path / "full", "Llama", {})
    changed_copy(tmp_path, lambda name, x: x + 0.02 * torch.randn(x.shape))
    write_lines(tmp_path / "data.jsonl", lines_of([9, 33]))
    perta("diff", "full", "tuned", "--patch", "patch")
    perta(*"tune --model full --data data.jsonl --out adapter --steps 2 --learning-rate 0.05".split())
    norms = [evaluate(perta, *words, "--gradient-norm")["per_sample"] for words in (
        ["full"], ["tuned"], ["full", "--patch", "patch"], ["full", "--adapter", "adapter"])]  # fmt: skip
    assert norms[1] == norms[2]
    assert len({item[0]["gradient_norm"] for item in norms}) == 3


def test_a_gradient_that_is_not_finite_is_refused(perta, tmp_path):
    make_model(tmp_path / "full", "Llama", {"num_hidden_layers": 1})
    scales = {"v_proj": 1e36, "o_proj": 1e-36, "lm_head": 1e6}
    changed_copy(tmp_path, lambda name, x: x * next((s for part, s in scales.items() if part in name), 1))
    write_lines(tmp_path / "data.jsonl", lines_of([9, 33]))
    words = ["eval", "--model", "tuned", "--data", "data.jsonl", "--compute", "f32"]
    perta(*words)
    stderr = perta(*words, "--gradient-norm", check=3).stderr
    assert "data.jsonl: line 1: the norm of the gradient is not a finite number" in stderr


def test_data_from_a_pipe_are_refused(perta, tmp_path):
    """They cannot be read twice."""
    make_model(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    words = "eval --model model --data /dev/stdin".split()
    line = json.dumps({"input_ids": [1, 2, 3]})
    perta(*words, input=line)
    assert "reads the data twice: /dev/stdin is not a file" in perta(
        *words, "--gradient-norm", input=line, check=2).stderr  # fmt: skip
