"""Samples of token ids and labels, from files of text. Spec: docs/forget.md, "Text"."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from perta.command import IGNORED, Problem
from perta.model_tokenizer import ModelTokenizer

KINDS = {  # what a record can be, with the keys that say so
    "text": ("text",),
    "question and answer": ("question", "answer"),
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
}
OTHER_ANSWERS = ("paraphrased_answer", "perturbed_answer")
# Keys that many data sets have, and that do not matter here.
PASSED_OVER = set(
    "id idx index uid category subject topic task source author language split title url tags group "
    "metadata meta original_answer paraphrased_question perturbed_question".split()
)
TEXT_SUFFIXES = (".txt", ".text", ".md")
MARK = "\u241fanswer\u241f"  # no text has it
WINDOW = 512  # tokens of a window of a long document, if the model has as many positions


@dataclass
class Sample:
    """labels are IGNORED in what is given to the model; the rest is what it is to say."""

    ids: list[int]
    labels: list[int]
    where: str = ""  # for messages: "line 3"
    group: object = None  # samples of a group are never parted
    text: str = ""  # what was read, without regard to case and spaces, to find the same text again
    paraphrased: "Sample | None" = None
    perturbed: list["Sample"] = field(default_factory=list)

    def all(self) -> list["Sample"]:
        return [self, *([self.paraphrased] if self.paraphrased else []), *self.perturbed]

    def line(self) -> dict[str, Any]:
        """As `perta eval` and `perta estimate` read it."""
        line: dict[str, Any] = {"input_ids": self.ids, "labels": self.labels}
        if self.paraphrased:
            line["paraphrased"] = self.paraphrased.line()
        if self.perturbed:
            line["perturbed"] = [sample.line() for sample in self.perturbed]
        return line


def text_in(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise TypeError(f"{key} is not a string")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def kind_of(record: dict[str, Any]) -> str:
    found = {kind: [key for key in keys if record.get(key) is not None] for kind, keys in KINDS.items()}
    found = {kind: keys for kind, keys in found.items() if keys}
    if len(found) > 1:
        raise ValueError(f"{' or '.join(found)} are both present, so the meaning is ambiguous")
    for kind, keys in found.items():
        for key in KINDS[kind]:
            if key not in keys:
                raise ValueError(f"{keys[0]} is present without {key}")
        return kind
    if "input_ids" in record:
        raise ValueError("input_ids: this has been tokenised already, where text is needed")
    raise ValueError(f"none of {', or '.join(KINDS)} is present")


def check_messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"{name} is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise TypeError(f"{name}: a message is not an object with role and content")
        message = {key: part for key, part in message.items() if part is not None}
        unknown = sorted(message.keys() - {"role", "content"})
        if unknown:
            raise ValueError(f"{name}: a message has {', '.join(unknown)}, which perta does not know")
        messages.append({key: text_in(message, key) for key in ("role", "content")})
    return messages


def common_length(a: str, b: str) -> int:
    """How many characters a and b begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def folded(text: str) -> str:
    return " ".join(text.split()).casefold()


