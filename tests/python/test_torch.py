"""PyTorch rounds as perta does, and transformers opens what perta writes."""

import numpy as np
import pytest
from reference import read_folder, write_folder

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_task_arithmetic_in_torch_gives_the_same_bits(perta, tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    model, tuned, base = (
        torch.randn(501, 67, generator=generator, dtype=real).to(dtype) for _ in range(3)
    )
    for name, tensor in [("model", model), ("tuned", tuned), ("base", base)]:
        (tmp_path / name).mkdir()
        safetensors_torch.save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    folders = "--model model --tuned tuned --base base --out out --patch p"
    perta("unlearn", "--method", "tv", "--alpha", "0.7", *folders.split())

    alpha = torch.tensor(0.7, dtype=torch.float32).to(real)
    want = (model.to(real) - alpha * (tuned.to(real) - base.to(real))).to(dtype)
    have = safetensors_torch.load_file(tmp_path / "out/model.safetensors")["w"]
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(have.view(integer), want.view(integer))


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_transformers_opens_an_unlearned_model(perta, tmp_path, shard_size):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    for seed, folder in enumerate(["model", "tuned", "base"]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / folder, max_shard_size=shard_size)
    rng = np.random.default_rng(0)
    shapes = {name: x.shape for name, x in read_folder(tmp_path / "model").items()}
    for folder in ("forget", "retain"):
        gradients = {name: rng.standard_normal(s).astype("f4") for name, s in shapes.items()}
        write_folder(tmp_path / folder, gradients, metadata={"perta.stat": "mean"})
    folders = "--model model --tuned tuned --base base --forget forget --retain retain"
    perta("unlearn", *folders.split(), "--out", "out", "--patch", "p")

    unlearned = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert unlearned.dtype == torch.bfloat16
    logits = unlearned(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 64) and torch.isfinite(logits).all()
    perta("revert", "out", "p", "--out", "back")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    want = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(back[name], want[name]) for name in want)
    assert not torch.equal(unlearned.state_dict()["lm_head.weight"], want["lm_head.weight"])
