"""The method (PerTA, arXiv 2601.22030) in NumPy, one array at a time: the reference for `perta`.

    tau = tuned - base
    r   = |g_r| / |g_f|,  w = 1 / (1 + r^p),  g_f = 0 gives w = 0
    out = round(model - (alpha * w) * tau)

in float32 in exactly that order, in float64 where the model is F64, with one rounding at the end
(to nearest, ties to even). Where the step is zero the model's bits stay unchanged.

Files are read and written with the official `safetensors` package; F16 and BF16 are converted
here, by their bits.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import xxhash

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "BF16": BF16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
EDITABLE = ("BF16", "F16", "F32", "F64")
CHUNK = 1 << 20  # elements in a chunk, as in perta
INDEX = "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rule:
    """The settings of `perta unlearn --method`."""

    method: str  # grad fisher power tv constant random
    stat: str = "mean"  # mean or meansq: what the importances hold
    power: float = 1.0
    weight: float = 1.0
    seed: int = 0

    @property
    def needs_importance(self) -> bool:
        return self.method in ("grad", "fisher", "power")


# --- the method


@dataclass(frozen=True)
class Edited:
    """A tensor after the edit, and what the manifest says about it."""

    out: np.ndarray
    counts: dict
    weights: np.ndarray | int = 0  # the number in each tenth of [0, 1]


def unlearn(
    rule: Rule,
    alpha: float,
    model: Tensors,
    tuned: Tensors,
    base: Tensors,
    forget: Tensors | None = None,
    retain: Tensors | None = None,
) -> dict[str, Edited]:
    """Edit every tensor of the model. Those that are not floating point pass through."""
    out = {}
    for name, theta in model.items():
        if dtype_name(theta) not in EDITABLE:
            out[name] = kept(theta)
            continue
        g_f = forget[name] if rule.needs_importance else None
        g_r = retain[name] if rule.needs_importance else None
        out[name] = edit(rule, alpha, name, theta, tuned[name], base[name], g_f, g_r)
    return out


def kept(theta: np.ndarray) -> Edited:
    counts = {"parameters": theta.size, "changed": 0, "rounded_away": 0, "nonfinite": 0}
    return Edited(theta, counts)


def edit(
    rule: Rule,
    alpha: float,
    name: str,
    theta: np.ndarray,
    theta_t: np.ndarray,
    theta_b: np.ndarray,
    g_f: np.ndarray | None = None,
    g_r: np.ndarray | None = None,
) -> Edited:
    """Edit one tensor. Parameters that are not finite stay unchanged."""
    real = np.float64 if dtype_name(theta) == "F64" else np.float32
    with np.errstate(all="ignore"):
        w = weight(rule, real, name, theta.shape, g_f, g_r)
        tau = widen(theta_t, real) - widen(theta_b, real)
        step = (real(np.float32(alpha)) * w) * tau
        moved = narrow(widen(theta, real) - step, theta.dtype)
        bad = (step != 0) & ~np.isfinite(widen(moved, real))
        for operand in (theta, theta_t, theta_b, g_f, g_r):
            if operand is not None:
                bad = bad | ~np.isfinite(widen(operand, real))
        for importance in (g_f, g_r):
            if importance is not None and rule.stat == "meansq":
                bad = bad | (widen(importance, real) < 0)
    out = np.where((step == 0) | bad, bits(theta), bits(moved))
    changed = out != bits(theta)
    counts = {
        "parameters": theta.size,
        "changed": np.count_nonzero(changed),
        "rounded_away": np.count_nonzero((step != 0) & ~changed & ~bad),
        "nonfinite": np.count_nonzero(bad),
        "mean_weight": mean_weight(np.where(bad, real(0), w), np.count_nonzero(bad)),
        "zero_forget": 0 if g_f is None else np.count_nonzero(widen(g_f, real) == 0),
        "zero_retain": 0 if g_r is None else np.count_nonzero(widen(g_r, real) == 0),
    }
    edges = np.arange(10).astype(real) / real(10)
    bins = np.bincount(np.searchsorted(edges, w[~bad], "right") - 1, minlength=10)
    return Edited(out.view(theta.dtype), counts, bins)


def mean_weight(w: np.ndarray, n_bad: int) -> float:
    """Summed in the order of estimators/edit/edit.h: lanes, blocks, chunks."""
    total = np.float64(0)
    flat = w.reshape(-1).astype(np.float64)
    for first in range(0, flat.size, CHUNK):
        chunk = flat[first : first + CHUNK]
        blocks = np.pad(chunk, (0, -chunk.size % 1024)).reshape(-1, 64, 16)
        lanes = np.cumsum(blocks, axis=1)[:, -1]
        total += np.cumsum(np.cumsum(lanes, axis=1)[:, -1])[-1]
    n = flat.size - n_bad
    return float(total / n) if n else 0.0


def weight(
    rule: Rule,
    real: type,
    name: str,
    shape: tuple[int, ...],
    g_f: np.ndarray | None = None,
    g_r: np.ndarray | None = None,
) -> np.ndarray:
    """The weights w of one tensor, in the arithmetic of `real`."""
    if rule.method == "tv":
        return np.full(shape, real(1))
    if rule.method == "constant":
        return np.full(shape, real(rule.weight))
    if rule.method == "random":
        return random_weight(rule.seed, name, shape, real)
    forget, retain = np.abs(widen(g_f, real)), np.abs(widen(g_r, real))
    r = retain / forget
    one = real(1)
    if rule.method == "grad":
        powered = np.sqrt(r) if rule.stat == "meansq" else r
    elif rule.method == "fisher":
        powered = r if rule.stat == "meansq" else r * r
    else:
        exponent = rule.power / 2 if rule.stat == "meansq" else rule.power
        powered = power(r, exponent, real)
    return np.where(forget == 0, real(0), one / (one + powered))


def power(x: np.ndarray, p: float, real: type) -> np.ndarray:
    """x^p as in estimators/edit/pow.h, rounded once to `real`."""
    x = np.asarray(x, np.float64)
    sqrt_half = np.uint64(0x3FE6A09E667F3BCD)
    tiny = x < np.finfo(np.float64).tiny
    u = np.where(tiny, x * 2.0**54, x).view(np.uint64) + (np.uint64(0x3FF << 52) - sqrt_half)
    k = ((u >> 52) | np.uint64(0x433 << 52)).view(np.float64) - 2.0**52
    k = k - np.where(tiny, 1023.0 + 54, 1023.0)
    m = ((u & np.uint64((1 << 52) - 1)) + sqrt_half).view(np.float64)
    whole, part = p * k, p * log2_near_1(m)
    y = whole + part
    clamped = np.clip(y, -1100, 1100)
    n, half = np.rint(clamped), np.rint(clamped * 0.5)
    exp2 = exp2_near_0((whole - n) + part)
    result = (exp2 * np.ldexp(1.0, half.astype(int))) * np.ldexp(1.0, (n - half).astype(int))
    result = np.where(y >= 1025, np.inf, np.where(y <= -1080, 0.0, result))
    return np.where(x == 0, 0.0, np.where(np.isinf(x), x, result)).astype(real)


def log2_near_1(m: np.ndarray) -> np.ndarray:
    s = (m - 1) / (m + 1)
    return (s * horner(s * s, range(21, 0, -2))) * float.fromhex("0x1.71547652b82fep+1")


def exp2_near_0(f: np.ndarray) -> np.ndarray:
    t = f * float.fromhex("0x1.62e42fefa39efp-1")
    return horner(t, [math.factorial(i) for i in range(13, -1, -1)])


def horner(x: np.ndarray, divisors: Iterable[int]) -> np.ndarray:
    total = np.float64(0)
    for divisor in divisors:
        total = total * x + 1.0 / divisor
    return total


def random_weight(seed: int, name: str, shape: tuple[int, ...], real: type) -> np.ndarray:
    """SplitMix64 of seed, tensor name and element: 24 bits, as in estimators/edit/kernels.h."""
    state = np.uint64(seed ^ xxhash.xxh3_64_intdigest(name.encode()))
    index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    z = state + index * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> 31)
    return ((z >> 40).astype(real) * real(2.0**-24)).reshape(shape)


def random_bits(state: int, i: int) -> int:
    """Output number i + 1 of SplitMix64 started at state."""
    mask = (1 << 64) - 1
    z = (state + (i + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """The samples 0 .. n - 1 in the order of that epoch (docs/tune.md)."""
    state, order = random_bits(seed, 1 + epoch), list(range(n))
    for i in range(n - 1, 0, -1):
        k = random_bits(state, n - 1 - i) % (i + 1)
        order[i], order[k] = order[k], order[i]
    return order


# --- the task vector of a LoRA


def lora_tau(a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    """scaling * (B A) for A (r, in) and B (out, r), bit for bit as in estimators/edit/edit.h:
    the sum from k = 0 upwards in float32, with every operation rounded."""
    a, b = widen(a, np.float32), widen(b, np.float32)
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    with np.errstate(all="ignore"):
        for k in range(a.shape[0]):
            total = total + b[:, k, None] * a[None, k, :]
        return np.float32(scaling) * total


# --- running statistics


def running_mean(samples: list[np.ndarray], square: bool) -> np.ndarray:
    """The mean of the samples, or of their squares, summed in float32 with Knuth's TwoSum, bit
    for bit as in estimators/edit/running.h."""
    total = np.zeros(samples[0].shape, np.float32)
    carry = np.zeros(samples[0].shape, np.float32)
    for sample in samples:
        x = widen(sample, np.float32)
        if square:
            x = x * x
        t = total + x
        z = t - total
        carry = carry + ((total - (t - z)) + (x - z))
        total = t
    exact = total.astype(np.float64) + carry.astype(np.float64)
    return (exact / np.float64(len(samples))).astype(np.float32)


# --- number formats


def dtype_name(array: np.ndarray) -> str:
    """As in safetensors files."""
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def widen(array: np.ndarray, real: type) -> np.ndarray:
    """Convert to float32 (F64 is rounded, all others are exact) or to float64 (exact)."""
    if array.dtype == BF16:
        array = (bits(array).astype(np.uint32) << 16).view(np.float32)
    return array.astype(real)


def narrow(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert to a model's dtype, to nearest, ties to even."""
    if dtype != BF16:
        return array.astype(dtype)
    assert array.dtype == np.float32
    u = bits(array)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((u >> 16) | 0x40).astype(np.uint16)
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet_nan, rounded).view(BF16)


# --- folders


def read_file(path: Path) -> Tensors:
    """Every tensor of one safetensors file, in the order of the file."""
    return {
        name: np.frombuffer(info["data"], DTYPES[info["dtype"]]).reshape(info["shape"])
        for name, info in safetensors.deserialize(path.read_bytes())
    }


def read_folder(folder: Path) -> Tensors:
    """Every tensor of every shard."""
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in read_file(path).items()
    }


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, at any depth."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_folder(
    folder: Path, tensors: Tensors, shards: int = 1, metadata: dict[str, str] | None = None
) -> Path:
    """Distribute the tensors round-robin over that many shards, with an index if there are
    several."""
    folder.mkdir(parents=True)
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / shard, metadata)
        weight_map |= dict.fromkeys(part, shard)
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return folder
