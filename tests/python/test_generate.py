"""`perta eval --generate`: what transformers' generate() says greedily, token by token."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PERTA, SANITIZED, needed, part
from test_estimate import MODELS, VOCABULARY, make_model
from test_eval import evaluate, write_lines

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

F32 = ("--compute", "f32")
LENGTHS = (1, 2, 5, 13, 40, 66, 3, 90)


def prompts(lengths=LENGTHS):
    """Lines with a prompt of each length, and an answer of some tokens."""
    generator = torch.Generator().manual_seed(11)
    for i, n in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (n + 1 + i % 4,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100] * n + ids[n:]}


def prompt_of(line):
    return line["input_ids"][: line["labels"].count(-100) or 1]


@torch.no_grad()
def continued(model, line, n):
    """What transformers says, without the end token; and whether that came."""
    prompt = torch.tensor([prompt_of(line)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                         max_new_tokens=n, pad_token_id=0)[0, prompt.shape[1]:].tolist()  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return (out[:-1], True) if out[-1] in ends else (out, False)


def generated(summary):
    return [(item["generated_ids"], item["generated_end"]) for item in summary["per_sample"]]


def set_ends(model, folder, ends):
    model.generation_config.eos_token_id = ends
    model.generation_config.save_pretrained(folder)


@pytest.mark.parametrize("name", part(MODELS, sanitized=3))
def test_tokens_are_transformers(perta, tmp_path, name):
    """Prompts of different lengths, windows shorter than prompt and answer, and end tokens that come
    in the middle of some answers."""
    family, changes = MODELS[name]
    model = make_model(tmp_path / "model", family, changes)
    lines = list(prompts())
    write_lines(tmp_path / "data.jsonl", lines)
    set_ends(model, tmp_path / "model", None)
    free = [continued(model, line, 20)[0] for line in lines]
    assert all(len(ids) == 20 for ids in free)
    have = evaluate(perta, "model", "--generate", 20, *F32)
    assert generated(have) == [(ids, False) for ids in free]
    assert "no \"eos_token_id\"" in have["notes"][0]
    ends = [free[0][0], free[3][7], free[5][-1]]
    set_ends(model, tmp_path / "model", ends)
    want = [continued(model, line, 20) for line in lines]
    assert {end for _, end in want} == {True, False} or all(end for _, end in want)
    have = evaluate(perta, "model", "--generate", 20, *F32)
    assert generated(have) == want
    assert have["end_ids"] == ends and have["notes"] == []
