"""The output folder of `perta forget`: it appears complete or not at all, can be resumed, and is
replaced only if it holds nothing else. Spec: docs/forget.md, "The folder"."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from perta.command import SYSTEM, USAGE, Problem

RUN = "data/run.json"  # what the run depends on; its presence says whose folder it is
FILES = ("report.html", "summary.json", "summary.md")
DATA = ("after.json", "base.json", "before.json", "forget.jsonl", "held-out.jsonl", "retain.jsonl", "run.json")


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
    with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)


def write_public(path: Path, text: str) -> None:
    """A file that others may read: no text of a sample is in it."""
    write_private(path, text)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def is_run(path: Path) -> bool:
    try:
        return "perta_forget" in json.loads((path / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def strangers(folder: Path, leftover: bool) -> list[str]:
    """What is in a folder that perta forget did not put there. A leftover may also hold what an
    interrupted `perta unlearn` leaves beside its patch."""

    def known(path: Path) -> bool:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.is_mount():
            return False
        if path.is_dir():
            return name in ("data", "patch") or (leftover and name.startswith("patch.") and "perta-" in name)
        if name.startswith("data/"):
            return name[5:] in DATA or (leftover and name[5:].removesuffix(".new") in DATA)
        if name.startswith("patch/"):
            return name == "patch/manifest.json" or name.endswith(".perta")
        return name in FILES or (leftover and (name.removesuffix(".new") in FILES or name.startswith(("patch.", "report."))))

    found = []
    for path in sorted(folder.iterdir()):
        found += [path] if not known(path) else []
        if known(path) and path.is_dir() and path.name in ("data", "patch"):
            found += [inner for inner in sorted(path.iterdir()) if not known(inner) or inner.is_dir()]
    return [path.relative_to(folder).as_posix() for path in found]


def check_replaceable(folder: Path, leftover: bool) -> None:
    """Problem unless --force may remove the folder."""
    if folder.is_symlink() or not folder.is_dir():
        raise Problem(f"{folder}: exists, and is no folder", USAGE)
    other = strangers(folder, leftover)
    if other:
        raise Problem(f"{folder}: not replaced, because it holds more than perta forget wrote: "
                      f"{', '.join(other[:5])}", USAGE)  # fmt: skip
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    just_begun = leftover and held <= {"data", f"{RUN}.new"}  # before it could say whose it is
    if held and not just_begun and not is_run(folder):
        raise Problem(f"{folder}: not replaced, because perta forget did not write it: {RUN} is missing",
                      USAGE)  # fmt: skip


class Folder:
    """DIR, and DIR.perta-partial, in which it is written."""

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.parent / f"{self.out.name}.perta-partial"
        self.resumed = False
        self.lock: int | None = None

    def check(self, force: bool, resume: bool, models: list[Path]) -> None:
        """Before any work: may the folder be written? Not within a model."""
        if not self.out.name:
            raise Problem(f"{self.out}: not a name for a folder", USAGE)
        if not self.out.parent.is_dir():
            raise Problem(f"{self.out.parent}: no such folder", USAGE)
        for model in models:
            if self.out.resolve().is_relative_to(model.resolve()):
                raise Problem(f"{self.out}: would overwrite, or lie within, the model {model}", USAGE)
        if os.path.lexists(self.out):
            if not force:
                raise Problem(f"{self.out}: exists; --force replaces it", USAGE)
            check_replaceable(self.out, False)
        if os.path.lexists(self.partial):
            if not (force or resume):
                raise Problem(f"{self.partial}: an interrupted run left it; --resume continues that run, "
                              "--force starts over", USAGE)  # fmt: skip
            check_replaceable(self.partial, True)

    def begin(self, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
        """Create the partial folder, or take up the one that is there. Returns the identity, with
        which the run began."""
        if self.partial.exists() and not (resume and is_run(self.partial)):
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
        self.release()

    def publish(self) -> None:
        """Give the folder its name. What was there is moved out of the way first, and removed."""
        fsync(self.partial)
        old = self.out.with_name(f"{self.out.name}.perta-replaced")
        if self.out.exists():
            check_replaceable(self.out, False)
            if old.exists():  # of a run that was killed right here
                check_replaceable(old, False)
                shutil.rmtree(old)
            self.out.rename(old)
        self.partial.rename(self.out)
        fsync(self.out.parent)
        if old.exists():
            check_replaceable(old, False)
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
