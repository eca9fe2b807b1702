"""`perta tune` beside PEFT and PyTorch's AdamW, and `--adapter` of eval and estimate."""

import json
import math
import random
import warnings

import numpy as np
import pytest
from conftest import LONG, part

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MASK = (1 << 64) - 1
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make_model(folder, family="llama", dtype=torch.float32, **sizes):
    name, keys = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SIZES | keys | sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder)


def make_data(path, n=21, longest=90, seed=5):
    """Samples of many lengths; of each, the first part is a prompt without labels."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        ids = [rng.randrange(SIZES["vocab_size"]) for _ in range(rng.randrange(4, longest))]
        prompt = rng.randrange(len(ids) - 2)
        lines.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def random_bits(state, i):
    """Output number i + 1 of SplitMix64 started at state."""
    z = (state + (i + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def batches(n, size, seed, updates):
    """As docs/tune.md says."""
    made = []
    for epoch in range(updates):
        state, order = random_bits(seed, 1 + epoch), list(range(n))
        for i in range(n - 1, 0, -1):
            k = random_bits(state, n - 1 - i) % (i + 1)
            order[i], order[k] = order[k], order[i]
        made += [order[i : i + size] for i in range(0, n, size)]
        if len(made) >= updates:
            break
    return made[:updates]


def load(folder, adapter=None, train=False):
    by = transformers.AutoModelForCausalLM
    model = by.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=train)
    return model.eval()  # no dropout in any case


def loss_of(model, samples):
    """The mean over all labels, as transformers' Trainer has it for a batch."""
    total, n = 0, 0
    for sample in samples:
        labels = torch.tensor([sample["labels"]])
        logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        n += (labels[0, 1:] != -100).sum()
    return total / n


def train(model, samples, which, rate=5e-5, scheduler="linear", warmup=0, decay=0.0, norm=1.0):
    """Losses, rates, norms, as the Trainer has them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = transformers.get_scheduler(scheduler, optimizer, warmup, len(which))
    seen = []
    for batch in which:
        loss = loss_of(model, [samples[i] for i in batch])
        loss.backward()
        norms = torch.nn.utils.clip_grad_norm_(parameters, norm if norm else math.inf)
        seen.append((loss.item(), norms.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen


def tensors_of(model):
    state = peft.get_peft_model_state_dict(model)
    return {name: x.detach() for name, x in state.items()}


def near(have, want, rate):
    """Adapters: to 1e-4. AdamW divides an element's gradient by its own size, so rounding shows
    where that is next to nothing: there, by a hundredth of a step."""
    assert have.keys() == want.keys()
    a, b = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (have, want))
    assert (a - b).norm() <= 1e-4 * b.norm()
    assert (a - b).abs().max() <= 1e-2 * rate
    for name in have:
        assert (have[name] - want[name]).norm() <= 1e-3 * want[name].norm(), name


TUNE = "tune --model model --data data.jsonl --compute f32 --json".split()


def begin(perta, flags):
    """A new adapter, whose learning rate was 0."""
    perta(*TUNE, "--out", "new", "--steps", 1, "--learning-rate", 0, *flags)


def compare(perta, tmp_path, new=(), flags=(), updates=6, size=5, **how):
    """From the same new adapter, by perta and by PEFT."""
    samples = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    begin(perta, new)
    words = [*TUNE, "--adapter", "new", "--out", "out", "--steps", updates, "--batch-size", size, "--seed", 9]
    run = json.loads(perta(*words, *flags).stdout)
    model = load(tmp_path / "model", tmp_path / "new", train=True)
    want = train(model, samples, batches(len(samples), size, 9, updates), **how)
    assert len(run["updates"]) == updates
    for update, (loss, norm, rate) in zip(run["updates"], want):
        assert abs(update["loss"] - loss) <= 1e-5 * max(1, loss)
        assert abs(update["gradient_norm"] - norm) <= 1e-4 * norm
        assert abs(update["learning_rate"] - rate) <= 1e-12
    have, first = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("out", "new"))
    trained = tensors_of(model)
    near(have, trained, how["rate"])
    moved = max((x - first[name]).abs().max().item() for name, x in have.items())
    assert moved > 1e-4
    return run


ALL = ["--target-modules", "all-linear", "--rank", 4, "--lora-alpha", 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_adapters_are_pefts(perta, tmp_path, family):
    make_model(tmp_path / "model", family)
    make_data(tmp_path / "data.jsonl")
    compare(perta, tmp_path, ALL, ["--learning-rate", 1e-3], rate=1e-3)


WAYS = {
    "defaults": ([], {}),
    "cosine, warmup": (["--lr-scheduler", "cosine", "--warmup", 2], {"scheduler": "cosine", "warmup": 2}),
    "warmup as a share": (["--warmup", 0.3], {"warmup": 3}),
    "constant": (["--lr-scheduler", "constant"], {"scheduler": "constant"}),
    "weight decay": (["--weight-decay", 0.3], {"decay": 0.3}),
    "clipped": (["--max-grad-norm", 0.01], {"norm": 0.01}),
    "not clipped": (["--max-grad-norm", 0], {"norm": 0}),
}


@pytest.mark.parametrize("way", WAYS)
def test_schedules_decay_and_clipping_are_transformers(perta, tmp_path, way):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 13)
    flags, how = WAYS[way]
    compare(perta, tmp_path, [], [*flags, "--learning-rate", 2e-3], updates=8, rate=2e-3, **how)
