"""A language model within a model for images: other parts are left as they are, and adapters have
the names of the model in memory, which are not those of its files."""

import copy
import json
import math
import warnings

import pytest
from conftest import part

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from families import FAMILIES, make_model, samples, write_lines
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")

KINDS = ["llava", "mistral3", "qwen2_vl"]
OTHER = ("vision_tower.", "visual.", "multi_modal_projector.")
STEPS = "--steps 2 --data-forget data.jsonl --data-retain other.jsonl --compute f32"


def tensors_of(folder):
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


def is_other(name):
    return name.removeprefix("model.").startswith(OTHER)


@pytest.fixture
def model(tmp_path):
    """Makes the checkpoint "model", data.jsonl and other.jsonl."""

    def make(kind, i=0):
        loaded = make_model(tmp_path / "model", kind, FAMILIES[kind][i])
        lines = samples(loaded.config.get_text_config().vocab_size)
        write_lines(tmp_path / "data.jsonl", lines[:2])
        write_lines(tmp_path / "other.jsonl", lines[2:])
        return loaded, lines

    return make


@pytest.mark.parametrize("kind", part(KINDS, plain=2))
def test_other_parts_stay_byte_for_byte(perta, tmp_path, model, kind):
    model(kind)
    perta(*"estimate --model model --data data.jsonl --out f --stat mean,meansq".split())
    perta(*"estimate --model model --data other.jsonl --out r --stat mean,meansq".split())
    before = tensors_of(tmp_path / "model")
    others = [name for name in before if is_other(name)]
    assert others and not any(is_other(name) for name in tensors_of(tmp_path / "f/meansq"))
    assert tensors_of(tmp_path / "f/meansq").keys() == before.keys() - set(others)
    tuned = {name: x + 0.01 for name, x in before.items()}
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned/model.safetensors")
    edit = "unlearn --model model --tuned tuned --base model --forget f/meansq --retain r/meansq --patch p --out m --force".split()
    assert f"no importance for tensor {others[0].split('.')[0]}" in perta(*edit, check=3).stderr
    perta(*edit, "--missing", "keep")
    perta(*f"unlearn --model model --box 0.1 --patch q --out n {STEPS}".split())
    for folder in ("m", "n"):
        after = tensors_of(tmp_path / folder)
        assert all(torch.equal(after[name], before[name]) for name in others)
        assert not all(torch.equal(after[name], x) for name, x in before.items())


def other_names(name):
    """As before transformers 4.52, or as in the files: a model's names have changed."""
    return name.replace("model.language_model.", "language_model.model.")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["now", "once"])
def test_an_adapter_does_what_peft_does(perta, tmp_path, model, kind, names):
    """Its modules are named as in memory; one of the vision tower changes nothing for text."""
    loaded, lines = model(kind)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*(q_proj|down_proj|attn\.proj|linear_1)")
    tuned = peft.get_peft_model(copy.deepcopy(loaded), config)
    for i, p in enumerate(p for p in tuned.parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    tuned.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    parts = load_file(path)
    assert any(is_other(name.removeprefix("base_model.model.")) for name in parts)
    if names == "once":
        save_file({other_names(name): x for name, x in parts.items()}, path)
    with torch.no_grad():
        want = [tuned(**{k: torch.tensor([x]) for k, x in line.items()}).loss.item() for line in lines[:2]]
        plain = [loaded(**{k: torch.tensor([x]) for k, x in line.items()}).loss.item() for line in lines[:2]]
    have = json.loads(perta(*"eval --model model --adapter a --data data.jsonl --json --per-sample --compute f32".split()).stdout)
    for item, loss, before in zip(have["per_sample"], want, plain, strict=True):
        assert abs(item["loss"] - loss) <= 1e-5 < abs(loss - before)
    perta(*"unlearn --model model --tuned a --base model --method tv --alpha=-1 --patch p --out m".split())
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    after, wanted = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "merged")
    assert after.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (after[name] - x).abs().max() <= 1e-6 * x.abs().max(), name


def test_two_names_of_one_module_are_refused(perta, tmp_path, model):
    loaded, _ = model("llava")
    peft.get_peft_model(loaded, peft.LoraConfig(r=3, target_modules=r".*language_model.*q_proj")).save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    parts = load_file(path)
    save_file(parts | {other_names(name): x.clone() for name, x in parts.items()}, path)
    message = perta(*"eval --model model --adapter a --data data.jsonl".split(), check=3).stderr
    assert "language_model.model.layers.0.self_attn.q_proj.weight is changed twice" in message


@pytest.mark.parametrize("kind", part(KINDS, plain=1))
def test_tensors_of_unknown_parts_are_refused(perta, tmp_path, model, kind):
    model(kind)
    save_file(tensors_of(tmp_path / "model") | {"audio_tower.w": torch.ones(2)}, tmp_path / "model/model.safetensors")
    message = perta(*"eval --model model --data data.jsonl".split(), check=3).stderr
    assert "has tensor audio_tower.w, which its config.json does not call for" in message


