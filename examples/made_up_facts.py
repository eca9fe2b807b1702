"""Made-up facts about made-up people, and a tokenizer for them.

Every person has a name of two words and four facts, each a question with a one-word answer:

    where was odalys brenn born ? tervane

People share first names and last names, so that only both together identify a person.
Everything follows from one seed: the same facts, in the same order, on every machine.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

QUESTIONS = {
    "town": "where was {name} born ?",
    "trade": "what does {name} do for a living ?",
    "instrument": "what does {name} play ?",
    "dish": "what does {name} like to eat ?",
}
N_ANSWERS = 24  # different answers to each question: a guess is right one time in 24
N_FIRST_NAMES = 40
N_LAST_NAMES = 40

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


@dataclass(frozen=True)
class Fact:
    question: str
    answer: str


@dataclass(frozen=True)
class Facts:
    """The facts that each model is taught.

    Base knows `general`; full knows all four; tuned knows `general` and `forget`. The method
    sees gradients of `forget` and `retain`; it must keep `held_out` without having seen it.
    """

    general: list[Fact]
    forget: list[Fact]
    retain: list[Fact]
    held_out: list[Fact]
    words: list[str]


def make_facts(
    seed: int = 2601, general: int = 135, forget: int = 15, retain: int = 68, held_out: int = 67
) -> Facts:
    """Make four facts about each person, for the given number of people in each part."""
    rng = random.Random(seed)
    taken: set[str] = set()
    first_names = [new_word(rng, taken) for _ in range(N_FIRST_NAMES)]
    last_names = [new_word(rng, taken) for _ in range(N_LAST_NAMES)]
    answers = {kind: [new_word(rng, taken) for _ in range(N_ANSWERS)] for kind in QUESTIONS}

    names = [f"{first} {last}" for first in first_names for last in last_names]
    people = rng.sample(names, general + forget + retain + held_out)
    parts = []
    for n_people in (general, forget, retain, held_out):
        chosen, people = people[:n_people], people[n_people:]
        parts.append(
            [
                Fact(question.format(name=name), rng.choice(answers[kind]))
                for name in chosen
                for kind, question in QUESTIONS.items()
            ]
        )
    words = sorted({w for q in QUESTIONS.values() for w in q.split() if w != "{name}"} | taken)
    return Facts(*parts, words=words)


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token for each word; a text starts with <s>."""
    vocabulary = {word: i for i, word in enumerate([PAD, BOS, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
    )


def new_word(rng: random.Random, taken: set[str]) -> str:
    """A word of two or three syllables that is not in use yet."""
    while True:
        syllables = rng.choice((2, 2, 3))
        word = "".join(
            rng.choice("b d f g l m n r s t v br dr tr st".split()) + rng.choice("aeiou")
            for _ in range(syllables)
        ) + rng.choice(["", "n", "l", "s", "nne"])
        if word not in taken:
            taken.add(word)
            return word
