"""Adapters that PEFT writes. `perta unlearn --alpha -1` adds the task vector, so the result must
be what PEFT makes of base and adapter, live and merged; or the adapter is refused, naming the
key that is the reason."""

import dataclasses
import json
import random
import warnings

import pytest
from conftest import part

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 64, "initializer_range": 0.3}
LLAMA = SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": ("Llama", LLAMA),
    "tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "biased": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3-tied": ("Qwen3", LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),
    "gpt2": ("GPT2", SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mamba": ("Mamba", SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "opt": ("OPT", SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
}
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def make(kind):
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    name = "GPT2LMHead" if name == "GPT2" else f"{name}ForCausalLM".removesuffix("Model")
    return getattr(transformers, name + ("Model" if name == "GPT2LMHead" else ""))(config).float().eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with every kind of model."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        make(kind).save_pretrained(folder / kind)
    return folder


def load(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def tune(base, config, to, noise=0.1):
    """An adapter, all of whose trained parameters differ from their initial values."""
    model = peft.get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += noise * torch.randn(p.shape, generator=generator)
    model.save_pretrained(to)


def live(base, adapter):
    return peft.PeftModel.from_pretrained(load(base), adapter).eval()


def words(base, adapter, alpha="-1"):
    return f"unlearn --model {base} --tuned {adapter} --base {base} --method tv --alpha={alpha} --patch p --out m --json --force".split()


def near(a, b, what):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), what


def check_equal(tmp_path, base, adapter):
    """The edited model computes what the live adapter does, and equals the merge in float32."""
    model = live(base, adapter)
    want = logits(model)
    assert (want - logits(load(base))).abs().max() > 1e-2, "the adapter does nothing"
    have = logits(load(tmp_path / "m"))
    near(have, want, "live")
    near(have, logits(model.merge_and_unload()), "merged")


def lora(**config):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBED, HEAD = "embed_tokens", "lm_head"
REFUSED_TIE = "ties to"

