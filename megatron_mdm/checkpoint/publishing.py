"""A checkpoint is written aside; one rename makes it visible."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_mdm.checkpoint.manifest import MANIFEST, CheckpointManifest, format_manifest
from megatron_mdm.checkpoint.retention import clean_leftovers, delete_checkpoint, sync_folder
from megatron_mdm.checkpoint.storage import LATEST
from megatron_mdm.core.errors import CheckpointError, explain_write_errors
from megatron_mdm.core.files import write_text_whole


def prepare_folder(aside: Path) -> None:
    """Makes the folder that a checkpoint is written into, and removes what killed saves left.

    Args:
        aside: A hidden name beside the checkpoint's own.

    Raises:
        OSError: It cannot be made.
    """
    aside.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(aside.parent)
    aside.mkdir()


def publish_checkpoint(aside: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Gives a written checkpoint its manifest and its name, and makes it the latest.

    Args:
        aside: Folder with the tensor files.
        final: The checkpoint's own name; what lies there is replaced.
        manifest: With all files.

    Raises:
        OSError: Something cannot be written.
    """
    write_text_whole(aside / MANIFEST, format_manifest(manifest))
    sync_folder(aside)
    if final.exists():
        delete_checkpoint(final)
    os.replace(aside, final)
    write_text_whole(final.parent / LATEST, final.name + "\n")
    sync_folder(final.parent)


@contextlib.contextmanager
def write_aside(final: Path) -> Iterator[Path]:
    """Opens the folder that one process writes a checkpoint into, before `publish_checkpoint`.

    Nothing half-made is left: neither what was written aside, nor a folder for it that was not
    there before.

    Args:
        final: The checkpoint's own name.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: Something cannot be written.
    """
    folder = final.parent
    existed = folder.exists()
    aside = folder / f".{final.name}.tmp"
    try:
        with explain_write_errors(final, CheckpointError):
            prepare_folder(aside)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed:
            # Only where it is empty: a published checkpoint stays.
            with contextlib.suppress(OSError):
                folder.rmdir()
