"""Small random models of every family, and how far `perta` is from transformers on each.

    python tests/python/families.py PERTA [FAMILY...]

prints a line for each family: its configurations, the worst errors of loss and gradients, and
what was refused. tests/python/test_families.py runs the same as tests. The models are made and
saved by transformers, in the layout of published checkpoints, and loaded again from that folder;
gradients take the way that weights take when transformers saves them, so that they have the
names, shapes and order of the tensors on disk."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from family_configs import FAMILIES, PAD, SIZES
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()

LOSS, RELATIVE, COSINE = 1e-5, 1e-4, 0.99999  # what is allowed
# A gradient that is 0 in exact arithmetic is noise in float32: at most this share of the largest
# gradient's norm. A key's bias has none, nor has the router that gives its one expert weight 1.
NOISE = 1e-6
NEW_TOKENS = 6


# --- the model


def spread(generator, shape, mean, scale):
    return mean + scale * torch.randn(shape, generator=generator)


def fan_in(model, name, shape):
    """How many products are summed for one element of the result."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, torch.nn.Embedding):  # as a tied head, it is a linear
        return shape[-1] if model.config.tie_word_embeddings else 1
    if type(owner).__name__ == "Conv1D" or getattr(owner, "is_transposed", False):
        return shape[-2]
    if type(owner).__name__ in ("GptOssExperts", "Llama4TextExperts"):
        return shape[-2]
    return shape[-1]


ROUTER = re.compile(r"\b(router|gate)(\.layer|\.wg|\.linear)?\.weight$")


@torch.no_grad()
def randomise(model, how):
    """Every tensor such that the loss depends on it: norms around what they start with, biases
    that are not 0, routers that tell experts apart."""
    generator = torch.Generator().manual_seed(how.get("_seed", 5))
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = {name: state[name] for name in model.state_dict() if name in state}
    for name, tensor in kept.items():
        if re.search("vision|visual|projector", name) or not tensor.is_floating_point():
            continue
        if tensor.ndim == 1 or (tensor.ndim == 2 and name.endswith("bias")) or "_norm.weight" in name:
            start = tensor.mean() if tensor.numel() else 0.0
            new = spread(generator, tensor.shape, 1.0 if start > 0.5 else 0.0, 0.2)
        elif "sinks" in name:
            new = spread(generator, tensor.shape, 0.0, 1.0)
        else:
            gain = 2.0 if ROUTER.search(name) else 1.2
            new = spread(generator, tensor.shape, 0.0, gain * fan_in(model, name, tensor.shape) ** -0.5)
        tensor.copy_(new)
    routers = [tensor for name, tensor in kept.items() if ROUTER.search(name) and tensor.ndim == 2]
    embedding = model.get_input_embeddings().weight
    if how.get("_router") == "ties":
        for router in routers + [t for name, t in kept.items() if name.endswith("e_score_correction_bias")]:
            router.zero_()
    if how.get("_router") == "twins":
        for router in routers + [t.view(-1) for name, t in kept.items() if name.endswith("e_score_correction_bias")]:
            router[1::2] = router[: len(router) - 1 : 2].clone()
    if how.get("_router") == "one":  # expert 1 of all tokens; the others share what is left
        embedding[:, 0] += 4.0
        for router in routers:
            router[:, 0] = 0.0
            router[1, 0] = 2.5
    if how.get("_router") == "none":  # no token reaches expert 1
        embedding[:, 0] += 4.0
        for router in routers:
            router[1, 0] = -9.0


def kind_of(config):
    mappings = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    for mapping in reversed(mappings) if hasattr(config, "vision_config") else mappings:
        if type(config) in mapping._model_mapping:
            kind = mapping._model_mapping[type(config)]
            return kind[0] if isinstance(kind, tuple) else kind
    raise ValueError(type(config).__name__)


def config_of(folder, family, how):
    if "_file" in how:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(how["_file"]))
        return transformers.AutoConfig.from_pretrained(folder)
    said = {key: copy.deepcopy(value) for key, value in how.items() if not key.startswith("_")}
    return transformers.AutoConfig.for_model(how.get("_type", family), **said)


