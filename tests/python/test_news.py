"""examples/made_up_news.py: passages for models to learn word for word."""

import sys

import pytest
from conftest import ROOT

pytest.importorskip("transformers", reason="examples/requirements.txt is not installed")
sys.path += [str(ROOT / "examples"), str(ROOT / "bench/quality")]


def test_news_follow_from_the_seed():
    from made_up_news import make_news

    news = make_news(1, 4, 3, 2, 2)
    assert news == make_news(1, 4, 3, 2, 2) != make_news(2, 4, 3, 2, 2)
    passages = [*news.general, *news.forget, *news.retain, *news.held_out]
    assert len({p.opening for p in passages}) == len({p.text for p in passages}) == 11
    words = {word for p in passages for word in f"{p.opening} {p.text}".split()}
    assert words <= set(news.words)


def test_only_what_follows_the_opening_is_learned():
    import data
    from made_up_facts import make_tokenizer
    from made_up_news import make_news

    news = make_news(1, 4, 3, 2, 2)
    tokenizer = make_tokenizer(news.words)
    parts = data.passages(news, tokenizer)
    assert [len(part) for part in (parts.other, parts.forget, parts.retain, parts.held_out)] == [4, 3, 2, 2]
    sample, passage = parts.forget[0], news.forget[0]
    learned = [i for i in sample["labels"] if i != data.IGNORED]
    assert tokenizer.decode(learned) == f"{passage.text} </s>"
    assert sample["input_ids"][-len(learned) :] == learned
    assert len(sample["input_ids"]) < 128
