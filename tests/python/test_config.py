"""config.json: how it is read, which models are refused for it, the padding token, and tied
embeddings under either name."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_config_sweep import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    PAD,
    SAMPLES,
    VOCABULARY,
    base_of,
    load,
    weights,
)

ESTIMATE = "estimate --model model --data data.jsonl --out imp --compute f32 --json --stat mean,meansq".split()
EVAL = "eval --model model --data data.jsonl --compute f32 --json --per-sample".split()


@pytest.fixture
def model(tmp_path):
    """make(said, family, stored=..., text=...) writes model and data.jsonl in the test's folder."""

    def make(said=None, family="Llama", stored="embedding", text=None):
        config = base_of(family) | (said or {})
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        (tmp_path / "model").mkdir()
        path = tmp_path / "model/config.json"
        path.write_bytes(text if isinstance(text, bytes) else (text or json.dumps(config)).encode())
        save_file(weights(family, config, stored, torch.float32), tmp_path / "model/model.safetensors")
        lines = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in SAMPLES)
        (tmp_path / "data.jsonl").write_text(lines)
        return tmp_path / "model"

    return make


def statistics(model):
    """Mean, and mean square, of the samples' gradients."""
    mean, meansq = {}, {}
    for ids in SAMPLES:
        model.zero_grad()
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        for name, p in model.named_parameters():
            mean[name] = mean.get(name, 0) + p.grad / len(SAMPLES)
            meansq[name] = meansq.get(name, 0) + p.grad**2 / len(SAMPLES)
    return mean, meansq


def assert_statistics(perta, folder):
    perta(*ESTIMATE)
    have = [load_file(folder.parent / f"imp/{stat}/model.safetensors") for stat in ("mean", "meansq")]
    want = statistics(load(folder))
    for of, to in zip(have, want, strict=True):
        for name, g in to.items():
            error = (of[name if name in of else HEAD] - g).abs().max()
            assert error <= 1e-4 * g.abs().max(), name
    shutil.rmtree(folder.parent / "imp")
    return have


@pytest.mark.parametrize(
    "family, said",
    [
        ("Llama", {"architectures": ["LLaMAForCausalLM"], "pad_token_id": -1, "max_sequence_length": 2048}),
        ("Qwen3", {"architectures": ["FSDPQwen3ForCausalLM"]}),
        ("Llama", {"architectures": ["FSDPLlamaForCausalLM"], "tie_word_embeddings": True}),
    ],
)
def test_names_that_tools_gave_architectures(perta, model, family, said):
    """The first conversions of LLaMA, and checkpoints saved under FSDP2; transformers goes by
    model_type."""
    assert_statistics(perta, model(said, family))


# --- padding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pad", [PAD, 0, PAD - VOCABULARY, None, "eos"])
def test_looking_up_the_padding_has_no_gradient(perta, model, pad, tied):
    """PyTorch's padding_idx, which transformers sets; the part that a tied head adds stays."""
    token = PAD if pad == "eos" else pad
    said = {"pad_token_id": token, "tie_word_embeddings": tied} | ({"eos_token_id": PAD} if pad == "eos" else {})
    family = "Qwen3" if tied else "Mistral"
    for of in assert_statistics(perta, model(said, family)):
        row = of[EMBEDDING][VOCABULARY + token if token and token < 0 else token or 0]
        assert (row.abs().max() == 0) == (token is not None and not tied)


@pytest.mark.parametrize("pad", [VOCABULARY, -VOCABULARY - 1, [PAD], True, 7.0, "7", 2**70])
def test_a_padding_that_is_no_token_is_refused(perta, model, pad):
    with pytest.raises(Exception):  # noqa: B017 - transformers raises what it stumbles over
        load(model({"pad_token_id": pad}))
    assert '"pad_token_id" is not a token of the vocabulary' in perta(*ESTIMATE, check=3).stderr


# --- tied embeddings


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_either_name_of_a_tied_pair_will_do(perta, model, stored):
    folder = model({"tie_word_embeddings": True}, "Llama", stored)
    for of in assert_statistics(perta, folder):
        assert (EMBEDDING in of) == (stored != "head") and (HEAD in of) == (stored == "head")
    loss = load(folder)(input_ids=torch.tensor([SAMPLES[0]]), labels=torch.tensor([SAMPLES[0]])).loss
    assert abs(json.loads(perta(*EVAL).stdout)["per_sample"][0]["loss"] - loss) < 1e-5