# id: kind of model, keys of the config, None or what the refusal names
CASES = {
    "two modules": ("llama", {}, None),
    "every linear": ("llama", {"target_modules": "all-linear"}, None),
    "a list of all": ("llama", {"target_modules": ALL}, None),
    "a regular expression": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}, None),
    "whole names": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}, None),
    "rslora": ("llama", {"use_rslora": True, "r": 5}, None),
    "rank 1": ("llama", {"r": 1}, None),
    "rank beyond the matrix": ("llama", {"r": 40, "target_modules": ["k_proj"]}, None),
    "alpha as a fraction": ("llama", {"lora_alpha": 0.37}, None),
    "alpha below zero": ("llama", {"lora_alpha": -3}, None),
    "rank pattern": ("llama", {"rank_pattern": {"q_proj": 7}}, None),
    "rank pattern, whole name": ("llama", {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}}, None),
    "rank pattern, anchored": ("llama", {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 2}}, None),
    "alpha pattern": ("llama", {"alpha_pattern": {"v_proj": 1.5, "layers.0.self_attn.q_proj": 20}}, None),
    "both patterns with rslora": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 9, "proj": 4}},
        None,
    ),
    "rank pattern, a regular expression": ("llama", {"rank_pattern": {".*(q|k)_proj": 7}}, "rank_pattern"),
    "alpha pattern, a regular expression": ("llama", {"alpha_pattern": {r"layers\.\d+\..*": 7}}, "alpha_pattern"),
    "one layer": ("llama", {"layers_to_transform": 1}, None),
    "layers of a list": ("llama", {"layers_to_transform": [0], "layers_pattern": "layers"}, None),
    "modules left out": ("llama", {"target_modules": ALL, "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]}, None),
    "excluded by an expression": ("llama", {"target_modules": ALL, "exclude_modules": r".*\.0\..*"}, None),
    "dropout": ("llama", {"lora_dropout": 0.5}, None),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, None),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "r": 4}, None),
    "random": ("llama", {"init_lora_weights": False}, None),
    "head": ("llama", {"target_modules": ["lm_head"]}, None),
    "embedding": ("llama", {"target_modules": [EMBED]}, None),
    "embedding and head": ("llama", {"target_modules": [EMBED, HEAD, "q_proj"]}, None),
    "embedding, rslora": ("llama", {"target_modules": [EMBED], "use_rslora": True}, None),
    "embedding and head, said to be tied": ("llama", {"target_modules": [EMBED, HEAD], "ensure_weight_tying": True}, None),
    "embedding whole": ("llama", {"modules_to_save": [EMBED]}, None),
    "head whole": ("llama", {"modules_to_save": [HEAD]}, None),
    "both whole": ("llama", {"modules_to_save": [EMBED, HEAD]}, None),
    "norms whole": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}, None),
    "a module of several, whole": ("llama", {"modules_to_save": ["mlp"]}, None),
    "biases of all": ("biased", {"bias": "all"}, None),
    "biases of LoRAs": ("biased", {"bias": "lora_only", "target_modules": ALL}, None),
    "biases left alone": ("biased", {"target_modules": ALL}, None),
    "biases of qwen2": ("qwen2", {"bias": "all"}, None),
    "bias of B": ("biased", {"lora_bias": True}, "lora_bias"),
    "dora": ("llama", {"use_dora": True}, "use_dora"),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, None),
    "transposed, not said": ("gpt2", {"target_modules": ["c_attn"]}, None),
    "transposed and square": ("gpt2", {"target_modules": ["attn.c_proj"]}, None),
    "transposed, all": ("gpt2", {"target_modules": "all-linear"}, None),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights"),
    "olora": ("llama", {"init_lora_weights": "olora"}, "init_lora_weights"),
    "mica": ("llama", {"init_lora_weights": "mica"}, "init_lora_weights"),
    "tokens": ("llama", {"trainable_token_indices": [3, 9]}, "trainable_token_indices"),
    "layers twice": ("llama", {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "parameters": ("llama", {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, None),
    "tied, elsewhere": ("tied", {"target_modules": "all-linear"}, None),
    "tied, embedding": ("tied", {"target_modules": [EMBED]}, REFUSED_TIE),
    "tied, head": ("tied", {"target_modules": [HEAD]}, REFUSED_TIE),
    "tied, both": ("tied", {"target_modules": [EMBED, HEAD]}, REFUSED_TIE),
    "tied, embedding, kept tied": ("tied", {"target_modules": [EMBED], "ensure_weight_tying": True}, REFUSED_TIE),
    "tied, head, kept tied": ("tied", {"target_modules": [HEAD], "ensure_weight_tying": True}, REFUSED_TIE),
    "tied, embedding whole": ("tied", {"modules_to_save": [EMBED]}, REFUSED_TIE),
    "tied, head whole": ("tied", {"modules_to_save": [HEAD]}, REFUSED_TIE),
    "tied, both whole": ("tied", {"modules_to_save": [EMBED, HEAD]}, REFUSED_TIE),
    "tied, embedding whole, kept tied": ("tied", {"modules_to_save": [EMBED], "ensure_weight_tying": True}, None),
    "tied, head whole, kept tied": ("tied", {"modules_to_save": [HEAD], "ensure_weight_tying": True}, None),
    "tied, both whole, kept tied": ("tied", {"modules_to_save": [EMBED, HEAD], "ensure_weight_tying": True}, None),
    "tied, tokens": ("tied", {"trainable_token_indices": [3], "ensure_weight_tying": True}, "trainable_token_indices"),
    "qwen3": ("qwen3-tied", {"target_modules": ALL, "modules_to_save": ["q_norm"]}, None),
    "qwen3, embedding": ("qwen3-tied", {"target_modules": [EMBED]}, REFUSED_TIE),
    "gemma": ("gemma", {"target_modules": ALL}, None),
    "gemma, embedding": ("gemma", {"target_modules": [EMBED]}, REFUSED_TIE),
    "gemma, embedding whole": ("gemma", {"modules_to_save": [EMBED]}, REFUSED_TIE),
    "gpt2, norms whole": ("gpt2", {"target_modules": ["lm_head"], "modules_to_save": ["ln_f"]}, "lm_head"),
    "gpt2, embedding": ("gpt2", {"target_modules": ["wte"]}, REFUSED_TIE),
    "gpt2, positions": ("gpt2", {"target_modules": ["wpe"]}, None),
    "mamba": ("mamba", {"target_modules": ["in_proj"]}, None),
    "mamba, embedding": ("mamba", {"target_modules": ["embeddings"]}, REFUSED_TIE),
    "mamba, embedding whole": ("mamba", {"target_modules": ["in_proj"], "modules_to_save": ["embeddings"]}, REFUSED_TIE),
    "opt": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "all"}, None),
    "opt, embedding": ("opt", {"target_modules": ["embed_tokens"]}, REFUSED_TIE),
}


