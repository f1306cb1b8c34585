from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from preprocess_helpers import (
    REPOSITORY,
    TEXTS,
    assert_one_error_line,
    documents_of,
    files,
    names,
    preprocess,
    run,
    write_jsonl,
)
from token_examples import (
    EOD,
    KINDS,
    ended,
    ids_of,
    text_shards,
    write_datatrove,
    write_lit,
    write_llm_c,
    write_nanogpt,
    written,
)

from megatron_mdm.core.command_line import PROGRAM
from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import token_sources as token_sources_module
from megatron_mdm.corpus.token_files import open_token_file
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.store import open_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_copied_has_the_bytes_that_its_text_gives(
    kind, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 64)
    paths = written(kind, tmp_path, ids_of(tokenizer))
    manifest = preprocess(paths, tokenizer, prefix, copy=True)
    expected = text_shards(preprocess, tmp_path, tokenizer)
    assert files(prefix)[:2] == files(expected)[:2]
    assert manifest.ids is not None
    assert manifest.ids.key is None
    assert manifest.source_files[0].size_bytes == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_that_fits_is_read_where_it_lies(kind, tokenizer, prefix, tmp_path, caplog):
    caplog.set_level("INFO")
    documents = ids_of(tokenizer)
    (tmp_path / "corpus").mkdir()
    paths = written(kind, tmp_path / "corpus", documents)
    before = [path.read_bytes() for path in paths]
    if kind == "datatrove 4":
        with pytest.raises(DataError, match=r"a\.ds, token 1 begins a document of .* --copy"):
            preprocess(paths, tokenizer, prefix)
        return
    preprocess(paths, tokenizer, prefix)
    shards = open_tokens(prefix)
    if kind in ("npy int64", "npy big-endian"):
        assert "the tokens are copied: " in caplog.text
        assert prefix.with_suffix(".bin").is_file()
    else:
        assert not list(prefix.parent.rglob("*.bin"))
    expected = ended(documents)
    if kind.endswith("first"):
        # The bytes stay as they are: the end stands before each document, and none after the last.
        expected = [EOD, *expected[:-1]]
        expected += [EOD] if kind.startswith("lit") else []
    assert shards.read(0, shards.num_tokens).tolist() == expected
    assert shards.fingerprint() == shards.fingerprint()
    shards.verify()
    assert [path.read_bytes() for path in paths] == before
    if len(paths) == 1:
        known = [[*ids, EOD] for ids in documents if ids]
        found = np.split(shards.read(0, shards.num_tokens), shards.document_lengths.cumsum()[:-1])
        if not kind.endswith("first"):
            assert [ids.tolist() for ids in found] == known
    assert caplog.text.count(f"{paths[0]}: ") >= 1
    # Again, it is the same.
    preprocess(paths, tokenizer, prefix)
    assert "reusing" in caplog.text


def test_what_fills_the_last_chunk_is_cut_off(tokenizer, tmp_path):
    handle = load_tokenizer(tokenizer)
    stream = ended(ids_of(tokenizer, ["one", "two", "three four"]))
    *_, last = write_lit(tmp_path, stream, chunk_tokens=len(stream) + 5, separator=EOD)
    assert open_token_file(last, handle).num_tokens == len(stream)
    # Full to the last token, there is nothing to cut off.
    *_, last = write_lit(tmp_path, stream, chunk_tokens=len(stream), separator=EOD)
    assert open_token_file(last, handle).num_tokens == len(stream)
    # A token of text is no separator, however often it comes.
    *_, last = write_lit(tmp_path, [*stream, 65, 65, 65], chunk_tokens=len(stream) + 3, separator=0)
    assert open_token_file(last, handle).num_tokens == len(stream) + 3
    # Nothing but fill.
    *_, last = write_lit(tmp_path, [EOD], chunk_tokens=200_000, separator=EOD)
    assert open_token_file(last, handle).num_tokens == 1


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c two", "lit-gpt", "datatrove", "npy int64"])
def test_tasks_of_an_array_give_the_bytes_of_one_job(
    kind, tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 200)
    paths = written(kind, tmp_path, ids_of(tokenizer))
    preprocess(paths, tokenizer, prefix, copy=True)
    for num_tasks in (3, 11):
        whole = tmp_path / f"array-{num_tasks}" / "p"
        for task in range(num_tasks):
            preprocess(paths, tokenizer, whole, task=(task, num_tasks), show=0)
        merge_parts(whole, copy=True)
        assert files(whole) == files(prefix)


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c two", "datatrove"])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_job_goes_on(kind, workers, tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 40)
    paths = written(kind, tmp_path, ids_of(tokenizer))
    preprocess(paths, tokenizer, tmp_path / "whole", copy=True, valid_fraction=0.3)
    original = token_sources_module._pack_tokens
    for number in range(1, 4):
        calls = iter(range(10**6))

        def failing(*arguments, number=number, calls=calls):
            if next(calls) > number:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(token_sources_module, "_pack_tokens", failing)
        options = {"copy": True, "valid_fraction": 0.3, "resume": True, "workers": workers}
        with pytest.raises(KeyboardInterrupt):
            preprocess(paths, tokenizer, prefix, **options)
    monkeypatch.setattr(token_sources_module, "_pack_tokens", original)
    preprocess(paths, tokenizer, prefix, **options)
    assert files(prefix) == files(tmp_path / "whole")
    assert files(f"{prefix}-valid") == files(tmp_path / "whole-valid")


