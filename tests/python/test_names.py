"""Which tensors of the inputs correspond to which of the model: importance under the names of a
training wrapper, tensors without importance, tied embeddings, buffers; and the notes about
them."""

import json

import numpy as np
import pytest
from reference import Rule, edit, folder_bytes, kept, unlearn, write_folder
from safetensors.numpy import load_file
from test_lora import write_adapter
from test_unlearn import ROLES, cast, check_folder, flags, write_inputs

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
SHAPES = {EMBED: (10, 8), Q: (8, 8), "model.norm.weight": (8,), HEAD: (10, 8)}
RULE = Rule("grad")
TIED = json.dumps({"tie_word_embeddings": True})


def make(shapes=SHAPES, dtype="BF16"):
    rng = np.random.default_rng(1)
    return {
        role: {
            name: cast(rng.standard_normal(shape), dtype if role in ROLES[:3] else "F32")
            for name, shape in shapes.items()
        }
        for role in ROLES
    }


def write(tmp_path, roles, rename=lambda name: name):
    """rename applies to the importances."""
    stored = {
        role: {rename(name) if role in ROLES[3:] else name: x for name, x in tensors.items()}
        for role, tensors in roles.items()
    }
    write_inputs(tmp_path, RULE, stored)


def summary_of(perta, *words):
    return json.loads(perta(*words, "--json").stdout)


def notes_of(perta, *words):
    return " | ".join(summary_of(perta, *words)["notes"])


# --- importance


PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_a_wrapper_is_understood(perta, tmp_path, prefix):
    roles = make()
    write(tmp_path, roles, lambda name: prefix + name)
    notes = notes_of(perta, *flags(RULE, ["1"]))
    for role in ("forget", "retain"):
        assert f"--{role}: its names are those of --model except for a prefix {prefix}" in notes
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_prefix_that_is_missing_is_understood(perta, tmp_path, prefix):
    """Gradients of the layers inside a language model."""
    roles = make({name: shape for name, shape in SHAPES.items() if name != HEAD})
    write(tmp_path, roles, lambda name: prefix + name.removeprefix("model."))
    assert "model." in notes_of(perta, *flags(RULE, ["1"]))
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


LAYER = "model.layers.0."
WITHIN = {
    "_fsdp_wrapped_module": lambda name: "_fsdp_wrapped_module." + name.replace(LAYER, f"{LAYER}_fsdp_wrapped_module._orig_mod."),
    "_checkpoint_wrapped_module": lambda name: "module." + name.replace(LAYER, f"{LAYER}_checkpoint_wrapped_module."),
    "_orig_mod": lambda name: name.replace(LAYER, "model._orig_mod.layers.0._orig_mod."),
    "base_layer": lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."),
}


@pytest.mark.parametrize("wrapper", WITHIN)
def test_wrappers_of_single_layers_are_understood(perta, tmp_path, wrapper):
    roles = make()
    write(tmp_path, roles, WITHIN[wrapper])
    notes = notes_of(perta, *flags(RULE, ["1"]))
    for role in ("forget", "retain"):
        assert f"--{role}: its names are those of --model with parts added by training wrappers ({wrapper})" in notes
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


def test_wrappers_that_make_one_name_of_two_are_refused(perta, tmp_path):
    roles = make()
    roles["forget"][f"_orig_mod.{Q}"] = roles["forget"][Q]
    write(tmp_path, roles)
    assert f"forget: two tensors are {Q} once the parts of wrappers" in perta(*flags(RULE, ["1"]), check=3).stderr


def test_each_importance_has_its_own_prefix(perta, tmp_path):
    roles = make()
    write(tmp_path, roles)
    renamed = {f"_orig_mod.{name}": x for name, x in roles["retain"].items()}
    write_folder(tmp_path / "wrapped", renamed, 1, {"perta.stat": "mean"})
    words = [word if word != "retain" else "wrapped" for word in flags(RULE, ["1"])]
    notes = notes_of(perta, *words)
    assert "--retain: its names" in notes and "--forget: its names" not in notes
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


RENAMES = {
    "of another model": lambda name: f"transformer.{name}",
    "a prefix on some": lambda name: f"module.{name}" if name == HEAD else name,
    "an unknown part within": lambda name: name.replace("layers.0.", "layers.0.wrapped."),
    "fused experts": lambda name: name.replace("q_proj.weight", "qkv_proj"),
    "a parameter of PEFT's": lambda name: name.replace("q_proj.", "q_proj.lora_A."),
}


