"""Make the data of `perta estimate`, `perta eval` and `perta unlearn --steps` from text: JSON
lines of input_ids and labels, with the model's own tokenizer and chat template.

MODEL is the model's folder. TEXT is JSON lines, each an object with one of

    question, answer    the question is not learned (its labels are -100); the answer is, with the
                        token that ends it
    prompt, completion  the same, without a template around them; or two lists of messages
    messages            a conversation (role, content), which ends with the assistant's answer;
                        that is learned
    text                all of it is learned

or an array of such objects; or a .txt file, whose paragraphs are learned, cut into windows of at
most --max-tokens tokens (default 512). For `perta eval` there may be, beside question and answer,

    paraphrased_answer  the same answer in other words
    perturbed_answer    a list of wrong answers, as in the TOFU benchmark

Without a chat template, question and answer become "Question: ...\\nAnswer: ...", as in the TOFU
benchmark. OUT is written completely or not at all. If it exists, it is replaced only if it holds
such data.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

from perta.command import IGNORED, Problem, run, say
from perta.samples import encoder_of, read_samples

START = b'{"input_ids": ['  # keys of every line that this program writes


def is_stream(out: Path) -> bool:
    """/dev/stdout, or a pipe."""
    return out.exists() and not out.is_file() and not out.is_dir()


def check_out(out: Path) -> None:
    """The file may be the only copy of somebody's text."""
    if not out.exists() or is_stream(out):
        return
    if out.is_file():
        with out.open("rb") as file:
            if file.read(len(START)) in (b"", START):
                return
    raise Problem(f"{out}: exists, but was not written by perta.tokenize; choose another name", 2)


def write_whole(out: Path, text: str) -> None:
    if is_stream(out):
        out.write_text(text, encoding="ascii")
        return
    partial = Path(f"{out}.{os.getpid()}.perta-partial")
    try:
        with partial.open("x", encoding="ascii") as file:
            file.write(text)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """What perta-forget takes too."""
    parser.add_argument(
        "--template", choices=["auto", "chat", "plain"], default="auto",
        help="put questions into the model's chat template, or into a plain one "
        "(auto: chat if the model has a template)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N",
        help="refuse longer samples, and cut the paragraphs of a .txt file into windows",
    )  # fmt: skip
    parser.add_argument(
        "--date", type=datetime.datetime.fromisoformat, metavar="YYYY-MM-DD",
        help="the date for chat templates that show one (default: today)",
    )  # fmt: skip


def tokenize(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="perta tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("out", type=Path, metavar="OUT")
    add_text_options(parser)
    parser.add_argument("--chat", dest="template", action="store_const", const="chat",
                        help="the same as --template chat")  # fmt: skip
    arguments = parser.parse_args(words)
    check_out(arguments.out)

    def note(text: str) -> None:
        say("tokenize", f"note: {text}")

    encoder = encoder_of(
        arguments.model, arguments.template, arguments.max_tokens, note, arguments.date
    )
    samples = read_samples(arguments.text, encoder, note)
    write_whole(arguments.out, "".join(json.dumps(sample.line()) + "\n" for sample in samples))
    n_labels = sum(sum(label != IGNORED for label in sample.labels) for sample in samples)
    if not is_stream(arguments.out):
        print(f"{arguments.out}: {len(samples)} samples, {n_labels} labels")
    return 0


def main() -> None:
    run("tokenize", tokenize)


if __name__ == "__main__":
    main()
