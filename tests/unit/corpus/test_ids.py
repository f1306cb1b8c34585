from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, Features, Sequence, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preprocess_helpers import (
    TEXTS,
    assert_one_error_line,
    documents_of,
    files,
    names,
    preprocess,
    run,
    write_jsonl,
)
from token_examples import EOD, ended, ids_of, text_shards, write_ids

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import tables as tables_module
from megatron_mdm.corpus.sources import HubDataset
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.store import open_tokens


def rows_in(form, folder, documents, key="input_ids"):
    """Writes rows of ids; returns the input."""
    if form.startswith("jsonl"):
        plain = write_ids(folder / "plain.jsonl", documents, key)
        pack = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(form, bytes)
        path = folder / f"a.{form}"
        path.write_bytes(pack(plain.read_bytes()))
        return path
    if form.startswith("parquet"):
        kind = {
            "parquet": pa.list_(pa.int64()),
            "parquet int32": pa.large_list(pa.int32()),
            "parquet uint16": pa.list_(pa.uint16()),
        }[form]
        table = pa.table({"id": range(len(documents)), key: pa.array(documents, kind)})
        pq.write_table(table, folder / "a.parquet", row_group_size=17)
        return folder / "a.parquet"
    data = Dataset.from_dict({key: documents}, Features({key: Sequence(Value("int32"))}))
    data.save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = [
    *("jsonl", "jsonl.gz", "jsonl.zst", "saved"),
    *("parquet", "parquet int32", "parquet uint16"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_ends", [False, True])
def test_rows_of_ids_give_the_bytes_of_their_text(
    form, has_ends, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 300)
    documents = ids_of(tokenizer)
    if has_ends:
        documents = [[*ids, EOD] for ids in documents]
    path = rows_in(form, tmp_path, documents)
    manifest = preprocess([path], tokenizer, prefix, ids_key="input_ids", workers=1)
    expected = text_shards(preprocess, tmp_path, tokenizer)
    assert files(prefix)[:2] == files(expected)[:2]
    assert manifest.num_skipped_documents == TEXTS.count("")
    assert (manifest.ids.key, manifest.ids.split_at_eod) == ("input_ids", False)


def test_hub_data_sets_of_ids_are_streamed(tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_HUB_CHUNK_ROWS", 7)
    (tmp_path / "hub").mkdir()
    rows_in("parquet", tmp_path / "hub", ids_of(tokenizer))
    preprocess(HubDataset(str(tmp_path / "hub")), tokenizer, prefix, ids_key="input_ids")
    assert files(prefix)[:2] == files(text_shards(preprocess, tmp_path, tokenizer))[:2]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_workers_tasks_and_resumes_give_the_bytes_of_one_job(
    form, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 300)
    path = rows_in(form, tmp_path, ids_of(tokenizer))
    options = {"ids_key": "input_ids", "valid_fraction": 0.6, "show": 0}
    preprocess([path], tokenizer, tmp_path / "whole", **options)
    expected = files(tmp_path / "whole")
    preprocess([path], tokenizer, tmp_path / "two", workers=2, **options)
    assert files(tmp_path / "two") == expected
    for task in range(4):
        preprocess([path], tokenizer, prefix, task=(task, 4), **options)
    merge_parts(prefix, copy=True)
    assert files(prefix) == expected


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_padding_is_dropped_where_there_is_an_attention_mask(form, tokenizer, prefix, tmp_path):
    columns = {
        "input_ids": [[9, 5, 6], [9, 9, 9], [7, 8, 9]],
        "attention_mask": [[0, 1, 1], [0, 0, 0], [1, 1, 0]],
    }
    if form == "jsonl":
        path = write_ids(tmp_path / "a.jsonl", columns["input_ids"], **{
            "attention_mask": columns["attention_mask"]
        })  # fmt: skip
    elif form == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path)
    else:
        path = tmp_path / "saved"
        Dataset.from_dict(columns).save_to_disk(path)
    manifest = preprocess([path], tokenizer, prefix, ids_key="input_ids")
    assert documents_of(prefix) == [[5, 6, 0], [7, 8, 0]]
    assert manifest.num_skipped_documents == 1


def windows(documents, length):
    stream = ended(documents)
    return [stream[start : start + length] for start in range(0, len(stream), length)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "saved"])
def test_packed_windows_are_told_of_and_cut_at_the_ends(
    form, tokenizer, prefix, tmp_path, monkeypatch
):
    documents = ids_of(tokenizer)
    path = rows_in(form, tmp_path, windows(documents, 64)[:-1])
    with pytest.raises(
        DataError, match=r"its first \d+ rows all hold 64 ids, with .* inside.* --split-at-eod"
    ):
        preprocess([path], tokenizer, prefix, ids_key="input_ids")
    assert names(prefix) == []
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 300)
    manifest = preprocess([path], tokenizer, prefix, ids_key="input_ids", split_at_eod=True)
    stream = ended(documents)[: len(windows(documents, 64)[:-1]) * 64]
    shards = open_tokens(prefix)
    assert shards.read(0, len(stream)).tolist() == stream
    # The last window cuts a document off, which gets no end that it does not have.
    expected = np.diff([0, *np.flatnonzero(np.array(stream) == EOD) + 1, len(stream)])
    assert shards.document_lengths.tolist() == expected[expected > 0].tolist()
    assert manifest.ids.split_at_eod


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_cutting_packed_windows_goes_on_where_it_was(
    form, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 300)
    from megatron_mdm.corpus import token_sources as module

    path = rows_in(form, tmp_path, windows(ids_of(tokenizer), 16))
    options = {"ids_key": "input_ids", "split_at_eod": True, "valid_fraction": 0.3}
    preprocess([path], tokenizer, tmp_path / "whole", **options)
    original, calls = module._pack_tokens, iter(range(1000))

    def failing(*arguments):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_pack_tokens", failing)
    with pytest.raises(KeyboardInterrupt):
        preprocess([path], tokenizer, prefix, **options)
    monkeypatch.setattr(module, "_pack_tokens", original)
    preprocess([path], tokenizer, prefix, resume=True, **options)
    assert files(prefix) == files(tmp_path / "whole")
    assert files(f"{prefix}-valid") == files(tmp_path / "whole-valid")


