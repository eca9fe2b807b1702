"""Sets of models for measurements: folders with Llama's shapes, of any size, with the same bytes
each time.

A set is base, model, tuned, and forget and retain (F32). base is rounded from float32 masters
(normal, deviation 0.02). model and tuned continue from the masters with 16 steps of AdamW (beta 0.9
and 0.95, decay 0.01), on gradients of which a third is the same in each step and the rest is noise.
Importances are heavy-tailed, and those of forget and retain set are correlated, as gradients are.
Everything is cut from pools at random places: this is cheap, and repetitions are too far apart for
any coder to find.
"""

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
SHARD_BYTES = 2 << 30
RATE = 1e-5  # the learning rate: the size of one step
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
NAMES = {BF16: "BF16", np.dtype(np.float16): "F16", F32: "F32"}
KINDS = ("base", "model", "tuned", "forget", "retain")

Shapes = dict[str, tuple[int, ...]]


def tensors_of(n_layers: int, hidden: int = HIDDEN) -> Shapes:
    """Names and shapes: 1.1 billion parameters in 22 layers, like TinyLlama."""
    wide, narrow = INTERMEDIATE * hidden // HIDDEN, hidden // 8
    vocabulary = VOCABULARY * hidden // HIDDEN
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.k_proj.weight": (narrow, hidden),
            layer + "self_attn.v_proj.weight": (narrow, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "mlp.gate_proj.weight": (wide, hidden),
            layer + "mlp.up_proj.weight": (wide, hidden),
            layer + "mlp.down_proj.weight": (hidden, wide),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


# A mixture of experts, and the dense model with as many parameters as a token meets in it.
MIXED_HIDDEN, EXPERT, EXPERTS, CHOSEN = 1024, 384, 128, 8


def mixed_of(n_layers: int, mixture: bool) -> Shapes:
    """Names and shapes like Qwen3-MoE's, or Qwen3's."""
    hidden, dense = MIXED_HIDDEN, EXPERT * CHOSEN
    shapes: Shapes = {"model.embed_tokens.weight": (8192, hidden)}
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.k_proj.weight": (hidden // 4, hidden),
            layer + "self_attn.v_proj.weight": (hidden // 4, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "self_attn.q_norm.weight": (64,),
            layer + "self_attn.k_norm.weight": (64,),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
        for e in range(EXPERTS if mixture else 1):
            mlp = layer + (f"mlp.experts.{e}." if mixture else "mlp.")
            wide = EXPERT if mixture else dense
            shapes |= {
                mlp + "gate_proj.weight": (wide, hidden),
                mlp + "up_proj.weight": (wide, hidden),
                mlp + "down_proj.weight": (hidden, wide),
            }
        if mixture:
            shapes[layer + "mlp.gate.weight"] = (EXPERTS, hidden)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (8192, hidden)}


def config_of_mixed(n_layers: int, mixture: bool) -> dict:
    name, kind = ("Qwen3MoeForCausalLM", "qwen3_moe") if mixture else ("Qwen3ForCausalLM", "qwen3")
    config = {
        "architectures": [name], "model_type": kind, "hidden_size": MIXED_HIDDEN, "vocab_size": 8192,
        "intermediate_size": EXPERT * CHOSEN, "num_hidden_layers": n_layers, "head_dim": 64,
        "num_attention_heads": MIXED_HIDDEN // 64, "num_key_value_heads": MIXED_HIDDEN // 256,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True,
               "moe_intermediate_size": EXPERT}  # fmt: skip
    return config | (experts if mixture else {})


def n_parameters_of(shapes: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def sized(n_parameters: int) -> tuple[int, int]:
    """The layers and hidden size for about that many parameters."""
    hidden = 2048 if n_parameters > 2.5e8 else 512 if n_parameters > 1e7 else 64
    one, two = (n_parameters_of(tensors_of(n, hidden)) for n in (1, 2))
    return max(1, 1 + round((n_parameters - one) / (two - one))), hidden


def config_of(n_layers: int, hidden: int = HIDDEN) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE * hidden // HIDDEN, "num_hidden_layers": n_layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY * hidden // HIDDEN,
    }  # fmt: skip


def adamw(rng: np.random.Generator, n: int, steps: int = 16) -> np.ndarray:
    """The sum of the steps, in units of the rate."""
    same = rng.standard_normal(n, F32) * np.float32(0.3)
    m, v, total = np.zeros((3, n), F32)
    for t in range(1, steps + 1):
        g = same + rng.standard_normal(n, F32)
        m += np.float32(0.1) * (g - m)
        v += np.float32(0.05) * (g * g - v)
        root = np.sqrt(v / np.float32(1 - 0.95**t)) + np.float32(1e-8)
        total += m / np.float32(1 - 0.9**t) / root
    return total


@functools.cache
def pools(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pools of normal numbers and of updates."""
    rng = np.random.default_rng(2601)
    return rng.standard_normal(n, F32), adamw(rng, n)


class Noise:
    """Random cuts of the pools."""

    def __init__(self, pool: int) -> None:
        self.rng, self.pool = np.random.default_rng(1012), pool
        self.normals, self.updates = pools(2 * pool)

    def cut(self, pool: np.ndarray, n: int) -> np.ndarray:
        at = int(self.rng.integers(self.pool))
        return pool[at : at + n]

    def chunk(self, n: int, rate: float) -> dict[str, np.ndarray]:
        """n parameters of every folder, in float32."""
        master = self.cut(self.normals, n) * np.float32(0.02)
        decayed = master * np.float32((1 - 0.01 * rate) ** 16)
        common = self.cut(self.normals, n) * np.float32(1.5) - np.float32(12)
        chunk = {"base": master}
        for kind in ("model", "tuned"):
            chunk[kind] = decayed - self.cut(self.updates, n) * np.float32(rate)
        for kind in ("forget", "retain"):
            spread = np.exp(common + np.float32(0.7) * self.cut(self.normals, n))
            chunk[kind] = self.cut(self.normals, n) * spread
        return chunk


class Folder:
    """A checkpoint folder, written tensor by tensor."""

    def __init__(self, path: Path, shapes: Shapes, dtype: np.dtype) -> None:
        path.mkdir(parents=True)
        self.path, self.dtype, self.file = path, dtype, None
        self.metadata = {"perta.stat": "mean"} if path.name in ("forget", "retain") else {}
        self.shards: list[Shapes] = [{}]
        size = 0
        for name, shape in shapes.items():
            n = int(np.prod(shape)) * dtype.itemsize
            if size + n > SHARD_BYTES and size:
                self.shards.append({})
                size = 0
            self.shards[-1][name] = shape
            size += n
        self.names = [f"model-{i + 1:05}-of-{len(self.shards):05}.safetensors"
                      for i in range(len(self.shards))]  # fmt: skip
        self.first = {next(iter(shard)): i for i, shard in enumerate(self.shards)}
        index = {name: file for file, part in zip(self.names, self.shards, strict=True) for name in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    def begin(self, name: str) -> None:
        """Append the next tensor."""
        if name in self.first:
            i = self.first[name]
            self._begin(self.names[i], self.shards[i])

    def write(self, part: np.ndarray) -> None:
        part.astype(self.dtype).tofile(self.file)

    def _begin(self, file: str, shard: Shapes) -> None:
        at, header = 0, {"__metadata__": {"format": "pt"} | self.metadata}
        for name, shape in shard.items():
            end = at + int(np.prod(shape)) * self.dtype.itemsize
            header[name] = {"dtype": NAMES[self.dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.close()
        self.file = (self.path / file).open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        if self.file:
            self.file.close()


def write(path: Path, shapes: Shapes, kinds: tuple[str, ...] = KINDS, rate: float = RATE,
          dtype: np.dtype = BF16) -> None:  # fmt: skip
    """Make the set, unless it exists."""
    done = path / "done.json"
    what = json.dumps([shapes, rate, NAMES[dtype], kinds])
    if done.exists() and done.read_text() == what:
        return
    folders = {kind: Folder(path / kind, shapes, dtype if i < 3 else F32)
               for i, kind in enumerate(KINDS) if kind in kinds}  # fmt: skip
    pool = min(1 << 24, max(1 << 16, n_parameters_of(shapes)))
    noise = Noise(pool)
    for name, shape in shapes.items():
        for folder in folders.values():
            folder.begin(name)
        left = int(np.prod(shape))
        while left:
            n = min(left, pool)
            for kind, part in noise.chunk(n, rate).items():
                if kind in folders:
                    folders[kind].write(part)
            left -= n
    for folder in folders.values():
        folder.close()
    done.write_text(what)


def make(path: Path, n_layers: int, hidden: int = HIDDEN, importance: bool = True) -> int:
    """Make a Llama's set. Returns the number of parameters of a model."""
    shapes = tensors_of(n_layers, hidden)
    write(path, shapes, KINDS if importance else KINDS[:3])
    for kind in KINDS[:3]:
        (path / kind / "config.json").write_text(json.dumps(config_of(n_layers, hidden)))
    return n_parameters_of(shapes)
