"""Try to bring back what a patch made a model forget, and say what came back.

    perta audit --model M --patch P --data-forget F --data-retain R --gold G --out DIR

The patched model is asked as it is, with its weights rounded to fewer bits, and after a part of
what is to be forgotten (or related text) was taught again by LoRA; so is the model of comparison.
The data are token ids, from `perta tokenize'. DIR then holds audit.json, audit.html, and data/,
which is private: it holds the samples as token ids. Nothing else is changed.
"""

import argparse
import hashlib
import hmac
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta import audit_sets, audit_verdict
from perta.audit_sets import Lines, mean_probability, measures, read_lines, refuse_shared
from perta.audit_statement import statement
from perta.children import Progress
from perta.command import CHECK, Problem, run
from perta.long_run import LongRun, add_run_options, probability, share
from perta.run_folder import RUN, Layout, digest, files_of, fsync, write_private, write_public
from perta.tokenize import positive

VERSION = 1  # of data/run.json and audit.json
BATCH = 32  # samples of an update, at most
FORMATS = ("nf4", "int8", "int4", "q4_0", "fp8")  # of perta eval --quantize
FILES = ("audit.html", "audit.intoto.json", "audit.json")
SETS = ("forget", "retain", "holdout", "related", "paraphrased")


def numbers(kind: type, most: float) -> Any:
    """For argparse: a list of different numbers above 0, in ascending order."""

    def parse(text: str) -> list[Any]:
        found = sorted({kind(word) for word in text.split(",")})
        if not all(0 < value <= most for value in found):
            raise ValueError
        return found

    parse.__name__ = "list of numbers"
    return parse


def formats(text: str) -> list[str]:
    found = [] if text == "none" else list(dict.fromkeys(text.split(",")))
    if set(found) - set(FORMATS):
        raise ValueError
    return found


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="perta audit", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:\n  perta audit --model full --patch forgotten/patch --data-forget forget.jsonl \\\n"
        "    --data-retain retain.jsonl --base base --out audit\n"
        "Exit status: as of perta; 0 if nothing came back under what was tried, 1 if something did.",
    )  # fmt: skip

    def option(name: str, metavar: str, text: str, **kw: Any) -> None:
        parser.add_argument(name, metavar=metavar, help=text, **kw)

    option("--model", "DIR", "the model before the patch", required=True, type=Path)
    option("--patch", "DIR", "what made it forget", required=True, type=Path)
    option("--data-forget", "FILE", "what is to be forgotten", required=True, type=Path)
    option("--data-retain", "FILE", "what is to be kept", required=True, type=Path)
    option("--out", "DIR", "write the audit here", required=True)
    option("--holdout", "FILE", "samples to be kept that no method was shown", type=Path)
    option("--gold", "DIR", "compare with this model, which never saw what is to be forgotten", type=Path)
    option("--base", "DIR", "or with the model from before it learned that", type=Path)
    option("--target", "P", "or with this mean probability of the answers", type=probability)
    option("--formats", "NAME,...", f"round weights to these: {', '.join(FORMATS)}, or none (default nf4,int4)",
           type=formats, default=["nf4", "int4"])  # fmt: skip
    option("--share", "SHARE", "of --data-forget that is taught again (default 0.25; 0: none is)", type=share,
           default=0.25)  # fmt: skip
    option("--seed", "S", "decides which samples those are (default 0)", type=int, default=0)
    option("--ranks", "R,...", "of the LoRA (default 8,32)", type=numbers(int, 65536), default=[8, 32])
    option("--rates", "L,...", "constant learning rates (default 3e-4,1e-3)", type=numbers(float, 1), default=[3e-4, 1e-3])
    option("--updates", "N,...", "ask after so many (default 4,8,16)", type=numbers(int, 1 << 30), default=[4, 8, 16])
    option("--data-related", "FILE", "also teach this other text about the same subjects", type=Path)
    option("--data-paraphrased", "FILE", "also ask for the same in other words", type=Path)
    option("--data-key", "FILE", "a secret key: record the HMAC-SHA-256 of each file of data", type=Path)
    option("--max-tokens", "N", "refuse longer samples", type=positive)
    parser.add_argument("--statement", action="store_true", help="also write audit.intoto.json, to be signed")
    add_run_options(parser, "audit", "audit.json")
    arguments = parser.parse_args(words)
    if sum(value is not None for value in (arguments.gold, arguments.base, arguments.target)) != 1:
        parser.error("one of --gold, --base and --target is needed: it says how much a model may know that forgot")
    return arguments


