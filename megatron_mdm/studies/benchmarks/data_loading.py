"""The loader: what its start costs as a corpus grows, and how fast it feeds training."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.config.objective import RunFacts
from megatron_mdm.data.loader import Allocate, TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.order import OrderKind
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.data.writer import write_index
from megatron_mdm.diffusion.masked_diffusion import MaskedDiffusionConfig
from megatron_mdm.distributed.host_memory import choose_allocator
from megatron_mdm.studies.benchmarks.data_preprocessing import (
    measure_growth,
    measure_preprocessing,
)
from megatron_mdm.studies.benchmarks.devices import choose_device
from megatron_mdm.studies.benchmarks.harness import interleave, run_in_turn, summarize
from megatron_mdm.studies.benchmarks.settings import DataSettings
from megatron_mdm.studies.benchmarks.token_corpora import measure_token_corpora

VOCAB_SIZE = 4096
SEQ_LENGTH = 2048
_DOCUMENT_TOKENS = 1000
# Tokens and epochs. For the last two GPTDataset would build gigabytes and half a terabyte.
_COMPARED = [(10**7, 10), (10**8, 10), (10**9, 10)]
_LARGEST = [(10**10, 100), (10**12, 100)]
_BATCH = 64
_MICRO_BATCH = 8
_STEPS, _WARM_UP_STEPS = 60, 8
_READS = 20_000
_RANDOM_TOKENS = 10**7
_FEED_LENGTHS, _FEED_THREADS = (256, SEQ_LENGTH), (1, 2, 4)
_ORDERS: tuple[OrderKind, ...] = ("shuffle", "documents")
_ORDERED_DOCUMENTS = (10**4, 10**6, 10**8)


def measure_data(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures the parts that are asked for, each in a folder of its own.

    Args:
        folder: An empty folder to work in.
        settings: Which part, the corpus, and how often.

    Returns:
        What each part found, by name.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used.
    """
    parts = {
        "preprocess": measure_preprocessing,
        "growth": measure_growth,
        "tokens": measure_token_corpora,
        "loader": measure_loader,
        "feed": measure_feed,
        "order": measure_order,
    }
    results = {}
    for part, measure in parts.items():
        if settings.part in (part, "all"):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                results[part] = measure(Path(own), settings)
    return results


