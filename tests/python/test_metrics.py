"""`perta metrics` compared with open-unlearning's formulas, written here as they are there; and what
it says of files that do not fit."""

import importlib.util
import json
import math
import sys
import zlib
from itertools import product

import numpy as np
import pytest

pytest.importorskip("scipy")
RANDOM = np.random.default_rng(7)
PYTHON = {"PERTA_PYTHON": sys.executable}


def line(number, **more):
    """An item of per_sample as `perta eval` writes it."""
    loss = float(RANDOM.uniform(0.1, 6))
    item = {"line": number, "loss": loss, "probability": math.exp(-loss), "labels": 9}
    item |= {"min_k": loss * 1.5, "min_k_plus_plus": float(RANDOM.normal()), "exact_memorization": 0.5}
    return item | {"extraction_strength": float(RANDOM.integers(1, 9) / 8)} | more


def with_answers(number, **more):
    wrong = RANDOM.uniform(1, 7, 5).tolist()
    return line(number, paraphrased_loss=float(RANDOM.uniform(0.5, 6)), perturbed_loss=wrong, **more)


def write(path, items):
    path.write_text(json.dumps({"loss": 1.0, "per_sample": items, "seconds": 1}))
    return items


@pytest.fixture
def metrics(perta, tmp_path):
    """What is printed and what is written; check: the exit status, and then the message."""

    def run(*words, check=0):
        out = perta("metrics", *words, *(() if check else ("--json", "--out", "EVAL.json")), check=check, env=PYTHON)
        if check:
            assert not (tmp_path / "EVAL.json").exists()
            return out.stderr
        return json.loads(out.stdout), json.loads((tmp_path / "EVAL.json").read_text())

    return run


# ---- open-unlearning's formulas


def prob(items, key="loss"):
    return np.exp(-np.array([item[key] for item in items]))


def ratios(items, right):
    """truth_ratio: TOFU's wrong / correct."""
    wrong = np.exp(-np.array([item["perturbed_loss"] for item in items]).mean(1))
    return wrong / (prob(items, right) + 1e-10)


def auc(forget, holdout):
    """roc_auc_score, pair by pair."""
    return np.mean([(h > f) + (h == f) / 2 for f, h in product(forget, holdout)])


def ks(one, other):
    """The exact p-value of the two-sample statistic: the share of all orders of the two samples
    that reach a distance as large."""
    n, m = len(one), len(other)
    both = sorted({*one, *other})
    far = max(abs(np.mean(np.array(one) <= x) - np.mean(np.array(other) <= x)) for x in both)
    ways = np.zeros((n + 1, m + 1))  # orders that stay below
    for i, j in product(range(n + 1), range(m + 1)):
        below = abs(i / n - j / m) < far - 1e-12
        before = (ways[i - 1, j] if i else 0) + (ways[i, j - 1] if j else 0)
        ways[i, j] = below * (before if i or j else 1)
    return 1 - ways[n, m] / math.comb(n + m, n)


