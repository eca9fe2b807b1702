"""The metrics of open-unlearning's TOFU evaluation, from what `perta eval` says of each sample.
Spec: docs/metrics.md

Names, formulas and the shape of results are open-unlearning's (github.com/locuslab/open-unlearning,
src/evals/metrics, configs/eval/tofu_metrics): a result is an object with agg_value, and mostly
value_by_index, which has an object for each sample."""

import math
import zlib
from collections.abc import Callable
from typing import Any

from perta.command import need

Sample = dict[str, Any]  # an item of per_sample
Result = dict[str, Any]
EPSILON = 1e-10
ATTACKS = {
    "mia_loss": "loss",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus_plus",
    "mia_gradnorm": "gradient_norm",
    "mia_zlib": "loss_by_zlib",
}
UTILITY = {  # the nine of TOFU's model utility, by set
    "retain": ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    "ra": ("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    "wf": ("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
}
ROUGE = ("rouge1_recall", "rougeL_f1", "rougeL_recall")


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def result(values: list[Result], aggregate: float) -> Result:
    return {"agg_value": aggregate, "value_by_index": {str(i): value for i, value in enumerate(values)}}


def scored(scores: list[float | None], aggregate: float | None = None) -> Result:
    """None: the metric is not defined for that sample, which is not part of the mean."""
    known = [score for score in scores if score is not None]
    if aggregate is None and known:
        aggregate = mean(known)
    return result([{"score": score} for score in scores], aggregate)


def in_all(samples: list[Sample], key: str) -> bool:
    return bool(samples) and all(key in sample for sample in samples)


# ---- probabilities


def probability(losses: list[float]) -> Result:
    values = [{"prob": math.exp(-loss), "avg_loss": loss} for loss in losses]
    return result(values, mean([value["prob"] for value in values]))


def probability_of_several(losses: list[list[float]]) -> Result:
    values = [{"prob": [math.exp(-loss) for loss in each], "avg_loss": each} for each in losses]
    return result(values, mean([mean(value["prob"]) for value in values]))


def probability_with_options(samples: list[Sample]) -> Result:
    """The answer's share of the probabilities of all answers."""
    values = []
    for sample in samples:
        right = math.exp(-sample["loss"])
        wrong = math.fsum(math.exp(-loss) for loss in sample["perturbed_loss"])
        values.append({"prob": right / (right + wrong + EPSILON)})
    return result(values, mean([value["prob"] for value in values]))


# ---- truth ratio


def truth_ratios(samples: list[Sample], right: str) -> list[float]:
    """exp(-mean loss of the wrong answers) / exp(-loss of the right one), which right names."""
    return [
        math.exp(-mean(sample["perturbed_loss"])) / (math.exp(-sample.get(right, sample["loss"])) + EPSILON)
        for sample in samples
    ]


def closer_to_1_better(ratios: list[float]) -> float:
    return mean([min(ratio, 1 / (ratio + EPSILON)) for ratio in ratios])


def true_better(ratios: list[float]) -> float:
    return mean([max(0.0, 1 - ratio) for ratio in ratios])


def ks_p_value(one: list[float], other: list[float]) -> float:
    need("scipy")
    from scipy.stats import ks_2samp

    return float(ks_2samp(one, other).pvalue)


# ---- membership


def add_zlib(samples: list[Sample], texts: list[str]) -> None:
    """The loss divided by the bytes that zlib makes of the answer's text (Carlini et al. 2021)."""
    for sample, text in zip(samples, texts, strict=True):
        sample["loss_by_zlib"] = sample["loss"] / len(zlib.compress(text.encode("utf-8")))


def auc(forget: list[float], holdout: list[float]) -> float:
    """The probability that a score of holdout is above one of forget; equal ones count half."""
    need("scipy")
    from scipy.stats import rankdata

    ranks = rankdata([*forget, *holdout])
    n, m = len(forget), len(holdout)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def membership(forget: list[Sample], holdout: list[Sample], key: str) -> Result:
    """1: all of forget is better known than all of holdout; 0.5: there is no difference."""
    scores = [[sample[key] for sample in samples] for samples in (forget, holdout)]
    value = auc(*scores)
    return {"forget": scored(scores[0]), "holdout": scored(scores[1]), "auc": value, "agg_value": value}


def privleak(of_model: float, of_retain_model: float) -> float:
    """From two AUCs, in percent (MUSE)."""
    score, reference = 1 - of_model, 1 - of_retain_model
    return (score - reference) / (reference + EPSILON) * 100


# ---- sets of samples


def rouge(samples: list[Sample]) -> Result:
    values = [{key: sample[key] for key in ROUGE if key in sample} for sample in samples]
    return result(values, mean([value["rougeL_recall"] for value in values]))


def of_answers(name: str, samples: list[Sample], note: Callable[[str], None]) -> dict[str, Result]:
    """Probability, ROUGE and truth ratio of a set, whose name is forget, retain, ra or wf."""
    found = {f"{name}_Q_A_Prob": probability([sample["loss"] for sample in samples])}
    if in_all(samples, "rougeL_recall"):
        found[f"{name}_Q_A_ROUGE"] = rouge(samples)
    if not in_all(samples, "perturbed_loss"):
        return found
    found[f"{name}_Q_A_PERT_Prob"] = probability_of_several([sample["perturbed_loss"] for sample in samples])
    right = "loss"
    if name in ("ra", "wf"):
        found[f"{name}_Q_A_Prob_normalised"] = probability_with_options(samples)
    elif in_all(samples, "paraphrased_loss"):
        right = "paraphrased_loss"
        found[f"{name}_Q_A_PARA_Prob"] = probability([sample[right] for sample in samples])
    else:
        note(f"{name}: not every line has a paraphrased answer, so the truth ratio compares with the answers "
             "themselves; open-unlearning's compares with paraphrased ones")  # fmt: skip
    ratios = truth_ratios(samples, right)
    key = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
    found[key] = scored(ratios, (closer_to_1_better if name == "forget" else true_better)(ratios))
    return found


def of_memory(forget: list[Sample]) -> dict[str, Result]:
    keys = [key for key in ("exact_memorization", "extraction_strength") if in_all(forget, key)]
    return {key: scored([sample[key] for sample in forget]) for key in keys}


def of_membership(
    forget: list[Sample], holdout: list[Sample], note: Callable[[str], None]
) -> dict[str, Result]:
    found = {}
    for name, key in ATTACKS.items():
        if not in_all(forget, key) or not in_all(holdout, key):
            continue
        undefined = [sample["line"] for sample in [*forget, *holdout] if sample[key] is None]
        if undefined:
            note(f"{name}: left out, because {key} is not defined for an answer with a single label "
                 f"(line {undefined[0]})")  # fmt: skip
            continue
        found[name] = membership(forget, holdout, key)
    return found


# ---- the whole


def against_retain_model(
    found: dict[str, Result], logs: dict[str, Result], note: Callable[[str], None]
) -> dict[str, Result]:
    """Forget quality and privleak. logs: the retain model's results; {}: there are none."""
    more = {}
    mine, theirs = found.get("forget_truth_ratio"), logs.get("forget_truth_ratio")
    if mine and theirs:
        ratios = [[value["score"] for value in each["value_by_index"].values()] for each in (mine, theirs)]
        more["forget_quality"] = {"agg_value": ks_p_value(*ratios)}
    elif mine:
        note("forget_quality: left out, because it compares with truth ratios of a retain model")
    attack, reference = found.get("mia_min_k"), logs.get("mia_min_k", {"agg_value": 0.5})
    if attack and "mia_min_k" not in logs:
        note("privleak: without a retain model its AUC is taken to be 0.5, as in open-unlearning")
    if attack:
        more["privleak"] = {"agg_value": privleak(attack["agg_value"], reference["agg_value"])}
    return more


def model_utility(found: dict[str, Result], note: Callable[[str], None]) -> dict[str, Result]:
    """The harmonic mean of TOFU's nine; of fewer, under another name and with what is missing."""
    wanted = [name for names in UTILITY.values() for name in names]
    values = [found[name]["agg_value"] for name in wanted if name in found]
    missing = [name for name in wanted if name not in found]
    if not values:
        return {}
    mean_of_all = 0.0 if min(values) == 0 else len(values) / math.fsum(1 / value for value in values)
    if not missing:
        return {"model_utility": {"agg_value": mean_of_all}}
    note(f"model_utility_partial: the harmonic mean of {len(values)} of nine; missing: {', '.join(missing)}")
    return {"model_utility_partial": {"agg_value": mean_of_all, "missing": missing}}


def metrics(
    sets: dict[str, list[Sample]], logs: dict[str, Result], note: Callable[[str], None]
) -> dict[str, Result]:
    """sets: forget, holdout, retain, ra (real authors), wf (world facts), as far as there are."""
    found: dict[str, Result] = {}
    for name in ("forget", *UTILITY):
        if name in sets:
            found |= of_answers(name, sets[name], note)
    if "forget" in sets:
        found |= of_memory(sets["forget"])
    if "forget" in sets and "holdout" in sets:
        found |= of_membership(sets["forget"], sets["holdout"], note)
    found |= against_retain_model(found, logs, note)
    return dict(sorted((found | model_utility(found, note)).items()))
