from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.corpus import preprocess as module
from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.corpus.tokenizer import END_OF_TEXT, save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import Manifest
from megatron_mdm.data.shards import TokenShards
from megatron_mdm.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = ["def f():\n    return 1\n", "", f"a {END_OF_TEXT} b", "日本語 🙂", "x" * 500] * 12


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(TEXTS, 280), folder)
    return str(folder)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "out" / "p"


def names(prefix):
    return sorted(path.name for path in prefix.parent.iterdir()) if prefix.parent.exists() else []


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
    shards = TokenShards.open(prefix)
    assert shards.manifest == manifest == Manifest.read(Path(f"{prefix}.json"))
    assert manifest.num_skipped_documents == 12
    assert manifest.max_token_id == shards.tokens.max()
    assert manifest.num_tokens == shards.num_tokens
    assert (manifest.vocab_size, manifest.eod_token_id, manifest.dtype) == (280, 0, "uint16")
    assert manifest.source_files[0].size_bytes == source.stat().st_size


def test_any_number_of_workers_gives_the_same_bytes(
    source, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 3)
    inputs = [source, tmp_path / "in" / "b.txt"]
    inputs[1].write_text("last")
    made = set()
    for workers in (1, 2, 3):
        preprocess(inputs, tokenizer, prefix, workers=workers, overwrite=True)
        made.add(b"|".join(Path(f"{prefix}.{x}").read_bytes() for x in ("bin", "idx", "json")))
    assert len(made) == 1
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_batches_in_flight_are_bounded(monkeypatch):
    submitted = []

    class Pool:
        def __init__(self, *arguments, **keywords):
            pass

        def submit(self, function, batch):
            submitted.append(batch)
            return type("Done", (), {"result": lambda self: batch})()

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    encoder = module._Encoder(Tokenizer(models.BPE()), 0, True, np.dtype("<u2"))
    results = module._encode_batches(([str(i)] for i in range(100)), encoder, 2)
    for taken, batch in enumerate(results, start=1):
        assert batch == [str(taken - 1)]
        assert len(submitted) - taken < 2 * module._BATCHES_IN_FLIGHT_PER_WORKER


def test_documents_need_no_end(source, tokenizer, prefix):
    manifest = preprocess([source], tokenizer, prefix, append_eod=False)
    assert 0 not in TokenShards.open(prefix).tokens
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
    assert caplog.messages == [f"reusing {prefix}: the same tokenizer and inputs made it"]


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
    assert TokenShards.open(prefix).num_documents == 1
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


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_leaves_nothing(source, tokenizer, prefix, workers):
    source.write_text(source.read_text() + '{"text": ')
    with pytest.raises(DataError, match=r"a\.jsonl, line 61 is not valid JSON"):
        preprocess([source], tokenizer, prefix, workers=workers)
    assert names(prefix) == []


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
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"has 100 bytes free and the shards need about \d+"):
        preprocess([source], tokenizer, prefix)
    assert names(prefix) == []


class FullDisk(io.BufferedWriter):
    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", [".bin", ".idx", ".json"])
def test_full_disk_while_writing_leaves_nothing(source, tokenizer, prefix, monkeypatch, full):
    real = Path.open

    def open_or_fill(self, mode="r", *arguments, **keywords):
        stream = real(self, mode, *arguments, **keywords)
        if mode == "wb" and full in self.name:
            return FullDisk(stream.detach())
        return stream

    monkeypatch.setattr(Path, "open", open_or_fill)
    with pytest.raises(DataError, match=r"p could not be written \(No space left on device\)"):
        preprocess([source], tokenizer, prefix)
    assert names(prefix) == []


def test_text_that_makes_the_end_of_a_document_is_refused(source, prefix, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<eod>": 0, "a": 1}, unk_token="<eod>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eod>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="--eod-token"):
        preprocess([source], str(tmp_path), prefix, eod_token="<eod>")


def run(*arguments, cwd):
    command = [sys.executable, REPOSITORY / "tools" / arguments[0], *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def assert_one_error_line(result, start):
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {start}")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(".\n")


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
    assert result.stdout.startswith("p: 48 documents (12 without text skipped)"), result.stderr
    assert result.stderr == ""
    assert run(*shards, cwd=tmp_path).stdout.startswith("reusing p")
    shards[2] = "gone.jsonl"
    assert_one_error_line(run(*shards, cwd=tmp_path), "gone.jsonl is not a file")

    result = run("inspect_data.py", "p", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in ("documents   48", "uint16", "271 tokens of tok", "'def f", "integrity   OK"):
        assert expected in result.stdout
    (tmp_path / "p.bin").write_bytes(b"")
    assert_one_error_line(run("inspect_data.py", "p", cwd=tmp_path), "p.bin is truncated")