def test_all_metrics_are_open_unlearnings(metrics, tmp_path):
    forget = write(tmp_path / "f.json", [with_answers(i, gradient_norm=float(i % 5)) for i in range(1, 13)])
    holdout = write(tmp_path / "h.json", [line(i, gradient_norm=float(i % 7)) for i in range(1, 10)])
    sets = {"retain": [with_answers(i) for i in range(1, 8)]}
    for name in ("ra", "wf"):
        sets[name] = [line(i, perturbed_loss=RANDOM.uniform(1, 7, 3).tolist()) for i in range(1, 6)]
    for name, items in sets.items():
        write(tmp_path / f"{name}.json", items)
        for item in items:
            item["rougeL_recall"] = float(RANDOM.uniform())
        write(tmp_path / f"{name}-said.json", [{k: item[k] for k in ("line", "rougeL_recall")} for item in items])
    other = write(tmp_path / "rf.json", [with_answers(i) for i in range(1, 13)])
    other_holdout = write(tmp_path / "rh.json", [line(i) for i in range(1, 10)])
    named = ("--retain", "retain", "--real-authors", "ra", "--world-facts", "wf")
    words = [["--forget", "f.json", "--holdout", "h.json"]]
    words += [[a, f"{b}.json", f"{b}-said.json"] for a, b in zip(named[::2], named[1::2], strict=True)]
    words += [["--retain-model-forget", "rf.json", "--retain-model-holdout", "rh.json"]]
    summary, found = metrics(*[word for some in words for word in some])

    want = {"forget_Q_A_Prob": prob(forget).mean(), "exact_memorization": 0.5}
    want["forget_Q_A_PARA_Prob"] = prob(forget, "paraphrased_loss").mean()
    want["forget_Q_A_PERT_Prob"] = prob(forget, "perturbed_loss").mean()
    want["extraction_strength"] = np.mean([item["extraction_strength"] for item in forget])
    r = ratios(forget, "paraphrased_loss")
    want["forget_truth_ratio"] = np.mean(np.minimum(r, 1 / (r + 1e-10)))
    want["forget_quality"] = ks(r, ratios(other, "paraphrased_loss"))
    for name, key in (("mia_loss", "loss"), ("mia_min_k", "min_k"), ("mia_min_k_plus_plus", "min_k_plus_plus"),
                      ("mia_gradnorm", "gradient_norm")):  # fmt: skip
        want[name] = auc(*([item[key] for item in items] for items in (forget, holdout)))
    reference = 1 - auc(*([item["min_k"] for item in items] for items in (other, other_holdout)))
    want["privleak"] = ((1 - want["mia_min_k"]) - reference) / (reference + 1e-10) * 100
    nine = []
    for name, items in sets.items():
        r = ratios(items, "paraphrased_loss" if name == "retain" else "loss")
        wrong = prob(items, "perturbed_loss")
        options = np.mean(prob(items) / (prob(items) + wrong.sum(1) + 1e-10))
        want[f"{name}_Q_A_Prob"] = prob(items).mean()
        want[f"{name}_Q_A_PERT_Prob"] = wrong.mean()
        want[f"{name}_Truth_Ratio"] = np.mean(np.maximum(0, 1 - r))
        want[f"{name}_Q_A_ROUGE"] = np.mean([item["rougeL_recall"] for item in items])
        if name == "retain":
            want["retain_Q_A_PARA_Prob"] = prob(items, "paraphrased_loss").mean()
        else:
            want[f"{name}_Q_A_Prob_normalised"] = options
        first = want["retain_Q_A_Prob"] if name == "retain" else options
        nine += [first, want[f"{name}_Q_A_ROUGE"], want[f"{name}_Truth_Ratio"]]
    want["model_utility"] = 9 / np.sum(1 / np.array(nine))

    assert summary.pop("notes") == []
    assert summary == pytest.approx(want, rel=1e-9)
    assert list(found) == sorted(want) and {k: v["agg_value"] for k, v in found.items()} == summary
    by_index = found["forget_truth_ratio"]["value_by_index"]
    assert [by_index[str(i)]["score"] for i in range(12)] == pytest.approx(ratios(forget, "paraphrased_loss").tolist())
    assert found["forget_Q_A_Prob"]["value_by_index"]["3"] == {
        "prob": pytest.approx(forget[3]["probability"]), "avg_loss": forget[3]["loss"]}  # fmt: skip
    assert found["mia_min_k"]["holdout"]["value_by_index"]["8"] == {"score": holdout[8]["min_k"]}


def test_the_retain_models_file_serves_as_its_results_do(metrics, perta, tmp_path):
    for name in ("f", "rf"):
        write(tmp_path / f"{name}.json", [with_answers(i) for i in range(1, 9)])
    for name in ("h", "rh"):
        write(tmp_path / f"{name}.json", [line(i) for i in range(1, 9)])
    words = ("--forget", "f.json", "--holdout", "h.json")
    more = ("--retain-model-forget", "rf.json", "--retain-model-holdout", "rh.json")
    direct = metrics(*words, *more)[0]
    perta("metrics", "--forget", "rf.json", "--holdout", "rh.json", "--out", "retain.json", env=PYTHON)
    (tmp_path / "EVAL.json").unlink()
    assert metrics(*words, "--retain-model", "retain.json")[0] == direct
    assert {"privleak", "forget_quality"} <= direct.keys()