@pytest.mark.parametrize("kind, config, refused", part(CASES.values(), plain=12), ids=part(CASES, plain=12))
def test_an_adapter_does_what_peft_does(perta, tmp_path, bases, kind, config, refused):
    tune(bases / kind, peft.LoraConfig(**lora(**config)), tmp_path / "a")
    result = perta(*words(bases / kind, "a"), check=3 if refused else 0)
    if refused:
        assert refused in result.stderr and "a/adapter_" in result.stderr
        assert not (tmp_path / "m").exists()
    else:
        assert json.loads(result.stdout)["notes"] == ["alpha -1 is negative: the task vector is added, so the model learns what the tuned one was tuned on"]
        check_equal(tmp_path, bases / kind, tmp_path / "a")


STEP = "--steps 1 --method signed --step 1 --max-scale 1 --data-forget a.jsonl --data-retain b.jsonl --compute f32"
IN_STEPS = {name: case for name, case in CASES.items() if case[0] not in ("gemma", "gpt2", "mamba", "opt")}


def tensors_of(folder):
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


@pytest.mark.parametrize("kind, config, refused", part(IN_STEPS.values(), plain=10), ids=part(IN_STEPS, plain=10))
def test_steps_take_what_an_edit_takes(perta, tmp_path, bases, kind, config, refused):
    """A step of 1 takes each parameter to where --method tv leads, or leaves it where it is."""
    tune(bases / kind, peft.LoraConfig(**lora(**config)), tmp_path / "a")
    for side, ids in (("a", IDS[0]), ("b", IDS[1])):
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({"input_ids": ids.tolist()}))
    edit = perta(*words(bases / kind, "a", alpha="1"), check=3 if refused else 0)
    step = f"unlearn --model {bases / kind} --tuned a --base {bases / kind} --patch q --out n --json {STEP}"
    result = perta(*step.split(), check=3 if refused else 0)
    if refused:
        assert result.stderr == edit.stderr and refused in edit.stderr
        assert not (tmp_path / "n").exists()
        return
    assert json.loads(result.stdout)["notes"] == json.loads(edit.stdout)["notes"]
    full, edited, after = (tensors_of(path) for path in (bases / kind, tmp_path / "m", tmp_path / "n"))
    n_moved = n_there = 0
    for name, x in full.items():
        moved = after[name] != x
        assert torch.equal(after[name][moved], edited[name][moved]), name
        n_moved += moved.sum().item()
        n_there += (edited[name] != x).sum().item()
    assert 0.1 * n_there < n_moved < 0.9 * n_there