def change(folder, **keys):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in keys.items():
        within = config["text_config"] if key.startswith("text_") else config
        within.pop(key.removeprefix("text_"), None)
        if value is not ...:
            within[key.removeprefix("text_")] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "kind, keys",
    [
        ("mistral3", {"tie_word_embeddings": ...}),
        ("mistral3", {"tie_word_embeddings": ..., "text_tie_word_embeddings": True}),
        ("llava", {"tie_word_embeddings": False, "text_tie_word_embeddings": False}),
    ],
)
def test_a_head_that_is_stored_is_one_of_its_own(perta, tmp_path, model, kind, keys):
    """Published files of Mistral 3 do not say, and transformers ties only what is the same."""
    _, lines = model(kind)
    change(tmp_path / "model", **keys)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    have = json.loads(perta(*"eval --model model --data data.jsonl --json --per-sample --compute f32".split()).stdout)
    for item, line in zip(have["per_sample"], lines, strict=False):
        with torch.no_grad():
            want = loaded(**{k: torch.tensor([x]) for k, x in line.items()}).loss.item()
        assert abs(item["loss"] - want) <= 1e-5


def test_a_head_that_is_the_embedding_must_be_said_to_be(perta, tmp_path, model):
    model("mistral3")
    change(tmp_path / "model", tie_word_embeddings=...)
    tensors = tensors_of(tmp_path / "model")
    (embedding,) = (x for name, x in tensors.items() if name.endswith("embed_tokens.weight"))
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    save_file(tensors | {head: embedding.clone()}, tmp_path / "model/model.safetensors")
    assert "are the same; say under" in perta(*"eval --model model --data data.jsonl".split(), check=3).stderr


def test_keys_are_those_of_the_text_model(perta, tmp_path, model):
    model("llava")
    change(tmp_path / "model", text_hidden_act="tanhshrink")
    message = perta(*"eval --model model --data data.jsonl".split(), check=3).stderr
    assert 'in "text_config": hidden_act "tanhshrink"' in message
    change(tmp_path / "model", text_hidden_act="silu", hidden_act="gelu", odd=1, text_strange=2)
    notes = json.loads(perta(*"eval --model model --data data.jsonl --json".split()).stdout)
    assert notes["unknown_config_keys"] == ["odd", "text_config.strange"]
    change(tmp_path / "model", text_alibi=True)
    message = perta(*"eval --model model --data data.jsonl".split(), check=3).stderr
    assert '"alibi" is true' in message


@pytest.mark.parametrize("kind, keys", [("gemma3", {"text_final_logit_softcapping": 0.5}), ("llava", {"text_model_type": "granite", "text_logits_scaling": 4.0})])
def test_what_a_head_within_another_model_lacks_is_refused(perta, tmp_path, model, kind, keys):
    """The head is that of the model around, which caps and scales nothing."""
    model(kind)
    change(tmp_path / "model", **keys)
    message = perta(*"eval --model model --data data.jsonl".split(), check=3).stderr
    assert 'in "text_config": its logits are scaled, capped' in message


def test_keys_at_the_top_are_the_text_models(perta, tmp_path, model):
    """Published files of Qwen2-VL have no "text_config"."""
    model("qwen2_vl")
    want = perta(*"eval --model model --data data.jsonl --json --compute f32".split()).stdout
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    path.write_text(json.dumps({k: x for k, x in text.items() if k != "model_type"} | config))
    have = perta(*"eval --model model --data data.jsonl --json --compute f32".split()).stdout
    assert json.loads(have)["loss"] == json.loads(want)["loss"]
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_inspect_says_in_one_line_what_a_model_is_for(perta, tmp_path, model):
    model("llava")
    assert "  can be edited, estimated and tuned\n" in perta("inspect", "model").stdout
    said = json.loads(perta("inspect", "model", "--json").stdout)
    assert said["can"] == {"edit": True, "estimate": True, "tune": True} and "not_computed" not in said
    tensors = tensors_of(tmp_path / "model")
    save_file(tensors | {"audio_tower.w": torch.ones(2)}, tmp_path / "model/model.safetensors")
    (line,) = [x for x in perta("inspect", "model").stdout.splitlines() if "can be edited" in x]
    assert line.startswith("  can be edited; estimate, eval and tune refuse it: model: has tensor audio_tower.w")
    (tmp_path / "model/config.json").unlink()
    said = json.loads(perta("inspect", "model", "--json").stdout)
    assert said["can"] == {"edit": True, "estimate": False, "tune": False}
    assert "no config.json" in said["not_computed"] and "not_edited" not in said
    (tmp_path / "codes").mkdir()
    save_file({"a": torch.ones(2, dtype=torch.int32)}, tmp_path / "codes/model.safetensors")
    said = json.loads(perta("inspect", "codes", "--json").stdout)
    assert said["can"]["edit"] is False and "has no tensor of BF16" in said["not_edited"]
    assert "  edits refuse it: codes: has no tensor of BF16" in perta("inspect", "codes").stdout


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_sizes_that_a_file_leaves_out_are_transformers(perta, tmp_path, kind):
    """The text model's config says only what is not the default of its class: all tensors of
    such a model are accepted, in a file without bytes."""
    whole = transformers.CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in transformers.AutoModelForCausalLM.from_config(whole).state_dict().items()}
    outer = "gemma3" if kind == "gemma3_text" else "llava"
    (tmp_path / "model").mkdir()
    config = {"model_type": outer, "text_config": {"model_type": kind}, "tie_word_embeddings": False}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    write_header(tmp_path / "model/model.safetensors", {f"language_model.{name}": shape for name, shape in shapes.items()})
    said = json.loads(perta("inspect", "model", "--json").stdout)
    assert said["can"]["estimate"], said["not_computed"]


def write_header(path, shapes):
    """A file of BF16 tensors without their bytes: sparse."""
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
