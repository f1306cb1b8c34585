from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.corpus import preprocess as module
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import tables as tables_module
from megatron_mdm.corpus import workers as workers_module
from megatron_mdm.corpus.encoding import EncodingMismatch, TiktokenEncoder
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.records import parse_chunk
from megatron_mdm.corpus.sources import Chunk, HubDataset, Span, open_sources
from megatron_mdm.corpus.tokenizer import END_OF_TEXT, save_tokenizer, train_byte_level_bpe
from megatron_mdm.corpus.workers import encode_chunks
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


def preprocess(inputs, tokenizer_name, output_prefix, **options):
    options = PreprocessOptions(**options)
    return module.preprocess(inputs, tokenizer_name, output_prefix, options).manifests[0]


def files(prefix):
    return [Path(f"{prefix}.{extension}").read_bytes() for extension in ("bin", "idx", "json")]


def documents_of(prefix):
    return [ids.tolist() for ids in IndexedDataset(str(prefix))]


def encode_alone(tokenizer, text):
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    backend.encode_special_tokens = True
    return [*backend.encode(text, add_special_tokens=False).ids, 0]


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
    with pytest.raises(DataError, match=r"--valid-fraction=1e-09 leaves no held-out documents"):
        preprocess([path], tokenizer, prefix, valid_fraction=1e-9)
    with pytest.raises(DataError, match=r"--valid-fraction=0.999999 leaves no training documents"):
        preprocess([path], tokenizer, prefix, valid_fraction=0.999999)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match=r"--valid-fraction=.* has to be between 0 and 1"):
            preprocess([path], tokenizer, prefix, valid_fraction=wrong)
    assert names(prefix) == []


def bad_file(folder, extension):
    """Writes a file of three good records and one bad one; returns it and how that is named."""
    path = folder / f"bad.{extension}"
    if extension == "parquet":
        pq.write_table(pa.table({"text": ["one", "two", None, "three"]}), path)
        return path, r"bad\.parquet, row 3: text is NoneType"
    if extension == "folder":
        Dataset.from_dict({"text": ["one", "two", None, "three"]}).save_to_disk(path)
        return path, r"bad\.folder, row 3: text is NoneType"
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
    with pytest.raises(DataError, match=r"it lacks 1 bad records.*--overwrite"):
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
        for chunk in stream.chunks(Span(), start, start + 1):
            assert chunk.first_record == start + len(texts) + 1
            texts += parse_chunk(chunk, "text").texts
            assert chunk.end_offset == start + len(texts)
        assert texts == TEXTS[start:]


def test_a_hub_without_network_is_one_clear_error(source, tokenizer, tmp_path):
    command = ["preprocess_data.py", "--dataset", "no/such-data", "--tokenizer", tokenizer]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = run(*command, "--output-prefix", "p", cwd=tmp_path, env=offline)
    assert_one_error_line(result, "--dataset=no/such-data (configuration None, split train) cannot")


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


def run(*arguments, cwd, env=None):
    command = [sys.executable, REPOSITORY / "tools" / arguments[0], *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


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
    assert "\n" in result.stdout.strip()
    assert "tokens/s" in result.stdout
    assert result.stdout.rstrip().endswith("encoded with tiktoken")
    assert run(*shards, cwd=tmp_path).stdout.startswith("reusing p")
    shards[2] = "gone.jsonl"
    assert_one_error_line(run(*shards, cwd=tmp_path), "gone.jsonl is not a file")

    result = run("inspect_data.py", "p", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in ("documents   48", "uint16", "271 tokens of tok", "'def f", "integrity   OK"):
        assert expected in result.stdout
    (tmp_path / "p.bin").write_bytes(b"")
    assert_one_error_line(run("inspect_data.py", "p", cwd=tmp_path), "p.bin is truncated")