def measure_loader(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures the loader's start at any size, and reading by position.

    Args:
        folder: An empty folder to work in.
        settings: How often.

    Returns:
        `start` and `reading`.
    """
    prefix = _write_random_shards(folder)
    return {
        "start": measure_start(folder, settings.repeats),
        "reading": measure_reading(prefix, settings.repeats),
    }


def measure_start(folder: Path, repeats: int) -> dict[str, Any]:
    """Measures the way from shards on disk to the first batch, beside Megatron-Core's GPTDataset.

    The shards are synthetic: documents of 1,000 zero tokens in a sparse file; above 1e9 tokens
    documents of two billion, the most that an index counts in one, to keep the index small.

    Args:
        folder: An empty folder to work in.
        repeats: The runs of each case, in turn.

    Returns:
        For each size the seconds and the memory that the start added, for both where GPTDataset
        was tried.
    """
    sizes = []
    for tokens, epochs in _COMPARED + _LARGEST:
        prefix = folder / f"{tokens}"
        length = _DOCUMENT_TOKENS if (tokens, epochs) in _COMPARED else min(tokens, 2 * 10**9)
        write_zero_shards(prefix, tokens // length, length)
        cases = {"ours": (_start_ours, prefix, epochs)}
        if (tokens, epochs) in _COMPARED:
            cases["gpt_dataset"] = (_start_gpt_dataset, prefix, epochs)
        measured = run_in_turn(cases, repeats)
        sizes.append(
            {"tokens": tokens, "epochs": epochs, "documents": tokens // length}
            | {
                name: _summarize_start([run.value for run in runs])
                for name, runs in measured.items()
            }
        )
    return {"seq_length": SEQ_LENGTH, "sizes": sizes}


def measure_reading(prefix: Path, repeats: int) -> dict[str, Any]:
    """Measures reading windows by position against slices of a memory map, page cache warm.

    Args:
        prefix: Shards of at least 8,192 tokens.
        repeats: The runs of each case, in turn.

    Returns:
        Microseconds a window for both, and their ratio, by window length.
    """
    results: dict[str, Any] = {}
    for seq_length in (256, 2048, 8192):
        kinds = ("position", "memory_map")
        runs = run_in_turn(
            {kind: (_read_windows, prefix, seq_length, kind) for kind in kinds}, repeats
        )
        micros = {kind: summarize([run.value for run in runs[kind]]) for kind in kinds}
        ratio = micros["position"]["median"] / micros["memory_map"]["median"]
        results[str(seq_length)] = {"microseconds": micros, "position_over_map": round(ratio, 2)}
    return results


def measure_feed(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures the tokens per second that the loader delivers, with masks, as training takes them.

    Random tokens, page cache warm; for a GPU in page-locked memory.

    Args:
        folder: An empty folder to work in.
        settings: The device, and how often.

    Returns:
        Rates by window length and number of reader threads, `data.reader_threads`.

    Raises:
        ConfigError: There is no GPU where one is asked for.
    """
    allocate = choose_allocator(choose_device(settings.device))
    prefix = _write_random_shards(folder)
    cases = {
        (length, threads): partial(_deliver, prefix, length, threads, allocate)
        for length in _FEED_LENGTHS
        for threads in _FEED_THREADS
    }
    rates = interleave(cases, settings.repeats)
    return {
        "tokens_per_second_by_seq_length_and_threads": {
            str(length): {
                str(threads): summarize(rates[length, threads]) for threads in _FEED_THREADS
            }
            for length in _FEED_LENGTHS
        }
    }


def measure_order(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures what it costs to shuffle documents in each pass instead of windows alone.

    Documents of 1,000 zero tokens in a sparse file, page cache warm, masks included; time of the
    CPU, for one thread reads.

    Args:
        folder: An empty folder to work in.
        settings: How often.

    Returns:
        For each number of documents and each `data.order` the CPU seconds to the first batch of a
        pass, the memory that it added without pages of files, and the CPU milliseconds of a later
        batch.
    """
    sizes = []
    for documents in _ORDERED_DOCUMENTS:
        prefix = folder / f"{documents}"
        write_zero_shards(prefix, documents, _DOCUMENT_TOKENS)
        runs = run_in_turn(
            {kind: (_read_in_order, prefix, kind) for kind in _ORDERS}, settings.repeats
        )
        found: dict[str, Any] = {"num_documents": documents}
        for kind, measured in runs.items():
            names = measured[0].value
            found[kind] = {name: summarize([run.value[name] for run in measured]) for name in names}
        sizes.append(found)
    return {"seq_length": SEQ_LENGTH, "batch": _BATCH, "sizes": sizes}


def _write_random_shards(folder: Path) -> Path:
    prefix = folder / "random"
    write_zero_shards(prefix, _RANDOM_TOKENS // _DOCUMENT_TOKENS, _DOCUMENT_TOKENS)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, _RANDOM_TOKENS, dtype=np.uint16)
    tokens.tofile(bin_path(prefix))
    return prefix


def write_zero_shards(prefix: Path, num_documents: int, document_tokens: int) -> None:
    """Writes shards of documents of zeros. The tokens take no room on a disk with sparse files.

    Args:
        prefix: The path without extension.
        num_documents: The documents.
        document_tokens: The tokens of each.
    """
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(2 * num_documents * document_tokens)
    lengths = Path(f"{prefix}.lengths")
    np.full(num_documents, document_tokens, dtype="<i4").tofile(lengths)
    write_index(idx_path(prefix), lengths, num_documents, np.uint16)


def _batches(
    prefix: Path,
    seq_length: int,
    epochs: int,
    allocate: Allocate = np.empty,
    kind: OrderKind = "shuffle",
) -> TrainingBatches:
    shuffles = kind == "documents"
    windows = SourceWindows(
        open_tokens(prefix), seq_length, VOCAB_SIZE, shuffles_documents=shuffles
    )
    visits = epochs * windows.num_windows
    return TrainingBatches(
        [windows],
        SampleOrder([visits], [windows.num_windows], seq_length=seq_length, kind=kind, seed=0),
        MaskedDiffusionConfig().build(RunFacts(0, _BATCH, VOCAB_SIZE, VOCAB_SIZE)),
        global_batch_size=_BATCH,
        micro_batch_size=_MICRO_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
        allocate=allocate,
    )


def _read_windows(prefix: Path, seq_length: int, kind: str) -> float:
    shards = open_tokens(prefix)
    tokens = np.memmap(bin_path(prefix), dtype=shards.dtype, mode="r")
    starts = np.random.default_rng(0).integers(0, shards.num_tokens - seq_length, _READS).tolist()

    # Both give a new array of int64, as the loader wants it.
    def read(start: int) -> None:
        if kind == "position":
            shards.read(start, start + seq_length)
        else:
            tokens[start : start + seq_length].astype(np.int64)

    for start in starts[: _READS // 4]:
        read(start)
    started = time.perf_counter()
    for start in starts:
        read(start)
    return 1e6 * (time.perf_counter() - started) / _READS


def _start_ours(prefix: Path, epochs: int) -> dict[str, float]:
    before, started = _resident_bytes(), time.perf_counter()
    batches = _batches(prefix, SEQ_LENGTH, epochs)
    batches.read_step(0)
    return {
        "seconds": time.perf_counter() - started,
        "bytes": _resident_bytes() - before,
    }


def _read_in_order(prefix: Path, kind: OrderKind) -> dict[str, float]:
    before, started = _private_bytes(), time.process_time()
    batches = _batches(prefix, SEQ_LENGTH, 10, kind=kind)
    batches.read_step(0)
    found = {
        "cpu_seconds_to_first_batch": time.process_time() - started,
        "megabytes": (_private_bytes() - before) / 1e6,
    }
    for step in range(1, _WARM_UP_STEPS):
        batches.read_step(step)
    started = time.process_time()
    for step in range(_WARM_UP_STEPS, _WARM_UP_STEPS + _STEPS):
        batches.read_step(step)
    seconds = time.process_time() - started
    return found | {"cpu_milliseconds_a_batch": 1e3 * seconds / _STEPS}


def _start_gpt_dataset(prefix: Path, epochs: int) -> dict[str, float]:
    # Imported here: the timed part starts after it, and nothing else here needs Megatron.
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod = 0
        vocab_size = VOCAB_SIZE
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - the attribute Megatron reads

    before, started = _resident_bytes(), time.perf_counter()
    indexed = IndexedDataset(str(prefix))
    windows = os.path.getsize(bin_path(prefix)) // 2 // SEQ_LENGTH
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LENGTH,
        split="1",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=None,
    )
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), documents, epochs * windows, Split.train, config)
    dataset[0]
    return {
        "seconds": time.perf_counter() - started,
        "bytes": _resident_bytes() - before,
    }


def _deliver(
    prefix: Path, seq_length: int, threads: int = 1, allocate: Allocate = np.empty
) -> float:
    batches = _batches(prefix, seq_length, 100, allocate)
    # Page-locked memory is slow to get, and used again: as many steps as wait at a time get it.
    for _ in batches.iterate(0, _WARM_UP_STEPS, threads=threads):
        pass
    started = time.perf_counter()
    for _ in batches.iterate(_WARM_UP_STEPS, _WARM_UP_STEPS + _STEPS, threads=threads):
        pass
    return _STEPS * _BATCH * seq_length / (time.perf_counter() - started)


def _summarize_start(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "seconds": summarize([run["seconds"] for run in runs]),
        "megabytes": summarize([run["bytes"] / 1e6 for run in runs]),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _private_bytes() -> int:
    """What is resident and not pages of files, which the kernel may take back."""
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text("ascii").split()
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")
