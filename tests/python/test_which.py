"""Of several models in one folder perta takes the one that transformers loads, or none."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
NAME = "lm_head.weight"


def tiny(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).float()


@pytest.fixture
def folder(tmp_path):
    tiny(0).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def put(folder, name, seed):
    """The weights of another model, under that name."""
    safetensors_torch.save_file(tiny(seed).state_dict(), folder / name, {"format": "pt"})


def put_index(folder, name):
    names = dict.fromkeys(tiny(0).state_dict(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def loaded(folder):
    """Which of the models transformers loads, by its seed."""
    weight = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()[NAME]
    return [seed for seed in (0, 1) if torch.equal(weight, tiny(seed).state_dict()[NAME])]


def taken(perta, folder):
    shards = json.loads(perta("inspect", folder, "--json").stdout)["shards"]
    return [shard["name"] for shard in shards]


def test_a_single_file_beside_an_index_of_others(perta, folder):
    put(folder, "model-00001-of-00001.safetensors", 1)
    put_index(folder, "model-00001-of-00001.safetensors")
    assert loaded(folder) == [0]
    refusal = perta("inspect", folder, check=3).stderr
    assert "holds two models: model.safetensors, which transformers loads" in refusal
    assert "model-00001-of-00001.safetensors" in refusal
    assert taken(perta, folder / "model.safetensors") == ["model.safetensors"]  # one is selected
    (folder / "model.safetensors").unlink()
    assert loaded(folder) == [1]
    assert taken(perta, folder) == ["model-00001-of-00001.safetensors"]


def test_an_index_of_the_single_file(perta, folder):
    put_index(folder, "model.safetensors")
    assert loaded(folder) == [0] and taken(perta, folder) == ["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"]
)
def test_weights_that_transformers_passes_over(perta, folder, name):
    put(folder, name, 1)
    assert loaded(folder) == [0] and taken(perta, folder) == ["model.safetensors"]


def test_the_file_that_the_config_names(perta, folder):
    put(folder, "other.safetensors", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "other.safetensors"})
    )
    assert loaded(folder) == [1]
    refusal = perta("inspect", folder, check=3).stderr
    assert "transformers_weights is other.safetensors, which transformers loads" in refusal
    (folder / "model.safetensors").unlink()
    assert loaded(folder) == [1] and taken(perta, folder) == ["other.safetensors"]


def test_an_adapter_on_top_of_the_model(perta, folder):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny(0), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(folder)
    live = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(9)[None]
    assert not torch.allclose(live(ids).logits, tiny(0)(ids).logits)
    for words in (
        ["inspect", folder],
        ["unlearn", "--model", folder, "--tuned", folder, "--method", "tv", "--patch", "p"],
    ):
        refusal = perta(*words, check=3).stderr
        assert "holds a model (model.safetensors) and a PEFT adapter" in refusal
    assert taken(perta, folder / "model.safetensors") == ["model.safetensors"]