def draw(seed):
    """A random kind of model and config."""
    rng = random.Random(seed)
    kind = rng.choice(["llama", "tied", "biased", "qwen2", "qwen3-tied", "gemma"])
    modules = rng.sample(ALL + [EMBED] + [HEAD] * (kind in ("llama", "biased", "qwen2")), rng.randint(1, 6))
    rest = [m for m in [*ALL, EMBED, "norm", "input_layernorm", "mlp"] if m not in modules]
    config = {"target_modules": modules, "r": rng.randint(1, 9), "lora_alpha": rng.choice([1, 3.5, 16])}
    if rng.random() < 0.4:
        config["modules_to_save"] = rng.sample(rest, rng.randint(1, 2))
    if rng.random() < 0.4:
        config["rank_pattern"] = {rng.choice(["", "layers.0.self_attn.", "^model.layers.1.mlp."]) + rng.choice(ALL): rng.randint(1, 9) for _ in range(2)}
    if rng.random() < 0.4:
        config["alpha_pattern"] = {rng.choice([*ALL, "layers.1.self_attn.v_proj", "o.proj"]): rng.choice([2, 0.5]) for _ in range(2)}
    if rng.random() < 0.3:
        config["layers_to_transform"] = rng.choice([0, 1, [1], [0, 1]])
    if rng.random() < 0.2:
        config["exclude_modules"] = [rng.choice(modules + ["layers.1.mlp.up_proj"])]
    config |= {"use_rslora": rng.random() < 0.3, "bias": rng.choice(["none", "none", "all", "lora_only"])}
    config |= {"init_lora_weights": rng.choice([True, False, "gaussian"]), "ensure_weight_tying": rng.random() < 0.3}
    return kind, config


@pytest.mark.parametrize("seed", part(range(80), plain=4))
def test_adapters_drawn_at_random(perta, tmp_path, bases, seed):
    """Refused if a tied embedding is changed, and only then."""
    kind, config = draw(seed)
    try:
        tune(bases / kind, peft.LoraConfig(**lora(**config)), tmp_path / "a")
    except (ValueError, AttributeError) as why:  # no modules are left, or PEFT cannot do it
        pytest.skip(f"PEFT: {why}")
    whole = [m for m in config.get("modules_to_save", []) if m == EMBED]
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    tied = kind in ("tied", "qwen3-tied", "gemma")
    refused = tied and any("embed_tokens" in name or "lm_head" in name for name in names)
    refused = refused and not (whole and config["ensure_weight_tying"])
    # The bias of a module that is stored whole; PEFT writes it a second time under another name.
    twice = any(".modules_to_save." in name for name in names)
    message = perta(*words(bases / kind, "a"), check=3 if refused or twice else 0).stderr
    if refused or twice:
        assert REFUSED_TIE in message or (twice and ".modules_to_save." in message)
    else:
        check_equal(tmp_path, bases / kind, tmp_path / "a")


# --- other kinds than LoRA

# Keys that some of them need; a kind that cannot be created here only has its name.
NEEDS = {
    "ADALORA": {"total_step": 10},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": [EMBED], "token_indices": [3]},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
}
KINDS_OF_PEFT = sorted(str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING)


def save_other(base, kind, to):
    """As PEFT writes it (True), or its config beside a LoRA's tensors."""
    of = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(of)}
    keys = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    keys = {key: value for key, value in keys.items() if key in fields} | NEEDS.get(kind, {})
    try:
        tune(base, of(**keys), to)
        load_file(to / "adapter_model.safetensors")
        return True
    except Exception:  # any error: what it lacks is PEFT's concern
        tune(base, peft.LoraConfig(**lora()), to)
        config = json.loads((to / "adapter_config.json").read_text())
        (to / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
        return False


@pytest.mark.parametrize("kind", part([kind for kind in KINDS_OF_PEFT if kind != "LORA"], plain=4))
def test_other_kinds_are_refused_by_name(perta, tmp_path, bases, kind):
    save_other(bases / "llama", kind, tmp_path / "a")
    message = perta(*words(bases / "llama", "a"), check=3).stderr
    assert "a/adapter_config.json: peft_type: " in message and "merge" in message
    # The name of another kind is not accepted either.
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(lora() | config | {"peft_type": "LORA"}))
    result = perta(*words(bases / "llama", "a"), check=None)
    assert result.returncode == 3 or same_as_live(tmp_path, bases / "llama"), kind


