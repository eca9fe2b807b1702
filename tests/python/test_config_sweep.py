"""config.json decides the forward pass. Tiny models are made and loaded by transformers from
that very file, in every combination of keys. Either `perta estimate` has the loss and every
gradient of PyTorch, or it refuses and names a key; there is nothing in between."""

import collections
import copy
import itertools
import json
import random
import re
import shutil

import pytest
from conftest import LONG

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()

VOCABULARY, LAYERS, PAD = 61, 3, 7
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The sample has PAD inside and at its end, and ids from both ends of the vocabulary.
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(0, VOCABULARY, (24,), generator=GENERATOR).tolist()
IDS[3] = IDS[20] = IDS[23] = PAD
IDS[5], IDS[6], IDS[7] = 0, VOCABULARY - 1, VOCABULARY - 2
SAMPLES = [IDS, IDS[:6]]


def base_of(family):
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    return names | SIZES | {"head_dim": 8}


# --- one configuration, by transformers and by perta


def load(folder):
    """Load as transformers does; if no model_type says what it is, by architecture."""
    config = json.loads((folder / "config.json").read_text())
    by = transformers.AutoModelForCausalLM
    if "model_type" not in config:
        by = getattr(transformers, config["architectures"][0])
    kind = by.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return kind.eval()


def weights(family, config, stored, dtype):
    """Random tensors of the shapes that transformers has for it."""
    try:
        assert config.get("model_type", family.lower()) == family.lower()
        made = transformers.AutoConfig.for_model(**copy.deepcopy(config))  # it changes it
        model = transformers.AutoModelForCausalLM.from_config(made)
    except Exception:  # it refuses the key: as if the key were absent
        made = transformers.AutoConfig.for_model(**base_of(family))
        model = transformers.AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, value in model.state_dict().items():
        mean, scale = (1, 0.1) if value.ndim == 1 and "norm" in name else (0, 0.25)
        noise = torch.randn(value.shape, generator=generator)
        tensors[name] = (mean + scale * noise).to(dtype)
    if getattr(model.config, "tie_word_embeddings", False):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if stored != "both":
            del tensors[HEAD if stored == "embedding" else EMBEDDING]
    return tensors


def reference(folder):
    """Mean loss and gradients; None if transformers fails."""
    try:
        model = load(folder)
        losses = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in SAMPLES]
        loss = sum(losses) / len(losses)
        loss.backward()
    except Exception as error:
        return None, repr(error)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), gradients


def largest_error(have, want):
    worst = 0.0
    for name, g in want.items():
        name = name if name in have else HEAD
        scale = g.abs().max().item()
        error = (have.pop(name).float() - g).abs().max().item()
        worst = max(worst, error / scale if scale else error and 1.0)
    return max(worst, 1.0 if have else 0.0)