# ---- the folder


def is_file(name: str, leftover: bool) -> bool:
    name = name.removesuffix(".new") if leftover else name
    if name.startswith("data/adapter-"):
        return leftover
    if name.startswith("data/"):
        return name == RUN or name.startswith("data/answers-") or name[5:].removesuffix(".jsonl") in SETS
    return name in FILES or (leftover and name.startswith("audit."))


def is_folder(name: str, leftover: bool) -> bool:
    return name == "data" or (leftover and name.startswith("data/adapter-"))


# ---- the parts


@dataclass(frozen=True)
class Training:
    on: str  # forget: a part of it; or related
    rank: int
    rate: float
    updates: int

    @property
    def attack(self) -> str:
        return f"{self.on}, rank {self.rank}, rate {self.rate}"


@dataclass(frozen=True)
class Part:
    """One model that is asked. whose: before, after, gold or base."""

    whose: str
    everything: bool = False  # all sets are asked for, not only forget
    form: str = ""  # weights are rounded to it
    training: Training | None = None  # an adapter is trained first

    @property
    def name(self) -> str:
        t = self.training
        words = [self.whose, self.form, f"{t.on}-r{t.rank}-{t.rate}-{t.updates}" if t else ""]
        return "-".join(filter(None, words))


class Audit(LongRun):
    layout = Layout("audit", is_file, is_folder)

    def __init__(self, arguments: argparse.Namespace, words: list[str]) -> None:
        super().__init__(arguments, words)
        a = arguments
        self.other = "gold" if a.gold else "base" if a.base else None  # the model of comparison
        self.models = {"before": ["--model", str(a.model)],
                       "after": ["--model", str(a.model), "--patch", str(a.patch)]}  # fmt: skip
        if self.other:
            self.models[self.other] = ["--model", str(a.gold or a.base)]
        self.began: dict[str, Any] = {}  # the identity
        self.sets: dict[str, Lines] = {}
        self.taught: list[int] = []

    # ---- before

    def paths(self) -> dict[str, Path]:
        a = self.a
        named = zip(SETS, (a.data_forget, a.data_retain, a.holdout, a.data_related, a.data_paraphrased), strict=True)
        return {name: path for name, path in named if path}

    def options(self) -> dict[str, Any]:
        names = ("target", "formats", "share", "seed", "ranks", "rates", "updates", "max_tokens", "compute")
        return {name: getattr(self.a, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        a, patch = self.a, self.a.patch / "manifest.json"
        if not patch.is_file():
            raise Problem(f"{a.patch}: not the folder of a patch: it has no manifest.json")
        models = {name: files_of(path) if path else None for name, path in (("model", a.model), ("gold", a.gold), ("base", a.base))}
        data = {f"data_{name}": digest(path) for name, path in self.paths().items()}
        return {"perta_audit": VERSION, **self.options(), **models, "patch": digest(patch), **data,
                "data_key": digest(a.data_key) if a.data_key else None, "statement": a.statement}  # fmt: skip

    def check_unchanged(self) -> None:
        """In the end: all of what was tested was the same model, patch and data."""
        now = self.identity()
        differ = [key for key in now if now[key] != self.began[key]]
        if differ:
            raise Problem(f"{', '.join(differ)} changed while it was tested; --force starts over")

    def limit(self) -> list[str]:
        return ["--max-tokens", str(self.a.max_tokens)] if self.a.max_tokens else []

    def read(self) -> None:
        """Read the data, and have the command check them, with the models and the patch, under their
        own names."""
        for name, path in self.paths().items():
            self.sets[name] = read_lines(path)
        nouns = {"retain": "to be retained", "holdout": "to be retained", "related": "related text",
                 "paraphrased": "to be asked in other words"}  # fmt: skip
        for name, what in nouns.items():
            if name in self.sets:
                refuse_shared(self.sets["forget"], self.sets[name], f"to be forgotten and {what}")
        if "holdout" in self.sets:
            refuse_shared(self.sets["retain"], self.sets["holdout"], "in --data-retain and held out")
        forget = self.a.data_forget
        checked = [(self.models["after"], path) for path in self.paths().values()]
        checked += [([*self.models["after"], "--quantize", form], forget) for form in self.a.formats]
        checked += [(self.models[self.other], forget)] if self.other else []
        for words, path in checked:
            words = ["eval", *words, "--data", str(path), *self.limit(), "--dry-run", *self.how()]
            self.children.run(words, say=self.passed_on)
        self.taught = audit_sets.taught(self.sets["forget"], self.a.share, self.a.seed)
        if self.a.share > 0 and not self.taught:
            self.note(f"{self.a.data_forget}: all of it is one sample, so no part of it can be taught again")
        lines = [f"{name}: {len(lines)} samples, {lines.tokens} tokens" for name, lines in self.sets.items()]
        self.say("; ".join(lines) + (f"; {len(self.taught)} of forget are taught again" if self.taught else ""))

    # ---- the plan

    def asked(self) -> list[str]:
        """The sets that are asked for, in the order of their lines."""
        return [name for name in self.sets if name != "related"]

    def trainings(self) -> Iterator[Training]:
        """Ascending in updates within each attack."""
        a = self.a
        for on in [*(["forget"] if self.taught else []), *(["related"] if "related" in self.sets else [])]:
            for rank in a.ranks:
                for rate in a.rates:
                    yield from (Training(on, rank, rate, updates) for updates in a.updates)

    def compared(self) -> list[str]:
        return ["after", *([self.other] if self.other else [])]

    def parts(self) -> list[Part]:
        """The patched model comes first: if the patch is another model's, this shows there."""
        return [
            *(Part(whose, everything=True) for whose in (*self.compared(), "before")),
            *(Part(whose, form=form) for form in self.a.formats for whose in self.compared()),
            *(Part(whose, training=t) for t in self.trainings() for whose in self.compared()),
        ]

    def batch(self, on: str) -> int:
        return min(BATCH, len(self.taught) if on == "forget" else len(self.sets[on]))

    def asked_tokens(self, part: Part) -> int:
        return sum(self.sets[name].tokens for name in (self.asked() if part.everything else ["forget"]))

    def update_tokens(self, t: Training) -> float:
        """Tokens of one update, on average."""
        lines = self.sets[t.on]
        n = len(self.taught) if t.on == "forget" else len(lines)
        return self.batch(t.on) * lines.tokens / len(lines) if n else 0

    def stages(self) -> dict[str, float]:
        """The work of each part, in passes of a token through the model: an update takes four of
        them."""
        found: dict[str, float] = {}
        for part in self.parts():
            if part.training:
                found[f"train {part.name}"] = 4 * part.training.updates * self.update_tokens(part.training)
            found[f"answers-{part.name}"] = self.asked_tokens(part)
        return found

    # ---- parts

    def train(self, part: Part, t: Training) -> Path:
        """The folder of the adapter."""
        name, out = f"train {part.name}", self.folder.data(f"adapter-{part.name}")
        if out.exists():
            self.progress.end(name, ran=False)
            return out
        self.progress.begin(name)
        which = self.taught if t.on == "forget" else None
        data = self.folder.data(f"adapter-{part.name}.jsonl")
        if not data.exists():  # a run that is resumed must find the same file
            write_private(data, self.sets[t.on].text(which))
        words = ["tune", *self.models[part.whose], "--data", str(data), "--out", str(out), "--resume",
                 "--target-modules", "all-linear", "--rank", str(t.rank), "--lora-alpha", str(t.rank),
                 "--learning-rate", repr(t.rate), "--lr-scheduler", "constant", "--steps", str(t.updates),
                 "--batch-size", str(self.batch(t.on)), *self.limit(), *self.how()]  # fmt: skip
        self.children.run(words, self.progress.report, say=self.passed_on)
        self.progress.end(name)
        return out

    def do(self, part: Part) -> list[dict[str, Any]]:
        """The answers of one model, line by line."""
        name = f"answers-{part.name}"
        words = [*self.models[part.whose], *self.limit()]
        if part.form:
            words += ["--quantize", part.form]
        if part.training and not self.folder.data(f"{name}.json").exists():
            words += ["--adapter", str(self.train(part, part.training))]
        elif part.training:
            self.progress.end(f"train {part.name}", ran=False)
        sets = self.asked() if part.everything else ["forget"]
        answers = self.ask(name, words, "".join(self.sets[one].text() for one in sets))["per_sample"]
        if part.training:
            self.remove_adapter(part)
        return answers

    def remove_adapter(self, part: Part) -> None:
        """It contains what was taught. Those of other parts may be half trained, and stay."""
        name, data = f"adapter-{part.name}", self.folder.data("")
        for path in (*data.glob(name), *data.glob(f"{name}.*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ---- what was found

    def by_set(self, answers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        found, at = {}, 0
        for name in self.asked():
            found[name] = measures(answers[at : at + len(self.sets[name])])
            at += len(self.sets[name])
        return found

    def curve(self, whose: str, attack: list[Training], answers: dict[Part, list[dict[str, Any]]]) -> dict[str, list[float]]:
        """Probabilities before the attack, and after each number of updates: of what is asked (rest),
        and of what was taught."""
        n = len(self.sets["forget"])
        taught = self.taught if attack[0].on == "forget" else []
        rest = [i for i in range(n) if i not in taught]
        points = [answers[Part(whose, everything=True)], *(answers[Part(whose, training=t)] for t in attack)]
        found = {"rest": [mean_probability(point, rest) for point in points]}
        return found | ({"taught": [mean_probability(point, taught) for point in points]} if taught else {})

    def retaught(self, answers: dict[Part, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        attacks: dict[str, list[Training]] = {}
        for t in self.trainings():
            attacks.setdefault(t.attack, []).append(t)
        return [
            {"name": name, "on": ts[0].on, "rank": ts[0].rank, "rate": ts[0].rate,
             "updates": [0, *(t.updates for t in ts)],
             **{whose: self.curve(whose, ts, answers) for whose in self.compared()}}
            for name, ts in attacks.items()
        ]  # fmt: skip

    def samples(self, answers: dict[Part, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The probability of each sample that is to be forgotten, under its line."""
        return [
            {"line": number, **{whose: answers[Part(whose, everything=True)][i]["probability"] for whose in self.models}}
            for i, number in enumerate(self.sets["forget"].numbers)
        ]

    def described(self) -> dict[str, Any]:
        a, patch = self.a, self.a.patch
        key = a.data_key.read_bytes() if a.data_key else None
        sets = {name: {"samples": len(lines), "tokens": lines.tokens} for name, lines in self.sets.items()}
        for name, lines in self.sets.items():
            if key is not None:
                sets[name]["hmac_sha256"] = hmac.new(key, lines.path.read_bytes(), hashlib.sha256).hexdigest()
        with_ = {"model": self.other} | (
            {"path": str(a.gold or a.base)} if self.other else {"probability": a.target})  # fmt: skip
        return {
            "perta_audit": VERSION, "model": str(a.model),
            "patch": {"path": str(patch), "manifest_sha256": digest(patch / "manifest.json")},
            "compared_with": with_, "options": self.options(), "sets": sets,
            "taught_lines": [self.sets["forget"].numbers[i] for i in self.taught],
        }  # fmt: skip

    def found(self, answers: dict[Part, list[dict[str, Any]]]) -> dict[str, Any]:
        """audit.json."""
        found = self.described() | {
            "as_it_is": {whose: self.by_set(answers[Part(whose, everything=True)]) for whose in self.models},
            "rounded": {form: {whose: measures(answers[Part(whose, form=form)]) for whose in self.compared()}
                        for form in self.a.formats},
            "retaught": self.retaught(answers), "samples": self.samples(answers), "notes": self.notes,
        }  # fmt: skip
        found["checks"] = audit_verdict.Verdict(found).all()
        found["verdict"] = audit_verdict.verdict_of(found["checks"])
        return found | audit_verdict.sentences(found)

    # ---- the whole

    def check_key(self) -> None:
        if self.a.data_key:
            digest(self.a.data_key)
            if self.a.data_key.stat().st_size < 16:
                raise Problem(f"{self.a.data_key}: a key of at least 16 bytes is needed")

    def run(self) -> int:
        a = self.a
        inputs = [("the model", path) for path in (a.model, a.gold, a.base) if path]
        self.folder.check(a.force, a.resume, [*inputs, ("the patch", a.patch)])
        self.check_key()
        self.began = self.identity()
        self.read()
        if a.dry_run:
            from perta.audit_plan import plan

            return plan(self)
        self.folder.begin(self.began, a.resume)
        return self.resumable(self.in_folder, "answers-after.json")

    def in_folder(self) -> int:
        a = self.a
        for name, lines in self.sets.items():
            self.folder.keep(f"{name}.jsonl", lines.text())
        if not (a.quiet or self.folder.resumed):
            from perta.audit_plan import said

            self.say(said(self))
        self.progress = Progress("audit", "none" if a.quiet else a.progress, self.stages())
        answers = {}
        for part in self.parts():
            answers[part] = self.do(part)
            if part.whose == "before":
                self.refuse_unknown(answers)
        found = self.found(answers)
        self.check_unchanged()
        return self.finish(found)

    def refuse_unknown(self, answers: dict[Part, list[dict[str, Any]]]) -> None:
        """Problem if the model before the patch passes for one that never knew: then everything
        would pass."""
        forget = range(len(self.sets["forget"]))
        known = {part.whose: mean_probability(found, forget) for part, found in answers.items()}
        level = known[self.other] if self.other else self.a.target
        if known["before"] > audit_verdict.bound_of(audit_verdict.KNOWN, level):
            return
        self.folder.discard()
        other = f"{self.a.gold or self.a.base} gives" if self.other else "--target is"
        raise Problem(f"{self.a.data_forget}: {self.a.model} gives its answers a probability of {known['before']:.3f} before "
                      f"the patch, and {other} {level:.3f}: nothing can be seen to come back")  # fmt: skip

    def finish(self, found: dict[str, Any]) -> int:
        a, partial = self.a, self.folder.partial
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        write_public(partial / "audit.json", text)
        words = ["report", str(a.patch), "--audit", str(partial / "audit.json"), "--html", str(partial / "audit.html")]
        self.children.run([*words, "--force"], say=self.passed_on)
        fsync(partial / "audit.html")
        if a.statement:
            write_public(partial / "audit.intoto.json", statement(found, (partial / "audit.json").read_bytes()))
        self.folder.publish()
        self.progress.clear()
        if a.json:
            print(json.dumps(found, indent=1))
        self.say("\n".join(audit_verdict.rows(found["checks"])))
        self.say(f"What was to be forgotten {found['verdict']}." + "".join(f"\n  {line}" for line in found["came_back"]))
        self.say("Not tried:" + "".join(f"\n  {line}" for line in found["not_tried"]))
        self.say(f"{a.out}: audit.html shows it; data/ is private")
        return CHECK if found["verdict"] == audit_verdict.CAME_BACK else 0


def audit(words: list[str]) -> int:
    return Audit(parse(words), words).run()


def main() -> None:
    run("audit", audit)


if __name__ == "__main__":
    main()
