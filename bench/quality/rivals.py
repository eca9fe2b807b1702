"""Other people's methods, trained in PyTorch: Adam over whole sets, until too little is known.

With p = exp(-loss) of each sample of the forget set, loss being the mean over its tokens:

- gradient ascent: -loss; gradient difference: the same, plus the retain loss (arXiv 2401.06121)
- NPO (2404.05868): 2/b log(1 + (p/p_full)^b), b = 0.1, plus the retain loss
- SimNPO (2410.07163): 2/b log(1 + p^b), b = 4.5, weight 0.125, plus the retain loss (the weights
  are those of open-unlearning)
- RMU (2403.03218): the outputs of a layer are steered to one random direction on the forget set,
  and held where they were on the retain set; only `down_proj` of that layer and of the two below it
  is trained. The direction's length is a multiple of the outputs' own, as in Adaptive RMU
  (2408.06223).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import data
import torch
import train
from curves import Bench
from torch.nn.functional import softplus

RMU = "RMU"
# name: (each sample's objective, from its loss and that before; weight of the retain loss)
LOSSES: dict[str, tuple[Callable, float]] = {
    "gradient ascent": (lambda now, before: -now, 0),
    "gradient difference": (lambda now, before: -now, 1),
    "NPO + retain": (lambda now, before: 2 / 0.1 * softplus(0.1 * (before - now)), 1),
    "SimNPO + retain": (lambda now, before: 0.125 * 2 / 4.5 * softplus(-4.5 * now), 1),
}
NAMES = (*LOSSES, RMU)
STEER, KEEP = 5.0, 100.0  # RMU: length of the direction, weight of what is held


def batches(samples: data.Samples, spec: train.Spec) -> Iterator[slice]:
    """Of one pass each; gradients of the whole set are added up."""
    return (slice(i, i + spec.batch) for i in range(0, len(samples), spec.batch))


def descend(samples: data.Samples, each: Callable, spec: train.Spec) -> None:
    """Adds the gradient of the mean over samples of each(slice), a tensor (N,) for N samples."""
    for part in batches(samples, spec):
        with train.arithmetic(spec):
            total = each(part).sum() / len(samples)
        total.backward()


def by_loss(b: Bench, model, method: str, spec: train.Spec) -> Callable[[], torch.Tensor]:
    """A function that adds the gradients of one update and returns the forget set's losses."""
    objective, retained = LOSSES[method]
    forget, retain = b.parts.forget, b.parts.retain
    before = train.all_losses(model, forget, spec)

    def gradients() -> torch.Tensor:
        now = torch.zeros(len(forget))

        def each(part: slice) -> torch.Tensor:
            losses = train.losses(model, forget[part])
            now[part] = losses.detach()
            return objective(losses, before[part])

        descend(forget, each, spec)
        if retained:
            descend(retain, lambda part: retained * train.losses(model, retain[part]), spec)
        return now

    return gradients


@dataclass
class Layer:
    """What comes out of one of a model's layers."""

    model: torch.nn.Module
    at: int

    def outputs(self, samples: data.Samples) -> list[torch.Tensor]:
        """For each sample (T, H), without padding."""
        kept = []
        layer = self.model.model.layers[self.at]
        hook = layer.register_forward_hook(lambda _, __, out: kept.append(out))
        try:
            self.model.model(input_ids=train.padded(samples)[0])
        finally:
            hook.remove()
        out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        return [row[: len(s["input_ids"])] for row, s in zip(out, samples, strict=True)]


def distances(these: list[torch.Tensor], to: list[torch.Tensor]) -> torch.Tensor:
    """The mean squared distance for each sample (N,)."""
    return torch.stack([(x.float() - y).square().mean() for x, y in zip(these, to, strict=True)])


def by_steering(b: Bench, model, spec: train.Spec) -> Callable[[], torch.Tensor]:
    """As by_loss; only some weights are left to train."""
    n_layers = len(model.model.layers)
    layer = Layer(model, min(max(1, n_layers // 4), n_layers - 1))
    forget, retain = b.parts.forget, b.parts.retain
    with torch.no_grad(), train.arithmetic(spec):
        old = [x.float() for part in batches(retain, spec) for x in layer.outputs(retain[part])]
        new = [x.float() for part in batches(forget, spec) for x in layer.outputs(forget[part])]
    length = torch.cat(new).norm(dim=1).mean()
    direction = torch.rand(old[0].shape[1], generator=torch.Generator().manual_seed(1))
    target = STEER * length * direction / direction.norm()
    model.requires_grad_(False)
    for block in model.model.layers[max(0, layer.at - 2) : layer.at + 1]:
        block.mlp.down_proj.weight.requires_grad_(True)

    def gradients() -> torch.Tensor:
        now = train.all_losses(model, forget, spec)
        descend(forget, lambda part: distances(layer.outputs(forget[part]), [target] * len(forget[part])), spec)
        descend(retain, lambda part: KEEP * distances(layer.outputs(retain[part]), old[part]), spec)
        return now

    return gradients


def updates(b: Bench, name: str, rate: float, spec: train.Spec) -> Iterator[tuple[int, torch.nn.Module, float]]:
    """The number of updates done, the model, and its mean probability on the forget set (not
    rounded to the dtype of checkpoints)."""
    model = train.load(b.work / "full")
    gradients = by_steering(b, model, spec) if name == RMU else by_loss(b, model, name, spec)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for done in range(spec.reference_updates + 1):
        optimizer.zero_grad()
        yield done, model, gradients().neg().exp().mean().item()
        optimizer.step()
