from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import build_with_megatron, write

from megatron_mdm.core.command_line import own_command
from megatron_mdm.core.errors import DataError
from megatron_mdm.data import export
from megatron_mdm.data.export import FORMATS, export_tokens, record_path
from megatron_mdm.data.manifest import Manifest, PromptResponseRecipe, manifest_path
from megatron_mdm.data.references import ViewPart, ViewRecord
from megatron_mdm.data.shards import TokenShards
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.subset import make_subset

REPOSITORY = Path(__file__).resolve().parents[3]
RAW = ("nanogpt", "llm.c")


def describe(prefix: Path, **changes) -> Path:
    """Writes a manifest beside shards."""
    shards = open_tokens(prefix)
    fields = {
        "tokenizer": "tok",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 65_536,
        "eod_token_id": 0,
        "special_tokens": {},
        "num_documents": shards.num_documents,
        "num_tokens": shards.num_tokens,
        "max_token_id": 65_000,
        "dtype": shards.dtype.name,
        "source_files": [],
    }
    Manifest(**(fields | changes)).write(manifest_path(prefix))
    return prefix


def merge_view(prefix: Path, parts: list[Path]) -> Path:
    shards = [open_tokens(part) for part in parts]
    ViewRecord(
        made_by="merge",
        num_documents=sum(part.num_documents for part in shards),
        num_tokens=sum(part.num_tokens for part in shards),
        dtype=shards[0].dtype.name,
        parts=[ViewPart.of(part, prefix.parent) for part in shards],
    ).write(manifest_path(prefix))
    return prefix


def documents_of(source) -> list[list[int]]:
    ends = np.cumsum(source.document_lengths)
    return [ids.tolist() for ids in np.split(source.read(0, source.num_tokens), ends[:-1])]


def rows_of(path: Path) -> list[list[int]]:
    return pyarrow.parquet.read_table(path)["input_ids"].to_pylist()


def stream_of(path: Path) -> list[int]:
    record = json.loads(record_path(path).read_text())
    offset = 1024 if record["format"] == "llm.c" else 0
    return np.memmap(path, dtype=record["dtype"], mode="r", offset=offset).tolist()


def assert_exports_equal(prefix: Path, folder: Path) -> None:
    source = open_tokens(prefix)
    for file_format in FORMATS:
        path = folder / f"out.{file_format}"
        record = export_tokens(prefix, path, file_format, overwrite=True)
        assert (record.num_documents, record.num_tokens) == (
            source.num_documents,
            source.num_tokens,
        )
        assert record.source_fingerprint == source.fingerprint()
        if file_format == "parquet":
            assert rows_of(path) == documents_of(source)
        else:
            assert stream_of(path) == source.read(0, source.num_tokens).tolist()


documents = st.lists(st.lists(st.integers(0, 65_535), max_size=9), min_size=1, max_size=12).filter(
    lambda documents: any(documents)
)


@settings(max_examples=40)
@given(documents, documents, st.integers(1, 7), st.integers(1, 4), st.integers(0, 9), st.data())
def test_shards_views_and_subsets_come_back_whatever_the_chunks(
    one, other, chunk, row_group_documents, seed, data
):
    dtype = data.draw(st.sampled_from([np.uint16, np.int32, np.int64]))
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr("megatron_mdm.data.source.CHUNK_ITEMS", chunk)
        patch.setattr(export, "_ROW_GROUP_TOKENS", 2 * chunk)
        patch.setattr(export, "_ROW_GROUP_DOCUMENTS", row_group_documents)
        parts = [write(folder / "a", one, dtype), write(folder / "b", other, dtype)]
        assert_exports_equal(parts[0], folder)
        view = merge_view(folder / "view", parts)
        assert_exports_equal(view, folder)
        num_tokens = data.draw(st.integers(1, open_tokens(view).num_tokens))
        make_subset(view, folder / "cut", num_tokens, seed)
        assert_exports_equal(folder / "cut", folder)


def test_documents_of_several_sequences_are_one_row(tmp_path):
    prefix = build_with_megatron(tmp_path / "m", [[[1, 2], [3]], [[4]], [], [[5], [6]]], np.uint16)
    assert_exports_equal(prefix, tmp_path)
    assert rows_of(tmp_path / "out.parquet") == [[1, 2, 3], [4], [], [5, 6]]


def test_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ROW_GROUP_TOKENS", 10)
    monkeypatch.setattr(export, "_ROW_GROUP_DOCUMENTS", 4)
    lengths = [4, 6, 1, 9, 11, 3, 0, 0, 0, 7, 1]
    prefix = write(tmp_path / "p", [[1] * length for length in lengths])
    export_tokens(prefix, tmp_path / "x", "parquet")
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "x").metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert rows == [2, 2, 1, 3, 3]


