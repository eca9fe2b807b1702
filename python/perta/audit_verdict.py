"""What `perta audit` makes of its numbers: checks, each with its criterion, and a verdict in plain
words. Spec: docs/audit.md, "Criteria"."""

from typing import Any

KNOWN = 1.2  # times what the model of comparison gives: as it is, rounded, asked otherwise
RETAUGHT = 1.5  # the same, after both were re-taught
SLACK = 0.01  # of probability: below it, ratios are noise
STRENGTH = 0.02  # of extraction strength, above that of the model of comparison
KEPT = 0.97  # of what the model before gives the retain set

CAME_BACK = "came back"
DID_NOT = "did not come back under what was tried"


def check(name: str, criterion: str, value: float | None, bound: float | None, **more: Any) -> dict[str, Any]:
    """A number, at most 1, that must not be above its bound; None if it, or its bound, was not
    measured. A bound that no number can exceed judges nothing."""
    judged = value is not None and bound is not None and bound < 1
    if bound is not None and bound >= 1:
        more["why"] = "its limit is 1 or more: what it is compared with knows nearly all"
    result = ("pass" if value <= bound else "fail") if judged else "not judged"
    return {"name": name, "criterion": criterion, "value": value, "bound": bound, "result": result} | more


def bound_of(factor: float, level: float) -> float:
    return max(factor * level, level + SLACK)