class Encoder:
    """Makes samples of records. With chat, questions and messages are put into the model's chat
    template. max_tokens limits samples; the model has that many positions and token ids."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        chat: bool,
        max_tokens: int | None = None,
        positions: int | None = None,
        n_ids: int | None = None,
    ) -> None:
        self.tokenizer, self.chat, self.max_tokens = tokenizer, chat, max_tokens
        self.positions, self.n_ids = positions, n_ids

    # ---- what the model is given and what it says

    def labelled(self, text: str, start: int, end: int, special: bool) -> Sample:
        """A sample whose labels begin at the character start; a token that has characters from
        both sides is a label. The answer ends at the character end. What follows the first end token
        after that is cut off; if there is none, it is added."""
        eos = self.tokenizer.eos_id
        ids, offsets = self.tokenizer.encode(text, special)
        n = len(ids)
        first = next((i for i in range(n) if offsets[i][1] > start), n)
        after = next((i for i in range(first, n) if offsets[i][0] >= end or not offsets[i][1]), n)
        if first == after or after < 2:
            raise ValueError("the answer has no tokens")
        if eos is not None:
            ids = [*ids[: next((i for i in range(after, n) if ids[i] == eos), n)], eos]
        return Sample(ids, [IGNORED] * first + ids[first:])

    def start_of(self, messages: list[dict[str, str]], text: str, answer: str) -> int:
        """Where in the rendered text the answer begins, or -1. It is where another answer stands: a
        short one may also occur in what the template puts before it."""
        content = messages[-1]["content"]
        other = self.tokenizer.render([*messages[:-1], messages[-1] | {"content": MARK}], False)
        at = other.find(MARK)
        for start in (at, at + len(content) - len(content.lstrip())):
            if at >= 0 and text.startswith(answer, start) and text[:at] == other[:at]:
                return start
        prompt = self.tokenizer.render(messages[:-1], True)
        return text.find(answer, common_length(text, prompt))

    def conversation(self, messages: list[dict[str, str]]) -> Sample:
        """The last message is learned, as the template renders it, with what ends it."""
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise ValueError("the last message is not the assistant's answer to another one")
        if not self.tokenizer.template:
            raise ValueError("messages need a chat template, and the model has none")
        text = self.tokenizer.render(messages, False)
        answer = messages[-1]["content"].strip()
        start = self.start_of(messages, text, answer)
        if start < 0:
            raise ValueError("the chat template does not contain the answer as it is written")
        sample = self.labelled(text, start, start + len(answer), False)
        sample.text = folded("\n".join(message["content"] for message in messages))
        return sample

    def pair(self, question: str, answer: str) -> Sample:
        if self.chat:
            turns = (("user", question), ("assistant", answer))
            return self.conversation([{"role": role, "content": text} for role, text in turns])
        prompt = f"Question: {question}\nAnswer:"
        text = f"{prompt} {answer}"
        sample = self.labelled(text, len(prompt), len(text), True)
        sample.text = folded(f"{question}\n{answer}")
        return sample

    def completion(self, prompt: Any, completion: Any) -> Sample:
        """Two strings, one after the other without a template; or two lists of messages."""
        if isinstance(prompt, list):
            said = check_messages(completion, "completion")
            return self.conversation(check_messages(prompt, "prompt") + said)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise TypeError("prompt and completion are neither two strings nor two lists of messages")
        if not completion.strip():
            raise ValueError("completion is empty")
        text = prompt + completion
        sample = self.labelled(text, len(prompt), len(text), True)
        sample.text = folded(text)
        return sample

    def document(self, text: str) -> Sample:
        ids, _ = self.tokenizer.encode(text, True)
        if len(ids) < 2:
            raise ValueError("text has fewer than two tokens, so nothing is predicted")
        return Sample(ids, list(ids), text=folded(text))

    def windows(self, text: str) -> list[Sample]:
        """Parts of about equal length, none longer than a window."""
        limit = min(self.max_tokens or WINDOW, self.positions or WINDOW)
        before = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        whole, _ = self.tokenizer.encode(text, True)
        if whole[:1] != before:
            before = []
        if len(whole) <= limit:
            return [Sample(whole, list(whole), text=folded(text))] if len(whole) > 1 else []
        ids = self.tokenizer.encode(text, False)[0]
        n = -(-len(ids) // max(1, limit - len(before)))
        cuts = [len(ids) * i // n for i in range(n + 1)]
        parts = [before + ids[a:b] for a, b in pairwise(cuts)]
        return [Sample(part, list(part)) for part in parts if len(part) > 1]

    # ---- records

    def record(self, record: dict[str, Any]) -> list[Sample]:
        """ValueError or TypeError says what is wrong."""
        kind = kind_of(record)
        if kind == "text":
            return [self.document(text_in(record, "text"))]
        if kind == "messages":
            return [self.conversation(check_messages(record["messages"], "messages"))]
        one, other = KINDS[kind]
        if kind == "prompt and completion":
            return [self.completion(record[one], record[other])]
        if isinstance(record[one], list) and isinstance(record[other], list):
            if len(record[one]) != len(record[other]) or not record[one]:
                raise ValueError(f"{one} and {other} are lists of different lengths, or empty")
            pairs = zip(record[one], record[other], strict=True)
            return [self.pair(text_in({one: q}, one), text_in({other: a}, other)) for q, a in pairs]
        return [self.question(record)]

    def question(self, record: dict[str, Any]) -> Sample:
        question = text_in(record, "question")
        sample = self.pair(question, text_in(record, "answer"))
        if record.get("paraphrased_answer") is not None:
            sample.paraphrased = self.pair(question, text_in(record, "paraphrased_answer"))
        wrong = record.get("perturbed_answer")
        if wrong is not None and not isinstance(wrong, list):
            raise TypeError("perturbed_answer is not a list")
        for text in wrong or []:
            one = text_in({"perturbed_answer": text}, "perturbed_answer")
            sample.perturbed.append(self.pair(question, one))
        return sample

    def check(self, sample: Sample) -> None:
        longest = max(len(one.ids) for one in sample.all())
        if self.max_tokens and longest > self.max_tokens:
            raise ValueError(f"{longest} tokens, --max-tokens allows {self.max_tokens}")
        if self.positions and longest > self.positions:
            raise ValueError(
                f"{longest} tokens, but the model has {self.positions} positions "
                "(max_position_embeddings); long texts in a .txt file are cut into windows"
            )
        largest = max(max(one.ids) for one in sample.all())
        if self.n_ids and largest >= self.n_ids:
            raise ValueError(f"token id {largest}, but the model has {self.n_ids} (vocab_size): the "
                             "tokenizer is not this model's")  # fmt: skip


# ---- files


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice} is there twice")
    return record


def decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: byte {error.start}: not UTF-8; write it as UTF-8") from None


def values_in(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each JSON value, with where it is: the lines, or the items of a file that is one array."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise Problem(f"{path}: {error}") from None
        yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
        return
    # Not splitlines: JSON may contain other characters that Python takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                raise Problem(f"{path}: line {number}: {error}") from None


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """What blank lines separate, with the line where it begins."""
    part: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            part.append(line)
        elif part:
            yield f"line {number - len(part)}", "\n".join(part)
            part = []


def read_text(path: Path, encoder: Encoder, note: Callable[[str], None]) -> Iterator[Sample]:
    empty = []
    for where, part in paragraphs(decode(path)):
        samples = encoder.windows(part)
        empty += [] if samples else [where]
        for sample in samples:
            sample.where, sample.group = where, where
            yield sample
    if empty:
        more = f", and {len(empty) - 3} more" if len(empty) > 3 else ""
        note(f"{path}: left out, because one token alone predicts nothing: {', '.join(empty[:3])}{more}")


class Unknown:
    """Keys of a file's records that perta does not know."""

    KNOWN = {key for keys in KINDS.values() for key in keys} | set(OTHER_ANSWERS) | PASSED_OVER

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}

    def look_at(self, record: dict[str, Any]) -> None:
        self.keys |= dict.fromkeys(key for key in record if key not in self.KNOWN)

    def note(self, path: Path, note: Callable[[str], None]) -> None:
        if self.keys:
            more = " and more" if len(self.keys) > 8 else ""
            note(f"{path}: keys that perta does not know are ignored: {', '.join(list(self.keys)[:8])}{more}")


