"""Apply or revert one shard of a perta patch: a second implementation of docs/patch-format.md.

    python -m perta.patch_reader MODEL.safetensors NAME.safetensors.perta OUT.safetensors [--revert]
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import xxhash
import zstandard

CHUNK_UNITS = 1 << 20
BITS = {"C64": 32, "F4": 8, "F6_E2M3": 8, "F6_E3M2": 8, "BOOL": 8}  # else as the name says
ORDERED = ("F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "C64", "F64")
EXPONENT = {"F16": (10, 5), "BF16": (7, 8), "F32": (23, 8), "F64": (52, 11)}


class Damaged(Exception):
    pass


def check(ok: bool, what: str) -> None:
    if not ok:
        raise Damaged(what)


def unit_bits(dtype: str) -> int:
    return BITS.get(dtype) or int("".join(filter(str.isdigit, dtype.split("_")[0])))


def tensors_of(header: bytes) -> list[tuple[str, str, int, int]]:
    """(name, dtype, first byte, end byte) of each tensor, in order of the data."""
    infos = json.loads(header[8:])
    infos.pop("__metadata__", None)
    ranges = [
        (name, info["dtype"], *(len(header) + at for at in info["data_offsets"]))
        for name, info in infos.items()
    ]
    return sorted(ranges, key=lambda t: (t[2], t[3] > t[2]))


def read_head(patch: bytes) -> tuple[bytes, bytes]:
    """The shard's header before and after."""
    magic, length = struct.unpack_from("<II", patch)
    content = patch[8 : 8 + length]
    tag, version, flags, before, after = struct.unpack_from("<8sIIQQ", content)
    check((magic, tag) == (0x184D2A50, b"PERTA\r\n\x1a"), "not a perta patch")
    check((version, flags) == (1, 0), f"format {version}, flags {flags}")
    check(xxhash.xxh3_64_intdigest(content[:-8]) == struct.unpack("<Q", content[-8:])[0], "head")
    headers = content[48 : 48 + before], content[48 + before : 48 + before + after]
    return headers[0], headers[1] or headers[0]


def read_table(patch: bytes) -> list[tuple]:
    n, digest, version, magic = struct.unpack("<QQI4s", patch[-24:])
    check((version, magic) == (1, b"PRTA"), "no table at the end")
    entries = patch[-24 - 48 * n : -24]
    check(xxhash.xxh3_64_intdigest(entries) == digest, "table")
    return list(struct.iter_unpack("<QIIIIIIQQ", entries))


def planes(payload: np.ndarray, n: int, unsigned: np.dtype) -> np.ndarray:
    columns = payload.reshape(unsigned.itemsize, n).T
    return np.ascontiguousarray(columns).view(unsigned).reshape(n)


def zigzagged(payload: bytes, encoding: int, dtype: str, u: np.ndarray) -> np.ndarray:
    """z of a chunk whose units, on the side that is known, are u."""
    if encoding == 3:
        return np.frombuffer(payload, u.dtype)
    data = np.frombuffer(payload, np.uint8)
    if encoding == 1:
        return planes(data, len(u), u.dtype)
    floor, n_crossers, n_gaps = struct.unpack_from("<HII", payload)
    gaps, data = data[10 : 10 + n_gaps].astype(np.int64), data[10 + n_gaps :]
    crossers = (np.cumsum(gaps)[gaps != 255] + np.arange(n_crossers)).astype(np.int64)
    shift, width = EXPONENT[dtype]
    exponent = (u >> u.dtype.type(shift)).astype(np.int64) & ((1 << width) - 1)
    others = np.delete(np.arange(len(u)), crossers)
    order = others[np.argsort(np.maximum(exponent[others], floor), kind="stable")]
    split = len(order) * u.dtype.itemsize
    z = np.empty_like(u)
    z[order] = planes(data[:split], len(order), u.dtype)
    z[crossers] = planes(data[split:], n_crossers, u.dtype)
    return z


def move(u: np.ndarray, z: np.ndarray, ordered: bool, revert: bool) -> np.ndarray:
    """The units on the other side."""
    one, sign = u.dtype.type(1), u.dtype.type(1 << (8 * u.dtype.itemsize - 1))
    d = (z >> one) ^ (~(z & one) + one)
    m = np.where(u & sign, ~u, u | sign) if ordered else u
    m = m - d if revert else m + d
    return np.where(m & sign, m ^ sign, ~m) if ordered else m


def convert(model: bytes, patch: bytes, revert: bool) -> bytes:
    before, after = read_head(patch)
    known, wanted = (after, before) if revert else (before, after)
    check(model[: len(known)] == known, "the model's header is not the patch's")
    source = {name: start for name, _, start, _ in tensors_of(known)}
    target = {name: start for name, _, start, _ in tensors_of(wanted)}
    tensors = tensors_of(after)
    out = bytearray(wanted) + bytearray(len(model) - len(known))
    previous, done = None, 0
    for frame, frame_len, _, tensor, n, encoding, _, *digests in read_table(patch):
        name, dtype, _, _ = tensors[tensor]
        done = done if tensor == previous else 0
        size = n * unit_bits(dtype) // 8
        chunk = model[source[name] + done : source[name] + done + size]
        check(xxhash.xxh3_64_intdigest(chunk) == digests[revert], f"{name}: for another model")
        if encoding:
            u = np.frombuffer(chunk, f"<u{unit_bits(dtype) // 8}")
            payload = zstandard.decompress(patch[frame : frame + frame_len])
            z = zigzagged(payload, encoding, dtype, u)
            chunk = move(u, z, dtype in ORDERED, revert).tobytes()
        check(xxhash.xxh3_64_intdigest(chunk) == digests[not revert], f"{name}: wrong result")
        at = target[name] + done
        out[at : at + size] = chunk
        previous, done = tensor, done + size
    return bytes(out)


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:] if argument != "--revert"]
    if len(paths) != 3:
        sys.exit(__doc__)
    model, patch, out = paths
    out.write_bytes(convert(model.read_bytes(), patch.read_bytes(), "--revert" in sys.argv))


if __name__ == "__main__":
    main()
