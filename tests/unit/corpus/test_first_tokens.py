"""The first tokens of a stream held out and the next ones trained on, as public benchmarks do."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preprocess_helpers import documents_of, encode_alone, files, names, preprocess, write_jsonl

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus.job import Job
from megatron_mdm.data.export import export_tokens
from megatron_mdm.data.subset import make_subset
from megatron_mdm.data.windows import SourceWindows

TEXTS = [f"def f{n}():\n    return {n * n}\n" * (1 + n % 5) for n in range(60)]


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
    return path


def mark(tokenizer, text):
    """A document with the mark before it."""
    *ids, end = encode_alone(tokenizer, text)
    return [end, *ids]


def test_first_tokens_are_held_out_and_the_next_are_trained_on(parquet, tokenizer, tmp_path):
    whole = tmp_path / "whole"
    manifest = preprocess([parquet], tokenizer, whole, eod_first=True)
    assert (manifest.prepend_eod, manifest.append_eod) == (True, False)
    marked = [mark(tokenizer, text) for text in TEXTS]
    assert documents_of(whole) == marked
    # What a loop over the documents gives: the rest of one that is cut is in neither part.
    sides, rest = [], iter(marked)
    for budget in (101, 700):
        taken: list[list[int]] = []
        while sum(map(len, taken)) < budget:
            taken.append(next(rest)[: budget - sum(map(len, taken))])
        sides.append(taken)
    valid = make_subset(whole, tmp_path / "valid", 101, None)
    train = make_subset(whole, tmp_path / "train", 700, None, num_skipped_tokens=101)
    for side, store in zip(sides, (valid, train), strict=True):
        stream = [token for document in side for token in document]
        assert store.read(0, store.num_tokens).tolist() == stream
        assert store.document_lengths.tolist() == [len(document) for document in side]
        told = export_tokens(store.prefix, tmp_path / "out.bin", "nanogpt", overwrite=True)
        assert (told.prepend_eod, told.append_eod) == (True, False)
        raw = np.fromfile(tmp_path / "out.bin", np.uint16)
        assert raw.tolist() == stream
        # Text produces no mark, so the file alone says where documents begin.
        begins = np.cumsum([0, *map(len, side[:-1])])
        assert np.flatnonzero(raw == 0).tolist() == begins.tolist()
        windows = SourceWindows(store, 9, 280)
        cut = np.reshape(stream[: len(stream) // 9 * 9], (-1, 9))
        read = [windows.read(number).tolist() for number in range(windows.num_windows)]
        assert read == cut.tolist()
    with pytest.raises(DataError, match="no manifest that names an end-of-document token"):
        SourceWindows(train, 9, 280, by_document=True)
    shuffled = SourceWindows(train, 9, 280, shuffles_documents=True)
    assert shuffled.num_windows == 700 // 9


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_stops_when_there_are_enough_tokens(tokenizer, tmp_path, monkeypatch, workers):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 200)
    whole = tmp_path / "whole"
    preprocess([source], tokenizer, whole)
    everything = documents_of(whole)
    prefix = tmp_path / "out" / "p"
    made = preprocess([source], tokenizer, prefix, max_tokens=300, workers=workers)
    taken = documents_of(prefix)
    assert taken == everything[: len(taken)]
    # To the end of a block, of which this one has five documents at most.
    assert sum(map(len, taken[:-5])) < 300 <= made.num_tokens < sum(map(len, everything))
    assert preprocess([source], tokenizer, prefix, max_tokens=300) == made
    with pytest.raises(DataError, match="it has max_tokens=300, not None"):
        preprocess([source], tokenizer, prefix)
    # More than there is: all of it.
    other = tmp_path / "other"
    preprocess([source], tokenizer, other, max_tokens=10**6)
    assert files(other)[:2] == files(whole)[:2]


def test_a_job_that_had_enough_reads_no_more_when_it_goes_on(tokenizer, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 200)
    expected = tmp_path / "expected"
    preprocess([source], tokenizer, expected, max_tokens=300)
    prefix = tmp_path / "out" / "p"

    def fail(self, shards):
        append_all(self, shards)
        raise KeyboardInterrupt

    append_all = Job._append_all
    monkeypatch.setattr(Job, "_append_all", fail)
    with pytest.raises(KeyboardInterrupt):
        preprocess([source], tokenizer, prefix, max_tokens=300)
    assert names(prefix) == ["p.partial"]
    monkeypatch.setattr(Job, "_append_all", append_all)
    preprocess([source], tokenizer, prefix, max_tokens=300, resume=True)
    assert files(prefix) == files(expected)


def test_options_of_text_are_refused_where_they_have_no_meaning(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [5, 6, 0]}\n')
    tokens = tmp_path / "tokens.bin"
    np.array([5, 6, 0], np.uint16).tofile(tokens)
    for option in ({"eod_first": True}, {"max_tokens": 5}):
        name = "--" + next(iter(option)).replace("_", "-")
        with pytest.raises(DataError, match=f"{name} is for text and the input is tokens"):
            preprocess([rows], tokenizer, tmp_path / "p", ids_key="input_ids", **option)
        with pytest.raises(DataError, match=f"{name} is for text and the input is tokens"):
            preprocess([tokens], tokenizer, tmp_path / "p", **option)
    with pytest.raises(DataError, match="--max-tokens=0 has to be at least 1"):
        preprocess([rows], tokenizer, tmp_path / "p", max_tokens=0)
    with pytest.raises(DataError, match="--max-tokens counts those of one job"):
        preprocess([rows], tokenizer, tmp_path / "p", max_tokens=5, task=(0, 2))
