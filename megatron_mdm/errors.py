"""The errors that users meet: one sentence with the field or file, value, rule and remedy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


class MdmError(Exception):
    """Base of every error that this project raises on purpose.

    Attributes:
        rank: The rank that alone met the error, None where every rank meets it alike.
    """

    rank: int | None = None


class ConfigError(MdmError):
    """A configuration that cannot be run: an unknown key, a bad value, sizes that do not divide."""


class DataError(MdmError):
    """A corpus, tokenizer or token shard that is missing, damaged or does not fit the run."""


class CheckpointError(MdmError):
    """A checkpoint that is missing, incomplete or does not fit the run."""


class ConversionError(MdmError):
    """A model that cannot be converted or loaded in the other format."""


def run_entry_point(main: Callable[[], int | None]) -> int:
    """Runs a command-line entry point and turns expected errors into one line and exit status 2.

    Under a launcher the first process speaks for what every rank finds alike.

    Args:
        main: The entry point. Returns its exit status, or None for success.

    Returns:
        The exit status of the process: 2 for an expected error, 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except MdmError as error:
        if error.rank is not None:
            print(f"error: rank {error.rank}: {error}", file=sys.stderr)
        else:
            if os.environ.get("RANK", "0") != "0":
                # The launcher ends every rank when one exits: let the first speak for all.
                time.sleep(10)
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return 130
