"""The output folder of `perta forget` and `perta audit`: it appears complete or not at all, can be
resumed, and is replaced only if it holds nothing else. Spec: docs/forget.md, "The folder"."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta.command import SYSTEM, USAGE, Problem

RUN = "data/run.json"  # what the run depends on; its presence says whose folder it is


@dataclass(frozen=True)
class Layout:
    """What a verb puts into its folder, by path: is_file(name, leftover), is_folder(name, leftover).
    Leftover: of an interrupted run, which may hold more."""

    verb: str
    is_file: Callable[[str, bool], bool]
    is_folder: Callable[[str, bool], bool]

    def is_run(self, path: Path) -> bool:
        """Did the verb write this folder?"""
        try:
            return f"perta_{self.verb}" in json.loads((path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False

    def strangers(self, folder: Path, leftover: bool) -> list[str]:
        """What is in a folder that the verb did not put there."""
        found, unread = [], [folder]
        while unread:
            for path in sorted(unread.pop().iterdir()):
                name = path.relative_to(folder).as_posix()
                if path.is_symlink() or path.is_mount():
                    found.append(name)
                elif path.is_dir() and self.is_folder(name, leftover):
                    unread += [] if leftover and "perta-" in name else [path]  # a child's own
                elif path.is_dir() or not self.is_file(name, leftover):
                    found.append(name)
        return sorted(found)

    def check_replaceable(self, folder: Path, leftover: bool) -> None:
        """Problem unless --force may remove the folder."""
        if folder.is_symlink() or not folder.is_dir():
            raise Problem(f"{folder}: exists, and is no folder", USAGE)
        other = self.strangers(folder, leftover)
        if other:
            raise Problem(f"{folder}: not replaced, because it holds more than perta {self.verb} wrote: "
                          f"{', '.join(other[:5])}", USAGE)  # fmt: skip
        held = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        just_begun = leftover and held <= {"data", f"{RUN}.new"}  # before it could say whose it is
        if held and not just_begun and not self.is_run(folder):
            raise Problem(f"{folder}: not replaced, because perta {self.verb} did not write it: {RUN} is missing",
                          USAGE)  # fmt: skip


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_private(path: Path, text: str) -> None:
    """Whole or not at all; for its owner only. What UTF-8 does not have, such as half a character in
    a name, is written as JSON escapes it."""
    partial = path.with_name(f"{path.name}.new")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # such as a full disk, which has no name of its own
        raise OSError(error.errno, error.strerror, str(partial)) from None
    partial.replace(path)
    fsync(path.parent)


def write_public(path: Path, text: str) -> None:
    """A file that others may read: no text of a sample is in it."""
    write_private(path, text)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


class Folder:
    """DIR, and DIR.perta-partial, in which it is written."""

    def __init__(self, out: Path, layout: Layout) -> None:
        self.layout = layout
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.parent / f"{self.out.name}.perta-partial"
        self.resumed = False
        self.lock: int | None = None

    def check(self, force: bool, resume: bool, inputs: list[tuple[str, Path]]) -> None:
        """Before any work: may the folder be written? Not within an input, such as ("the model", its
        path)."""
        if not self.out.name:
            raise Problem(f"{self.out}: not a name for a folder", USAGE)
        if not self.out.parent.is_dir():
            raise Problem(f"{self.out.parent}: no such folder", USAGE)
        for what, path in inputs:
            if self.out.resolve().is_relative_to(path.resolve()):
                raise Problem(f"{self.out}: would overwrite, or lie within, {what} {path}", USAGE)
        if os.path.lexists(self.out):
            if not force:
                raise Problem(f"{self.out}: exists; --force replaces it", USAGE)
            self.layout.check_replaceable(self.out, False)
        if os.path.lexists(self.partial):
            if not (force or resume):
                raise Problem(f"{self.partial}: an interrupted run left it; --resume continues that run, "
                              "--force starts over", USAGE)  # fmt: skip
            self.layout.check_replaceable(self.partial, True)

    def begin(self, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
        """Create the partial folder, or take up the one that is there. Returns the identity, with
        which the run began."""
        if self.partial.exists() and not (resume and self.layout.is_run(self.partial)):
            self.take_lock()
            shutil.rmtree(self.partial)
            self.release()
        if self.partial.exists():
            self.take_lock()
            began = json.loads((self.partial / RUN).read_text(encoding="utf-8"))
            differ = [key for key in identity if key != "date" and began.get(key) != identity[key]]
            if differ:
                raise Problem(f"--resume cannot continue: {', '.join(differ)} changed since the run "
                              "began; --force starts over", USAGE)  # fmt: skip
            self.resumed = True
            return began
        self.partial.mkdir()
        (self.partial / "data").mkdir(mode=0o700)
        write_private(self.partial / RUN, json.dumps(identity, indent=1))
        self.take_lock()
        return identity

    def take_lock(self) -> None:
        """One run at a time."""
        path = self.partial / RUN
        if not path.exists():
            return
        self.lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{self.partial}: another run is writing it", SYSTEM) from None

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def data(self, name: str) -> Path:
        return self.partial / "data" / name

    def keep(self, name: str, text: str) -> Path:
        """Write a data file, unless it is there; it must then be the same."""
        path = self.data(name)
        if not path.exists():
            write_private(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise Problem(f"{path}: not what the interrupted run wrote; --force starts over", USAGE)
        return path

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.resumed = False
        self.release()

    def publish(self) -> None:
        """Give the folder its name. What was there is moved out of the way first, and removed."""
        fsync(self.partial)
        old = self.out.with_name(f"{self.out.name}.perta-replaced")
        if self.out.exists():
            self.layout.check_replaceable(self.out, False)
            if old.exists():  # of a run that was killed right here
                self.layout.check_replaceable(old, False)
                shutil.rmtree(old)
            self.out.rename(old)
        self.partial.rename(self.out)
        fsync(self.out.parent)
        if old.exists():
            self.layout.check_replaceable(old, False)
            shutil.rmtree(old)
        self.release()


def digest(path: Path) -> str:
    """For telling whether a file changed; kept among the private data. It is read again later."""
    if not path.exists():
        raise Problem(f"{path}: no such file")
    if not path.is_file():
        raise Problem(f"{path}: not a regular file; write the text to a file first")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(model: Path) -> list[list[Any]]:
    """What tells whether a model changed."""
    if not model.is_dir():
        raise Problem(f"{model}: no such folder")
    paths = sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".json"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