def test_parquet_says_what_it_holds_and_datasets_reads_it(tmp_path):
    from datasets import load_dataset

    prefix = describe(write(tmp_path / "p"))
    record = export_tokens(prefix, tmp_path / "x.parquet", "parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "x.parquet")
    assert str(schema.field("input_ids").type) == "list<element: uint16>"
    assert {name.decode(): value.decode() for name, value in schema.metadata.items()} == {
        "format": "parquet",
        "source": str(prefix),
        "source_fingerprint": open_tokens(prefix).fingerprint(),
        "num_documents": "5",
        "num_tokens": str(record.num_tokens),
        "dtype": "uint16",
        "tokenizer": "tok",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": "65536",
        "eod_token_id": "0",
        "append_eod": "true",
    }
    loaded = load_dataset(
        "parquet",
        data_files=str(tmp_path / "x.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(loaded["input_ids"]) == documents_of(open_tokens(prefix))


def test_raw_files_are_bare_or_have_the_header_of_llm_c(tmp_path):
    prefix = describe(write(tmp_path / "p", [[1, 2, 0], [513, 0]]))
    export_tokens(prefix, tmp_path / "n", "nanogpt")
    stream = bytes([1, 0, 2, 0, 0, 0, 1, 2, 0, 0])
    assert (tmp_path / "n").read_bytes() == stream
    export_tokens(prefix, tmp_path / "c", "llm.c")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 5
    assert (tmp_path / "c").read_bytes() == header.tobytes() + stream
    assert json.loads((tmp_path / "c.json").read_text()) == {
        "format": "llm.c",
        "source": str(prefix),
        "source_fingerprint": open_tokens(prefix).fingerprint(),
        "num_documents": 2,
        "num_tokens": 5,
        "dtype": "uint16",
        "tokenizer": "tok",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 65_536,
        "eod_token_id": 0,
        "append_eod": True,
    }


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "largest", "parquet", "nanogpt"),
    [
        (np.uint8, None, 255, "uint16", "uint16"),
        (np.int8, None, 127, "int32", "uint16"),
        (np.uint16, 65_536, 65_535, "uint16", "uint16"),
        (np.int32, 65_536, 65_535, "int32", "uint16"),
        (np.int32, None, 65_535, "int32", "uint16"),
        (np.int32, None, 65_536, "int32", "uint32"),
        # The vocabulary decides, so that all subsets of a corpus have one type.
        (np.int32, 65_537, 3, "int32", "uint32"),
        (np.int64, 100_000, 99_999, "int32", "uint32"),
    ],
)
def test_types_follow_the_shards_and_the_vocabulary(
    tmp_path, dtype, vocab_size, largest, parquet, nanogpt
):
    prefix = write(tmp_path / "p", [[1, largest]], dtype)
    if vocab_size is not None:
        describe(prefix, vocab_size=vocab_size)
    for file_format, wanted in (("parquet", parquet), ("nanogpt", nanogpt)):
        record = export_tokens(prefix, tmp_path / file_format, file_format)
        assert record.dtype == wanted
    assert rows_of(tmp_path / "parquet") == [[1, largest]]
    assert stream_of(tmp_path / "nanogpt") == [1, largest]


def test_ids_that_do_not_fit_are_refused_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mdm.data.source.CHUNK_ITEMS", 2)
    out = tmp_path / "out"
    for token_id, file_format, why in (
        (65_536, "llm.c", r"does not fit the file's uint16: use --format nanogpt or parquet\."),
        (2**31, "parquet", r"does not fit the file's int32: write the shards again"),
        (2**32, "nanogpt", r"does not fit the file's uint32: write the shards again"),
        *((-1, file_format, "and ids start at 0: write") for file_format in FORMATS),
    ):
        prefix = write(tmp_path / "p", [[1, 2, 3], [4, 5, token_id]], np.int64)
        with pytest.raises(DataError, match=rf"p has token id {token_id} at position 5,? .*{why}"):
            export_tokens(prefix, out / "x", file_format)
    describe(write(tmp_path / "p", [[70_000]], np.int32), vocab_size=60_000)
    with pytest.raises(DataError, match="does not fit the file's uint16: write the shards again"):
        export_tokens(tmp_path / "p", out / "x", "nanogpt")
    assert list(out.iterdir()) == []


def test_more_tokens_than_the_header_of_llm_c_counts_are_refused(tmp_path, monkeypatch):
    assert export._MAX_LLM_C_TOKENS == 2**31 - 1
    monkeypatch.setattr(export, "_MAX_LLM_C_TOKENS", 9)
    write(tmp_path / "p", [[1] * 10])
    with pytest.raises(DataError, match=r"has 10 tokens and the header of .* counts up to 9: exp"):
        export_tokens(tmp_path / "p", tmp_path / "out" / "x", "llm.c")
    assert not (tmp_path / "out").exists()
    make_subset(tmp_path / "p", tmp_path / "s", 9, 0)
    export_tokens(tmp_path / "s", tmp_path / "x", "llm.c")


def test_the_source_is_never_written_over(tmp_path):
    write(tmp_path / "p")
    make_subset(tmp_path / "p", tmp_path / "s", 5, 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "deep").mkdir()
    for name in ("p.bin", "p.idx", "deep/../p.bin", "s.json", "s.extents.npy", "s", "p"):
        with pytest.raises(DataError, match="is a file of what is exported"):
            export_tokens(tmp_path / "s", tmp_path / name, "nanogpt", overwrite=True)
    (tmp_path / "deep").rmdir()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, file_format, old):
    prefix = write(tmp_path / "p", [[1, 2], [3, 4]])
    out = tmp_path / "out" / "x"
    if old:
        export_tokens(prefix, out, file_format)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out/*")}
    write(tmp_path / "p", [[1, 2], [3, 5]])
    read = TokenShards.read_stored

    def fail(self, start, stop):
        if (start, stop) == (3, 4):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(self, start, stop)

    monkeypatch.setattr("megatron_mdm.data.source.CHUNK_ITEMS", 1)
    monkeypatch.setattr(TokenShards, "read_stored", fail)
    with pytest.raises(DataError, match=r"x could not be written \(No space left on device\)"):
        export_tokens(prefix, out, file_format, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out/*")} == before


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=19))
    write(tmp_path / "p", [[1] * 10])
    with pytest.raises(DataError, match="19 bytes free and the tokens need 20 bytes: free space"):
        export_tokens(tmp_path / "p", tmp_path / "out" / "x", "nanogpt")
    assert list(tmp_path.glob("out/*")) == []


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path):
    generator = np.random.default_rng(0)
    write(tmp_path / "p", generator.integers(0, 60_000, (20, 10_000)))
    tool = shlex.join([sys.executable, str(REPOSITORY / "tools" / "export_tokens.py")])
    for file_format in FORMATS:
        result = subprocess.run(
            # Blocks of 1,024 bytes: 200 kB of the 400 kB that the tokens take.
            ["bash", "-c", f"ulimit -f 200; {tool} --input p --format {file_format} --output o/x"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert result.stderr.startswith("error: o/x could not be written (File too large) and")
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.glob("o/*")) == []


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_place_that_cannot_be_written_is_told(tmp_path, file_format):
    write(tmp_path / "p")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="x could not be written"):
        export_tokens(tmp_path / "p", tmp_path / "file" / "x", file_format)


def test_boundaries_and_prompts_that_are_lost_are_told(tmp_path, caplog):
    caplog.set_level("INFO")

    def told(file_format):
        caplog.clear()
        export_tokens(tmp_path / "p", tmp_path / "x", file_format, overwrite=True)
        return caplog.messages

    write(tmp_path / "p")
    assert told("parquet") == []
    assert "(there is no manifest), and a raw file shows no other boundary" in told("llm.c")[0]
    describe(tmp_path / "p", append_eod=False)
    assert "(append_eod is false in its manifest)" in told("nanogpt")[0]
    describe(tmp_path / "p")
    assert told("nanogpt") == []
    recipe = PromptResponseRecipe(
        prompt_key="a", response_key="b", turns="each", chat_template="", prompts_sha256=""
    )
    describe(tmp_path / "p", exchanges=recipe)
    assert "where responses start is not exported" in told("parquet")[0]


def test_damaged_shards_are_refused(tmp_path):
    write(tmp_path / "p", [[1, 2], [3]])
    index = (tmp_path / "p.idx").read_bytes()
    (tmp_path / "p.idx").write_bytes(index[:34] + bytes([9]) + index[35:])
    with pytest.raises(DataError, match=r"p\.idx is damaged"):
        export_tokens(tmp_path / "p", tmp_path / "x", "parquet")


def test_the_commands_of_the_documentation(tmp_path):
    page = (REPOSITORY / "docs" / "data.md").read_text()
    section = re.search(r"### Tokens for other programs\n(.*?)\n##", page, re.DOTALL)[1]
    commands = re.findall(r"^    \.venv/bin/mdm (export-tokens .*)$", section, re.M)
    assert len(commands) == len(FORMATS)
    (tmp_path / "data").mkdir()
    describe(write(tmp_path / "data" / "web"))
    make_subset(tmp_path / "data" / "web", tmp_path / "data" / "web-25M", 7, 0)
    for command in commands:
        arguments = shlex.split(command)
        result = subprocess.run(
            own_command(*arguments),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        output = arguments[arguments.index("--output") + 1]
        assert re.fullmatch(rf"{output}: \d documents, 7 tokens, uint16\n", result.stdout)
        path = tmp_path / output
        subset = open_tokens(tmp_path / "data" / "web-25M")
        if output.endswith(".parquet"):
            assert rows_of(path) == documents_of(subset)
        else:
            assert stream_of(path) == subset.read(0, 7).tolist()
