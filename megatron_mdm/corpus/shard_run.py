"""One job of preprocessing from its start to shards that are published, resumed or reused."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.encoding import (
    BackendChoice,
    BackendName,
    EncodingMismatch,
    choose_backend,
)
from megatron_mdm.corpus.first_documents import check_division, check_first_documents
from megatron_mdm.corpus.ids import IdsJob
from megatron_mdm.corpus.job import Recipe, ShardJob, find_reusable, publish
from megatron_mdm.corpus.journal import Journal, PartialFolder, Position
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.records import BadRecord, describe_record, parse_chunk
from megatron_mdm.corpus.sources import Chunk, SourceShare
from megatron_mdm.corpus.workers import EncodingJob, encode_chunks
from megatron_mdm.data.manifest import Manifest

_LOG = logging.getLogger(__name__)
_MAX_BAD_RECORDS_SHOWN = 10
# How few bytes of text, or of ids written as JSON, make a token: a guess on the safe side, since a
# full disk is caught as well.
_TEXT_BYTES_PER_TOKEN = 3.0
_JSON_BYTES_PER_ID = 7.0
_TOKENS_PER_DOCUMENT = 1000.0
_INDEX_BYTES_PER_DOCUMENT = 24


class Preprocessed(NamedTuple):
    """What a job made.

    Attributes:
        manifests: The manifest of the shards; with a division also that of the held-out ones.
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        backend: The library that encoded; None where nothing had to be encoded.
        num_tokens: The tokens that were encoded now, without those that were there.
        num_bytes: The bytes of decompressed input that were read now.
    """

    manifests: list[Manifest]
    prefixes: list[Path]
    backend: BackendName | None = None
    num_tokens: int = 0
    num_bytes: int = 0


class ShardRun(NamedTuple):
    """A job: what to read, what decides its bytes, where it writes, and how to go about it.

    Attributes:
        shares: What to read, in order.
        recipe: What decides the bytes.
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        options: How to do it.
    """

    shares: list[SourceShare]
    recipe: Recipe
    prefixes: list[Path]
    options: PreprocessOptions

    def run(self) -> Preprocessed:
        """Does the job, or reuses what it would make.

        Returns:
            What was made.

        Raises:
            DataError: As `preprocess`.
        """
        folder = PartialFolder(self.prefixes[0])
        is_new = not folder.path.exists() and not self.options.overwrite
        if is_new and (reused := self.find_reusable()):
            return reused
        _prepare_folder(self.prefixes[0])
        if self.options.valid_fraction is not None:
            check_division(self.shares, self.options.valid_fraction)
        if self.recipe.ids is not None:
            check_first_documents(self.shares, self.ids_job(), self.recipe.tokenizer, self.options)
        try:
            with folder.locked():
                return self.go(folder)
        except OSError as error:
            raise DataError(
                f"{self.prefixes[0]} could not be written ({error.strerror or error}): free space, "
                "check permissions, or choose another place, then go on with --resume."
            ) from error

    def ids_job(self) -> IdsJob:
        """What a process needs to read the chunks, where these are ids."""
        recipe, ids = self.recipe, self.recipe.ids
        if ids is None:
            raise ValueError("the chunks hold text")
        return IdsJob(
            ids_key=ids.key,
            serialised=recipe.tokenizer.backend.to_str(),
            dtype=recipe.dtype.name,
            vocab_size=recipe.tokenizer.vocab_size,
            eod_token_id=recipe.tokenizer.eod_token_id,
            is_cut=ids.split_at_eod,
            is_copied=recipe.token_file is None,
            # Where tasks cut a stream between rows, such an end may be that of another task's part.
            drops_empty=not (ids.key and ids.split_at_eod and recipe.task),
            append_eod=recipe.append_eod,
            valid_fraction=recipe.valid_fraction,
            hold_out_by=ids.hold_out_by,
            skip_bad_records=self.options.on_error == "skip",
        )

    def find_reusable(self) -> Preprocessed | None:
        """Looks for shards that this job would make; raises DataError where others are."""
        skip_bad = self.options.on_error == "skip"
        manifests = find_reusable(self.prefixes, self.recipe, skip_bad=skip_bad)
        if not manifests:
            return None
        _LOG.info("reusing %s: the same tokenizer and inputs made it", self.prefixes[0])
        return Preprocessed(manifests, self.prefixes)

    def go(self, folder: PartialFolder) -> Preprocessed:
        """Does the job in its folder, which is locked."""
        journal = self._journal_to_resume(folder)
        if journal is None:
            try:
                reused = None if self.options.overwrite else self.find_reusable()
            except DataError:
                folder.remove()
                raise
            if reused:
                folder.remove()
                return reused
        if journal is not None and journal.read_completely:
            return self._finish(folder, journal)
        try:
            return self._encode(folder, journal)
        except EncodingMismatch as mismatch:
            _LOG.warning("%s: starting again with the tokenizers library", mismatch)
            return self._encode(folder, None, tokenizers_only=True)

    def _journal_to_resume(self, folder: PartialFolder) -> Journal | None:
        if not folder.holds_work():
            return None
        if not self.options.resume:
            if self.options.overwrite:
                return None
            raise DataError(
                f"{folder.path} holds an unfinished job: go on with --resume, start again with "
                "--overwrite, or choose another --output-prefix."
            )
        journal = folder.read_journal()
        if journal is None:
            return None
        difference = self.recipe.difference_from(journal.manifests[0])
        bad = journal.manifests[0].num_bad_records
        if difference is None and bad and self.options.on_error == "stop":
            difference = f"it left out {bad} bad records, which takes --on-error skip"
        if difference is None:
            return journal
        if self.options.overwrite:
            return None
        raise DataError(
            f"{folder.path} holds an unfinished job and {difference}: start again with "
            "--overwrite or choose another --output-prefix."
        )

    def _encode(
        self, folder: PartialFolder, journal: Journal | None, *, tokenizers_only: bool = False
    ) -> Preprocessed:
        if journal is None:
            folder.clear()
            self._check_space(folder)
            journal = Journal(
                manifests=self.recipe.empty_manifests(),
                position=Position(0, self.shares[0].span.start if self.shares else 0, 1),
                tokenizers_only=tokenizers_only,
            )
        start = journal.position
        job = ShardJob(folder, journal, writes_tokens=self.recipe.token_file is None)
        try:
            backend, num_bytes = self._append_all(job)
            job.save(read_completely=True)
        except EncodingMismatch:
            raise
        except DataError as error:
            if not _keep(folder, job, start):
                raise
            message = str(error).removesuffix(".")
            raise DataError(
                f"{message}; the work so far stays in {folder.path} for --resume."
            ) from error
        except BaseException:
            if _keep(folder, job, start):
                _LOG.warning("the work so far stays in %s for --resume", folder.path)
            raise
        finally:
            job.close()
        num_tokens = _num_tokens(job.journal) - _num_tokens(journal)
        return self._finish(folder, job.journal)._replace(
            backend=backend, num_tokens=num_tokens, num_bytes=num_bytes
        )

    def _append_all(self, job: ShardJob) -> tuple[BackendName | None, int]:
        """Encodes what is left of the inputs; returns the library used and the bytes read."""
        chunks = self._chunks(job.journal.position)
        first = next(chunks, None)
        if first is None:
            return None, 0
        options = self.options
        reading = self._chunk_job(first[1], tokenizers_only=job.journal.tokenizers_only)
        backend = reading.backend if isinstance(reading, EncodingJob) else None
        bar = tqdm(
            unit=" tokens",
            unit_scale=True,
            disable=None if options.progress is None else not options.progress,
        )
        num_bytes = 0
        encoded_chunks = encode_chunks(itertools.chain([first], chunks), reading, options.workers)
        with bar, closing(encoded_chunks):
            for place, encoded in encoded_chunks:
                self._report(place, encoded.bad_records, job.journal)
                position = Position(place.share, place.chunk.end_offset, place.chunk.end_record)
                job.append(encoded, position)
                num_bytes += place.num_bytes
                bar.update(sum(len(side.tokens) for side in encoded.sides))
        return backend, num_bytes

    def _chunk_job(self, first: Chunk, *, tokenizers_only: bool) -> EncodingJob | IdsJob:
        if self.recipe.ids is not None:
            return self.ids_job()
        options, tokenizer = self.options, self.recipe.tokenizer
        serialised = tokenizer.backend.to_str()
        choice = BackendChoice("tokenizers", "", None)
        if not tokenizers_only:
            texts = parse_chunk(first, options.text_key).texts
            choice = choose_backend(serialised, texts)
            if choice.reason:
                _LOG.info("encoding with the tokenizers library: %s", choice.reason)
        return EncodingJob(
            serialised,
            choice.backend,
            choice.vocabulary,
            self.recipe.dtype.name,
            tokenizer.eod_token_id,
            options.append_eod,
            options.text_key,
            options.valid_fraction,
            options.on_error == "skip",
        )

    def _chunks(self, start: Position) -> Iterator[tuple[_Place, Chunk]]:
        for number in range(start.source, len(self.shares)):
            source, span = self.shares[number]
            offset, record = span.start, 1
            if number == start.source:
                offset, record = start.offset, start.record
            for chunk in source.chunks(span, offset, record):
                yield _Place(number, chunk.without_content(), chunk.num_bytes), chunk

    def _report(self, place: _Place, bad_records: list[BadRecord], journal: Journal) -> None:
        """Logs the first bad records, or raises the first one if the job stops there."""
        known = journal.manifests[0].num_bad_records
        source, span = self.shares[place.share]
        for number, bad in enumerate(bad_records, start=known):
            if number >= _MAX_BAD_RECORDS_SHOWN:
                return
            record = bad.record + source.records_before(span)
            message = describe_record(place.chunk, source.label, record) + bad.complaint
            if place.chunk.kind == "tokens":
                raise DataError(message)
            if self.options.on_error == "stop":
                message = message.removesuffix(".")
                raise DataError(f"{message}, or leave such records out with --on-error skip.")
            _LOG.warning("skipped: %s", message)

    def _finish(self, folder: PartialFolder, journal: Journal) -> Preprocessed:
        sizes = [manifest.num_tokens for manifest in journal.manifests]
        if self.recipe.task is None and not any(sizes):
            folder.remove()
            raise DataError(
                f"{self.prefixes[0]}: the corpus has no tokens: give input with at least one "
                "document that is not empty."
            )
        publish(folder, journal, self.prefixes, self.recipe.token_file)
        if self.recipe.task is None and not all(sizes):
            side, kept = ("held-out", 0) if sizes[0] else ("training", 1)
            raise DataError(
                f"--valid-fraction={self.options.valid_fraction} leaves no {side} documents, and "
                f"all {journal.manifests[kept].num_documents} are in {self.prefixes[kept]}: use "
                "these, or start again with another fraction and --overwrite."
            )
        return Preprocessed(journal.manifests, self.prefixes)

    def _check_space(self, folder: PartialFolder) -> None:
        per_token = _TEXT_BYTES_PER_TOKEN if self.recipe.ids is None else _JSON_BYTES_PER_ID
        num_tokens = sum(
            share.source.expected_tokens(share.span, per_token) for share in self.shares
        )
        itemsize = self.recipe.dtype.itemsize if self.recipe.token_file is None else 0
        index_bytes = num_tokens / _TOKENS_PER_DOCUMENT * _INDEX_BYTES_PER_DOCUMENT
        needed_bytes = int(num_tokens * itemsize + index_bytes)
        free_bytes = shutil.disk_usage(folder.path).free
        if free_bytes < needed_bytes:
            folder.remove()
            raise DataError(
                f"{folder.path.parent} has {free_bytes} bytes free and the shards need about "
                f"{needed_bytes} bytes: free space or choose another --output-prefix."
            )


class _Place(NamedTuple):
    """Where a chunk stands: its share of the inputs, the chunk without its data, and its size."""

    share: int
    chunk: Chunk
    num_bytes: int


def _num_tokens(journal: Journal) -> int:
    return sum(manifest.num_tokens for manifest in journal.manifests)


def _keep(folder: PartialFolder, job: ShardJob, start: Position) -> bool:
    """Keeps the work of a job that fails for a resume, or removes the folder if there is none."""
    if job.journal.position == start and not _num_tokens(job.journal):
        job.close()
        folder.remove()
        return False
    # On a full disk, what the last journal counts stays.
    with suppress(OSError):
        job.save()
    return True


def _prepare_folder(prefix: Path) -> None:
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{prefix.parent} cannot be made a folder ({error.strerror}): choose another "
            "--output-prefix."
        ) from error
    if not os.access(prefix.parent, os.W_OK | os.X_OK):
        raise DataError(
            f"{prefix.parent} is not writable: change its permissions or choose another "
            "--output-prefix."
        )
