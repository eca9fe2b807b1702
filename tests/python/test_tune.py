"""`perta tune` beside PEFT and PyTorch's AdamW, and `--adapter` of eval and estimate."""

import hashlib
import hmac
import json
import math
import random
import signal
import subprocess
import warnings

import numpy as np
import pytest
from conftest import LONG, PERTA, needed
from llama import write_llama
from reference import random_bits, shuffled
from test_limits import peak_mib, sanitized
from verbs import LLAMA, stop_at

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="examples/requirements.txt is not installed")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

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
    "gemma2": ("Gemma2", {"head_dim": 12, "sliding_window": 20, "final_logit_softcapping": 4.0}),
    "olmo2": ("Olmo2", {"hidden_act": "gelu"}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 0.4, "residual_multiplier": 0.7}),
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


def batches(n, size, seed, updates):
    """As docs/tune.md says."""
    made = []
    for epoch in range(updates):
        order = shuffled(n, seed, epoch)
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
    for update, (loss, norm, rate) in zip(run["updates"], want, strict=True):
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


# --- adapters as inputs of eval and estimate


@pytest.fixture
def tuned(tmp_path):
    """A function that writes a model, data and an adapter that PEFT made, all of whose parameters
    changed."""

    def make(family="llama", **config):
        make_model(tmp_path / "model", family)
        make_data(tmp_path / "data.jsonl", 6)
        model = load(tmp_path / "model")
        keys = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(**keys | config))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        model.save_pretrained(tmp_path / "adapter")
        return model.eval()

    return make


def samples_of(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def base_gradients(model, samples):
    """The mean loss of samples, and the gradients of the base's own parameters."""
    base = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for p in base.values():
        p.requires_grad_(True)
    loss = sum(loss_of(model, [sample]) for sample in samples) / len(samples)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in base.items()}


