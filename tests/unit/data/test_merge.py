from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.preprocess import PreprocessOptions, preprocess
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.index import HEADER, MAGIC
from megatron_mdm.data.manifest import Manifest, SourceFile, manifest_path, part_prefix
from megatron_mdm.data.merge import merge_parts, remove_parts
from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.writer import ShardWriter

REPOSITORY = Path(__file__).resolve().parents[3]
PARTS = [[[1, 2, 3], [4]], [], [[5, 6]], [[7], [8, 9]]]


def write_part(prefix: Path, task: int, num_tasks: int, documents, /, **changes) -> Path:
    part = part_prefix(prefix, task, num_tasks)
    part.parent.mkdir(exist_ok=True)
    if documents:
        with ShardWriter(part, np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
            writer.finish()
    else:
        bin_path(part).write_bytes(b"")
        idx_path(part).write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8))
    fields = {
        "tokenizer": "tok",
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 300,
        "eod_token_id": 0,
        "special_tokens": {"<|endoftext|>": 0},
        "num_documents": len(documents),
        "num_tokens": sum(map(len, documents)),
        "max_token_id": max((max(document) for document in documents), default=0),
        "dtype": "uint16",
        "source_files": [],
        "num_skipped_documents": 1,
        "num_bad_records": 2,
        "task": (task, num_tasks),
    }
    Manifest(**(fields | changes)).write(manifest_path(part))
    return part


def slice_of(path: str, start: int | None = None, stop: int | None = None) -> SourceFile:
    return SourceFile(path=path, size_bytes=100, sha256="cd" * 32, start=start, stop=stop)


@pytest.fixture
def prefix(tmp_path) -> Path:
    sources = [
        [slice_of("a"), slice_of("b", 0, 30)],
        [],
        [slice_of("b", 30, 60)],
        [slice_of("b", 60, 100), slice_of("c"), slice_of("c")],
    ]
    for task, (documents, files) in enumerate(zip(PARTS, sources, strict=True)):
        write_part(tmp_path / "p", task, 4, documents, source_files=files)
    return tmp_path / "p"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_view_of_the_parts_copies_nothing(prefix):
    view = merge_parts(prefix)
    assert view.view is not None
    view.verify()
    assert view.read(0, 9).tolist() == list(range(1, 10))
    assert view.document_lengths.tolist() == [3, 1, 2, 1, 2]
    assert len(view.parts) == 3
    assert names(prefix.parent) == ["p.json", "p.parts"]
    assert merge_parts(prefix).fingerprint() == view.fingerprint()


def test_the_manifest_is_the_union(prefix):
    manifest = merge_parts(prefix).manifest
    assert manifest is not None
    assert (manifest.num_documents, manifest.num_tokens, manifest.max_token_id) == (5, 9, 9)
    assert (manifest.num_skipped_documents, manifest.num_bad_records) == (4, 8)
    assert manifest.source_files == [slice_of("a"), slice_of("b"), slice_of("c"), slice_of("c")]
    assert manifest.task is None


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.ENOSYS])
def test_a_copy_has_the_bytes_of_one_writer(prefix, tmp_path, monkeypatch, error):
    if error:
        real = os.copy_file_range

        def copy_some(source, target, count):
            if os.lseek(target, 0, os.SEEK_CUR) > 6:
                raise OSError(error, "no")
            return real(source, target, min(count, 4))

        monkeypatch.setattr(os, "copy_file_range", copy_some)
    view_fingerprint = merge_parts(prefix).fingerprint()
    copy = merge_parts(prefix, copy=True)
    assert copy.view is None
    copy.verify()
    documents = [document for part in PARTS for document in part]
    with ShardWriter(tmp_path / "one", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    for path in (bin_path, idx_path):
        assert path(prefix).read_bytes() == path(tmp_path / "one").read_bytes()
    assert copy.fingerprint() == view_fingerprint
    assert [x.tolist() for x in IndexedDataset(str(prefix))] == documents
    assert names(tmp_path) == ["one.bin", "one.idx", "p.bin", "p.idx", "p.json", "p.parts"]


def test_a_full_disk_leaves_nothing(prefix, monkeypatch):
    def fail(source, target, count):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr("megatron_mdm.data.writer._SMALL_BYTES", 0)
    with pytest.raises(DataError, match=r"could not be written \(No space left on device\)"):
        merge_parts(prefix, copy=True)
    assert names(prefix.parent) == ["p.parts"]


def test_too_little_space_is_refused_before_the_start(prefix, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="has 100 bytes free and the copy needs 138 bytes"):
        merge_parts(prefix, copy=True)


@pytest.mark.parametrize("count", [2, 5])
def test_tasks_merge_into_the_bytes_of_a_single_job(tmp_path, count):
    generator = np.random.default_rng(0)
    texts = [" ".join(map(str, generator.integers(0, 99, n))) for n in range(90)]
    save_tokenizer(train_byte_level_bpe(texts, 280), tmp_path / "tok")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.txt"]
    for path, share in zip(inputs, (texts[:60], texts[60:]), strict=False):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in share))
    inputs[2].write_text("the last one")
    preprocess(inputs, str(tmp_path / "tok"), tmp_path / "one")
    for task in range(count):
        options = PreprocessOptions(task=(task, count))
        preprocess(inputs, str(tmp_path / "tok"), tmp_path / "p", options)
    view = merge_parts(tmp_path / "p")
    assert view.fingerprint() == open_tokens(tmp_path / "one").fingerprint()
    merge_parts(tmp_path / "p", copy=True)
    for suffix in ("bin", "idx", "json"):
        one, merged = (tmp_path / f"{name}.{suffix}" for name in ("one", "p"))
        assert merged.read_bytes() == one.read_bytes(), suffix


