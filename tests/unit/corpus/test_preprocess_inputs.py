from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from preprocess_helpers import (
    TEXTS,
    assert_one_error_line,
    documents_of,
    encode_alone,
    files,
    names,
    preprocess,
    run,
    write_jsonl,
)

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import tables as tables_module
from megatron_mdm.corpus import workers as workers_module
from megatron_mdm.corpus.inputs import open_sources
from megatron_mdm.corpus.records import parse_chunk
from megatron_mdm.corpus.sources import HubDataset, Span
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import Manifest


def test_held_out_documents_are_those_with_a_small_hash(tokenizer, prefix, tmp_path):
    texts = [f"document {number}" for number in range(2000)]
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[:5])
    manifest = preprocess([path], tokenizer, prefix, valid_fraction=0.25)
    held_out = [
        text
        for text in texts + texts[:5]
        if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < 0.25
    ]
    assert documents_of(f"{prefix}-valid") == [encode_alone(tokenizer, text) for text in held_out]
    assert len(held_out) + manifest.num_documents == 2005
    assert abs(len(held_out) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    other = Manifest.read(Path(f"{prefix}-valid.json"))
    assert (manifest.split, manifest.valid_fraction) == ("train", 0.25)
    assert (other.split, other.valid_fraction) == ("valid", 0.25)
    with pytest.raises(DataError, match=r"it has valid_fraction=0.25.*--overwrite"):
        preprocess([path], tokenizer, prefix)


def test_empty_side_of_a_division_is_refused(tokenizer, prefix, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match=r"--valid-fraction=.* has to be between 0 and 1"):
            preprocess([path], tokenizer, prefix, valid_fraction=wrong)
    assert names(prefix) == []
    said = r"--valid-fraction=1e-09 leaves no held-out documents, and all 1 are in .*/p: use these"
    with pytest.raises(DataError, match=said):
        preprocess([path], tokenizer, prefix, valid_fraction=1e-9)
    # The work of hours is kept.
    assert documents_of(prefix) == [encode_alone(tokenizer, "one")]
    said = r"--valid-fraction=0.999999 leaves no training documents, and all 1 are in .*/p-valid"
    with pytest.raises(DataError, match=said):
        preprocess([path], tokenizer, prefix, valid_fraction=0.999999, overwrite=True)
    assert names(prefix) == ["p-valid.bin", "p-valid.idx", "p-valid.json"]


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "held-out"), (0.999999, "training")])
def test_an_empty_side_of_files_is_seen_before_they_are_encoded(
    fraction, side, tokenizer, prefix, tmp_path, monkeypatch
):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    paths[0].write_text("one")
    paths[1].write_bytes(gzip.compress(b"two"))
    monkeypatch.setattr(workers_module, "encode_chunks", None)
    with pytest.raises(DataError, match=rf"leaves no {side} documents of these 2 files: use anot"):
        preprocess(paths, tokenizer, prefix, valid_fraction=fraction)
    assert names(prefix) == []


def bad_file(folder, extension):
    """Writes a file of three good records and one bad one; returns it and how that is named."""
    path = folder / f"bad.{extension}"
    if extension == "parquet":
        pq.write_table(pa.table({"text": ["one", "two", None, "three"]}), path)
        return path, r"bad\.parquet, row 3: text is null"
    if extension == "folder":
        Dataset.from_dict({"text": ["one", "two", None, "three"]}).save_to_disk(path)
        return path, r"bad\.folder, row 3: text is null"
    lines = b'{"text": "one"}\n{"text": "two"}\n\xff\n{"text": "three"}\n'
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(extension[6:], bytes)
    path.write_bytes(pack(lines))
    return path, rf"bad\.{extension}, line 3 is not valid UTF-8 at byte 0"


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder"])
def test_bad_records_stop_or_are_counted(tokenizer, prefix, tmp_path, caplog, extension):
    path, named = bad_file(tmp_path, extension)
    with pytest.raises(DataError, match=rf"{named}.* --on-error skip\.$"):
        preprocess([path], tokenizer, prefix)
    assert names(prefix) == []
    manifest = preprocess([path], tokenizer, prefix, on_error="skip")
    assert manifest.num_bad_records == 1
    kept = [encode_alone(tokenizer, text) for text in ("one", "two", "three")]
    assert documents_of(prefix) == kept
    assert len([message for message in caplog.messages if message.startswith("skipped: ")]) == 1
    with pytest.raises(DataError, match=r"it left out 1 bad records.*--overwrite"):
        preprocess([path], tokenizer, prefix)


