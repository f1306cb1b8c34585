"""An unfinished job on disk: its folder, its journal, and the shards that grow there."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import remove_leftovers
from megatron_mdm.core.locks import HeldLock, LockHeldError
from megatron_mdm.corpus.chunk_reader import EncodedChunk
from megatron_mdm.corpus.recipe import SIDES
from megatron_mdm.corpus.token_files import TokenFile
from megatron_mdm.data.manifest import Manifest, Record, manifest_path
from megatron_mdm.data.references import Reference
from megatron_mdm.data.shards import shard_paths
from megatron_mdm.data.writer import GrowingShard, damaged_since, publish_shards, write_index

_LOG = logging.getLogger(__name__)
JOURNAL_SECONDS = 5.0


class Position(NamedTuple):
    """A place in the input.

    Attributes:
        source: The place of the source among the job's.
        offset: A byte of its decompressed stream, or a row.
        record: The number of the line or row there.
    """

    source: int
    offset: int
    record: int


class Journal(Record):
    """How far a job is. What the data files hold beyond it is cut off by a resume.

    Attributes:
        format_version: The version of this format.
        manifests: The manifests of the shards as they would be if the job ended here: the one to
            train on, then the one held out where the corpus is divided.
        position: Where the input goes on.
        read_completely: Whether nothing is left but to give the shards their names.
        tokenizers_only: Whether the faster library was found to give other tokens.
    """

    what = "a journal"
    remedy = "start again with --overwrite."

    format_version: Literal[1] = 1
    manifests: list[Manifest]
    position: Position
    read_completely: bool = False
    tokenizers_only: bool = False

    @property
    def num_tokens(self) -> int:
        """The tokens written so far."""
        return sum(manifest.num_tokens for manifest in self.manifests)


class PartialFolder:
    """The folder PREFIX.partial of an unfinished job.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = Path(f"{prefix}.partial")
        self._lock_path = self.path / "lock"
        self._journal_path = self.path / "progress.json"

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it until the block ends.

        Yields:
            Nothing.

        Raises:
            DataError: Another process works there.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = HeldLock(self._lock_path)
                break
            except LockHeldError as error:
                raise DataError(
                    f"{self.path} is locked, so another process is writing these shards: wait "
                    "for it, or choose another --output-prefix."
                ) from error
            except FileNotFoundError:
                # The folder has been finished and removed since it was made.
                continue
        if not lock.descriptors:
            _LOG.warning("%s: this file system has no locks", self.path)
        try:
            yield
        finally:
            lock.release()

    def holds_work(self) -> bool:
        """Tells whether a job has begun in the folder, which has to be locked.

        Returns:
            True if there is more than the lock.
        """
        return any(path != self._lock_path for path in self.path.iterdir())

    def read_journal(self) -> Journal | None:
        """Reads how far the job is.

        Returns:
            The journal, or None if the job was not far enough to write one.

        Raises:
            DataError: It is damaged.
        """
        return Journal.read(self._journal_path) if self._journal_path.exists() else None

    def write_journal(self, journal: Journal) -> None:
        """Replaces the journal, after everything it counts was brought to the disk.

        Args:
            journal: The new one.
        """
        journal.write(self._journal_path)

    def clear(self) -> None:
        """Removes everything in the folder but the lock, the journal first."""
        self._journal_path.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path != self._lock_path:
                path.unlink()

    def remove(self) -> None:
        """Removes the folder, the journal first. It has to be locked."""
        self._journal_path.unlink(missing_ok=True)
        shutil.rmtree(self.path)


class UnfinishedShards:
    """The shards of a job as they grow in its folder.

    Args:
        folder: The folder, locked.
        journal: How far the job is. What the files hold beyond it is cut off.
        writes_tokens: Whether tokens are written; otherwise documents are counted alone.
    """

    def __init__(
        self, folder: PartialFolder, journal: Journal, *, writes_tokens: bool = True
    ) -> None:
        self.journal = journal
        self._folder = folder
        self._saved_seconds = time.monotonic()
        self._shards: list[GrowingShard] = []
        try:
            for side, manifest in zip(SIDES, journal.manifests, strict=False):
                shard = GrowingShard(
                    folder.path / f"{side}.bin" if writes_tokens else None,
                    folder.path / f"{side}.lengths",
                    np.dtype(manifest.dtype),
                    num_tokens=manifest.num_tokens,
                    num_documents=manifest.num_documents,
                )
                self._shards.append(shard)
        except BaseException:
            self.close()
            raise

    def append(self, chunk: EncodedChunk, position: Position) -> None:
        """Appends the documents of the next chunk.

        Args:
            chunk: The chunk.
            position: Where the input goes on after it.
        """
        manifests = []
        for manifest, shard, side in zip(
            self.journal.manifests, self._shards, chunk.sides, strict=True
        ):
            shard.append(side.tokens, side.lengths)
            changes = {
                "num_documents": shard.num_documents,
                "num_tokens": shard.num_tokens,
                "max_token_id": max(manifest.max_token_id, side.max_token_id),
                "num_skipped_documents": manifest.num_skipped_documents
                + side.num_skipped_documents,
                "num_bad_records": manifest.num_bad_records + len(chunk.bad_records),
            }
            manifests.append(manifest.model_copy(update=changes))
        self.journal = self.journal.model_copy(
            update={"manifests": manifests, "position": position}
        )
        if time.monotonic() - self._saved_seconds >= JOURNAL_SECONDS:
            self.save()

    def save(self, *, read_completely: bool = False) -> None:
        """Brings everything appended so far to the disk and writes that into the journal.

        Args:
            read_completely: Whether this was all.
        """
        for shard in self._shards:
            shard.sync()
        self.journal = self.journal.model_copy(update={"read_completely": read_completely})
        self._folder.write_journal(self.journal)
        self._saved_seconds = time.monotonic()

    def close(self) -> None:
        """Closes the files."""
        for shard in self._shards:
            shard.close()


def publish(
    folder: PartialFolder, journal: Journal, prefixes: Sequence[Path], token_file: TokenFile | None
) -> None:
    """Gives finished shards their names. Killed anywhere, it can be called again.

    Args:
        folder: The folder of a job that has read everything, locked. It is removed.
        journal: Its journal.
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        token_file: The file that the tokens stay in; None where they were written anew.

    Raises:
        DataError: The files were changed after they were written.
    """
    for side, manifest, prefix in zip(SIDES, journal.manifests, prefixes, strict=False):
        if not manifest.num_tokens and manifest.task is None:
            # No document fell on this side: older shards must not stand beside the new other side.
            for path in shard_paths(prefix):
                path.unlink(missing_ok=True)
            continue
        tokens = folder.path / f"{side}.bin"
        expected_bytes = manifest.num_tokens * np.dtype(manifest.dtype).itemsize
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if token_file is not None:
            Reference.of(
                token_file.path,
                prefix.parent,
                offset_bytes=token_file.offset_bytes,
                num_bytes=expected_bytes,
            ).write(tokens)
        elif tokens.exists() and tokens.stat().st_size != expected_bytes:
            raise damaged_since(tokens, tokens.stat().st_size, expected_bytes)
        index = folder.path / f"{side}.idx"
        write_index(
            index,
            folder.path / f"{side}.lengths",
            manifest.num_documents,
            np.dtype(manifest.dtype),
        )
        remove_leftovers(manifest_path(prefix))
        publish_shards(prefix, tokens, index, manifest, are_referred_to=token_file is not None)
    folder.remove()
