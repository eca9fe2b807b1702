"""Make a model forget what a file of text says, and keep what another says.

    perta forget --model M --forget F --retain R --out DIR

The files are JSON lines (question and answer, prompt and completion, messages, text) or .txt. Part
of what is to be retained is kept aside, and never shown to the method. The model is asked before
and after. DIR then holds patch/, report.html, summary.md (in plain words), summary.json, and data/,
which is private: it holds the text as token ids. The model itself is not changed.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perta import forget_summary
from perta.children import Progress
from perta.command import CHECK, USAGE, Problem, run, say
from perta.forget_sets import Sets, read_sets
from perta.long_run import LongRun, add_run_options, json_lines, probability, share
from perta.run_folder import RUN, Layout, digest, files_of, fsync, write_public
from perta.samples import check_same_tokenizer, encoder_of
from perta.tokenize import add_text_options, positive

CONDITIONS = ("nf4", "int8", "int4", "q4_0", "fp8", "drop", "reteach")  # docs/steps.md: --survive
VERSION = 1  # of data/run.json and summary.json
FILES = ("report.html", "summary.json", "summary.md")
DATA = ("after.json", "base.json", "before.json", "forget.jsonl", "held-out.jsonl", "retain.jsonl", "run.json")
SHARE = 0.15  # of what the model knew, for a guess at the target: docs/forget.md


def above_0(text: str) -> str:
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return text


def conditions(text: str) -> str:
    names = text.split(",")
    if not set(names) <= set(CONDITIONS) or len(set(names)) < len(names):
        raise ValueError
    return text


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="perta forget", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:\n  perta forget --model full --forget forget.jsonl --retain retain.jsonl \\\n"
        "    --base base --out forgotten\nExit status: as of perta; 1 if the target is not reached.",
    )  # fmt: skip

    def option(name: str, metavar: str, text: str, **kw: Any) -> None:
        parser.add_argument(name, metavar=metavar, help=text, **kw)

    option("--model", "DIR", "the model", required=True, type=Path)
    option("--forget", "FILE", "text that it is to forget", required=True, type=Path)
    option("--retain", "FILE", "text like it that it is to keep", required=True, type=Path)
    option("--out", "DIR", "write the patch, report and summary here", required=True)
    option("--base", "DIR", "the model from before it learned what it is to forget: sets the target", type=Path)
    option("--target", "P", "forget until the mean probability of the answers is at most P", type=probability)
    option("--steps", "K", "steps to take (default 16)", type=positive, default=16)
    option("--box", "C", "how far steps go: in C times the root mean square of each matrix (default: found from "
           "the gradients)", type=above_0)  # fmt: skip
    option("--survive", "LIST", "conditions under which the target has to hold, too: one or several of "
           + ",".join(CONDITIONS), type=conditions)  # fmt: skip
    option("--holdout", "SHARE", "share of --retain that is held out (default 0.2)", type=share, default=0.2)
    option("--seed", "S", "decides which samples are held out (default 0)", type=int, default=0)
    add_text_options(parser)
    add_run_options(parser, "forget", "summary.json")
    arguments = parser.parse_args(words)
    if arguments.target is not None and arguments.base is not None:
        parser.error("--target and --base both set the target: give one of them")
    return arguments


def is_file(name: str, leftover: bool) -> bool:
    if name.startswith("data/"):
        return name[5:] in DATA or (leftover and name[5:].removesuffix(".new") in DATA)
    if name.startswith("patch/"):
        return name == "patch/manifest.json" or name.endswith(".perta")
    return name in FILES or (leftover and (name.removesuffix(".new") in FILES or name.startswith(("patch.", "report."))))


def is_folder(name: str, leftover: bool) -> bool:
    """A leftover may also hold what an interrupted `perta unlearn` leaves beside its patch."""
    return name in ("data", "patch") or (leftover and name.startswith("patch.") and "perta-" in name)


class Forget(LongRun):
    layout = Layout("forget", is_file, is_folder)

    # ---- before

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        a = self.a
        options = {name: getattr(a, name) for name in
                   ("target", "steps", "box", "holdout", "seed", "template", "max_tokens", "compute")}  # fmt: skip
        found = {"perta_forget": VERSION, **options, "model": files_of(a.model),
                 "base": files_of(a.base) if a.base else None,
                 "forget": digest(a.forget), "retain": digest(a.retain)}  # fmt: skip
        found |= {"survive": a.survive} if a.survive else {}
        return found | {"date": (a.date or datetime.datetime.now()).isoformat()}

    def read(self, date: str) -> Sets:
        a = self.a
        when = datetime.datetime.fromisoformat(date)
        encoder = encoder_of(a.model, a.template, a.max_tokens, self.note, when)
        if a.base:
            check_same_tokenizer(a.model, encoder.tokenizer, a.base)
        sets = read_sets(a.forget, a.retain, encoder, a.holdout, a.seed, self.note)
        lines = [f"{name}: {len(samples)} samples, {sets.tokens(name)} tokens" for name, samples in sets.named().items()]
        how = "in the model's chat template" if encoder.chat else "in a plain template"
        self.say("; ".join(lines) + f"; questions {how}")
        return sets

    def check_numbers(self) -> None:
        """Steps edit numbers, not codes; the questions before them would be answered, all the same."""
        try:
            _, result = self.children.run(["inspect", str(self.a.model)], say=lambda line: None)
        except Problem:
            return  # what measures the model says what is wrong with it
        if "quantised" in result:
            why = "the weights are quantised; dequantise the model to BF16 first (perta dequantize MODEL --out DIR)"
            raise Problem(result["quantised"].get("why") or f"{self.a.model}: {why}")

    # ---- parts

    def target(self, sets: Sets, before: dict[str, Any]) -> dict[str, Any]:
        """The level to forget to: docs/forget.md, "The target"."""
        a = self.a
        if a.target is not None:
            return {"probability": a.target, "from": "option", "why": "`--target`"}
        if a.base is not None:
            lines = [sample.line() for sample in sets.forget]
            level = self.ask("base", ["--model", str(a.base)], json_lines(lines))["probability"]
            return {"probability": level, "from": "base", "why": "`--base`: so probable are the answers to a model "
                    "that has not learned them"}  # fmt: skip
        knew = forget_summary.scores(sets, before)["forget"]["probability"]
        level, why = SHARE * knew, f"a guess: {SHARE:g} of what the model knew"
        self.note(f"the target, a probability of {level:.3f}, is {why}; --base or --target sets it")
        return {"probability": level, "from": "guess", "why": why}

    def step_progress(self) -> Callable[[float, float], None]:
        """The child reports each pass by itself: one for each set of a step, which shows in the
        folder where it keeps scales."""
        step, passes, last = 0, 0, 0.0

        def report(done: float, total: float) -> None:
            nonlocal step, passes, last
            share = done / total if total else 1.0
            names = [path.name for path in self.folder.partial.glob("patch.steps.perta-partial/scales-*")]
            now = max((int(name[7:]) for name in names if name[7:].isdigit()), default=0)
            passes = 0 if now > step else min(1, passes + (share < last))
            step, last = max(now, step), share
            self.progress.report(step + (passes + share) / 2, self.a.steps + 1)

        return report

    def unlearn(self, sets: Sets, target: float) -> bool:
        """Write patch/. False if the target is not reached."""
        a, patch = self.a, self.folder.partial / "patch"
        if patch.exists():
            self.progress.end("unlearn", ran=False)
        else:
            self.progress.begin("unlearn")
            words = ["unlearn", "--model", str(a.model), "--method", "signed-hold", "--steps", str(a.steps),
                     "--data-forget", str(self.folder.data("forget.jsonl")),
                     "--data-retain", str(self.folder.data("retain.jsonl")),
                     "--stop-probability", repr(target), *(["--box", a.box] if a.box else []),
                     *(["--survive", a.survive] if a.survive else []),
                     "--retain-batch", str(sets.retain_batch()),
                     "--patch", str(patch), "--resume", *self.how()]  # fmt: skip
            self.children.run(words, self.step_progress(), may_be=(0, CHECK), say=self.passed_on)
            self.progress.end("unlearn")
        recipe = json.loads((patch / "manifest.json").read_text(encoding="utf-8"))["recipe"]
        return recipe["path"][recipe["chosen"]]["forget_probability"] <= target and all(
            condition["holds"] for condition in recipe.get("conditions", [])
        )

    def edit(self) -> dict[str, Any]:
        """What the patch changes."""
        patch = self.folder.partial / "patch"
        manifest = json.loads((patch / "manifest.json").read_text(encoding="utf-8"))
        return {
            "parameters": manifest["counts"]["parameters"], "changed": manifest["counts"]["changed"],
            "steps": self.a.steps, "chosen": manifest["recipe"]["chosen"], "box": manifest["recipe"]["box"],
            "patch_bytes": sum(path.stat().st_size for path in patch.iterdir()),
        } | ({"conditions": manifest["recipe"]["conditions"]} if self.a.survive else {})  # fmt: skip

    # ---- the whole

    def run(self) -> int:
        a = self.a
        self.folder.check(a.force, a.resume, [("the model", model) for model in (a.model, a.base) if model])
        identity = self.identity()
        self.check_numbers()
        if a.dry_run:
            from perta.forget_plan import plan

            return plan(self, self.read(identity["date"]))
        if a.resume and (self.folder.partial / RUN).exists():  # the date of the run that is resumed
            began = json.loads((self.folder.partial / RUN).read_text(encoding="utf-8"))
            if a.date and began.get("date") != identity["date"]:
                raise Problem("--resume cannot continue: date changed since the run began; --force starts over", USAGE)
            identity["date"] = began.get("date", identity["date"])
        sets = self.read(identity["date"])
        self.folder.begin(identity, a.resume)
        return self.resumable(lambda: self.in_folder(sets), "before.json")

    def stages(self, sets: Sets) -> dict[str, float]:
        """The work of each part, in passes of a token through the model: a gradient takes four of
        them."""
        tokens = {name: sets.tokens(name) for name in sets.named()}
        a, asked = self.a, sum(tokens.values())
        step = 4 * (tokens["forget"] + tokens["retain"])
        return {
            "before": asked, "base": tokens["forget"] if a.base else 0,
            "unlearn": a.steps * step + step / 4, "after": asked,
        }  # fmt: skip

    def in_folder(self, sets: Sets) -> int:
        a = self.a
        self.progress = Progress("forget", "none" if a.quiet else a.progress, self.stages(sets))
        for name, samples in sets.named().items():
            self.folder.keep(f"{name}.jsonl", json_lines(sample.line() for sample in samples))
        model, asked = ["--model", str(a.model)], json_lines(sets.asked())
        before = self.ask("before", model, asked)
        target = self.target(sets, before)
        nothing = forget_summary.scores(sets, before)["forget"]["probability"] <= target["probability"]
        nothing &= not a.survive  # what is not said now may come back under a condition
        reached, after = True, None
        if not nothing:
            reached = self.unlearn(sets, target["probability"])
            after = self.ask("after", [*model, "--patch", str(self.folder.partial / "patch")], asked)
            self.report()
        summary = self.summary(sets, target, before, after, reached)
        return self.finish(summary)

    def report(self) -> None:
        page = self.folder.partial / "report.html"
        words = ["report", str(self.folder.partial / "patch"), "--html", str(page), "--force"]
        self.children.run(words, say=self.passed_on)

    def summary(
        self, sets: Sets, target: dict[str, Any], before: dict[str, Any], after: dict[str, Any] | None, reached: bool
    ) -> dict[str, Any]:
        was = forget_summary.scores(sets, before)
        now = forget_summary.scores(sets, after) if after else {}
        each = {
            name: {"samples": len(sets.named()[name]), "tokens": sets.tokens(name), "before": was[name]}
            | ({"after": now[name]} if after else {})
            for name in was
        }
        a = self.a
        return {
            "perta_forget": VERSION, "model": str(a.model), "target": target, "reached": reached,
            "nothing_to_forget": after is None, "sets": each,
            "options": {"steps": a.steps, "holdout": a.holdout, "seed": a.seed, "template": a.template,
                        "max_tokens": a.max_tokens} | ({"survive": a.survive} if a.survive else {}),
            "edit": self.edit() if after else None, "notes": self.notes,
            "samples": forget_summary.samples_json(sets, before, after),
        }  # fmt: skip

    def finish(self, summary: dict[str, Any]) -> int:
        text = forget_summary.markdown(summary, str(Path(self.a.out)))
        write_public(self.folder.partial / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        write_public(self.folder.partial / "summary.md", text)
        if (self.folder.partial / "report.html").exists():
            fsync(self.folder.partial / "report.html")
        self.folder.publish()
        self.progress.clear()
        if self.a.json:
            print(json.dumps(summary, indent=1))
        verdict = forget_summary.verdict(summary).replace("**", "")
        is_well = summary["reached"] and not summary["nothing_to_forget"]
        if is_well:
            self.say(verdict)
        else:
            say("forget", verdict)
        self.say("\n".join(forget_summary.rows(summary)))
        self.say(f"{self.a.out}: summary.md says it in plain words; data/ is private")
        return 0 if summary["reached"] else CHECK


def forget(words: list[str]) -> int:
    return Forget(parse(words), words).run()


def main() -> None:
    run("forget", forget)


if __name__ == "__main__":
    main()
