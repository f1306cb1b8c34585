"""Corpora that are tokens already: indexed, copied and read from rows, beside `cp`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.data.shards import bin_path
from megatron_mdm.data.source import split_range
from megatron_mdm.data.store import TokenStore, open_tokens
from megatron_mdm.studies.benchmarks.data_preprocessing import prepare_sources, write_corpus
from megatron_mdm.studies.benchmarks.harness import (
    Measurement,
    interleave,
    run_isolated,
    summarize,
)
from megatron_mdm.studies.benchmarks.settings import DataSettings, check_at_least

_BYTES_PER_MEGABYTE = 1_000_000
# So much text is encoded; its tokens are repeated up to the size wanted.
_TEXT_BYTES = 20_000_000
_ROWS_OF_A_GROUP = 10_000


def measure_token_corpora(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Times what is done with a file of tokens, beside copying it with `cp`.

    The file is nanoGPT's: uint16 without a header, the tokens of Python sources. `cp` is measured
    as it is, which leaves the copy in memory, and with the copy brought to the disk, as the shards
    are.

    Args:
        folder: An empty folder to work in.
        settings: The corpus, and how often.

    Returns:
        For each case the seconds and rates, and those of the shards over the two of `cp`.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used, or a copy differs.
    """
    check_at_least(settings, megabytes=0.1)
    size_bytes = int(settings.megabytes * _BYTES_PER_MEGABYTE)
    tokenizer, tokens, rows = _write_corpora(settings.root, folder, size_bytes)
    target = folder / "cp.bin"
    read = partial(_read, tokenizer=tokenizer)
    from_rows = {"ids_key": "input_ids", "workers": settings.workers}
    cases: dict[str, Callable[[], Measurement[int]]] = {
        "cp": partial(run_isolated, _cp, tokens, target, False),
        "cp_to_disk": partial(run_isolated, _cp, tokens, target, True),
        "indexed": partial(run_isolated, read, tokens, folder / "indexed", {}),
        "copied": partial(run_isolated, read, tokens, folder / "copied", {"copy": True}),
        "parquet": partial(run_isolated, read, rows, folder / "rows", from_rows),
    }
    measurements = interleave(cases, settings.repeats)
    _check_equal(tokens, folder)
    size_bytes = tokens.stat().st_size
    results = {name: _summarize(runs, size_bytes) for name, runs in measurements.items()}
    rate = {name: result["megabytes_per_second"] for name, result in results.items()}
    return {
        "tokens_bytes": size_bytes,
        "cases": results,
        "rate_over_cp": {
            name: {base: round(rate[name] / rate[base], 3) for base in ("cp", "cp_to_disk")}
            for name in ("indexed", "copied", "parquet")
        },
    }


def _write_corpora(root: Path, folder: Path, size_bytes: int) -> tuple[Path, Path, Path]:
    """Writes a file of tokens and the same as parquet; returns them after the tokenizer."""
    sources, tokenizer = prepare_sources(root, folder)
    corpus = write_corpus(sources, folder / "corpus.jsonl", min(_TEXT_BYTES, 4 * size_bytes))
    preprocess(
        [corpus.path], str(tokenizer), folder / "text", PreprocessOptions(workers=2, progress=False)
    )
    shards = open_tokens(folder / "text")
    repeats = max(1, size_bytes // (shards.num_tokens * shards.dtype.itemsize))
    tokens, rows = folder / "tokens.bin", folder / "tokens.parquet"
    content = bin_path(folder / "text").read_bytes()
    with tokens.open("wb") as stream:
        for _ in range(repeats):
            stream.write(content)
    with pq.ParquetWriter(rows, pa.schema({"input_ids": pa.list_(pa.uint16())})) as writer:
        for table in _tables(shards, repeats):
            writer.write_table(table)
    return tokenizer, tokens, rows


def _tables(shards: TokenStore, repeats: int) -> Iterator[pa.Table]:
    ends = np.concatenate([[0], shards.document_lengths.cumsum()])
    for _ in range(repeats):
        for start in range(0, shards.num_documents, _ROWS_OF_A_GROUP):
            offsets = ends[start : start + _ROWS_OF_A_GROUP + 1]
            values = shards.read(int(offsets[0]), int(offsets[-1]))
            column = pa.ListArray.from_arrays(
                (offsets - offsets[0]).astype(np.int32), values.astype(np.uint16)
            )
            yield pa.table({"input_ids": column})


def _cp(source: Path, target: Path, to_disk: bool) -> int:
    subprocess.run(["cp", source, target], check=True)
    if to_disk:
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return source.stat().st_size


def _read(source: Path, prefix: Path, changes: dict[str, Any], *, tokenizer: Path) -> int:
    options = PreprocessOptions(overwrite=True, progress=False, show=0, **changes)
    made = preprocess([source], str(tokenizer), prefix, options)
    return made.manifests[0].num_tokens


def _check_equal(tokens: Path, folder: Path) -> None:
    expected = np.fromfile(tokens, np.uint16)
    for name in ("indexed", "copied", "rows"):
        made = open_tokens(folder / name)
        if made.num_tokens != len(expected) or not all(
            np.array_equal(made.read(start, stop), expected[start:stop])
            for start, stop in split_range(len(expected))
        ):
            raise DataError(
                f"{folder / name} differs from {tokens}: preprocessing has an error, report it."
            )


def _summarize(runs: list[Measurement[int]], size_bytes: int) -> dict[str, Any]:
    seconds = summarize([run.seconds for run in runs])
    return {
        "seconds": seconds,
        "cpu_seconds": summarize([run.cpu_seconds for run in runs]),
        "megabytes_per_second": round(size_bytes / seconds["median"] / _BYTES_PER_MEGABYTE, 1),
        "peak_bytes": max(run.peak_bytes for run in runs),
    }
