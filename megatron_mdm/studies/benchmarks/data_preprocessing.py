"""Preprocessing against the usual pool of processes, and its time and memory as a corpus grows."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, normalizers

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.shards import bin_path, choose_token_dtype, idx_path
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.studies.benchmarks.harness import Measurement, run_in_turn, summarize_times
from megatron_mdm.studies.benchmarks.settings import DataSettings
from megatron_mdm.studies.stdlib_corpus import gather_python_corpus

MIN_DOCUMENT_BYTES = 2_000
MAX_DOCUMENT_BYTES = 20_000
VOCAB_SIZE = 4096
_BYTES_PER_MEGABYTE = 1_000_000
_LINES_PER_TASK = 32
_GROWTH_FACTORS = (0.25, 1.0, 4.0)


class Corpus(NamedTuple):
    """A corpus to preprocess.

    Attributes:
        path: The JSON lines.
        num_documents: The lines.
        num_bytes: Their text as UTF-8.
        num_passes: How often the sources were gone through, each time with other cuts.
    """

    path: Path
    num_documents: int
    num_bytes: int
    num_passes: int


def measure_preprocessing(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Times the usual pool, this project, and this project without its faster encoder.

    All three encode the same documents of 2 to 20 kB with as many processes, and have to write
    equal shards. The usual pool is that of Megatron's own tool: a `multiprocessing.Pool` whose
    processes parse a line and call the tokenizer's `encode` on each document, and a parent that
    writes the documents one by one.

    Args:
        folder: An empty folder to work in.
        settings: The corpus, and how often.

    Returns:
        For each case the seconds and rates, the corpus, and the ratios of the medians.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used, or the shards differ.
    """
    sources, tokenizer = prepare_sources(settings.root, folder)
    num_bytes = int(settings.megabytes * _BYTES_PER_MEGABYTE)
    corpus = write_corpus(sources, folder / "corpus.jsonl", num_bytes)
    slow_tokenizer = _without_translation(tokenizer, folder / "tokenizer-plain")
    ways = {
        "pool": (_run_pool, tokenizer),
        "preprocess": (_run, tokenizer),
        "preprocess_tokenizers": (_run, slow_tokenizer),
    }
    cases = {
        name: (run, corpus.path, chosen, folder / name, settings.workers)
        for name, (run, chosen) in ways.items()
    }
    measurements = run_in_turn(cases, settings.repeats)
    _check_equal([folder / name for name in ways])
    results = {name: _summarize(runs, corpus) for name, runs in measurements.items()}
    ours = ("preprocess", "preprocess_tokenizers")
    pool = results["pool"]
    return {
        "corpus": _describe(corpus),
        "vocab_size": VOCAB_SIZE,
        "cases": results,
        "documents_per_second_over_pool": {
            name: round(results[name]["documents_per_second"] / pool["documents_per_second"], 3)
            for name in ours
        },
        "pool_cpu_seconds_over": {
            name: round(pool["cpu_seconds"]["median"] / results[name]["cpu_seconds"]["median"], 3)
            for name in ours
        },
        "equal_shards": True,
    }


def measure_growth(folder: Path, settings: DataSettings) -> dict[str, Any]:
    """Measures time and peak memory at a quarter of a corpus' size, at its size, and at four times.

    Args:
        folder: An empty folder to work in.
        settings: The corpus, and how often.

    Returns:
        For each size the seconds, the rates, and the peak memory of the parent and of its
        largest child process in bytes.

    Raises:
        ConfigError: An argument is out of range.
        DataError: The sources cannot be used.
    """
    sources, tokenizer = prepare_sources(settings.root, folder)
    corpora = {}
    for factor in _GROWTH_FACTORS:
        size_bytes = int(factor * settings.megabytes * _BYTES_PER_MEGABYTE)
        path = folder / f"corpus-{size_bytes}.jsonl"
        corpora[path.stem] = write_corpus(sources, path, size_bytes)
    cases = {
        name: (_run, corpus.path, tokenizer, folder / name, settings.workers)
        for name, corpus in corpora.items()
    }
    sizes = []
    for name, runs in run_in_turn(cases, settings.repeats).items():
        peaks = {
            "peak_bytes": max(run.peak_bytes for run in runs),
            "child_peak_bytes": max(run.child_peak_bytes for run in runs),
        }
        sizes.append({**_describe(corpora[name]), **_summarize(runs, corpora[name]), **peaks})
    return {"vocab_size": VOCAB_SIZE, "sizes": sizes}


def prepare_sources(root: Path, folder: Path) -> tuple[Path, Path]:
    """Gathers texts and trains a tokenizer of 4,096 entries on them, as the demo does.

    Args:
        root: The folder whose Python sources are the texts.
        folder: An empty folder to write to.

    Returns:
        The JSON lines with the texts, and the tokenizer's folder.

    Raises:
        DataError: The sources cannot be used.
    """
    gather_python_corpus(root, folder / "sources", valid_fraction=0.0)
    sources = folder / "sources" / "train.jsonl"
    with sources.open(encoding="utf-8") as stream:
        texts = (json.loads(line)["text"] for line in stream)
        save_tokenizer(train_byte_level_bpe(texts, VOCAB_SIZE), folder / "tokenizer")
    return sources, folder / "tokenizer"


