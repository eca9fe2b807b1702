"""What comes back: a model is taught a quarter of the forgotten samples again, and then asked for
the rest. Beside it the gold model, which never knew them, after the same.

    python bench/quality/reteach.py MODEL FORGET.jsonl [--patch P --perta BUILD/perta] [--gold GOLD]
        [--size small|large] [--draws 3]

MODEL is a checkpoint folder; with --patch, MODEL after the patch is taught. FORGET has token ids and
labels, as for `perta eval`. Prints the mean probability of the rest after each number of updates.
Needs examples/requirements.txt.
"""

import argparse
import copy
import random
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import torch
import train


@dataclass(frozen=True)
class Attack:
    """AdamW without weight decay at a constant rate, on all parameters, or on a LoRA of that rank
    of all linear modules of the layers (alpha is twice the rank)."""

    rate: float
    rank: int = 0

    def __str__(self) -> str:
        return f"LoRA rank {self.rank}, {self.rate:g}" if self.rank else f"AdamW {self.rate:g}"


@dataclass(frozen=True)
class Teaching:
    """updates: after how many the rest is asked. batch: samples of an update. draws: how many
    quarters are tried."""

    attacks: tuple[Attack, ...]
    updates: tuple[int, ...]
    batch: int
    draws: int


SIZES = {
    "small": Teaching((Attack(3e-4), Attack(1e-3), Attack(3e-3), Attack(1e-2, 4), Attack(3e-3, 16)),
                      (10, 20, 40), 16, 3),
    "large": Teaching((Attack(1e-5), Attack(2e-5), Attack(5e-5), Attack(2e-3, 4), Attack(1e-3, 16)),
                      (4, 8, 16), 5, 1),
}  # fmt: skip


def size_of(spec: train.Spec) -> str:
    return "small" if spec.dtype == torch.float32 else "large"


def draw_of(samples: data.Samples, draw: int) -> tuple[data.Samples, data.Samples]:
    """A quarter of the samples, which are taught, and the rest."""
    chosen = set(random.Random(draw).sample(range(len(samples)), max(1, len(samples) // 4)))
    parts = ([s for i, s in enumerate(samples) if (i in chosen) == taught] for taught in (True, False))
    return tuple(parts)


def with_lora(model, rank: int, seed: int):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    names = [n.rsplit(".", 1)[1] for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(set(names)))
    return inject_adapter_in_model(config, model)


def curve(model, samples: data.Samples, attack: Attack, draw: int, spec: train.Spec) -> dict:
    """Mean probabilities after each number of updates: of the rest, and of what is taught. The model
    stays as it is."""
    how, (taught, rest) = SIZES[size_of(spec)], draw_of(samples, draw)
    model = copy.deepcopy(model)
    if attack.rank:
        model = with_lora(model, attack.rank, draw)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, attack.rate, weight_decay=0.0)
    order, out = random.Random(draw), {"rest": [], "taught": []}
    for done in range(1, how.updates[-1] + 1):
        with train.arithmetic(spec):
            loss = train.losses(model, order.sample(taught, min(how.batch, len(taught)))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if done in how.updates:
            for name, part in (("rest", rest), ("taught", taught)):
                out[name].append(train.all_losses(model, part, spec).neg().exp().mean().item())
    return out


def curves(model, samples: data.Samples, draws: int, spec: train.Spec, have: dict, done: Callable) -> None:
    """have: attack → a curve for each draw; what is there is not computed again. done() is called
    after each."""
    for attack in SIZES[size_of(spec)].attacks:
        of = have.setdefault(str(attack), [])
        for draw in range(len(of) + 1, draws + 1):
            of.append(curve(model, samples, attack, draw, spec))
            done()


def rest_of(of: list[dict]) -> list[float]:
    """Mean over draws, for each number of updates."""
    return [sum(each) / len(of) for each in zip(*(c["rest"] for c in of), strict=True)]


def edited(model: Path, patch: Path | None, perta: Path | None, to: Path) -> Path:
    if not patch:
        return model
    subprocess.run([perta, "apply", model, patch, "--out", to / "edited", "--quiet"], check=True)
    return to / "edited"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("forget", type=Path)
    parser.add_argument("--patch", type=Path)
    parser.add_argument("--perta", type=Path, default=Path("perta"), help="the command, for --patch")
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--draws", type=int, default=1, help="how many quarters are tried")
    a = parser.parse_args()
    spec, samples = train.SPECS["small" if a.size == "small" else "smollm2"], data.read(a.forget)
    with tempfile.TemporaryDirectory() as folder:
        models = {"model": train.load(edited(a.model, a.patch, a.perta, Path(folder)))}
    if a.gold:
        models["gold"] = train.load(a.gold)
    how = SIZES[a.size]
    print(f"| taught again | updates | {' | '.join(models)} |\n|{'---|' * (2 + len(models))}")
    for attack in how.attacks:
        rows = [rest_of([curve(model, samples, attack, draw, spec) for draw in range(1, a.draws + 1)])
                for model in models.values()]  # fmt: skip
        for n, *values in zip(how.updates, *rows, strict=True):
            print(f"| {attack} | {n} | {' | '.join(f'{v:.3f}' for v in values)} |", flush=True)


if __name__ == "__main__":
    main()