def same_as_live(tmp_path, base):
    """Does the result equal what PEFT makes of the adapter, whatever it is?"""
    want = logits(live(base, tmp_path / "a"))
    return (logits(load(tmp_path / "m")) - want).abs().max() <= 1e-5 * want.abs().max()


# --- keys of adapter_config.json

SUB = {"rank": 4}
VALUES = {
    "peft_type": ["lora", "XLORA", None],
    "task_type": [None, "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}],
    "peft_version": [None, "99.0"],
    "base_model_name_or_path": [None, "elsewhere"],
    "revision": ["main"],
    "inference_mode": [False],
    "r": [3, 8, 0, "4", None],
    "target_modules": [["q_proj"], ["k_proj", "v_proj"], "all-linear", ".*self_attn.*"],
    "exclude_modules": [["q_proj"], ["layers.0.self_attn.v_proj"], ["k_proj"], ["proj"], []],
    "lora_alpha": [0.25, -6, 96, "6", None],
    "lora_dropout": [0.7],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only", "some", None],
    "use_rslora": [True, None],
    "modules_to_save": [[HEAD], ["norm"], ["q_proj"], ["self_attn"], ["layers"], []],
    "init_lora_weights": [False, "gaussian", "eva", "olora", "pissa", "pissa_niter_2", "corda", "loftq", "orthogonal", "lora_ga", "mica", "new"],
    "layers_to_transform": [0, [1], [0, 1], [], [7]],
    "layers_pattern": ["layers", "h", ["layers"]],
    "rank_pattern": [{"q_proj": 2}, {"k_proj": 2}, {"(q|v)_proj": 2}, {"q_pro": 2}, {"self_attn.q_proj": 4}],
    "alpha_pattern": [{"q_proj": 2}, {"k_proj": 2}, {".*": 2}, {"_proj": 2}, {"q.proj$": 3}, {"^q_proj": 3}, {"layers.1.self_attn.v_proj": 3}],
    "megatron_config": [SUB, {}],
    "megatron_core": ["other"],
    "trainable_token_indices": [[1, 2], {EMBED: [1]}, [], {}],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 3.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArBr"}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 8}, {}],
    "alora_invocation_tokens": [[1, 2], []],
    "use_qalora": [True, {"x": 1}],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}, {}],
    "layer_replication": [[[0, 1]], []],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_bias": [True],
    "target_parameters": [["q_proj.weight"], []],
    "use_bdlora": [{"nblocks": 2}, {}, True],
    "arrow_config": [{"top_k": 2}, {}],
    "kasa_config": [{}, {"beta": 1.0}],
    "ensure_weight_tying": [True],
    "of_a_newer_version": [True],
}
MUTATIONS = [(key, value) for key, values in VALUES.items() for value in values]


def test_every_key_of_a_lora_has_its_mutations():
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= VALUES.keys()


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """A LoRA of two modules."""
    folder = tmp_path_factory.mktemp("plain") / "a"
    tune(bases / "llama", peft.LoraConfig(**lora()), folder)
    return folder