def test_an_importance_of_either_name_is_the_other_models(perta, model, tmp_path):
    """The edit of a tied model is the same, whichever name the model, its importance and --tuned
    use."""
    names, edited = ("embedding", "head"), []
    for stored in names:
        folder = model({"tie_word_embeddings": True}, "Llama", stored)
        perta(*ESTIMATE)
        (tmp_path / "imp").rename(tmp_path / f"imp-{stored}")
        shutil.copytree(folder, tmp_path / stored)
        shutil.copytree(folder, tmp_path / f"tuned-{stored}")
        tuned = {name: t + 1 for name, t in load_file(folder / "model.safetensors").items()}
        save_file(tuned, tmp_path / f"tuned-{stored}/model.safetensors")
    for of in names:
        for by in names:
            words = f"unlearn --model {of} --tuned tuned-{by} --base {of} --forget imp-{by}/mean --retain imp-{of}/mean"
            perta(*words.split(), "--patch", f"patch-{of}-{by}", "--out", f"out-{of}-{by}")
            edited.append(load_file(tmp_path / f"out-{of}-{by}/model.safetensors"))
            edited[-1]["tied"] = edited[-1].pop(EMBEDDING if of == "embedding" else HEAD)
            assert not torch.equal(edited[-1]["tied"], load_file(tmp_path / "tuned-head/model.safetensors")[HEAD] - 1)
    for other in edited[1:]:
        assert edited[0].keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in edited[0].items())


def test_steps_move_a_pair_that_has_the_heads_name(perta, model, tmp_path):
    edited = {}
    for stored in ("embedding", "head"):
        folder = model({"tie_word_embeddings": True}, "Llama", stored)
        shutil.copytree(folder, tmp_path / "tuned", dirs_exist_ok=True)
        tuned = {name: t * 1.1 for name, t in load_file(folder / "model.safetensors").items()}
        save_file(tuned, tmp_path / "tuned/model.safetensors")
        words = "unlearn --model model --tuned tuned --base model --method signed --steps 2 --compute f32"
        lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
        (tmp_path / "retain.jsonl").write_text(json.dumps({"input_ids": lines[0]["input_ids"][::-1]}))
        data = "--data-forget data.jsonl --data-retain retain.jsonl"
        perta(*words.split(), *data.split(), "--patch", "patch", "--out", "out", "--force")
        edited[stored] = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(edited["embedding"].pop(EMBEDDING), edited["head"].pop(HEAD))
    assert all(torch.equal(t, edited["head"][name]) for name, t in edited["embedding"].items())


def test_a_tied_pair_that_differs_is_refused(perta, model, tmp_path):
    folder = model({"tie_word_embeddings": True}, "Llama", "both")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    for words in (ESTIMATE, EVAL):
        message = perta(*words, check=3).stderr
        assert EMBEDDING in message and HEAD in message and '"tie_word_embeddings"' in message
    assert not (tmp_path / "imp").exists()
    (folder / "config.json").write_text(json.dumps(base_of("Llama") | {"tie_word_embeddings": False}))
    assert_statistics(perta, folder)


# --- which models are supported


@pytest.mark.parametrize(
    "said, says",
    [
        ({"architectures": ["PaliGemmaForConditionalGeneration"], "vision_config": {}}, "This is a wrapper"),
        ({"architectures": ["IdeficsForConditionalGeneration"], "text_config": {}}, "This is a wrapper"),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {}}, "is not that of LlavaForCond"),
        ({"architectures": None, "model_type": "llava"}, 'no "text_config"'),
        ({"architectures": None, "model_type": "llava", "text_config": 1}, 'no "text_config"'),
        (
            {"architectures": ["PeftModelForCausalLM"]},
            '"model_type" says llama; if the model is one, write LlamaForCausalLM under "architectures"',
        ),
        (
            {"architectures": None, "model_type": "llava", "text_config": {"model_type": "t5"}},
            'in "text_config": "model_type" t5 is not supported',
        ),
        (
            {"architectures": None, "model_type": "llava", "text_config": {"hidden_act": "tanhshrink"}},
            'in "text_config": hidden_act "tanhshrink"',
        ),
        (
            {"architectures": None, "model_type": "qwen2_vl", "text_config": {"model_type": "llama"}},
            "is not qwen2_vl_text, the text model of Qwen2VL",
        ),
        ({"architectures": None, "model_type": "qwen2_vl", "head_dim": 6}, '"head_dim" is not "hidden_size" divided'),
        ({"architectures": ["T5ForConditionalGeneration"]}, "an encoder beside its decoder"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported: it has state-space layers"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "it has linear attention (gated delta rule)"),
        ({"architectures": ["Gemma3nForConditionalGeneration"], "text_config": {}}, "it has per-layer embeddings"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "This is an encoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "another head than a language model's"),
        ({"architectures": ["LlamaModel"]}, "a model without a head"),
        ({"architectures": ["XLNetLMHeadModel"], "model_type": "xlnet"}, "XLNetLMHeadModel is not supported; "),
        ({"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}, "which is not run"),
        ({"architectures": ["QwenForCausalLM"], "model_type": "llama"}, "architecture QwenForCausalLM is not"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "llama"}, '"model_type" llama is not that of Mistral'),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}, "write llama there if it is one"),
        ({"architectures": "LlamaForCausalLM"}, '"architectures" is not a list of names'),
        ({"architectures": [3]}, '"architectures" is not a list of names'),
        ({"model_type": 3}, '"model_type" is not a string'),
    ],
)
def test_a_model_that_is_not_supported_is_called_what_it_is(perta, model, said, says):
    model(said)
    for words in (ESTIMATE, EVAL):
        message = perta(*words, check=3).stderr
        assert says in message and "model/config.json" in message
    assert "can be edited; estimate, eval and tune refuse it: model/config.json" in perta("inspect", "model").stdout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", [{"architectures": None}, {"architectures": []}, "more"])
