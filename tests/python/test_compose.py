"""`compose` turns a chain of patches into the patch that `diff` makes between the two ends of
the chain."""

import hashlib
import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
from conftest import PERTA, part
from reference import BF16, CHUNK, bits, folder_bytes, narrow, shard_bytes, write_folder
from test_diff import check_with_zstd, random_bits, refusal, write_checkpoint
from test_limits import peak_mib, sanitized
from verbs import stop_at

MIB = 1 << 20


def weights(rng, n, dtype=BF16):
    return narrow(rng.standard_normal(n, "f4"), dtype)


def tuned(rng, x, scale=1e-3):
    """Change all weights a little, like training: large chunks are then grouped."""
    step = scale * rng.standard_normal(x.shape)
    return narrow((x.astype("f8") + step).astype("f8" if x.dtype == "f8" else "f4"), x.dtype)


def any_bits(rng, x):
    return random_bits(rng, "I32", x.size).view(x.dtype).reshape(x.shape)


def first_model(rng):
    return {
        "every.bf16": weights(rng, CHUNK + 17),
        "every.f16": weights(rng, 1003, np.dtype("f2")),
        "every.f32": weights(rng, (40, 50), np.dtype("f4")),
        "every.i32": rng.integers(-9, 9, 2000, "i4"),
        "every.any_bits": any_bits(rng, np.zeros(3000, "f4")),
        "first.bf16": weights(rng, 2 * CHUNK + 5),
        "second.f32": weights(rng, 777, np.dtype("f4")),
        "there_and_back": weights(rng, 300),
        "never": weights(rng, 300),
        "empty.bf16": weights(rng, (0, 4)),
        "empty.i8": np.zeros(0, "i1"),
        "third.f64": rng.standard_normal(50),
        "scalar": np.array(0.5, "f4"),
    }


