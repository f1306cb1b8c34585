from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preprocess_helpers import write_jsonl

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.inputs import open_sources, take_share
from megatron_mdm.corpus.options import PreprocessOptions, find_array_task
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.corpus.records import parse_chunk
from megatron_mdm.data.manifest import Manifest

HEADER_BYTES = 34
TEXTS = [f"text {number} " * (number * number % 11) for number in range(60)]


pytestmark = pytest.mark.usefixtures("quick_choice_of_library")


def texts_of_task(sources, task, num_tasks):
    return [
        text
        for source, span in take_share(sources, task, num_tasks)
        for chunk in source.read_chunks(span, span.start, 1)
        for text in parse_chunk(chunk, "text").texts
    ]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), num_tasks=st.integers(1, 9))
def test_every_record_belongs_to_one_task(tmp_path_factory, data, num_tasks):
    folder = tmp_path_factory.mktemp("shares")
    paths, expected = [], []
    kinds = st.sampled_from(["jsonl", "jsonl", "jsonl", "jsonl.gz", "txt", "parquet"])
    for number, kind in enumerate(data.draw(st.lists(kinds, min_size=1, max_size=4))):
        sizes = data.draw(st.lists(st.integers(0, 120), max_size=12))
        texts = [chr(97 + index % 26) * size for index, size in enumerate(sizes)]
        path = folder / f"{number}.{kind}"
        if kind == "parquet":
            group = data.draw(st.integers(1, 4))
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, group)
        elif kind == "txt":
            texts = ["".join(texts)]
            path.write_text(texts[0])
        else:
            content = write_jsonl(folder / "plain", texts).read_bytes()
            if data.draw(st.booleans()):
                content = content.removesuffix(b"\n")
            path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
        paths.append(path)
        expected += texts
    sources = open_sources(paths)
    found = [texts_of_task(sources, task, num_tasks) for task in range(num_tasks)]
    assert list(itertools.chain(*found)) == expected


def test_saved_datasets_are_cut_between_rows(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "d")
    sources = open_sources([tmp_path / "d"])
    for num_tasks in (1, 2, 7, 60, 61):
        found = [texts_of_task(sources, task, num_tasks) for task in range(num_tasks)]
        assert list(itertools.chain(*found)) == TEXTS
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_tasks_of_lines_are_of_even_size(tmp_path):
    sources = open_sources([write_jsonl(tmp_path / "a.jsonl", ["x" * 50] * 1000)])
    assert {len(texts_of_task(sources, task, 10)) for task in range(10)} <= {99, 100, 101}


def read_lengths(prefix):
    index = Path(f"{prefix}.idx").read_bytes()
    count = int(np.frombuffer(index, "<u8", 1, 18)[0])
    return np.frombuffer(index, "<i4", count, HEADER_BYTES).tolist()


@pytest.mark.parametrize("num_tasks", [2, 5, 30])
def test_parts_in_a_row_are_the_bytes_of_one_job(tokenizer, tmp_path, num_tasks):
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"]
    write_jsonl(inputs[0], TEXTS)
    inputs[1].write_bytes(gzip.compress(inputs[0].read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), inputs[2], row_group_size=5)
    whole = preprocess(inputs, tokenizer, tmp_path / "p", PreprocessOptions(valid_fraction=0.3))
    for task in range(num_tasks):
        options = PreprocessOptions(valid_fraction=0.3, task=(task, num_tasks))
        made = preprocess(inputs, tokenizer, tmp_path / "q", options)
        assert preprocess(inputs, tokenizer, tmp_path / "q", options).manifests == made.manifests
    for side, manifest in zip(("", "-valid"), whole.manifests, strict=True):
        names = [f"part-{task:05d}-of-{num_tasks:05d}" for task in range(num_tasks)]
        parts = [tmp_path / f"q{side}.parts" / name for name in names]
        tokens = b"".join(Path(f"{part}.bin").read_bytes() for part in parts)
        assert tokens == (tmp_path / f"p{side}.bin").read_bytes()
        assert list(itertools.chain(*map(read_lengths, parts))) == read_lengths(
            tmp_path / f"p{side}"
        )
        told = [Manifest.read(Path(f"{part}.json")) for part in parts]
        for count in ("num_documents", "num_tokens", "num_skipped_documents"):
            assert sum(getattr(part, count) for part in told) == getattr(manifest, count)
        assert [part.task for part in told] == [(task, num_tasks) for task in range(num_tasks)]
        assert len(list((tmp_path / f"q{side}.parts").iterdir())) == 3 * num_tasks


def test_bad_line_of_a_slice_has_its_number_in_the_file(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + "bad\n")
    options = PreprocessOptions(task=(3, 4))
    with pytest.raises(DataError, match=r"a\.jsonl, line 61 is not valid JSON"):
        preprocess([path], tokenizer, tmp_path / "p", options)


@pytest.mark.parametrize("task", [(-1, 2), (2, 2), (0, 0)])
def test_task_outside_the_array_is_refused(tokenizer, tmp_path, task):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"a task is numbered from 0 and below the number"):
        preprocess([path], tokenizer, tmp_path / "p", PreprocessOptions(task=task))


def test_task_of_a_slurm_array(monkeypatch):
    assert find_array_task(None, None, from_slurm=False) is None
    assert find_array_task(2, 5, from_slurm=False) == (2, 5)
    with pytest.raises(DataError, match="belong together"):
        find_array_task(2, None, from_slurm=False)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "abc")
    with pytest.raises(DataError, match=r"SLURM_ARRAY_TASK_ID=abc, which is not a number: submit"):
        find_array_task(None, 4, from_slurm=True)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(DataError, match=r"--array finds no array job of SLURM"):
        find_array_task(None, None, from_slurm=True)
    for name, value in {"ID": "7", "MIN": "5", "MAX": "8", "COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert find_array_task(None, None, from_slurm=True) == (2, 4)
    assert find_array_task(None, 16, from_slurm=True) == (7, 16)
    with pytest.raises(DataError, match="--array takes the place of --task"):
        find_array_task(2, None, from_slurm=True)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    with pytest.raises(DataError, match="all numbers from 5 to 8 and the array has 2"):
        find_array_task(None, None, from_slurm=True)
