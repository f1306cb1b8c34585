"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mdm.core.errors import DataError


def read_path(text: str | Path) -> Path:
    """Reads a path as a user types it, where the shell leaves `~` as it is.

    Args:
        text: The path.

    Returns:
        The path with the home folder for `~`.

    Raises:
        DataError: There is no such home, or the name is not UTF-8 and no JSON file could hold it.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{text} names a home folder that is not known: write it out.") from error
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the name {os.fsencode(path)!r} is not UTF-8, and manifests are: rename it."
        ) from error
    return path


def name_temporary(path: Path) -> Path:
    """Names the file that is written before it is renamed to its final name.

    Args:
        path: The final name.

    Returns:
        A hidden name in the same folder, of this process only.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def open_whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name whole, when the block ends well, or not at all.

    Args:
        path: The file to create or replace. Its folder has to exist.

    Yields:
        A binary stream to a temporary sibling of the file.
    """
    temporary = name_temporary(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turns the system's errors in a block that writes, a full disk above all, into a DataError.

    Args:
        path: What is written, for the message.

    Yields:
        Nothing.

    Raises:
        DataError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} could not be written ({error.strerror or error}) and nothing half written "
            "was kept: free space, check permissions, or choose another place."
        ) from error


def read_json(path: Path, remedy: str) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        remedy: What to do if it is damaged, for the message.

    Returns:
        Its content.

    Raises:
        DataError: The file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): {remedy}") from error


def check_free_space(folder: Path, needed_bytes: int, needs: str, remedy: str) -> None:
    """Checks that a folder has room for what is to be written.

    Args:
        folder: The folder, which exists.
        needed_bytes: How many bytes will be written.
        needs: What needs them, for the message, as in "the copy needs".
        remedy: What to do instead of freeing space.

    Raises:
        DataError: There is less.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DataError(
            f"{folder} has {free_bytes} bytes free and {needs} {needed_bytes} bytes: free space, "
            f"or {remedy}."
        )


def remove_leftovers(path: Path) -> None:
    """Removes what writers of a file left beside it when they were killed.

    Only for the one process that may write the file.

    Args:
        path: The file.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is never seen half-written.

    Args:
        path: The file to create or replace. Its folder has to exist.
        text: Content, written as UTF-8.
    """
    with open_whole_file(path) as stream:
        stream.write(text.encode())


def write_json_whole(path: Path, tree: object) -> None:
    """Writes a JSON file so that it is never seen half-written.

    Args:
        path: The file to create or replace. Its folder has to exist.
        tree: What `format_json` takes.
    """
    write_text_whole(path, format_json(tree, indent=2) + "\n")


def format_json(
    tree: object, indent: int | None = None, default: Callable[[object], object] | None = None
) -> str:
    """Formats JSON that every reader takes: numbers that JSON lacks are written as text.

    Args:
        tree: Mappings, lists, tuples, texts, numbers, booleans and None.
        indent: Spaces per level; None: one line.
        default: Makes one of these of anything else; None: anything else is an error.

    Returns:
        The text; a number that is not finite is "nan", "inf" or "-inf", as in metrics.jsonl.
    """
    finite = _replace_non_finite(tree)
    return json.dumps(finite, indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def _replace_non_finite(tree: object) -> object:
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(float(tree))
    if isinstance(tree, Mapping):
        return {name: _replace_non_finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replace_non_finite(value) for value in tree]
    return tree