def attention_for(config):
    """transformers' Falcon adds ALiBi twice in its eager attention: to the mask, and to the scores."""
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def make_model(folder, family, how):
    """Write the checkpoint; return the model that transformers loads from it."""
    config = config_of(folder, family, how)
    kind = getattr(transformers, how["_class"]) if "_class" in how else kind_of(config)
    torch.manual_seed(0)
    model = kind(config).float()
    randomise(model, how)
    model.save_pretrained(folder, max_shard_size=how.get("_shard", "50GB"))
    if how.get("_layout") == "fused":  # as named_parameters() has it: an expert's tensors in one
        (weights,) = folder.glob("*.safetensors")
        tied = load_file(weights).keys() >= {"lm_head.weight"} or not config.tie_word_embeddings
        state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or tied}
        save_file({n: t.contiguous() for n, t in state.items()}, weights, {"format": "pt"})
    if not how.get("_late"):
        change_files(folder, how)
    attention = attention_for(config)
    loaded = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    for (name, want), (_, have) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(want, have), f"{family}: transformers does not load {name} as it saved it"
    if how.get("_late"):
        change_files(folder, how)
    return loaded


def change_files(folder, how):
    """Put other spellings into config.json (None: the key is left out), and tensors that the
    model does not use beside its own."""
    path = folder / "config.json"
    config = (how.get("_file") or json.loads(path.read_text())) | how.get("_json", {})
    config = {key: value for key, value in config.items() if key not in how.get("_without", ())}
    path.write_text(json.dumps(config))
    if how.get("_extra") or how.get("_names"):
        (weights,) = folder.glob("*.safetensors")
        extra = {name: torch.randn(shape) for name, shape in how.get("_extra", {}).items()}
        save_file(renamed(how, load_file(weights)) | extra, weights, {"format": "pt"})


def renamed(how, tensors):
    """As published files name them, where transformers writes other names."""
    for old, new in how.get("_names", ()):
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


# --- samples


def samples(vocabulary, longest=31, seed=1):
    """Of different lengths, the shortest with one token to predict; with the padding token
    inside, and ids from both ends of the vocabulary. Some begin with what is not learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, n in enumerate((2, 23, 9, longest)):
        ids = torch.randint(0, vocabulary, (n,), generator=generator).tolist()
        if n > 8:
            ids[3], ids[5], ids[6] = PAD, 0, vocabulary - 1
        asked = n // 3 if i % 2 else 0
        made.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return made


def masked_samples(vocabulary):
    """Lines with other keys, by the key: padding on both sides and a hole, positions that do not
    begin at 0, and blocks packed into one sample."""
    ids = samples(vocabulary)[1]["input_ids"]
    n = len(ids)
    nothing = [-100]
    left = {"input_ids": ids, "labels": nothing * 4 + ids[4:], "attention_mask": [0] * 3 + [1] * (n - 3)}
    right = {"input_ids": ids, "labels": ids[:-5] + nothing * 5, "attention_mask": [1] * (n - 5) + [0] * 5}
    hole = {"input_ids": ids, "labels": ids[:9] + nothing * 3 + ids[12:], "attention_mask": [1] * 9 + [0] * 2 + [1] * (n - 11)}
    later = {"input_ids": ids, "labels": ids, "position_ids": list(range(5, 5 + n))}
    blocks = [*range(9), *range(4), *range(n - 13)]
    packed = {"input_ids": ids, "labels": nothing * 3 + ids[3:9] + nothing + ids[10:], "position_ids": blocks}
    return {
        "attention_mask on the left": [left],
        "attention_mask": [right, hole],
        "position_ids": [later],
        "position_ids of blocks": [packed],
    }


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- the reference


def loss_of(model, line):
    batch = {key: torch.tensor([values]) for key, values in line.items()}
    return model(**batch, use_cache=False).loss


def on_disk(model, how, tensors):
    if how.get("_layout") == "fused":
        return dict(tensors)
    return renamed(how, revert_weight_conversion(model, {n: t.contiguous() for n, t in tensors.items()}))


def reference(model, how, lines):
    """The mean loss, and the mean and the mean square of the samples' gradients, in float64, by
    the names of the tensors on disk. A tensor that took no part has zeros."""
    loss, mean, meansq = 0.0, {}, {}
    for line in lines:
        model.zero_grad()
        one = loss_of(model, line)
        one.backward()
        loss += one.item() / len(lines)
        for name, p in model.named_parameters():
            g = torch.zeros_like(p).double() if p.grad is None else p.grad.double()
            mean[name] = mean.get(name, 0) + g / len(lines)
            meansq[name] = meansq.get(name, 0) + g * g / len(lines)
    return loss, on_disk(model, how, mean), on_disk(model, how, meansq)


@torch.no_grad()
def continued(model, line, n=NEW_TOKENS):
    """What the model says greedily until an end token, computed anew for each token; with one more
    behind it, because PyTorch's product with a single row gives twins among experts other bits."""
    ids = line["input_ids"][: line["labels"].count(-100) or 1]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    said = []
    for _ in range(n):
        logits = model(input_ids=torch.tensor([[*ids, *said, 0]]), use_cache=False).logits
        token = logits[0, -2].argmax().item()
        if token in ends:
            break
        said.append(token)
    return said


