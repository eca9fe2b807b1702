"""Rotary positions: the tables that perta makes of config.json are those of transformers' own
rotary embeddings, for every kind and every family's way to say it; or the key is refused."""

import collections
import copy
import itertools
import json
import random
import re
import shutil
import subprocess

import pytest
from conftest import LONG, PERTA

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)

TYPES = ("full_attention", "sliding_attention")
GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GPT_OSS |= {"original_max_position_embeddings": 4096}
CWM = {"rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
CWM |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
MINISTRAL3 = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
}
MINISTRAL3 |= {"mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}
APERTUS = {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192}
APERTUS |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What struct perta_rope_family has for each.
ROWS = {
    "Llama": {},
    "Mixtral": {"theta": 1e6},
    "SmolLM3": {"theta": 2e6},
    "Phi": {"partial": 0.5},
    "Phi3": {"partial": 1, "original_positions": 4096, "yarn_is_longrope": True},
    "Glm": {"partial": 0.5, "interleaved": True},
    "Glm4Moe": {"partial": 0.5},
    "GPTNeoX": {"partial": 0.25, "partial_key": "rotary_pct", "theta_key": "rotary_emb_base"},
    "StableLm": {"partial": 0.25},
    "Nemotron": {"partial": 0.5},
    "MiniMaxM2": {"theta": 5e6, "partial": 1, "elements_key": "rotary_dim"},
    "Gemma3Text": {
        "by_layer_type": True,
        "theta": 1e6,
        "local_theta": 1e4,
        "local_theta_key": "rope_local_base_freq",
    },
    "Olmo3": {"by_layer_type": True, "theta": 5e5, "local_theta": 5e5},
    "GptOss": {"theta": 150000.0, "parameters": json.dumps(GPT_OSS)},
    "Cwm": {"theta": 1e6, "parameters": json.dumps(CWM)},
    "Ministral3": {"parameters": json.dumps(MINISTRAL3), "query_scale": True},
    "Phimoe": {"theta": 1e6, "short_mscale": True},
    "Cohere": {"theta": 5e5, "interleaved": True},
    "Helium": {"theta": 1e5, "interleaved": True},
    "Ernie4_5": {"theta": 5e5, "interleaved": True},
    "DeepseekV3": {"interleaved": True, "interleave_key": "rope_interleave"},
    "Glm4MoeLite": {"interleaved": True, "interleave_key": "rope_interleave"},
    "HunYuanDenseV1": {"alpha": True},
    "Apertus": {"theta": 12e6, "parameters": json.dumps(APERTUS)},
    "Qwen2_5_VLText": {"theta": 1e6, "mrope": True},
}


# --- by transformers


def rotary_of(config):
    """The family's own rotary embedding, from the module of its model."""
    model = MODEL_MAPPING[type(config)]
    module = __import__(model.__module__, fromlist=["_"])
    names = [n for n in vars(module) if n.endswith("RotaryEmbedding") and "Vision" not in n]
    return getattr(module, names[0])(config)


def cosines(rotary, n, *layer_type):
    """Of positions 0 .. n - 1: (n, elements)."""
    positions = torch.arange(n)[None]
    if "mrope_section" in vars(rotary):
        positions = positions.expand(3, 1, n)
    cos = rotary(torch.zeros(1, 1), positions, *layer_type)[0]
    return cos.reshape(-1, n, cos.shape[-1])[0]


def reference(family, said):
    """Of each type of layers: frequencies, the scale, and those for a given length; an error's
    text if transformers refuses."""
    try:
        config = getattr(transformers, f"{family}Config")(**copy.deepcopy(said))
        rotary = rotary_of(config)
        tables = []
        for layer_type in TYPES:
            by_type = (layer_type,) if isinstance(rotary.rope_type, dict) else ()
            name = f"{layer_type}_inv_freq" if by_type else "inv_freq"
            scale = cosines(rotary, 1, *by_type)[0, 0].item()
            short = getattr(rotary, name).tolist()
            kind = rotary.rope_type[layer_type] if by_type else rotary.rope_type
            options = config.rope_parameters[layer_type] if by_type else config.rope_parameters
            length = int(options["original_max_position_embeddings"]) + 1 if kind == "longrope" else 0
            long = cosines(rotary, length, *by_type)[:9] if 10 < length < 5000 else None
            tables.append((short, scale, None if long is None else long[:, :: 2 if family == "Cohere" else 1]))
        return config, tables
    except Exception as error:
        return None, repr(error)


# --- by perta


def ask(lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run = subprocess.run([PERTA.parent / "tests/rope_tables"], input=text, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def line_of(family, said):
    head_dim = said.get("qk_rope_head_dim", said["hidden_size"] // said["num_attention_heads"])
    default = getattr(transformers, f"{family}Config").max_position_embeddings
    return {"family": ROWS[family], "max_positions": default, "head_dim": head_dim, "config": said}


# --- configurations


def options_of(rng, kind, n_pairs):
    """The keys of one kind, all that it must have and some that it may have."""
    maybe = lambda **keys: {k: v for k, v in keys.items() if rng.random() < 0.4}
    said = {rng.choice(("rope_type", "type")): kind} | maybe(rope_theta=rng.choice((100.0, 5e3, 1e6)))
    factor = {"factor": rng.choice((1.0, 2, 3.3, 8.0, 40))}
    original = {"original_max_position_embeddings": rng.choice((16, 24, 4096))}
    if kind in ("linear", "dynamic"):
        said |= factor
    elif kind == "llama3":
        said |= factor | {
            "low_freq_factor": rng.choice((1, 1.5)),
            "high_freq_factor": rng.choice((2.0, 4)),
        }
        said |= rng.choice(({}, original))
    elif kind == "yarn":
        said |= rng.choice((factor, factor, {"factor": None})) | rng.choice(({}, original))
        said |= maybe(beta_fast=rng.choice((32, 4.0, None, 0)), beta_slow=rng.choice((1, 0.5, None)))
        said |= maybe(mscale=rng.choice((0.7, 1, 0)), mscale_all_dim=rng.choice((1.0, 0.5)))
        said |= maybe(attention_factor=rng.choice((1.25, 2, None)), truncate=rng.choice((True, False, None)))
    elif kind in ("longrope", "su"):
        said |= original if kind == "su" else {}
        for key in ("short_factor", "long_factor"):
            said[key] = [rng.choice((1, 1.05, 2.5, 20.0)) * rng.uniform(1, 2) for _ in range(n_pairs)]
        said |= maybe(
            **factor,
            attention_factor=rng.choice((1.25, 2, None)),
            short_mscale=1.1,
            long_mscale=1.3,
        )
        said |= rng.choice(({}, original, original))
    elif kind == "proportional":
        said |= maybe(**factor, partial_rotary_factor=rng.choice((0.25, 0.5, 0.9, 1)))
    return said


def kinds_of(family):
    kinds = ["default", "linear", "llama3", "dynamic", "yarn", "longrope"]
    own = {"Phimoe": ["default", "longrope"], "Phi3": ["default", "longrope", "su"]}
    own["Qwen2_5_VLText"] = [*kinds, "mrope"]
    return own.get(family, [*kinds, "proportional"])


def n_pairs_of(row, said):
    """As many as longrope's lists need."""
    share = row.get("partial", 1)
    if row.get("elements_key") in said:
        share = said[row["elements_key"]] / (said["hidden_size"] // said["num_attention_heads"])
    share = said.get(row.get("partial_key", "partial_rotary_factor"), share)
    return int(said["hidden_size"] // said["num_attention_heads"] * share) // 2


def one_of(rng, family):
    """A configuration that makes sense."""
    row, D = ROWS[family], rng.choice((8, 16, 64))
    said = {
        "hidden_size": 4 * D,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
    }
    said["max_position_embeddings"] = rng.choice((32, 64, 131072))
    if family in ("DeepseekV3", "Glm4MoeLite"):
        said["qk_rope_head_dim"] = D
        said |= rng.choice(({}, {"rope_interleave": True}, {"rope_interleave": False}))
    elif family not in ("Phi", "Phi3", "GPTNeoX", "StableLm", "Cohere", "Phimoe", "Qwen2_5_VLText"):
        said["head_dim"] = D
    if rng.random() < 0.4:
        said[row.get("theta_key", "rope_theta")] = rng.choice((50.0, 1e4, 7e5))
    if "local_theta_key" in row and rng.random() < 0.4:
        said[row["local_theta_key"]] = 33.0
    if "partial" in row and rng.random() < 0.5:
        said[row.get("partial_key", "partial_rotary_factor")] = rng.choice((0.25, 0.5, 0.75, 1.0))
    if "elements_key" in row and rng.random() < 0.4:
        said[row["elements_key"]] = D // 2
    n = n_pairs_of(row, said)
    if rng.random() < 0.15 and not row.get("mrope"):
        return said
    kinds = kinds_of(family)
    if row.get("by_layer_type"):
        if rng.random() < 0.5:
            options = options_of(rng, rng.choice(kinds), n)
            options.pop("truncate", None)  # transformers does not see these there
            options["rope_type"] = options.pop("type", options.get("rope_type"))
            return said | {"rope_scaling": options}
        types = {t: options_of(rng, rng.choice(kinds), n) for t in TYPES}
        for options in types.values():
            options.pop("truncate", None)  # transformers does not see it there
        return said | {"rope_parameters": types}
    options = options_of(rng, rng.choice(kinds), n)
    if row.get("query_scale"):
        options |= {
            "llama_4_scaling_beta": rng.choice((0.1, 0.5)),
            "original_max_position_embeddings": 16,
        }
    if row.get("alpha") and rng.random() < 0.5:
        options |= {"alpha": rng.choice((1000.0, 7, 0))}
    if row.get("mrope"):
        options["mrope_section"] = rng.choice(([n - 2, 1, 1], [n // 4, n // 4, n - n // 4 * 2]))
    return said | {rng.choice(("rope_scaling", "rope_parameters")): options}


def broken(rng, said):
    """The same with one key left out, null, or of another value."""
    said = copy.deepcopy(said)
    spots = [(said, key) for key in said if ("rope" in key or "rotary" in key) and key[0] != "q"]
    for outer, key in list(spots):
        for within in [outer[key]] if isinstance(outer[key], dict) else []:
            spots += [(within, k) for k in within]
            spots += [(v, k) for v in within.values() if isinstance(v, dict) for k in v]
    if spots:
        where, key = rng.choice(spots)
        value = rng.choice((None, "x", -1, 0, 1, 1.0, [], {}, True, "yarn", "leave"))
        where[key] = value
        if value == "leave":
            del where[key]
    return said


# --- tests


def assert_scales(have, options, where):
    """What queries are multiplied by, at positions 0, 7, 14, ..."""
    beta, original = options["llama_4_scaling_beta"], options["original_max_position_embeddings"]
    want = get_llama_4_attn_scale(7 * torch.arange(50)[None], beta, original).flatten().tolist()
    have = have or [1.0] * 50  # beta 0
    assert all(abs(a - b) <= 3e-7 * b for a, b in zip(have, want, strict=True)), where


def check(family, said, have, sane, counts):
    config, want = reference(family, said)
    where = f"{family} {json.dumps(said)}"
    if "error" in have:
        counts["refused"] += 1
        assert not sane or config is None, f"{have['error']}\n{where}"
        assert '"' in have["error"], where
        return
    if config is None:
        counts["only perta"] += 1
        assert not sane, f"{want}\n{where}"
        return
    counts["equal"] += 1
    for table, long, (inv_freq, scale, cos) in zip(have[:2], have[2:], want, strict=True):
        if cos is not None:
            angles = torch.arange(9)[:, None] * torch.tensor(long["inv_freq"])
            assert (angles.cos() * long["scale"] - cos[:, : len(inv_freq)]).abs().max() < 1e-5, where
            counts["long"] += 1
        if "interleave_key" in ROWS[family]:
            assert table["interleaved"] == bool(config.rope_interleave), where
        assert len(table["inv_freq"]) == len(inv_freq), where
        for a, b in zip(table["inv_freq"], inv_freq, strict=True):
            assert abs(a - b) <= 3e-6 * abs(b), f"{a} {b}\n{where}"
        if ROWS[family].get("query_scale"):
            assert_scales(table["query_scales"], config.rope_parameters, where)
        assert abs(table["scale"] - scale) <= 1e-6 * scale, f"{table['scale']} {scale}\n{where}"


@pytest.mark.parametrize("family", ROWS)
def test_tables_are_those_of_transformers(family):
    rng, counts = random.Random(family), collections.Counter()
    sane = [one_of(rng, family) for _ in range(400 if LONG else 40)]
    for said, have in zip(sane, ask(line_of(family, said) for said in sane), strict=True):
        check(family, said, have, True, counts)
    print(counts)
    assert counts["equal"] > len(sane) / 2


@pytest.mark.parametrize("family", ROWS)
def test_other_values_are_equal_or_refused(family):
    rng, counts = random.Random(family), collections.Counter()
    said = [broken(rng, one_of(rng, family)) for _ in range(400 if LONG else 40)]
    for config, have in zip(said, ask(line_of(family, config) for config in said), strict=True):
        check(family, config, have, False, counts)
    print(counts)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 16}
LENGTHS = [
    (DYNAMIC, "longest", 24),
    (LONGROPE, "short", 16),
    ({"rope_type": "linear", "factor": 2.0}, "short", 2**32 - 1),
]


@pytest.mark.parametrize("scaling, what, longest", LENGTHS)
def test_the_length_from_which_on_frequencies_change(scaling, what, longest):
    said = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 24,
    }
    said["rope_scaling"] = scaling
    (have,) = ask([line_of("Llama", said)])
    assert [table[what] for table in have] == [longest] * 4
    rotary = rotary_of(transformers.LlamaConfig(**copy.deepcopy(said)))
    before = rotary.inv_freq.tolist()
    cosines(rotary, min(longest, 1000))
    assert rotary.inv_freq.tolist() == before
    cosines(rotary, min(longest, 1000) + 1)
    assert (rotary.inv_freq.tolist() == before) == (longest > 1000)


# --- positions from which on frequencies depend on the length


def make_model(folder, scaling):
    torch.manual_seed(1)
    sizes = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24}
    config = transformers.LlamaConfig(**sizes, **heads, rope_parameters=dict(scaling))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_longer_samples_are_refused_by_line_with_dynamic(perta, tmp_path):
    """Also those that are long only by their position_ids, or by what attention_mask hides."""
    longest = 24
    make_model(tmp_path / "model", DYNAMIC)
    short = {"input_ids": [1, 2] * (longest // 2)}
    long = [
        {"input_ids": [3] * (longest + 1)},
        {"input_ids": [1, 2, 3], "position_ids": [longest - 2, longest - 1, longest]},
        {
            "input_ids": [3] * (longest + 1),
            "attention_mask": [1] * 3 + [0] * (longest - 2),
            "labels": [-100, 3, 3] + [-100] * (longest - 2),
        },
    ]
    commands = [
        "estimate --model model --data data.jsonl --out out",
        "eval --model model --data data.jsonl",
        "tune --model model --data data.jsonl --out out --steps 1",
        "unlearn --model model --data-forget data.jsonl --data-retain short.jsonl --steps 1 --patch out",
    ]
    write(tmp_path / "short.jsonl", {"input_ids": [5, 6, 7]})
    for case, command in itertools.product([[short], *([short, line] for line in long)], commands):
        write(tmp_path / "data.jsonl", *case)
        run = perta(*command.split(), check=3 if len(case) == 2 else 0)
        assert len(case) == 1 or re.search(rf"line 2: token \d+ has position {longest},", run.stderr), run.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_answers_that_may_become_longer_are_refused(perta, tmp_path):
    """A prompt that is long already may go on."""
    make_model(tmp_path / "model", LONGROPE)
    write(tmp_path / "data.jsonl", {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]})
    perta(*"eval --model model --data data.jsonl --generate 14".split())
    run = perta(*"eval --model model --data data.jsonl --generate 15".split(), check=3)
    assert "line 1: an answer, the given or a generated one, may reach position 16," in run.stderr and not run.stdout
    write(tmp_path / "data.jsonl", {"input_ids": [1, 2, 3] + [4] * 20, "labels": [-100] * 3 + [4] * 20})
    assert (
        "may reach position 16," in perta(*"eval --model model --data data.jsonl --generate 2".split(), check=3).stderr
    )
    prompt = [(7 * i) % 41 for i in range(19)]
    write(tmp_path / "data.jsonl", {"input_ids": [*prompt, 4], "labels": [-100] * 19 + [4]})
    run = perta(*"eval --model model --data data.jsonl --generate 12 --per-sample --json --compute f32".split())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 19:].tolist()
    assert json.dumps(want)[1:-1].replace(" ", "") in run.stdout.replace(" ", ""), run.stdout


def test_long_samples_have_the_long_frequencies(perta, tmp_path):
    """Of long and short lines together: also those that are long only by their position_ids, or by
    what attention_mask hides."""
    make_model(tmp_path / "model", LONGROPE)
    ids = [(5 * i) % 41 for i in range(20)]
    lines = [
        {"input_ids": ids[:16]},
        {"input_ids": ids},
        {"input_ids": ids[:3], "position_ids": [14, 15, 16]},
        {"input_ids": ids, "attention_mask": [1] * 7 + [0] * 13, "labels": ids[:7] + [-100] * 13},
    ]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    losses = []
    for line in lines:
        tensors = {key: torch.tensor([value]) for key, value in line.items()}
        losses.append(model(**({"labels": tensors["input_ids"]} | tensors)).loss)
    (sum(losses) / len(losses)).backward()
    write(tmp_path / "data.jsonl", *lines)
    words = "estimate --model model --data data.jsonl --out imp --compute f32 --json".split()
    assert abs(json.loads(perta(*words).stdout)["loss"] - sum(losses).item() / len(losses)) < 1e-5
    have = load_file(tmp_path / "imp/mean/model.safetensors")
    for name, p in model.named_parameters():
        assert (have[name].float() - p.grad).norm() <= 1e-4 * p.grad.norm(), name
