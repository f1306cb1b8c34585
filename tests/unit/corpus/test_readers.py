from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus.inputs import open_sources
from megatron_mdm.corpus.readers import read_documents, sample_documents
from megatron_mdm.corpus.sources import CHUNK_BYTES, Span
from megatron_mdm.corpus.streams import read_blocks

TEXTS = ["one", "", "naïve\u2028日本\n\n", "🙂"]


def jsonl(texts=TEXTS, key="text", ascii_only=False) -> bytes:
    lines = [json.dumps({key: text, "id": 1}, ensure_ascii=ascii_only) for text in texts]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_gives_its_texts_and_skips_empty_lines(tmp_path, ascii_only):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n \r\n" + jsonl(ascii_only=ascii_only).replace(b"\n", b"\r\n\n"))
    assert list(read_documents(path)) == TEXTS


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("extension", [".gz", ".zst"])
def test_compressed_files_of_one_or_more_members_give_the_same_texts(tmp_path, extension):
    pack = PACK[extension]
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(pack(jsonl(key="content")))
    assert list(read_documents(path, "content")) == TEXTS
    # The cut between the members falls inside a line.
    content = jsonl(key="content")
    path.write_bytes(pack(content[:30]) + pack(b"") + pack(content[30:]))
    assert list(read_documents(path, "content")) == TEXTS
    path = tmp_path / f"a.TXT{extension.upper()}"
    path.write_bytes(pack("a\r\n\nnaïve".encode()))
    assert list(read_documents(path)) == ["a\r\n\nnaïve"]


@pytest.mark.parametrize("extension", PACK)
def test_lines_longer_than_a_chunk_and_chunk_bounds_lose_nothing(tmp_path, extension):
    texts = ["a" * (3 * CHUNK_BYTES), "b", "c" * (CHUNK_BYTES - 12), "d" * 2_000_000, "e"]
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(PACK[extension](jsonl(texts).rstrip(b"\n")))
    assert list(read_documents(path)) == texts
    (source,) = open_sources([path])
    chunks = list(source.read_chunks(Span(), 0, 1))
    assert b"".join(chunk.data for chunk in chunks) == jsonl(texts).rstrip(b"\n")
    assert len(chunks) > 1
    for number, chunk in enumerate(chunks):
        before = b"".join(earlier.data for earlier in chunks[:number])
        assert chunk.first_record == 1 + before.count(b"\n")
        rest = source.read_chunks(Span(), chunk.end_offset, chunk.end_record)
        assert b"".join(c.data for c in rest) == b"".join(c.data for c in chunks[number + 1 :])


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300), st.integers(1, 64))
@pytest.mark.parametrize("extension", PACK)
def test_blocks_from_any_byte_on(tmp_path_factory, extension, content, start, block_bytes):
    path = tmp_path_factory.mktemp("blocks") / f"a{extension}"
    path.write_bytes(PACK[extension](content))
    blocks = list(read_blocks(path, block_bytes, start=start))
    assert b"".join(blocks) == content[start:]
    assert all(blocks)


def test_saved_datasets_give_their_rows(tmp_path):
    texts = TEXTS * 5
    dataset = Dataset.from_dict({"id": list(range(len(texts))), "body": texts})
    dataset.save_to_disk(tmp_path / "one", num_shards=3)
    assert list(read_documents(tmp_path / "one", "body")) == texts
    dataset.shuffle(seed=0).select(range(5)).save_to_disk(tmp_path / "chosen")
    expected = dataset.shuffle(seed=0)["body"][:5]
    assert list(read_documents(tmp_path / "chosen", "body")) == expected
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert list(read_documents(tmp_path / "two", "body", "test")) == [texts[1]]


