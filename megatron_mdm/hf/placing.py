"""Folders that appear whole or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mdm.core.errors import ConversionError, explain_write_errors


class Placing:
    """A folder on its way to its place.

    Attributes:
        partial: The hidden folder to write into.
        reused: After the end: the place held the same content already.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.reused = False


@contextmanager
def open_whole_folder(output: Path, *, overwrite: bool) -> Iterator[Placing]:
    """Opens a folder that appears under its name when the block ends well, or not at all.

    What killed processes left beside it is removed first.

    Args:
        output: The place. What lies there stays if it has the same content.
        overwrite: Replace a model folder that differs.

    Yields:
        Where to write.

    Raises:
        ConversionError: The place is taken, or cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        with explain_write_errors(output, ConversionError):
            output.parent.mkdir(parents=True, exist_ok=True)
            _clean_leftovers(output)
            partial.mkdir()
            placing = Placing(partial)
            yield placing
            placing.reused = _put_in_place(partial, output, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clean_leftovers(output: Path) -> None:
    for path in output.parent.glob(f".{output.name}.*-*"):
        kind, _, process = path.name.removeprefix(f".{output.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not process.isdigit() or _is_other(int(process)):
            continue
        if kind == "replaced" and not output.exists():
            # A process was killed between two renames: put the old folder back.
            path.rename(output)
        else:
            shutil.rmtree(path)


def _is_other(process: int) -> bool:
    """Is it another process that lives?"""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(partial: Path, output: Path, overwrite: bool) -> bool:
    if not output.exists():
        partial.rename(output)
        return False
    if _has_same_content(partial, output):
        return True
    if not overwrite:
        raise ConversionError(
            f"{output} exists and differs from this export: pass --overwrite to replace it or "
            "choose another folder."
        )
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output} is no model folder (it has no config.json) and is not replaced: choose "
            "another folder."
        )
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced)
    return False


def _has_same_content(left: Path, right: Path) -> bool:
    if not right.is_dir():
        return False
    names = {path.name for path in left.iterdir()}
    if names != {path.name for path in right.iterdir()} - {"__pycache__"}:
        return False
    return not any(filecmp.cmpfiles(left, right, list(names), shallow=False)[1:])
