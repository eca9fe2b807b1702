"""The demo's inputs and its result: a tiny Llama that knows made-up people.

    python made_up_people.py make WORKDIR
    python made_up_people.py tune WORKDIR [--at base|full]
    python made_up_people.py evaluate MODEL...

`make` trains two models, Hugging Face folders, and writes the facts as files for perta:

    WORKDIR/base    knows the language and other people
    WORKDIR/full    base, tuned on the facts to forget and the facts to retain
    WORKDIR/data/forget.jsonl, WORKDIR/data/retain.jsonl

`tune` makes what methods with a task vector need besides:

    WORKDIR/tuned   base, tuned on the facts to forget alone
    WORKDIR/grads/forget, WORKDIR/grads/retain    a safetensors file of gradients for each batch

Gradients are taken at base, as in the paper (arXiv 2601.22030), or with --at full at the model
to unlearn from. Half of the facts to retain are held out: neither they nor their gradients are
written, so unlearning never sees them. They show whether knowledge is also kept that the method did not see.

`evaluate` loads folders with from_pretrained, asks every question, and prints a table.
"""

import argparse
import copy
import json
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here

import itertools

import torch
import transformers
from made_up_facts import Fact, make_facts, make_tokenizer
from tiny_llama import (
    Stopwatch,
    ask,
    dump_gradients,
    encode,
    load_model,
    new_model,
    save_model,
    teach,
)

SEED = 22030
FACTS_A_GRADIENT = 10


def write_data(tokenizer: transformers.PreTrainedTokenizerFast, facts: list[Fact], path: Path) -> None:
    """JSON lines of input_ids and labels."""
    lines = [{key: encode(tokenizer, [fact])[key][0].tolist() for key in ("input_ids", "labels")} for fact in facts]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(workdir: Path) -> None:
    facts = make_facts()
    tokenizer = make_tokenizer(facts.words)
    watch = Stopwatch()

    base = new_model(tokenizer, SEED)
    n_parameters = sum(p.numel() for p in base.parameters())
    teach(base, tokenizer, facts.general, steps=300, seed=SEED)
    save_model(base, tokenizer, workdir / "base")
    print(
        f"base: a Llama of {n_parameters:,} parameters, taught {len(facts.general)} facts about "
        f"other people ({watch.read():.0f} s)"
    )

    full = copy.deepcopy(base)
    lessons = facts.forget + facts.retain + facts.held_out
    teach(full, tokenizer, lessons, steps=400, seed=SEED + 1)
    save_model(full, tokenizer, workdir / "full")
    print(f"full: base, tuned on {len(lessons)} more facts ({watch.read():.0f} s)")
    for name, part in (("forget", facts.forget), ("retain", facts.retain)):
        write_data(tokenizer, part, workdir / "data" / f"{name}.jsonl")


def tune(workdir: Path, at: str) -> None:
    facts = make_facts()
    tokenizer = make_tokenizer(facts.words)
    watch = Stopwatch()

    tuned = load_model(workdir / "base")
    teach(tuned, tokenizer, facts.forget, steps=100, seed=SEED + 2)
    save_model(tuned, tokenizer, workdir / "tuned")
    print(
        f"tuned: base, tuned on the {len(facts.forget)} facts to forget alone "
        f"({watch.read():.0f} s)"
    )

    source = load_model(workdir / at)
    for name, part in (("forget", facts.forget), ("retain", facts.retain)):
        n_files = dump_gradients(
            source, tokenizer, part, workdir / "grads" / name, batch_size=FACTS_A_GRADIENT
        )
        print(
            f"grads/{name}: {n_files} files of gradients at {at}, {FACTS_A_GRADIENT} facts each "
            f"({watch.read():.0f} s)"
        )


def evaluate(folders: list[Path]) -> None:
    """Print how well each model answers, then compare the methods where they have forgotten
    equally much. A guess is right one time in 24."""
    facts = make_facts()
    width = max(len(str(folder)) for folder in folders)
    print(f"{'':{width}}  {'facts to forget':^17}  {'facts to retain':^17}  {'held-out retain':^17}")
    print(f"{'model':{width}}" + "    right   prob. " * 3)
    scores = {}
    for folder in folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = load_model(folder)
        parts = (facts.forget, facts.retain, facts.held_out)
        scores[folder] = [ask(model, tokenizer, part) for part in parts]
        cells = "".join(f"  {right:7.1%}  {prob:6.3f} " for right, prob in scores[folder])
        print(f"{folder!s:{width}}{cells}", flush=True)
    _compare(folders[0], {folder: [r for r, _ in cells] for folder, cells in scores.items()})


def _forgets(folder: Path) -> float:
    """The order of a method's folders: alpha-A, or left-P for the share that is left."""
    kind, _, number = folder.name.partition("-")
    return -float(number) if kind == "left" else float(number)


def _compare(full: Path, rights: dict[Path, list[float]]) -> None:
    """Print how much of the other knowledge remains when half of the facts to forget are lost:
    for each method, along its folders, from the one that forgets least, by linear interpolation."""
    print("\nWhen the model has lost half of the facts to forget, it still answers of the rest:")
    for method in dict.fromkeys(folder.parent for folder in rights if "-" in folder.name):
        folders = [folder for folder in rights if folder.parent == method and "-" in folder.name]
        path = [rights[full]] + [rights[folder] for folder in sorted(folders, key=_forgets)]
        for before, after in itertools.pairwise(path):
            if before[0] > 0.5 >= after[0]:
                t = (before[0] - 0.5) / (before[0] - after[0])
                retain, held_out = (b + t * (a - b) for b, a in zip(before[1:], after[1:], strict=True))
                print(f"  {method.name:12} {retain:6.1%} of those to retain, {held_out:6.1%} held out")
                break
        else:
            print(f"  {method.name:12} (never lost half)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="train the model and write the facts")
    maker.add_argument("workdir", type=Path)
    tuner = commands.add_parser("tune", help="train the tuned model and write the gradients")
    tuner.add_argument("workdir", type=Path)
    tuner.add_argument("--at", choices=("base", "full"), default="base")
    evaluator = commands.add_parser("evaluate", help="print how well models answer")
    evaluator.add_argument("folders", type=Path, nargs="+", metavar="MODEL")
    arguments = parser.parse_args()

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if arguments.command == "make":
        make(arguments.workdir)
    elif arguments.command == "tune":
        tune(arguments.workdir, arguments.at)
    else:
        evaluate(arguments.folders)


if __name__ == "__main__":
    main()
