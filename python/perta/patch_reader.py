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
BITS = {"C64": 32, "F4": 8, "F6_E2M3": 8, "F6_E3M2": 8, "BOOL": 8}  # by default the direction that the name says
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
    """(name, dtype, first byte, end byte) of each tensor, in the order of the data."""
    infos = json.loads(header[8:])
    infos.pop("__metadata__", None)
    ranges = [
        (name, info["dtype"], *(len(header) + at for at in info["data_offsets"]))
        for name, info in infos.items()
    ]
    return sorted(ranges, key=lambda t: (t[2], t[3] > t[2]))


def read_head(patch: bytes) -> tuple[bytes, bytes]:
    """The header of the shard, before and after."""
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


class Payload:
    """Reads bytes in order, from its current position."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def unpack(self, form: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def bytes(self, n: int) -> np.ndarray:
        return np.frombuffer(self.take(n), np.uint8)

    def planes(self, n: int, n_bytes: int, unsigned: np.dtype) -> np.ndarray:
        total = np.zeros(n, unsigned)
        for b in range(n_bytes):
            total |= self.bytes(n).astype(unsigned) << unsigned.type(8 * b)
        return total

    def fields(self, n: int, bits: int) -> np.ndarray:
        packed = self.bytes((n * bits + 7) // 8)
        rows = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return np.concatenate(rows)[:n]

    def group(self, n: int, n_rest: int, bits: int) -> np.ndarray:
        values = self.fields(n, bits) if bits else np.zeros(n, np.uint8)
        values[values == (1 << bits) - 1] = self.bytes(n_rest)
        return values


def zigzagged(data: bytes, dtype: str, u: np.ndarray) -> np.ndarray:
    """z of a chunk, given the units u on the known side."""
    payload, unsigned, n = Payload(data), u.dtype, u.size
    first, n_groups, low, n_gaps, n_overflow, n_changed = payload.unpack("HBBIII")
    table = [payload.unpack("IIB") for _ in range(n_groups + 1)]
    gaps = payload.bytes(n_gaps).astype(np.int64)
    z = payload.planes(n, low // 8, unsigned)
    if low % 8:
        z |= payload.fields(n, low % 8).astype(unsigned) << unsigned.type(low // 8 * 8)
    shift, width = EXPONENT.get(dtype, (0, 0))
    exponent = (u >> unsigned.type(shift)).astype(np.int64) & ((1 << width) - 1)
    group = np.clip(exponent - first, 0, n_groups - 1)
    group[np.cumsum(gaps)[gaps != 255] + np.arange(table[n_groups][0])] = n_groups
    values = np.empty(n, np.uint8)
    values[np.argsort(group, kind="stable")] = np.concatenate([payload.group(*g) for g in table])
    if low < 8 * unsigned.itemsize:
        high = values.astype(unsigned)
        high[values == 255] = payload.planes(n_overflow, unsigned.itemsize - low // 8, unsigned)
        z |= high << unsigned.type(low)
    check(np.count_nonzero(z) == n_changed, "it does not change as many units as it says")
    return z


def move(u: np.ndarray, z: np.ndarray, ordered: bool, revert: bool) -> np.ndarray:
    """The units on the other side."""
    one, sign = u.dtype.type(1), u.dtype.type(1 << (8 * u.dtype.itemsize - 1))
    d = (z >> one) ^ (~(z & one) + one)
    m = np.where(u & sign, ~u, u | sign) if ordered else u
    m = m - d if revert else m + d
    return np.where(m & sign, m ^ sign, ~m) if ordered else m


def new_values(data: bytes, u: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The units after, and the units before except those that change."""
    payload = Payload(data)
    changed = np.unpackbits(payload.bytes((u.size + 7) // 8), bitorder="little")[: u.size] == 1
    kept, after = u.copy(), u.copy()
    kept[changed] = 0
    after[changed] = payload.planes(int(changed.sum()), u.dtype.itemsize, u.dtype)
    return after, kept.tobytes()


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
        check(not (revert and encoding == 2), "a one-way patch")
        u, known = np.frombuffer(chunk, f"<u{unit_bits(dtype) // 8}"), chunk
        payload = zstandard.decompress(patch[frame : frame + frame_len]) if encoding else b""
        if encoding == 2:
            u, known = new_values(payload, u)
        check(xxhash.xxh3_64_intdigest(known) == digests[revert], f"{name}: for another model")
        if encoding == 1:
            u = move(u, zigzagged(payload, dtype, u), dtype in ORDERED, revert)
        chunk = u.tobytes()
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
    if out.exists() and any(out.samefile(path) for path in (model, patch)):
        sys.exit(f"{out}: would overwrite an input")
    out.write_bytes(convert(model.read_bytes(), patch.read_bytes(), "--revert" in sys.argv))


if __name__ == "__main__":
    main()