@pytest.mark.parametrize("missing", ["error", "tv", "keep"])
@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_what_the_model_lacks_is_an_error(perta, tmp_path, rename, missing):
    write(tmp_path, make(), rename)
    before = folder_bytes(tmp_path)
    message = perta(*flags(RULE, ["1"]), "--missing", missing, check=3).stderr
    first = next(name for name in sorted(map(rename, SHAPES)) if name not in SHAPES)
    assert f"--forget forget: has tensor {first}, which is not in --model model" in message
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("missing", ["tv", "keep"])
def test_what_missing_covers_is_said(perta, tmp_path, missing):
    roles = make()
    want = unlearn(RULE, 1, **roles)
    for role, name in (("forget", EMBED), ("retain", Q)):
        del roles[role][name]
        operands = [roles[r][name] for r in ROLES[:3]]
        want[name] = edit(Rule("tv"), 1, name, *operands) if missing == "tv" else kept(operands[0])
    write(tmp_path, roles)
    summary = summary_of(perta, *flags(RULE, ["1"]), "--missing", missing)
    said = f"--missing {missing}: 2 of the 4 tensors to edit (144 of 232 parameters) have no importance"
    assert said in " ".join(summary["notes"])
    check_folder(tmp_path, None, want)
    reasons = [{"why": "kept: no importance", "tensors": 2, "parameters": 144}] if missing == "keep" else []
    assert summary["unedited"] == {"parameters": 144 * (missing == "keep"), "of": 232, "reasons": reasons}


@pytest.mark.parametrize("missing", ["tv", "keep"])
def test_nothing_but_what_is_missing_is_an_error(perta, tmp_path, missing):
    roles = make()
    roles["forget"] = {EMBED: roles["forget"][EMBED]}
    roles["retain"] = {Q: roles["retain"][Q]}
    write(tmp_path, roles)
    message = perta(*flags(RULE, ["1"]), "--missing", missing, check=3).stderr
    assert "none of the 4 tensors to edit has importance in both" in message
    assert not (tmp_path / "p").exists()


def test_a_shape_that_differs_names_both(perta, tmp_path):
    roles = make()
    roles["retain"][Q] = roles["retain"][Q][:4]
    write(tmp_path, roles, lambda name: f"_orig_mod.{name}")
    message = perta(*flags(RULE, ["1"]), check=3).stderr
    assert f"tensor {Q}: shape [8, 8] in --model, [4, 8] in --retain" in message


@pytest.mark.parametrize("role, words", [("tuned", "is it a LoRA without PEFT's adapter_config.json?"), ("retain", "this is the importance of a LoRA's own parameters")])
def test_a_lora_in_the_wrong_place_is_called_so(perta, tmp_path, role, words):
    """As Mistral's finetuning writes it; and the gradients of an adapter."""
    roles = make()
    roles[role]["layers.0.attention.wq.lora_A.weight"] = roles[role][Q]
    write(tmp_path, roles)
    assert f"which is not in --model model; {words}" in " ".join(perta(*flags(RULE, ["1"]), check=3).stderr.split())


# --- tied embeddings


@pytest.mark.parametrize("role", ROLES)
def test_two_names_of_a_tied_matrix_that_differ_are_refused(perta, tmp_path, role):
    """Whatever config.json of tuned or base says: the model has one matrix for both."""
    roles = make({name: shape for name, shape in SHAPES.items() if name != HEAD})
    roles[role][HEAD] = roles[role][EMBED] * 2
    write(tmp_path, roles)
    (tmp_path / "model/config.json").write_text(TIED)
    message = perta(*flags(RULE, ["1"]), check=3).stderr
    assert f"tensors {EMBED} and {HEAD} differ" in message and role in message
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("stored", [{"model"}, {"tuned"}, {"tuned", "base", "forget"}, set(ROLES)], ids=str)
@pytest.mark.parametrize("rule", [RULE, Rule("random", seed=3)], ids=lambda rule: rule.method)
def test_two_names_with_the_same_bytes_are_one(perta, tmp_path, rule, stored):
    """They stay equal after the edit."""
    roles = make({name: shape for name, shape in SHAPES.items() if name != HEAD})
    want = unlearn(rule, 1, **roles)
    for role in stored:
        roles[role][HEAD] = roles[role][EMBED]
    write(tmp_path, roles)
    (tmp_path / "model/config.json").write_text(TIED)
    perta(*flags(rule, ["1"]))
    if "model" in stored:
        want[HEAD] = want[EMBED]
    have = load_file(tmp_path / "m/model.safetensors")
    assert have.keys() == want.keys()
    for name, x in have.items():
        assert x.tobytes() == want[name].out.tobytes(), name


@pytest.mark.parametrize("glob", ["--exclude=lm_head*", "--include=*embed*"])
def test_globs_choose_both_of_tied_tensors(perta, tmp_path, glob):
    roles = make()
    for tensors in roles.values():
        tensors[HEAD] = tensors[EMBED]
    write(tmp_path, roles)
    (tmp_path / "model/config.json").write_text(TIED)
    message = perta(*flags(RULE, ["1"]), glob, check=2).stderr
    assert f"select {EMBED} but not {HEAD}, which config.json ties to it" in message


