"""What `perta forget` says in the end: summary.json for programs, summary.md for people."""

import math
import shlex
from typing import Any

from perta.forget_sets import Sets

AS_IT_IS = "as it is"  # the condition that is always there
NAMES = {
    "forget": "to be forgotten",
    "retain": "to be retained, shown to the method",
    "held-out": "to be retained, held out",
}


def slices(sets: Sets) -> dict[str, slice]:
    """Where each set's lines are in the list of all lines."""
    at, found = 0, {}
    for name, samples in sets.named().items():
        found[name] = slice(at, at + len(samples))
        at += len(samples)
    return found


def of_set(answers: list[dict[str, Any]]) -> dict[str, float]:
    """What the model knows of some lines of `perta eval --per-sample`."""
    n = len(answers)
    return {
        "probability": math.fsum(answer["probability"] for answer in answers) / n,
        "loss": math.fsum(answer["loss"] for answer in answers) / n,
        "word_for_word": sum(answer["exact_match"] for answer in answers),
    }


def scores(sets: Sets, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By set; empty sets are left out."""
    each = result["per_sample"]
    return {name: of_set(each[at]) for name, at in slices(sets).items() if each[at]}


def samples_json(sets: Sets, before: dict[str, Any], after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The numbers of each sample, under the line of the file that it comes from."""
    found = []
    for name, at in slices(sets).items():
        for i, sample in enumerate(sets.named()[name], at.start):
            one = {"set": name, "where": sample.where}
            for when, result in (("before", before), ("after", after)):
                if result:
                    answer = result["per_sample"][i]
                    one[when] = {key: answer[key] for key in ("loss", "probability", "exact_match")}
            found.append(one)
    return found


def number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.1e}"


def table(summary: dict[str, Any]) -> list[str]:
    lines = ["| | samples | probability of the right answer | | word for word | |",
             "|---|---|---|---|---|---|", "| | | before | after | before | after |"]  # fmt: skip
    for name, one in summary["sets"].items():
        before, after = one["before"], one.get("after")
        lines.append(
            f"| {NAMES[name]} | {one['samples']} | {number(before['probability'])} | "
            f"{number(after['probability']) if after else '–'} | {before['word_for_word']} | "
            f"{after['word_for_word'] if after else '–'} |"
        )
    return lines


def rows(summary: dict[str, Any]) -> list[str]:
    """The table for a terminal."""
    lines = [f"{'':36}{'samples':>8}{'before':>9}{'after':>9}"]
    for name, one in summary["sets"].items():
        after = number(one["after"]["probability"]) if "after" in one else "-"
        lines.append(f"{NAMES[name]:36}{one['samples']:8}{number(one['before']['probability']):>9}{after:>9}")
    return lines


def verdict(summary: dict[str, Any]) -> str:
    target, forget = summary["target"], summary["sets"]["forget"]
    before = number(forget["before"]["probability"])
    if summary["nothing_to_forget"]:
        return (f"**Nothing to forget.** The model gives the answers that are to be forgotten a probability of "
                f"{before}, which is not above the target of {number(target['probability'])}. There is no patch.")
    after = number(forget["after"]["probability"])
    if not summary["reached"]:
        broken = [one for one in summary["edit"].get("conditions", [])[:1] if one["condition"] != AS_IT_IS]
        more = "".join(f" Under the condition {one['condition']} it is {number(one['probability'])}, and was to be "
                       f"at most {number(one['limit'])}." for one in broken)  # fmt: skip
        return (f"**Not enough is forgotten.** The target was a probability of {number(target['probability'])}; after "
                f"{summary['edit']['steps']} steps it is {after} (before: {before}).{more} More `--steps` go further.")
    return (f"**The target is reached.** The model gave the answers that are to be forgotten a probability of {before}, "
            f"and now gives them {after}; the target was {number(target['probability'])}.")


def markdown(summary: dict[str, Any], out: str) -> str:
    """summary.md; out is the folder as the user named it."""
    model = shlex.quote(summary["model"])
    where = shlex.quote(out)
    lines = ["# What was forgotten", "", verdict(summary), "", *table(summary), ""]
    lines += [
        "The probability of an answer is normalised by its length: exp of minus the mean cross-entropy over its tokens. "
        "Shown are means over samples. \"Word for word\" counts the answers that the model would give exactly. "
        "`summary.json` has the numbers of every sample.", "",
        f"The target comes from {summary['target']['why']}.", "",
    ]  # fmt: skip
    if not summary["nothing_to_forget"]:
        lines += survived(summary["edit"].get("conditions", [])) + edited(summary, model, where)
    lines += ["## What this does not show", "", *(f"- {text}" for text in caveats(summary)), ""]
    if summary["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in summary["notes"]), ""]
    return "\n".join(lines)


def survived(conditions: list[dict[str, Any]]) -> list[str]:
    """What came out under the conditions of --survive."""
    if not conditions:
        return []
    lines = [f"| {one['condition']} | {number(one['probability'])} | {number(one['limit'])} | "
             f"{'yes' if one['holds'] else '**no**'} |" for one in conditions]  # fmt: skip
    return ["## Does it last?", "", "The target also had to hold under these conditions, the worst first "
            "(docs/steps.md says what they are). It is no proof: other ways may bring back more.", "",
            "| | probability | at most | holds |", "|---|---|---|---|", *lines, ""]  # fmt: skip


def where_of(edit: dict[str, Any]) -> str:
    if edit["chosen"] > edit["steps"]:  # docs/steps.md: --survive
        return f"the mean of the last of {edit['steps']} steps"
    return f"step {edit['chosen']} of {edit['steps']}"


def edited(summary: dict[str, Any], model: str, where: str) -> list[str]:
    edit = summary["edit"]
    share = 100 * edit["changed"] / edit["parameters"] if edit["parameters"] else 0
    return [
        "## What was edited", "",
        f"{edit['changed']:,} of {edit['parameters']:,} parameters changed ({share:.1f} %), by {where_of(edit)}. "
        f"The model itself is unchanged; the difference is in `patch/` "
        f"({edit['patch_bytes'] / 1e6:.1f} MB). `report.html` shows where it is.", "",
        "    # the model without what was forgotten, in a new folder; or --in-place",
        f"    perta apply {model} {where}/patch --out forgotten",
        "    # is it the model that the patch leads to?",
        f"    perta verify forgotten --patch {where}/patch --applied",
        "    # back to the model as it was",
        f"    perta revert forgotten {where}/patch --out model-again",
        "    # ask again",
        f"    perta eval --model {model} --patch {where}/patch --data {where}/data/forget.jsonl", "",
    ]  # fmt: skip


def caveats(summary: dict[str, Any]) -> list[str]:
    found = [
        "All numbers are about these samples and these wordings. The model may still know the same in other words, "
        "or tell it when asked step by step.",
        "Further tuning, also on other text, can bring back what was forgotten.",
        "`patch/` can be reverted: together with the edited model it contains what was forgotten. `data/` contains the "
        "text as token ids. Both are to be destroyed, with the model before, where an erasure is to be complete.",
    ]
    if "held-out" not in summary["sets"]:
        found.insert(0, "Nothing was held out, so what else was damaged is not known: of what the method was shown, it "
                        "keeps more than of the rest.")  # fmt: skip
    if summary["target"]["from"] == "guess":
        found.insert(0, "The target is a guess. Give `--base`, the model from before it learned what is to be "
                        "forgotten, or `--target`.")  # fmt: skip
    return found
