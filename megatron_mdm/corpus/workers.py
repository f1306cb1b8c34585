"""Encoding chunks of a corpus in its order, in the driver or in worker processes."""

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
from typing import TypeVar

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.chunk_reader import ChunkReader, EncodedChunk
from megatron_mdm.corpus.sources import Chunk

CHUNKS_IN_FLIGHT_PER_WORKER = 3

Place = TypeVar("Place")


def encode_chunks(
    chunks: Iterable[tuple[Place, Chunk]], reader: ChunkReader, workers: int
) -> Generator[tuple[Place, EncodedChunk], None, None]:
    """Encodes chunks, keeping their order and holding a bounded number in memory.

    Args:
        chunks: What comes back with each, and the chunk.
        reader: What reads them.
        workers: The processes that encode, 1 or more; 1: the driver itself does.

    Yields:
        What came with each chunk, and the chunk encoded, in order.

    Raises:
        DataError: A worker died, or the documents cannot be used.
        EncodingMismatch: The encoding libraries disagree.
    """
    if workers == 1:
        with _keep_to_one_core():
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

    def take_first() -> tuple[Place, EncodedChunk]:
        place, future = pending.popleft()
        return place, future.result()

    try:
        for place, chunk in chunks:
            with _hold_interrupts():
                pending.append((place, pool.submit(_encode_in_worker, chunk)))
            if len(pending) >= workers * CHUNKS_IN_FLIGHT_PER_WORKER:
                yield take_first()
        while pending:
            yield take_first()
    except BrokenProcessPool as error:
        raise DataError(
            f"--workers={workers}: a worker process ended early, most likely for want of memory: "
            "use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _keep_to_one_core() -> Iterator[None]:
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
def _hold_interrupts() -> Iterator[None]:
    """Lets Ctrl-C wait. Workers that start meanwhile never see it; the driver answers it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_reader: ChunkReader | None = None


def _start_worker(reader: ChunkReader) -> None:
    global _worker_reader
    threading.Thread(target=_end_with_driver, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_reader = reader


def _end_with_driver() -> None:
    """Ends this worker when its driver dies, which otherwise leaves it waiting for work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    if _worker_reader is None:
        raise RuntimeError("the worker was not started")
    return _worker_reader.encode(chunk)
