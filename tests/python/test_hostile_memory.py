"""Memory is bounded before it is allocated: by a multiple of what was read
(docs/safetensors.md), and for patches by the sizes in their tables, whatever their frames
decompress to."""

import json
import resource
import struct

import numpy as np
import pytest
import xxhash
import zstandard
from conftest import PERTA
from reference import INDEX, write_folder

MULTIPLE = 100  # as documented
FIXED = 24 << 20  # for the process itself
N = 1_500_000

pytestmark = pytest.mark.skipif(
    b"__asan_" in PERTA.read_bytes() or b"__tsan_" in PERTA.read_bytes(),
    reason="a sanitizer takes memory of its own",
)


def bounded(n):
    limit = MULTIPLE * n + FIXED
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))}


def many(unit):
    return ",".join([unit] * (N // (len(unit) + 1)))


def keys(value):
    return ",".join(f'"{i:x}":{value}' for i in range(N // (len(value) + 9)))


SCALAR = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
IGNORED = '{"a":{"x":[%s]}}'
GREEDY = {
    "arrays": IGNORED % many("[]"),
    "objects": IGNORED % many("{}"),
    "objects in objects": IGNORED % many('{"":{}}'),
    "strings": IGNORED % many('""'),
    "keys": "{%s}" % keys("{}"),
    "dimensions": '{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[%s]}}' % many("0"),
    "tensors": "{%s}" % keys(SCALAR),
    "a name": '{"%s":0}' % ("é" * (N // 2)),
}


@pytest.mark.parametrize("text", GREEDY.values(), ids=GREEDY.keys())
def test_a_header_takes_no_more_than_a_multiple_of_its_length(perta, tmp_path, text):
    data = text.encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    status = 0 if "U8" in text else 3  # 4 would mean out of memory
    perta("inspect", "m.safetensors", check=status, **bounded(len(data)))


@pytest.mark.parametrize("name", [INDEX, "config.json", "manifest.json"])
def test_so_does_any_other_file_of_a_folder(perta, tmp_path, name):
    write_folder(tmp_path / "m", {"x": np.zeros(4, np.float32)})
    text = GREEDY["objects in objects"]
    (tmp_path / "m" / name).write_text(text)
    perta("inspect", "m", check=3 if name == INDEX else 0, **bounded(len(text)))
    (tmp_path / "m" / name).write_text("[" * N)
    perta("inspect", "m", check=3 if name == INDEX else 0, **bounded(N))


def test_so_do_lines_of_data(perta, tmp_path):
    from llama import write_llama

    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8}
    config |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    write_llama(tmp_path / "m", config | {"num_key_value_heads": 1})
    for line in '{"input_ids":[%s],"x":9' % many("0"), '{"input_ids":[0,0],"x":"' + "x" * N:
        (tmp_path / "data").write_text(line)
        refusal = perta("estimate", *"--model m --data data --out o".split(), check=3, **bounded(N))
        assert "line 1" in refusal.stderr


# --- bombs


@pytest.fixture
def patched(perta, tmp_path):
    """A patch of one chunk of 1 MB; returns a function that replaces its frame."""
    before = np.random.default_rng(3).standard_normal(250_000).astype(np.float32)
    write_folder(tmp_path / "a", {"x": before})
    write_folder(tmp_path / "b", {"x": before[::-1].copy()})
    perta("diff", "a", "b", "--patch", "p")
    path = tmp_path / "p/model.safetensors.perta"
    good = path.read_bytes()
    entry = list(struct.unpack("<QIIIIIIQQ", good[-72:-24]))

    def put(frame, payload_bytes=entry[2]):
        changed = entry[:]
        changed[1:3] = len(frame), payload_bytes
        table = struct.pack("<QIIIIIIQQ", *changed)
        path.write_bytes(
            good[: entry[0]] + frame + struct.pack("<II", 0x184D2A5E, 72) + table
            + struct.pack("<QQI4s", 1, xxhash.xxh3_64_intdigest(table), 1, b"PRTA")
        )

    put.good = good[entry[0] : entry[0] + entry[1]]
    put.payload = zstandard.ZstdDecompressor().decompress(put.good)
    return put


GIB = 1 << 30
EMPTY = zstandard.compress(b"")
SKIPPABLE = struct.pack("<II", 0x184D2A50, 0)


def compress(n, size_known):
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=n if size_known else -1)
    mib = b"\0" * (1 << 20)
    return b"".join(compressor.compress(mib) for _ in range(n >> 20)) + compressor.flush()


@pytest.mark.parametrize("size_known", [True, False])
def test_a_bomb_is_refused(perta, patched, size_known):
    bomb = compress(GIB, size_known)
    assert len(bomb) < 100_000
    # In the table: more than a chunk of this tensor can need.
    for payload_bytes in GIB, 3_000_000, (1 << 32) - 1:
        patched(bomb, payload_bytes)
        for command in ["verify", "p"], ["apply", "a", "p", "--out", "o"]:
            result = perta(*command, check=1, **bounded(2_000_000))
            assert "longer than its chunk can need" in result.stdout + result.stderr
    # In the frame: not what the table says.
    patched(bomb)
    assert "is damaged" in perta("verify", "p", check=1, **bounded(2_000_000)).stdout
    assert "is damaged" in perta("apply", "a", "p", "--out", "o", check=1, **bounded(2_000_000)).stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda good: good + EMPTY,
        lambda good: EMPTY + good,
        lambda good: SKIPPABLE + good,
        lambda good: good + SKIPPABLE,
        lambda good: good + b"\0",
        lambda good: good[:-1],
        lambda good: b"\x27" + good[1:],  # for example that of zstd 0.7
    ],
    ids=["empty after", "empty before", "skippable before", "skippable after", "a byte more",
         "a byte less", "older format"],
)  # fmt: skip
def test_a_frame_is_one_frame(perta, patched, change):
    patched(change(patched.good))
    assert "is damaged" in perta("verify", "p", check=1).stdout
    assert "not one frame" in perta("apply", "a", "p", "--out", "o", check=1).stderr


def test_a_frame_that_does_not_say_its_length_is_read(perta, patched):
    patched(zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(patched.payload))
    assert json.loads(perta("apply", "a", "p", "--out", "o", "--json", check=None).stdout)
