from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.corpus.readers import check_source, read_documents
from megatron_mdm.errors import DataError

TEXTS = ["one", "", "naïve\u2028日本\n\n", "🙂"]


def jsonl(texts=TEXTS, key="text", ascii_only=False) -> bytes:
    lines = [json.dumps({key: text, "id": 1}, ensure_ascii=ascii_only) for text in texts]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_gives_its_texts_and_skips_empty_lines(tmp_path, ascii_only):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n \r\n" + jsonl(ascii_only=ascii_only).replace(b"\n", b"\r\n\n"))
    assert list(read_documents(path)) == TEXTS


def test_gzip_gives_the_same_texts(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(key="content")))
    assert list(read_documents(path, "content")) == TEXTS


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes("a\r\n\nnaïve".encode())
    assert list(read_documents(path)) == ["a\r\n\nnaïve"]


def test_parquet_gives_the_rows_of_every_group(tmp_path):
    path = tmp_path / "a.parquet"
    texts = TEXTS * 5
    table = pa.table({"id": range(len(texts)), "body": texts})
    pq.write_table(table, path, row_group_size=3)
    assert list(read_documents(path, "body")) == texts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text()))
def test_any_texts_round_trip_through_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_bytes(jsonl(texts))
    assert list(read_documents(path)) == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3 is not valid JSON"),
        (b"[1]", "line 3 holds a JSON list"),
        (b'{"body": "a", "id": 1}', "line 3 has no key 'text', only body, id: .* --text-key"),
        (b"{}", "line 3 has no key 'text', only none"),
        (b'{"text": 7}', "line 3: text is int and has to be a string"),
        (b'{"text": null}', "line 3: text is NoneType"),
        (b'{"text": "\xff"}', "line 3 is not valid UTF-8 at byte 10 of the line"),
        (b'{"text": "ab\\ud83d"}', "line 3: text holds half a surrogate pair at character 2"),
        (b"[" * 100_000, "line 3 is not valid JSON"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_bad_line_is_named(tmp_path, line, message, compress):
    path = tmp_path / ("a.jsonl.gz" if compress else "a.jsonl")
    content = jsonl(["fine"]) + b"\n" + line + b"\n"
    path.write_bytes(gzip.compress(content) if compress else content)
    documents = read_documents(path)
    assert next(documents) == "fine"
    with pytest.raises(DataError, match=rf"a\.jsonl\S*, {message}"):
        list(documents)


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl(["some text"] * 50))
    for damaged in (whole[:-9], whole[:40], b"plain text", whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is truncated or not gzip"):
            list(read_documents(path))


def test_txt_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(DataError, match=r"a\.txt is not valid UTF-8 at byte 3"):
        list(read_documents(path))


def test_parquet_errors_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        list(read_documents(path))
    pq.write_table(pa.table({"body": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text', only body"):
        list(read_documents(path))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: body is NoneType"):
        list(read_documents(path, "body"))


def test_parquet_with_a_string_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_documents(path))


def test_missing_file_and_unknown_extension_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl is not a file"):
        read_documents(tmp_path / "gone.jsonl")
    path = tmp_path / "a.csv"
    path.write_text("a")
    with pytest.raises(DataError, match=r"use one of \.jsonl, \.jsonl\.gz, \.txt, \.parquet"):
        check_source(path)
