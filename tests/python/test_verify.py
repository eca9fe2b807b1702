"""`perta verify` lists everything that is damaged, not only the first: every chunk with tensor
and elements, every file, as text and as JSON."""

import hashlib
import json
import re

import numpy as np
import pytest
from reference import CHUNK
from test_diff import write_checkpoint

SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
LARGE = 2 * CHUNK + 9  # three chunks


@pytest.fixture
def patched(perta, tmp_path):
    """Three shards of two tensors; the patch p from a to b changes every chunk of them."""
    rng = np.random.default_rng(6)
    names = ("a.large", "b.large", "c.large", "a.small", "b.small", "c.small")
    sizes = {name: LARGE if "large" in name else 500 for name in names}
    before = {name: rng.integers(0, 256, n, np.uint8) for name, n in sizes.items()}
    after = {name: u + rng.integers(1, 4, u.size, np.uint8) for name, u in before.items()}
    write_checkpoint(tmp_path / "a", "U8", before, shards=3)
    write_checkpoint(tmp_path / "b", "U8", after, shards=3)
    perta("diff", "a", "b", "--patch", "p")
    return tmp_path


def flip(path, *places):
    data = bytearray(path.read_bytes())
    for at in places:
        data[at] ^= 0x10
    path.write_bytes(data)


