from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.core.errors import DataError, MdmError
from megatron_mdm.studies.benchmarks.commands import run_benchmark
from megatron_mdm.studies.benchmarks.data_preprocessing import (
    MAX_DOCUMENT_BYTES,
    MIN_DOCUMENT_BYTES,
    measure_growth,
    write_corpus,
)
from megatron_mdm.studies.benchmarks.settings import DataSettings
from megatron_mdm.studies.benchmarks.token_corpora import measure_token_corpora

REPOSITORY = Path(__file__).resolve().parents[3]


def write_sources(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def read_documents(path):
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_documents_are_whole_lines_of_the_sources(tmp_path):
    texts = ["".join(f"{k} é line {i}\n" for i in range(4_000)) for k in "ab"]
    texts.append("too short\n")
    texts.append("one long line " * 5_000)
    sources = write_sources(tmp_path / "sources.jsonl", texts)
    corpus = write_corpus(sources, tmp_path / "corpus.jsonl", 400_000)
    documents = read_documents(corpus.path)
    sizes = [len(document.encode()) for document in documents]
    assert all(MIN_DOCUMENT_BYTES <= size <= MAX_DOCUMENT_BYTES for size in sizes)
    assert (len(documents), sum(sizes)) == (corpus.num_documents, corpus.num_bytes)
    assert 400_000 <= corpus.num_bytes < 400_000 + MAX_DOCUMENT_BYTES
    assert all(any(document in text for text in texts) for document in documents)
    assert all(document.endswith("\n") for document in documents)
    # The sources hold about 120 kB, and each pass cuts them elsewhere.
    assert corpus.num_passes >= 3
    assert len(set(documents)) > 0.9 * len(documents)


def test_sources_without_long_texts_are_refused(tmp_path):
    sources = write_sources(tmp_path / "sources.jsonl", ["x = 1\n"] * 500)
    with pytest.raises(DataError, match="no Python source of 2000 bytes or more"):
        write_corpus(sources, tmp_path / "corpus.jsonl", 100)


def run_tool(*arguments):
    command = [sys.executable, REPOSITORY / "tools" / "benchmark.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def small_settings(root):
    return DataSettings(root=Path(root), workers=1, megabytes=0.2, repeats=1)


@pytest.fixture(scope="module")
def root():
    return str(Path(json.__file__).parent)


def test_tool_compares_equal_work(root):
    small = ["--megabytes", "0.2", "--repeats", "1"]
    sizes = {"workers": 2, "megabytes": 0.2, "repeats": 1}
    result = run_tool("data", "--part", "preprocess", "--root", root, *small)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"] == {"part": "preprocess", "root": root, "device": "auto"} | sizes
    part = report["results"]["preprocess"]
    assert part["equal_shards"]
    backends = {name: case["backend"] for name, case in part["cases"].items()}
    assert backends == {
        "pool": "tokenizers",
        "preprocess": "tiktoken",
        "preprocess_tokenizers": "tokenizers",
    }
    for case in part["cases"].values():
        rate = part["corpus"]["documents"] / case["seconds"]["median"]
        assert case["documents_per_second"] == pytest.approx(rate, rel=0.01)


def test_growth_measures_three_sizes(root, tmp_path):
    sizes = measure_growth(tmp_path, small_settings(root))["sizes"]
    texts = [size["text_bytes"] for size in sizes]
    assert [text / 200_000 for text in texts] == pytest.approx([0.25, 1, 4], abs=0.1)
    assert all(size["peak_bytes"] > 1 << 24 for size in sizes)
    assert [size["backend"] for size in sizes] == ["tiktoken"] * 3


def test_tokens_are_measured_beside_cp(root, tmp_path):
    found = measure_token_corpora(tmp_path, small_settings(root))
    assert 0.1e6 < found["tokens_bytes"] < 0.5e6
    assert set(found["cases"]) == {"cp", "cp_to_disk", "indexed", "copied", "parquet"}
    rate = found["cases"]["copied"]["megabytes_per_second"]
    base = found["cases"]["cp"]["megabytes_per_second"]
    # The quotient is written with three decimals: a slow copy comes to 0.033 or so.
    assert found["rate_over_cp"]["copied"]["cp"] == pytest.approx(rate / base, rel=0.01, abs=6e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--workers=0 has to be at least 1"),
        ({"megabytes": 0}, "--megabytes=0 has to be at least 0.1"),
        ({"repeats": -1}, "--repeats=-1 has to be at least 1"),
        ({"root": Path("/nowhere")}, "--root=/nowhere is not a folder"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(MdmError, match=message):
        run_benchmark(DataSettings(**changes))
