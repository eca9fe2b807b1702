"""`apply` and `revert` reproduce whole shard files byte for byte, for any bits."""

import json
import re
import subprocess

import numpy as np
import pytest
import xxhash
from conftest import part
from reference import BF16, CHUNK, bits, folder_bytes, narrow, shard_bytes, write_folder

WIDTHS = {  # bytes per element
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
SIZES = (0, 1, 7, 1003, CHUNK + 17)


# --- checkpoints by hand, for bits and dtypes that NumPy lacks


def write_shard(path, dtype, tensors, metadata=None):
    """Tensors are unsigned arrays of the width of the dtype."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, u in tensors.items():
        offsets = [at, at + u.nbytes]
        header[name] = {"dtype": dtype, "shape": list(u.shape), "data_offsets": offsets}
        at += u.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(u.tobytes() for u in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(folder, dtype, tensors, shards=2, metadata=None):
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_shard(folder / shard, dtype, part, metadata)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def special_bits(dtype):
    """Zeros, subnormals, infinities and NaNs of float formats; the ends of the range of others."""
    width = 8 * WIDTHS[dtype]
    if dtype == "BOOL":
        return [0, 1]
    mantissa = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52, "F8_E4M3": 3, "F8_E5M2": 2}
    inf = (1 << (width - 1)) - (1 << mantissa.get(dtype, width - 1))
    positive = [0, 1, (1 << mantissa.get(dtype, 1)) - 1, inf, inf + 1, (1 << (width - 1)) - 1]
    return [bits | sign for bits in positive for sign in (0, 1 << (width - 1))]


def random_bits(rng, dtype, n):
    """Random bits, one element in eight of them special."""
    unsigned = np.dtype(f"u{WIDTHS[dtype]}")
    if dtype == "BOOL":
        return rng.integers(0, 2, n, unsigned)
    u = np.frombuffer(rng.bytes(n * unsigned.itemsize), unsigned).copy()
    specials = np.array(special_bits(dtype), unsigned)
    return np.where(rng.random(n) < 0.125, rng.choice(specials, n), u)


def light(rng, dtype, u):
    """One element in a hundred changes a little."""
    steps = np.where(rng.random(u.size) < 0.01, rng.integers(0, 4, u.size), 0).astype(u.dtype)
    return u ^ (steps & 1 if dtype == "BOOL" else steps)


def medium(rng, dtype, u):
    """Every element changes a little, also across the ends of the range."""
    if dtype == "BOOL":
        return u ^ rng.integers(0, 2, u.size, u.dtype)
    return u + rng.integers(0, 5, u.size, u.dtype) - u.dtype.type(2)


def heavy(rng, dtype, u):
    return random_bits(rng, dtype, u.size)


def unchanged(rng, dtype, u):
    return u


EDITS = (unchanged, light, medium, heavy)


def check_both_ways(perta, folder):
    """b from a and the patch, a from b and the patch; and zstd's own check of the patch."""
    perta("diff", "a", "b", "--patch", "p")
    perta("apply", "a", "p", "--out", "applied")
    perta("revert", "b", "p", "--out", "reverted")
    assert shard_bytes(folder / "applied") == shard_bytes(folder / "b")
    assert shard_bytes(folder / "reverted") == shard_bytes(folder / "a")
    check_with_zstd(folder / "p")


def check_with_zstd(patch):
    files = sorted(patch.glob("*.perta"))
    assert files
    subprocess.run(["zstd", "--test", "--quiet", *files], check=True)


@pytest.mark.parametrize("dtype", part(WIDTHS, sanitized=5))
def test_apply_and_revert_are_exact_for_any_bits(perta, tmp_path, dtype):
    rng = np.random.default_rng(list(WIDTHS).index(dtype))
    before, after = {}, {}
    for size in SIZES:
        for edit in EDITS:
            name = f"{edit.__name__}.{size}"
            before[name] = random_bits(rng, dtype, size)
            after[name] = edit(rng, dtype, before[name])
    write_checkpoint(tmp_path / "a", dtype, before)
    write_checkpoint(tmp_path / "b", dtype, after)
    check_both_ways(perta, tmp_path)


def fine_tuned(rng, n):
    """Weights like a model's, and what a small change leaves of their exponents."""
    x = rng.standard_normal(n).astype(np.float32)
    return [bits(narrow(y, BF16)) for y in (x, x + 0.001 * rng.standard_normal(n, "f4"))]


def drifting_bytes(rng, n):
    """Zigzag-encoded changes whose bytes use 32 values at a time, and all 256 within one zstd
    block of any plane."""
    values = rng.integers(0, 32, (n, 8), np.uint8) + (np.arange(n) // 16384 % 8 * 32)[:, None]
    z = values.astype(np.uint8).view(np.uint64).reshape(n)
    before = random_bits(rng, "I64", n)
    return before, before + ((z >> 1) ^ (~(z & 1) + np.uint64(1)))


def small_steps(rng, n):
    before = random_bits(rng, "I32", n)
    return before, medium(rng, "I32", before)


def nothing(rng, n):
    return [random_bits(rng, "F32", n)] * 2


@pytest.mark.parametrize(
    "encoding, dtype, make",
    [
        ("zero", "F32", nothing),
        ("delta", "I32", small_steps),
        ("delta", "BF16", fine_tuned),
        ("delta", "I64", drifting_bytes),
    ],
)
def test_each_encoding_is_chosen_and_exact(perta, tmp_path, encoding, dtype, make):
    before, after = make(np.random.default_rng(0), CHUNK)
    write_checkpoint(tmp_path / "a", dtype, {"w": before}, shards=1)
    write_checkpoint(tmp_path / "b", dtype, {"w": after}, shards=1)
    check_both_ways(perta, tmp_path)
    record = json.loads((tmp_path / "p/manifest.json").read_text())["encodings"]
    assert [name for name, of in record.items() if of["chunks"]] == [encoding]
    assert record[encoding]["elements"] == before.size


def test_headers_may_differ_in_metadata_and_order(perta, tmp_path):
    rng = np.random.default_rng(1)
    before = {name: random_bits(rng, "F16", 50) for name in "abcde"}
    after = {name: light(rng, "F16", before[name]) for name in "cabed"}
    write_checkpoint(tmp_path / "a", "F16", before, 1, {"format": "pt"})
    write_checkpoint(tmp_path / "b", "F16", after, 1, {"format": "pt", "note": "tuned " * 9})
    check_both_ways(perta, tmp_path)


def test_an_unlearned_model_leads_back(perta, tmp_path):
    rng = np.random.default_rng(2)
    for folder in ("a", "tuned", "base"):
        tensors = {f"layer.{i}": rng.standard_normal((40, 5)).astype("f4") for i in range(5)}
        write_folder(tmp_path / folder, tensors, shards=2)
    folders = "--model a --tuned tuned --base base --patch p --out b"
    perta("unlearn", "--method", "tv", *folders.split())
    perta("apply", "a", "p", "--out", "applied")
    perta("revert", "applied", "p", "--out", "reverted")
    assert folder_bytes(tmp_path / "applied") == folder_bytes(tmp_path / "b")
    assert folder_bytes(tmp_path / "reverted") == folder_bytes(tmp_path / "a")
    check_with_zstd(tmp_path / "p")


# --- what is refused


@pytest.fixture
def pair(perta, tmp_path):
    """Checkpoints a and b, the patch p from a to b, and c, which differs from a in one bit."""
    rng = np.random.default_rng(3)
    before = {name: random_bits(rng, "BF16", 1000) for name in ("first", "second")}
    after = {name: medium(rng, "BF16", u) for name, u in before.items()}
    write_checkpoint(tmp_path / "a", "BF16", before)
    write_checkpoint(tmp_path / "b", "BF16", after)
    before["second"][77] ^= 1
    write_checkpoint(tmp_path / "c", "BF16", before)
    perta("diff", "a", "b", "--patch", "p")
    return tmp_path


def refusal(perta, folder, *command):
    """The error message of the command, which must leave nothing behind."""
    there = sorted(folder.iterdir())
    message = perta(*command, check=1).stderr
    assert sorted(folder.iterdir()) == there
    return message


@pytest.mark.parametrize("threads", [1, 4])
def test_the_wrong_model_is_refused_with_both_digests(perta, pair, threads):
    message = refusal(perta, pair, *"apply c p --out out --threads".split(), threads)
    for folder in "ac":
        data = shard_bytes(pair / folder)["model-00002-of-00002.safetensors"]
        assert xxhash.xxh3_64_hexdigest(data[-2000:]) in message
    assert "tensor second" in message


def test_another_header_is_another_model(perta, pair):
    rng = np.random.default_rng(4)
    tensors = {name: random_bits(rng, "BF16", 999) for name in ("first", "second")}
    write_checkpoint(pair / "d", "BF16", tensors)
    message = refusal(perta, pair, "apply", "d", "p", "--out", "out")
    assert len(re.findall(r"[0-9a-f]{16}", message)) == 2


def test_a_patch_that_is_applied_already_says_so(perta, pair):
    assert "is applied already" in refusal(perta, pair, *"apply b p --out out".split())
    assert "not applied" in refusal(perta, pair, *"revert a p --out out".split())


def test_verify_tells_a_model_before_from_one_after(perta, pair):
    for model, side, status in [
        ("a", "--original", 0),
        ("b", "--applied", 0),
        ("a", "--applied", 1),
        ("b", "--original", 1),
        ("c", "--original", 1),
    ]:
        perta("verify", model, "--patch", "p", side, check=status)


@pytest.mark.parametrize("where", ["head", "frame", "table"])
def test_a_damaged_patch_is_refused(perta, pair, where):
    path = next(pair.glob("p/*.perta"))
    data = bytearray(path.read_bytes())
    at = {"head": 60, "frame": data.index(b"\x28\xb5\x2f\xfd") + 100, "table": len(data) - 50}
    data[at[where]] ^= 4
    path.write_bytes(data)
    assert perta("verify", "p", check=1)
    there = sorted(pair.iterdir())
    result = perta("apply", "a", "p", "--out", "out", check=1)
    assert path.name in result.stderr and sorted(pair.iterdir()) == there


def test_checkpoints_that_do_not_match_are_refused(perta, tmp_path):
    rng = np.random.default_rng(5)
    u = random_bits(rng, "F32", 10)
    write_checkpoint(tmp_path / "a", "F32", {"first": u, "second": u})
    for i, (dtype, tensors, shards) in enumerate(
        [
            ("F32", {"first": u, "third": u}, 2),
            ("I32", {"first": u, "second": u}, 2),
            ("F32", {"first": u, "second": u[:9]}, 2),
            ("F32", {"first": u, "second": u}, 1),
            ("F32", {"second": u, "first": u}, 2),
        ]
    ):
        write_checkpoint(tmp_path / f"b{i}", dtype, tensors, shards)
        perta("diff", "a", f"b{i}", "--patch", "p", check=3)
        assert not (tmp_path / "p").exists()