PATTERNS = {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 3}}
CONFIGS = {
    "llama": {},
    "mistral": {"use_rslora": True, "r": 5},
    "qwen2": PATTERNS,
    "qwen3": {"target_modules": ["layers.1.self_attn.q_proj", "down_proj"]},
    "gemma2": {},
    "olmo2": PATTERNS,
    "granite": {"use_rslora": True, "r": 5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_and_estimate_with_an_adapter_are_pefts(perta, tmp_path, tuned, family):
    model = tuned(family, **CONFIGS[family])
    samples = samples_of(tmp_path)
    loss, gradients = base_gradients(model, samples)
    words = "--model model --adapter adapter --data data.jsonl --compute f32 --json".split()
    plain = json.loads(perta(*"eval --model model --data data.jsonl --compute f32 --json".split()).stdout)
    run = json.loads(perta("eval", *words).stdout)
    assert abs(run["loss"] - loss) <= 1e-5 < abs(plain["loss"] - loss)
    said = json.loads(perta("estimate", *words, "--out", "i").stdout)
    assert abs(said["loss"] - loss) <= 1e-5
    with safe_open(tmp_path / "i/mean/model.safetensors", "np") as file:
        assert json.loads(file.metadata()["perta.adapter"])["r"] == CONFIGS[family].get("r", 4)
    have = load_file(tmp_path / "i/mean/model.safetensors")
    for name, g in have.items():
        assert (g - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max(), name


def test_a_small_adapter_counts_in_bf16(perta, tmp_path, tuned):
    """It is not merged into weights of bfloat16, which would round it away."""
    tuned(lora_alpha=6e-4)
    command = "eval --model model --data data.jsonl --compute f32 --json".split()
    model = load(tmp_path / "model").bfloat16()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        live = load(tmp_path / "model", tmp_path / "adapter")
        want = sum(loss_of(live, [sample]).item() for sample in samples_of(tmp_path)) / 6
    plain, have = (json.loads(perta(*command, *flags).stdout)["loss"] for flags in ([], ["--adapter", "adapter"]))
    assert abs(have - want) <= 2e-6 and abs(plain - want) > 1e-5


def test_an_adapter_beside_a_patched_model(perta, tmp_path, tuned):
    tuned()
    make_model(tmp_path / "other", rope_theta=10000.0, initializer_range=0.11)
    perta(*"diff model other --patch p".split())
    words = "--adapter adapter --data data.jsonl --compute f32 --json".split()
    have = json.loads(perta("eval", "--model", "model", "--patch", "p", *words).stdout)
    assert have["loss"] == json.loads(perta("eval", "--model", "other", *words).stdout)["loss"]
    with torch.no_grad():
        live = load(tmp_path / "other", tmp_path / "adapter")
        want = sum(loss_of(live, [sample]).item() for sample in samples_of(tmp_path)) / 6
    assert abs(have["loss"] - want) <= 1e-5


REFUSED = {
    "an embedding": ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A: a LoRA outside the layers"),
    "the head": ({"target_modules": ["lm_head", "q_proj"]}, "lm_head.lora_A.weight: a LoRA outside the layers"),
    "a whole tensor": ({"modules_to_save": ["norm"]}, "norm.weight: a whole tensor"),
    "a bias": ({"bias": "all"}, "q_proj.base_layer.bias: a whole tensor"),
    "DoRA": ({"use_dora": True}, "use_dora: is set"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_a_lora_of_the_layers_is_refused_by_name(perta, tmp_path, tuned, why):
    config, message = REFUSED[why]
    tuned(**config)
    for verb in (["eval"], ["estimate", "--out", "i"], ["tune", "--out", "i"]):
        said = perta(*verb, *"--model model --adapter adapter --data data.jsonl".split(), check=3)
        assert message in said.stderr and "adapter" in said.stderr
    assert not (tmp_path / "i").exists()


def test_an_adapter_of_another_model_is_refused(perta, tmp_path, tuned):
    tuned()
    make_model(tmp_path / "wide", hidden_size=128)
    make_model(tmp_path / "flat", num_hidden_layers=1)
    for model, message in (
        ("wide", "is [128, 96] in --model"),
        ("flat", "model.layers.1.mlp.down_proj.weight is not in --model flat"),
    ):
        for verb in (["eval"], ["tune", "--out", "i"]):
            said = perta(*verb, "--model", model, *"--adapter adapter --data data.jsonl".split(), check=3)
            assert message in said.stderr
    name = "base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    tensors[name][5, 1] = math.nan
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    said = perta(*"eval --model model --adapter adapter --data data.jsonl".split(), check=3)
    assert f"tensor {name}, element 21: not a finite number" in said.stderr
    said = perta(*"eval --model model --adapter model --data data.jsonl".split(), check=3)
    assert "model: not the folder of a PEFT adapter" in said.stderr


# --- the output


def test_the_adapter_says_how_it_was_made(perta, tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 9)
    (tmp_path / "key").write_bytes(b"k" * 32)
    perta(*TUNE, "--out", "a", *ALL, "--data-key", "key", "--epochs", 2, "--batch-size", 4, "--seed", 3)
    with safe_open(tmp_path / "a/adapter_model.safetensors", "np") as file:
        metadata = file.metadata()
    key = hmac.new(b"k" * 32, (tmp_path / "data.jsonl").read_bytes(), "sha256").hexdigest()
    assert metadata["perta.samples"] == "9" and metadata["perta.data_hmac_sha256"] == key
    made = json.loads(metadata["perta.tune"])
    assert made["updates"] == 6 and made["epochs"] == 2 and made["seed"] == 3 and made["compute"] == "f32"
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 12 and config["target_modules"][0] == "q_proj"
    live = load(tmp_path / "model", tmp_path / "a")
    with torch.no_grad():
        want = sum(loss_of(live, [sample]).item() for sample in samples_of(tmp_path)) / 9
    run = perta(*"eval --model model --adapter a --data data.jsonl --compute f32 --json".split())
    assert abs(json.loads(run.stdout)["loss"] - want) <= 1e-5
    # and the edit takes it
    perta(*"unlearn --model model --tuned a --base model --method tv --alpha -1 --patch p --out merged".split())
    run = perta(*"eval --model merged --data data.jsonl --compute f32 --json".split())
    assert abs(json.loads(run.stdout)["loss"] - want) <= 1e-5


def test_initial_factors_are_documented(perta, tmp_path):
    """docs/tune.md: A is uniform, from SplitMix64; B is zero."""
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 3)
    perta(*TUNE, "--out", "a", "--learning-rate", 0, "--steps", 1, "--seed", 11, "--rank", 3)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    state, i = random_bits(11, 0), 0
    for layer in range(3):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a, b = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
            u = [(random_bits(state, i + k) >> 40) * 2.0**-24 for k in range(a.numel())]
            want = np.array([2 * x - 1 for x in u], np.float32) * np.float32(1 / 8)
            assert np.array_equal(a.numpy().flatten(), want) and not b.any()
            i += a.numel()
    assert len(tensors) == 12


# --- the same bytes


def test_the_bytes_depend_on_neither_threads_nor_memory(perta, tmp_path):
    """With little memory, activations go to files, and products are made for few tokens at a
    time."""
    make_model(tmp_path / "model", hidden_size=256, intermediate_size=700)
    make_data(tmp_path / "data.jsonl", 30, longest=300)
    for compute in ("f32", "bf16"):
        words = [*TUNE, "--compute", compute, "--out", "o", "--force", "--steps", 2, "--batch-size", 16, *ALL]
        probe = perta(*words, "--memory", "1M", check=2).stderr
        if "cannot" in probe:
            continue
        seen = []
        for memory, threads, io in (("4G", 1, "mmap"), ("4G", 5, "direct"), ("needed", 1, "pread"), ("needed", 2, "direct"), ("200M", 3, "pread")):
            memory = needed(perta, words) if memory == "needed" else memory
            run = json.loads(perta(*words, "--memory", memory, "--threads", threads, "--io", io).stdout)
            seen.append(((tmp_path / "o/adapter_model.safetensors").read_bytes(), run["updates"], run["scratch_bytes"] > 0))
        assert all(one[:2] == seen[0][:2] for one in seen)
        assert not seen[0][2] and seen[2][2], "activations went to files in one of them"


@sanitized
def test_a_model_four_times_larger_than_memory(tmp_path):
    """Under a hard limit on the process's memory besides mapped files."""
    sizes = LLAMA | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4}
    size = write_llama(tmp_path / "llama", sizes)
    lines = [json.dumps({"input_ids": [(7 * i + n) % 200 for i in range(12)]}) for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    budget = size // 4 >> 20
    words = f"tune --model llama --data data.jsonl --out a --steps 2 --batch-size 2 --threads 2 --io direct --memory {budget}M"
    # threads reserve address space for stacks and heaps, which is not memory
    command = ["prlimit", f"--data={(budget + 64) << 20}", str(PERTA), *words.split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert peak_mib([*words.split(), "--force"], tmp_path) <= budget
    perta_bytes = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    words = words.replace(f"{budget}M", "8G").replace("--out a", "--out b").replace("direct", "mmap")
    subprocess.run([str(PERTA), *words.split()], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "b/adapter_model.safetensors").read_bytes() == perta_bytes


# --- resuming


@pytest.fixture
def folder(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 30)
    return tmp_path


RUN = "tune --model model --data data.jsonl --out out --steps 9 --batch-size 4 --learning-rate 1e-3 --warmup 2".split()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_a_run_that_is_killed_at_any_update_goes_on(perta, folder, seed):
    rng = random.Random(seed)
    whole = json.loads(perta(*RUN, "--json").stdout)
    want = files_of(folder / "out")
    (folder / "out").rename(folder / "first")
    kills = 0
    while (stopped := stop_at(folder, [*RUN, "--resume"], "commit", rng.randrange(1, 5)))[0]:
        assert stopped == (-signal.SIGKILL, "") and not (folder / "out").exists()
        kills += 1
    assert kills >= 2 and files_of(folder / "out") == want
    (folder / "out").rename(folder / "second")
    stop_at(folder, RUN, "commit", 6)
    run = json.loads(perta(*RUN, "--json", "--resume", "--threads", 3, "--memory", "300M").stdout)
    assert run["updates"] == whole["updates"] and len(run["updates"]) == 9
    assert files_of(folder / "out") == want
    assert not list(folder.glob("*perta*"))


def test_a_patched_model_is_trained_as_it_would_be_once_applied(perta, folder):
    """To the bit, also where only half of the chunks change; and asked the same."""
    make_model(folder / "other", rope_theta=10000.0, initializer_range=0.11)
    perta(*"diff model other --patch p".split())
    words = [*RUN[3:], *ALL, "--json"]
    direct = json.loads(perta("tune", "--model", "other", *words, "--out", "direct").stdout)
    perta("tune", "--model", "model", *words, "--out", "plain")
    for budget in ("300M", "100M"):
        more = ["--patch", "p", "--memory", budget, "--force"]
        patched = json.loads(perta("tune", "--model", "model", *words, *more).stdout)
        assert patched["updates"] == direct["updates"]
        have, want, not_ = (load_file(folder / f"{name}/adapter_model.safetensors") for name in ("out", "direct", "plain"))
        assert all(torch.equal(have[name], x) for name, x in want.items())
        assert not all(torch.equal(have[name], x) for name, x in not_.items())
    with safe_open(folder / "out/adapter_model.safetensors", "np") as file:
        digest = hashlib.sha256((folder / "p/manifest.json").read_bytes()).hexdigest()
        assert json.loads(file.metadata()["perta.tune"])["patch"] == digest
    losses = [
        json.loads(perta("eval", *where.split(), "--adapter", "out", "--data", "data.jsonl", "--json").stdout)["loss"]
        for where in ("--model model --patch p", "--model other")
    ]
    assert losses[0] == losses[1]


def test_an_adapter_of_a_patched_model_is_not_taken_for_one_of_the_model(perta, folder):
    make_model(folder / "other", rope_theta=10000.0, initializer_range=0.11)
    perta(*"diff model other --patch p".split())
    perta(*"diff model other --one-way --patch q".split())
    perta(*RUN, "--patch", "p")
    digest = hashlib.sha256((folder / "p/manifest.json").read_bytes()).hexdigest()
    says = f"out/adapter_model.safetensors: trained on the model that a patch leads to, which is not given here (SHA-256 of its manifest.json: {digest})"
    data = ["--model", "model", "--data", "data.jsonl", "--adapter", "out"]
    for words in (["eval"], ["eval", "--patch", "q"], ["estimate", "--out", "imp"], ["tune", "--out", "again", "--steps", "1"]):
        run = perta(*words, *data, "--json")
        assert json.loads(run.stdout)["notes"] == [says] and says in run.stderr
    assert json.loads(perta("eval", *data, "--patch", "p", "--json").stdout)["notes"] == []
    perta(*RUN, "--force")
    assert json.loads(perta("eval", *data, "--json").stdout)["notes"] == []


def test_a_patch_that_is_not_the_models_is_refused(perta, folder):
    make_model(folder / "other", rope_theta=10000.0, initializer_range=0.11)
    perta(*"diff other model --patch back".split())
    perta(*"diff model other --patch p".split())
    for patch, status, says in (("back", 1, "back"), ("model", 3, "is it a patch folder?"), ("none", 3, "none")):
        assert says in perta(*RUN, "--patch", patch, check=status).stderr
        assert not (folder / "out").exists()
    assert "within, the input p" in perta(*RUN, "--patch", "p", "--out", "p/x", check=2).stderr
    stop_at(folder, [*RUN, "--patch", "p"], "commit", 3)
    assert "flags: patch was" in perta(*RUN, "--resume", check=2).stderr
    perta(*RUN, "--patch", "p", "--resume")
    assert not list(folder.glob("*perta-*"))
    shard = next((folder / "p").glob("*.perta"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in perta(*RUN, "--patch", "p", "--force", check=None).stderr


def test_an_interrupted_run_says_how_to_go_on(perta, folder):
    status, message = stop_at(folder, RUN, "commit", 3, signal.SIGINT)
    assert status == 130 and "--resume continues it: interrupted" in message
    assert "--resume continues it, --force starts over" in perta(*RUN, check=2).stderr
    for flags, change in (
        (["--seed", 1], "flags: seed was 42, is now 1"),
        (["--rank", 4], "adapter_config.json: r was 8, is now 4"),
        (["--max-grad-norm", 0], "flags: max_grad_norm was 1.0, is now 0.0"),
    ):
        refusal = perta(*RUN, "--resume", *flags, check=2).stderr
        assert "--resume cannot continue: " in refusal and change in refusal
    state = next(path for path in (folder / "out.perta-partial/perta-scratch").iterdir())
    for path in (folder / "out.perta-partial/perta-scratch").iterdir():
        path.write_bytes(path.read_bytes()[:-4])
    refusal = perta(*RUN, "--resume", check=3).stderr
    assert "--force starts over" in refusal and state.parent.name in refusal
    perta(*RUN, "--force")
    assert not list(folder.glob("*perta*"))


# --- arguments


WRONG = {
    "--learning-rate -1": "--learning-rate: must be a finite number, not below 0",
    "--warmup 1.5": "--warmup: a whole number of updates, or a share below 1",
    "--epochs 2 --steps 3": "--epochs or --steps, not both",
    "--epochs 0": "--epochs: must be at least 1",
    "--batch-size 0": "--batch-size: must be at least 1",
    "--rank 0": "--rank: must be at least 1",
    "--rank 70000": "--rank: must be at most 65536",
    "--lora-alpha 0": "--lora-alpha: 0; nothing would change",
    "--lr-scheduler polynomial": "polynomial is not one of linear, cosine, constant",
    "--target-modules q_proj,w": "w: the layers of model have no such linear module, but q_proj, k_proj",
    "--target-modules lm_head": "lm_head: the layers of model have no such linear module",
    "--target-modules roj": "roj: the layers of model have no such linear module",
    "--target-modules q_proj,": "--target-modules: number 2 of 2 is empty",
    "--weight-decay nan": "--weight-decay: nan is not a number",
    "--seed 9223372036854775808": "--seed: must be at most 9223372036854775807",
    "--adapter a --rank 8": "--adapter has its own rank, alpha and modules",
    "--out model/x": "would overwrite, or lie within, the input model",
    "--memory 8M": "--memory 8M is too small for this model and its longest sample",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_arguments_are_said(perta, folder, flags):
    words = "tune --model model --data data.jsonl --out out".split()
    assert WRONG[flags] in perta(*words, *flags.split(), check=2).stderr
    assert not (folder / "out").exists() and not list(folder.glob("*perta*"))


def test_a_loss_that_is_not_finite_is_an_error(perta, folder):
    said = perta(*RUN, *ALL, "--learning-rate", 1e30, "--warmup", 0, check=3).stderr
    assert "data.jsonl: line " in said and "not a finite number" in said
    assert not (folder / "out").exists() and not list(folder.glob("*perta*"))