def test_a_model_with_a_head_of_its_own_needs_one_in_all(perta, tmp_path):
    roles = make()
    del roles["tuned"][HEAD]
    write(tmp_path, roles)
    (tmp_path / "tuned/config.json").write_text(TIED)
    message = perta(*flags(RULE, ["1"]), check=3).stderr
    assert f"--tuned tuned: no tensor {HEAD}, but --model has it as well as {EMBED}" in message


# Embedding, head, config.json without and with the key.
TIES = {
    "gemma": (EMBED, HEAD, {"model_type": "gemma"}),
    "gpt2": ("transformer.wte.weight", HEAD, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    "gpt2, as the Hub has it": ("wte.weight", HEAD, {"model_type": "gpt2"}),
    "opt": ("model.decoder.embed_tokens.weight", HEAD, {"model_type": "opt"}),
    "bloom": ("word_embeddings.weight", HEAD, {"model_type": "bloom"}),
    "falcon": ("transformer.word_embeddings.weight", HEAD, {"tie_word_embeddings": True}),
    "mamba": ("backbone.embeddings.weight", HEAD, {"model_type": "mamba"}),
    "ctrl": ("transformer.w.weight", HEAD, {"model_type": "ctrl"}),
    "bart": ("model.shared.weight", HEAD, {"tie_word_embeddings": True}),
    "llava": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", {"tie_word_embeddings": True}),
    "llava, a head outside": ("language_model.model.embed_tokens.weight", HEAD, {"tie_word_embeddings": True}),
    "t5": ("shared.weight", HEAD, {"tie_word_embeddings": True}),
    "qwen2_vl": ("model.language_model.embed_tokens.weight", HEAD, {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight", {"tie_word_embeddings": True}),
}


def tied_roles(tmp_path, embedding, head, config, stored=("model", "tuned", "base"), other=None):
    """One matrix, stored under both names in all inputs except one; importance under the
    embedding's name."""
    roles = make({embedding: (10, 8), Q: (8, 8)})
    for role in stored:
        roles[role][head] = roles[role][embedding] * (2 if role == other else 1)
    write(tmp_path, roles)
    for role in ("model", "tuned", "base"):
        (tmp_path / role / "config.json").write_text(json.dumps(config))
    return roles


@pytest.mark.parametrize("rule", [RULE, Rule("random", seed=3)], ids=lambda rule: rule.method)
@pytest.mark.parametrize("embedding, head, config", TIES.values(), ids=TIES)
def test_ties_of_other_architectures_are_kept(perta, tmp_path, embedding, head, config, rule):
    roles = tied_roles(tmp_path, embedding, head, config)
    want = unlearn(rule, 1, **{role: {n: x for n, x in t.items() if n != head} for role, t in roles.items()})
    perta(*flags(rule, ["1"]), "--missing", "keep")
    have = load_file(tmp_path / "m/model.safetensors")
    assert have[embedding].tobytes() == have[head].tobytes() == want[embedding].out.tobytes()
    assert f"select {embedding} but not {head}" in perta(*flags(rule, ["1"]), "--exclude", head, check=2).stderr


@pytest.mark.parametrize("embedding, head, config", TIES.values(), ids=TIES)
def test_a_head_that_tuned_stores_beside_the_same_embedding_is_one(perta, tmp_path, embedding, head, config):
    roles = tied_roles(tmp_path, embedding, head, config, ["tuned"])
    perta(*flags(Rule("tv"), ["1"]))
    del roles["tuned"][head]
    check_folder(tmp_path, None, unlearn(Rule("tv"), 1, **{r: roles[r] for r in ROLES[:3]}, forget={}, retain={}))


@pytest.mark.parametrize("role", ["model", "tuned", "base"])
@pytest.mark.parametrize("embedding, head, config", TIES.values(), ids=TIES)
def test_ties_of_other_architectures_that_differ_are_refused(perta, tmp_path, embedding, head, config, role):
    tied_roles(tmp_path, embedding, head, config, other=role)
    message = perta(*flags(Rule("tv"), ["1"]), check=3).stderr
    assert f"{role}: tensors {embedding} and {head} differ" in message
    assert ("true by default" in message) == ("tie_word_embeddings" not in config)


@pytest.mark.parametrize("config", [{"model_type": "gemma", "tie_word_embeddings": False}, {"model_type": "llama"}, {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}], ids=str)
def test_what_is_not_tied_may_differ(perta, tmp_path, config):
    roles = make()
    write(tmp_path, roles)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    perta(*flags(RULE, ["1"]))
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


@pytest.mark.parametrize("embedding", [embedding for embedding, head, _ in TIES.values() if head == HEAD] + ["model.tok_embeddings.weight"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "lora"])
def test_an_adapter_of_an_embedding_without_a_head_is_refused(perta, tmp_path, embedding, whole):
    """A live adapter leaves the head unchanged, but the model uses the same matrix for it."""
    write_folder(tmp_path / "model", {embedding: np.zeros((10, 8), np.float32)}, 1, None)
    (tmp_path / "model/config.json").write_text(json.dumps({"architectures": ["AnyForCausalLM"], "vocab_size": 10}))
    module = f"base_model.model.{embedding.removesuffix('.weight')}"
    parts = {f"{module}.lora_embedding_A": (4, 10), f"{module}.lora_embedding_B": (8, 4)}
    parts = {f"{module}.weight": (10, 8)} if whole else parts
    write_adapter(tmp_path / "adapter", {name: np.ones(shape, np.float32) for name, shape in parts.items()})
    words = "unlearn --model model --tuned adapter --base model --method tv --patch p".split()
    assert f"changes {embedding}, which --model model ties to" in perta(*words, check=3).stderr


# --- buffers


BUFFERS = {
    "model.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 9, 4), np.float32),
    "h.0.attn.masked_bias": np.full(1, -1e4, np.float32),
    "h.0.attn.bias": np.tri(5, dtype=np.float32).reshape(1, 1, 5, 5),
    "h.1.attn.bias": np.tri(5, dtype=bool).reshape(1, 1, 5, 5),
    "embeddings.position_ids": np.arange(5).reshape(1, 5),
}


@pytest.mark.parametrize("having", [["model"], ["tuned"], ["base"], ["forget"], ["retain", "tuned"], ROLES], ids=str)
def test_buffers_are_passed_over_wherever_they_are(perta, tmp_path, having):
    roles = make()
    want = unlearn(RULE, 1, **roles)
    rng = np.random.default_rng(2)
    for role in having:
        roles[role] |= {n: (x + rng.integers(1, 9)).astype(x.dtype) for n, x in BUFFERS.items()}
    want |= {name: kept(roles["model"][name]) for name in BUFFERS if "model" in having}
    write(tmp_path, roles)
    summary = summary_of(perta, *flags(RULE, ["1"]))
    check_folder(tmp_path, None, want)
    whys = [reason["why"] for reason in summary["unedited"]["reasons"]]
    assert whys == ["passed through: a buffer"] * ("model" in having)


def test_buffers_of_an_adapter_are_passed_over(perta, tmp_path):
    """The buffers of a module that it stores whole."""
    roles = make()
    write(tmp_path, roles)
    whole = {f"base_model.model.{name}": x for name, x in ({Q: roles["tuned"][Q]} | BUFFERS).items()}
    write_adapter(tmp_path / "adapter", whole)
    words = [word if word != "tuned" else "adapter" for word in flags(RULE, ["1"])]
    perta(*words)
    want = {name: kept(x) for name, x in roles["model"].items()}
    want[Q] = unlearn(RULE, 1, **roles)[Q]
    check_folder(tmp_path, None, want)


def test_a_bias_is_no_mask(perta, tmp_path):
    """Attention biases: vectors, while GPT-2's mask is a square."""
    roles = make(SHAPES | {"h.0.attn.bias": (8,)})
    write(tmp_path, roles)
    perta(*flags(RULE, ["1"]))
    check_folder(tmp_path, None, unlearn(RULE, 1, **roles))


# --- notes about a run that changes nothing


def test_a_run_that_changes_nothing_says_why(perta, tmp_path):
    roles = make()
    roles["tuned"] = {**roles["base"], "model.rotary_emb.inv_freq": np.ones(4, np.float32)}  # files differ
    write(tmp_path, roles)
    for rule in (RULE, Rule("tv")):
        notes = notes_of(perta, *flags(rule, ["1"]), "--force")
        assert "nothing changes: --tuned and --base hold the same values" in notes
    assert "alpha 0: nothing changes" in notes_of(perta, *flags(RULE, ["0"]), "--force")


def test_a_weight_of_zero_changes_nothing(perta, tmp_path):
    roles = make()
    roles["forget"] = {name: np.zeros_like(x) for name, x in roles["forget"].items()}
    write(tmp_path, roles)
    assert "nothing changes: the weight of every edited parameter is 0" in notes_of(perta, *flags(RULE, ["1"]))
    rule = Rule("constant", weight=0)
    assert "nothing changes: the weight of every" in notes_of(perta, *flags(rule, ["1"]), "--force")


def test_a_run_that_changes_something_says_nothing(perta, tmp_path):
    write(tmp_path, make())
    summary = summary_of(perta, *flags(RULE, ["1"]))
    assert summary["notes"] == []
    assert summary["unedited"] == {"parameters": 0, "of": 232, "reasons": []}
    assert "unedited: 0 of 232 parameters\n" in perta(*flags(RULE, ["1"]), "--force").stdout
