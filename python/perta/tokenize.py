"""Make the data of `perta estimate` and `perta eval` from text: JSON lines of input_ids and
labels.

    python -m perta.tokenize MODEL TEXT.jsonl OUT.jsonl [--chat] [--max-tokens N]

MODEL is the model's folder, whose tokenizer is used. Each line of TEXT.jsonl is an object with

    question, answer    the question is not learned (its labels are -100); the answer is, with
                        the token that ends it
    text                all of it is learned

and, for `perta eval`, beside question and answer

    paraphrased_answer  the same answer in other words
    perturbed_answer    a list of wrong answers, as in the TOFU benchmark

--chat formats question and answer with the model's chat template; without it they become
"Question: ...\\nAnswer: ...", as in the TOFU benchmark. Needs transformers.

OUT.jsonl is written completely or not at all. If it exists, it is replaced only if it holds such data.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

IGNORED = -100
START = b'{"input_ids": ['  # keys of every line that this program writes


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    ids = tokenizer(text)["input_ids"]
    return ids, list(ids)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, chat: bool
) -> tuple[list[int], list[int]]:
    """Token ids, and labels that are -100 in the question. Question and answer are tokenised
    separately, so that the end of one does not depend on what follows."""
    if chat:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_text = answer
    else:
        prompt_ids = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        answer_text = " " + answer
    answer_ids = tokenizer(answer_text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


Sample = dict[str, list[int]]


def sample_of(ids: list[int], labels: list[int]) -> Sample:
    return {"input_ids": ids, "labels": labels}


def encode_item(
    tokenizer: PreTrainedTokenizerBase, item: dict[str, Any], chat: bool
) -> dict[str, Any]:
    if "text" in item:
        if "question" in item or "answer" in item:
            raise TypeError("text and question or answer are both present, so the meaning is ambiguous")
        return sample_of(*encode_text(tokenizer, item["text"]))

    def answer(text: str) -> Sample:
        return sample_of(*encode_pair(tokenizer, item["question"], text, chat))

    sample: dict[str, Any] = answer(item["answer"])
    if "paraphrased_answer" in item:
        sample["paraphrased"] = answer(item["paraphrased_answer"])
    if "perturbed_answer" in item:
        if not isinstance(item["perturbed_answer"], list):
            raise TypeError("perturbed_answer is not a list")
        sample["perturbed"] = [answer(text) for text in item["perturbed_answer"]]
    return sample


def samples_in(sample: dict[str, Any]) -> Iterator[Sample]:
    """The sample of the line, and its other answers."""
    yield sample
    if "paraphrased" in sample:
        yield sample["paraphrased"]
    yield from sample.get("perturbed", [])


def encode_lines(
    tokenizer: PreTrainedTokenizerBase, path: Path, chat: bool, max_tokens: int | None
) -> Iterator[dict[str, Any]]:
    # Not splitlines: JSON may contain other characters that Python takes for line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = encode_item(tokenizer, json.loads(line), chat)
        except (ValueError, TypeError, KeyError) as error:
            sys.exit(f"{path}: line {number}: text, or question and answer, is needed ({error!r})")
        longest = max(len(one["input_ids"]) for one in samples_in(sample))
        if max_tokens and longest > max_tokens:
            sys.exit(f"{path}: line {number}: {longest} tokens, --max-tokens allows {max_tokens}")
        yield sample


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
    sys.exit(f"{out}: exists, but was not written by perta.tokenize; choose another name")


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perta.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-tokens", type=int)
    arguments = parser.parse_args()
    if not arguments.model.is_dir():  # otherwise transformers would ask the network for it
        sys.exit(f"{arguments.model}: no such folder")
    check_out(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    samples = list(
        encode_lines(tokenizer, arguments.text, arguments.chat, arguments.max_tokens)
    )
    write_whole(arguments.out, "".join(json.dumps(sample) + "\n" for sample in samples))
    n_labels = sum(sum(label != IGNORED for label in sample["labels"]) for sample in samples)
    print(f"{arguments.out}: {len(samples)} samples, {n_labels} labels")


if __name__ == "__main__":
    main()
