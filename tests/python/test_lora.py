"""`perta unlearn --tuned` accepts a PEFT LoRA adapter: tau = scaling * (B A), to the bit.

Adapters are written here by hand, in the layout of PEFT's save_pretrained."""

import json
import math
import os

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from conftest import part
from reference import (
    BF16,
    CHUNK,
    EDITABLE,
    Rule,
    bits,
    edit,
    folder_bytes,
    kept,
    lora_tau,
    read_folder,
    write_folder,
)
from test_limits import evict, peak_mib, sanitized
from test_unlearn import cast, check_folder, instruction_sets, run_on
from verbs import stop_at

PREFIX = "base_model.model."
CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "../../etc/passwd",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.17.1",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "k_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
# Grouped-query attention, an odd shape, one row, one column, more columns than a tile.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 48),
    "model.layers.0.self_attn.k_proj": (16, 48),
    "model.layers.0.mlp.down_proj": (37, 1027),
    "model.layers.1.self_attn.q_proj": (1, 129),
    "model.layers.1.self_attn.k_proj": (131, 1),
}
NORM = "model.norm.weight"


def write_adapter(folder, tensors, text=None, **config):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(CONFIG | config, indent=2) if text is None else text
    (folder / "adapter_config.json").write_text(text)


def pair(rng, module, shape, r, dtype="F32", ending=".weight"):
    """A and B of one module, under PEFT's names."""
    a, b = rng.standard_normal((r, shape[1])), rng.standard_normal((shape[0], r)) / 8
    return {
        f"{PREFIX}{module}.lora_A{ending}": cast(a, dtype),
        f"{PREFIX}{module}.lora_B{ending}": cast(b, dtype),
    }


def factors(adapter, module):
    """A and B."""
    return [
        next(x for name, x in adapter.items() if name.startswith(f"{PREFIX}{module}.{kind}"))
        for kind in ("lora_A", "lora_B")
    ]


def make_model(rng, dtype, shapes=SHAPES):
    """A model and importances, with a tensor that no adapter changes and one of integers."""
    model = {f"{m}.weight": cast(rng.standard_normal(s), dtype) for m, s in shapes.items()}
    model |= {NORM: cast(rng.standard_normal(48), dtype), "ids": np.arange(7)}
    roles = {"model": model}
    for role in ("forget", "retain"):
        roles[role] = {
            name: cast(rng.standard_normal(x.shape), "F32")
            for name, x in model.items()
            if name not in (NORM, "ids")
        }
    return roles


def write_roles(folder, roles):
    for role, tensors in roles.items():
        metadata = {"perta.stat": "mean"} if role in ("forget", "retain") else {"format": "pt"}
        write_folder(folder / role, tensors, 2 if role == "model" else 1, metadata)


GRAD = Rule("grad")


def flags(rule=GRAD, alphas=("1",)):
    words = "unlearn --model model --tuned adapter --patch p --out m --method".split()
    words += [rule.method, f"--alpha={','.join(alphas)}"]
    words += {"constant": ["--weight", rule.weight], "random": ["--seed", rule.seed]}.get(
        rule.method, []
    )
    return words + ("--forget forget --retain retain".split() if rule.needs_importance else [])


def want_of(rule, alpha, roles, taus):
    """Every tensor as it must come out: those that taus names are edited, all others unchanged."""
    out = {}
    for name, theta in roles["model"].items():
        if name not in taus:
            out[name] = kept(theta)
            continue
        g = [roles[r][name] if rule.needs_importance else None for r in ("forget", "retain")]
        out[name] = edit(rule, alpha, name, theta, taus[name], np.zeros_like(taus[name]), *g)
    return out


def taus_of(adapter, modules, scaling):
    return {f"{m}.weight": lora_tau(*factors(adapter, m), scaling) for m in modules}


# --- the numbers


RULES = [GRAD, Rule("tv"), Rule("random", seed=9)]
EVERY_WAY = [(rule, dtype, r) for rule in RULES for dtype in EDITABLE for r in (1, 5, 64)]


@pytest.mark.parametrize(
    "rule, dtype, r", part(EVERY_WAY, sanitized=8), ids=lambda x: getattr(x, "method", x)
)
def test_an_adapter_gives_the_bits_of_numpy(perta, tmp_path, rule, dtype, r):
    rng = np.random.default_rng(r)
    roles = make_model(rng, dtype)
    adapter = {}
    modules = list(SHAPES)[:4]
    for module, kind in zip(modules, ("F32", "BF16", "F16", "F32"), strict=True):
        adapter |= pair(rng, module, SHAPES[module], r, kind)
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", adapter, r=r, lora_alpha=10)
    alphas = ("0.3", "-2")
    perta(*flags(rule, alphas))
    for alpha in alphas:
        want = want_of(rule, float(alpha), roles, taus_of(adapter, modules, 10 / r))
        check_folder(tmp_path, alpha, want)


