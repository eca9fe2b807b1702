"""Other programs on perta's files: xxhsum, sha256sum, safetensors, and a second patch reader."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, part
from reference import CHUNK, folder_bytes, write_folder
from safetensors import safe_open
from test_diff import drifting_bytes, fine_tuned, medium, random_bits, write_checkpoint

PATCH_READER = [sys.executable, "-m", "perta.patch_reader"]


@pytest.fixture
def model(tmp_path):
    """Three shards in the folder model."""
    rng = np.random.default_rng(0)
    tensors = {f"layer.{i}.weight": rng.standard_normal((30, 7)).astype("f4") for i in range(5)}
    folder = write_folder(tmp_path / "model", tensors, shards=3)
    (folder / "config.json").write_text("{}")
    return folder


# --- digests


@pytest.mark.parametrize("tool", ["xxhsum", "sha256sum"])
def test_the_sums_pass_the_tool_that_they_are_for(perta, model, tool):
    sums = perta("manifest", "--format", tool, "model").stdout
    assert len(sums.splitlines()) == len(folder_bytes(model)) == 5
    command = [tool, "--check", "-"]
    subprocess.run(command, cwd=model, input=sums, text=True, check=True)
    (model / "config.json").write_text("{ }")
    assert subprocess.run(command, cwd=model, input=sums, text=True).returncode == 1


def test_verify_names_the_tensor_that_one_byte_changed_in(perta, model, tmp_path):
    (tmp_path / "sums.json").write_text(perta("manifest", "model").stdout)
    verify = ["verify", "model", "--manifest", "sums.json", "--json"]
    assert json.loads(perta(*verify).stdout)["differences"] == []

    shard = model / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    differences = json.loads(perta(*verify, check=1).stdout)["differences"]
    assert [(d["file"], d.get("tensor")) for d in differences] == [(shard.name, "layer.4.weight")]
    assert "layer.4.weight" in perta(*verify[:-1], check=1).stdout


def test_verify_names_files_that_are_gone_and_files_that_are_new(perta, model, tmp_path):
    (tmp_path / "sums.json").write_text(perta("manifest", "model").stdout)
    (model / "config.json").rename(model / "other.json")
    summary = perta("verify", "model", "--manifest", "sums.json", "--json", check=1).stdout
    summary = json.loads(summary)
    assert [d["file"] for d in summary["differences"]] == ["config.json"]
    assert summary["unlisted"] == ["other.json"]


# --- safetensors


def opened(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def test_an_unlearned_model_opens_with_safetensors(perta, model, tmp_path):
    folders = "--tuned model --base model --out out --patch p"
    perta("unlearn", "--model", "model", "--method", "tv", *folders.split())
    for path in model.glob("*.safetensors"):
        tensors, _ = opened(path)
        again, _ = opened(tmp_path / "out" / path.name)
        assert tensors.keys() == again.keys()
        assert all(np.array_equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("stat", ["mean", "meansq"])
def test_importances_open_with_safetensors_and_say_what_they_hold(perta, model, tmp_path, stat):
    perta("accumulate", "--out", "imp", "--stat", stat, "model", "model", "model")
    paths = sorted((tmp_path / "imp" / stat).glob("*.safetensors"))
    assert [path.name for path in paths] == sorted(p.name for p in model.glob("*.safetensors"))
    for path in paths:
        tensors, metadata = opened(path)
        assert metadata["perta.stat"] == stat and metadata["perta.samples"] == "3"
        assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    index = json.loads((tmp_path / "imp" / stat / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads(
        (model / "model.safetensors.index.json").read_text()
    )["weight_map"]


# --- the second implementation of the patch format


def any_bits(dtype):
    def make(rng, n):
        before = random_bits(rng, dtype, n)
        return before, medium(rng, dtype, before)

    return make


@pytest.mark.parametrize(
    "dtype, make",
    part(sanitized=3, cases=[
        ("BF16", fine_tuned),
        ("I64", drifting_bytes),
        *[(d, any_bits(d)) for d in ("F16", "F32", "F64", "F8_E4M3", "I32", "U8", "BOOL")],
    ]),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_patch_reader_of_the_format_page_agrees(perta, tmp_path, dtype, make):
    rng = np.random.default_rng(1)
    pairs = {f"of.{n}": make(rng, n) for n in (CHUNK + 9, 0, 1, 30)}
    before, after = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    after = dict(reversed(after.items()))
    write_checkpoint(tmp_path / "a", dtype, before, 1)
    write_checkpoint(tmp_path / "b", dtype, after, 1, {"format": "pt"})
    perta("diff", "a", "b", "--patch", "p")
    shard = "model-00001-of-00001.safetensors"
    for model, wanted, flags in [("a", "b", []), ("b", "a", ["--revert"])]:
        paths = [tmp_path / model / shard, tmp_path / f"p/{shard}.perta", tmp_path / "out"]
        subprocess.run([*PATCH_READER, *paths, *flags], cwd=ROOT / "python", check=True)
        assert paths[2].read_bytes() == (tmp_path / wanted / shard).read_bytes()
        onto_itself = [*PATCH_READER, *paths[:2], paths[0], *flags]
        refused = subprocess.run(onto_itself, cwd=ROOT / "python", capture_output=True, text=True)
        assert refused.returncode and "would overwrite an input" in refused.stderr