def test_what_is_missing_is_named(metrics, tmp_path):
    write(tmp_path / "h.json", write(tmp_path / "f.json", [line(i) for i in range(1, 5)]))
    write(tmp_path / "r.json", [line(i, perturbed_loss=[3.0]) for i in range(1, 5)])
    summary, found = metrics("--forget", "f.json", "--holdout", "h.json", "--retain", "r.json")
    assert summary["mia_loss"] == 0.5 and summary["privleak"] == pytest.approx(0, abs=1e-6)
    notes = "\n".join(summary["notes"])
    assert "0.5, as in open-unlearning" in notes
    assert "compares with the answers themselves" in notes
    assert "2 of nine; missing: retain_Q_A_ROUGE, ra_Q_A_Prob_normalised" in notes
    assert "model_utility" not in found and "mia_gradnorm" not in found and "mia_zlib" not in found
    two = [summary["retain_Q_A_Prob"], summary["retain_Truth_Ratio"]]
    assert summary["model_utility_partial"] == pytest.approx(2 / (1 / two[0] + 1 / two[1]))
    assert len(found["model_utility_partial"]["missing"]) == 7


def test_answers_with_a_single_label_are_not_counted(metrics, tmp_path):
    items = [line(1, exact_memorization=None, gradient_norm=None), line(2, exact_memorization=0.25, gradient_norm=1.0)]
    write(tmp_path / "h.json", write(tmp_path / "f.json", items))
    summary, found = metrics("--forget", "f.json", "--holdout", "h.json")
    assert summary["exact_memorization"] == 0.25
    assert found["exact_memorization"]["value_by_index"]["0"] == {"score": None}
    assert any(note.startswith("mia_gradnorm: left out") and "line 1" in note for note in summary["notes"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o: o.pop("per_sample"), 'no list "per_sample"'),
        (lambda o: o["per_sample"].clear(), 'no list "per_sample"'),
        (lambda o: o["per_sample"].append(o["per_sample"][0]), "a line is there twice"),
        (lambda o: o["per_sample"][0].pop("line"), 'not an object with "line"'),
        (lambda o: o["per_sample"][1].pop("loss"), "line 2: no loss"),
        (lambda o: o["per_sample"][1].update(loss=None), 'line 2: "loss" is not a finite number'),
        (lambda o: o["per_sample"][1].update(loss=math.nan), 'line 2: "loss" is not a finite number'),
        (lambda o: o["per_sample"][0].update(perturbed_loss=[]), 'line 1: "perturbed_loss"'),
        (lambda o: o["per_sample"][0].update(min_k="1"), 'line 1: "min_k"'),
        (lambda o: o["per_sample"][0].update(loss=10**400), 'line 1: "loss" is not a finite number'),
    ],
)
def test_a_file_that_does_not_fit_is_named(metrics, tmp_path, change, message):
    result = {"per_sample": [line(1), line(2)]}
    change(result)
    (tmp_path / "f.json").write_text(json.dumps(result))
    stderr = metrics("--forget", "f.json", check=3)
    assert "f.json" in stderr and message in stderr


def test_files_of_different_sets_are_not_mixed(metrics, tmp_path):
    write(tmp_path / "a.json", [line(1), line(2)])
    write(tmp_path / "b.json", [{"line": 1, "rougeL_recall": 1.0}])
    write(tmp_path / "c.json", [{"line": 1, "rougeL_recall": 1.0}, {"line": 2, "rougeL_recall": 1.0, "loss": 9.0}])
    assert "b.json: has other lines than a.json" in metrics("--forget", "a.json", "b.json", check=3)
    assert "c.json: line 2: loss is 9.0, but " in metrics("--forget", "a.json", "c.json", check=3)
    (tmp_path / "logs.json").write_text('{"forget_truth_ratio": {"agg_value": 1}}')
    words = ("--forget", "a.json", "--retain-model", "logs.json")
    assert "logs.json: forget_truth_ratio: no value_by_index" in metrics(*words, check=3)
    (tmp_path / "logs.json").write_text("{}")
    assert "is it a *_EVAL.json?" in metrics(*words, check=3)


