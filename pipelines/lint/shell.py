"""Shell commands in files: as much of them as tells which programs run, with what words and variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

_OPERATORS = ";&|"
_BEFORE = ("env", "exec", "nohup", "time")
"""Programs that run the command behind them."""
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each command between `;`, `&` and `|`; those of a script behind `bash -c` in its place.

    Raises:
        ValueError: a quote that is not closed.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word.strip(_OPERATORS):
            words.append(word)
        elif words:
            script = _script(words)
            yield from [words] if script is None else simple_commands(script)
            words = []


def _script(words: Sequence[str]) -> str | None:
    if program(words) not in ("bash", "sh"):
        return None
    flags = [at for at, word in enumerate(words[:-1]) if re.fullmatch(r"-[a-z]*c", word)]
    return words[flags[0] + 1] if flags else None


def program(words: Sequence[str]) -> str:
    """The name of the program that a command runs."""
    names = [PurePosixPath(word).name for word in words if not _ASSIGNMENT.match(word)]
    return next((name for name in names if name not in _BEFORE), "")


def assignments(words: Sequence[str]) -> dict[str, str]:
    """The variables that words such as `NAME=value` set."""
    return {match[1]: match[2] for word in words if (match := _ASSIGNMENT.match(word))}


def options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Long options in their order, each with its value: `--name=value`, `--name value` or `--name`."""
    found = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            found.append((name, value if separator or following.startswith("--") else following))
    return found
