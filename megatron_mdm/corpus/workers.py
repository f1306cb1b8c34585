"""Encoding chunks of a corpus, in this process or over several, in the order of the corpus."""

from __future__ import annotations

import hashlib
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
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_mdm.corpus.encoding import BackendName, BatchEncoder, EncodedBatch, make_encoder
from megatron_mdm.corpus.records import BadRecord, parse_chunk
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.errors import DataError

CHUNKS_IN_FLIGHT_PER_WORKER = 3

Place = TypeVar("Place")


class EncodingJob(NamedTuple):
    """What a process needs to encode chunks, as plain values.

    Attributes:
        serialised: The tokenizer, by `Tokenizer.to_str`.
        backend: The library that encodes.
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
    dtype: str
    eod_token_id: int
    append_eod: bool
    text_key: str
    valid_fraction: float | None
    skip_bad_records: bool


class EncodedSide(NamedTuple):
    """The documents of a chunk that go to one pair of shards.

    Attributes:
        tokens: All tokens in a row, of the shards' type, shape [sum of lengths].
        lengths: The tokens of each document, 1 or more, int32, shape [documents].
        num_skipped_documents: The documents without a token, which are not among them.
        max_token_id: The largest token id, 0 without tokens.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    num_skipped_documents: int
    max_token_id: int


class EncodedChunk(NamedTuple):
    """A chunk, encoded.

    Attributes:
        sides: The documents to train on, and those held out where the corpus is divided.
        bad_records: The records that hold no text.
    """

    sides: list[EncodedSide]
    bad_records: list[BadRecord]


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
            return EncodedChunk([_side(batch)], bad_records)
        held_out = np.fromiter((is_held_out(text, fraction) for text in texts), bool, len(texts))
        return EncodedChunk([_side(batch, ~held_out), _side(batch, held_out)], bad_records)


def is_held_out(text: str, valid_fraction: float) -> bool:
    """Decides by a hash of its text on which side of the division a document falls.

    Args:
        text: The document.
        valid_fraction: The share of documents to hold out, in [0, 1).

    Returns:
        True if the first 8 bytes of BLAKE2b, as a fraction of 2^64, are below the share.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    # Integers compare exactly where 64 bits do not fit a float.
    return int.from_bytes(digest, "big") < valid_fraction * 2.0**64


def encode_chunks(
    chunks: Iterable[tuple[Place, Chunk]], job: EncodingJob, workers: int
) -> Generator[tuple[Place, EncodedChunk], None, None]:
    """Encodes chunks, keeping their order and holding a bounded number in memory.

    Args:
        chunks: What comes back with each, and the chunk.
        job: What to do.
        workers: The processes that encode, 1 or more; 1 stays in this process.

    Yields:
        What came with each chunk, and the chunk encoded, in order.

    Raises:
        DataError: A worker died, or as `ChunkEncoder.encode`.
        EncodingMismatch: As `ChunkEncoder.encode`.
    """
    if workers == 1:
        with _serial_tokenizer():
            encoder = ChunkEncoder(job)
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


def _side(batch: EncodedBatch, chosen: npt.NDArray[np.bool_] | None = None) -> EncodedSide:
    tokens, lengths = batch
    if chosen is not None:
        tokens, lengths = tokens[np.repeat(chosen, lengths)], lengths[chosen]
    kept = lengths[lengths > 0]
    return EncodedSide(tokens, kept, len(lengths) - len(kept), int(tokens.max(initial=0)))


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


_worker_encoder: ChunkEncoder | None = None


def _start_worker(job: EncodingJob) -> None:
    global _worker_encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_encoder = ChunkEncoder(job)


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