def test_documents_are_held_out_by_a_hash_of_their_ids_or_of_their_text(
    tokenizer, prefix, tmp_path
):
    texts = [f"document {number}" for number in range(400)]
    documents = ids_of(tokenizer, [*texts, *texts[:50]])
    path = written("nanogpt", tmp_path, documents)[0]
    preprocess([path], tokenizer, prefix, valid_fraction=0.25)
    held_out, kept = documents_of(f"{prefix}-valid"), documents_of(prefix)
    assert abs(len(held_out) - 112) < 4 * (450 * 0.25 * 0.75) ** 0.5
    assert not {tuple(ids) for ids in held_out} & {tuple(ids) for ids in kept}
    assert sorted([*held_out, *kept]) == sorted([*ids, EOD] for ids in documents)
    by_text = tmp_path / "by-text" / "p"
    preprocess([path], tokenizer, by_text, valid_fraction=0.25, hold_out_by="text")
    expected = text_shards(
        preprocess, tmp_path, tokenizer, [*texts, *texts[:50]], valid_fraction=0.25
    )
    for side in ("", "-valid"):
        assert files(f"{by_text}{side}")[:2] == files(f"{expected}{side}")[:2]


def test_a_document_longer_than_many_chunks_is_one(tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 64)
    documents = [[65] * 1000, [66], [67] * 333]
    path = written("nanogpt", tmp_path, documents)[0]
    for name, copy in (("copied", True), ("referred", False)):
        preprocess([path], tokenizer, tmp_path / name, copy=copy)
        assert open_tokens(tmp_path / name).document_lengths.tolist() == [1001, 2, 334]


def test_files_of_documents_without_ends_are_taken_whole_if_told(tokenizer, prefix, tmp_path):
    first, second = tmp_path / "a.bin", tmp_path / "b.npy"
    write_nanogpt(first, [5, 6, 7, 8])
    np.save(second, np.array([[1, 2], [3, 4]], np.uint16))
    with pytest.raises(
        DataError, match=r"a\.bin holds no end-of-document id 0 .*--no-split-at-eod"
    ):
        preprocess([first], tokenizer, prefix)
    assert names(prefix) == []
    preprocess([first, second], tokenizer, prefix, split_at_eod=False)
    assert documents_of(prefix) == [[5, 6, 7, 8, 0], [1, 2, 0], [3, 4, 0]]


