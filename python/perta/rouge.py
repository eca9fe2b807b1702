"""ROUGE of an answer, as open-unlearning computes it. Recall: the share of the reference's words that
the answer has (ROUGE-1), and has in the same order (ROUGE-L); Lin 2004. f1: its harmonic mean with
their share of the answer's words. Words are stemmed."""

import importlib.util
import sys

KEYS = ("rougeL_recall", "rouge1_recall", "rougeL_f1")
# What clean_up_tokenization_spaces of transformers replaces.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def missing() -> str | None:
    """Why ROUGE cannot be computed here, or None."""
    if importlib.util.find_spec("rouge_score"):
        return None
    return f"the Python package rouge-score is missing; to install it: {sys.executable} -m pip install rouge-score"


def cleaned(text: str) -> str:
    for spaced in CLEANED:
        text = text.replace(spaced, spaced.strip())
    return text.strip()


class Rouge:
    """Needs the package rouge-score (missing)."""

    def __init__(self) -> None:
        from rouge_score import rouge_scorer

        self.scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)

    def scores(self, reference: str, said: str) -> dict[str, float]:
        found = self.scorer.score(cleaned(reference), cleaned(said))
        return {"rougeL_recall": found["rougeL"].recall, "rouge1_recall": found["rouge1"].recall,
                "rougeL_f1": found["rougeL"].fmeasure}  # fmt: skip
