from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
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
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import workers as workers_module
from megatron_mdm.corpus.encoding import EncodingMismatch, TiktokenEncoder
from megatron_mdm.corpus.sources import Chunk
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.corpus.workers import encode_chunks
from megatron_mdm.data.manifest import Manifest
from megatron_mdm.data.store import open_tokens


def test_shards_hold_every_document_and_its_end(source, tokenizer, prefix):
    manifest = preprocess([source], tokenizer, prefix)
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    dataset = IndexedDataset(str(prefix))
    kept = [text for text in TEXTS if text]
    assert len(dataset) == len(kept) == manifest.num_documents
    for text, ids in zip(kept, dataset, strict=True):
        assert ids[-1] == 0
        assert 0 not in ids[:-1]
        assert backend.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
    shards = open_tokens(prefix)
    assert shards.manifest == manifest == Manifest.read(Path(f"{prefix}.json"))
    assert manifest.num_skipped_documents == 12
    assert manifest.max_token_id == shards.read(0, shards.num_tokens).max()
    assert manifest.num_tokens == shards.num_tokens
    assert (manifest.vocab_size, manifest.eod_token_id, manifest.dtype) == (280, 0, "uint16")
    assert manifest.source_files[0].size_bytes == source.stat().st_size


def test_any_number_of_workers_gives_the_same_bytes(
    source, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 100)
    inputs = [source, tmp_path / "in" / "b.txt"]
    inputs[1].write_text("last")
    made = set()
    for workers in (1, 2, 4):
        preprocess(inputs, tokenizer, prefix, workers=workers, overwrite=True, valid_fraction=0.5)
        made.add(b"|".join(files(prefix) + files(f"{prefix}-valid")))
    assert len(made) == 1
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    expected = [text for text in TEXTS if text] + ["last"]
    found = documents_of(prefix) + documents_of(f"{prefix}-valid")
    assert sorted(found) == sorted(encode_alone(tokenizer, text) for text in expected)