def test_files_of_packed_windows_are_one_stream(tokenizer, prefix, tmp_path):
    rows = windows(ids_of(tokenizer), 32)
    paths = [
        write_ids(tmp_path / "a.jsonl", rows[:5]),
        write_ids(tmp_path / "b.jsonl", rows[5:]),
    ]
    preprocess(paths, tokenizer, prefix, ids_key="input_ids", split_at_eod=True)
    assert files(prefix)[:2] == files(text_shards(preprocess, tmp_path, tokenizer))[:2]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_tasks_that_share_packed_windows_give_the_same_stream(form, tokenizer, prefix, tmp_path):
    path = rows_in(form, tmp_path, windows(ids_of(tokenizer), 8))
    options = {"ids_key": "input_ids", "split_at_eod": True, "show": 0}
    for task in range(7):
        preprocess([path], tokenizer, prefix, task=(task, 7), **options)
    merged = merge_parts(prefix, copy=True)
    assert merged.read(0, merged.num_tokens).tolist() == ended(ids_of(tokenizer))


BAD_ROWS = {
    "absent": ({"tokens": [1]}, r" has no key 'input_ids', only tokens: choose one with --ids-key"),
    "null": ({"input_ids": None}, r": input_ids is no list of integers: repair"),
    "text": ({"input_ids": "one"}, r": input_ids is no list of integers: repair"),
    "float": ({"input_ids": [1.5]}, r": input_ids is no list of integers: repair"),
    "nested": ({"input_ids": [[1], [2]]}, r": input_ids is no list of integers: repair"),
    "ragged": ({"input_ids": [1, [2]]}, r": input_ids is no list of integers: repair"),
    "huge": ({"input_ids": [10**30]}, r": input_ids is no list of integers: repair"),
    "negative": ({"input_ids": [5, -1]}, r" holds the id -1 at place 1 of 2, and the tokenizer's"),
    "large": ({"input_ids": [280]}, r" holds the id 280 at place 0 of 1, and the tokenizer's"),
    "end": ({"input_ids": [5, 0, 6]}, r" holds the end-of-document id 0 inside, at place 1 of 3"),
    "mask": (
        {"input_ids": [5, 6], "attention_mask": [1]},
        r": attention_mask is no list of 2 numbers as input_ids is",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(name, tokenizer, prefix, tmp_path):
    row, said = BAD_ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in ({"input_ids": [5]}, row, {"input_ids": [6, 7]}))
    )
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2{said}") as caught:
        preprocess([path], tokenizer, prefix, ids_key="input_ids")
    assert "\n" not in str(caught.value)
    manifest = preprocess([path], tokenizer, prefix, ids_key="input_ids", on_error="skip")
    assert manifest.num_bad_records == 1
    assert documents_of(prefix) == [[5, 0], [6, 7, 0]]