def test_saved_datasets_that_cannot_be_read_are_refused(tmp_path):
    dataset = Dataset.from_dict({"body": ["a", None]})
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two holds several splits: choose one of train, test"):
        read_documents(tmp_path / "two")
    with pytest.raises(DataError, match=r"two has no split 'dev': choose one of train, test"):
        read_documents(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match=r"test has no column 'text', only body"):
        list(read_documents(tmp_path / "two", split="test"))
    with pytest.raises(DataError, match=r"test, row 2: body is null"):
        list(read_documents(tmp_path / "two", "body", "test"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other is a folder but not one that datasets"):
        read_documents(tmp_path / "other")
    with pytest.raises(DataError, match=r"--split=test has nothing to choose from"):
        read_documents(tmp_path / "two" / "test", split="test")
    arrow = next((tmp_path / "two" / "test").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(DataError, match=r"test cannot be loaded as a saved data set \("):
        list(read_documents(tmp_path / "two", "body", "test"))


def test_sample_is_even_and_bounded():
    texts = [f"{number:04d}" for number in range(1000)]
    assert list(sample_documents(texts)) == texts
    assert list(sample_documents(texts, max_documents=100)) == texts[::16]
    assert list(sample_documents(texts, max_bytes=2000)) == texts[::2]
    assert list(sample_documents(texts, max_documents=1)) == texts[:1]
    assert list(sample_documents(["ü" * 50], max_bytes=1)) == ["ü" * 50]
    with pytest.raises(DataError, match="--max-bytes=0 has to be at least 1"):
        list(sample_documents(texts, max_bytes=0))


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
        (b"[1]", "line 3 holds a JSON array"),
        (b'{"body": "a", "id": 1}', "line 3 has no key 'text', only body, id: .* --text-key"),
        (b"{}", "line 3 has no key 'text', only none"),
        (b'{"text": 7}', "line 3: text is number and has to be a string"),
        (b'{"text": null}', "line 3: text is null"),
        (b'{"text": "\xff"}', "line 3 is not valid UTF-8 at byte 10 of the line"),
        (b'{"text": "ab\\ud83d"}', "line 3: text holds half a surrogate pair at character 2"),
        (b"[" * 100_000, "line 3 is not valid JSON"),
    ],
)
@pytest.mark.parametrize("extension", PACK)
def test_bad_line_is_named(tmp_path, line, message, extension):
    path = tmp_path / f"a.jsonl{extension}"
    path.write_bytes(PACK[extension](jsonl(["fine"]) + b"\n" + line + b"\n"))
    documents = read_documents(path)
    assert next(documents) == "fine"
    with pytest.raises(DataError, match=rf"a\.jsonl\S*, {message}"):
        list(documents)


@pytest.mark.parametrize(("extension", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_damaged_compression_is_refused(tmp_path, extension, kind):
    path = tmp_path / f"a.jsonl{extension}"
    whole = PACK[extension](jsonl([str(number) * 9 for number in range(50)]))
    middle = whole[:20] + b"\xff" * 20 + whole[40:]
    for damaged in (whole[:-9], whole[:40], whole[:2], b"", b"plain text", middle, whole + b"tail"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl\{extension} is truncated or not {kind}"):
            list(read_documents(path))


def test_text_with_more_bytes_than_an_index_counts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mdm.corpus.records.MAX_TEXT_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a" * 10, "日本語x", "日本語xy"]))
    documents = read_documents(path)
    assert [next(documents), next(documents)] == ["a" * 10, "日本語x"]
    with pytest.raises(DataError, match=r"line 3: text has 11 bytes and a document may have 10"):
        next(documents)


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
    with pytest.raises(DataError, match=r"a\.parquet, row 2: body is null"):
        list(read_documents(path, "body"))


def test_parquet_with_a_string_that_is_not_utf8_names_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"fine", b"a\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: text is not valid UTF-8 at byte 1"):
        list(read_documents(path))


def test_parquet_goes_on_at_any_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 1)
    path = tmp_path / "a.parquet"
    texts = [str(number) for number in range(40)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    (source,) = open_sources([path])
    for start in range(41):
        records = []
        for chunk in source.read_chunks(Span(), start, start + 1):
            with pa.ipc.open_stream(chunk.data) as stream:
                rows = stream.read_all().column(0).to_pylist()
            assert rows == texts[chunk.first_record - 1 : chunk.end_offset]
            records += rows
        assert records == texts[start:]


def test_missing_file_and_unknown_extension_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl is not a file"):
        read_documents(tmp_path / "gone.jsonl")
    path = tmp_path / "a.csv"
    path.write_text("a")
    with pytest.raises(DataError, match=r"use one of \.jsonl, \.jsonl\.gz, .* \.parquet"):
        read_documents(path)
