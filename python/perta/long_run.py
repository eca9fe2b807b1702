"""What `perta forget` and `perta audit` share: options, messages, asking a model, and what is said
when a run is interrupted."""

import argparse
import json
import shlex
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from perta.children import Children, Progress, print_line
from perta.command import INPUT, USAGE, Problem, plain, problem_of, say
from perta.run_folder import Folder, Layout, write_private


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def add_run_options(parser: argparse.ArgumentParser, verb: str, result: str) -> None:
    """The options of every such verb. result: the file that --json prints."""
    parser.add_argument("--compute", metavar="auto|f32|bf16", help="matrix products, as for perta estimate",
                        choices=["auto", "f32", "bf16"])  # fmt: skip
    for name in ("--memory", "--threads", "--io"):
        parser.add_argument(name, metavar=name[2:].upper(), help="as for every verb of perta")
    for name, text in (
        ("--force", f"replace what an earlier perta {verb} wrote to DIR"),
        ("--resume", "continue an interrupted run that had the same options"),
        ("--dry-run", "say what it will take, from a short measurement; write nothing"),
        ("--json", f"print {result}"),
    ):
        parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("--progress", metavar="HOW", help="auto, bar, plain, json or none", default="auto",
                        choices=["auto", "bar", "plain", "json", "none"])  # fmt: skip


def json_lines(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


class LongRun:
    """One run. Each part leaves a file, and is not done again where --resume finds that file."""

    layout: ClassVar[Layout]

    def __init__(self, arguments: argparse.Namespace, words: list[str]) -> None:
        self.a, self.words = arguments, words
        self.verb = self.layout.verb
        self.notes: list[str] = []
        self.said: set[str] = set()  # by children, who all say the same about the model
        self.folder = Folder(Path(arguments.out), self.layout)
        self.children = Children()
        self.progress = Progress(self.verb, "none", {})

    # ---- messages

    def say(self, text: str) -> None:
        self.progress.clear()
        print(plain(text), flush=True) if not (self.a.json or self.a.quiet) else None

    def note(self, text: str) -> None:
        self.progress.clear()
        self.notes.append(text)
        if not self.a.quiet:
            say(self.verb, f"note: {text}")

    def passed_on(self, line: str) -> None:
        self.progress.clear()
        text = line.partition(": ")[2]
        if text not in self.said and not (self.a.quiet and text.startswith("note: ")):
            print_line(line)
        self.said.add(text)

    def how(self) -> list[str]:
        """The options that are passed on to every child."""
        named = {name: getattr(self.a, name) for name in ("memory", "threads", "io", "compute")}
        return [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]

    # ---- parts

    def ask(self, name: str, words: list[str], text: str) -> dict[str, Any]:
        """The numbers of `perta eval --per-sample`, with these words that say of which model, of the
        lines of text. They are kept in data/NAME.json."""
        path = self.folder.data(f"{name}.json")
        if path.exists():
            self.progress.end(name, ran=False)
            return json.loads(path.read_text(encoding="utf-8"))
        self.progress.begin(name)
        with tempfile.TemporaryFile("w+", dir=self.folder.data("")) as data:
            data.write(text)
            data.seek(0)
            words = ["eval", *words, "--data", "/dev/stdin", "--per-sample", *self.how()]
            _, result = self.children.run(words, self.progress.report, stdin=data, say=self.passed_on)
        write_private(path, json.dumps(result))
        self.progress.end(name)
        return result

    def resumable(self, work: Callable[[], int], first: str) -> int:
        """Do the work in the folder, which was begun. first: the file of its first part. What goes
        wrong before that is there leaves nothing; else it is said how to go on."""
        try:
            return work()
        except (Problem, OSError, KeyboardInterrupt) as error:
            self.progress.clear()
            problem = problem_of(error)
            begun = self.folder.data(first).exists() or self.folder.resumed
            if problem.status in (USAGE, INPUT) and not begun:
                self.folder.discard()  # to resume would meet the same again
                raise problem from None
            again = self.words if "--resume" in self.words else [*self.words, "--resume"]
            say(self.verb, str(problem))
            raise Problem(f"to resume: perta {self.verb} {shlex.join(again)}", problem.status) from None
