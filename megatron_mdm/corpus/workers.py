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
from multiprocessing.connection import wait
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.division import EncodedChunk, divide, is_small_hash
from megatron_mdm.corpus.encoding import BackendName, BatchEncoder, make_encoder
from megatron_mdm.corpus.records import parse_chunk
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.corpus.tiktoken_bpe import TiktokenVocabulary

CHUNKS_IN_FLIGHT_PER_WORKER = 3

Place = TypeVar("Place")


class EncodingJob(NamedTuple):
    """What a process needs to encode chunks, as plain values.

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

    def start(self) -> ChunkEncoder:
        """Makes what reads chunks in this process."""
        return ChunkEncoder(self)


class ChunkReader(Protocol):
    """Makes documents of tokens out of chunks, in one process."""

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Reads a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Its documents and bad records.
        """


class ChunkJob(Protocol):
    """What a process needs to read chunks, as plain values."""

    def start(self) -> ChunkReader:
        """Makes what reads them in this process."""


class ChunkEncoder:
    """Parses and encodes chunks in one process.

    Args:
        job: What to do.
    """

    def __init__(self, job: EncodingJob) -> None:
        self._job = job
        self._encoder: BatchEncoder = make_encoder(
            job.serialised,
            backend=job.backend,
            vocabulary=job.vocabulary,
            dtype=np.dtype(job.dtype),
            eod_token_id=job.eod_token_id,
            append_eod=job.append_eod,
        )

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
        texts, _, bad_records = parse_chunk(chunk, self._job.text_key)
        if bad_records and not self._job.skip_bad_records:
            return EncodedChunk([], bad_records)
        batch = self._encoder.encode_batch(texts)
        fraction = self._job.valid_fraction
        if fraction is None:
            return EncodedChunk(divide(batch, None), bad_records)
        held_out = (is_small_hash(text.encode("utf-8"), fraction) for text in texts)
        return EncodedChunk(divide(batch, np.fromiter(held_out, bool, len(texts))), bad_records)


def encode_chunks(
    chunks: Iterable[tuple[Place, Chunk]], job: ChunkJob, workers: int
) -> Generator[tuple[Place, EncodedChunk], None, None]:
    """Encodes chunks, keeping their order and holding a bounded number in memory.

    Args:
        chunks: What comes back with each, and the chunk.
        job: What to do.
        workers: The processes that encode, 1 or more; 1 stays in this process.

    Yields:
        What came with each chunk, and the chunk encoded, in order.

    Raises:
        DataError: A worker died, or the documents cannot be used.
        EncodingMismatch: As `ChunkEncoder.encode`.
    """
    if workers == 1:
        with _serial_tokenizer():
            encoder = job.start()
            for place, chunk in chunks:
                yield place, encoder.encode(chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A forked child would inherit the tokenizer's and torch's threads in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
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


_worker_encoder: ChunkReader | None = None


def _start_worker(job: ChunkJob) -> None:
    global _worker_encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_encoder = job.start()


def _end_with_parent() -> None:
    """Ends this process when the parent dies, which otherwise leaves it waiting for work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    if _worker_encoder is None:
        raise RuntimeError("the worker has no tokenizer")
    return _worker_encoder.encode(chunk)
