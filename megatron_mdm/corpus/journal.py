"""The folder in which an unfinished job grows, and the journal that says how far it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import whole_file
from megatron_mdm.core.locks import HeldLock, LockHeldError
from megatron_mdm.data.manifest import Manifest

_LOG = logging.getLogger(__name__)


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


class Journal(BaseModel):
    """How far a job is. What the data files hold beyond it is cut off by a resume.

    Attributes:
        format_version: The version of this format.
        manifests: The manifests of the shards as they would be if the job ended here: the one to
            train on, then the one held out where the corpus is divided.
        position: Where the input goes on.
        read_completely: Whether nothing is left but to give the shards their names.
        tokenizers_only: Whether the faster library was found to give other tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    manifests: list[Manifest]
    position: Position
    read_completely: bool = False
    tokenizers_only: bool = False


class PartialFolder:
    """The folder PREFIX.partial of an unfinished job.

    Args:
        prefix: The path of the shards without `.bin` and `.idx`.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = Path(f"{prefix}.partial")
        self._lock_path = self.path / "lock"
        self._journal_path = self.path / "progress.json"

    def file(self, name: str) -> Path:
        """Names a file in the folder.

        Args:
            name: Its name.

        Returns:
            Its path.
        """
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
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
        try:
            return Journal.model_validate_json(self._journal_path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{self._journal_path} is damaged ({first['msg']}): start again with --overwrite."
            ) from error

    def write_journal(self, journal: Journal) -> None:
        """Replaces the journal, after everything it counts was brought to the disk.

        Args:
            journal: The new one.
        """
        with whole_file(self._journal_path) as stream:
            stream.write(journal.model_dump_json(indent=1).encode("utf-8") + b"\n")

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