def data_at(path, tensor):
    """The offset of a tensor's bytes in the file."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return 8 + n + json.loads(data[8 : 8 + n])[tensor]["data_offsets"][0]


def verify(perta, *words, status=1):
    """The listed differences from the JSON output, which the text output must equal; and the
    last message."""
    summary = json.loads(perta("verify", *words, "--json", check=status).stdout)
    text = perta("verify", *words, check=status)
    items = summary.get("differences", summary.get("damaged"))
    assert summary["ok"] == (status == 0)
    if status:
        assert len(text.stdout.splitlines()) == len(items)
        assert f"{len(items)} differences" in text.stderr
    lines = text.stdout.splitlines() if status else []
    for line, item in zip(lines, items, strict=True):
        assert item.get("file", item.get("shard")) in line
        assert item.get("what", item.get("message")) in line
        if item.get("tensor"):
            last = item["first"] + item["elements"] - 1
            assert item["tensor"] in line and f"elements {item['first']} to {last}" in line
    return items


def ranges(items, file="shard"):
    return [(i[file], i["tensor"], i["first"], i["elements"]) for i in items if i.get("tensor")]


# --- a model against a patch


@pytest.mark.parametrize("io", ["mmap", "direct", "pread"])
@pytest.mark.parametrize("model, side", [("a", "--original"), ("b", "--applied")])
def test_every_damaged_chunk_of_a_model_is_listed(perta, patched, model, side, io):
    against = [model, "--patch", "p", side, "--io", io]
    assert verify(perta, *against, status=0) == []
    for shard, tensor, places in [
        (SHARDS[0], "a.large", [0, 5, CHUNK - 1, 2 * CHUNK + 8]),
        (SHARDS[0], "a.small", [499]),
        (SHARDS[2], "c.large", [CHUNK, 2 * CHUNK - 1]),
    ]:
        path = patched / model / shard
        flip(path, *(data_at(path, tensor) + at for at in places))
    assert ranges(verify(perta, *against)) == [
        (SHARDS[0], "a.large", 0, CHUNK),
        (SHARDS[0], "a.large", 2 * CHUNK, 9),
        (SHARDS[0], "a.small", 0, 500),
        (SHARDS[2], "c.large", CHUNK, CHUNK),
    ]


def test_a_damaged_header_hides_no_damaged_chunk(perta, patched):
    first, third = patched / "a" / SHARDS[0], patched / "a" / SHARDS[2]
    flip(third, data_at(third, "c.small") + 3)
    flip(first, data_at(first, "a.large") + CHUNK)
    flip(first, 8)  # the opening brace of the header
    items = verify(perta, "a", "--patch", "p", "--original")
    assert "header digest" in items[0]["message"] and items[0]["shard"] == SHARDS[0]
    assert ranges(items) == [
        (SHARDS[0], "a.large", CHUNK, CHUNK),
        (SHARDS[2], "c.small", 0, 500),
    ]


def test_files_that_are_missing_or_cut_short_do_not_end_the_check(perta, patched):
    (patched / "a" / SHARDS[0]).unlink()
    second, third = patched / "a" / SHARDS[1], patched / "a" / SHARDS[2]
    at = data_at(second, "b.large")
    second.write_bytes(second.read_bytes()[: at + CHUNK + 1])
    flip(third, data_at(third, "c.large"))
    items = verify(perta, "a", "--patch", "p", "--original")
    assert "missing" in items[0]["message"]
    assert f"{at + CHUNK + 1} bytes" in items[1]["message"]
    assert ranges(items) == [
        (SHARDS[1], "b.large", CHUNK, CHUNK),
        (SHARDS[1], "b.large", 2 * CHUNK, 9),
        (SHARDS[1], "b.small", 0, 500),
        (SHARDS[2], "c.large", 0, CHUNK),
    ]
    assert all("beyond the end" in item["message"] for item in items[2:5])


def test_the_other_side_and_another_model_are_told_apart(perta, patched):
    items = verify(perta, "a", "--patch", "p", "--applied")
    assert len(items) == 12
    assert all("here the patch is not applied" in item["message"] for item in items)
    items = verify(perta, "b", "--patch", "p", "--original")
    assert all("here the patch is applied already" in item["message"] for item in items)
    write_checkpoint(patched / "c", "U8", {"x": np.zeros(7, np.uint8)}, shards=1)
    items = verify(perta, "c", "--patch", "p", "--original")
    assert {item["shard"] for item in items} == {*SHARDS, "model-00001-of-00001.safetensors"}
    assert "nowhere" in perta(*"verify nowhere --patch p --applied".split(), check=3).stderr


def test_headers_that_the_patch_changes(perta, tmp_path):
    """In another order and with other metadata, so that the offsets before and after differ."""
    rng = np.random.default_rng(7)
    before = {name: rng.integers(0, 256, 99, np.uint8) for name in "abc"}
    write_checkpoint(tmp_path / "a", "U8", before, 1, {"format": "pt"})
    after = {name: before[name] + np.uint8(1) for name in "cab"}
    write_checkpoint(tmp_path / "b", "U8", after, 1, {"format": "pt", "note": "longer"})
    perta("diff", "a", "b", "--patch", "p")
    for model, side in (("a", "--original"), ("b", "--applied")):
        assert verify(perta, model, "--patch", "p", side, status=0) == []
        path = tmp_path / model / "model-00001-of-00001.safetensors"
        verify(perta, path, "--patch", "p", side, status=0)
        flip(path, data_at(path, "b") + 7)
        assert ranges(verify(perta, model, "--patch", "p", side)) == [(path.name, "b", 0, 99)]
    for model, side in (("a", "--applied"), ("b", "--original")):
        assert len(verify(perta, model, "--patch", "p", side)) == 2  # header and length


def test_an_index_that_does_not_fit_is_still_an_error(perta, patched):
    index = patched / "a/model.safetensors.index.json"
    index.write_text(index.read_text().replace('"a.small"', '"d.small"'))
    assert "d.small" in perta(*"verify a --patch p --original".split(), check=3).stderr


# --- a patch by itself


def frames(perta, path, model):
    """For each frame: tensor, first element, number of elements, offset in the file."""
    head = int.from_bytes(path.read_bytes()[4:8], "little") + 8
    data, out, at = path.read_bytes(), [], head
    table = int.from_bytes(data[-24:-16], "little") * 48
    entries = np.frombuffer(data[-24 - table : -24], "<u4").reshape(-1, 12)
    names = ["large", "small"]
    first = {}
    for entry in entries:
        tensor = f"{model}.{names[entry[4]]}"
        out.append((tensor, first.get(tensor, 0), int(entry[5]), at))
        first[tensor] = first.get(tensor, 0) + int(entry[5])
        at += int(entry[2])
    return out


def test_every_damaged_frame_of_a_patch_is_listed(perta, patched):
    assert verify(perta, "p", status=0) == []
    want = []
    for shard, model, damaged in [(SHARDS[0], "a", (0, 2, 3)), (SHARDS[2], "c", (1, 2))]:
        path = patched / "p" / f"{shard}.perta"
        for i in damaged:
            tensor, first, n, at = frames(perta, path, model)[i]
            want.append((path.name, tensor, first, n))
            flip(path, at + 12)
    items = verify(perta, "p")
    assert ranges(items, "file") == want
    assert [i["file"] for i in items if "SHA-256" in i["what"]] == [w[0] for w in (want[0], want[3])]


def test_damaged_heads_and_tables_hide_no_damaged_frame(perta, patched):
    """A digest that differs is reported, and frames are then read where the table says."""
    first, second, third = (patched / "p" / f"{shard}.perta" for shard in SHARDS)
    tensor, start, n, at = frames(perta, first, "a")[1]
    flip(first, first.stat().st_size - 24 - 16, at + 12)  # the digest of a chunk in the table
    flip(second, 200)  # in the header before
    flip(third, frames(perta, third, "c")[3][3] + 12)
    items = verify(perta, "p")
    assert ranges(items, "file") == [
        (first.name, tensor, start, n),
        (third.name, "c.small", 0, 500),
    ]
    text = {path: [i["what"] for i in items if i["file"] == path.name] for path in (first, second)}
    assert re.search("byte .*: the digest of its table differs", text[first][0])
    assert re.search("byte 8: .*digest of its head differs", text[second][0])


def test_files_that_cannot_be_read_at_all_do_not_end_the_check(perta, patched):
    first, second, third = (patched / "p" / f"{shard}.perta" for shard in SHARDS)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    flip(third, frames(perta, third, "c")[0][3] + 12)
    items = verify(perta, "p")
    assert [i["file"] for i in items] == [first.name, second.name, third.name, third.name]
    assert "missing" in items[0]["what"] and "cut short" in items[1]["what"]
    assert ranges(items, "file") == [(third.name, "c.large", 0, CHUNK)]


def record_digest(patch, path):
    """Correct what the record says about the file."""
    manifest = patch / "manifest.json"
    record = json.loads(manifest.read_text())
    for item in record["outputs"]["patch"]:
        if item["name"] == path.name:
            item["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(record))


def test_what_is_no_frame_is_found_though_the_digest_agrees(perta, patched):
    path = patched / "p" / f"{SHARDS[1]}.perta"
    tensor, first, n, at = frames(perta, path, "b")[1]
    flip(path, at)  # in the magic number
    record_digest(patched / "p", path)
    assert ranges(verify(perta, "p"), "file") == [(path.name, tensor, first, n)]


def test_a_budget_that_is_enough_for_a_whole_patch_names_damage_too(perta, patched):
    said = perta("verify", "p", "--memory", "1M", check=2).stderr
    enough = re.search("it needs ([0-9]+M)", said)[1]
    perta("verify", "p", "--memory", enough)
    path = patched / "p" / f"{SHARDS[0]}.perta"
    flip(path, frames(perta, path, "a")[0][3] + 12)
    items = json.loads(perta("verify", "p", "--memory", enough, "--json", check=1).stdout)
    assert ranges(items["differences"], "file") == [(path.name, "a.large", 0, CHUNK)]


# --- a folder against a manifest


@pytest.mark.parametrize("io", ["mmap", "direct", "pread"])
def test_files_side_by_side_have_the_digests_of_files_in_turn(perta, tmp_path, io):
    """Several large files, empty ones, one that is not a checkpoint; tensors that span many
    reads."""
    rng = np.random.default_rng(9)
    sizes = {f"{c}.large": 9_000_000 + 1000 * i for i, c in enumerate("abc")} | {"d.none": 0}
    tensors = {name: rng.integers(0, 256, n, np.uint8) for name, n in sizes.items()}
    write_checkpoint(tmp_path / "m", "U8", tensors, shards=4)
    (tmp_path / "m/empty").touch()
    (tmp_path / "m/text").write_bytes(b"text" * 3_000_000)
    one = perta("manifest", "m", "--threads", "1").stdout
    assert perta("manifest", "m", "--threads", "5", "--io", io).stdout == one
    for item in json.loads(one)["files"]:
        data = (tmp_path / "m" / item["name"]).read_bytes()
        assert item["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_manifest_is_checked_by_all_digests_that_it_has(perta, patched):
    record = json.loads(perta("manifest", "a").stdout)
    named = next(f for f in record["files"] if f["name"] == SHARDS[1])
    named["sha256"] = named["sha256"][::-1]
    (patched / "forged.json").write_text(json.dumps(record))
    said = perta("verify", "a", "--manifest", "forged.json", check=1)
    assert said.stdout.count("\n") == 1 and SHARDS[1] in said.stdout and "forged" in said.stdout
    for file in record["files"]:
        del file["sha256"]
    (patched / "fast.json").write_text(json.dumps(record))
    perta("verify", "a", "--manifest", "fast.json")
    flip(patched / "a" / SHARDS[1], 5000)
    assert "b.large: differs" in perta("verify", "a", "--manifest", "fast.json", check=1).stdout