def test_the_reference_is_the_matrix_product():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((32, 200)), rng.standard_normal((100, 32))
    tau = lora_tau(a.astype(np.float32), b.astype(np.float32), 0.5)
    assert np.allclose(tau, 0.5 * b @ a, rtol=0, atol=2e-5)


def test_a_float32_model_ends_where_a_merge_by_pytorch_leads(perta, tmp_path):
    """merge_and_unload in float32, then unlearning from the merged checkpoint."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    roles = make_model(rng, "F32")
    base = {n: cast(rng.standard_normal(x.shape), "F32") for n, x in roles["model"].items()}
    base["ids"] = roles["model"]["ids"]
    adapter, tuned = {}, dict(base)
    for module, shape in SHAPES.items():
        adapter |= pair(rng, module, shape, 4)
        a, b = (torch.from_numpy(x) for x in factors(adapter, module))
        delta = (b @ a) * (16 / 4)
        tuned[f"{module}.weight"] = (torch.from_numpy(base[f"{module}.weight"]) + delta).numpy()
    write_roles(tmp_path, roles | {"base": base, "tuned": tuned})
    write_adapter(tmp_path / "adapter", adapter)
    perta(*flags())
    merged = [word if word != "adapter" else "tuned" for word in flags()]
    perta(*merged, "--base", "base", "--patch", "p2", "--out", "m2", "--missing", "keep")
    for path in (tmp_path / "m").glob("*.safetensors"):
        have = safetensors.numpy.load_file(path)
        want = safetensors.numpy.load_file(tmp_path / "m2" / path.name)
        for name in have:
            assert np.allclose(have[name], want[name], rtol=0, atol=1e-5), name


def test_what_merging_would_round_away_is_kept(perta, tmp_path):
    """Changes of less than half a unit in the last place of bfloat16: a merged checkpoint loses
    all of them."""
    module, shape = "model.layers.0.self_attn.q_proj", (64, 48)
    theta = cast(np.ones(shape), "BF16")
    rng = np.random.default_rng(5)
    adapter = pair(rng, module, shape, 4)
    adapter = {name: np.sign(x).astype(np.float32) / 128 for name, x in adapter.items()}
    tau = lora_tau(*factors(adapter, module), 4)
    assert np.abs(tau).max() < 2.0**-9 and np.count_nonzero(tau) > 1000
    merged = cast(np.float32(1) + tau, "BF16")
    assert np.array_equal(merged, theta)
    roles = {"model": {f"{module}.weight": theta}}
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", adapter)
    perta(*flags(Rule("tv"), ["8"]))
    want = want_of(Rule("tv"), 8, roles, {f"{module}.weight": tau})
    check_folder(tmp_path, None, want)
    assert want[f"{module}.weight"].counts["changed"] > 1000


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_alphas_and_rslora(perta, tmp_path, use_rslora):
    """Patterns are module names, whole or their end; the first match counts."""
    rng = np.random.default_rng(6)
    roles = make_model(rng, "F32")
    rank = {"^model.layers.0.self_attn.q_proj": 2, r"layers\.1\.self_attn\.q_proj": 7, "proj": 1}
    alpha = {"k_proj": 3.5, "model.layers.0.self_attn.k_proj": 99, "down.proj$": 5}
    of = {  # module: r, alpha
        "model.layers.0.self_attn.q_proj": (2, 16),
        "model.layers.0.self_attn.k_proj": (4, 3.5),
        "model.layers.0.mlp.down_proj": (4, 5),
        "model.layers.1.self_attn.q_proj": (7, 16),
    }
    adapter, taus = {}, {}
    for module, (r, lora_alpha) in of.items():
        adapter |= pair(rng, module, SHAPES[module], r)
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        taus |= taus_of(adapter, [module], scaling)
    write_roles(tmp_path, roles)
    write_adapter(
        tmp_path / "adapter",
        adapter,
        use_rslora=use_rslora,
        rank_pattern=rank,
        alpha_pattern=alpha,
    )
    perta(*flags())
    check_folder(tmp_path, None, want_of(GRAD, 1, roles, taus))


# --- which tensors


@pytest.mark.parametrize("ending", [".weight", ".default.weight"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_names_with_and_without_what_peft_puts_around_them(perta, tmp_path, ending, prefix):
    rng = np.random.default_rng(7)
    roles = make_model(rng, "BF16")
    module = next(iter(SHAPES))
    adapter = pair(rng, module, SHAPES[module], 4, ending=ending)
    taus = taus_of(adapter, [module], 4)
    write_roles(tmp_path, roles)
    renamed = {prefix + name.removeprefix(PREFIX): x for name, x in adapter.items()}
    write_adapter(tmp_path / "adapter", renamed)
    perta(*flags())
    check_folder(tmp_path, None, want_of(GRAD, 1, roles, taus))


def embedding_pair(rng, module, shape, r):
    """Transposed: A is (r, vocabulary), B is (hidden, r)."""
    return {
        f"{PREFIX}{module}.lora_embedding_A": cast(rng.standard_normal((r, shape[0])), "BF16"),
        f"{PREFIX}{module}.lora_embedding_B": cast(rng.standard_normal((shape[1], r)), "F32"),
    }


EMBED, HEAD = "model.embed_tokens", "lm_head"


def test_the_lora_of_an_embedding_is_transposed(perta, tmp_path):
    """More rows than a chunk, and PEFT's copy of the embedding beside it."""
    rng = np.random.default_rng(8)
    shape = (9001, 123)
    roles = make_model(rng, "BF16", {EMBED: shape})
    adapter = embedding_pair(rng, EMBED, shape, 3)
    tau = np.ascontiguousarray(lora_tau(*adapter.values(), 16 / 3).T)
    taus = {f"{EMBED}.weight": tau}
    adapter[f"{PREFIX}{EMBED}.base_layer.weight"] = roles["model"][f"{EMBED}.weight"]
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", adapter, r=3)
    perta(*flags())
    check_folder(tmp_path, None, want_of(GRAD, 1, roles, taus))


