"""Outputs never overwrite inputs or each other; the record holds the digest of every input."""

import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import xxhash
from conftest import PERTA
from reference import read_folder, write_folder
from verbs import VERBS, make_inputs, run, stop_at


@pytest.fixture
def inputs(tmp_path):
    """Folders model, tuned, base, forget, retain; importances are sharded differently from the
    model."""
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
        ("--patch p/.", "p/.: ends in . or .."),
        ("--patch p --out new/./ --force", "new/./: ends in . or .."),
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


# --- what --force replaces


@pytest.fixture
def done(perta, inputs):
    """The same, with a file of the user's in the model, and with one output of each kind: patch
    p, model out, importance imp/mean."""
    (inputs / "model/config.json").write_text("{}")
    (inputs / "model/my notes.txt").write_text("mine")
    perta(*UNLEARN, "--patch", "p", "--out", "out")
    perta("accumulate", "forget", "retain", "--out", "imp")
    return inputs


KINDS = {
    "p": [*UNLEARN, "--patch", "p"],
    "out": ["apply", "model", "p", "--out", "out"],
    "imp/mean": ["accumulate", "forget", "retain", "--out", "imp"],
}


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("out", KINDS)
def test_what_perta_wrote_is_replaced(perta, done, out):
    before = (done / out).stat().st_ino
    assert "--force to replace it" in perta(*KINDS[out], check=2).stderr
    perta(*KINDS[out], "--force")
    assert (done / out).stat().st_ino != before
    perta(*KINDS[out], "--force")
    assert not [path for path in done.iterdir() if ".perta-" in path.name]


def extension(folder):
    """What a browser accepts as an extension."""
    (folder / "src").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"manifest_version": 3, "name": "mine"}')
    (folder / "src/main.js").write_text("mine")
    return "src/"


def node(folder):
    (folder / ".git").mkdir(parents=True)
    (folder / ".git/HEAD").write_text("mine")
    (folder / "config.json").write_text('{"port": 80}')
    return ".git/"


