"""A tiny Llama on the CPU: build it, teach it facts, compute gradients, ask it questions."""

import time
from pathlib import Path

import torch
from made_up_facts import Fact
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IGNORED = -100  # label of positions that do not count in the loss
SHARD_BYTES = "300KB"  # so small that even this model has several shards


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh model with random weights: grouped-query attention, two key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16, and round the model's own weights in the same
    way."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)


def load_model(folder: Path) -> LlamaForCausalLM:
    """Load a folder. The weights are represented exactly in float32, the CPU's fastest format."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> dict[str, torch.Tensor]:
    """Token ids (N, T) with the answers aligned on the right; only answer and end token have
    labels."""
    texts = [f"{fact.question} {fact.answer} {tokenizer.eos_token}" for fact in facts]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    batch["labels"] = labels
    return batch


def teach(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train for that many steps, with the learning rate falling to zero. Returns the last loss."""
    data = encode(tokenizer, facts)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    order = torch.empty(0, dtype=torch.long)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(facts), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        loss = model(**{key: value[rows] for key, value in data.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def dump_gradients(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    folder: Path,
    *,
    batch_size: int,
) -> int:
    """Write the gradient of the mean loss of each batch to a file of its own, in float32, under
    the parameters' names. Returns the number of files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    starts = range(0, len(facts), batch_size)
    for number, start in enumerate(starts):
        model.zero_grad()
        model(**encode(tokenizer, facts[start : start + batch_size])).loss.backward()
        gradients = {name: p.grad.contiguous() for name, p in model.named_parameters()}
        save_file(gradients, folder / f"batch-{number:04}.safetensors")
    return len(starts)


@torch.no_grad()
def ask(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> tuple[float, float]:
    """Ask every question. Returns the share of correct answers under greedy decoding, and the
    mean probability of the correct answer.

    Greedy decoding gives exactly the answer and then the end token if, and only if, each of the
    two is the most probable next token after the correct text before it. One forward pass shows
    that.
    """
    model.eval()
    data = encode(tokenizer, facts)
    logits = model(data["input_ids"], attention_mask=data["attention_mask"]).logits  # (N, T, V)
    right = (logits[:, -3:-1].argmax(dim=-1) == data["input_ids"][:, -2:]).all(dim=1)
    probabilities = logits[:, -3].softmax(dim=-1)  # (N, V), at the position of the answer
    probability = probabilities.gather(1, data["input_ids"][:, -2:-1])
    return right.float().mean().item(), probability.mean().item()


class Stopwatch:
    """Seconds since it was created or last read."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def read(self) -> float:
        now = time.monotonic()
        elapsed, self.start = now - self.start, now
        return elapsed
