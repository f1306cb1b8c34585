"""The loader: what its start costs as a corpus grows, and how far it outruns training."""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.config.objective import RunFacts
from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.mixture import SampleOrder
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.diffusion.masked_diffusion import MaskedDiffusionConfig
from megatron_mdm.reporting.run_folder import RunFolder
from megatron_mdm.studies.benchmarks.data_preprocessing import prepare_sources, write_corpus
from megatron_mdm.studies.benchmarks.harness import (
    Measurement,
    interleave,
    run_isolated,
    summarize,
)
from megatron_mdm.studies.benchmarks.settings import DataSettings, check_at_least
from megatron_mdm.studies.steps import REPO

VOCAB_SIZE = 4096
SEQ_LENGTH = 2048
_DOCUMENT_TOKENS = 1000
# Tokens and epochs. For the last two GPTDataset would build gigabytes and half a terabyte.
_COMPARED = [(10**7, 10), (10**8, 10), (10**9, 10)]
_LARGEST = [(10**10, 100), (10**12, 100)]
_BATCH = 64
_MICRO_BATCH = 8
_STEPS = 60
_READS = 20_000
_TRAINING_STEPS = 20


def measure_loader(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures the loader's start at any size, and its rate beside that of training.

    Args:
        folder: An empty folder to work in.
        settings: The corpus, and how often.

    Returns:
        `start`, `reading` and `throughput`.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used.
    """
    throughput = measure_throughput(folder, settings)
    return {
        "start": measure_start(folder, settings.repeats),
        "reading": measure_reading(folder / "shards", settings.repeats),
        "throughput": throughput,
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
        cases: dict[str, Callable[[], Measurement[dict[str, float]]]] = {
            "ours": partial(run_isolated, _start_ours, prefix, epochs)
        }
        if (tokens, epochs) in _COMPARED:
            cases["gpt_dataset"] = partial(run_isolated, _start_gpt_dataset, prefix, epochs)
        measured = interleave(cases, repeats)
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
        cases = {
            name: partial(run_isolated, _read_windows, prefix, seq_length, name)
            for name in ("position", "memory_map")
        }
        runs = interleave(cases, repeats)
        micros = {name: summarize([run.value for run in runs[name]]) for name in cases}
        ratio = micros["position"]["median"] / micros["memory_map"]["median"]
        results[str(seq_length)] = {"microseconds": micros, "position_over_map": round(ratio, 2)}
    return results


def measure_throughput(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures the tokens per second that the loader delivers, with masks, and that training uses.

    Training is the demo's model, `configs/demo.yaml`, on the same shards with the same windows.

    Args:
        folder: An empty folder to work in.
        settings: The corpus, and how often.

    Returns:
        Rates of the loader by window length, the training rate, and their ratio.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used.
    """
    check_at_least(settings, megabytes=1)
    sources, tokenizer = prepare_sources(settings.root, folder)
    corpus = write_corpus(sources, folder / "corpus.jsonl", int(settings.megabytes * 1_000_000))
    prefix = folder / "shards"
    preprocess([corpus.path], str(tokenizer), prefix, PreprocessOptions(workers=settings.workers))
    training = _training_rate(prefix, tokenizer, folder / "run")
    cases = {
        str(seq_length): partial(run_isolated, _deliver, prefix, seq_length)
        for seq_length in (training["seq_length"], SEQ_LENGTH)
    }
    loading = {
        name: summarize([run.value for run in runs])
        for name, runs in interleave(cases, settings.repeats).items()
    }
    rate = loading[str(training["seq_length"])]["median"]
    return {
        "loader_tokens_per_second_by_seq_length": loading,
        "training": training,
        "loader_over_training": round(rate / training["tokens_per_second"], 1),
    }


def write_zero_shards(prefix: Path, num_documents: int, document_tokens: int) -> None:
    """Writes shards of documents of zeros. The tokens take no room on a disk with sparse files.

    Args:
        prefix: The path without extension.
        num_documents: The documents.
        document_tokens: The tokens of each.
    """
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(2 * num_documents * document_tokens)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1)
    with idx_path(prefix).open("wb") as stream:
        stream.write(header)
        stream.write(np.full(num_documents, document_tokens, dtype="<i4").tobytes())
        stream.write((np.arange(num_documents, dtype="<i8") * 2 * document_tokens).tobytes())
        stream.write(np.arange(num_documents + 1, dtype="<i8").tobytes())


def _batches(prefix: Path, seq_length: int, epochs: int) -> TrainingBatches:
    windows = SourceWindows(open_tokens(prefix), seq_length, VOCAB_SIZE)
    visits = epochs * windows.num_windows
    return TrainingBatches(
        [windows],
        SampleOrder([visits], [windows.num_windows], seq_length=seq_length, kind="shuffle", seed=0),
        MaskedDiffusionConfig().build(RunFacts(0, _BATCH, VOCAB_SIZE, VOCAB_SIZE)),
        global_batch_size=_BATCH,
        micro_batch_size=_MICRO_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
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


def _deliver(prefix: Path, seq_length: int) -> float:
    batches = _batches(prefix, seq_length, 100)
    batches.read_step(0)
    started = time.perf_counter()
    for _ in batches.iterate(1, 1 + _STEPS):
        pass
    return _STEPS * _BATCH * seq_length / (time.perf_counter() - started)


def _training_rate(prefix: Path, tokenizer: Path, run_dir: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, REPO / "pretrain/pretrain_mdm.py"),
        *("--config", REPO / "configs/demo.yaml", f"run.dir={run_dir}"),
        *(f"data.tokenizer={tokenizer}", f"data.train=[{{path: {prefix}}}]", "data.valid=[]"),
        *(f"schedule.steps={_TRAINING_STEPS}", "reporting.log_every_steps=1"),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"configs/demo.yaml did not train on {prefix} ({done.stderr.strip()[-200:]}): run it "
            "alone to see why."
        )
    left = RunFolder(run_dir)
    rates = [r["perf/tokens_per_second"] for r in left.records if "perf/tokens_per_second" in r]
    return {
        "parameters": left.run_info["parameters_with_embeddings"],
        "seq_length": left.config["data"]["seq_length"],
        # The first steps warm up.
        "tokens_per_second": round(statistics.median(rates[len(rates) // 4 :]), 1),
    }


def _summarize_start(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "seconds": summarize([run["seconds"] for run in runs]),
        "megabytes": summarize([run["bytes"] / 1e6 for run in runs]),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