def test_a_stream_without_ends_is_noticed_before_it_fills_the_memory(
    tokenizer, prefix, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(token_sources_module, "MAX_TOKENS_WITHOUT_END", 500)
    path = write_nanogpt(tmp_path / "a.bin", [7] * 2000)
    with pytest.raises(DataError, match=r"no end-of-document id 0 .* within 512 tokens"):
        preprocess([path], tokenizer, prefix)


def test_an_id_outside_the_vocabulary_is_named_by_its_place(tokenizer, prefix, tmp_path):
    stream = ended(ids_of(tokenizer))
    stream[100] = 280
    path = write_llm_c(tmp_path / "a.bin", stream)
    said = (
        r"a\.bin, token \d+ holds the id 280 at place \d+ of \d+, and the tokenizer's are below 280"
    )
    for options in ({}, {"copy": True}, {"copy": True, "on_error": "skip"}):
        with pytest.raises(DataError, match=said):
            preprocess([path], tokenizer, prefix, **options)
    assert names(prefix) == []


def bad_files(folder):
    """Files that cannot be read, by what is said of them."""
    npy = folder / "bad.npy"

    def saved(array, **options):
        np.save(npy, array, **options)
        return npy

    def raw(content):
        npy.write_bytes(content)
        return npy

    objects = np.array([[1, 2], [3]], dtype=object)
    yield lambda: saved(objects, allow_pickle=True), r"bad\.npy holds Python objects, which may run"
    yield lambda: saved(np.array([0.5])), r"bad\.npy holds float64 and token ids are integers"
    yield lambda: saved(np.zeros((2, 2, 2), "u2")), r"bad\.npy is an array of 3 dimensions"
    yield (
        lambda: saved(np.zeros((2, 3), "u2").T),
        r"bad\.npy is an array of 2 dimensions in columns",
    )
    yield lambda: raw(b"\x93NUMPY\x01\x00\xff\xff{"), r"bad\.npy has a damaged header"
    yield lambda: raw(b"\x93NUMPY\x09\x00"), r"bad\.npy has a damaged header"
    yield lambda: raw(b"abc"), r"bad\.npy has no format that is known.*--dtype and --format"
    yield lambda: raw(np.array([60000] * 9, "<u2").tobytes()), r"has no format that is known"
    header = np.zeros(256, "<i4")
    header[:4] = 278895051, 2, 5, 3
    sized = header.tobytes()
    yield lambda: raw(sized), r"bad\.npy has a header of version 2 with 3 bytes per token"
    header[:4] = 20240520, 1, 5, 0
    yield lambda: raw(header.tobytes()), r"is truncated: it has 1024 bytes .* take 1034"
    yield lambda: raw(b"LITPKDS"), r"bad\.npy ends within its header"
    lit = b"LITPKDS" + (1).to_bytes(8, "little")
    yield lambda: raw(lit + b"\7" + (0).to_bytes(8, "little")), r"type code 7: version 1 and"
    yield (
        lambda: raw(lit + b"\4" + (9).to_bytes(8, "little") + b"\0" * 40),
        r"bad\.npy is too long|bad\.npy is truncated",
    )


@pytest.mark.parametrize("number", range(13))
def test_what_cannot_be_read_is_one_sentence(number, tokenizer, prefix, tmp_path):
    make, said = list(bad_files(tmp_path))[number]
    with pytest.raises(DataError, match=said) as caught:
        preprocess([make()], tokenizer, prefix)
    assert "\n" not in str(caught.value)
    assert names(prefix) == []


def test_an_index_of_datatrove_that_does_not_fit_is_refused(tokenizer, prefix, tmp_path):
    path = write_datatrove(tmp_path, [[1, 2, 0], [3, 0]])
    index = tmp_path / "a.ds.index"
    good = index.read_bytes()
    for content in (good[:-1], good + good[-8:-7] + b"\0" * 7, good[:8]):
        index.write_bytes(content)
        if content == good + good[-8:]:
            continue
        with pytest.raises(DataError, match=r"a\.ds has 10 bytes and .*a\.ds\.index counts"):
            preprocess([path], tokenizer, prefix)
    index.write_bytes(np.array([9, 5], "<u8").tobytes())
    with pytest.raises(DataError, match=r"a\.ds\.index is damaged: the ends of documents near 0"):
        preprocess([path], tokenizer, prefix)


def test_megatron_shards_are_left_as_they_are(tokenizer, prefix, tmp_path):
    preprocess([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tokenizer, prefix)
    with pytest.raises(DataError, match=r"p\.bin and .*p\.idx are Megatron shards.*data\.train"):
        preprocess([prefix.with_suffix(".bin")], tokenizer, tmp_path / "q")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "a.bin", "t.jsonl"], "a.bin is a file of tokens and t.jsonl is not: "),
        (["--input", "a.bin", "--ids-key", "x"], "--ids-key=x names a column and a.bin is a file"),
        (["--input", "a.bin", "--format", "npy"], "a.bin has the format raw and --format=npy was"),
        (
            ["--input", "b.npy", "--dtype", "uint16"],
            "--dtype=uint16 is for raw tokens and b.npy is",
        ),
        (["--input", "missing.bin"], "missing.bin is not a file: "),
        (["--input", "empty.bin"], "empty.bin holds no tokens: "),
        (["--input", "a.xyz"], "a.xyz has an unknown extension: use one of .jsonl, "),
        (["--input", "odd.bin", "--dtype", "uint16"], "odd.bin has 3 bytes, which are no whole"),
        (["--input", "a.bin", "--show", "-1"], "--show=-1 has to be at least 0: "),
        (["--input", "t.jsonl", "--split-at-eod"], "--split-at-eod is for tokens and the input is"),
        (
            ["--input", "t.jsonl", "--hold-out-by", "text"],
            "--hold-out-by is for tokens and the inp",
        ),
        (
            ["--input", "t.jsonl", "--dtype", "int32"],
            "--dtype is for files of tokens and the input",
        ),
        (["--input", "t.jsonl", "--ids-key", "x", "--copy"], "--copy is for files of tokens and"),
        (["--input", "t.txt", "--ids-key", "x"], "t.txt is text and --ids-key=x names a column of"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, said, tokenizer, tmp_path):
    write_nanogpt(tmp_path / "a.bin", [5, 6, 0])
    write_nanogpt(tmp_path / "a.xyz", [5, 6, 0])
    np.save(tmp_path / "b.npy", np.array([5, 6, 0]))
    (tmp_path / "empty.bin").touch()
    (tmp_path / "t.txt").write_text("a")
    (tmp_path / "odd.bin").write_bytes(b"123")
    write_jsonl(tmp_path / "t.jsonl", ["a"])
    command = ["preprocess_data.py", "--tokenizer", tokenizer, "--output-prefix", "p"]
    assert_one_error_line(run(*command, *arguments, cwd=tmp_path), said)


