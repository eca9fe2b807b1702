"""Files that violate their format or are malicious: refused with file, tensor and byte and exit
status 3 (1 for a damaged patch); nothing is written."""

import json
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
import xxhash
from conftest import PERTA, part
from reference import INDEX, folder_bytes, write_folder

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**changes):
    return file_of({"a": F32 | changes})


def two(first, second, size):
    return file_of(
        {
            "a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
            "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        },
        b"\0" * size,
    )


BIG = 1 << 62
BAD_FILES = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header too long": (struct.pack("<Q", 100_000_001) + b"{}" * 9, "at most 100000000"),
    "header all ones": (b"\xff" * 64, "at most 100000000"),
    "header past the end": (struct.pack("<Q", 99) + b"{}", "beyond the file's end at byte 10"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", 'git lfs pull"'),
    "no json": (file_of(b"{]", b""), "not valid JSON"),
    "json cut short": (file_of(b'{"a":', b""), "not valid JSON"),
    "something after the json": (file_of(b"{} x", b""), "not valid JSON"),
    "an array": (file_of(b"[]", b""), "not a JSON object"),
    "invalid utf-8": (file_of(b'{"\xff": 1}', b""), "not valid JSON"),
    "NUL in a name": (file_of(b'{"a\\u0000b": 1}', b""), "not valid JSON"),
    "key twice": (file_of(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)), "not valid"),
    "key twice, once escaped": (
        file_of(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(F32).encode(),) * 2)),
        "not valid",
    ),
    "inner key twice": (file_of(b'{"a":{"dtype":"U8","dtype":"U8"}}', b""), "not valid"),
    "entry is an array": (file_of({"a": ["F32", [2], [0, 8]]}), "tensor a: its entry is not"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}), 'no string "dtype"'),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), 'no array "shape"'),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), '"data_offsets"'),
    "unknown dtype": (tensor(dtype="F31"), 'tensor a: unknown dtype "F31"'),
    "dtype is a number": (tensor(dtype=32), 'no string "dtype"'),
    "negative dimension": (tensor(shape=[-2]), "dimension 0"),
    "half a dimension": (tensor(shape=[2.5]), "dimension 0"),
    "shape is a number": (tensor(shape=2), 'no array "shape"'),
    "product overflows": (tensor(shape=[BIG, BIG]), "product overflows"),
    "product overflows beside a zero": (tensor(shape=[BIG, BIG, 0]), "product overflows"),
    "size in bits overflows": (tensor(shape=[BIG]), "overflows"),
    "three offsets": (tensor(data_offsets=[0, 4, 8]), "not [BEGIN, END]"),
    "offsets reversed": (tensor(data_offsets=[8, 0]), "not [BEGIN, END]"),
    "offset negative": (tensor(data_offsets=[-8, 0]), "not [BEGIN, END]"),
    "offset beyond the end": (tensor(data_offsets=[0, 16]), "tensor a ends at byte"),
    "offset enormous": (tensor(data_offsets=[0, (1 << 63) - 1]), "tensor a ends at byte"),
    "too small for its shape": (tensor(shape=[3]), "dtype F32 and shape take 12"),
    "too large for its shape": (tensor(shape=[1]), "dtype F32 and shape take 4"),
    "half a byte": (tensor(dtype="F4", shape=[15]), "not a whole number of bytes"),
    "hole at the start": (two((4, 8), (8, 12), 12), "a hole of 4 bytes before tensor a"),
    "hole between": (two((0, 4), (8, 12), 12), "a hole of 4 bytes before tensor b"),
    "overlap": (two((0, 8), (4, 12), 12), "tensor b overlaps tensor a"),
    "the same range twice": (two((0, 8), (0, 8), 8), "overlaps tensor a"),
    "bytes after the last": (file_of({"a": F32}, b"\0" * 9), "1 bytes after the last tensor"),
    "metadata is an array": (file_of({"__metadata__": [], "a": F32}), '"__metadata__"'),
    "metadata of numbers": (file_of({"__metadata__": {"x": 1}, "a": F32}), 'value of "x"'),
    "nested too deep": (file_of(b'{"a":' + b"[" * 5000, b""), "not valid JSON"),
}