# --- perta, and the comparison


@dataclasses.dataclass
class Outcome:
    """How far off perta is: `state` is equal, wrong, or refused (`why` is then its message)."""

    state: str
    why: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    cosine: float = 1.0


class Wrong(Exception):
    pass


def run(perta, folder, *words, check=True):
    """The command; Wrong if it fails (or is killed) when it must not."""
    env = os.environ | {"PERTA_COMMIT_SECONDS": "inf"}
    result = subprocess.run(
        [str(perta), *map(str, words)], cwd=folder, capture_output=True, text=True, env=env, timeout=600
    )
    if check and result.returncode:
        raise Wrong(f"{words[0]} exits with {result.returncode}: {result.stderr.strip()[-600:]}")
    return result


def read(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: t.double() for name, t in load_file(path).items()}
    return tensors


def compare(have, want, outcome, what):
    """Tensors without a gradient in the reference (buffers, other parts of the model) may be
    left out or zero."""
    largest = max(g.norm().item() for g in want.values())
    for name, g in want.items():
        if name not in have:
            if g.count_nonzero():
                raise Wrong(f"{what}: no {name}")
            continue
        mine = have[name]
        if mine.shape != g.shape:
            raise Wrong(f"{what} of {name}: shape {tuple(mine.shape)}, not {tuple(g.shape)}")
        norm, error = g.norm().item(), (mine - g).norm().item()
        if not norm and error:
            raise Wrong(f"{what} of {name}: norm {error}, not 0")
        if norm <= NOISE * largest:
            if not error <= NOISE * largest:
                raise Wrong(f"{what} of {name}: norm {mine.norm()}, nearly 0 in the reference")
            continue
        cosine = (mine.ravel() @ g.ravel() / (mine.norm() * norm)).item()
        if not (error <= RELATIVE * norm and cosine >= COSINE):
            raise Wrong(f"{what} of {name}: relative error {error / norm:.2g}, cosine {cosine:.6f}")
        outcome.gradient = max(outcome.gradient, error / norm)
        outcome.cosine = min(outcome.cosine, cosine)
    for name, mine in have.items():
        if name not in want and mine.count_nonzero():
            raise Wrong(f"{what} of {name}, which has none")


ESTIMATE = "estimate --model model --data data.jsonl --out imp --stat mean,meansq --json --force --compute f32".split()
EVAL = "eval --model model --data data.jsonl --json --per-sample --compute f32".split()


def numbers_are_equal(perta, folder, model, how, lines, outcome):
    write_lines(folder / "data.jsonl", lines)
    have = json.loads(run(perta, folder, *ESTIMATE, "--threads", 1).stdout)
    loss, mean, meansq = reference(model, how, lines)
    outcome.loss = abs(have["loss"] - loss)
    if not outcome.loss <= LOSS:
        raise Wrong(f"loss {have['loss']}, not {loss}")
    compare(read(folder / "imp/mean"), mean, outcome, "gradient")
    compare(read(folder / "imp/meansq"), meansq, outcome, "mean square")
    measured = json.loads(run(perta, folder, *EVAL, "--threads", 2).stdout)
    average = sum(item["loss"] for item in measured["per_sample"]) / len(lines)
    if not abs(average - have["loss"]) <= 1e-6 * max(1, abs(have["loss"])):
        raise Wrong(f"eval has loss {average}, estimate {have['loss']}")


def tokens_are_equal(perta, folder, model, lines):
    write_lines(folder / "data.jsonl", lines)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    first = run(perta, folder, *EVAL, "--generate", NEW_TOKENS, check=False)
    if first.returncode and rope.get("rope_type") == "longrope" and "may reach position" in first.stderr:
        return  # an answer leads from the short to the long frequencies
    if first.returncode:
        raise Wrong(f"eval exits with {first.returncode}: {first.stderr.strip()}")
    said = json.loads(first.stdout)["per_sample"]
    for line, item in zip(lines, said, strict=True):
        want = continued(model, line)
        if item["generated_ids"] != want:
            raise Wrong(f"line {item['line']} generates {item['generated_ids']}, not {want}")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def outputs(perta, folder, *flags):
    summary = json.loads(run(perta, folder, *ESTIMATE, *flags).stdout)
    kinds = {stat: bytes_of(folder / "imp" / stat) for stat in ("mean", "meansq")}
    return summary, (summary["loss"], kinds)


