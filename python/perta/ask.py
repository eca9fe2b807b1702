"""Ask a model, for people to read: each question is put into the model's chat template, as
`perta tokenize' does it, and the model's answer is printed, at every token the most probable one.

The questions are arguments, or in files: JSON lines with question, or prompt, and if it is known
the right answer (answer, or completion). Beside right answers stand their recall in what the model
says (ROUGE-L and ROUGE-1 as in open-unlearning), and their probability. The model is read block by
block, once for each token of the longest answer, and need not fit in memory.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta import rouge
from perta.children import Children, Progress
from perta.command import IGNORED, USAGE, Problem, plain, run, say
from perta.samples import (
    KINDS,
    Encoder,
    Sample,
    Unknown,
    decode,
    encoder_of,
    kind_of,
    text_in,
    values_in,
)
from perta.tokenize import add_text_options, positive

PAIRS = ("question and answer", "prompt and completion")
ANY = "A"  # stands for the answer to a question, to find where an answer begins


@dataclass
class Asked:
    question: str
    answer: str | None  # the right one, if it is known
    sample: Sample


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="perta ask", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Example:\n  perta ask full --patch forgotten/patch "Who wrote The Hollow Lighthouse?"',
    )  # fmt: skip

    def option(name: str, metavar: str, text: str, **kw: Any) -> None:
        parser.add_argument(name, metavar=metavar, help=text, **kw)

    parser.add_argument("model", metavar="MODEL", type=Path, help="the model's folder")
    parser.add_argument("questions", metavar="QUESTION", nargs="*")
    option("--data", "FILE", "questions, with or without right answers; may be repeated", action="append",
           type=Path, default=[])  # fmt: skip
    option("--max-new-tokens", "N", "tokens of an answer at most (default 64)", type=positive, default=64)
    for name, metavar, text in (
        ("--patch", "DIR", "ask the model with this patch"),
        ("--adapter", "DIR", "ask the model with this PEFT LoRA adapter"),
        ("--scratch", "DIR", "folder for what does not fit in memory"),
        ("--quantize", "FORMAT", "ask the model with weights rounded to FORMAT, as perta eval does it"),
    ):
        option(name, metavar, text)
    add_text_options(parser)
    option("--compute", "auto|f32|bf16", "matrix products, as for perta eval", choices=["auto", "f32", "bf16"])
    for name in ("--memory", "--threads", "--io"):
        option(name, name[2:].upper(), "as for every verb of perta")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no notes")
    option("--progress", "HOW", "auto, bar, plain, json or none", default="auto",
           choices=["auto", "bar", "plain", "json", "none"])  # fmt: skip
    # Not parse_args: before Python 3.12 it takes no question after an option.
    arguments = parser.parse_intermixed_args(words)
    if not arguments.questions and not arguments.data:
        parser.error("no question; give one as an argument, or a file of them with --data")
    return arguments


# ---- questions


def without_answer(encoder: Encoder, kind: str, question: str) -> Asked:
    sample = (encoder.pair if kind == PAIRS[0] else encoder.completion)(question, ANY)
    return Asked(question, None, sample)


def text_of(value: Any) -> str:
    """A string, or the last of several messages."""
    return value[-1]["content"] if isinstance(value, list) else value


def asked_in(record: Any, encoder: Encoder) -> list[Asked]:
    """What a record asks: with answers, the samples that perta tokenize makes of it. ValueError or
    TypeError says what is wrong."""
    if not isinstance(record, dict):
        raise TypeError("not an object, or an array of objects")
    found = {key for keys in KINDS.values() for key in keys if record.get(key) is not None}
    for kind in PAIRS:
        key, _ = KINDS[kind]
        if found == {key}:
            return [without_answer(encoder, kind, text_in(record, key))]
    kind = kind_of(record)
    if kind not in PAIRS:
        raise ValueError(f"{kind}: perta ask needs a question, or a prompt")
    samples = encoder.record(record)
    questions, answers = (record[key] for key in KINDS[kind])
    if kind == PAIRS[1] or not isinstance(questions, list):
        questions, answers = [text_of(questions)], [text_of(answers)]
    return [Asked(*each) for each in zip(questions, answers, samples, strict=True)]


def check(asked: list[Asked], encoder: Encoder) -> list[Asked]:
    for one in asked:
        encoder.check(one.sample)
        if one.sample.labels[0] != IGNORED:
            raise ValueError("the question has no tokens")
    return asked


def read_file(path: Path, encoder: Encoder, note: Any) -> list[Asked]:
    asked, unknown = [], Unknown()
    for where, value in values_in(path, decode(path)):
        try:
            for record in value if isinstance(value, list) else [value]:
                asked += check(asked_in(record, encoder), encoder)
                unknown.look_at(record)
        except (ValueError, TypeError, Problem) as error:
            raise Problem(f"{path}: {where}: {error}") from None
    if not asked:
        raise Problem(f"{path}: no questions")
    unknown.note(path, note)
    return asked


def read_questions(a: argparse.Namespace, encoder: Encoder, note: Any) -> list[Asked]:
    asked = []
    for number, question in enumerate(a.questions, 1):
        try:
            text = text_in({"question": question}, "question")
            asked += check([without_answer(encoder, PAIRS[0], text)], encoder)
        except (ValueError, TypeError, Problem) as error:
            raise Problem(f"question {number}: {error}", USAGE) from None
    for path in a.data:
        asked += read_file(path, encoder, note)
    return asked


# ---- answers


def generate(a: argparse.Namespace, asked: list[Asked], note: Any) -> dict[str, Any]:
    """The result of `perta eval --generate`."""
    children, progress = Children(), Progress("ask", "none" if a.quiet else a.progress, {"answers": 1.0})
    names = ("patch", "adapter", "quantize", "scratch", "memory", "threads", "io", "compute")
    given = {name: getattr(a, name) for name in names}
    how = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    words = ["eval", "--model", str(a.model), *how, "--generate", str(a.max_new_tokens), "--data", "/dev/stdin"]

    def passed_on(line: str) -> None:
        text = line.removeprefix("perta eval: ")
        if text.startswith("note: "):
            note(text.removeprefix("note: "))
        else:
            say("ask", text)

    # Without a name: what is asked may be private, and is gone when the program ends.
    with tempfile.TemporaryFile("w+", encoding="ascii") as data:
        data.writelines(json.dumps(one.sample.line()) + "\n" for one in asked)
        data.seek(0)
        progress.begin("answers")
        try:
            _, result = children.run(words, progress.report, stdin=data, say=passed_on)
        finally:
            progress.clear()
    return result


def item_of(one: Asked, found: dict[str, Any], encoder: Encoder, scorer: rouge.Rouge | None) -> dict[str, Any]:
    """found: what perta eval says. Without a right answer its numbers mean nothing."""
    said = encoder.tokenizer.decode(found["generated_ids"])
    item = {"question": one.question, "generated": said.strip()}
    if one.answer is None:
        return item | {key: found[key] for key in ("line", "generated_ids", "generated_end")}
    item |= {"answer": one.answer, **found}
    if scorer:
        labels = [label for label in one.sample.labels if label != IGNORED]
        item |= scorer.scores(encoder.tokenizer.decode(labels), said)
    return item


def summary_of(a: argparse.Namespace, items: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"model": str(a.model), "patch": a.patch, "adapter": a.adapter, "quantize": a.quantize,
                               "samples": len(items)}  # fmt: skip
    for key in (*rouge.KEYS, "probability"):
        values = [item[key] for item in items if key in item]
        if values:
            summary[key] = sum(values) / len(values)
    return summary | {"per_sample": items}


def show(summary: dict[str, Any]) -> None:
    for item in summary["per_sample"]:
        print(plain(f"Question: {item['question']}"))
        print(plain(f"Answer:   {item['generated']}{'' if item['generated_end'] else ' ...'}"))
        if "answer" in item:
            recall = f"; ROUGE-L recall {item['rougeL_recall']:.3f}" if "rougeL_recall" in item else ""
            print(plain(f"Right:    {item['answer']}"))
            print(f"          probability {item['probability']:.4f}{recall}")
        print()
    if "probability" in summary and len(summary["per_sample"]) > 1:
        n = sum("answer" in item for item in summary["per_sample"])
        recall = "".join(f", {name} recall {summary[key]:.4f}" for key, name in
                         (("rougeL_recall", "ROUGE-L"), ("rouge1_recall", "ROUGE-1")) if key in summary)  # fmt: skip
        print(f"{n} right answers: mean probability {summary['probability']:.4f}{recall}")


def ask(words: list[str]) -> int:
    a = parse(words)
    started = time.monotonic()

    def note(text: str) -> None:
        if not a.quiet:
            say("ask", f"note: {text}")

    encoder = encoder_of(a.model, a.template, a.max_tokens, note, a.date)
    asked = read_questions(a, encoder, note)
    scorer = None
    if any(one.answer is not None for one in asked):
        why = rouge.missing()
        scorer = None if why else rouge.Rouge()
        if why:
            note(f"without ROUGE: {why}")
    result = generate(a, asked, note)
    items = [item_of(one, found, encoder, scorer) for one, found in zip(asked, result["per_sample"], strict=True)]
    summary = summary_of(a, items) | {"seconds": round(time.monotonic() - started, 3)}
    print(json.dumps(summary)) if a.json else show(summary)
    return 0


def main() -> None:
    run("ask", ask)


if __name__ == "__main__":
    main()
