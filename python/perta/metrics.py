"""Compute the metrics of open-unlearning's TOFU evaluation from results of `perta eval`, and write
them in its form, as TOFU_EVAL.json: probabilities, truth ratio, ROUGE, exact memorization,
extraction strength, attacks on membership, privleak, forget quality and model utility.

Each set is one or more files, of `perta eval --per-sample --json' and of `perta ask --data ... --json'
(for ROUGE), about the same lines. What the files do not tell is left out, and named.

    perta eval --model edited --data forget.jsonl --per-sample --json > forget.json
    perta eval --model edited --data holdout.jsonl --per-sample --json > holdout.json
    perta metrics --forget forget.json --holdout holdout.json --retain-model retain/TOFU_EVAL.json \\
        --out TOFU_EVAL.json
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from perta.command import IGNORED, USAGE, Problem, run, say
from perta.metrics_values import Sample, add_zlib, metrics
from perta.model_tokenizer import ModelTokenizer
from perta.samples import decode, unique, values_in

SETS = {
    "forget": "what is to be forgotten",
    "holdout": "what the model never saw, of the same kind",
    "retain": "what is to be kept",
    "real-authors": "TOFU's questions about real authors",
    "world-facts": "TOFU's questions about the world",
}
SHORT = {"real-authors": "ra", "world-facts": "wf"}  # open-unlearning's names
MINE = ("--retain-model-forget", "--retain-model-holdout")

# ---- files


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(decode(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise Problem(f"{path}: not a JSON object")
    return value


def is_number(value: Any) -> bool:
    """Not an integer that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_sample(sample: Any) -> None:
    """ValueError says what is wrong."""
    if not isinstance(sample, dict) or not isinstance(sample.get("line"), int):
        raise ValueError('an item of "per_sample" is not an object with "line"')
    for key in (key for key in sample if key.endswith("loss")):
        values = sample[key] if key == "perturbed_loss" else [sample[key]]
        if not isinstance(values, list) or not values or not all(map(is_number, values)):
            raise ValueError(f'line {sample["line"]}: "{key}" is not a finite number')
    for key in ("min_k", "min_k_plus_plus", "extraction_strength", "rougeL_recall"):
        if key in sample and not is_number(sample[key]):
            raise ValueError(f'line {sample["line"]}: "{key}" is not a finite number')
    for key in ("exact_memorization", "gradient_norm"):
        if sample.get(key) is not None and not is_number(sample[key]):
            raise ValueError(f'line {sample["line"]}: "{key}" is not a finite number')


def read_samples(path: Path) -> tuple[dict[int, Sample], str]:
    """What a result says of each line, and the format that the weights were rounded to."""
    found = read_object(path)
    items = found.get("per_sample")
    if not isinstance(items, list) or not items:
        raise Problem(f'{path}: no list "per_sample"; perta eval --per-sample --json writes one')
    try:
        for item in items:
            check_sample(item)
    except ValueError as error:
        raise Problem(f"{path}: {error}") from None
    samples = {item["line"]: item for item in items}
    if len(samples) < len(items):
        raise Problem(f"{path}: a line is there twice")
    return samples, f"rounded to {found['quantize']}" if found.get("quantize") else "not rounded"


def merge(whole: dict[int, Sample], more: dict[int, Sample], path: Path, first: Path) -> None:
    """Add what another file says of the same lines."""
    if more.keys() != whole.keys():
        raise Problem(f"{path}: has other lines than {first}: they are not about the same set")
    for line, item in more.items():
        for key, value in item.items():
            if whole[line].setdefault(key, value) != value:
                raise Problem(f"{path}: line {line}: {key} is {value}, but {whole[line][key]} in {first}")


def read_set(paths: list[Path], weights: dict[Path, str]) -> list[Sample]:
    """weights: of what the files of all sets say; those of this one are added."""
    whole: dict[int, Sample] = {}
    for path in paths:
        more, weights[path] = read_samples(path)
        first = next(iter(weights))
        if weights[path] != weights[first]:
            raise Problem(f"{path}: the weights were {weights[path]}, but in {first} {weights[first]}")
        if whole:
            merge(whole, more, path, paths[0])
        else:
            whole = more
    samples = [whole[line] for line in sorted(whole)]
    for sample in samples:
        if "loss" not in sample:
            raise Problem(f"{paths[0]}: line {sample['line']}: no loss; is a file of perta eval missing?")
    return samples


def texts_of(path: Path, tokenizer: ModelTokenizer, samples: list[Sample]) -> list[str]:
    """The texts of the answers, from the data that perta eval was given."""
    texts = {}
    for where, value in values_in(path, decode(path)):
        if not isinstance(value, dict) or not isinstance(value.get("input_ids"), list):
            raise Problem(f"{path}: {where}: no array input_ids; this is not what perta eval was given")
        labels = value.get("labels", value["input_ids"])
        ids = [label for label in labels if label != IGNORED]
        try:
            texts[int(where.split()[1])] = tokenizer.backend.decode(ids, skip_special_tokens=True)
        except (TypeError, OverflowError) as error:
            raise Problem(f"{path}: {where}: labels: {error}") from None
    if texts.keys() != {sample["line"] for sample in samples}:
        raise Problem(f"{path}: has other lines than the result of perta eval")
    return [texts[sample["line"]] for sample in samples]