def next_model(rng, before, start, step):
    """One step of the chain. The names of the tensors say which steps change them."""
    after = dict(before)
    for name, x in before.items():
        if name.startswith("every") and x.dtype == np.int32:
            after[name] = x + rng.integers(-2, 3, x.size, "i4")
        elif name == "every.any_bits":
            after[name] = any_bits(rng, x)
        elif name.startswith(("every", ("first", "second", "third")[step])):
            after[name] = tuned(rng, x)
        elif name == "there_and_back":
            after[name] = start[name] if step else tuned(rng, x)
    return after


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Models a, b, c, d, and the patches p1, p2, p3 from each to the next."""
    folder = tmp_path_factory.mktemp("chain")
    rng = np.random.default_rng(0)
    start = first_model(rng)
    model = start
    write_folder(folder / "a", model, shards=3)
    for step in range(3):
        model = next_model(rng, model, start, step)
        write_folder(folder / "bcd"[step], model, shards=3)
        run(folder, "diff", "abcd"[step], "bcd"[step], "--patch", f"p{step + 1}")
    return folder


def run(folder, *command):
    command = [str(PERTA), *map(str, command)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def perta_files(patch):
    return {path.name: path.read_bytes() for path in patch.glob("*.perta")}


def manifest(patch):
    return json.loads((patch / "manifest.json").read_text())


def check_ends(perta, a, z, patch):
    """The patch equals that of diff, and leads from a to z and back."""
    perta("diff", a, z, "--patch", "ends")
    ends = patch.parent / "ends"
    assert perta_files(patch) == perta_files(ends)
    got, want = manifest(patch), manifest(ends)
    for key in ("outputs", "counts", "encodings"):
        assert got[key] == want[key]
    for g, w in zip(got["tensors"], want["tensors"], strict=True):
        assert g == w | {"action": "composed"}
    perta("apply", a, patch, "--out", "applied")
    perta("revert", z, patch, "--out", "reverted")
    assert shard_bytes(patch.parent / "applied") == shard_bytes(z)
    assert shard_bytes(patch.parent / "reverted") == shard_bytes(a)
    perta("verify", patch)
    check_with_zstd(patch)


@pytest.mark.parametrize("last", [2, 3])
def test_a_chain_is_the_difference_of_its_ends(perta, chain, tmp_path, last):
    before = folder_bytes(chain)
    patches = [chain / f"p{i + 1}" for i in range(last)]
    perta("compose", *patches, "--model", chain / "a", "--patch", "all")
    assert folder_bytes(chain) == before
    check_ends(perta, chain / "a", chain / "abcd"[last], tmp_path / "all")
    encodings = manifest(tmp_path / "all")["encodings"]
    assert encodings["delta"]["chunks"] and encodings["zero"]["chunks"]


def test_the_record_names_what_was_composed(perta, chain, tmp_path):
    perta("compose", chain / "p1", chain / "p2", "--model", chain / "a", "--patch", "all")
    record = manifest(tmp_path / "all")
    assert record["recipe"]["command"] == "compose"
    for patch, listed in zip(("p1", "p2"), record["recipe"]["patches"], strict=True):
        data = (chain / patch / "manifest.json").read_bytes()
        assert listed["manifest"]["bytes"] == len(data)
        assert listed["manifest"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert listed["recipe"] == {"command": "diff"}
    assert record["inputs"]["before"] == manifest(chain / "p1")["inputs"]["before"]


def test_the_order_of_composing_does_not_matter(perta, chain, tmp_path):
    p1, p2, p3 = (chain / f"p{i}" for i in (1, 2, 3))
    perta("compose", p1, p2, p3, "--model", chain / "a", "--patch", "all")
    perta("compose", p1, p2, "--model", chain / "a", "--patch", "left")
    perta("compose", "left", p3, "--model", chain / "a", "--patch", "left.all")
    perta("compose", p2, p3, "--model", chain / "b", "--patch", "right")
    perta("compose", p1, "right", "--model", chain / "a", "--patch", "right.all")
    for patch in ("left.all", "right.all"):
        assert perta_files(tmp_path / patch) == perta_files(tmp_path / "all")


def test_results_do_not_depend_on_how_it_runs(perta, chain, tmp_path):
    command = ["compose", *(chain / f"p{i}" for i in (1, 2, 3)), "--model", chain / "a"]
    perta(*command, "--patch", "all")
    for flags in ("--io mmap --threads 1", "--io pread --threads 3 --memory 256M", "--io direct"):
        perta(*command, "--patch", "again", "--force", *flags.split())
        assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "all")


def test_headers_may_differ_in_metadata_and_order(perta, tmp_path):
    rng = np.random.default_rng(1)
    u = {name: random_bits(rng, "F16", 50) for name in "abcde"}
    for model, order in (("a", "abcde"), ("b", "cabed"), ("c", "edcba")):
        u = {name: u[name] + rng.integers(0, 3, 50, "u2") for name in order}
        write_checkpoint(tmp_path / model, "F16", u, 1, {"note": model * ord(model)})
    perta("diff", "a", "b", "--patch", "p1")
    perta("diff", "b", "c", "--patch", "p2")
    perta("compose", "p1", "p2", "--model", "a", "--patch", "all")
    check_ends(perta, tmp_path / "a", tmp_path / "c", tmp_path / "all")


def test_nothing_changed_is_composed_too(perta, tmp_path):
    write_checkpoint(tmp_path / "a", "BF16", {"w": np.arange(9, dtype="u2"), "e": np.zeros(0, "u2")})
    perta("diff", "a", "a", "--patch", "p")
    perta("compose", "p", "p", "p", "--patch", "all")
    check_ends(perta, tmp_path / "a", tmp_path / "a", tmp_path / "all")


# --- without the model


@pytest.fixture
def apart(perta, tmp_path):
    """Patches p1 and p2 that change the same chunks only in integers and F8, and different ones
    in BF16. Model d follows c, and changes BF16 chunks that p1 changed."""
    rng = np.random.default_rng(2)
    a = {"i": random_bits(rng, "I16", 3000), "x": random_bits(rng, "I16", CHUNK + 40)}
    b = {"i": a["i"] + rng.integers(0, 3, 3000, "u2"), "x": a["x"].copy()}
    b["x"][:500] += 1
    c = {"i": b["i"] + rng.integers(0, 3, 3000, "u2"), "x": b["x"].copy()}
    c["x"][CHUNK:] -= 1
    d = {"i": c["i"], "x": c["x"].copy()}
    d["x"][7] ^= 2
    for name, model in (("a", a), ("b", b), ("c", c), ("d", d)):
        write_mixed(tmp_path / name, model)
    for i, (old, new) in enumerate(("ab", "bc", "cd")):
        perta("diff", old, new, "--patch", f"p{i + 1}")
    return tmp_path


def write_mixed(folder, model):
    i, x = model["i"].view("i2"), model["x"].view(BF16)
    write_folder(folder, {"i": i, "f8": i.view("i1"), "x": x}, shards=2)


def test_chunks_that_one_patch_changes_need_no_model(perta, apart):
    perta("compose", "p1", "p2", "--patch", "all")
    check_ends(perta, apart / "a", apart / "c", apart / "all")
    perta("compose", "p1", "p2", "--model", "a", "--patch", "again")
    assert folder_bytes(apart / "again") == folder_bytes(apart / "all")


def test_floats_that_several_patches_change_need_the_model(perta, apart):
    there = sorted(apart.iterdir())
    for dry in ([], ["--dry-run"]):
        message = perta("compose", "p1", "p2", "p3", "--patch", "all", *dry, check=2).stderr
        assert "tensor x, elements 0 to 1048575" in message and "--model DIR" in message
    assert sorted(apart.iterdir()) == there
    perta("compose", "p1", "p2", "p3", "--model", "a", "--patch", "all")
    check_ends(perta, apart / "a", apart / "d", apart / "all")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BOOL", "I64", "U8"])
def test_what_is_never_grouped_adds_up_without_the_model(perta, tmp_path, dtype):
    rng = np.random.default_rng(3)
    for model in "abc":
        tensors = {name: random_bits(rng, dtype, 5000) for name in "xyz"}
        write_checkpoint(tmp_path / model, dtype, tensors)
    perta("diff", "a", "b", "--patch", "p1")
    perta("diff", "b", "c", "--patch", "p2")
    perta("compose", "p1", "p2", "--patch", "all")
    check_ends(perta, tmp_path / "a", tmp_path / "c", tmp_path / "all")


# --- what is refused


@pytest.mark.parametrize(
    "patches, tensor",
    [(("p2", "p1"), "tensor"), (("p1", "p3"), "tensor x, elements 1048576 to 1048615")],
)
def test_patches_that_do_not_follow_are_refused(perta, apart, patches, tensor):
    inputs = folder_bytes(apart)
    message = refusal(perta, apart, "compose", *patches, "--model", "a", "--patch", "all")
    assert f"{patches[1]}/model-" in message and f"does not follow {patches[0]}/model-" in message
    assert tensor in message and len(re.findall("[0-9a-f]{16}", message)) == 2
    assert folder_bytes(apart) == inputs


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shards": 1}, "shard 1 is model-00001-of-00001.safetensors, in the one before model-"),
        ({"tensors": {"first": 100, "third": 100}}, "tensor second is in one of them only"),
        ({"tensors": {"first": 100, "second": 90}}, "tensor second"),
        ({"tensors": {"second": 100, "first": 100}}, "tensor first"),
        ({"dtype": "F16"}, "differs in dtype or shape"),
        ({"metadata": {"a": "b"}}, "differ in order or metadata"),
    ],
)
def test_another_model_in_between_is_refused(perta, tmp_path, change, said):
    sizes = {"first": 100, "second": 100}

    def write(name, dtype="BF16", tensors=sizes, shards=2, metadata=None):
        u = {key: np.full(n, 7, "u2") for key, n in tensors.items()}
        write_checkpoint(tmp_path / name, dtype, u, shards, metadata)

    write("a")
    write("x", **change)
    perta("diff", "a", "a", "--patch", "p1")
    perta("diff", "x", "x", "--patch", "p2")
    message = refusal(perta, tmp_path, "compose", "p1", "p2", "--patch", "all")
    assert said in message and "p2" in message and "p1" in message


@pytest.mark.parametrize("model", ["b", "d"])
def test_the_wrong_model_is_refused(perta, apart, model):
    command = ["compose", "p1", "p2", "p3", "--model", model, "--patch", "all"]
    message = refusal(perta, apart, *command)
    assert f"{model}/model-" in message and "the patch p1/model-" in message
    assert ("is applied already" in message) == (model == "b")


def test_a_model_with_another_header_is_refused(perta, apart):
    write_checkpoint(apart / "e", "BF16", {"x": np.zeros(9, "u2"), "i": np.zeros(9, "u2")})
    command = ["compose", "p1", "p2", "p3", "--model", "e", "--patch", "all"]
    assert "is for another model" in refusal(perta, apart, *command)


@pytest.mark.parametrize("where", ["frame that is kept", "frame that is added", "manifest"])
def test_a_damaged_patch_is_refused(perta, apart, where):
    number = {"frame that is kept": 2, "frame that is added": 1, "manifest": 0}[where]
    if number:
        path = apart / f"p1/model-0000{number}-of-00002.safetensors.perta"
        data = bytearray(path.read_bytes())
        data[data.index(b"\x28\xb5\x2f\xfd") + 40] ^= 4
    else:
        path = apart / "p2/manifest.json"
        data = path.read_bytes().replace(b'"model": [', b'"other": [')
    path.write_bytes(data)
    assert path.parent.name in refusal(perta, apart, "compose", "p1", "p2", "--patch", "all")


@pytest.mark.parametrize(
    "command, status, said",
    [
        ("p1 --patch all", 2, "at least two patches"),
        ("p1 p2", 2, "--patch DIR is needed"),
        ("p1 a --patch all", 3, "is it a patch folder?"),
        ("p1 p2 --patch p2 --force", 2, "the input p2"),
        ("p1 p2 --model a --patch a/x", 2, "the input a"),
        ("p1 p2 --model nothing --patch all", 3, "no such file or folder"),
        ("p1 p2 --patch all --memory 1M", 2, "too small for this job"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(perta, apart, command, status, said):
    inputs = folder_bytes(apart)
    result = perta("compose", *command.split(), check=status)
    assert said in result.stderr and folder_bytes(apart) == inputs


# --- the output


def test_force_replaces_and_nothing_else_does(perta, apart):
    perta("compose", "p1", "p2", "--patch", "all")
    whole = folder_bytes(apart / "all")
    assert "--force" in perta("compose", "p2", "p3", "--patch", "all", check=2).stderr
    assert folder_bytes(apart / "all") == whole
    perta("compose", "p2", "p3", "--patch", "all", "--force", "--model", "b")
    check_ends(perta, apart / "b", apart / "d", apart / "all")


def test_a_failed_run_with_force_leaves_what_was_there(perta, apart):
    perta("compose", "p1", "p2", "--patch", "all")
    inputs = folder_bytes(apart)
    perta(*"compose p1 p2 p3 --model b --patch all --force".split(), check=1)
    assert folder_bytes(apart) == inputs


def test_a_dry_run_checks_the_chain_and_writes_nothing(perta, apart):
    inputs = folder_bytes(apart)
    said = perta("compose", "p1", "p2", "--patch", "all", "--dry-run").stdout
    assert "nothing was written" in said
    perta("compose", "p1", "p3", "--patch", "all", "--dry-run", check=1)
    assert folder_bytes(apart) == inputs


def test_json_is_one_object_and_quiet_is_silent(perta, apart):
    summary = json.loads(perta("compose", "p1", "p2", "--patch", "all", "--json").stdout)
    assert summary["kept"] == 2 and summary["summed"] == 2
    assert summary["counts"] == manifest(apart / "all")["counts"]
    quiet = perta("compose", "p1", "p2", "--patch", "all", "--force", "--quiet")
    assert not quiet.stdout and not quiet.stderr


def test_patches_of_unlearn_compose(perta, tmp_path):
    """Unlearn twice, then revert both at once; the record holds both recipes."""
    rng = np.random.default_rng(4)
    for folder in ("a", "tuned", "base"):
        tensors = {f"layer.{i}": weights(rng, (40, 5)) for i in range(5)}
        write_folder(tmp_path / folder, tensors, shards=2)
    flags = "--method tv --tuned tuned --base base".split()
    perta("unlearn", "--model", "a", *flags, "--alpha", "0.5", "--patch", "p1", "--out", "b")
    perta("unlearn", "--model", "b", *flags, "--alpha", "0.25", "--patch", "p2", "--out", "c")
    perta("compose", "p1", "p2", "--model", "a", "--patch", "all")
    check_ends(perta, tmp_path / "a", tmp_path / "c", tmp_path / "all")
    record = manifest(tmp_path / "all")
    assert record["inputs"]["before"] == manifest(tmp_path / "p1")["inputs"]["model"]
    recipes = [patch["recipe"] for patch in record["recipe"]["patches"]]
    assert recipes == [manifest(tmp_path / p)["recipe"] for p in ("p1", "p2")]


# --- limits


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Models of 96 MiB, all of which both patches change."""
    folder = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(5)
    x = bits(weights(rng, 12 * MIB))
    for model in "abc":
        x = x + rng.integers(0, 3, x.size, "u2")
        write_folder(folder / model, {f"layer.{i}": x.view(BF16) for i in range(4)}, shards=2)
    run(folder, "diff", "a", "b", "--patch", "p1")
    run(folder, "diff", "b", "c", "--patch", "p2")
    return folder


@sanitized
@pytest.mark.parametrize("io", ["direct", "pread"])
def test_memory_bounds_the_whole_process(big, tmp_path, io):
    """Mapped files count as page cache, so that way of reading is left out."""
    patches = [str(big / name) for name in ("p1", "p2")]
    command = ["compose", *patches, "--model", str(big / "a"), "--patch", "p"]
    command += ["--memory", "128M", "--threads", "2", "--io", io]
    assert peak_mib(command, tmp_path) <= 128


@pytest.mark.parametrize("number", part([signal.SIGINT, signal.SIGTERM], sanitized=1))
def test_an_interrupted_run_leaves_nothing(big, tmp_path, number):
    inputs = [big / "p1", big / "p2", "--model", big / "a"]
    command = ["compose", *inputs, "--patch", tmp_path / "p", "--threads", "1"]
    status, message = stop_at(tmp_path, command, "write", 1, number, env=os.environ)
    assert status == 130 and "interrupted" in message
    assert not list(tmp_path.iterdir())