TIED = json.dumps({"tie_word_embeddings": True})


@pytest.mark.parametrize("stored", [[EMBED], [HEAD], [EMBED, HEAD]])
def test_tied_embeddings_held_whole_and_the_same_are_one(perta, tmp_path, stored):
    """What ensure_weight_tying writes: both names, with the same bytes."""
    rng = np.random.default_rng(9)
    roles = make_model(rng, "F32", dict.fromkeys(stored, (100, 12)))
    for role in ("model", "forget", "retain"):  # as a tied model stores them
        roles[role] |= {f"{name}.weight": roles[role][f"{stored[0]}.weight"] for name in stored}
    base, tuned = (cast(rng.standard_normal((100, 12)), "F32") for _ in range(2))
    write_roles(tmp_path, roles | {"base": roles["model"] | {f"{name}.weight": base for name in stored}})
    write_adapter(tmp_path / "adapter", {f"{PREFIX}{name}.weight": tuned for name in (EMBED, HEAD)})
    (tmp_path / "model/config.json").write_text(TIED)
    (tmp_path / "base/config.json").write_text(TIED)
    perta(*flags(), "--base", "base")
    want = want_of(GRAD, 1, roles, {})
    for name in stored:
        name = f"{name}.weight"
        g = (roles[role][name] for role in ("forget", "retain"))
        want[name] = edit(GRAD, 1, name, roles["model"][name], tuned, base, *g)
    check_folder(tmp_path, None, want)


@pytest.mark.parametrize("shape", [(101, 12), (99, 12), (1200,)])
def test_tied_embeddings_of_different_shapes_are_refused(perta, tmp_path, shape):
    """Otherwise the one that the adapter does not name would be read beyond its end."""
    rng = np.random.default_rng(9)
    write_roles(tmp_path, make_model(rng, "F32", {EMBED: shape, HEAD: (100, 12)}))
    write_adapter(tmp_path / "adapter", pair(rng, HEAD, (100, 12), 4))
    (tmp_path / "model/config.json").write_text(TIED)
    message = perta(*flags(), check=3).stderr
    assert f"tensors {EMBED}.weight and {HEAD}.weight differ" in message


def changes(rng, kinds):
    """An adapter with a LoRA ("lora") or whole tensors for embedding and head."""
    adapter = {}
    for name, kind in zip((EMBED, HEAD), kinds, strict=True):
        if kind == "lora":
            adapter |= (embedding_pair if name == EMBED else pair)(rng, name, (100, 12), 4)
        elif kind:
            adapter[f"{PREFIX}{name}.weight"] = cast(rng.standard_normal((100, 12)), "F32")
    return adapter