def read_logs(path: Path) -> dict[str, Any]:
    """Results of the retain model, checked as far as they are used."""
    logs = read_object(path)
    ratios, attack = logs.get("forget_truth_ratio"), logs.get("mia_min_k")
    if ratios is None and attack is None:
        raise Problem(f"{path}: has neither forget_truth_ratio nor mia_min_k; is it a *_EVAL.json?")
    if ratios is not None:
        values = ratios.get("value_by_index") if isinstance(ratios, dict) else None
        if not isinstance(values, dict) or not all(
            isinstance(value, dict) and is_number(value.get("score")) for value in values.values()
        ):
            raise Problem(f"{path}: forget_truth_ratio: no value_by_index of scores")
    if attack is not None and not (isinstance(attack, dict) and is_number(attack.get("agg_value"))):
        raise Problem(f"{path}: mia_min_k: no agg_value")
    return logs


def write_whole(out: Path, text: str) -> None:
    partial = Path(f"{out}.{os.getpid()}.perta-partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


# ---- arguments


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="perta metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, what in SETS.items():
        parser.add_argument(f"--{name}", type=Path, nargs="+", metavar="FILE",
                            help=f"results about {what}")  # fmt: skip
    parser.add_argument("--retain-model", type=Path, metavar="EVAL.json",
                        help="results of the retain model, which never saw the forget set, as this program or "
                        "open-unlearning writes them: for forget quality and privleak")  # fmt: skip
    for option in MINE:
        parser.add_argument(option, type=Path, nargs="+", metavar="FILE",
                            help="the same from results of perta eval")  # fmt: skip
    parser.add_argument("--model", type=Path, metavar="DIR",
                        help="the model's folder, whose tokenizer gives the texts for zlib")  # fmt: skip
    for name in ("forget", "holdout"):
        parser.add_argument(f"--data-{name}", type=Path, metavar="FILE",
                            help="the data that perta eval was given, for zlib")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all of it here, such as TOFU_EVAL.json")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(words)
    check(arguments)
    return arguments


def check(a: argparse.Namespace) -> None:
    if not any(getattr(a, name.replace("-", "_")) for name in SETS):
        raise Problem(f"nothing to compute from; give one of {', '.join(f'--{name}' for name in SETS)}", USAGE)
    if a.retain_model and (a.retain_model_forget or a.retain_model_holdout):
        raise Problem(f"--retain-model or {' and '.join(MINE)}, not both", USAGE)
    alone = [f"--{name}" for name in ("holdout", "retain-model", "retain-model-forget") if getattr(a, name.replace("-", "_"))]
    if alone and not a.forget:
        raise Problem(f"{alone[0]}: --forget is needed, too: the two are compared", USAGE)
    if a.retain_model_holdout and not a.holdout:
        raise Problem("--retain-model-holdout: --holdout is needed, too", USAGE)
    check_files(a)
    if a.retain_model_holdout and not a.retain_model_forget:
        raise Problem("--retain-model-holdout: --retain-model-forget is needed, too", USAGE)
    zlib = [a.model, a.data_forget, a.data_holdout]
    if any(zlib) and not all(zlib):
        raise Problem("--model, --data-forget and --data-holdout are needed together: they are for zlib", USAGE)
    if any(zlib) and not (a.forget and a.holdout):
        raise Problem("--data-forget: zlib compares --forget with --holdout; both are needed", USAGE)
    if a.out and a.out.exists() and not a.force:
        raise Problem(f"{a.out}: exists; --force replaces it", USAGE)


def check_files(a: argparse.Namespace) -> None:
    """Each is the result about one set and one model."""
    names = [name.replace("-", "_") for name in (*SETS, *(option[2:] for option in MINE))]
    paths = [path for name in names for path in getattr(a, name) or [] if path.is_file()]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise Problem(f"{path}: given twice; each file is about one set of samples", USAGE)
        seen.add(path.resolve())
    inputs = [*paths, *filter(None, (a.retain_model, a.data_forget, a.data_holdout))]
    if a.out and a.out.exists() and (a.out.is_dir() or any(path.exists() and a.out.samefile(path) for path in inputs)):
        raise Problem(f"{a.out}: would be overwritten, and is {'a folder' if a.out.is_dir() else 'an input'}", USAGE)


# ---- the whole


def retain_model_logs(a: argparse.Namespace) -> dict[str, Any]:
    if a.retain_model:
        return read_logs(a.retain_model)
    if not a.retain_model_forget:
        return {}
    weights: dict[Path, str] = {}
    sets = {"forget": read_set(a.retain_model_forget, weights)}
    if a.retain_model_holdout:
        sets["holdout"] = read_set(a.retain_model_holdout, weights)
    return metrics(sets, {}, lambda text: None)


def read_sets(a: argparse.Namespace) -> dict[str, list[Sample]]:
    given = {SHORT.get(name, name): getattr(a, name.replace("-", "_")) for name in SETS}
    weights: dict[Path, str] = {}
    sets = {name: read_set(paths, weights) for name, paths in given.items() if paths}
    if a.model:
        tokenizer = ModelTokenizer.open(a.model)
        for name, path in (("forget", a.data_forget), ("holdout", a.data_holdout)):
            add_zlib(sets[name], texts_of(path, tokenizer, sets[name]))
    return sets


def compute(words: list[str]) -> int:
    arguments = parse(words)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say("metrics", f"note: {text}")

    found = metrics(read_sets(arguments), retain_model_logs(arguments), note)
    if arguments.out:
        write_whole(arguments.out, json.dumps(found, indent=4) + "\n")
    summary = {name: value["agg_value"] for name, value in found.items()}
    if arguments.json:
        print(json.dumps(summary | {"notes": notes}, indent=1))
        return 0
    for name, value in summary.items():
        print(f"{name:28} {'undefined' if value is None else f'{value:.6g}'}")
    return 0


def main() -> None:
    run("metrics", compute)


if __name__ == "__main__":
    main()
