"""One-way patches lead forward, and reveal nothing of the values before."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from reference import BF16, CHUNK, folder_bytes, narrow, shard_bytes, write_folder
from test_diff import check_with_zstd

SIDES = ["model", "tuned", "base", "forget", "retain"]


@pytest.fixture
def sides(tmp_path):
    rng = np.random.default_rng(8)
    for role in SIDES:
        shapes = {"big": (CHUNK + 99,), "small": (7, 11), "f32": (50,), "empty": (0, 2)}
        dtype = {"f32": np.dtype("f4")}
        tensors = {n: narrow(rng.standard_normal(s, "f4"), dtype.get(n, BF16)) for n, s in shapes.items()}
        write_folder(tmp_path / role, tensors | {"ids": np.arange(9)}, shards=2)
    return tmp_path


def unlearn(perta, *more, patch="p"):
    perta("unlearn", *(f"--{role}={role}" for role in SIDES), "--patch", patch, *more)


def test_it_leads_forward_to_the_same_model(perta, sides):
    unlearn(perta, "--out", "want")
    unlearn(perta, "--one-way", patch="public")
    perta("verify", "public")
    check_with_zstd(sides / "public")
    perta("apply", "model", "public", "--out", "got")
    assert folder_bytes(sides / "got") == folder_bytes(sides / "want")
    perta("verify", "got", "--patch", "public", "--applied")
    perta("diff", "model", "want", "--one-way", "--patch", "diffed")
    assert {p.name: p.read_bytes() for p in (sides / "diffed").glob("*.perta")} == {
        p.name: p.read_bytes() for p in (sides / "public").glob("*.perta")}  # fmt: skip
    for shard in (sides / "model").glob("*.safetensors"):
        command = [sys.executable, "-m", "perta.patch_reader", shard, sides / f"public/{shard.name}.perta", sides / "read"]
        subprocess.run(command, cwd=ROOT / "python", check=True)
        assert (sides / "read").read_bytes() == (sides / "want" / shard.name).read_bytes()
        assert subprocess.run([*command, "--revert"], cwd=ROOT / "python", capture_output=True).returncode


def test_it_is_the_same_whatever_was_before_where_it_changes(perta, sides):
    """So nothing in the patch can confirm a guess of the old values."""
    rng = np.random.default_rng(9)
    after = {"a": narrow(rng.standard_normal(3000, "f4"), BF16), "b": narrow(rng.standard_normal(40, "f4"), np.dtype("f4"))}
    changes = {n: rng.random(x.shape) < 0.1 for n, x in after.items()}
    write_folder(sides / "after", after)
    for before in ("one", "other"):
        tensors = {}
        for name, x in after.items():
            y = x.copy()
            y[changes[name]] = narrow(rng.standard_normal(int(changes[name].sum()), "f4") + 5, x.dtype)
            tensors[name] = y
        write_folder(sides / before, tensors)
        perta("diff", before, "after", "--one-way", "--patch", f"p-{before}")
        perta("apply", before, f"p-{before}", "--out", f"a-{before}")
        assert shard_bytes(sides / f"a-{before}") == shard_bytes(sides / "after")
    assert folder_bytes(sides / "p-one") == folder_bytes(sides / "p-other")
    manifest = json.loads((sides / "p-one/manifest.json").read_text())
    assert manifest["recipe"] == {"command": "diff", "one_way": True}
    assert {s["xxh3_128"] for i in manifest["inputs"].values() for s in i["shards"]} == {None}
    assert manifest["encodings"]["values"]["chunks"] == 2 and manifest["encodings"]["delta"]["chunks"] == 0


def test_its_record_counts_only_what_the_model_after_shows(perta, sides):
    """The mean weight of a tensor of one element, with base and tuned, would reveal the old
    value."""
    unlearn(perta)
    unlearn(perta, "--one-way", patch="public")
    whole, public = (json.loads((sides / p / "manifest.json").read_text()) for p in ("p", "public"))
    assert all("mean_weight" in t for t in whole["tensors"] if t["action"] == "edited") and "weights" in whole["counts"]
    assert public["counts"] == {key: whole["counts"][key] for key in ("parameters", "changed")}
    keys = ("name", "action", "parameters", "changed")
    assert public["tensors"] == [{key: tensor[key] for key in keys} for tensor in whole["tensors"]]
    perta("report", "public", "--html", "page.html")


def test_another_model_is_refused_untouched(perta, sides):
    unlearn(perta, "--one-way")
    said = perta("apply", "base", "p", "--out", "got", check=1).stderr
    assert "it is for another model, or one of the two is damaged" in said and "tensor " in said
    assert not (sides / "got").exists()


def test_what_it_cannot_do_is_said(perta, sides):
    unlearn(perta, "--one-way", "--out", "forgotten")
    before = folder_bytes(sides / "model")
    nothing = "p: a one-way patch, which does not hold the old values: "
    assert nothing + "it cannot be reverted" in perta("revert", "forgotten", "p", "--out", "m", check=2).stderr
    assert nothing + "an interrupted edit in place" in perta("apply", "model", "p", "--in-place", check=2).stderr
    assert nothing + "it cannot be composed" in perta("compose", "p", "p", "--patch", "pp", check=2).stderr
    assert nothing + "--applied can" in perta("verify", "model", "--patch", "p", "--original", check=2).stderr
    assert folder_bytes(sides / "model") == before


def test_a_damaged_one_is_refused(perta, sides):
    unlearn(perta, "--one-way")
    path = max((sides / "p").glob("*.perta"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    perta("verify", "p", check=1)
    assert path.name in perta("apply", "model", "p", "--out", "got", check=1).stderr
