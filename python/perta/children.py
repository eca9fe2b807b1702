"""Runs the command as a child: its progress becomes part of one progress, its messages are passed
on, and signals reach it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from perta.command import CHECK, INPUT, INTERRUPTED, SYSTEM, Problem, plain


class Interrupted(KeyboardInterrupt):
    """Like Ctrl-C elsewhere, no error: what handles errors does not handle it."""

    def __init__(self) -> None:
        super().__init__("interrupted")


def command() -> str:
    """The command that ran this verb, or the one on PATH."""
    perta = os.environ.get("PERTA") or shutil.which("perta")
    if not perta or not os.access(perta, os.X_OK):
        raise Problem("the command perta is neither in PERTA nor on PATH; run `perta VERB'", SYSTEM)
    return os.path.abspath(perta)


class Children:
    """One child at a time, in a process group of its own: Ctrl-C reaches it once, through here."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.starting = False  # a child that will be in self.child
        self.stopped = 0
        self.perta = command()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        self.stopped = number
        if self.child:
            self.child.send_signal(number)
        elif not self.starting:
            raise Interrupted

    def run(
        self,
        words: list[str],
        on_progress: Callable[[float, float], None] | None = None,
        stdin: IO | int = subprocess.DEVNULL,
        may_be: tuple[int, ...] = (0,),
        say: Callable[[str], None] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Run perta with these words and --json. Returns its status, one of may_be, and its result.
        on_progress(done, total) is called as the child reports it, say(line) for each of its
        messages; Problem if it ends otherwise."""
        words = [self.perta, *words, "--json", *(["--progress", "json"] if on_progress else [])]
        with tempfile.TemporaryFile() as out:
            self.starting = True
            try:
                child = subprocess.Popen(words, stdin=stdin, stdout=out, stderr=subprocess.PIPE, text=True,
                                         errors="replace", process_group=0)  # fmt: skip
                self.child = child
            finally:
                self.starting = False
            if self.stopped:  # a signal came before there was a child to get it
                child.send_signal(self.stopped)
            said = [line for line in map(str.rstrip, child.stderr) if not progress(line, on_progress)]
            status = child.wait()
            self.child = None
            if status == INTERRUPTED or self.stopped:
                raise Interrupted
            for line in said:
                (say or print_line)(line)
            out.seek(0)
            text = out.read()
        if status < 0:
            raise Problem(f"perta {words[1]} was ended by signal {-status}", SYSTEM)
        if status not in may_be:
            raise Problem(f"perta {words[1]} failed, as it says above", INPUT if status == CHECK else status)
        return status, json.loads(text)


def print_line(line: str) -> None:
    own = ("perta unlearn: to resume:", "perta unlearn: not enough is forgotten:", "perta tune: to resume:")
    if not line.startswith(own):  # perta forget and perta audit say it themselves
        print(plain(line), file=sys.stderr, flush=True)


def progress(line: str, on_progress: Callable[[float, float], None] | None) -> bool:
    """Is it a line about progress?"""
    if not line.startswith('{"done_bytes"'):
        return False
    try:
        value = json.loads(line)
    except ValueError:
        return False
    if on_progress:
        on_progress(value["done_bytes"], value["total_bytes"])
    return True


class Progress:
    """One line for the whole: stages of given work."""

    PAUSE = {"bar": 1 / 6, "plain": 10.0, "json": 1 / 6}  # noqa: RUF012
    WIDTH = 30

    def __init__(self, verb: str, style: str, stages: dict[str, float]) -> None:
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "plain"
        self.verb, self.style, self.stages = verb, style, stages
        self.total = sum(stages.values()) or 1.0
        self.done, self.stage = 0.0, ""
        self.started = self.drawn = time.monotonic()
        self.drew, self.skipped = False, 0.0

    def begin(self, stage: str) -> None:
        self.stage = stage

    def end(self, stage: str, ran: bool = True) -> None:
        """A stage that is finished; one that an earlier run finished took no time in this one."""
        self.done += self.stages.get(stage, 0.0)
        self.skipped += 0.0 if ran else self.stages.get(stage, 0.0)
        self.stage = ""

    def report(self, done: float, total: float) -> None:
        """How much of this stage is done."""
        within = min(0.99, done / total) if total else 0.0
        self.draw((self.done + within * self.stages.get(self.stage, 0.0)) / self.total)

    def draw(self, share: float) -> None:
        now = time.monotonic()
        if self.style == "none" or now - self.drawn < self.PAUSE[self.style]:
            return
        self.drawn = now
        elapsed, skipped = now - self.started, self.skipped / self.total
        left = elapsed * (1 - share) / (share - skipped) if share - skipped > 0.002 else None
        if self.style == "json":
            line = {"stage": self.stage, "share": round(share, 4), "seconds": round(elapsed, 3)}
            print(json.dumps(line | {"seconds_left": None if left is None else round(left, 1)}),
                  file=sys.stderr, flush=True)  # fmt: skip
            return
        eta = "" if left is None else f", {duration(left)} left"
        if self.style == "plain":
            print(f"{self.verb}: {self.stage}: {100 * share:.0f} %{eta}", file=sys.stderr, flush=True)
            return
        full = int(self.WIDTH * share)
        bar = "#" * full + "." * (self.WIDTH - full)
        print(f"\r{self.verb} [{bar}] {100 * share:.0f} %, {self.stage}{eta} \033[K", end="", file=sys.stderr, flush=True)
        self.drew = True

    def clear(self) -> None:
        if self.drew:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.drew = False


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
