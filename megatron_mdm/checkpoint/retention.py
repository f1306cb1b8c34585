"""Retention: which checkpoints are kept, and how the others are deleted, never half."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_mdm.checkpoint.storage import LATEST, CheckpointReader
from megatron_mdm.core.errors import CheckpointError

_DELETED = ".deleted-"


def list_saved_steps(folder: Path) -> dict[int, Path]:
    """Lists the checkpoint folders by step, whole or not.

    Args:
        folder: The run's `checkpoints` folder; it need not exist.

    Returns:
        Paths by step, newest first.
    """
    found = {}
    for path in folder.glob("step_*"):
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def choose_steps_to_delete(
    steps: Iterable[int],
    *,
    keep_last: int | None,
    keep_every_steps: int | None,
    protected: Iterable[int],
) -> list[int]:
    """Applies the rule of retention.

    Args:
        steps: Steps of the whole checkpoints.
        keep_last: How many of the newest stay; None: all.
        keep_every_steps: Multiples of it stay as well.
        protected: Steps that stay in any case.

    Returns:
        Steps to delete, oldest first.
    """
    ordered = sorted(steps)
    if keep_last is None:
        return []
    kept = {*ordered[-keep_last:], *protected}
    if keep_every_steps is not None:
        kept.update(step for step in ordered if step % keep_every_steps == 0)
    return [step for step in ordered if step not in kept]


def delete_old(
    folder: Path, newest: int, *, keep_last: int | None, keep_every_steps: int | None
) -> None:
    """Deletes what need not be kept after a checkpoint was published.

    Checkpoints that are not whole are neither counted nor deleted, and neither are those of later
    steps: they belong to a run that was set back.

    Args:
        folder: The run's `checkpoints` folder.
        newest: Step of the checkpoint that was just published.
        keep_last: How many of the newest stay; None: all.
        keep_every_steps: Multiples of it stay as well.

    Raises:
        OSError: Something cannot be deleted.
    """
    if keep_last is None:
        return
    earlier = {step: path for step, path in list_saved_steps(folder).items() if step <= newest}
    candidates = [step for step, path in earlier.items() if step == newest or _looks_whole(path)]
    gone = choose_steps_to_delete(
        candidates, keep_last=keep_last, keep_every_steps=keep_every_steps, protected=[newest]
    )
    for path in _skip_latest(folder, [earlier[step] for step in gone]):
        delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, under another name: a killed deletion leaves no half checkpoint.

    Raises:
        OSError: It cannot be deleted.
    """
    aside = path.with_name(_DELETED + path.name)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(path, aside)
    shutil.rmtree(aside)


def clean_leftovers(folder: Path) -> None:
    """Removes what killed saves and deletions left.

    Args:
        folder: The run's `checkpoints` folder; no save may be under way.
    """
    for pattern in (".step_*.tmp", f"{_DELETED}step_*", f".{LATEST}.*.tmp"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a power failure cannot undo a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _skip_latest(folder: Path, paths: Sequence[Path]) -> Iterator[Path]:
    # `latest` may have been set by hand since.
    for path in paths:
        if (folder / LATEST).read_text(encoding="utf-8").strip() != path.name:
            yield path


def _looks_whole(path: Path) -> bool:
    try:
        reader = CheckpointReader(path)
        reader.check_complete()
    except CheckpointError:
        return False
    return True
