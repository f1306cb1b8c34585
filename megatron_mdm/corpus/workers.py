"""Encoding chunks of a corpus, in this process or over several, in the order of the corpus."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.division import EncodedChunk, divide, is_small_hash
from megatron_mdm.corpus.encoding import BackendName, BatchEncoder, make_encoder
from megatron_mdm.corpus.records import parse_chunk
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.corpus.tiktoken_bpe import TiktokenVocabulary

CHUNKS_IN_FLIGHT_PER_WORKER = 3

Place = TypeVar("Place")


class ChunkReader(Protocol):
    """Makes documents of tokens out of chunks. Pickled to workers, it is plain values."""

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Reads a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Its documents and bad records.
        """


@dataclass(frozen=True)
class TextReader:
    """Parses and encodes chunks of text.

    Attributes:
        serialised: The tokenizer, by `Tokenizer.to_str`.
        backend: The library that encodes.
        vocabulary: The tokenizer translated for tiktoken, so that not every process has to.
        dtype: The numpy name of the shards' type.
        eod_token_id: The id that ends a document.
        append_eod: Whether to end documents with it.
        text_key: The JSON key that holds the text.
        valid_fraction: The share of documents to hold out, None for no division.
        skip_bad_records: Whether a chunk with bad records is encoded without them; otherwise it
            is not encoded.
    """

    serialised: str
    backend: BackendName
    vocabulary: TiktokenVocabulary | None
    dtype: str
    eod_token_id: int
    append_eod: bool
    text_key: str
    valid_fraction: float | None
    skip_bad_records: bool

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Parses and encodes a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Its documents and bad records.

        Raises:
            DataError: A document holds the end-of-document token inside.
            EncodingMismatch: The encoding libraries disagree.
        """
        texts, _, bad_records = parse_chunk(chunk, self.text_key)
        if bad_records and not self.skip_bad_records:
            return EncodedChunk([], bad_records)
        batch, fraction = self._encoder.encode_batch(texts), self.valid_fraction
        if fraction is None:
            return EncodedChunk(divide(batch, None), bad_records)
        held_out = (is_small_hash(text.encode("utf-8"), fraction) for text in texts)
        return EncodedChunk(divide(batch, np.fromiter(held_out, bool, len(texts))), bad_records)

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return make_encoder(
            self.serialised,
            backend=self.backend,
            vocabulary=self.vocabulary,
            dtype=np.dtype(self.dtype),
            eod_token_id=self.eod_token_id,
            append_eod=self.append_eod,
        )


def encode_chunks(
    chunks: Iterable[tuple[Place, Chunk]], reader: ChunkReader, workers: int
) -> Generator[tuple[Place, EncodedChunk], None, None]:
    """Encodes chunks, keeping their order and holding a bounded number in memory.

    Args:
        chunks: What comes back with each, and the chunk.
        reader: What reads them.
        workers: The processes that encode, 1 or more; 1 stays in this process.

    Yields:
        What came with each chunk, and the chunk encoded, in order.

    Raises:
        DataError: A worker died, or the documents cannot be used.
        EncodingMismatch: As `TextReader.encode`.
    """
    if workers == 1:
        with _serial_tokenizer():
            for place, chunk in chunks:
                yield place, reader.encode(chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A forked child would inherit the tokenizer's and torch's threads in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(reader,),
    )
    pending: deque[tuple[Place, Future[EncodedChunk]]] = deque()
    try:
        for place, chunk in chunks:
            with _interrupts_held():
                pending.append((place, pool.submit(_encode_in_worker, chunk)))
            if len(pending) >= workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                yield _result(pending)
        while pending:
            yield _result(pending)
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers={workers}: a worker process ended early, most likely for want of memory: "
            "use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(
    pending: deque[tuple[Place, Future[EncodedChunk]]],
) -> tuple[Place, EncodedChunk]:
    place, future = pending.popleft()
    return place, future.result()


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


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Lets Ctrl-C wait. Processes that start meanwhile never see it, and the parent speaks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_reader: ChunkReader | None = None


def _start_worker(reader: ChunkReader) -> None:
    global _worker_reader
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_reader = reader


def _end_with_parent() -> None:
    """Ends this process when the parent dies, which otherwise leaves it waiting for work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    if _worker_reader is None:
        raise RuntimeError("the worker was not started")
    return _worker_reader.encode(chunk)