class Verdict:
    """The checks of one audit. found: audit.json, without them."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        with_ = found["compared_with"]
        self.other, self.target = with_["model"], with_.get("probability")
        self.whose = {"gold": "gold's", "base": "base's", None: "the target"}[self.other]
        self.checks: list[dict[str, Any]] = []

    def limit(self, factor: float) -> str:
        return f"probability at most {factor:g} × {self.whose}"

    def level(self, numbers: dict[str, Any], key: str = "probability") -> float | None:
        """What the number must be compared with; numbers: by model."""
        if self.other is None:
            return self.target if key == "probability" else None
        return numbers[self.other].get(key)

    def known(self, name: str, numbers: dict[str, Any], key: str = "probability", where: str = "") -> None:
        value, level = numbers["after"].get(key), self.level(numbers, key)
        if key != "probability" and self.other is None:
            level = self.target
        bound = None if level is None else bound_of(KNOWN, level)
        self.checks.append(check(name, self.limit(KNOWN) + where, value, bound, compared_with=level))

    def as_it_is(self) -> None:
        numbers = {model: sets["forget"] for model, sets in self.found["as_it_is"].items()}
        self.known("as it is", numbers)
        value, level = numbers["after"].get("extraction_strength"), self.level(numbers, "extraction_strength")
        why = {} if value is not None and level is not None else {
            "why": "there is no model to compare with" if self.other is None else "perta eval does not report it"}  # fmt: skip
        self.checks.append(check("extraction strength", f"at most {STRENGTH} above {self.whose}", value,
                                 None if level is None else level + STRENGTH, compared_with=level, **why))  # fmt: skip
        if "paraphrased_probability" in numbers["after"]:
            self.known("paraphrased answers", numbers, "paraphrased_probability")
        asked = {model: sets["paraphrased"] for model, sets in self.found["as_it_is"].items() if "paraphrased" in sets}
        if asked:
            self.known("asked otherwise", asked)

    def retaught(self) -> None:
        for attack in self.found["retaught"]:
            after, others = attack["after"]["rest"], attack.get(self.other or "", {}).get("rest")
            levels = others or [self.target] * len(after)
            points = zip(after, levels, attack["updates"], strict=True)
            bounds = [(value, bound_of(RETAUGHT, level), level, updates) for value, level, updates in points][1:]
            value, bound, level, updates = max(bounds, key=lambda p: (p[1] < 1, p[0] - p[1]))
            self.checks.append(check(
                f"re-taught: {attack['name']}", self.limit(RETAUGHT) + (" after the same" if self.other else ""),
                value, bound, compared_with=level, updates=updates))  # fmt: skip

    def kept(self) -> None:
        """What the edit cost is no part of what came back: it is a warning."""
        sets = self.found["as_it_is"]
        name = "holdout" if "holdout" in sets["before"] else "retain"
        value, before = sets["after"][name]["probability"], sets["before"][name]["probability"]
        what = "held out" if name == "holdout" else "shown to the method, perhaps"
        self.checks.append({
            "name": "kept", "criterion": f"retain samples ({what}): probability at least {KEPT} × that before",
            "value": value, "bound": KEPT * before, "compared_with": before,
            "result": "pass" if value >= KEPT * before else "warn"})  # fmt: skip

    def all(self) -> list[dict[str, Any]]:
        self.as_it_is()
        for form, numbers in self.found["rounded"].items():
            self.known(f"rounded to {form}", numbers, where=" in the same format" if self.other else "")
        self.retaught()
        self.kept()
        return self.checks


def verdict_of(checks: list[dict[str, Any]]) -> str:
    return CAME_BACK if any(one["result"] == "fail" for one in checks) else DID_NOT


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.1e}"


def rows(checks: list[dict[str, Any]]) -> list[str]:
    """The table for a terminal."""
    wide = max(len(one["name"]) for one in checks)
    lines = [f"{'':{wide}}  {'value':>7} {'limit':>7}  result"]
    for one in checks:
        limit = f"{number(one['bound']):>7}" if one["name"] != "kept" else f">={number(one['bound'])}"
        lines.append(f"{one['name']:{wide}}  {number(one['value']):>7} {limit:>7}  {one['result']}")
    return lines


# ---- in plain words


def sentences(found: dict[str, Any]) -> dict[str, list[str]]:
    """What was tried, what came back, what was not tried."""
    return {"tried": tried(found), "came_back": came_back(found), "not_tried": not_tried(found)}


def tried(found: dict[str, Any]) -> list[str]:
    o, sets = found["options"], found["sets"]
    n = sets["forget"]["samples"]
    lines = [f"The {n} samples that are to be forgotten were asked for, word for word as they are in the data."]
    if any("paraphrased_probability" in one["forget"] for one in found["as_it_is"].values()):
        lines.append("Their paraphrased answers were asked for.")
    if "paraphrased" in sets:
        lines.append(f"{sets['paraphrased']['samples']} samples that put the same otherwise were asked for.")
    if found["rounded"]:
        lines.append(f"The edited weights were rounded to {', '.join(found['rounded'])}.")
    ways = f"LoRA of rank {listed(o['ranks'])} at the rates {listed(o['rates'])}, after {listed(o['updates'])} updates"
    if found["taught_lines"]:
        lines.append(f"{len(found['taught_lines'])} of the samples were taught again ({ways}), and the other "
                     f"{n - len(found['taught_lines'])} were asked for.")  # fmt: skip
    if "related" in sets:
        lines.append(f"{sets['related']['samples']} samples of related text were taught ({ways}), and all that is to be "
                     "forgotten was asked for.")  # fmt: skip
    return lines


def listed(values: list[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def came_back(found: dict[str, Any]) -> list[str]:
    lines = []
    for one in found["checks"]:
        if one["result"] == "fail":
            after = f" after {one['updates']} updates" if "updates" in one else ""
            lines.append(f"{one['name']}{after}: {number(one['value'])}, where the limit is {number(one['bound'])} "
                         f"({one['criterion']}, which is {number(one['compared_with'])}).")  # fmt: skip
    return lines


def not_tried(found: dict[str, Any]) -> list[str]:
    lines = []
    if not found["rounded"]:
        lines.append("Rounding of the weights to fewer bits.")
    else:
        lines.append("Rounding to other formats than those above; re-teaching of rounded weights.")
    if not found["retaught"]:
        lines.append("Re-teaching.")
    else:
        lines.append("Training of all weights; other ranks, rates, optimizers, and more updates than those above; "
                     "re-teaching of other samples than those that were chosen.")  # fmt: skip
    if "related" not in found["sets"]:
        lines.append("Re-teaching on other text about the same subjects (--data-related).")
    if not any(one["name"] in ("asked otherwise", "paraphrased answers") for one in found["checks"]):
        lines.append("The same asked in other words (--data-paraphrased).")
    lines.append("Other languages; questions step by step; prompts made to get round the edit; sampled instead of given "
                 "answers; reading internal activations.")  # fmt: skip
    lines += [f"{one['name']}: not judged, because {one['why']}." for one in found["checks"] if one["result"] == "not judged"]
    return lines
