"""config.json of every family, one key changed at a time. transformers loads the same file; perta
has its loss and gradients, or refuses the file: no key that changes the model is passed over.

    python tests/python/test_family_keys.py PERTA [FAMILY...]

tries all keys with all values, on the first two configurations."""

import collections
import copy
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import LONG, PERTA

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
from families import (
    ESTIMATE,
    Outcome,
    Wrong,
    attention_for,
    kind_of,
    make_model,
    numbers_are_equal,
    run,
    samples,
    transformers,
    write_lines,
)
from family_configs import CHUNKED, FAMILIES, FULL, SLIDING
from test_families import is_not_yet

torch.set_num_threads(1)

SWITCHES = (None, True, False, 0, 1, 3, 0.5)
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid")
ROPES = (
    {"rope_type": "default", "rope_theta": 70.0},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    {"rope_type": "yarn", "factor": 3.0, "rope_theta": 500.0, "original_max_position_embeddings": 16},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    {SLIDING: {"rope_type": "default", "rope_theta": 70.0}, FULL: {"rope_type": "default", "rope_theta": 500.0}},
)
# What transformers knows of all models and does not compute with.
OTHERS = ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
ABSENT = {  # keys that some family has, for those that have not written them
    "sliding_window": (5,),
    "layer_types": ([SLIDING, FULL, SLIDING, FULL], [FULL] * 4),
    "use_sliding_window": (True,),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "logit_scale": (0.5,),
    "logits_scaling": (2.0,),
    "clip_qkv": (0.3,),
    "partial_rotary_factor": (0.5,),
    "rotary_pct": (0.5,),
    "rope_theta": (70.0,),
    "rope_scaling": ({"type": "linear", "factor": 2.0},),
    "scale_embedding": (True,),
    "residual_multiplier": (0.5,),
    "final_logit_softcapping": (2.0,),
    "attn_logit_softcapping": (2.0,),
    "use_qk_norm": (True, False),
    "norm_topk_prob": (True, False),
    "num_experts": (4,),
    "n_shared_experts": (0, 2),
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "noaux_tc", "group_limited_greedy"),
    "no_rope_layers": ([0, 1, 0, 1],),
    "alibi": (True,),
    "parallel_attn": (False,),
    "use_parallel_residual": (True, False),
    "is_decoder": (True, False),
    "use_bidirectional_attention": (True,),
    "attention_chunk_size": (5,),
    "router_jitter_noise": (0.3,),
    "output_router_logits": (True,),
    "tie_word_embeddings": (True, False),
    "pad_token_id": (None, 0, 7),
}


def values_for(key, value):
    """Other values that a file could have there."""
    if key in OTHERS or "dropout" in key or key.endswith("_pdrop"):
        return ()
    if "rope_parameters" in key:
        return ROPES
    if isinstance(value, str):
        return ACTIVATIONS if "act" in key else ("", "none")
    if isinstance(value, list) and key == "layer_types":
        return ([FULL] * len(value), [SLIDING] * len(value), [CHUNKED] * len(value), value[::-1], value[:-1], None)
    if isinstance(value, list):
        return (value[::-1], [], value[:-1], None)
    if isinstance(value, bool) or value is None:
        return SWITCHES
    if isinstance(value, int):
        return (value + 1, value - 1, 2 * value, 0, 1, -1, None, float(value), str(value))
    if isinstance(value, float):
        return (1.5 * value + 0.01, 0.0, -value, 1, None, str(value))
    return ()


def changes_of(config):
    """Pairs of a key and a value. Within a model of several parts, those of its language model."""
    text = config.get("text_config", config)
    for key, value in text.items():
        for other in values_for(key, value):
            if other != value or type(other) is not type(value):
                yield key, other
    for key in text:
        yield key, ...
    for key, values in ABSENT.items():
        if key not in text:
            yield from ((key, value) for value in values)


def changed(config, key, value):
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    if value is ...:
        del text[key]
    else:
        text[key] = value
    return config


def loaded(folder):
    """None: transformers refuses the file, or makes up what the checkpoint lacks."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model, info = kind_of(config).from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention_for(config), output_loading_info=True
        )
        model.set_experts_implementation("eager")
    except Exception:
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else model.eval()


def outcome_of_key(perta, folder, how, config, key, value):
    (folder / "model/config.json").write_text(json.dumps(changed(config, key, value)))
    vocabulary = config.get("text_config", config)["vocab_size"]
    lines = samples(vocabulary)
    write_lines(folder / "data.jsonl", lines)
    first = run(perta, folder, *ESTIMATE, check=False)
    if first.returncode:
        return Outcome("refused" if first.returncode == 3 else "wrong", first.stderr.strip()[-300:])
    model = loaded(folder / "model")
    outcome = Outcome("equal")
    if model is None:
        return Outcome("only perta")
    try:
        numbers_are_equal(perta, folder, model, how, lines, outcome)
    except Wrong as wrong:
        outcome.state, outcome.why = "wrong", str(wrong)
    except Exception as error:  # transformers fails
        return Outcome("only perta", repr(error))
    return outcome


def tried(perta, folder, family, how, rng=None):
    """The outcome of each change, or of three that `rng` picks."""
    make_model(folder / "model", family, how)
    config = json.loads((folder / "model/config.json").read_text())
    changes = list(changes_of(config))
    for key, value in rng.sample(changes, 3) if rng else changes:
        yield key, value, outcome_of_key(perta, folder, how, config, key, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_passed_over(tmp_path, family):
    if is_not_yet(family, 0):
        pytest.skip("not yet")
    for i, how in enumerate(FAMILIES[family]):
        if is_not_yet(family, i) or how.get("_late") or (i and not LONG):
            continue
        rng = random.Random(f"{family}{i}")
        for key, value, outcome in tried(PERTA, tmp_path / str(i), family, how, None if LONG else rng):
            assert outcome.state != "wrong", f"{key} {value}: {outcome.why}\n{how}"


def main(perta, families):
    for family in families or FAMILIES:
        for i, how in enumerate(FAMILIES[family][:2]):
            if how.get("_late"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                counts = collections.Counter()
                for key, value, outcome in tried(perta, Path(folder), family, how):
                    counts[outcome.state] += 1
                    if outcome.state == "wrong":
                        print(f"{family} {i}: {key} {value}: {outcome.state} {outcome.why}", flush=True)
                print(family, i, dict(counts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
