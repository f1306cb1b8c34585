"""The project's own commands, to run and to print."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_NAME = "mdm"
# What starts an `mdm` command, whether or not the package is installed.
PROGRAM = _PACKAGE / "__main__.py"


def own_command(*words: object) -> list[str]:
    """An `mdm` command as a list of words for a process.

    Args:
        *words: Subcommand and arguments.
    """
    return [sys.executable, str(PROGRAM), *map(str, words)]


def format_command(*words: object) -> str:
    """An `mdm` command as a user can enter it in this folder, in a fresh shell.

    Args:
        *words: Subcommand and arguments.
    """
    return f"{_name_program()} {shlex.join(map(str, words))}"


def format_next_steps(steps: Sequence[tuple[str, Sequence[object]]]) -> list[str]:
    """What a user may do next, a line each.

    Args:
        steps: What it is for, and the words of the command.
    """
    width = max((len(purpose) for purpose, _ in steps), default=0)
    return [f"next: {purpose:{width}}  {format_command(*words)}" for purpose, words in steps]


def _name_program() -> str:
    beside = Path(sys.executable).parent / _NAME
    on_path = shutil.which(_NAME)
    if on_path is not None and (not beside.is_file() or os.path.samefile(on_path, beside)):
        return _NAME
    if beside.is_file():
        return shlex.quote(_shorten(beside))
    return f"{shlex.quote(_shorten(Path(sys.executable)))} -m megatron_mdm"


def _shorten(path: Path) -> str:
    # Not resolved: an environment's python is a link to the one that it was made with.
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