def outcome(perta, tmp_path, family, config, stored="embedding", dtype=torch.float32, text=None):
    """equal, refused or wrong; and the message about it."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(tmp_path / "imp", ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(text or json.dumps(config))
    save_file(weights(family, config, stored, dtype), folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in SAMPLES))
    words = "estimate --model model --data data.jsonl --out imp --compute f32 --threads 1 --json"
    run = perta(*words.split(), check=None)
    if run.returncode:
        assert run.returncode == 3 and not (tmp_path / "imp").exists(), run.stderr
        return "refused", run.stderr
    loss, gradients = reference(folder)
    if loss is None:
        return "only perta", gradients
    have = json.loads(run.stdout)["loss"]
    if not abs(have - loss) <= 1e-5:
        return "wrong", f"loss {have}, not {loss}"
    error = largest_error(load_file(tmp_path / "imp/mean/model.safetensors"), gradients)
    return ("equal", run.stderr) if error <= 1e-4 else ("wrong", f"gradients differ by {error}")


# --- combinations

LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = [
    {},
    {"rope_theta": 300.0},
    {"rope_theta": 300},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_theta": None},
    {"rope_theta": "300"},
    {"rope_scaling": {}, "rope_parameters": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_scaling": {"type": "linear", "factor": 0.5}, "rope_theta": 77.0},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 9.0},
    {"rope_scaling": LINEAR | {"rope_theta": 20.0}, "rope_parameters": LLAMA3},
    {"rope_scaling": {"rope_theta": 20.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": "linear"},
    {"rope_scaling": ["linear"]},
    {"rope_scaling": False, "rope_parameters": LINEAR},
    {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": None}},
    {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    {"rope_scaling": {"rope_type": "su", "factor": 2.0}},
    {"rope_parameters": None},
    {"rope_parameters": {}},
    {"rope_parameters": {}, "rope_theta": 44.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 44.0}},
    {"rope_parameters": {"rope_theta": 44.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 44.0}, "rope_theta": 55.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 55.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 55.0},
    {"rope_parameters": {"rope_type": "proportional", "rope_theta": 44.0}},
    {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 44.0, "attention_factor": 2.0}},
    {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
    {"rope_parameters": LINEAR | {"full_attention": {"rope_type": "default"}}},
    {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0, 3.5, 9.0], "long_factor": [2] * 4}},
    {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4, "factor": 8.0},
        "original_max_position_embeddings": 32,
    },
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"attention_factor": 0.7, "beta_fast": 8, "beta_slow": 2.5}, "rope_theta": 500.0},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False}},
    {"rope_parameters": YARN | {"factor": None}},
    {"rope_parameters": YARN | {"beta_slow": "1"}},
    {"rope_parameters": YARN | {"rope_theta": 1.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 3.3}, "rope_theta": 600.0},
    {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "proportional"}, "partial_rotary_factor": 0.25},
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": 1},
    {"partial_rotary_factor": None, "rope_scaling": LINEAR},
    {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
    {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5},
    {"original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "rope_theta": 90.0},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 8},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8, "rope_theta": 33.0}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": None},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": None}},
    {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
    {"rope_parameters": LLAMA3, "max_position_embeddings": 1000},
]
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = [
    {},
    {"sliding_window": None},
    {"sliding_window": 5},
    {"sliding_window": 1, "use_sliding_window": True, "max_window_layers": 0},  # q and k get no gradient
    {"sliding_window": 0},
    {"sliding_window": "5"},
    {"sliding_window": 5, "use_sliding_window": False},
    {"sliding_window": 5, "use_sliding_window": True},
    {"sliding_window": 5, "use_sliding_window": "true"},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": -1},
    {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2.0},
    {"sliding_window": 5, "max_window_layers": 1},
    {"use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 5, "layer_types": None},
    {"sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]},
    {"sliding_window": 5, "layer_types": [FULL, FULL, SLIDING]},
    {"sliding_window": 5, "layer_types": [FULL] * 3},
    {"sliding_window": 5, "layer_types": [SLIDING] * 3},
    {"sliding_window": None, "layer_types": [FULL] * 3},
    {"sliding_window": None, "layer_types": [SLIDING] * 3},
    {"layer_types": [FULL, "attention", FULL]},
    {"sliding_window": 5, "layer_types": [FULL, SLIDING]},
    {"sliding_window": 5, "layer_types": [FULL, SLIDING, "chunked_attention"]},
    {"sliding_window": 5, "layer_types": "full_attention"},
    {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]},
    {"sliding_window": 5, "use_sliding_window": True, "layer_types": [FULL] * 3, "max_window_layers": 0},
    {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL], "max_window_layers": 1},
    {"sliding_window": 5, "use_sliding_window": False, "layer_types": [SLIDING, FULL, FULL]},
]
OTHERS = {
    "tie": [{}, {}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"tie_word_embeddings": "true"}],
    "bias": [{}, {}, {"attention_bias": True}, {"attention_bias": False, "mlp_bias": True}, {"mlp_bias": 1}],
    "heads": [
        {},
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"num_key_value_heads": 3},
        {"head_dim": 6},
        {"head_dim": None},
        {"head_dim": 0},
        {"head_dim": 8.0},
    ],
    "eps": [{}, {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 0.01}, {"rms_norm_eps": 0.0}, {"rms_norm_eps": None}],
    "pad": [{}, {}] + [{"pad_token_id": pad} for pad in (None, 0, PAD, -1, 60, 61, -61, -62, [PAD], True, "7")],
    "act": [{}, {}, {"hidden_act": "swish"}, {"hidden_act": "silu"}, {"hidden_act": "gelu"}, {"hidden_act": None}],
}
# Keys of other models' files, or of these models' own.
SILENT = {
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "use_cache": False,
    "initializer_range": 0.5,
    "pretraining_tp": 4,
    "attention_dropout": 0.5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
    "max_length": 20,
    "transformers_version": "4.37.2",
    "unsloth_version": "2024.9",
    "unsloth_fixed": True,
    "_name_or_path": "a/b",
    "output_router_logits": False,
    "gradient_checkpointing": True,
    "id2label": {"0": "A", "1": "B", "2": "C"},
    "task_specific_params": {"x": {"max_length": 3}},
    "max_position_embeddings": 4,
    "original_max_position_embeddings": 4,
    "model_max_length": 10**30,
    "quantization_config": None,
    # switched off
    "attn_logit_softcapping": None,
    "num_experts": 0,
    "use_mrope": False,
    "rope_interleaved": False,
    "is_causal": True,
    "embedding_multiplier": 1.0,
    "logit_scale": 1,
    "no_rope_layers": [],
    "pruned_heads": {},
    "per_layer_config": None,
    "position_embedding_type": "rope",
    "use_bidirectional_attention": False,
    "attention_chunk_size": None,
}
REFUSED = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0,
    "logits_scaling": 8.0,
    "scale_emb": 12,
    "query_pre_attn_scalar": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "clip_qkv": 8.0,
    "rotary_pct": 0.25,
    "no_rope_layers": [1, 0, 1],
    "rope_local_base_freq": 100.0,
    "attn_temperature_tuning": True,
    "attention_chunk_size": 4,
    "sliding_window_pattern": 2,
    "use_attention_sinks": True,
    "is_causal": False,
    "is_encoder_decoder": True,
    "use_bidirectional_attention": True,
    "per_layer_config": {"1": {"rms_norm_eps": 0.5}},
    "block_configs": [{"attention": {}}],
    "vision_config": {"hidden_size": 8},
    "text_config": {"hidden_size": 8},
    "transformers_weights": "other.safetensors",
    "model_type": "gemma",
    "architectures": ["LlamaModel"],
}
NOTED = {
    "auto_map": {"AutoModelForCausalLM": "modeling.Own"},
    "dual_chunk_attention_config": {"chunk_size": 4},
    "layer_norm_eps": 0.3,
    "time_step_limit": [0.0, float("inf")],
    "bias": True,
    "rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7},
}
WITHOUT = [None, None, None, "head_dim", "num_key_value_heads", "model_type", "architectures"]


def combined(rng):
    """A random choice of each kind of key, mostly none."""
    said = {}
    for choices in (ROPES, WINDOWS, *OTHERS.values()):
        said |= rng.choice(choices) if rng.random() < 0.2 else {}
    return said


def lacks_what_ministral_wants(config):
    """transformers takes Ministral for a Mistral with layer_types, and fails without keys for
    which Mistral has defaults. The config has only one meaning, so perta computes that."""
    asked = config.get("head_dim") is None or config.get("sliding_window", 0) is None
    return config.get("model_type") == "mistral" and "layer_types" in config and asked


def assert_right(perta, tmp_path, counts, family, said, without=None, **stored):
    config = base_of(family) | said
    config.pop(without, None)
    state, why = outcome(perta, tmp_path, family, config, **stored)
    counts[state] += 1
    if state == "only perta":
        assert lacks_what_ministral_wants(config), f"{why}\n{config}"
        return
    assert state in ("equal", "refused"), f"{state}: {why}\n{config}"
    names = [*said, without, *(key for value in said.values() if isinstance(value, dict) for key in value)]
    named = any(f'"{name}"' in why for name in names)
    named = named or re.search("attention heads cannot|head_dim|hidden_act|config.json calls for", why)
    assert state == "equal" or named, f"{why}\n{config}"


def some(cases, n, seed=0):
    """A random choice of that many; all in the long tier."""
    cases = list(cases)
    return cases if LONG else random.Random(seed).sample(cases, n)


def test_each_key_in_every_family(perta, tmp_path):
    counts = collections.Counter()
    choices = [said for kind in (ROPES, WINDOWS, *OTHERS.values()) for said in kind]
    for family, said in some(itertools.product(FAMILIES, choices), 16):
        assert_right(perta, tmp_path, counts, family, said)
    print(counts)


def test_keys_together(perta, tmp_path):
    counts = collections.Counter()
    for seed in range(400 if LONG else 14):
        rng = random.Random(seed)
        family, stored = rng.choice(FAMILIES), rng.choice(("embedding", "head", "both"))
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
        without = rng.choice(WITHOUT)
        assert_right(perta, tmp_path, counts, family, combined(rng), without, stored=stored, dtype=dtype)
    print(counts)


@pytest.mark.parametrize("keys", ["SILENT", "REFUSED", "NOTED"])
def test_keys_of_other_models(perta, tmp_path, keys):
    """No key is ignored silently: it is known, refused, or named."""
    for family, (key, value) in some(itertools.product(FAMILIES, globals()[keys].items()), 6):
        config = base_of(family) | {key: value}
        state, why = outcome(perta, tmp_path, family, config)
        assert state == ("refused" if keys == "REFUSED" else "equal"), f"{key}: {state} {why}"
        said = {"rope_scaling": "rope_scaling.mscale", "architectures": "LlamaModel"}.get(key, key)
        assert (said in why) == (keys != "SILENT"), f"{key}: {why}"
