"""One job of preprocessing from its start to shards that are published, resumed or reused."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
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
from megatron_mdm.corpus.ids import IdsReader
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.recipe import Recipe, find_reusable
from megatron_mdm.corpus.records import BadRecord, describe_record, parse_chunk
from megatron_mdm.corpus.sources import Chunk, SourceShare
from megatron_mdm.corpus.unfinished import (
    Journal,
    PartialFolder,
    Position,
    UnfinishedShards,
    publish,
)
from megatron_mdm.corpus.workers import TextReader, encode_chunks
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


class Job:
    """One job: what to read, what decides its bytes, where it writes, and how to go about it.

    Args:
        shares: What to read, in order.
        recipe: What decides the bytes.
        prefixes: The path of each pair of shards without `.bin` and `.idx`.
        options: How to do it.
    """

    def __init__(
        self,
        shares: Sequence[SourceShare],
        recipe: Recipe,
        prefixes: Sequence[Path],
        options: PreprocessOptions,
    ) -> None:
        self._shares = list(shares)
        self._recipe = recipe
        self._prefixes = list(prefixes)
        self._options = options
        self._skips_bad_records = options.on_error == "skip"
        self._folder = PartialFolder(prefixes[0])

    def run(self) -> Preprocessed:
        """Does the job, or reuses what it would make.

        Returns:
            What was made.

        Raises:
            DataError: As `preprocess`.
        """
        options = self._options
        is_new = not self._folder.path.exists() and not options.overwrite
        if is_new and (reused := self._find_reusable()):
            return reused
        _prepare_folder(self._prefixes[0])
        if options.valid_fraction is not None:
            check_division(self._shares, options.valid_fraction)
        if self._recipe.ids is not None:
            check_first_documents(
                self._shares, self._ids_reader(), self._recipe.tokenizer, options.show
            )
        try:
            with self._folder.locked():
                return self._resume_or_start()
        except OSError as error:
            raise DataError(
                f"{self._prefixes[0]} could not be written ({error.strerror or error}): free "
                "space, check permissions, or choose another place, then go on with --resume."
            ) from error

    def _find_reusable(self) -> Preprocessed | None:
        """Looks for shards that this job would make; raises DataError where others are."""
        skip_bad = self._skips_bad_records
        manifests = find_reusable(self._prefixes, self._recipe, skip_bad=skip_bad)
        if not manifests:
            return None
        _LOG.info("reusing %s: the same tokenizer and inputs made it", self._prefixes[0])
        return Preprocessed(manifests, self._prefixes)

    def _resume_or_start(self) -> Preprocessed:
        """Does the job in its folder, which is locked."""
        journal = self._journal_to_resume()
        if journal is None:
            try:
                reused = None if self._options.overwrite else self._find_reusable()
            except DataError:
                self._folder.remove()
                raise
            if reused:
                self._folder.remove()
                return reused
        if journal is not None and journal.read_completely:
            return self._finish(journal)
        try:
            return self._encode(journal)
        except EncodingMismatch as mismatch:
            _LOG.warning("%s: starting again with the tokenizers library", mismatch)
            return self._encode(None, tokenizers_only=True)

    def _journal_to_resume(self) -> Journal | None:
        """How far the job is that is to go on; None for one that starts anew."""
        folder, options = self._folder.path, self._options
        if not self._folder.holds_work() or (options.overwrite and not options.resume):
            return None
        if not options.resume:
            raise DataError(
                f"{folder} holds an unfinished job: go on with --resume, start again with "
                "--overwrite, or choose another --output-prefix."
            )
        journal = self._folder.read_journal()
        if journal is None:
            return None
        difference = self._recipe.difference_from(journal.manifests[0])
        bad = journal.manifests[0].num_bad_records
        if difference is None and bad and not self._skips_bad_records:
            difference = f"it left out {bad} bad records, which takes --on-error skip"
        if difference is None:
            return journal
        if options.overwrite:
            return None
        raise DataError(
            f"{folder} holds an unfinished job and {difference}: start again with --overwrite or "
            "choose another --output-prefix."
        )

    def _encode(self, journal: Journal | None, *, tokenizers_only: bool = False) -> Preprocessed:
        if journal is None:
            self._folder.clear()
            self._check_space()
            journal = Journal(
                manifests=self._recipe.empty_manifests(),
                position=Position(0, self._shares[0].span.start if self._shares else 0, 1),
                tokenizers_only=tokenizers_only,
            )
        start = journal.position
        writes_tokens = self._recipe.token_file is None
        shards = UnfinishedShards(self._folder, journal, writes_tokens=writes_tokens)
        try:
            backend, num_bytes = self._append_all(shards)
            shards.save(read_completely=True)
        except EncodingMismatch:
            raise
        except DataError as error:
            if not self._keep(shards, start):
                raise
            message = str(error).removesuffix(".")
            raise DataError(
                f"{message}; the work so far stays in {self._folder.path} for --resume."
            ) from error
        except BaseException:
            if self._keep(shards, start):
                _LOG.warning("the work so far stays in %s for --resume", self._folder.path)
            raise
        finally:
            shards.close()
        num_tokens = shards.journal.num_tokens - journal.num_tokens
        return self._finish(shards.journal)._replace(
            backend=backend, num_tokens=num_tokens, num_bytes=num_bytes
        )

    def _append_all(self, shards: UnfinishedShards) -> tuple[BackendName | None, int]:
        """Encodes what is left of the inputs; returns the library used and the bytes read."""
        chunks = self._chunks(shards.journal.position)
        first = next(chunks, None)
        if first is None:
            return None, 0
        options = self._options
        reader: TextReader | IdsReader = (
            self._text_reader(first[1], tokenizers_only=shards.journal.tokenizers_only)
            if self._recipe.ids is None
            else self._ids_reader()
        )
        bar = tqdm(
            unit=" tokens",
            unit_scale=True,
            disable=None if options.progress is None else not options.progress,
        )
        num_bytes = 0
        encoded_chunks = encode_chunks(itertools.chain([first], chunks), reader, options.workers)
        with bar, closing(encoded_chunks):
            for place, encoded in encoded_chunks:
                self._report(place, encoded.bad_records, shards.journal)
                position = Position(place.share, place.chunk.end_offset, place.chunk.end_record)
                shards.append(encoded, position)
                num_bytes += place.num_bytes
                bar.update(sum(len(side.tokens) for side in encoded.sides))
        return (reader.backend if isinstance(reader, TextReader) else None), num_bytes

    def _text_reader(self, first: Chunk, *, tokenizers_only: bool) -> TextReader:
        options, tokenizer = self._options, self._recipe.tokenizer
        serialised = tokenizer.backend.to_str()
        choice = BackendChoice("tokenizers", "", None)
        if not tokenizers_only:
            choice = choose_backend(serialised, parse_chunk(first, options.text_key).texts)
            if choice.reason:
                _LOG.info("encoding with the tokenizers library: %s", choice.reason)
        return TextReader(
            serialised=serialised,
            backend=choice.backend,
            vocabulary=choice.vocabulary,
            dtype=self._recipe.dtype.name,
            eod_token_id=tokenizer.eod_token_id,
            append_eod=options.append_eod,
            text_key=options.text_key,
            valid_fraction=options.valid_fraction,
            skip_bad_records=self._skips_bad_records,
        )

    def _ids_reader(self) -> IdsReader:
        recipe, ids = self._recipe, self._recipe.ids
        if ids is None:
            raise ValueError("the chunks hold text")
        return IdsReader(
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
            skip_bad_records=self._skips_bad_records,
        )

    def _chunks(self, start: Position) -> Iterator[tuple[_Place, Chunk]]:
        for number in range(start.source, len(self._shares)):
            source, span = self._shares[number]
            offset, record = span.start, 1
            if number == start.source:
                offset, record = start.offset, start.record
            for chunk in source.chunks(span, offset, record):
                yield _Place(number, chunk.without_content(), chunk.num_bytes), chunk

    def _report(self, place: _Place, bad_records: list[BadRecord], journal: Journal) -> None:
        """Logs the first bad records, or raises the first one if the job stops there."""
        known = journal.manifests[0].num_bad_records
        source, span = self._shares[place.share]
        for number, bad in enumerate(bad_records, start=known):
            if number >= _MAX_BAD_RECORDS_SHOWN:
                return
            record = bad.record + source.records_before(span)
            message = describe_record(place.chunk, source.label, record) + bad.complaint
            if place.chunk.kind == "tokens":
                raise DataError(message)
            if not self._skips_bad_records:
                message = message.removesuffix(".")
                raise DataError(f"{message}, or leave such records out with --on-error skip.")
            _LOG.warning("skipped: %s", message)

    def _keep(self, shards: UnfinishedShards, start: Position) -> bool:
        """Keeps what a job that fails has done, or removes the folder if that is nothing."""
        if shards.journal.position == start and not shards.journal.num_tokens:
            shards.close()
            self._folder.remove()
            return False
        # On a full disk, what the last journal counts stays.
        with suppress(OSError):
            shards.save()
        return True

    def _finish(self, journal: Journal) -> Preprocessed:
        sizes = [manifest.num_tokens for manifest in journal.manifests]
        if self._recipe.task is None and not any(sizes):
            self._folder.remove()
            raise DataError(
                f"{self._prefixes[0]}: the corpus has no tokens: give input with at least one "
                "document that is not empty."
            )
        publish(self._folder, journal, self._prefixes, self._recipe.token_file)
        if self._recipe.task is None and not all(sizes):
            side, kept = ("held-out", 0) if sizes[0] else ("training", 1)
            raise DataError(
                f"--valid-fraction={self._options.valid_fraction} leaves no {side} documents, and "
                f"all {journal.manifests[kept].num_documents} are in {self._prefixes[kept]}: use "
                "these, or start again with another fraction and --overwrite."
            )
        return Preprocessed(journal.manifests, self._prefixes)

    def _check_space(self) -> None:
        per_token = _TEXT_BYTES_PER_TOKEN if self._recipe.ids is None else _JSON_BYTES_PER_ID
        num_tokens = sum(
            share.source.expected_tokens(share.span, per_token) for share in self._shares
        )
        itemsize = self._recipe.dtype.itemsize if self._recipe.token_file is None else 0
        index_bytes = num_tokens / _TOKENS_PER_DOCUMENT * _INDEX_BYTES_PER_DOCUMENT
        needed_bytes = int(num_tokens * itemsize + index_bytes)
        folder = self._folder.path
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            self._folder.remove()
            raise DataError(
                f"{folder.parent} has {free_bytes} bytes free and the shards need about "
                f"{needed_bytes} bytes: free space or choose another --output-prefix."
            )


class _Place(NamedTuple):
    """Where a chunk stands: its share of the inputs, the chunk without its data, and its size."""

    share: int
    chunk: Chunk
    num_bytes: int


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
