"""Warnings of a run that goes on, each of which says what is lost."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


def warn(message: str) -> None:
    """Prints a warning. If even that fails, the run goes on.

    Args:
        message: A sentence.
    """
    _say(f"warning: {message}")


def note(message: str) -> None:
    """Prints what a user may want to know. If even that fails, the work goes on.

    Args:
        message: A sentence.
    """
    _say(f"note: {message}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - for the user


@contextlib.contextmanager
def warn_on_write_error(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file that a run can do without into a warning.

    Args:
        path: What is written in the block.

    Yields:
        Nothing.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        warn(f"{path} could not be written ({reason}): the run goes on without it.")