@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=30),
    chunk_bytes=st.integers(1, 200),
    extension=st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]),
)
def test_any_texts_come_out_in_order(tokenizer, tmp_path_factory, texts, chunk_bytes, extension):
    folder = tmp_path_factory.mktemp("texts")
    path = folder / f"a.{extension}"
    texts = [*texts, "end"]
    if extension == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    else:
        plain = write_jsonl(folder / "plain", texts).read_bytes()
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(extension[6:], bytes)
        path.write_bytes(pack(plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "CHUNK_BYTES", chunk_bytes)
        manifest = preprocess([path], tokenizer, folder / "p")
    assert documents_of(folder / "p") == [encode_alone(tokenizer, text) for text in texts if text]
    assert manifest.num_skipped_documents == texts.count("")


def test_batches_in_flight_are_bounded(monkeypatch):
    submitted = []

    class Pool:
        def __init__(self, *arguments, **keywords):
            pass

        def submit(self, function, chunk):
            submitted.append(chunk)
            return type("Done", (), {"result": lambda self: chunk})()

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", Pool)
    chunks = ((i, Chunk("text", b"", 1, 0, 2)) for i in range(100))
    for taken, (place, _) in enumerate(encode_chunks(chunks, None, 2), start=1):
        assert place == taken - 1
        assert len(submitted) - taken < 2 * workers_module.CHUNKS_IN_FLIGHT_PER_WORKER


def test_wrong_tokens_of_the_faster_library_start_the_job_again(
    source, tokenizer, prefix, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 100)
    expected = preprocess([source], tokenizer, tmp_path / "expected")
    real = TiktokenEncoder.encode_batch
    calls = []

    def disagree_later(self, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise EncodingMismatch("they differ")
        return real(self, texts)

    monkeypatch.setattr(TiktokenEncoder, "encode_batch", disagree_later)
    assert preprocess([source], tokenizer, prefix) == expected
    assert len(calls) == 4
    assert "they differ: starting again with the tokenizers library" in caplog.messages
    assert files(prefix) == files(tmp_path / "expected")
    assert names(prefix) == ["p.bin", "p.idx", "p.json"]


def test_documents_need_no_end(source, tokenizer, prefix):
    manifest = preprocess([source], tokenizer, prefix, append_eod=False)
    shards = open_tokens(prefix)
    assert 0 not in shards.read(0, shards.num_tokens)
    assert not manifest.append_eod


def test_same_inputs_are_reused(source, tokenizer, prefix, tmp_path, caplog):
    caplog.set_level("INFO")
    manifest = preprocess([source], tokenizer, prefix)
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    moved = tmp_path / "moved"
    moved.mkdir()
    again = preprocess([source.rename(moved / source.name)], tokenizer, prefix)
    assert again == manifest
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before
    end = "documents end with '<|endoftext|>' (id 0)"
    reused = f"reusing {prefix}: the same tokenizer and inputs made it"
    assert caplog.messages == [end, end, reused]


def test_other_inputs_do_not_replace_shards(source, tokenizer, prefix, tmp_path):
    before = preprocess([source], tokenizer, prefix)
    other = tmp_path / "other"
    save_tokenizer(train_byte_level_bpe(TEXTS[:1], 260), other)
    second = write_jsonl(tmp_path / "b.jsonl", ["more"])
    cases = [
        ({"tokenizer_name": str(other)}, "its tokenizer is another"),
        ({"inputs": [source, second]}, "it was made from 1 input files"),
        ({"inputs": [second]}, "its input .* is not .*b.jsonl as it is now"),
        ({"append_eod": False}, "append_eod=True"),
        ({"text_key": "body"}, "text_key='text'"),
    ]
    for change, reason in cases:
        arguments = {"inputs": [source], "tokenizer_name": tokenizer, "output_prefix": prefix}
        with pytest.raises(DataError, match=rf"p exists and .*{reason}.* --overwrite"):
            preprocess(**{**arguments, **change})
    write_jsonl(source, ["changed"])
    with pytest.raises(DataError, match="as it is now"):
        preprocess([source], tokenizer, prefix)
    assert preprocess([source], tokenizer, prefix, overwrite=True) != before
    assert open_tokens(prefix).num_documents == 1
    assert names(prefix) == ["p.bin", "p.idx", "p.json"]


def test_incomplete_and_damaged_output_is_not_reused(source, tokenizer, prefix):
    preprocess([source], tokenizer, prefix)
    with Path(f"{prefix}.bin").open("r+b") as stream:
        stream.truncate(10)
    with pytest.raises(DataError, match=r"p\.bin is truncated.*--overwrite"):
        preprocess([source], tokenizer, prefix)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(DataError, match=r"exists without the files that belong to it.*--overw"):
        preprocess([source], tokenizer, prefix)
    preprocess([source], tokenizer, prefix, overwrite=True)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpus_is_refused(tokenizer, prefix, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match="the corpus has no tokens"):
        preprocess([path], tokenizer, prefix)
    assert names(prefix) == []


def test_inputs_are_checked_before_the_start(source, tokenizer, prefix, tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        preprocess([source, tmp_path / "gone.jsonl"], tokenizer, prefix)
    with pytest.raises(DataError, match="--input names no file"):
        preprocess([], tokenizer, prefix)
    with pytest.raises(DataError, match="--workers=0 has to be at least 1"):
        preprocess([source], tokenizer, prefix, workers=0)
    with pytest.raises(DataError, match="does not exist"):
        preprocess([source], str(tmp_path / "no" / "tokenizer"), prefix)
    assert names(prefix) == []
    with pytest.raises(DataError, match=r"a\.jsonl cannot be made a folder"):
        preprocess([source], tokenizer, source / "p")


def test_folder_that_is_not_writable_is_refused(source, tokenizer, prefix, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="out is not writable"):
        preprocess([source], tokenizer, prefix)


def test_too_little_space_is_refused_before_the_start(source, tokenizer, prefix, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"has 100 bytes free and the shards need about \d+"):
        preprocess([source], tokenizer, prefix)
    assert names(prefix) == []


class FullDisk(io.BufferedWriter):
    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", [".bin", ".lengths", ".idx", ".json"])
def test_job_on_a_full_disk_goes_on_when_there_is_space(
    source, tokenizer, prefix, tmp_path, monkeypatch, full
):
    real = Path.open

    def open_or_fill(self, mode="r", *arguments, **keywords):
        stream = real(self, mode, *arguments, **keywords)
        if mode == "wb" and full in self.name:
            return FullDisk(stream.detach())
        return stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_or_fill)
        message = r"p could not be written \(No space left on device\).* --resume"
        with pytest.raises(DataError, match=message):
            preprocess([source], tokenizer, prefix)
    assert names(prefix) in ([], ["p.partial"])
    preprocess([source], tokenizer, prefix, resume=True)
    preprocess([source], tokenizer, tmp_path / "q")
    assert files(prefix) == files(tmp_path / "q")
    assert names(prefix) == ["p.bin", "p.idx", "p.json"]


def test_text_that_makes_the_end_of_a_document_is_refused(source, prefix, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<eod>": 0, "a": 1}, unk_token="<eod>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eod>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="--eod-token"):
        preprocess([source], str(tmp_path), prefix, eod_token="<eod>")


def test_tokenizer_is_trained_on_a_sample_of_compressed_input(source, tmp_path):
    compressed = tmp_path / "a.jsonl.gz"
    compressed.write_bytes(gzip.compress(source.read_bytes()))
    # Every 16th of the 60 documents is the even sample of at most five.
    sample = write_jsonl(tmp_path / "sample.jsonl", TEXTS[::16])
    for path, output, more in ((compressed, "a", ["--max-documents", "5"]), (sample, "b", [])):
        train = ["--input", path, "--vocab-size", "270", "--output", output, *more]
        assert run("train_tokenizer.py", *train, cwd=tmp_path).returncode == 0
    made = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert made[0] == made[1]


def test_command_line_of_a_task(source, tokenizer, tmp_path):
    command = ["preprocess_data.py", "--input", source, "--tokenizer", tokenizer]
    command += ["--output-prefix", "p", "--task", "1"]
    assert_one_error_line(run(*command, cwd=tmp_path), "--task and --num-tasks belong together")
    result = run(*command, "--num-tasks", "2", "--valid-fraction", "0.5", cwd=tmp_path)
    assert "\np.parts/part-00001-of-00002: " in result.stdout, result.stderr
    assert "\np-valid.parts/part-00001-of-00002: " in result.stdout


def test_command_lines(source, tmp_path):
    train = ["train_tokenizer.py", "--input", source, "--vocab-size", "270", "--output", "tok"]
    result = run(*train, cwd=tmp_path)
    assert result.stdout.startswith("tok: 270 tokens"), result.stderr
    assert run(*train, cwd=tmp_path).stdout.startswith("reusing tok")
    train[4] = "271"
    assert_one_error_line(run(*train, cwd=tmp_path), "--output=tok holds a tokenizer")
    assert run(*train, "--overwrite", cwd=tmp_path).stdout.startswith("tok: 271 tokens")

    shards = ["preprocess_data.py", "--input", source, "--tokenizer", "tok"]
    shards += ["--output-prefix", "p", "--workers", "2"]
    result = run(*shards, cwd=tmp_path)
    assert result.stdout.startswith("documents end with '<|endoftext|>' (id 0)\n"), result.stderr
    assert "\np: 48 documents (12 without text skipped)" in result.stdout
    assert result.stderr == ""
    assert "\n" in result.stdout.strip()
    assert "tokens/s" in result.stdout
    assert result.stdout.rstrip().endswith("encoded with tiktoken")
    assert "\nreusing p" in run(*shards, cwd=tmp_path).stdout
    shards[2] = "gone.jsonl"
    assert_one_error_line(run(*shards, cwd=tmp_path), "gone.jsonl is not a file")

    result = run("inspect_data.py", "p", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in ("documents   48", "uint16", "271 tokens of tok", "'def f", "integrity   OK"):
        assert expected in result.stdout
    (tmp_path / "p.bin").write_bytes(b"")
    assert_one_error_line(run("inspect_data.py", "p", cwd=tmp_path), "p.bin is truncated")
