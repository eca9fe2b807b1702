"""The teacher-forced measures of an answer as open-unlearning computes them
(github.com/locuslab/open-unlearning, src/evals/metrics: utils.py, memorization.py, mia/), on logits
in float64."""

import numpy as np
import torch

K = 0.4


@torch.no_grad()
def tokenwise(model, sample):
    """tokenwise_vocab_logprobs and tokenwise_logprobs: log probabilities over the vocabulary and of
    the labels, and the labels, without the last one."""
    ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
    log_probs = torch.log_softmax(model(ids[None]).logits[0].double(), -1)[:-1]
    actual = (labels != -100).nonzero()[:, 0][:-1]
    if not len(actual):
        return torch.zeros(0, log_probs.shape[-1]), torch.zeros(0), actual
    start, end = actual[0], actual[-1]
    target = log_probs.gather(1, ids[1:, None])[:, 0]
    return log_probs[start - 1 : end], target[start - 1 : end], labels[actual]


def exact_memorization(vocabulary, labels):
    return (vocabulary.argmax(-1) == labels).sum().item() / len(labels) if len(labels) else None


def extraction_strength(vocabulary, labels):
    predictions = vocabulary.argmax(-1)
    for k in range(len(labels)):
        if torch.equal(predictions[k:], labels[k:]):
            break
    return 1 - k / len(labels) if len(labels) else 0


def lowest(scores):
    return -np.mean(sorted(scores)[: max(1, int(len(scores) * K))]) if len(scores) else 0


def min_k_plus_plus(vocabulary, target):
    mu = (torch.exp(vocabulary) * vocabulary).sum(-1)
    sigma = (torch.exp(vocabulary) * torch.square(vocabulary)).sum(-1) - torch.square(mu)
    return lowest(((target - mu) / torch.sqrt(torch.clamp(sigma, min=1e-6))).numpy())


def measures(model, sample):
    vocabulary, target, labels = tokenwise(model, sample)
    return {
        "exact_memorization": exact_memorization(vocabulary, labels),
        "extraction_strength": extraction_strength(vocabulary, labels),
        "min_k": lowest(target.numpy()),
        "min_k_plus_plus": min_k_plus_plus(vocabulary, target),
    }


def gradient_norm(model, sample):
    """GradNormAttack with p = 2: the mean over tensors of the norm of the gradient; None where it
    would stop, with a single label."""
    ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
    log_probs = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1]
    actual = (labels != -100).nonzero()[:, 0][:-1]
    if not len(actual):
        return None
    target = log_probs.gather(1, ids[1:, None])[:, 0]
    model.zero_grad()
    (-torch.mean(target[actual[0] - 1 : actual[-1]])).backward()
    norms = [p.grad.detach().norm(p=2) for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).mean().item()