@pytest.mark.parametrize("bad", [None, [5, None], [5, 280], [5, 0, 6]])
def test_a_bad_row_of_a_table_is_named_or_left_out(bad, tokenizer, prefix, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ids": pa.array([[5], bad, [6, 7]], pa.list_(pa.int32()))}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2"):
        preprocess([path], tokenizer, prefix, ids_key="ids")
    manifest = preprocess([path], tokenizer, prefix, ids_key="ids", on_error="skip")
    assert manifest.num_bad_records == 1
    assert documents_of(prefix) == [[5, 0], [6, 7, 0]]


def test_columns_that_hold_no_ids_are_named(tokenizer, prefix, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "ids": [[1]]}), path)
    with pytest.raises(DataError, match=r"the column 'text' holds string and ids are lists of int"):
        preprocess([path], tokenizer, prefix, ids_key="text")
    with pytest.raises(
        DataError, match=r"no column 'x', only text, ids: choose one with --ids-key"
    ):
        preprocess([path], tokenizer, prefix, ids_key="x")
    with pytest.raises(DataError, match=r"no column 'x', only .*, or a column of token ids with"):
        preprocess([path], tokenizer, prefix, text_key="x")


def test_text_that_is_missing_beside_ids_names_the_way(tokenizer, prefix, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n")
    with pytest.raises(DataError, match=r"if input_ids holds token ids, give --ids-key input_ids"):
        preprocess([path], tokenizer, prefix)


def test_a_record_of_many_keys_fits_a_screen(tokenizer, prefix, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"key{number}": number for number in range(3000)}) + "\n")
    with pytest.raises(DataError, match=r"no key 'text', only key0, .* and 2990 more") as caught:
        preprocess([path], tokenizer, prefix)
    assert len(str(caught.value)) < 400


def test_uniform_rows_without_ends_are_warned_of(tokenizer, prefix, tmp_path, caplog):
    path = write_ids(tmp_path / "a.jsonl", [[5, 6, 7, 8]] * 20)
    preprocess([path], tokenizer, prefix, ids_key="input_ids")
    assert "its first 20 rows all hold 4 ids and no end of a document; if they are" in caplog.text


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(st.lists(st.integers(1, 279), max_size=12), min_size=1, max_size=12),
    chunk_bytes=st.integers(8, 200),
    form=st.sampled_from(["jsonl", "parquet"]),
)
def test_any_documents_come_out_in_order_with_their_ends(
    tmp_path_factory, tokenizer, documents, chunk_bytes, form
):
    folder = tmp_path_factory.mktemp("any")
    path = rows_in(form, folder, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "CHUNK_BYTES", chunk_bytes)
        if not any(documents):
            with pytest.raises(DataError, match="the corpus has no tokens"):
                preprocess([path], tokenizer, folder / "p", ids_key="input_ids")
            return
        preprocess([path], tokenizer, folder / "p", ids_key="input_ids")
    assert documents_of(folder / "p") == [[*ids, EOD] for ids in documents if ids]


def test_the_command_takes_ids(tokenizer, tmp_path):
    write_ids(tmp_path / "a.jsonl", ids_of(tokenizer))
    write_jsonl(tmp_path / "t.jsonl", ["a"])
    command = ["preprocess_data.py", "--tokenizer", tokenizer, "--output-prefix", "p"]
    result = run(*command, "--input", "a.jsonl", "--ids-key", "input_ids", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "0 of the first 60 rows end with the end-of-document id 0" in result.stdout
    assert "'def f():\\n    return 1\\n'" in result.stdout
    assert result.stdout.splitlines()[-2].startswith("p: 48 documents (12 without text skipped)")
    wrong = run(*command, "--input", "t.jsonl", "--ids-key", "input_ids", cwd=tmp_path)
    assert_one_error_line(wrong, "p exists and ")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    wrong = run(
        *command[:-1], "q", "--input", "t.jsonl", "--ids-key", "ids", cwd=tmp_path, env=offline
    )
    assert_one_error_line(wrong, "t.jsonl, line 1 has no key 'ids', only text: choose one with --i")
