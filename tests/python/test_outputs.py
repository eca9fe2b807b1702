"""Outputs never fall on inputs or on each other; the record holds every input's digest."""

import json

import numpy as np
import pytest
import xxhash
from reference import read_folder, write_folder


@pytest.fixture
def inputs(tmp_path):
    """Folders model, tuned, base, forget, retain; importances sharded otherwise than the model."""
    rng = np.random.default_rng(7)
    names = [f"layer.{i}.weight" for i in range(5)]

    def noise():
        return {name: rng.standard_normal((40, 30)).astype(np.float32) for name in names}

    for folder in ("model", "tuned", "base"):
        write_folder(tmp_path / folder, noise(), shards=2)
    for folder in ("forget", "retain"):
        tensors = noise()
        reverse = {name: tensors[name] for name in reversed(names)}
        write_folder(tmp_path / folder, reverse, metadata={"perta.stat": "mean"})
    return tmp_path


UNLEARN = "unlearn --model model --tuned tuned --base base --forget forget --retain retain".split()


@pytest.mark.parametrize(
    "flags, other",
    [
        ("--patch model --force", "the input model"),
        ("--patch model/sub", "the input model"),
        ("--patch . --force", "the input model"),
        ("--patch tuned/../base --force", "the input base"),
        ("--patch p --out retain --force", "the input retain"),
        ("--patch p --out p", "the other output p"),
        ("--patch p --out p/x", "the other output p"),
        ("--patch p/x --out p", "the other output p/x"),
        ("--patch p --out model --force --alpha 1,2", "the input model"),
        ("--patch new/../p", 'the folder before ".." does not exist'),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_output_on_an_input_or_another_output_is_refused(perta, inputs, flags, other, dry):
    before = {folder: read_folder(inputs / folder) for folder in ("model", "base", "retain")}
    there = sorted(inputs.iterdir())
    result = perta(*UNLEARN, *flags.split(), *dry, check=2)
    assert other in result.stderr
    assert sorted(inputs.iterdir()) == there
    for folder, tensors in before.items():
        after = read_folder(inputs / folder)
        assert all(np.array_equal(after[name], tensors[name]) for name in tensors)


def test_other_verbs_refuse_it_too(perta, inputs):
    perta(*UNLEARN, "--patch", "p")
    for command in (
        "apply model p --out model --force",
        "apply model p --out p/x",
        "diff model tuned --patch tuned --force",
        "accumulate --out forget forget retain",
    ):
        assert "the input" in perta(*command.split(), check=2).stderr


@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_the_record_holds_the_digest_of_every_input_whatever_its_sharding(perta, inputs, io):
    perta(*UNLEARN, "--patch", "p", "--io", io)
    record = json.loads((inputs / "p/manifest.json").read_text())["inputs"]
    assert record.keys() == {"model", "tuned", "base", "forget", "retain"}
    for folder, listed in record.items():
        for shard in listed["shards"]:
            data = (inputs / folder / shard["name"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)


def test_a_pattern_that_leaves_nothing_to_edit_is_refused(perta, inputs):
    refusal = perta(*UNLEARN, "--patch", "p", "--include", "lm_head*", check=2).stderr
    assert "leave no tensor to edit" in refusal
