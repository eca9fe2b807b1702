"""`estimate`, `eval` and steps give the same bytes for every number of threads, every budget,
every way of reading, and when a run is resumed with other flags than it began with."""

import itertools
import json
import re

import pytest
from conftest import LONG, SANITIZED, needed, part
from test_estimate import MODELS, make_model, needs_avx512, samples, write_data
from test_eval import evaluate
from test_steps import STEPS, make_folders
from verbs import EAGER, stop_at

THREADS = (1, 2, 3, 5, 16)
ALL = list(itertools.product(THREADS, ("little", "plenty"), ("direct", "mmap")))
SOME = [
    (1, "little", "direct"),
    (2, "plenty", "mmap"),
    (3, "little", "mmap"),
    (5, "plenty", "direct"),
    (16, "little", "direct"),
]
COMPUTE = ["f32", pytest.param("bf16", marks=needs_avx512)]
ESTIMATE = "estimate --model model --data data.jsonl --out imp --stat mean,meansq --json".split()


def settings(perta, command, every=LONG):
    """Flags; little is the budget that a refusal names. Sanitizers look for races and memory
    errors."""
    little = int(needed(perta, command, "20M")[:-1]) + (100 if SANITIZED else 0)
    budgets = {"little": f"{little}M", "plenty": "2G"}
    for threads, memory, io in part(ALL if every else SOME, sanitized=3):
        yield ["--threads", str(threads), "--memory", budgets[memory], "--io", io]


def tensors(folder, pattern="*.safetensors"):
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern)}
    assert files
    return files


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("family, changes", part(MODELS.values(), sanitized=1), ids=part(MODELS.keys(), sanitized=1))
def test_estimate(perta, tmp_path, family, changes, compute):
    """Some thousand tokens in samples of 2 to 130 tokens: with little memory they are processed
    in batches, and the data kept for all of them goes to files."""
    make_model(tmp_path / "model", family, changes)
    write_data(tmp_path / "data.jsonl", repeat=3 if SANITIZED else 20)
    command = [*ESTIMATE, "--compute", compute, "--force"]
    runs = []
    for flags in settings(perta, command, every=LONG or not changes):
        summary = json.loads(perta(*command, *flags).stdout)
        runs.append((summary["loss"], tensors(tmp_path / "imp")))
        assert runs[-1] == runs[0], flags
        assert len(summary["pieces"]) <= int(flags[1]) and sum(summary["pieces"]) > 0
    assert len(runs) >= 3


@pytest.mark.parametrize("stat", ["mean", "mean,meansq"])
def test_more_tokens_than_memory_give_the_same(perta, tmp_path, stat):
    """In batches, with the data for all tokens in a file; compared with one batch in memory. One
    of the samples is longer than the 1024 tokens that a gradient is summed over at once."""
    make_model(tmp_path / "model", "Llama", {"max_position_embeddings": 4096})
    lines = list(samples()) * (20 if SANITIZED else 100)
    long = [line["input_ids"] for line in lines[:30]]
    lines.insert(3, {"input_ids": [token for ids in long for token in ids][:1300]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*ESTIMATE, "--compute", "f32", "--force", "--stat", stat]
    whole = json.loads(perta(*command, "--memory", "2G").stdout)
    want = tensors(tmp_path / "imp")
    assert (whole["batches"], whole["scratch_bytes"]) == (1, 0)
    cut = json.loads(perta(*command, "--memory", needed(perta, command, "20M")).stdout)
    assert cut["batches"] > 3 and cut["scratch_bytes"] > 0
    assert tensors(tmp_path / "imp") == want and cut["loss"] == whole["loss"]


def test_statistics_wanted_together_are_those_wanted_alone(perta, tmp_path):
    """Squares: of the same gradients. (The mean is then summed over samples, otherwise over all
    tokens.)"""
    make_model(tmp_path / "model", "Llama", {})
    write_data(tmp_path / "data.jsonl")
    perta(*ESTIMATE)
    perta(*"estimate --model model --data data.jsonl --out alone --stat meansq".split())
    assert tensors(tmp_path / "imp/meansq") == tensors(tmp_path / "alone/meansq")


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", part(MODELS, plain=4, sanitized=1))
def test_eval(perta, tmp_path, name, compute):
    make_model(tmp_path / "model", *MODELS[name])
    write_data(tmp_path / "data.jsonl", repeat=20)
    command = "eval --model model --data data.jsonl --compute".split() + [compute]
    runs = [evaluate(perta, "model", "--compute", compute, *flags)["per_sample"]
            for flags in settings(perta, command)]  # fmt: skip
    assert all(run == runs[0] for run in runs)


def patch_bytes(tmp_path, perta, *flags):
    """Everything in the patch except its record, which says when it was made."""
    perta(*STEPS, "4", "--method", "signed-hold", "--stop-probability", "0.003", "--force", *flags)
    return tensors(tmp_path / "patch", "*.perta")


@pytest.mark.parametrize("name", part(["llama, tied", "qwen3"], sanitized=1))
def test_steps(perta, tmp_path, name):
    make_folders(tmp_path, name)
    command = [*STEPS, "4", "--method", "signed-hold", "--stop-probability", "0.003"]
    runs = [patch_bytes(tmp_path, perta, *flags) for flags in settings(perta, command)]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("stop", [1, 3, 4])  # after a layer forward, the head, and a layer backward
def test_a_run_goes_on_with_other_flags(perta, tmp_path, stop):
    make_model(tmp_path / "model", "Llama", {})
    write_data(tmp_path / "data.jsonl", repeat=20)
    command = [*ESTIMATE, "--compute", "f32"]
    perta(*command, "--threads", "2", "--memory", "1G")
    want = tensors(tmp_path / "imp")
    (tmp_path / "imp").rename(tmp_path / "first")
    begun = [*command, "--threads", "2", "--memory", "1G", "--io", "pread"]
    status, _ = stop_at(tmp_path, begun, "commit", stop)
    assert status
    little = needed(perta, [*command, "--force"], "20M")
    other = ["--threads", "3", "--memory", little, "--io", "mmap", "--resume"]
    assert not re.search("starts over", perta(*command, *other, env=EAGER).stderr)
    assert tensors(tmp_path / "imp") == want