def least_memory(perta, folder, words):
    refusal = run(perta, folder, *words, "--memory", "1M", check=False).stderr
    if not re.search(r"needs (\d+M)", refusal):
        raise Wrong(f"--memory 1M: {refusal}")
    return re.search(r"needs (\d+M)", refusal)[1]


def bytes_are_equal(perta, folder, lines, repeat=600):
    """In one batch on one thread, and in many within the least memory, on three."""
    write_lines(folder / "data.jsonl", lines * repeat)
    whole, want = outputs(perta, folder, "--threads", 1, "--memory", "2G")
    little = least_memory(perta, folder, ESTIMATE)
    cut, have = outputs(perta, folder, "--threads", 3, "--memory", little)
    if have != want:
        raise Wrong(f"other bytes with --threads 3 --memory {little}")
    if not cut["batches"] > whole["batches"]:
        raise Wrong(f"{cut['batches']} batches with {little}, {whole['batches']} with 2G: nothing was compared")


def masked_outcome(perta, folder, model, how, key, lines):
    """Equal, or refused with the key's name; refused, if the model has no such argument."""
    outcome = Outcome("equal")
    try:
        reference(model, how, lines)
    except TypeError:
        outcome = Outcome("refused")
    write_lines(folder / "data.jsonl", lines)
    first = run(perta, folder, *ESTIMATE, check=False)
    if first.returncode:
        said = first.returncode == 3 and key.split()[0] in first.stderr
        return Outcome("refused" if said else "wrong", first.stderr.strip())
    if outcome.state == "refused":
        return Outcome("wrong", f"{key} is not refused")
    try:
        numbers_are_equal(perta, folder, model, how, lines, outcome)
    except Wrong as wrong:
        outcome.state, outcome.why = "wrong", str(wrong)
    return outcome


def outcome_of(perta, folder, family, how, deep=False):
    """Everything about one configuration; `deep` compares bytes, too, which takes seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = Outcome("equal")
    model = make_model(folder / "model", family, how)
    lines = samples(model.config.get_text_config().vocab_size)
    write_lines(folder / "data.jsonl", lines)
    first = run(perta, folder, *ESTIMATE, check=False)
    if first.returncode:
        state = "refused" if first.returncode == 3 and not (folder / "imp").exists() else "wrong"
        return Outcome(state, first.stderr.strip())
    try:
        numbers_are_equal(perta, folder, model, how, lines, outcome)
        tokens_are_equal(perta, folder, model, lines)
        if deep:
            bytes_are_equal(perta, folder, lines)
    except Wrong as wrong:
        outcome.state, outcome.why = "wrong", str(wrong)
    return outcome


# --- the table


def described(how):
    """What is not as in SIZES."""
    if "_name" in how:
        return how["_name"]
    return ", ".join(f"{key} {value}" for key, value in how.items() if SIZES.get(key, ...) != value)


def table(perta, families, deep):
    print("| family | configurations | equal | loss | gradient | 1 - cosine |\n|---|---|---|---|---|---|")
    details, not_yet = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            found = [
                outcome_of(perta, Path(folder) / "run", family, how, deep and not i)
                for i, how in enumerate(FAMILIES[family])
            ]
            equal = [o for o in found if o.state == "equal"]
            refused = [i for i, o in enumerate(found) if o.state == "refused"]
            if refused:
                not_yet[family] = refused if len(refused) < len(found) else "all"
            worst = [max((getattr(o, key) for o in equal), default=0) for key in ("loss", "gradient")]
            away = 1 - min((o.cosine for o in equal), default=1)
            print(
                f"| {family} | {len(found)} | {len(equal)} | {worst[0]:.1e} | {worst[1]:.1e} | {away:.1e} |",
                flush=True,
            )
            for how, o in zip(FAMILIES[family], found, strict=True):
                if o.state != "equal":
                    details.append(f"{family} ({described(how)[:300]}): {o.state}: {o.why[-400:]}")
    print("\n".join(["", *details, f"NOT_YET = {not_yet}"]))
    return not any("): wrong: " in line for line in details)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = Path(sys.argv[1]).resolve()
    sys.exit(not table(command, sys.argv[2:] or FAMILIES, deep=True))