def test_rounded_weights_are_another_model(metrics, tmp_path):
    for name, form in (("a", None), ("b", "nf4"), ("c", None)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"per_sample": [line(1)], "quantize": form}))
    stderr = metrics("--forget", "a.json", "--retain", "b.json", check=3)
    assert "b.json: the weights were rounded to nf4, but in a.json not rounded" in stderr
    metrics("--forget", "a.json", "--retain", "c.json", "--retain-model-forget", "b.json")


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "nothing to compute from"),
        ("--forget a --retain-model b --retain-model-forget c", "not both"),
        ("--forget a --holdout b --retain-model-holdout c", "--retain-model-forget is needed"),
        ("--forget a --model m", "needed together"),
        ("--retain a --model m --data-forget d --data-holdout e", "both are needed"),
        ("--forget a --out there", "there: exists; --force replaces it"),
        ("--holdout h", "--holdout: --forget is needed"),
        ("--retain a --retain-model b", "--retain-model: --forget is needed"),
        ("--retain a --retain-model-forget b", "--retain-model-forget: --forget is needed"),
        ("--forget a --retain-model-forget b --retain-model-holdout c", "--holdout is needed"),
        ("--forget there --retain there", "there: given twice"),
        ("--forget there --out there --force", "there: would be overwritten, and is an input"),
        ("--forget a --out . --force", ".: would be overwritten, and is a folder"),
    ],
)
def test_wrong_arguments(perta, tmp_path, words, message):
    (tmp_path / "there").write_text("mine")
    assert message in perta("metrics", *words.split(), check=2, env=PYTHON).stderr
    assert (tmp_path / "there").read_text() == "mine"


def test_from_a_model_to_its_eval_json(perta, tmp_path):
    """With zlib: the answers' texts are decoded from the data."""
    torch = pytest.importorskip("torch")
    from test_eval import tokenize

    answers = ["me some text", "me me me me", "who", "text some me who who"]
    lines = [{"question": "who ?", "answer": text, "paraphrased_answer": f"some {text}"}
             | {"perturbed_answer": ["text", "some some"]} for text in answers]  # fmt: skip
    torch.manual_seed(3)
    tokenize(tmp_path, lines)
    (tmp_path / "f.jsonl").write_text((tmp_path / "data.jsonl").read_text())
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "h.jsonl").write_text("".join(rows[1:3]))
    for name in ("f", "h"):
        result = perta("eval", "--model", "model", "--data", f"{name}.jsonl", "--per-sample", "--json")
        (tmp_path / f"{name}.json").write_text(result.stdout)
    words = "--forget f.json --holdout h.json --model model --data-forget f.jsonl --data-holdout h.jsonl"
    text = perta("metrics", *words.split(), "--out", "E.json", env=PYTHON).stdout
    found = json.loads((tmp_path / "E.json").read_text())
    losses = [item["loss"] for item in json.loads((tmp_path / "f.json").read_text())["per_sample"]]
    scores = [loss / len(zlib.compress(said.encode())) for loss, said in zip(losses, answers, strict=True)]
    assert [v["score"] for v in found["mia_zlib"]["forget"]["value_by_index"].values()] == pytest.approx(scores)
    assert found["mia_zlib"]["agg_value"] == auc(scores, scores[1:3])
    assert [row.split()[0] for row in text.splitlines()] == list(found)
    assert not list(tmp_path.glob("*.perta-partial"))
    if importlib.util.find_spec("rouge_score"):
        said = perta("ask", "model", "--data", "text.jsonl", "--json", "--max-new-tokens", "3", env=PYTHON).stdout
        (tmp_path / "said.json").write_text(said)
        whole = perta("metrics", "--forget", "said.json", "f.json", "--json", env=PYTHON).stdout
        assert json.loads(whole)["forget_Q_A_ROUGE"] == pytest.approx(json.loads(said)["rougeL_recall"])
    (tmp_path / "h.jsonl").write_text(rows[1])
    stderr = perta("metrics", *words.split(), check=3, env=PYTHON).stderr
    assert "h.jsonl: has other lines than the result of perta eval" in stderr
