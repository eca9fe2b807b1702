"""Model sets for measurements: folders of TinyLlama's shapes, filled with noise, of any size.

A set is base, model, tuned (BF16) and forget, retain (F32). model and tuned are base plus noise
of a fine-tune's size; importances spread over orders of magnitude, as gradients do. Noise is cut
from a pool at random places: cheap, and too far apart for the patch's coder to notice.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000
POOL = 1 << 24
SHARD_BYTES = 2 << 30
TUNE = 1e-4  # standard deviation of what tuning changes; weights have 0.02


def tensors_of(n_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes: 1.1 billion parameters in 22 layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            layer + "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            layer + "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
            layer + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            layer + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            layer + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            layer + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            layer + "input_layernorm.weight": (HIDDEN,),
            layer + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


class Noise:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pool = self.rng.standard_normal(2 * POOL, np.float32)

    def take(self, n: int) -> np.ndarray:
        at = int(self.rng.integers(POOL))
        return self.pool[at : at + n]


class Folder:
    """A checkpoint folder, written tensor by tensor."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> None:
        path.mkdir(parents=True)
        self.path, self.dtype, self.file = path, dtype, None
        self.shards: list[dict[str, tuple[int, ...]]] = [{}]
        size = 0
        for name, shape in shapes.items():
            n = int(np.prod(shape)) * dtype.itemsize
            if size + n > SHARD_BYTES:
                self.shards.append({})
                size = 0
            self.shards[-1][name] = shape
            size += n
        self.names = [f"model-{i + 1:05}-of-{len(self.shards):05}.safetensors"
                      for i in range(len(self.shards))]  # fmt: skip
        index = {name: file for file, part in zip(self.names, self.shards) for name in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    def write(self, name: str, part: np.ndarray) -> None:
        for file, shard in zip(self.names, self.shards):
            if next(iter(shard)) == name and not (self.path / file).exists():
                self._begin(file, shard)
        part.astype(self.dtype).tofile(self.file)

    def _begin(self, file: str, shard: dict[str, tuple[int, ...]]) -> None:
        at, header = 0, {"__metadata__": {"format": "pt", "perta.stat": "mean"}}
        for name, shape in shard.items():
            end = at + int(np.prod(shape)) * self.dtype.itemsize
            dtype = "BF16" if self.dtype.itemsize == 2 else "F32"
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.close()
        self.file = (self.path / file).open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        if self.file:
            self.file.close()


def make(path: Path, n_layers: int, importance: bool = True) -> int:
    """Write the set where it is not there yet. Returns the number of parameters of a model."""
    shapes = tensors_of(n_layers)
    n_parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    done = path / f"{n_layers}-layers"
    if done.exists():
        return n_parameters
    bf16, f32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    kinds = {"base": bf16, "model": bf16, "tuned": bf16}
    kinds |= {"forget": f32, "retain": f32} if importance else {}
    folders = {kind: Folder(path / kind, shapes, dtype) for kind, dtype in kinds.items()}
    noise = Noise(seed=2601)
    for name, shape in shapes.items():
        left = int(np.prod(shape))
        while left:
            n = min(left, POOL)
            base = (noise.take(n) * np.float32(0.02)).astype(bf16)
            for kind, folder in folders.items():
                if kind == "base":
                    part = base
                elif kind in ("model", "tuned"):
                    part = base.astype(f32) + noise.take(n) * np.float32(TUNE)
                else:
                    part = noise.take(n) * np.exp2(2 * noise.take(n) - 20)
                folder.write(name, part)
            left -= n
    for folder in folders.values():
        folder.close()
    done.touch()
    return n_parameters
