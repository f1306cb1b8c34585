"""One job of preprocessing from its start to shards that are published, resumed or reused."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import check_free_space
from megatron_mdm.corpus.chunk_reader import ChunkReader, TextReader
from megatron_mdm.corpus.encoding import (
    BackendChoice,
    BackendName,
    EncodingMismatch,
    EncodingSettings,
    choose_backend,
)
from megatron_mdm.corpus.first_documents import check_division, check_first_documents
from megatron_mdm.corpus.ids import IdsReader
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.recipe import Recipe, find_reusable
from megatron_mdm.corpus.records import BadRecord, describe_record, parse_chunk
from megatron_mdm.corpus.sources import Chunk, SourceShare, Span
from megatron_mdm.corpus.token_files import TokenFile
from megatron_mdm.corpus.token_sources import JoinedRows
from megatron_mdm.corpus.tokenizer import TokenizerHandle
from megatron_mdm.corpus.unfinished import (
    Journal,
    PartialFolder,
    Position,
    UnfinishedShards,
    publish,
)
from megatron_mdm.corpus.workers import encode_chunks
from megatron_mdm.data.manifest import IdsRecipe, Manifest

_LOG = logging.getLogger(__name__)
_MAX_BAD_RECORDS_SHOWN = 10
# Bytes per token of text, and per id in JSON, to estimate the disk space that is needed. Rather too
# many bytes than too few: a disk that fills up later is noticed as well.
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
    """One job: what to read, where it writes, and how to go about it.

    Args:
        shares: What to read, in order.
        tokenizer: The tokenizer.
        output_prefix: The path of the shards without `.bin` and `.idx`.
        options: How to do it.
        ids: How tokens are read that are there already, None for text.
        token_file: The file that the tokens stay in; None where they are written anew.
    """

    def __init__(
        self,
        shares: Sequence[SourceShare],
        tokenizer: TokenizerHandle,
        output_prefix: Path,
        options: PreprocessOptions,
        ids: IdsRecipe | None = None,
        token_file: TokenFile | None = None,
    ) -> None:
        self._shares = list(shares)
        self._recipe = Recipe.of(
            tokenizer,
            [share.describe() for share in shares],
            text_key=options.text_key,
            append_eod=options.append_eod and not options.eod_first,
            prepend_eod=options.eod_first,
            max_tokens=options.max_tokens,
            valid_fraction=options.valid_fraction,
            task=options.task,
            ids=ids,
            token_file=token_file,
        )
        if shares and ids is not None and ids.key is not None and ids.split_at_eod:
            # Rows that are windows of one stream are read as one source.
            rows = JoinedRows(shares, ids.key, tokenizer, is_whole=options.task is None)
            self._shares = [SourceShare(rows, Span())]
        self._prefixes = self._recipe.name_prefixes(output_prefix)
        self._options = options
        self._skips_bad_records = options.on_error == "skip"
        self._folder = PartialFolder(self._prefixes[0])

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
        if self._recipe.manifest.ids is not None:
            reader = self._make_ids_reader(self._recipe.manifest.ids)
            check_first_documents(self._shares, reader, self._recipe.tokenizer, options.show)
        try:
            with self._folder.hold_lock():
                return self._resume_or_start()
        except OSError as error:
            raise DataError(
                f"{self._prefixes[0]} could not be written ({error.strerror or error}): free "
                "space, check permissions, or choose another place, then go on with --resume."
            ) from error

    def _find_reusable(self) -> Preprocessed | None:
        """Looks for shards that this job would make; raises DataError where others are."""
        manifests = find_reusable(self._prefixes, self._recipe, skip_bad=self._skips_bad_records)
        if not manifests:
            return None
        _LOG.info("reusing %s: the same tokenizer and inputs made it", self._prefixes[0])
        return Preprocessed(manifests, self._prefixes)

    def _resume_or_start(self) -> Preprocessed:
        """Does the job in its folder, which is locked."""
        journal = self._find_journal()
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

    def _find_journal(self) -> Journal | None:
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
        difference = self._recipe.find_difference(
            journal.manifests[0], skip_bad=self._skips_bad_records
        )
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
                manifests=self._recipe.start_manifests(),
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
        except BaseException as error:
            if not self._keep(shards, start):
                raise
            kept = f"the work so far stays in {self._folder.path} for --resume"
            if isinstance(error, DataError):
                raise DataError(f"{str(error).removesuffix('.')}; {kept}.") from error
            _LOG.warning("%s", kept)
            raise
        finally:
            shards.close()
        num_tokens = shards.journal.num_tokens - journal.num_tokens
        return self._finish(shards.journal)._replace(
            backend=backend, num_tokens=num_tokens, num_bytes=num_bytes
        )

    def _append_all(self, shards: UnfinishedShards) -> tuple[BackendName | None, int]:
        """Encodes what is left of the inputs; returns the library used and the bytes read."""
        options, ids = self._options, self._recipe.manifest.ids
        enough_tokens = options.max_tokens or math.inf
        chunks = self._read_chunks(shards.journal.position)
        first = next(chunks, None)
        if first is None or shards.journal.num_tokens >= enough_tokens:
            return None, 0
        backend: BackendName | None = None
        reader: ChunkReader
        if ids is not None:
            reader = self._make_ids_reader(ids)
        else:
            choice = self._choose_backend(first[1], shards.journal)
            reader = TextReader(settings=self._settings, text_key=options.text_key, choice=choice)
            backend = choice.backend
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
                if shards.journal.num_tokens >= enough_tokens:
                    break
        return backend, num_bytes

    @cached_property
    def _settings(self) -> EncodingSettings:
        tokenizer, made = self._recipe.tokenizer, self._recipe.manifest
        return EncodingSettings(
            tokenizer.backend.to_str(),
            made.dtype,
            made.eod_token_id,
            made.append_eod,
            made.valid_fraction,
            self._skips_bad_records,
            made.prepend_eod,
        )

    def _choose_backend(self, first: Chunk, journal: Journal) -> BackendChoice:
        if journal.tokenizers_only:
            return BackendChoice("tokenizers", "", None)
        texts = parse_chunk(first, self._options.text_key).texts
        choice = choose_backend(self._settings.serialised, texts)
        if choice.reason:
            _LOG.info("encoding with the tokenizers library: %s", choice.reason)
        return choice

    def _make_ids_reader(self, ids: IdsRecipe) -> IdsReader:
        return IdsReader(
            settings=self._settings,
            ids_key=ids.key,
            vocab_size=self._recipe.tokenizer.vocab_size,
            is_cut=ids.split_at_eod,
            is_copied=self._recipe.token_file is None,
            # Where tasks share a stream, an end alone may end a document of the task before.
            drops_empty=not (ids.key and ids.split_at_eod and self._recipe.manifest.task),
            hold_out_by=ids.hold_out_by,
        )

    def _read_chunks(self, start: Position) -> Iterator[tuple[_Place, Chunk]]:
        for number in range(start.source, len(self._shares)):
            source, span = self._shares[number]
            offset, record = span.start, 1
            if number == start.source:
                offset, record = start.offset, start.record
            for chunk in source.read_chunks(span, offset, record):
                yield _Place(number, chunk.without_content(), chunk.num_bytes), chunk

    def _report(self, place: _Place, bad_records: list[BadRecord], journal: Journal) -> None:
        """Logs the first bad records, or raises the first one if the job stops there."""
        known = journal.manifests[0].num_bad_records
        source, span = self._shares[place.share]
        for number, bad in enumerate(bad_records, start=known):
            if number >= _MAX_BAD_RECORDS_SHOWN:
                return
            record = bad.record + source.count_records_before(span)
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
        # If the disk is full, the work up to the last journal is kept.
        with suppress(OSError):
            shards.save()
        return True

    def _finish(self, journal: Journal) -> Preprocessed:
        sizes = [manifest.num_tokens for manifest in journal.manifests]
        if self._recipe.manifest.task is None and not any(sizes):
            self._folder.remove()
            raise DataError(
                f"{self._prefixes[0]}: the corpus has no tokens: give input with at least one "
                "document that is not empty."
            )
        publish(self._folder, journal, self._prefixes, self._recipe.token_file)
        if self._recipe.manifest.task is None and not all(sizes):
            side, kept = ("held-out", 0) if sizes[0] else ("training", 1)
            raise DataError(
                f"--valid-fraction={self._options.valid_fraction} leaves no {side} documents, and "
                f"all {journal.manifests[kept].num_documents} are in {self._prefixes[kept]}: use "
                "these, or start again with another fraction and --overwrite."
            )
        return Preprocessed(journal.manifests, self._prefixes)

    def _check_space(self) -> None:
        is_text = self._recipe.manifest.ids is None
        per_token = _TEXT_BYTES_PER_TOKEN if is_text else _JSON_BYTES_PER_ID
        num_tokens = sum(
            share.source.estimate_tokens(share.span, per_token) for share in self._shares
        )
        num_tokens = min(num_tokens, self._options.max_tokens or math.inf)
        itemsize = self._recipe.dtype.itemsize if self._recipe.token_file is None else 0
        index_bytes = num_tokens / _TOKENS_PER_DOCUMENT * _INDEX_BYTES_PER_DOCUMENT
        try:
            check_free_space(
                self._folder.path.parent,
                int(num_tokens * itemsize + index_bytes),
                "the shards need about",
                "choose another --output-prefix",
            )
        except DataError:
            self._folder.remove()
            raise


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