@pytest.mark.parametrize("data, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_breaks_the_format_is_refused(perta, tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refusal = perta("inspect", path, check=3).stderr
    assert message in refusal and str(path) in refusal
    assert len(refusal.splitlines()) == 1
    assert path.read_bytes() == data


GOOD_FILES = {
    "unknown inner key": file_of({"a": F32 | {"more": [1]}}),
    "white space before": file_of(b"  " + json.dumps({"a": F32}).encode()),
    "metadata is null": file_of({"__metadata__": None, "a": F32}),
    "data at an odd place": file_of(json.dumps({"a": F32}).encode() + b" " * 3),
    "no tensors": file_of({}, b""),
    "empty tensor": file_of({"a": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}}, b""),
    "scalar": file_of({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}),
    "half bytes, whole": file_of({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
}


@pytest.mark.parametrize("data", GOOD_FILES.values(), ids=GOOD_FILES.keys())
def test_what_the_format_allows_is_read(perta, tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    perta("inspect", "model.safetensors")
    perta("diff", ".", ".", "--patch", "../p-" + tmp_path.name)
    perta("verify", "../p-" + tmp_path.name)


# --- checkpoint folders


def folder(path, change=lambda folder, index: None):
    tensors = {name: np.arange(4, dtype=np.float32) for name in "abcd"}
    write_folder(path, tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    change(path, index)
    (path / INDEX).write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def replace(name, make):
    def change(path, index):
        (path / name).unlink()
        make(path / name)

    return change


def mapped(**names):
    return lambda path, index: index["weight_map"].update(names)


BAD_FOLDERS = {
    "shard is missing": (replace(FIRST, lambda p: None), FIRST),
    "shard is a folder": (replace(FIRST, lambda p: p.mkdir()), "a folder, where"),
    "shard is a FIFO": (replace(FIRST, os.mkfifo), "not a regular file"),
    "shard is a link out": (replace(FIRST, lambda p: p.symlink_to("/etc/passwd")), FIRST),
    "shard is a dangling link": (replace(FIRST, lambda p: p.symlink_to("nowhere")), FIRST),
    "index climbs out": (mapped(a="../x.safetensors"), "../x.safetensors"),
    "index is absolute": (mapped(a="/etc/passwd"), "/etc/passwd"),
    "index goes below": (mapped(a="sub/x.safetensors"), "sub/x.safetensors"),
    "index names the folder": (mapped(a=".."), ".."),
    "index names the folder itself": (mapped(a="."), "not a plain file name"),
    "index names nothing": (mapped(a=""), "not a plain file name"),
    "index names a hidden file": (mapped(a=".safetensors"), "not a plain file name"),
    "index with a line break": (mapped(a="x\n.safetensors"), "x?.safetensors"),
    "index with a terminal command": (mapped(a="x\x1b[2J.safetensors"), "x?[2J.safetensors"),
    "index with another": (mapped(a="x\x9b2J.safetensors"), "not a plain file name"),
    "index with an enormous name": (mapped(a="x" * 250 + ".safetensors"), "not a plain file name"),
    "index with a backslash climbs": (mapped(a="..\\x.safetensors"), "not a plain file name"),
    "index is a link out": (replace(INDEX, lambda p: p.symlink_to("/etc/passwd")), "outside its"),
    "config is a link out": (lambda p, i: (p / "config.json").symlink_to("/etc/passwd"), "config"),
    "tensor in another shard": (mapped(a=SECOND), "a"),
    "tensor that no shard has": (mapped(z=FIRST), "z"),
    "tensor not in the index": (lambda p, i: i["weight_map"].pop("a"), "a"),
    "shard is a number": (mapped(a=7), "a"),
    "no map": (lambda p, i: i.pop("weight_map"), "weight_map"),
    "map is an array": (lambda p, i: i.update(weight_map=[]), "weight_map"),
}


@pytest.mark.parametrize("change, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_folder_that_does_not_hold_together_is_refused(perta, tmp_path, change, message):
    folder(tmp_path / "model", change)
    refusal = perta("inspect", "model", check=3).stderr
    assert message in refusal and "model" in refusal


@pytest.mark.parametrize(
    "name", [b"\xff.safetensors", b"a\nb.safetensors", b"\xc2\x9b2J.safetensors", b"x" * 240 + b".safetensors"]
)
def test_a_file_with_a_name_that_cannot_be_told_is_refused(perta, tmp_path, name):
    (tmp_path / "m").mkdir()
    with open(os.path.join(os.fsencode(tmp_path / "m"), name), "wb") as file:
        file.write(file_of({"a": F32}))
    assert "rename it" in perta("inspect", "m", check=3).stderr
    if len(name) < 200:
        assert "cannot name it" in perta("manifest", "m", check=3).stderr


def test_what_a_terminal_would_obey_is_not_printed(perta, tmp_path):
    name = "a\x1b]0;owned\x07\x9b2J\x7f"
    (tmp_path / "m.safetensors").write_bytes(file_of({name: F32, "__metadata__": {name: name}}))
    (tmp_path / "bad.safetensors").write_bytes(file_of({name + "\nb": {}}, b""))
    shown = perta("inspect", "--tensors", "m.safetensors").stdout
    refused = perta("inspect", "bad.safetensors", check=3).stderr
    for text in shown, refused:
        assert "a?]0;owned" in text and not set(text) & set("\x1b\x07\x9b\x7f")
    assert len(refused.splitlines()) == 1
    forged = file_of({"x\n  F32  [1] forged": F32, "__metadata__": {"k": "v\nforged: 1"}})
    (tmp_path / "lines.safetensors").write_bytes(forged)
    told = perta("inspect", "--tensors", "lines.safetensors").stdout.splitlines()
    assert any("x?  F32  [1] forged" in line for line in told)
    assert not [line for line in told if line.strip().startswith(("F32  [1] forged", "forged"))]
    assert name in json.loads(perta("inspect", "--json", "m.safetensors").stdout)["tensors"][0]["name"]


def test_what_a_link_leads_to_does_not_go_into_the_output(perta, tmp_path):
    """Nor are folders; both are named."""
    (tmp_path / "secret").write_text("private key")
    for name in "ab":
        write_folder(tmp_path / name, {"x": np.arange(4, dtype=np.float32)})
        (tmp_path / name / "tokenizer.json").symlink_to("../secret")
        (tmp_path / name / "inside").write_text("inside")
        (tmp_path / name / "vocab.json").symlink_to("inside")
        (tmp_path / name / "onnx").mkdir()
        (tmp_path / name / ".cache").mkdir()
    perta("diff", "a", "b", "--patch", "p")
    assert "left behind" in perta("apply", "a", "p", "--out", "out").stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "inside", "model.safetensors", "vocab.json",
    ]
    result = json.loads(perta("apply", "a", "p", "--out", "o", "--json").stdout)
    assert sorted(result["left_behind"]) == ["onnx/", "tokenizer.json"]


@pytest.mark.parametrize(
    "verb, status",
    [("inspect m", 0), ("verify m", 2), ("verify m --manifest m/manifest.json", 3), ("apply m m --out o", 3)],
)
def test_a_fifo_in_place_of_a_record_does_not_hang(perta, tmp_path, verb, status):
    write_folder(tmp_path / "m", {"x": np.arange(4, dtype=np.float32)})
    os.mkfifo(tmp_path / "m/manifest.json")
    perta(*verb.split(), check=status)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map": {"a": 1, "a": 2}}'])
def test_an_index_that_is_no_index_is_refused(perta, tmp_path, text):
    folder(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(text)
    assert INDEX in perta("inspect", "model", check=3).stderr


@pytest.mark.parametrize("path", ["nowhere", "empty", "/dev/null", "/proc/self/mem"])
def test_what_is_no_checkpoint_is_refused(perta, tmp_path, path):
    (tmp_path / "empty").mkdir()
    assert path in perta("inspect", path, check=3).stderr


# --- patches


@pytest.fixture
def patched(perta, tmp_path):
    """Folders a and b, and the patch p from one to the other."""
    rng = np.random.default_rng(3)
    before = {name: rng.standard_normal(300).astype(np.float32) for name in "xyz"}
    after = {name: array * np.float32(1.001) for name, array in before.items()}
    write_folder(tmp_path / "a", before)
    write_folder(tmp_path / "b", after)
    perta("diff", "a", "b", "--patch", "p")
    return tmp_path


SHARD = "model.safetensors.perta"


def test_every_flipped_byte_of_a_patch_is_found_and_none_yields_another_model(perta, patched):
    path = patched / "p" / SHARD
    good, wanted = path.read_bytes(), folder_bytes(patched / "b")
    ends = [*range(60), *range(len(good) - 200, len(good))]
    places = part(sorted({*ends, *range(0, len(good), max(1, len(good) // 60))}), 160, 60)
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 0x41
        path.write_bytes(bad)
        assert perta("verify", "p", check=None).returncode in (1, 3), at
        result = perta("apply", "a", "p", "--out", "out", "--force", check=None)
        assert result.returncode in (0, 1, 3), at
        if result.returncode == 0:  # for example in a frame's checksum, which apply does not need
            assert folder_bytes(patched / "out") == wanted, at
        assert not list(patched.glob("*partial")), at


def test_a_patch_cut_short_is_refused(perta, patched):
    path = patched / "p" / SHARD
    good = path.read_bytes()
    for n in [0, 1, 55, 56, 100, len(good) // 2, len(good) - 25, len(good) - 1]:
        path.write_bytes(good[:n])
        assert SHARD in perta("verify", "p", check=1).stdout
        assert perta("apply", "a", "p", "--out", "out", check=None).returncode in (1, 3)
        assert not (patched / "out").exists()


@pytest.mark.parametrize(
    "change, status, message",
    [
        (lambda m: m.update(format="zip"), 3, "not the manifest of a perta patch"),
        (lambda m: m.update(version=2), 3, "patch format 2"),
        (lambda m: m["outputs"]["patch"][0].update(name="../x.perta"), 3, "../x.perta"),
        (lambda m: m["outputs"]["patch"][0].update(name="/x.perta"), 3, "/x.perta"),
        (lambda m: m["outputs"]["patch"][0].update(name="model.zip"), 3, "model.zip"),
        (lambda m: m["outputs"]["patch"][0].update(name=""), 3, "not the name of a patch file"),
        (lambda m: m["outputs"]["patch"][0].update(name="."), 3, "not the name of a patch file"),
        (lambda m: m["outputs"]["patch"][0].update(name="..perta"), 3, "plain file name"),
        (lambda m: m["outputs"]["patch"][0].update(name="...perta"), 3, "plain file name"),
        (lambda m: m["outputs"]["patch"][0].update(name="a\nb.perta"), 3, "a?b.perta"),
        (lambda m: m["outputs"]["patch"][0].update(name="x" * 250 + ".perta"), 3, "plain file"),
        (lambda m: m["outputs"]["patch"][0].update(name="no.perta"), 1, "missing"),
        (lambda m: m["outputs"]["patch"][0].pop("name"), 3, "outputs.patch[0]"),
        (lambda m: m["outputs"].update(patch=[]), 3, "outputs.patch names no file"),
        (lambda m: m["outputs"].pop("patch"), 3, "outputs.patch names no file"),
        (lambda m: m.pop("outputs"), 3, "outputs.patch names no file"),
        (lambda m: m["outputs"].update(patch=m["outputs"]["patch"] * 2), 3, "not sorted"),
        (lambda m: m["outputs"]["model"][0].update(sha256="0" * 64), 1, "SHA-256"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(perta, patched, change, status, message):
    path = patched / "p/manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    assert message in perta("apply", "a", "p", "--out", "out", check=status).stderr
    assert not (patched / "out").exists()
    if "no file" in message:  # having nothing to check is not success
        assert message in perta("verify", "p", check=3).stderr


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 1}'])
def test_a_record_that_is_none_is_refused(perta, patched, text):
    (patched / "p/manifest.json").write_text(text)
    assert "manifest.json" in perta("apply", "a", "p", "--out", "out", check=3).stderr


def test_a_manifest_that_names_no_file_verifies_none(perta, patched):
    manifest = patched / "m.json"
    record = json.loads(perta("manifest", "a").stdout)
    manifest.write_text(json.dumps(record))
    perta("verify", "a", "--manifest", "m.json")
    for file in {}, {"name": 1}, 7:
        manifest.write_text(json.dumps(record | {"files": record["files"] + [file]}))
        assert "has no name" in perta("verify", "a", "--manifest", "m.json", check=3).stderr


def test_a_patch_shard_that_is_a_link_out_is_refused(perta, patched):
    (patched / "p" / SHARD).rename(patched / "elsewhere")
    (patched / "p" / SHARD).symlink_to("../elsewhere")
    assert "outside its folder" in perta("apply", "a", "p", "--out", "out", check=3).stderr
    assert "outside its folder" in perta("verify", "p", check=1).stdout


def add_shard(patch, name):
    path = patch / "manifest.json"
    record = json.loads(path.read_text())
    record["outputs"]["patch"].append({"name": name})
    path.write_text(json.dumps(record))
    (patch / name).write_bytes((patch / SHARD).read_bytes())


def test_a_shard_too_many_is_refused_whatever_its_name(perta, patched):
    """A model with too few shards used to be reported as having a shard "none", which a patch
    may contain."""
    shutil.copytree(patched / "p", patched / "q")
    perta("diff", "b", "a", "--patch", "back")
    add_shard(patched / "q", "none.perta")
    assert "another model" in perta("apply", "a", "q", "--out", "out", check=1).stderr
    for chain in ("q", "back"), ("back", "q"):
        said = perta("compose", *chain, "--patch", "sum", check=1).stderr
        assert "does not follow" in said and "none" in said


def test_damage_with_a_message_that_is_cut_within_a_character_is_reported(perta, patched):
    """verify used to report such a patch as whole, because half a character is not JSON."""
    path = patched / "p" / SHARD
    for pad in range(3):
        header = file_of({"x" * pad + "€" * 500: {}}, b"")
        head = b"PERTA\r\n\x1a" + struct.pack("<IIQQQQ", 1, 0, len(header), 0, len(header), len(header))
        content = head + header
        content += struct.pack("<Q", xxhash.xxh3_64_intdigest(content))
        path.write_bytes(struct.pack("<II", 0x184D2A50, len(content)) + content)
        assert SHARD in perta("verify", "p", check=1).stdout
    path.unlink()
    os.mkdir(os.fsencode(patched) + b"/\xff")
    odd = os.fsencode(patched) + b"/\xff/p"
    shutil.copytree(os.fsencode(patched / "p"), odd)
    result = subprocess.run([PERTA, b"verify", odd], capture_output=True)
    assert result.returncode == 1 and SHARD.encode() in result.stdout


def test_a_foreign_file_named_perta_is_refused(perta, patched):
    (patched / "p" / SHARD).write_bytes((patched / "a/model.safetensors").read_bytes())
    assert "not a perta patch" in perta("apply", "a", "p", "--out", "out", check=3).stderr


# --- arguments


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "Usage"),
        ("unlern", "unknown verb unlern"),
        ("unlearn", "--model DIR, --tuned DIR and --patch DIR are needed"),
        ("unlearn --steps 2 --model m --tuned . --patch p", "--base DIR, "),
        ("unlearn --model a --tuned a --base a --forget a --retain a", "--patch DIR is needed"),
        ("unlearn --model a --tuned a --base a --patch p", "needs --forget and --retain"),
        ("unlearn --alpha none", "--alpha"),
        ("unlearn --alpha 1,1", "twice"),
        ("unlearn --alpha 0x10", "decimal"),
        ("unlearn --alpha 1e39", "float32"),
        ("unlearn --alpha nan", "--alpha"),
        ("unlearn --alpha ,", "--alpha"),
        ("unlearn --method best", "--method"),
        ("unlearn --method power", ""),
        ("unlearn --memory 3X", "--memory"),
        ("unlearn --memory 99999999999999G", "--memory"),
        ("unlearn --threads 0.5", "--threads"),
        ("unlearn --threads 4294967297", "--threads"),
        ("unlearn --io floppy", "--io"),
        ("unlearn --unheard-of", "unrecognized"),
        ("diff a", ""),
        ("diff a b", "--patch"),
        ("apply a", ""),
        ("apply a b", "--out"),
        ("accumulate --out x", "gradients"),
        ("accumulate a", "--out"),
        ("estimate", "needed"),
        ("verify", "PATH is missing: what should be verified?"),
        ("verify a --applied", "--patch"),
        ("manifest", ""),
        ("manifest a --format md5", "--format"),
        ("inspect", ""),
    ],
)
def test_arguments_that_make_no_sense_are_usage_errors(perta, words, message):
    result = perta(*words.split(), check=2)
    assert message in result.stderr and not result.stdout