def test_model_type_says_which_of_them_it_is(perta, model, family, said):
    more = {"architectures": ["Own", f"{family}ForCausalLM", "LlamaForCausalLM"]}
    folder = model(more if said == "more" else said, family)
    loss = load(folder)(input_ids=torch.tensor([SAMPLES[0]]), labels=torch.tensor([SAMPLES[0]])).loss
    assert abs(json.loads(perta(*EVAL).stdout)["per_sample"][0]["loss"] - loss) < 1e-5


# --- JSON as Python reads it


def with_keys(keys):
    """The text of config.json with more keys at its end."""
    return json.dumps(base_of("Llama"))[:-1] + f", {keys}}}"


@pytest.mark.parametrize(
    "keys",
    [
        '"time_step_limit": [0.0, Infinity], "x": -Infinity, "y": NaN',
        '"rope_theta": 500.0, "rope_theta": 20.0',
        '"rope_scaling": {"type": "linear", "factor": 2.0, "factor": 5.0}',
        '"model_max_length": 1000000000000000019884624838656',
        '"x": "Infinity \\" NaN \\\\", "rope_theta": 20.0',
        '"x": "\\u0000"',
    ],
)
def test_what_python_reads_is_read(perta, model, keys):
    folder = model(text=with_keys(keys))
    loss = load(folder)(input_ids=torch.tensor([SAMPLES[0]]), labels=torch.tensor([SAMPLES[0]])).loss
    assert abs(json.loads(perta(*EVAL).stdout)["per_sample"][0]["loss"] - loss) < 1e-5


def test_a_byte_order_mark_is_passed_over(perta, model):
    model(text=b"\xef\xbb\xbf" + json.dumps(base_of("Llama")).encode())
    perta(*EVAL)


@pytest.mark.parametrize(
    "text, says",
    [
        (b'{"a": 1,}', "byte 9: not valid JSON"),
        (b'{"x": [NaN, -Infinity], "a": }', "byte 30: not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "no JSON object"),
        (with_keys('"rope_theta": Infinity').encode(), '"rope_theta" is not a float32 above 0'),
        (with_keys('"rms_norm_eps": NaN').encode(), '"rms_norm_eps" is not a float32 above 0'),
    ],
)
def test_what_is_not_json_is_refused_with_its_byte(perta, model, text, says):
    model(text=text)
    for words in (ESTIMATE, EVAL):
        message = perta(*words, check=3).stderr
        assert says in message and "model/config.json" in message


# --- unknown keys


def test_keys_that_are_not_known_are_named_once(perta, model):
    model({"my_key": 1, "use_cache": True, "their\nkey": 2, "rope_scaling": {"type": "default", "odd": 1}})
    for words in (ESTIMATE, EVAL, [*ESTIMATE, "--dry-run", "--force"], ["inspect", "model", "--json"]):
        run = perta(*words)
        assert json.loads(run.stdout)["unknown_config_keys"] == ["my_key", "their?key", "rope_scaling.odd"]
        note = "note: config.json has keys that perta does not know and ignores: my_key, their?key, rope_scaling.odd\n"
        assert run.stderr.count(note) == 1
    assert "my_key" not in perta(*EVAL, "--quiet").stderr
    model({f"key_{i}": 1 for i in range(25)})
    assert "key_19 and 5 more\n" in perta("inspect", "model").stderr
    model()
    assert json.loads(perta("inspect", "model", "--json").stdout)["unknown_config_keys"] == []
    assert "note" not in perta(*EVAL).stderr