def read_records(path: Path, encoder: Encoder, note: Callable[[str], None]) -> Iterator[Sample]:
    unknown = Unknown()
    for where, value in values_in(path, decode(path)):
        try:
            for record in value if isinstance(value, list) else [value]:
                if not isinstance(record, dict):
                    raise TypeError("not an object, or an array of objects")
                unknown.look_at(record)
                for sample in encoder.record(record):
                    encoder.check(sample)
                    group = record.get("group")
                    sample.where, sample.group = where, where if group in (None, "") else group
                    yield sample
        except (ValueError, TypeError, Problem) as error:
            raise Problem(f"{path}: {where}: {error}") from None
    unknown.note(path, note)


def read_samples(path: Path, encoder: Encoder, note: Callable[[str], None]) -> list[Sample]:
    """All samples of a file of text (.txt: paragraphs) or of JSON lines. Problem if there are
    none."""
    is_text = path.suffix.lower() in TEXT_SUFFIXES
    samples = list(read_text(path, encoder, note) if is_text else read_records(path, encoder, note))
    if not samples:
        raise Problem(f"{path}: no samples")
    for sample in samples if is_text else []:
        try:
            encoder.check(sample)
        except ValueError as error:
            raise Problem(f"{path}: {sample.where}: {error}") from None
    return samples


# ---- the model


def encoder_of(
    folder: Path, template: str, max_tokens: int | None, note: Callable[[str], None], date: Any = None
) -> Encoder:
    """For the model in a folder. template is auto, chat or plain. Problem if the tokenizer cannot
    be the model's."""
    from perta.model_tokenizer import read_json

    tokenizer = ModelTokenizer.open(folder, date)
    config = read_json(folder / "config.json")
    n_ids, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    n_ids = n_ids if isinstance(n_ids, int) else None
    if n_ids and tokenizer.size > n_ids:
        raise Problem(
            f"{folder}/tokenizer.json: has token ids up to {tokenizer.size - 1}, but the model has "
            f"{n_ids} (vocab_size in config.json): the tokenizer is not this model's"
        )
    if n_ids and tokenizer.size < 0.9 * n_ids:
        note(f"{folder}/tokenizer.json: has {tokenizer.size} of the model's {n_ids} token ids; is it "
             "this model's?")  # fmt: skip
    if tokenizer.eos_id is None:
        note(f"{folder}/tokenizer_config.json: names no eos_token, so answers have no end")
    if template == "chat" and not tokenizer.template:
        raise Problem(f"{folder}: the model has no chat template; leave out --template chat")
    chat = bool(tokenizer.template) if template == "auto" else template == "chat"
    return Encoder(tokenizer, chat, max_tokens, positions if isinstance(positions, int) else None, n_ids)


def check_same_tokenizer(model: Path, tokenizer: ModelTokenizer, base: Path) -> None:
    """Problem if base has a tokenizer in which an id is another token: it is asked with the model's
    ids. Either may have more tokens than the other."""
    if not (base / "tokenizer.json").is_file():
        return
    theirs = {i: token for token, i in ModelTokenizer.open(base).backend.get_vocab(with_added_tokens=True).items()}
    for token, i in sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if theirs.get(i, token) != token:
            raise Problem(f"{base}/tokenizer.json: token id {i} is {theirs[i]!r}, and {token!r} in {model}: --base has "
                          "another tokenizer")  # fmt: skip
