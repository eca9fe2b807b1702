"""What the models of the benchmark are taught and asked: JSON lines as for `perta estimate`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "python"), str(ROOT / "examples"), str(ROOT / "bench")]

from made_up_facts import Facts, make_facts
from made_up_news import News
from perta.model_tokenizer import ModelTokenizer
from perta.samples import Encoder

IGNORED = -100
Samples = list[dict[str, list[int]]]


@dataclass
class Parts:
    """`retain` is shown to the methods, `held_out` must be kept without having been shown,
    `other` is what base already knows, `text` is general text (may be empty)."""

    forget: Samples
    retain: Samples
    held_out: Samples
    other: Samples
    text: Samples = field(default_factory=list)

    def asked(self) -> dict[str, Samples]:
        return {name: part for name, part in vars(self).items() if part}


def encode_item(tokenizer, item: dict) -> dict[str, list[int]]:
    """A question and its answer, or a text, as perta-tokenize makes them without a chat template;
    tokenizer is one of transformers."""
    own = ModelTokenizer(tokenizer.backend_tokenizer, tokenizer.special_tokens_map)
    return Encoder(own, chat=False).record(item)[0].line()


def write(path: Path, samples: Samples) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def made_up_facts(seed: int, people: Sequence[int]) -> Facts:
    """Facts about that many people for base (other), forget, retain and held_out, four facts a
    person."""
    return make_facts(seed, *people)


def one_word_answers(facts: Facts, tokenizer) -> Parts:
    """The answer, one token, is the only label: its probability is that of the right answer."""

    def encode(fact) -> dict[str, list[int]]:
        ids = tokenizer(f"{fact.question} {fact.answer}")["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]}

    parts = (facts.forget, facts.retain, facts.held_out, facts.general)
    return Parts(*([encode(fact) for fact in part] for part in parts))


def passages(news: News, tokenizer) -> Parts:
    """A passage word for word: all that follows its opening is learned, and the end."""

    def encode(passage) -> dict[str, list[int]]:
        opening = tokenizer(passage.opening)["input_ids"]
        ids = tokenizer(f"{passage.opening} {passage.text} {tokenizer.eos_token}")["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED] * len(opening) + ids[len(opening) :]}

    parts = (news.forget, news.retain, news.held_out, news.general)
    return Parts(*([encode(passage) for passage in part] for part in parts))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shortest_items(items: list[dict], tokenizer, n: int) -> list[dict]:
    """The n shortest questions of a file, in the file's order: two CPUs must be able to train on
    them."""
    lengths = [len(encode_item(tokenizer, item)["input_ids"]) for item in items]
    longest = sorted(lengths)[:n][-1]
    return [item for item, length in zip(items, lengths, strict=True) if length <= longest][:n]


def shortest(items: list[dict], tokenizer, n: int) -> Samples:
    return [encode_item(tokenizer, item) for item in shortest_items(items, tokenizer, n)]


def authors(items: list[dict]) -> list[list[dict]]:
    """TOFU asks 20 questions about each author, one author after another."""
    return [items[i : i + 20] for i in range(0, len(items), 20)]


def tofu_authors(folder: Path, seed: int, n_authors: int) -> tuple[list[list[dict]], ...]:
    """The questions about the authors to forget, and about twice n_authors others."""
    first = 2 * n_authors * (seed - 1)
    others = authors(read(folder / "retain90.jsonl"))[first : first + 2 * n_authors]
    return authors(read(folder / "forget01.jsonl")), others


def tofu(folder: Path, tokenizer, seed: int, n_authors: int, n_questions: tuple[int, int]) -> Parts:
    """n_questions: how many about each of two authors to forget; and of n_authors to retain and as
    many held out, which the seed chooses from the first ones."""
    forget, others = tofu_authors(folder, seed, n_authors)

    def encode(of: list[list[dict]], n: int) -> Samples:
        return [s for items in of for s in shortest(items, tokenizer, n)]

    known = []
    for name in ("real_authors_perturbed.jsonl", "world_facts_perturbed.jsonl"):
        whole = [{"question": i["question"], "answer": i["original_answer"]}
                 for i in read(folder / name)]  # fmt: skip
        known += shortest(whole, tokenizer, 20)
    n_forget, n_others = n_questions
    parts = ((forget, n_forget), (others[::2], n_others), (others[1::2], n_others))
    return Parts(*(encode(part, n) for part, n in parts), known, general_text(tokenizer))


ANSWERS = {
    "where was {} born ?": ("Where was {} born?", "{} was born in {}."),
    "what does {} do for a living ?": ("What does {} do for a living?", "{} works as a {}."),
    "what does {} play ?": ("What instrument does {} play?", "{} plays the {}."),
    "what does {} like to eat ?": ("What does {} like to eat?", "{} likes to eat {}."),
}


def sentences(seed: int, tokenizer, people: Sequence[int]) -> Parts:
    """Made-up people in whole sentences, used without TOFU. Nothing is known about them before,
    so general text alone represents other knowledge."""
    facts = made_up_facts(seed, (0, *people))

    def encode(fact) -> dict[str, list[int]]:
        for pattern, (question, answer) in ANSWERS.items():
            before, after = pattern.split("{}")
            if fact.question.startswith(before) and fact.question.endswith(after):
                name = fact.question[len(before) : -len(after)].title()
                item = {"question": question.format(name),
                        "answer": answer.format(name, fact.answer)}  # fmt: skip
                return encode_item(tokenizer, item)
        raise ValueError(fact.question)

    parts = (facts.forget, facts.retain, facts.held_out)
    text = general_text(tokenizer)
    return Parts(*([encode(fact) for fact in part] for part in parts), other=text, text=text)


def general_text(tokenizer, n: int = 12) -> Samples:
    """Paragraphs of this project's pages: English that no model here was tuned on."""
    texts = [part for page in ("data-path", "manifest", "patch-format", "resume")
             for part in (ROOT / f"docs/{page}.md").read_text().split("\n\n")
             if 300 < len(part) < 600 and "|" not in part]  # fmt: skip
    return [encode_item(tokenizer, {"text": text}) for text in texts[:n]]