def adapters(folder):
    """As some image programs keep them: each is a file of its own."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("a", "b"):
        safetensors_file(folder / f"{name}.safetensors")
    return "a.safetensors, b.safetensors"


def program(folder):
    """A program with a config.json of its own, that keeps what it learned in one file."""
    folder.mkdir()
    (folder / "config.json").write_text('{"port": 80, "paths": {"model_type": "x"}}')
    safetensors_file(folder / "notes.safetensors")
    return "notes.safetensors"


def safetensors_file(path):
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")


@pytest.mark.parametrize("make", [extension, node, adapters, program])
@pytest.mark.parametrize("out", KINDS)
def test_a_folder_of_somebody_else_is_not_replaced(perta, done, out, make):
    (done / out).rename(done / "aside")
    named = make(done / out)
    before = tree(done)
    for dry in [], ["--dry-run"]:
        refusal = perta(*KINDS[out], "--force", *dry, check=2).stderr
        assert f"{out}: exists and is neither a checkpoint nor a patch (it holds" in refusal
        assert named in refusal
    assert tree(done) == before


def link(path):
    path.symlink_to("../model")


@pytest.mark.parametrize(
    "put, named",
    [
        (lambda f: (f / "thesis.md").write_text("mine"), "thesis.md"),
        (lambda f: (f / ".git").mkdir(), ".git/"),
        (lambda f: (f / "mean").mkdir(), "mean/"),
        (lambda f: link(f / "tokenizer.json"), "tokenizer.json (a link)"),
        (lambda f: (f / "optimizer.pt").write_text("mine"), "optimizer.pt"),
        (lambda f: (f / "my notes.txt").write_text("mine, and more"), "my notes.txt"),
    ],
)
@pytest.mark.parametrize("out", KINDS)
def test_an_output_with_anything_else_in_it_is_not_replaced(perta, done, out, put, named):
    put(done / out)
    before = tree(done)
    refusal = perta(*KINDS[out], "--force", check=2).stderr
    assert f"{out}: exists and holds files that are not part of a " in refusal and named in refusal
    assert tree(done) == before


@pytest.mark.parametrize("as_file", [False, True])
def test_shards_of_any_name_are_replaced_by_what_is_made_of_the_same(perta, inputs, as_file):
    """No index names them, and there is no config."""
    for folder in ("model", "tuned"):
        (inputs / folder / "model.safetensors.index.json").unlink()
        for i, shard in enumerate(sorted((inputs / folder).glob("*.safetensors"))):
            shard.rename(shard.with_name(f"part{i}.safetensors"))
    sides = [f"{folder}/part0.safetensors" if as_file else folder for folder in ("model", "tuned")]
    perta("diff", *sides, "--patch", "p")
    for _ in range(2):
        perta("apply", sides[0], "p", "--out", "out", "--force")
    safetensors_file(inputs / "out/part0.safetensors")  # with other tensors
    refusal = perta("apply", sides[0], "p", "--out", "out", "--force", check=2).stderr
    assert "part0.safetensors" in refusal


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize("flag", ["--force", "--resume", "--quiet"])
def test_a_folder_of_the_leftovers_name_is_looked_at_too(perta, done, out, flag):
    shutil.rmtree(done / out)
    partial = done / f"{out}.perta-partial"
    partial.mkdir()
    (partial / "diary").write_text("mine")
    before = tree(done)
    refusal = perta(*KINDS[out], flag, check=2).stderr
    assert f"{out}.perta-partial: holds files that no run of perta left there: diary" in refusal
    assert tree(done) == before
    (partial / "diary").unlink()
    (partial / "model.safetensors").write_bytes(b"")
    (partial / "config.json").write_bytes(b"")
    if flag == "--quiet":
        assert "left by a run" in perta(*KINDS[out], check=2).stderr and partial.exists()
    else:
        perta(*KINDS[out], flag)
        assert not partial.exists()


@pytest.mark.parametrize("flags", [[], ["--force"], ["--resume"]])
def test_a_file_of_the_journals_name_is_not_written_over(perta, inputs, flags):
    (inputs / "p.perta-journal").write_text("mine")
    refusal = perta(*UNLEARN, "--patch", "p", *flags, check=2).stderr
    assert "p.perta-journal: exists and is not a journal of perta" in refusal
    assert (inputs / "p.perta-journal").read_text() == "mine" and not (inputs / "p").exists()
    (inputs / "p.perta-journal").write_text("0123456789ab")  # a torn record
    perta(*UNLEARN, "--patch", "p", *flags)


def test_work_of_steps_with_anything_else_in_it_stays(tmp_path):
    """And so does the journal beside it: --resume continues when the other file is moved away."""
    if "steps" not in VERBS:
        pytest.skip("this build has no matrix products")
    make_inputs(tmp_path, large=False)
    status, _ = stop_at(tmp_path, VERBS["steps"], "commit", 3)
    assert status == -signal.SIGKILL
    (work,) = tmp_path.glob("*.steps.perta-partial")
    (work / "diary").write_text("mine")
    before = tree(tmp_path)
    for flag, code in (("--force", 2), ("--resume", 3)):
        said = run(tmp_path, *VERBS["steps"], flag, status=code).stderr
        assert f"{work.name}: holds files that no run of perta left there: diary" in said
        assert tree(tmp_path) == before
    (work / "diary").unlink()
    run(tmp_path, *VERBS["steps"], "--resume")
    assert not work.exists()


def test_a_statement_replaces_only_a_statement(perta, inputs):
    statement = inputs / "p.intoto.json"
    statement.write_text('{"mine": true}')
    for command in (
        [*UNLEARN, "--patch", "p/"],
        "diff model tuned --patch p".split(),
    ):
        refusal = perta(*command, "--statement", check=2).stderr
        assert "p.intoto.json: exists, and perta did not write it" in refusal
        assert statement.read_text() == '{"mine": true}' and not (inputs / "p").exists()
    statement.unlink()
    for _ in range(2):
        perta(*UNLEARN, "--patch", "p", "--statement", "--force")
    assert "in-toto" in statement.read_text()


def test_a_file_beside_the_model_is_no_journal_of_an_edit_in_place(perta, done):
    mine = done / "model/perta-in-place.journal.perta-partial"
    mine.write_text("mine, all of it")
    before = tree(done)
    refusal = perta("apply", "model", "p", "--in-place", check=2).stderr
    assert f"{mine.name}: exists and is not a journal of perta" in refusal
    assert tree(done) == before
    mine.write_bytes(bytes(9000))  # as left by a run that is killed while it creates it
    perta("apply", "model", "p", "--in-place")
    assert not mine.exists()


def test_a_mount_point_is_named_before_work_is_done(done):
    script = f"mount -t tmpfs none imp/mean && {PERTA} accumulate forget retain --out imp --force"
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if tried.returncode or os.geteuid():
        pytest.skip("needs a mount of its own")
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=done, capture_output=True, text=True
    )
    assert result.returncode == 2 and "imp/mean: exists and is a mount point" in result.stderr
    assert (done / "imp/mean/model.safetensors").exists()


# --- two models in one folder


def test_other_weights_of_the_model_are_left_behind_and_named(perta, done):
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "model.safetensors.bak"):
        safetensors_file(done / "model" / name)
    (done / "model/weights").write_bytes(b"GGUF" + bytes(50))
    (done / "model/pytorch_model.bin.index.json").write_text("{}")
    said = perta(*UNLEARN, "--patch", "p", "--out", "out", "--force").stdout
    named = ["consolidated.safetensors", "model.fp16.safetensors", "model.safetensors.bak", "weights"]
    named.append("pytorch_model.bin.index.json")
    for name in named:
        assert re.search(rf"left behind \(weights that are not among the model's shards.*: {name}\n", said)
        assert not (done / "out" / name).exists()
    summary = json.loads(perta("apply", "model", "p", "--in-place", "--json").stdout)
    assert sorted(summary["unedited"]) == sorted(named)


def test_a_model_that_is_chosen_as_a_file_has_the_config_beside_it(perta, tmp_path):
    """Its choice counts: the file selects one of two models."""
    if "estimate" not in VERBS:
        pytest.skip("this build has no matrix products")
    make_inputs(tmp_path, large=False)
    folder, file = tmp_path / "llama", "llama/model.safetensors"
    weights = ["eval", "--data", "data.jsonl", "--json", "--model"]
    losses = [json.loads(run(tmp_path, *weights, model).stdout)["loss"] for model in ("llama", file)]
    assert losses[0] == losses[1]
    config = json.loads((folder / "config.json").read_text())
    command = f"unlearn --model {file} --tuned {file} --base {file} --method tv --patch p".split()
    for key, value, named in (
        ("tie_word_embeddings", True, "lm_head.weight differ"),
        ("quantization_config", {"quant_method": "fp8"}, "llama/config.json: \"quantization_config\""),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        assert named in run(tmp_path, *command, status=3).stderr
    (folder / "config.json").unlink()
    run(tmp_path, *command)
