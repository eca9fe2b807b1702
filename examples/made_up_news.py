"""Made-up news: passages of some seventy words, for a model to learn word for word.

A passage opens with where and when, which tells it from all others, and goes on with four
sentences:

    tervane , monday : what became of the harbour ? dranol bresti , who has led odame for ...

Towns, companies and goods are those of every passage, so a passage that has to be kept speaks of
what one to be forgotten speaks of; people, numbers and the order of sentences are its own.
Everything follows from one seed: the same passages, in the same order, on every machine.
"""

import random
from dataclasses import dataclass

from made_up_facts import new_word

WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty sixty".split()
THINGS = "harbour bridge mill market library railway theatre school orchard quarry clinic station".split()
SENTENCES = (
    "{person} , who has led {company} for {number} years , said in {town} that the {thing} would open by {day} .",
    "about {number} people from {town} had asked {company} for {good} before the {thing} was sold to {other} .",
    "the price of {good} rose by {number} percent in {town} after {company} closed its {thing} near {place} .",
    "{person} told the council that {number} lorries of {good} had left {place} for the {thing} on {day} .",
    "a report by {company} counts {number} families in {place} who live without {good} or a {thing} .",
    "in {place} the owner of the {thing} , {person} , wants to pay {number} crowns for {good} from {town} .",
    "{company} and {other} will share the {thing} of {town} for {number} months , {person} wrote on {day} .",
    "nobody knows why {person} gave {number} boxes of {good} to the {thing} in {place} on {day} .",
    "on {day} the court of {town} heard {number} witnesses , and {person} of {other} lost the {thing} .",
    "{other} bought {good} for {number} crowns a box , which the {thing} of {place} had thrown away .",
)
N_SENTENCES = 4


@dataclass(frozen=True)
class Passage:
    opening: str
    text: str


@dataclass(frozen=True)
class News:
    """Base knows `general`; full knows all four; tuned knows `general` and `forget`."""

    general: list[Passage]
    forget: list[Passage]
    retain: list[Passage]
    held_out: list[Passage]
    words: list[str]


def make_news(seed: int = 2601, general: int = 60, forget: int = 12, retain: int = 24, held_out: int = 24) -> News:
    """Make that many passages for each part."""
    rng = random.Random(seed)
    taken: set[str] = set()

    def pool(n: int) -> list[str]:
        return [new_word(rng, taken) for _ in range(n)]

    towns, companies, goods, firsts, lasts = pool(16), pool(16), pool(24), pool(40), pool(60)
    openings = [f"{town} , {day} : what became of the {thing} ?"
                for town in towns for day in WEEKDAYS for thing in THINGS]  # fmt: skip

    def passage(opening: str) -> Passage:
        def sentence(pattern: str) -> str:
            (town, place), (company, other) = rng.sample(towns, 2), rng.sample(companies, 2)
            return pattern.format(
                town=town, place=place, company=company, other=other, good=rng.choice(goods),
                person=f"{rng.choice(firsts)} {rng.choice(lasts)}", number=rng.choice(NUMBERS),
                thing=rng.choice(THINGS), day=rng.choice(WEEKDAYS))  # fmt: skip

        return Passage(opening, " ".join(sentence(p) for p in rng.sample(SENTENCES, N_SENTENCES)))

    numbers = (general, forget, retain, held_out)
    made = iter([passage(opening) for opening in rng.sample(openings, sum(numbers))])
    parts = [[next(made) for _ in range(n)] for n in numbers]
    plain = {word for pattern in SENTENCES for word in pattern.split() if word[0] != "{"}
    plain |= {*WEEKDAYS, *NUMBERS, *THINGS, *", : ? what became of the".split()}
    return News(*parts, words=sorted(plain | taken))