def test_missing_parts_are_named(prefix, tmp_path):
    part = part_prefix(prefix, 2, 4)
    bin_path(part).rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"part-00002-of-00004\.bin does not exist"):
        merge_parts(prefix)
    manifest_path(part).unlink()
    with pytest.raises(DataError, match=r"p\.parts holds 3 of 4 parts, those numbered 2 are miss"):
        merge_parts(prefix)
    write_part(prefix, 0, 3, [[1]])
    with pytest.raises(DataError, match="array jobs of 3 and of 4 tasks: remove those of one"):
        merge_parts(prefix)
    with pytest.raises(DataError, match=r"q\.parts holds no finished part"):
        merge_parts(tmp_path / "q")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "00"}, "has tokenizer_sha256='00' and the first part 'abab"),
        ({"vocab_size": 301}, "has vocab_size=301 and the first part 300: make all"),
        ({"eod_token_id": 1}, "has eod_token_id=1"),
        ({"text_key": "body"}, "has text_key='body'"),
        ({"append_eod": False}, "has append_eod=False"),
        ({"split": "valid"}, "has split='valid' and the first part None"),
        ({"task": (1, 4)}, r"part-00002-of-00004\.json does not describe task 2 of 4"),
        ({"source_files": [slice_of("b", 31, 60)]}, "made of b from 31 on, and the parts before"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(prefix, changes, message):
    write_part(prefix, 2, 4, PARTS[2], **changes)
    with pytest.raises(DataError, match=message):
        merge_parts(prefix)


def test_damaged_parts_are_refused(prefix):
    part = part_prefix(prefix, 3, 4)
    with idx_path(part).open("r+b") as stream:
        stream.seek(HEADER.size)
        stream.write(b"\2")
    with pytest.raises(DataError, match=r"part-00003-of-00004\.idx is damaged: sequence 1"):
        merge_parts(prefix)


def test_parts_without_tokens_are_refused(tmp_path):
    for task in range(2):
        write_part(tmp_path / "p", task, 2, [])
    with pytest.raises(DataError, match="the parts hold no tokens"):
        merge_parts(tmp_path / "p")


def test_other_shards_are_not_replaced(prefix, caplog):
    caplog.set_level("INFO")
    merge_parts(prefix, copy=True)
    before = bin_path(prefix).stat().st_mtime_ns
    for copy in (True, False):
        caplog.clear()
        assert merge_parts(prefix, copy).view is None
        assert caplog.messages == [f"reusing {prefix}: it is a copy of the same parts"]
    assert bin_path(prefix).stat().st_mtime_ns == before
    write_part(prefix, 2, 4, [[6, 6]], source_files=[slice_of("b", 30, 60)], num_bad_records=0)
    for copy in (True, False):
        with pytest.raises(DataError, match="p exists and was not made of the same parts"):
            merge_parts(prefix, copy)
    with pytest.raises(DataError, match="is no copy of its parts, so they are kept"):
        remove_parts(prefix)
    assert merge_parts(prefix, overwrite=True).view is not None
    assert names(prefix.parent) == ["p.json", "p.parts"]
    with pytest.raises(DataError, match="is no copy of its parts, so they are kept"):
        remove_parts(prefix)
    idx_path(prefix).write_bytes(b"")
    manifest_path(prefix).unlink()
    with pytest.raises(DataError, match=r"p\.idx exists without the files that belong to it"):
        merge_parts(prefix)


def test_command_line(prefix):
    def run(*arguments):
        command = [sys.executable, REPOSITORY / "tools" / "merge_data.py", "--prefix", "p"]
        return subprocess.run(
            [*command, *arguments], cwd=prefix.parent, capture_output=True, text=True, check=False
        )

    assert run().stdout == "p: 5 documents, 9 tokens\n"
    result = run("--remove-parts")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--remove-parts without --copy" in result.stderr
    part_prefix(prefix, 0, 4).with_name("log.txt").write_text("")
    assert run("--copy", "--remove-parts").stdout == "p: 5 documents, 9 tokens\np.parts: removed\n"
    assert names(prefix.parent) == ["p.bin", "p.idx", "p.json", "p.parts"]
    assert names(prefix.parent / "p.parts") == ["log.txt"]
    assert open_tokens(prefix).num_tokens == 9


@pytest.mark.slow
def test_many_parts_need_few_open_files(tmp_path):
    prefix = tmp_path / "m"
    for task in range(300):
        write_part(prefix, task, 300, [[1, 2, 0]])
    work = [
        ["merge_data.py", "--prefix", "m"],
        ["inspect_data.py", "m"],
        ["subset_data.py", "--input", "m", "--tokens", "600", "--output-prefix", "m"],
        ["merge_data.py", "--prefix", "m", "--copy"],
        ["inspect_data.py", "m"],
    ]
    for tool, *arguments in work:
        command = f"ulimit -n 128; exec {sys.executable} {REPOSITORY}/tools/{tool} $@"
        result = subprocess.run(
            ["bash", "-c", command, tool, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
