"""Outputs: the standard output while somebody reads it, and files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_mdm.core.errors import ConfigError

GENERATED_STYLE = "cyan"


class StandardOutput:
    """Writes lines to the standard output for as long as somebody reads them."""

    def __init__(self) -> None:
        self.is_open = True

    def write(self, line: str) -> None:
        """Writes a line; where the reader has gone, as `head` does, nothing happens any more.

        Args:
            line: Text, without a line feed at its end.
        """
        if not self.is_open:
            return
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self.is_open = False
            # Or Python would flush once more at its end, and fail.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())


def print_generated(output: StandardOutput, text: str, start: int, stop: int) -> None:
    """Prints a text; on a terminal with colours, what was generated is coloured.

    Args:
        output: Where: the standard output.
        text: All of it.
        start: Characters before the generated part.
        stop: Where that part ends.
    """
    if not sys.stdout.isatty():
        output.write(text)
        return
    # NO_COLOR and TERM are its affair; other characters than those of the text it does not add.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    shown = Text(text)
    shown.stylize(GENERATED_STYLE, start, stop)
    console.print(shown)


def check_writable(path: Path, option: str) -> None:
    """Checks before the work that its result can be written.

    Args:
        path: A file to create or replace.
        option: The option that names it.

    Raises:
        ConfigError: Its folder is not there or cannot be written to, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{option}={path}: the folder {path.parent} does not exist; make it.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}={path} cannot be written: give a file in a folder of yours.")