KINDS = [(e, h) for e in ("lora", "whole", None) for h in ("lora", "whole", None) if e or h]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_what_would_untie_embeddings_is_refused(perta, tmp_path, kinds):
    """PEFT's live adapter changes one of the two, or both in different ways; one matrix cannot
    represent that."""
    rng = np.random.default_rng(9)
    roles = make_model(rng, "F32", {EMBED: (100, 12)})
    write_roles(tmp_path, roles | {"base": roles["model"]})
    write_adapter(tmp_path / "adapter", changes(rng, kinds))
    (tmp_path / "model/config.json").write_text(TIED)
    before = folder_bytes(tmp_path)
    message = perta(*flags(), "--base", "base", check=3).stderr
    assert f"{EMBED}.weight" in message and f"{HEAD}.weight" in message and "ties" in message
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_an_architecture_may_tie_what_config_does_not_say(perta, tmp_path, kind):
    """Gemma and GPT-2 leave tie_word_embeddings out and store no head."""
    rng = np.random.default_rng(9)
    roles = make_model(rng, "F32", {EMBED: (100, 12)})
    write_roles(tmp_path, roles | {"base": roles["model"]})
    write_adapter(tmp_path / "adapter", changes(rng, (kind, None)))
    config = {"architectures": ["Gemma2ForCausalLM"]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert f"ties to {HEAD}.weight" in perta(*flags(), "--base", "base", check=3).stderr
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    perta(*flags(), "--base", "base")


def test_tensors_that_the_adapter_holds_whole_need_the_base(perta, tmp_path):
    """modules_to_save, and biases under both names."""
    rng = np.random.default_rng(10)
    roles = make_model(rng, "BF16", {EMBED: (50, 48)} | SHAPES)
    bias = "model.layers.0.self_attn.q_proj.bias"
    roles["model"] |= {bias: cast(rng.standard_normal(64), "BF16")}
    whole = {f"{EMBED}.weight": "F32", bias: "BF16", NORM: "F16"}
    for role in ("forget", "retain"):
        roles[role] |= {
            name: cast(rng.standard_normal(roles["model"][name].shape), "F32") for name in whole
        }
    base = {n: cast(rng.standard_normal(x.shape), "BF16") for n, x in roles["model"].items()}
    module = list(SHAPES)[2]
    adapter = pair(rng, module, SHAPES[module], 4)
    want = want_of(GRAD, 1, roles, taus_of(adapter, [module], 4))
    for name, dtype in whole.items():
        tuned = cast(rng.standard_normal(base[name].shape), dtype)
        inner = name.replace(".bias", ".base_layer.bias")
        adapter[PREFIX + inner] = tuned
        operands = (roles[role][name] for role in ("forget", "retain"))
        want[name] = edit(GRAD, 1, name, roles["model"][name], tuned, base[name], *operands)
    write_roles(tmp_path, roles | {"base": base})
    write_adapter(tmp_path / "adapter", adapter, bias="all", modules_to_save=["embed_tokens"])
    message = perta(*flags(), check=2).stderr
    assert "--base DIR is needed" in message and f"stores {PREFIX}" in message
    perta(*flags(), "--base", "base")
    check_folder(tmp_path, None, want)


def test_a_base_is_checked_but_not_read(perta, tmp_path):
    rng = np.random.default_rng(11)
    roles = make_model(rng, "BF16")
    adapter = {}
    for module in SHAPES:
        adapter |= pair(rng, module, SHAPES[module], 4)
    base = roles["model"] | {
        f"{m}.weight": cast(np.full(s, np.nan), "BF16") for m, s in SHAPES.items()
    }
    write_roles(tmp_path, roles | {"base": base})
    write_adapter(tmp_path / "adapter", adapter)
    perta(*flags())
    want = folder_bytes(tmp_path / "m")
    perta(*flags(), "--base", "base", "--force")
    assert folder_bytes(tmp_path / "m") == want
    record = json.loads((tmp_path / "p/manifest.json").read_text())
    assert [shard["xxh3_128"] for shard in record["inputs"]["base"]["shards"]] == [None]
    for change, text in (
        ({"model.layers.0.mlp.down_proj.weight": np.zeros(3)}, "down_proj"),
        ({"model.extra.weight": np.zeros(3)}, "model.extra.weight"),
    ):
        write_folder(tmp_path / "other", base | change)
        assert text in perta(*flags(), "--base", "other", "--force", check=3).stderr
        for path in (tmp_path / "other").iterdir():
            path.unlink()
        (tmp_path / "other").rmdir()


def test_globs_and_missing_importance_hold_for_adapters(perta, tmp_path):
    rng = np.random.default_rng(12)
    roles = make_model(rng, "BF16")
    modules = list(SHAPES)[:3]
    adapter = {}
    for module in modules:
        adapter |= pair(rng, module, SHAPES[module], 4)
    taus = taus_of(adapter, modules, 4)
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", adapter)
    perta(*flags(), "--exclude", "*.k_proj.*")
    del taus["model.layers.0.self_attn.k_proj.weight"]
    check_folder(tmp_path, None, want_of(GRAD, 1, roles, taus))
    del roles["forget"]["model.layers.0.mlp.down_proj.weight"]
    (tmp_path / "forget/model.safetensors").unlink()
    (tmp_path / "forget").rmdir()
    write_folder(tmp_path / "forget", roles["forget"], 1, {"perta.stat": "mean"})
    words = [*flags(), "--exclude", "*.k_proj.*", "--force"]
    assert "no importance for tensor" in perta(*words, check=3).stderr
    want = want_of(GRAD, 1, roles, {n: taus[n] for n in list(taus)[:1]})
    perta(*words, "--missing", "keep")
    check_folder(tmp_path, None, want)
    name = "model.layers.0.mlp.down_proj.weight"
    zeros = np.zeros_like(taus[name])
    want[name] = edit(Rule("tv"), 1, name, roles["model"][name], taus[name], zeros)
    perta(*words, "--missing", "tv")
    check_folder(tmp_path, None, want)


# --- numbers that are not finite

Q = "model.layers.0.self_attn.q_proj"
PLACES = {  # an element of A or B, and the parameters that depend on it
    "lora_A": (2 * 48 + 5, np.s_[:, 5]),
    "lora_B": (7 * 4 + 1, np.s_[7, :]),
}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("factor", PLACES)
def test_a_number_that_is_not_finite_has_its_place_in_a_or_b(perta, tmp_path, factor, dtype, value):
    rng = np.random.default_rng(13)
    roles = make_model(rng, "BF16")
    adapter = pair(rng, Q, (64, 48), 4, dtype)
    elem, reached = PLACES[factor]
    name = f"{PREFIX}{Q}.{factor}.weight"
    adapter[name] = adapter[name].copy()
    adapter[name].reshape(-1)[elem] = value
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", adapter)
    message = perta(*flags(), check=3).stderr
    assert f"adapter_model.safetensors: tensor {name}, element {elem} (byte " in message
    assert "--nonfinite keep" in message and not (tmp_path / "p").exists()
    perta(*flags(), "--nonfinite", "keep")
    tau = lora_tau(*factors(adapter, Q), 4)
    assert np.array_equal(np.argwhere(~np.isfinite(tau)).shape[0], tau[reached].size)
    want = want_of(GRAD, 1, roles, {f"{Q}.weight": tau})
    assert want[f"{Q}.weight"].counts["nonfinite"] == tau[reached].size
    check_folder(tmp_path, None, want)


def test_the_place_in_the_lora_of_an_embedding(perta, tmp_path):
    rng = np.random.default_rng(14)
    write_roles(tmp_path, make_model(rng, "BF16", {EMBED: (100, 12)}))
    for i, (kind, elem) in enumerate((("A", 3 * 100 + 42), ("B", 5 * 4 + 2))):
        adapter = embedding_pair(rng, EMBED, (100, 12), 4)
        name = f"{PREFIX}{EMBED}.lora_embedding_{kind}"
        adapter[name] = adapter[name].copy()
        adapter[name].reshape(-1)[elem] = np.inf
        write_adapter(tmp_path / f"adapter{i}", adapter)
        words = [f"adapter{i}" if word == "adapter" else word for word in flags()]
        assert f"tensor {name}, element {elem} (byte " in perta(*words, check=3).stderr


def test_a_product_beyond_float32_is_named_as_one(perta, tmp_path):
    rng = np.random.default_rng(15)
    write_roles(tmp_path, make_model(rng, "BF16"))
    adapter = {
        name: np.full(x.shape, 1e30, np.float32) for name, x in pair(rng, Q, (64, 48), 4).items()
    }
    write_adapter(tmp_path / "adapter", adapter)
    message = perta(*flags(), check=3).stderr
    assert "lora_A.weight and " in message and f"element 0 of {Q}.weight overflows" in message


# --- what is refused


def good(**config):
    return json.dumps(CONFIG | config)


CONFIGS = {
    "not json": ("{", "adapter_config.json: byte"),
    "empty": ("", "not valid JSON"),
    "an array": ("[]", "not an object"),
    "a key twice": (good()[:-1] + ', "r": 4}', "duplicate"),
    "a number too large": (good(r=0).replace('"r": 0', '"r": 99999999999999999999'), "not valid"),
    "another kind": (good(peft_type="ADALORA"), "peft_type"),
    "no kind": (good(peft_type=None), "peft_type"),
    "kind is a number": (good(peft_type=1), "peft_type"),
    "r is 0": (good(r=0), "r: a whole number of at least 1"),
    "r is negative": (good(r=-4), "r: a whole number of at least 1"),
    "r is a string": (good(r="4"), "r: a whole number of at least 1"),
    "r is a fraction": (good(r=4.5), "r: a whole number of at least 1"),
    "r is true": (good(r=True), "r: a whole number of at least 1"),
    "r is huge": (good(r=2**62), "its rank is 4611686018427387904 in adapter_config.json"),
    "r is another": (good(r=8), "shape [4, 48], but [8, 48] is needed"),
    "alpha is a string": (good(lora_alpha="16"), "lora_alpha: a number"),
    "alpha is missing": (good(lora_alpha=None), "lora_alpha: a number"),
    "alpha is huge": (good(lora_alpha=1e300), "lora_alpha: the scaling overflows float32"),
    "rslora is a string": (good(use_rslora="no"), "use_rslora: true or false"),
    "dora": (good(use_dora=True), "use_dora: is set, which perta does not support"),
    "dora is a string": (good(use_dora="false"), "use_dora: is set"),
    "transposed": (good(fan_in_fan_out=True), "fan_in_fan_out: is set"),
    "layers twice": (good(layer_replication=[[0, 4], [2, 5]]), "layer_replication: is set"),
    "bias of lora": (good(lora_bias=True), "lora_bias: is set"),
    "tokens": (good(trainable_token_indices=[1]), "trainable_token_indices: is set"),
    "pissa": (good(init_lora_weights="pissa_niter_16"), "init_lora_weights: an init"),
    "init is a number": (good(init_lora_weights=3), "init_lora_weights: an init"),
    "bias": (good(bias="some"), "bias: none, all or lora_only"),
    "bias is a number": (good(bias=1), "bias: none, all or lora_only"),
    "patterns are a list": (good(rank_pattern=["q_proj"]), "rank_pattern: not an object"),
    "a pattern of rank 0": (good(rank_pattern={"q_proj": 0}), '"q_proj": a whole number of at least 1'),
    "a pattern without alpha": (good(alpha_pattern={"q": None}), '"q": a number is needed'),
    "a real pattern": (good(alpha_pattern={"(a|b)+c": 1}), '"(a|b)+c": module names are supported'),
    "an empty pattern": (good(rank_pattern={"": 1}), '"": module names are supported'),
    "a pattern of anchors": (good(rank_pattern={"^$": 1}), '"^$": module names are supported'),
    "a pattern that ends in a backslash": (good(rank_pattern={"a\\": 1}), "module names are supported"),
    "a pattern of another rank": (good(rank_pattern={"q_proj": 3}), "but [3, 48] is needed"),
}


@pytest.mark.parametrize("text, message", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_with_its_key(perta, tmp_path, text, message):
    rng = np.random.default_rng(16)
    write_roles(tmp_path, make_model(rng, "BF16"))
    write_adapter(tmp_path / "adapter", pair(rng, Q, (64, 48), 4), text)
    before = folder_bytes(tmp_path)
    refusal = perta(*flags(), check=3).stderr
    assert message in refusal and "adapter" in refusal
    assert folder_bytes(tmp_path) == before


def test_keys_that_are_not_known_are_noted(perta, tmp_path):
    rng = np.random.default_rng(17)
    write_roles(tmp_path, make_model(rng, "BF16"))
    write_adapter(
        tmp_path / "adapter", pair(rng, Q, (64, 48), 4), use_news=True, other=None, more={}
    )
    notes = json.loads(perta(*flags(), "--json").stdout)["notes"]
    assert len(notes) == 1 and "unknown key use_news" in notes[0]


def zeros(*shape):
    return np.zeros(shape, np.float32)


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
TENSORS = {
    "no B": ({B: None}, f"{A}: no matching lora_B"),
    "no A": ({A: None}, f"{B}: no matching lora_A"),
    "A too narrow": ({A: zeros(4, 47)}, f"{A}: shape [4, 47], but [4, 48] is needed"),
    "A transposed": ({A: zeros(48, 4)}, f"{A}: shape [48, 4], but [4, 48] is needed"),
    "A of another rank": ({A: zeros(5, 48)}, f"{A}: shape [5, 48], but [4, 48] is needed"),
    "B too short": ({B: zeros(63, 4)}, f"{B}: shape [63, 4], but [64, 4] is needed"),
    "A of a convolution": ({A: zeros(4, 48, 1, 1)}, f"{A}: shape [4, 48, 1, 1], but"),
    "A is empty": ({A: zeros(0, 48), B: zeros(64, 0)}, f"{A}: shape [0, 48], but"),
    "integers": ({A: np.zeros((4, 48), np.int32)}, f"{A} is I32; BF16, F16 or F32 needed"),
    "doubles": ({B: np.zeros((64, 4))}, f"{B} is F64; BF16, F16 or F32 needed"),
    "of another model": (
        {
            f"{PREFIX}h.0.attn.lora_A.weight": zeros(4, 4),
            f"{PREFIX}h.0.attn.lora_B.weight": zeros(4, 4),
        },
        f"tensor {PREFIX}h.0.attn.lora_A.weight: h.0.attn.weight is not in --model",
    ),
    "a path": (
        {
            "../../etc/passwd.lora_A.weight": zeros(4, 4),
            "../../etc/passwd.lora_B.weight": zeros(4, 4),
        },
        "../../etc/passwd.weight is not in --model",
    ),
    "of a vector": (
        {
            f"{PREFIX}model.norm.lora_A.weight": zeros(4, 48),
            f"{PREFIX}model.norm.lora_B.weight": zeros(1, 4),
        },
        "model.norm.weight is not a matrix",
    ),
    "of integers": (
        {f"{PREFIX}ids": zeros(7)},
        "ids is I64 in --model; BF16, F16, F32 or F64 needed",
    ),
    "DoRA's": (
        {f"{PREFIX}{Q}.lora_magnitude_vector": zeros(64)},
        f"{PREFIX}{Q}.lora_magnitude_vector: an unknown kind of adapter tensor",
    ),
    "bias of B": ({f"{PREFIX}{Q}.lora_B.bias": zeros(64)}, "an unknown kind of adapter tensor"),
    "the same twice": (
        {f"{PREFIX}{Q}.lora_A.default.weight": zeros(4, 48)},
        "are duplicates",
    ),
    "the same with and without prefix": ({f"{Q}.lora_A.weight": zeros(4, 48)}, "are duplicates"),
    "embedding and matrix": (
        {f"{PREFIX}{Q}.lora_embedding_A": zeros(4, 48)},
        f"{PREFIX}{Q}.lora_embedding_A changes the same weight in another way",
    ),
    "whole and LoRA": (
        {f"{PREFIX}{Q}.weight": zeros(64, 48)},
        f"{PREFIX}{Q}.weight changes the same weight in another way",
    ),
    "a copy of what has no LoRA": (
        {f"{PREFIX}model.layers.0.mlp.down_proj.base_layer.weight": zeros(37, 1027)},
        "no matching lora_A and lora_B",
    ),
    "a copy of another shape": (
        {f"{PREFIX}{Q}.base_layer.weight": zeros(65, 48)},
        "shape [64, 48] in --model, [65, 48] in --tuned",
    ),
    "only a prefix": ({PREFIX: zeros(1)}, f"tensor {PREFIX}:  is not in --model"),
    "only an ending": (
        {".lora_A.weight": zeros(4, 4), ".lora_B.weight": zeros(4, 4)},
        ".weight is not in --model",
    ),
}


@pytest.mark.parametrize("tensors, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(perta, tmp_path, tensors, message):
    rng = np.random.default_rng(18)
    write_roles(tmp_path, make_model(rng, "BF16"))
    adapter = pair(rng, Q, (64, 48), 4) | tensors
    adapter = {name: x for name, x in adapter.items() if x is not None}
    write_adapter(tmp_path / "adapter", adapter)
    refusal = perta(*flags(), check=3).stderr
    assert message in refusal and "adapter" in refusal
    assert not (tmp_path / "p").exists()


def test_folders_that_are_no_adapters_or_not_whole(perta, tmp_path):
    rng = np.random.default_rng(19)
    roles = make_model(rng, "BF16")
    write_roles(tmp_path, roles)
    write_adapter(tmp_path / "adapter", pair(rng, Q, (64, 48), 4))
    words = [word if word != "model" else "adapter" for word in flags()]
    assert "adapter: a PEFT adapter" in perta(*words, check=3).stderr
    said = perta("inspect", "adapter", "--tensors").stdout
    assert said.startswith("adapter: 448 parameters") and "  lora_alpha 16\n" in said and A in said
    words = "diff adapter adapter --patch d".split()
    assert "perta unlearn takes it as --tuned" in perta(*words, check=3).stderr
    shard = tmp_path / "adapter/adapter_model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "adapter_model.safetensors: tensor" in perta(*flags(), check=3).stderr
    shard.unlink()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(whole)
    assert "no adapter_model.safetensors beside" in perta(*flags(), check=3).stderr
    (tmp_path / "far.safetensors").write_bytes(whole)
    shard.symlink_to(tmp_path / "far.safetensors")
    assert "outside its folder" in perta(*flags(), check=3).stderr
    shard.unlink()
    os.mkfifo(shard)
    assert "not a regular file" in perta(*flags(), check=3).stderr


# --- the record


def test_the_record_says_what_the_adapter_was(perta, tmp_path):
    rng = np.random.default_rng(20)
    write_roles(tmp_path, make_model(rng, "BF16"))
    write_adapter(tmp_path / "adapter", pair(rng, Q, (64, 48), 4), alpha_pattern={"q_proj": 2.5})
    perta(*flags())
    record = json.loads((tmp_path / "p/manifest.json").read_text())
    shard = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    assert record["inputs"].keys() == {"model", "tuned", "forget", "retain"}
    assert record["inputs"]["tuned"]["shards"] == [
        {
            "name": "adapter_model.safetensors",
            "bytes": len(shard),
            "xxh3_128": xxhash.xxh3_128_hexdigest(shard),
        }
    ]
    assert record["recipe"]["tuned"] == "lora"
    assert record["recipe"]["lora"] == {
        "r": 4,
        "lora_alpha": 16,
        "alpha_pattern": {"q_proj": 2.5},
    }
    actions = {tensor["name"]: tensor["action"] for tensor in record["tensors"]}
    assert actions[f"{Q}.weight"] == "edited" and actions[NORM] == "kept: not in the adapter"


# --- the same bytes, whatever runs


def test_the_bytes_are_the_same_whatever_runs(perta, tmp_path):
    """Chunks that begin and end within a row, many small tensors, some stored whole, every
    instruction set."""
    rng = np.random.default_rng(21)
    shapes = SHAPES | {EMBED: (2100, 1003), "wide": (3, CHUNK // 2 + 99)}
    shapes |= {f"small.{i}": (3, 5) for i in range(60)}
    roles = make_model(rng, "BF16", shapes)
    adapter = embedding_pair(rng, EMBED, shapes[EMBED], 8)
    for module, shape in shapes.items():
        if module != EMBED:
            adapter |= pair(rng, module, shape, 8, "BF16")
    for i in range(0, 60, 7):
        whole = f"small.{i}.weight"
        del adapter[f"{PREFIX}small.{i}.lora_A.weight"], adapter[f"{PREFIX}small.{i}.lora_B.weight"]
        adapter[PREFIX + whole] = cast(rng.standard_normal((3, 5)), "F32")
    write_roles(tmp_path, roles | {"base": make_model(rng, "BF16", shapes)["model"]})
    write_adapter(tmp_path / "adapter", adapter, r=8)
    command = [*flags(GRAD, ["0.7"]), "--base", "base"]
    perta(*command)
    loras = [m for m in shapes if f"{PREFIX}{m}.lora_A.weight" in adapter]
    taus = taus_of(adapter, loras, 2)
    a, b = (adapter[f"{PREFIX}{EMBED}.lora_embedding_{kind}"] for kind in "AB")
    taus[f"{EMBED}.weight"] = np.ascontiguousarray(lora_tau(a, b, 2).T)
    have = read_folder(tmp_path / "m")
    for name, edited in want_of(GRAD, 0.7, roles, taus).items():
        if PREFIX + name not in adapter:
            assert np.array_equal(bits(have[name]), bits(edited.out)), name
    want = folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")
    isas = instruction_sets()
    for i, memory in enumerate(["least", "200M", "least", "1G", "least", "1G"]):
        machine = {
            "isa": isas[i % len(isas)],
            "depth": (1, 8)[i % 2],
            "threads": (1, 4, 2)[i % 3],
            "memory": memory,
            "io": ("pread", "direct", "mmap")[(i + i // 3) % 3],
        }
        if machine["io"] == "direct":
            evict(tmp_path)
        run_on(perta, machine, *command, "--force")
        have = folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")
        assert have == want, machine


def make_big(path, n_rows):
    """A head with a LoRA of rank 64; B takes 256 bytes per row in float32."""
    rng = np.random.default_rng(22)
    shape, r = (n_rows, 128), 64
    head = rng.standard_normal(shape, np.float32).astype(BF16)
    write_folder(path / "model", {f"{HEAD}.weight": head})
    adapter = {
        f"{PREFIX}{HEAD}.lora_A.weight": cast(rng.standard_normal((r, shape[1])), "F32"),
        f"{PREFIX}{HEAD}.lora_B.weight": rng.standard_normal((n_rows, r), np.float32).astype(BF16),
    }
    write_adapter(path / "adapter", adapter, r=r)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """32 Mi parameters; B takes 64 MiB in float32."""
    path = tmp_path_factory.mktemp("big")
    make_big(path, 1 << 18)
    return path


@sanitized
@pytest.mark.parametrize("io", ["direct", "pread"])
def test_memory_bounds_the_whole_process(big, tmp_path, io):
    for folder in ("model", "adapter"):
        (tmp_path / folder).symlink_to(big / folder)
    command = [*flags(Rule("tv")), "--memory", "96M", "--io", io, "--threads", "2"]
    assert peak_mib(list(map(str, command)), tmp_path) <= 96


@sanitized
@pytest.mark.parametrize("r, message", [(1 << 16, "it needs 26"), (1 << 21, "it needs 879609")])
def test_a_rank_that_no_budget_has_room_for_is_said(perta, tmp_path, r, message):
    """Sparse files, so that A takes no space on the disk."""
    shape = (1, 1 << 20)
    write_folder(tmp_path / "model", {f"{HEAD}.weight": np.zeros(shape, np.uint16).view(BF16)})
    (tmp_path / "adapter").mkdir()
    sizes = {"lora_A": [r, shape[1]], "lora_B": [1, r]}
    header, at = {}, 0
    for kind, dims in sizes.items():
        end = at + 2 * dims[0] * dims[1]
        header[f"{PREFIX}{HEAD}.{kind}.weight"] = {
            "dtype": "BF16",
            "shape": dims,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    with open(tmp_path / "adapter/adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (tmp_path / "adapter/adapter_config.json").write_text(good(r=r))
    words = [*flags(Rule("tv")), "--threads", "1", "--memory", "1G"]
    refusal = perta(*words, check=2).stderr
    assert f"--memory 1024M is too small for this job: {message}" in refusal


# --- resuming


def test_a_killed_run_goes_on_unless_the_adapter_changed(perta, tmp_path):
    make_big(tmp_path, 1 << 16)
    perta(*flags(Rule("tv")))
    want = folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")
    stop_at(tmp_path, [*flags(Rule("tv")), "--force"], "commit", 2)
    path = tmp_path / "adapter/adapter_config.json"
    config = path.read_text()
    path.write_text(config.replace("0.17.1", "0.18"))
    refusal = perta(*flags(Rule("tv")), "--resume", check=2).stderr
    assert "--resume cannot continue: inputs: adapter_config.json" in refusal
    path.write_text(config)
    perta(*flags(Rule("tv")), "--resume", "--force")
    assert (folder_bytes(tmp_path / "p"), folder_bytes(tmp_path / "m")) == want
