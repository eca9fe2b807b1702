"""What the verbs in Python share: errors, exit statuses, and how they begin and end."""

import io
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

CHECK, USAGE, INPUT, SYSTEM, INTERRUPTED = 1, 2, 3, 4, 130  # exit statuses, as of the command
FOR_TEXT = "'jinja2>=3.1.6' tokenizers"
INSTALLS = {"scipy": "scipy"}  # packages that few verbs need; for all others: FOR_TEXT
IGNORED = -100  # label of a position that is not learned


class Problem(Exception):
    """Ends the verb with this message and exit status."""

    def __init__(self, message: str, status: int = INPUT) -> None:
        super().__init__(message)
        self.status = status


def problem_of(error: Problem | OSError | KeyboardInterrupt) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Problem("interrupted", INTERRUPTED)
    name = f"{error.filename}: " if error.filename else ""
    return Problem(f"{name}{error.strerror or error}", SYSTEM)


def plain(text: str) -> str:
    """Without control characters: names from files must not command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say(verb: str, message: str) -> None:
    print(plain(f"perta {verb}: {message}"), file=sys.stderr, flush=True)


def need(name: str) -> ModuleType:
    """Import a package that this verb needs and that does not come with Python."""
    try:
        module = __import__(name)
    except ImportError:
        raise Problem(
            f"the Python package {name} is missing; to install it:\n"
            f"    {sys.executable} -m pip install {INSTALLS.get(name, FOR_TEXT)}",
            USAGE,
        ) from None
    version = [int(part) for part in getattr(module, "__version__", "9").split(".")[:3] if part.isdigit()]
    if name == "jinja2" and version < [3, 1, 6]:  # older ones let templates out of their sandbox
        raise Problem(
            f"jinja2 {module.__version__} is too old for templates from models; to install a newer one:\n"
            f"    {sys.executable} -m pip install 'jinja2>=3.1.6'",
            USAGE,
        )
    return module


def refuse_empty_words(verb: str, words: list[str]) -> None:
    """An empty argument usually comes from an unset shell variable."""
    for before, word in zip(["", *words], words, strict=False):
        if before == "--":
            return
        if not word or (word.startswith("--") and word.endswith("=")):
            name = word[:-1] or (before if before.startswith("--") else "an argument")
            raise Problem(f"{name}: empty, but a name or a value is needed; is a variable of the "
                          "shell unset?", USAGE)  # fmt: skip


def run(verb: str, main: Callable[[list[str]], int]) -> None:
    """Run main(arguments) and exit with the status that it returns, or that an error has."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack a letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        refuse_empty_words(verb, sys.argv[1:])
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except (Problem, OSError, KeyboardInterrupt) as error:
        problem = problem_of(error)
        say(verb, str(problem))
        status = problem.status
    except Exception:  # a mistake in this program must not look like a check that failed
        traceback.print_exc()
        status = SYSTEM
    sys.stderr.flush()
    try:
        sys.stdout.close()
    except OSError:
        status = status or SYSTEM
    os._exit(status)  # a stream that failed would be flushed, and fail, again