def test_only_the_first_bad_records_are_shown(tokenizer, prefix, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "bad\n" * 30)
    assert preprocess([path], tokenizer, prefix, on_error="skip").num_bad_records == 30
    shown = [message for message in caplog.messages if message.startswith("skipped: ")]
    assert len(shown) == 10
    assert "line 2 is" in shown[0]
    assert "line 11 is" in shown[-1]


@pytest.mark.parametrize("extension", ["jsonl.gz", "jsonl.zst"])
def test_damaged_compression_stops_even_where_bad_records_are_skipped(
    source, tokenizer, prefix, tmp_path, extension
):
    path = tmp_path / f"a.{extension}"
    pack = gzip.compress if extension.endswith("gz") else zstandard.compress
    path.write_bytes(pack(source.read_bytes())[:-5])
    with pytest.raises(DataError, match=rf"a\.{extension} is truncated"):
        preprocess([path], tokenizer, prefix, on_error="skip")


def test_hub_data_sets_are_streamed(source, tokenizer, prefix, tmp_path):
    # A folder of files goes through the same loader as a name of the hub.
    dataset = HubDataset(str(source.parent))
    manifest = preprocess(dataset, tokenizer, prefix)
    preprocess([source], tokenizer, tmp_path / "files")
    assert files(prefix)[:2] == files(tmp_path / "files")[:2]
    assert preprocess(dataset, tokenizer, prefix) == manifest
    with pytest.raises(DataError, match=r"--dataset=.* is a stream and cannot be shared by tasks"):
        preprocess(dataset, tokenizer, prefix, task=(0, 2))
    with pytest.raises(DataError, match=r"\(configuration None, split dev\) cannot be read"):
        preprocess(HubDataset(str(source.parent), split="dev"), tokenizer, prefix)


def test_hub_data_sets_go_on_at_any_row(source, monkeypatch):
    monkeypatch.setattr(tables_module, "_HUB_CHUNK_ROWS", 7)
    (stream,) = open_sources(HubDataset(str(source.parent)))
    for start in (0, 1, 7, 20, 59, 60):
        texts = []
        for chunk in stream.read_chunks(Span(), start, start + 1):
            assert chunk.first_record == start + len(texts) + 1
            texts += parse_chunk(chunk, "text").texts
            assert chunk.end_offset == start + len(texts)
        assert texts == TEXTS[start:]


def test_a_hub_without_network_is_one_clear_error(source, tokenizer, tmp_path):
    command = ["preprocess_data.py", "--dataset", "no/such-data", "--tokenizer", tokenizer]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = run(*command, "--output-prefix", "p", cwd=tmp_path, env=offline)
    assert_one_error_line(result, "--dataset=no/such-data (configuration None, split train) cannot")