def write_corpus(sources: Path, path: Path, num_bytes: int) -> Corpus:
    """Writes documents of 2 to 20 kB, cut out of longer texts at the ends of lines.

    Args:
        sources: JSON lines with the texts.
        path: The JSON lines to write.
        num_bytes: How much text to write at least. Where the sources hold less, they are gone
            through again with other cuts.

    Returns:
        What was written.

    Raises:
        DataError: No text is long enough to cut a document from.
    """
    num_documents = written_bytes = num_passes = 0
    with path.open("w", encoding="utf-8") as stream:
        while written_bytes < num_bytes:
            before = num_documents
            generator = random.Random(num_passes)
            for document in _cut(sources, generator):
                stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                num_documents += 1
                written_bytes += len(document.encode("utf-8"))
                if written_bytes >= num_bytes:
                    break
            if num_documents == before:
                raise DataError(
                    f"--root holds no Python source of {MIN_DOCUMENT_BYTES} bytes or more: give a "
                    "folder with longer ones."
                )
            num_passes += 1
    return Corpus(path, num_documents, written_bytes, num_passes)


def _cut(sources: Path, generator: random.Random) -> Iterator[str]:
    with sources.open(encoding="utf-8") as stream:
        for line in stream:
            parts: list[str] = []
            size_bytes = 0
            limit_bytes = generator.randint(MIN_DOCUMENT_BYTES, MAX_DOCUMENT_BYTES)
            for part in json.loads(line)["text"].splitlines(keepends=True):
                part_bytes = len(part.encode("utf-8"))
                if size_bytes + part_bytes > limit_bytes:
                    if size_bytes >= MIN_DOCUMENT_BYTES:
                        yield "".join(parts)
                    parts, size_bytes = [], 0
                    limit_bytes = generator.randint(MIN_DOCUMENT_BYTES, MAX_DOCUMENT_BYTES)
                if part_bytes <= limit_bytes:
                    parts.append(part)
                    size_bytes += part_bytes
            if size_bytes >= MIN_DOCUMENT_BYTES:
                yield "".join(parts)


def _without_translation(tokenizer: Path, folder: Path) -> Path:
    """Copies a tokenizer so that it encodes alike and is not taken over to tiktoken."""
    copied = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    copied.normalizer = normalizers.Sequence([])
    save_tokenizer(copied, folder)
    return folder


def _run(source: Path, tokenizer: Path, prefix: Path, workers: int) -> tuple[str, int]:
    """Preprocesses as the tool does; returns the encoding library and the number of tokens."""
    options = PreprocessOptions(workers=workers, overwrite=True, progress=False)
    made = preprocess([source], str(tokenizer), prefix, options)
    return str(made.backend), made.manifests[0].num_tokens


_pool_tokenizer: Tokenizer | None = None


def _start_pool_process(tokenizer: Path) -> None:
    global _pool_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _pool_tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    _pool_tokenizer.encode_special_tokens = True


def _encode_json_line(line: bytes) -> list[int]:
    if _pool_tokenizer is None:
        raise RuntimeError("the process has no tokenizer")
    ids: list[int] = _pool_tokenizer.encode(json.loads(line)["text"]).ids
    if ids:
        ids.append(0)
    return ids


def _run_pool(source: Path, tokenizer: Path, prefix: Path, workers: int) -> tuple[str, int]:
    """Preprocesses in the usual way; returns the encoding library and the number of tokens."""
    with (
        source.open("rb") as lines,
        multiprocessing.Pool(workers, _start_pool_process, (tokenizer,)) as pool,
        ShardWriter(prefix, choose_token_dtype(VOCAB_SIZE)) as writer,
    ):
        for ids in pool.imap(_encode_json_line, lines, chunksize=_LINES_PER_TASK):
            if ids:
                writer.add_document(ids)
        writer.finish()
        return "tokenizers", writer.num_tokens


def _check_equal(prefixes: list[Path]) -> None:
    first, *others = prefixes
    for other in others:
        for name in (bin_path, idx_path):
            if not filecmp.cmp(name(first), name(other), shallow=False):
                raise DataError(
                    f"{name(other)} differs from {name(first)}, which the usual pool made: "
                    "preprocessing has an error, report it."
                )


def _describe(corpus: Corpus) -> dict[str, Any]:
    return {
        "documents": corpus.num_documents,
        "text_bytes": corpus.num_bytes,
        "passes_over_sources": corpus.num_passes,
    }


def _summarize(runs: list[Measurement[tuple[str, int]]], corpus: Corpus) -> dict[str, Any]:
    seconds = statistics.median(run.seconds for run in runs)
    (backend, num_tokens) = runs[0].value
    return {
        "backend": backend,
        **summarize_times(runs),
        "documents_per_second": round(corpus.num_documents / seconds, 1),
        "tokens_per_second": round(num_tokens / seconds),
        "megabytes_per_second": round(corpus.num_bytes / seconds / _BYTES_PER_MEGABYTE, 2),
    }
