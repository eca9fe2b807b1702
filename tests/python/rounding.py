"""The formats of `--quantize` in NumPy, from their definitions (docs/eval.md). A function takes the
weights of a linear module (rows, cols), BF16, F16 or F32, and returns what they are after rounding,
in the same dtype."""

import ml_dtypes
import numpy as np

F32 = np.float32
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    F32,
)  # fmt: skip
# The pivots of bitsandbytes' dQuantizeNF4.
PIVOTS = np.array(
    [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
        -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ],
    F32,
)  # fmt: skip


def blocks(x, size):
    """(n, size): x (rows, cols) in blocks along its last dimension, the last of a row filled up
    with zeros."""
    rows, cols = x.shape
    padded = np.zeros((rows, -(-cols // size) * size), x.dtype)
    padded[:, :cols] = x
    return padded.reshape(-1, size)


def unblocked(x, shape):
    """The inverse of blocks."""
    return x.reshape(shape[0], -1)[:, : shape[1]]


def nf4(w):
    x = blocks(w.astype(F32).reshape(1, -1), 64)
    most = abs(x).max(axis=1, keepdims=True)
    codes = np.searchsorted(PIVOTS, x * (F32(1) / np.maximum(most, F32(1e-38))), side="left")
    return unblocked(NF4[codes] * most, (1, w.size)).reshape(w.shape).astype(w.dtype)


def int8(w):
    x = w.astype(np.float16).astype(F32)
    most = abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        by = np.where(most > 0, F32(1) / most * F32(127), F32(0))  # as PyTorch has 127 / most
    codes = np.rint(x * by).astype(np.int8)
    return (codes * most * F32(7.874015718698502e-3)).astype(w.dtype)


def int4(w):
    x = blocks(w.astype(F32), 128)
    least = np.minimum(x.min(axis=1, keepdims=True), F32(0))
    most = np.maximum(x.max(axis=1, keepdims=True), F32(0))
    most = np.maximum(abs(least), most)
    least = np.where(least < 0, -most, least)
    empty = (least == 0) & (most == 0)
    scale = (np.where(empty, F32(1), most) - np.where(empty, F32(-1), least)) / F32(15)
    codes = np.clip(np.rint(x / scale) + F32(8), 0, 15)
    return unblocked(scale * (codes - F32(8)), w.shape).astype(w.dtype)


def q4_0(w):
    x = blocks(w.astype(F32), 32)
    assert w.shape[1] % 32 == 0
    at = abs(x).argmax(axis=1)[:, None]
    d = np.take_along_axis(x, at, axis=1) / F32(-8)
    d = np.where(d == 0, F32(-0.0), d)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, F32(0), F32(1) / d)
    codes = np.minimum(15, np.trunc(x * inverse + F32(8.5)).astype(np.int8))
    stored = d.astype(np.float16).astype(F32)
    return unblocked((codes - 8).astype(F32) * stored, w.shape).astype(w.dtype)


def fp8(w):
    """Every step is rounded to the dtype of w."""
    dtype = w.dtype
    scale = (abs(w).max(axis=1, keepdims=True).astype(F32) / F32(448)).astype(dtype)
    scale = np.where(scale == 0, ml_dtypes.finfo(dtype).eps.astype(dtype), scale).astype(F32)
    scaled = np.clip((w.astype(F32) / scale).astype(dtype).astype(F32), F32(-448), F32(448))
    codes = scaled.astype(ml_dtypes.float8_e4m3fn).astype(F32)
    return (codes * scale).astype(dtype)


FORMATS = {"nf4": nf4, "int8": int8, "int4": int4, "q4_0": q4_0, "fp8": fp8}