def test_bad_line_keeps_only_work_that_a_resume_can_use(source, tokenizer, prefix, monkeypatch):
    good = source.read_text()
    source.write_text('{"text": \n' + good)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is not valid JSON.* --on-error skip\.$"):
        preprocess([source], tokenizer, prefix)
    assert names(prefix) == []
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 100)
    source.write_text(good + '{"text": ')
    with pytest.raises(DataError, match=r"line 61 is.* stays in .*p\.partial for --resume\.$"):
        preprocess([source], tokenizer, prefix, workers=2)
    assert names(prefix) == ["p.partial"]
    with pytest.raises(DataError, match=r"p\.partial holds an unfinished job: go on with --resume"):
        preprocess([source], tokenizer, prefix)
    manifest = preprocess([source], tokenizer, prefix, resume=True, on_error="skip")
    assert (manifest.num_documents, manifest.num_bad_records) == (48, 1)
    assert names(prefix) == ["p.bin", "p.idx", "p.json"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("x.bin", "x.bin ends with .bin, and such endings are added: give x."),
        ("a/x.idx", "a/x.idx ends with .idx, and such endings are added: give a/x."),
        ("dir/", "dir/ names a folder, and shards need a name in it: give such as dir/train."),
        ("..", ".. names a folder, and shards need a name in it: give such as ../train."),
        ("~nobody-here/x", "~nobody-here/x names a home folder that is not known: write it out."),
        (b"bad\xff", "the name b'bad\\xff' is not UTF-8, and manifests are: rename it."),
    ],
)
def test_an_output_prefix_that_is_none_is_refused(written, said, source, tokenizer, tmp_path):
    command = ["preprocess_data.py", "--input", source, "--tokenizer", tokenizer]
    result = run(*command, "--output-prefix", written, cwd=tmp_path)
    assert_one_error_line(result, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_name_may_begin_at_home_and_has_to_be_utf8(source, tokenizer, tmp_path):
    home = {**os.environ, "HOME": str(tmp_path)}
    command = ["preprocess_data.py", "--tokenizer", tokenizer, "--output-prefix=~/out/p"]
    result = run(*command, "--input", "~/in/a.jsonl", cwd="/", env=home)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "p.bin").is_file()
    bad = os.fsencode(tmp_path) + b"/bad\xff.jsonl"
    with open(bad, "wb") as stream:
        stream.write(source.read_bytes())
    assert_one_error_line(run(*command, "--input", bad, cwd=tmp_path), "the name b'/")


MARK = "\ufeff".encode()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "txt"])
def test_a_byte_order_mark_is_no_text(kind, packing, tokenizer, prefix, tmp_path):
    lines = [b'{"text": "one"}\n', b'{"text": "two"}\n']
    content = b"one" if kind == "txt" else lines[0] + MARK + lines[1]
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(packing, bytes)
    path = tmp_path / f"a.{kind}{packing}"
    path.write_bytes(pack(MARK + content))
    preprocess([path], tokenizer, prefix)
    texts = ["one"] if kind == "txt" else ["one", "two"]
    assert documents_of(prefix) == [encode_alone(tokenizer, text) for text in texts]


def test_a_field_that_nobody_reads_may_hold_any_number(tokenizer, prefix, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {"9" * 5000}, "text": "one"}}\n{{"text": {"9" * 5000}}}\n')
    with pytest.raises(DataError, match=r"line 2: text is number and has to be a string"):
        preprocess([path], tokenizer, prefix)
    preprocess([path], tokenizer, prefix, on_error="skip", overwrite=True)
    assert documents_of(prefix) == [encode_alone(tokenizer, "one")]


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt", "jsonl"])
def test_a_record_without_end_is_one_sentence(kind, tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(sources_module, "MAX_RECORD_BYTES", 5000)
    good = b'{"text": "one"}\n'
    content = (b"" if kind == "txt" else good) + b"x" * 20_000
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    place = "" if kind == "txt" else ", line 2"
    with pytest.raises(DataError, match=rf"a\.{kind}{place} has more than 5000 bytes and a doc"):
        preprocess([path], tokenizer, prefix, on_error="skip")


def test_the_end_of_documents_is_said_and_one_of_chat_turns_remarked_on(
    source, tokenizer, prefix, tmp_path, caplog
):
    caplog.set_level("INFO")
    preprocess([source], tokenizer, prefix)
    assert "documents end with '<|endoftext|>' (id 0)" in caplog.messages
    assert "ends turns of a chat" not in caplog.text
    chat = tmp_path / "chat"
    backend = train_byte_level_bpe(TEXTS, 280)
    backend.add_special_tokens(["<|im_end|>"])
    save_tokenizer(backend, chat)
    config = chat / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|endoftext|>", "<|im_end|>"))
    preprocess([source], str(chat), tmp_path / "c")
    assert "'<|im_end|>' ends turns of a chat; texts of this tokenizer end with" in caplog.text
    caplog.clear()
    preprocess([source], str(chat), tmp_path / "d", eod_token="<|endoftext|>")
    assert "ends turns of a chat" not in caplog.text
