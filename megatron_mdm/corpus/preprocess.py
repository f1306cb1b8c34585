"""Preprocessing: text files to token shards with a manifest, over several processes."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_mdm.corpus.readers import check_source, read_documents
from megatron_mdm.corpus.tokenizer import (
    TokenizerHandle,
    encode_texts,
    load_tokenizer,
    prepare_backend,
)
from megatron_mdm.data.manifest import Manifest, SourceFile, manifest_path, write_errors
from megatron_mdm.data.shards import TokenShards, bin_path, idx_path, token_dtype
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.errors import DataError

_LOG = logging.getLogger(__name__)
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1024
_BATCHES_IN_FLIGHT_PER_WORKER = 3
# How much text a byte of input holds, and how few bytes of text make a token: a rough guess on
# the safe side, since a full disk is caught as well.
_TEXT_BYTES_PER_INPUT_BYTE = {".gz": 4.0, ".parquet": 2.5}
_TEXT_BYTES_PER_TOKEN = 3.0


class Recipe(NamedTuple):
    """What decides the bytes of the shards.

    Attributes:
        tokenizer: The tokenizer.
        sources: The input files, in order, with their hashes.
        text_key: The JSON key or parquet column that holds the text.
        append_eod: Whether every document ends with the tokenizer's end-of-document token.
    """

    tokenizer: TokenizerHandle
    sources: list[SourceFile]
    text_key: str
    append_eod: bool

    def difference_from(self, manifest: Manifest) -> str | None:
        """Compares with the recipe of shards that exist.

        Args:
            manifest: The manifest of the shards.

        Returns:
            What differs, in words, or None if the shards are what this recipe gives.
        """
        if manifest.tokenizer_sha256 != self.tokenizer.sha256:
            return f"its tokenizer is another ({manifest.tokenizer!r})"
        if manifest.eod_token_id != self.tokenizer.eod_token_id:
            return f"its end-of-document id is {manifest.eod_token_id}"
        if (manifest.text_key, manifest.append_eod) != (self.text_key, self.append_eod):
            return f"it has text_key={manifest.text_key!r}, append_eod={manifest.append_eod}"
        if len(manifest.source_files) != len(self.sources):
            return f"it was made from {len(manifest.source_files)} input files"
        for mine, other in zip(self.sources, manifest.source_files, strict=True):
            if not mine.has_content_of(other):
                return f"its input {other.path} is not {mine.path} as it is now"
        return None


class _EncodedBatch(NamedTuple):
    """The tokens of a batch of documents in a row; a document without tokens has length 0."""

    tokens: npt.NDArray[Any]
    lengths: list[int]


class _Encoder(NamedTuple):
    """What one process needs to encode batches."""

    backend: Tokenizer
    eod_token_id: int
    append_eod: bool
    dtype: np.dtype[Any]

    def encode(self, texts: list[str]) -> _EncodedBatch:
        tokens: list[int] = []
        lengths: list[int] = []
        for text, ids in zip(texts, encode_texts(self.backend, texts), strict=True):
            if self.eod_token_id in ids:
                raise DataError(
                    f"the document that starts with {text[:40]!r} encodes to the end-of-document "
                    f"id {self.eod_token_id} inside it: choose another --eod-token."
                )
            tokens.extend(ids)
            if ids and self.append_eod:
                tokens.append(self.eod_token_id)
            lengths.append(len(ids) + (self.append_eod if ids else 0))
        return _EncodedBatch(np.array(tokens, dtype=self.dtype), lengths)


_worker_encoder: _Encoder | None = None


def preprocess(
    inputs: Sequence[Path],
    tokenizer_name: str,
    output_prefix: Path,
    *,
    workers: int = 1,
    text_key: str = "text",
    overwrite: bool = False,
    append_eod: bool = True,
    eod_token: str | None = None,
    progress: bool | None = None,
) -> Manifest:
    """Writes token shards and their manifest, or reuses those that the same inputs made.

    Documents keep the order of the inputs; the bytes are equal for any number of workers.

    Args:
        inputs: The files to read, at least one.
        tokenizer_name: A tokenizer's name or path, as `load_tokenizer` takes it.
        output_prefix: The path of the shards without `.bin` and `.idx`.
        workers: The number of processes that encode, 1 or more; 1 stays in this process.
        text_key: The JSON key or parquet column that holds the text.
        overwrite: Whether to replace shards that something else made.
        append_eod: Whether to end every document with the end-of-document token.
        eod_token: That token; None for the tokenizer's own.
        progress: Whether to show a progress bar; None for only on a terminal.

    Returns:
        The manifest, which is written last.

    Raises:
        DataError: The inputs, the tokenizer or the output cannot be used, other shards exist
            there, the corpus is empty, or the disk is full.
    """
    if workers < 1:
        raise DataError(f"--workers={workers} has to be at least 1: use the number of free cores.")
    if not inputs:
        raise DataError("--input names no file: give at least one.")
    for path in inputs:
        check_source(path)
    tokenizer = load_tokenizer(tokenizer_name, eod_token)
    recipe = Recipe(tokenizer, [SourceFile.of(path) for path in inputs], text_key, append_eod)
    reusable = None if overwrite else _find_reusable(output_prefix, recipe)
    if reusable is not None:
        _LOG.info("reusing %s: the same tokenizer and inputs made it", output_prefix)
        return reusable
    dtype = token_dtype(tokenizer.vocab_size)
    _prepare_folder(output_prefix)
    _check_space(inputs, output_prefix, dtype)
    with write_errors(output_prefix):
        return _write(inputs, output_prefix, recipe, dtype, workers, progress)


def _write(
    inputs: Sequence[Path],
    prefix: Path,
    recipe: Recipe,
    dtype: np.dtype[Any],
    workers: int,
    progress: bool | None,
) -> Manifest:
    tokenizer = recipe.tokenizer
    encoder = _Encoder(tokenizer.backend, tokenizer.eod_token_id, recipe.append_eod, dtype)
    documents = itertools.chain.from_iterable(
        read_documents(path, recipe.text_key) for path in inputs
    )
    encoded = _encode_batches(_batches(documents), encoder, workers)
    num_skipped_documents = 0
    max_token_id = 0
    bar = tqdm(unit=" tokens", unit_scale=True, disable=None if progress is None else not progress)
    with ShardWriter(prefix, dtype) as writer, bar:
        for tokens, lengths in encoded:
            start = 0
            for length in lengths:
                if length:
                    writer.add_document(tokens[start : start + length])
                    start += length
                else:
                    num_skipped_documents += 1
            max_token_id = max(max_token_id, int(tokens.max(initial=0)))
            bar.update(len(tokens))
        writer.finish()
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_token_id=tokenizer.eod_token_id,
        special_tokens=tokenizer.special_tokens,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        max_token_id=max_token_id,
        dtype=dtype.name,
        source_files=recipe.sources,
        text_key=recipe.text_key,
        append_eod=recipe.append_eod,
        num_skipped_documents=num_skipped_documents,
    )
    try:
        manifest.write(manifest_path(prefix))
    except BaseException:
        bin_path(prefix).unlink()
        idx_path(prefix).unlink()
        raise
    return manifest


def _find_reusable(prefix: Path, recipe: Recipe) -> Manifest | None:
    """Returns the manifest of existing shards that the recipe gives, None if nothing is there."""
    paths = [bin_path(prefix), idx_path(prefix), manifest_path(prefix)]
    existing = [path for path in paths if path.exists()]
    if not existing:
        return None
    if len(existing) < len(paths):
        raise DataError(
            f"{existing[0]} exists without the files that belong to it: replace it with "
            "--overwrite or choose another --output-prefix."
        )
    manifest = TokenShards.open(prefix).manifest
    difference = recipe.difference_from(manifest) if manifest else "it has no manifest"
    if difference:
        raise DataError(
            f"{prefix} exists and {difference}: replace it with --overwrite or choose another "
            "--output-prefix."
        )
    return manifest


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


def _check_space(inputs: Sequence[Path], prefix: Path, dtype: np.dtype[Any]) -> None:
    text_bytes = sum(
        path.stat().st_size * _TEXT_BYTES_PER_INPUT_BYTE.get(path.suffix.lower(), 1.0)
        for path in inputs
    )
    needed_bytes = int(text_bytes / _TEXT_BYTES_PER_TOKEN * dtype.itemsize)
    free_bytes = shutil.disk_usage(prefix.parent).free
    if free_bytes < needed_bytes:
        raise DataError(
            f"{prefix.parent} has {free_bytes} bytes free and the shards need about "
            f"{needed_bytes} bytes: free space or choose another --output-prefix."
        )


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in documents:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode_batches(
    batches: Iterator[list[str]], encoder: _Encoder, workers: int
) -> Iterator[_EncodedBatch]:
    if workers == 1:
        with _serial_tokenizer():
            yield from map(encoder.encode, batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A forked child would inherit the tokenizer's and torch's threads in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder.backend.to_str(), *encoder[1:]),
    )
    pending: deque[Future[_EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers={workers}: a worker process ended early, most likely for want of memory: "
            "use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _serial_tokenizer() -> Iterator[None]:
    """Keeps the tokenizer to one core, since the number of workers says how many to use."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker(
    serialised: str, eod_token_id: int, append_eod: bool, dtype: np.dtype[Any]
) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    backend = prepare_backend(Tokenizer.from_str(serialised))
    _worker_encoder = _Encoder(backend, eod_token_id, append_eod, dtype)


def _encode_in_worker(texts: list[str]) -> _EncodedBatch:
    if _worker_encoder is None:
        raise RuntimeError("the worker has no tokenizer")
    return _worker_encoder.encode(texts)