@pytest.mark.parametrize("key, value", part(MUTATIONS, plain=10), ids=str)
def test_a_key_is_right_or_refused_by_name(perta, tmp_path, bases, plain, key, value):
    """What PEFT cannot load is not compared; what it ignores is reported."""
    (tmp_path / "a").mkdir()
    tensors = plain / "adapter_model.safetensors"
    (tmp_path / "a/adapter_model.safetensors").write_bytes(tensors.read_bytes())
    config = json.loads((plain / "adapter_config.json").read_text()) | {key: value}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    result = perta(*words(bases / "llama", "a"), check=None)
    assert result.returncode in (0, 3), result.stderr
    if result.returncode == 3:
        rank = key in ("r", "rank_pattern") and "its rank" in result.stderr
        assert f"a/adapter_config.json: {key}: " in result.stderr or rank, result.stderr
        return
    notes = json.loads(result.stdout)["notes"][1:]
    try:
        same = same_as_live(tmp_path, bases / "llama")
    except Exception:  # PEFT refuses it
        return
    assert same or any(key in note for note in notes), notes
    assert same or key == "target_modules"


def test_a_square_matrix_is_transposed_whatever_the_config_says(perta, tmp_path, bases):
    """As PEFT does with GPT-2's matrices."""
    tune(bases / "gpt2", peft.LoraConfig(**lora(target_modules=["attn.c_proj"])), tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    perta(*words(bases / "gpt2", "a"))
    assert same_as_live(tmp_path, bases / "gpt2")


def test_a_copy_of_another_base_is_refused(perta, tmp_path, bases):
    """PEFT adds A and B to its copy of the embedding, whatever the base holds."""
    tune(bases / "llama", peft.LoraConfig(**lora(target_modules=[EMBED])), tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name][3, 4] += 1
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    message = perta(*words(bases / "llama", "a"), check=3).stderr
    assert f"tensor {name}, the copy of the weight that the LoRA is added to, differs from" in message
    tensors[name] = tensors[name].bfloat16()  # loaded in another dtype: a copy that was rounded
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    perta(*words(bases / "llama", "a"))


# --- dtypes, and adapters that change nothing


@pytest.mark.parametrize("dtype", part([torch.bfloat16, torch.float16, torch.float64], plain=1), ids=str)
def test_one_rounding_to_the_dtype_of_the_model(perta, tmp_path, bases, dtype):
    """The float32 merge, rounded once: no value differs by more than half a unit in the last
    place."""
    make("llama").to(dtype).save_pretrained(tmp_path / "base")
    tune(tmp_path / "base", peft.LoraConfig(**lora(target_modules=ALL, modules_to_save=["norm"])), tmp_path / "a")
    adapter = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file({k: x.bfloat16() for k, x in adapter.items()}, tmp_path / "a/adapter_model.safetensors")
    perta(*words("base", "a"))
    merged = live(tmp_path / "base", tmp_path / "a").merge_and_unload().state_dict()
    for name, x in load_file(tmp_path / "m/model.safetensors").items():
        assert x.dtype == dtype
        want = merged[name].double()
        ulp = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        assert ((x.double() - want).abs() <= 0.51 * ulp * want.abs() + 2e-6).all(), name


def test_an_adapter_that_changes_nothing_is_noted(perta, tmp_path, bases):
    """As PEFT creates it: B is zero."""
    tune(bases / "llama", peft.LoraConfig(**lora()), tmp_path / "a", noise=0)
    notes = json.loads(perta(*words(bases / "llama", "a")).stdout)["notes"]
    assert any("nothing changes: the adapter's task vector is zero" in note for note in notes)


def saved_as(plain, to, rename=lambda name: name, **keys):
    """The plain LoRA with other names, or without some tensors; and keys for its config."""
    to.mkdir()
    tensors = {rename(name): x for name, x in load_file(plain / "adapter_model.safetensors").items() if rename(name)}
    save_file(tensors, to / "adapter_model.safetensors")
    config = json.loads((plain / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | keys))


def test_an_adapter_without_tensors_is_refused(perta, tmp_path, bases, plain):
    """As PEFT saves the adapter of a compiled model."""
    saved_as(plain, tmp_path / "a", lambda name: None)
    assert "a/adapter_model.safetensors: no tensors" in perta(*words(bases / "llama", "a"), check=3).stderr


@pytest.mark.parametrize("module", [HEAD, "norm", "mlp", "model.embed_tokens"])
def test_a_module_to_save_that_is_not_saved_is_refused(perta, tmp_path, bases, plain, module):
    saved_as(plain, tmp_path / "a", modules_to_save=["score", module])
    with pytest.raises(KeyError):
        live(bases / "llama", tmp_path / "a")
    message = perta(*words(bases / "llama", "a"), check=3).stderr
    assert f"a/adapter_config.json: modules_to_save: {module} is not in adapter_model.safetensors" in message


def test_names_that_peft_would_pass_over_are_noted(perta, tmp_path, bases, plain):
    saved_as(plain, tmp_path / "a", lambda name: name.removeprefix("base_model.model."))
    notes = json.loads(perta(*words(bases / "llama", "a")).stdout)["notes"]
    first = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert any(f"the names of 8 tensors, the first of them {first}, do not begin with base_model.model." in note for note in notes)


def test_an_alpha_of_zero_is_named(perta, tmp_path, bases, plain):
    saved_as(plain, tmp_path / "a", lora_alpha=0)
    assert "(lora_A, lora_B or lora_alpha is zero)" in perta(*words(bases / "llama", "a")).stdout


@pytest.mark.parametrize("inside", ["model.language_model.", "language_model.model."])
def test_names_of_a_vision_language_model_are_called_so(perta, tmp_path, bases, plain, inside):
    saved_as(plain, tmp_path / "a", lambda name: name.replace("model.model.", f"model.{inside}"))
    message = perta(*words(bases / "llama", "a"), check=3).stderr
    assert "uses the names of a vision-language model" in message and "merge the adapter" in message


def test_a_classifier_of_gpt2_is_not_transposed(perta, tmp_path):
    config = transformers.GPT2Config(**KINDS["gpt2"][1], num_labels=3, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    of = transformers.AutoModelForSequenceClassification
    model = peft.get_peft_model(of.from_pretrained(tmp_path / "base"), peft.LoraConfig(target_modules=["score"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    perta(*words("base", "a"))
    with torch.no_grad():
        want = model.eval()(IDS).logits
        near(of.from_pretrained(tmp_path / "m").eval()(IDS).logits, want, "live")


COMMON = "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo2 stablelm gpt2 gpt_neo gpt_neox gptj gpt_bigcode opt bloom falcon mpt mamba mamba2 cohere smollm3 starcoder2 granite glm4 lfm2"


@pytest.mark.parametrize("kind", COMMON.split())
def test_a_family_ties_by_default_what_transformers_ties(perta, tmp_path, kind):
    """If config.json does not say: then an embedding and a head that differ are refused."""
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 4), "lm_head.weight": torch.ones(4, 4)}
    (tmp_path / "m0").mkdir()
    save_file(tensors, tmp_path / "m0/model.safetensors")
    (tmp_path / "m0/config.json").write_text(json.dumps({"model_type": kind}))
    tied = transformers.CONFIG_MAPPING[kind]().tie_word_embeddings
    message = perta(*"unlearn --model m0 --tuned m0 --base m0 --method tv --patch p".split(), check=3 if tied else 0).stderr
    assert not tied or "true by default for this model_type" in message


def test_a_tuned_model_that_was_merged_and_untied_is_refused(perta, tmp_path, bases):
    """merge_and_unload of an adapter that stores embedding and head whole writes a separate
    head."""
    tune(bases / "tied", peft.LoraConfig(**lora(modules_to_save=[EMBED, HEAD])), tmp_path / "a")
    live(bases / "tied", tmp_path / "a").merge_and_unload().save_pretrained(tmp_path / "tuned")
    message = perta(*words(bases / "tied", "tuned"), check=3).stderr.replace(str(bases / "tied"), "tied")
    assert "tuned: no tensor" in message or "model.embed_tokens.weight and lm_head.weight differ" in message