def test_the_command_says_what_it_found_and_shows_documents(tokenizer, tmp_path):
    write_nanogpt(tmp_path / "a.bin", ended(ids_of(tokenizer)))
    command = ["preprocess_data.py", "--tokenizer", tokenizer, "--output-prefix", "p"]
    result = run(*command, "--input", "a.bin", "--show", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1] == "a.bin: raw, 576 tokens of uint16"
    assert lines[2] == "the tokens stay where they are; --copy writes them anew"
    assert [line.split(":")[0] for line in lines if line.startswith("document ")] == [
        "document 0",
        "document 1",
    ]
    assert lines[-2].startswith("p: 48 documents, 576 tokens of uint16")
    told = run(*command, "--input", "a.bin", "--format", "raw", "--overwrite", cwd=tmp_path)
    assert told.returncode == 0, told.stderr


def test_the_commands_and_the_program_of_the_page_do_what_it_says(tokenizer, tmp_path):
    page = (REPOSITORY / "docs" / "data.md").read_text()
    section = re.search(r"## From tokens to shards\n(.*?)\n## ", page, re.DOTALL)[1]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (block,) = re.findall(r"^    (\.venv/bin/mdm .*?)\n\n", section, re.DOTALL | re.MULTILINE)
    of_rows, of_files, inspect = block.replace("\\\n", "").splitlines()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program_file = tmp_path / ".venv" / "bin" / "mdm"
    program_file.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"\n')
    program_file.chmod(0o755)

    def command(line):
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    documents = [ids for ids in ids_of(tokenizer) if ids]
    setup = f"dataset = [{{'tokens': ids}} for ids in {documents}]\n"
    subprocess.run([sys.executable, "-c", setup + program], cwd=tmp_path / "corpus", check=True)
    command(of_rows)
    assert open_tokens(tmp_path / "data" / "web").read(0, 576).tolist() == ended(documents)
    write_nanogpt(tmp_path / "corpus" / "train_0.bin", ended(documents)[:100])
    write_nanogpt(tmp_path / "corpus" / "train_1.bin", ended(documents)[100:])
    said = command(f"{of_files} --overwrite")
    assert "the tokens stay where they are" in said
    assert open_tokens(tmp_path / "data" / "web").read(0, 576).tolist() == ended(documents)
    assert re.findall(r"^document (\d)", command(inspect), re.MULTILINE) == ["0", "1", "2"]
