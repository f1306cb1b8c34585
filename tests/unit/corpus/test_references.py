from __future__ import annotations

import numpy as np
import pytest
from preprocess_helpers import names, preprocess, run
from token_examples import ended, ids_of, written

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus import sources as sources_module
from megatron_mdm.corpus import token_sources as token_sources_module
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.store import open_tokens


def test_a_reference_is_read_by_all_that_reads_shards(tokenizer, prefix, tmp_path):
    path = written("llm.c", tmp_path, ids_of(tokenizer))[0]
    preprocess([path], tokenizer, prefix)
    shards = open_tokens(prefix)
    assert np.fromfile(path, "<u2")[512:].tolist() == shards.read(0, shards.num_tokens).tolist()
    result = run("inspect_data.py", prefix, "--show", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "integrity   OK" in result.stdout
    assert "def f():" in result.stdout
    command = ["subset_data.py", "--input", prefix, "--tokens", "100", "--output-prefix", prefix]
    assert run(*command, cwd=tmp_path).returncode == 0
    assert open_tokens(f"{prefix}-100").num_tokens == 100
    assert run(*command, "--copy", "--overwrite", cwd=tmp_path).returncode == 0
    assert open_tokens(f"{prefix}-100").num_tokens == 100


def test_parts_that_are_references_are_copied_by_a_merge(tokenizer, prefix, tmp_path):
    paths = written("llm.c two", tmp_path, ids_of(tokenizer))
    preprocess(paths, tokenizer, prefix)
    view = open_tokens(prefix)
    assert (view.num_tokens, len(view.parts)) == (len(ended(ids_of(tokenizer))), 2)
    copy = merge_parts(prefix, copy=True, overwrite=True)
    assert copy.read(0, copy.num_tokens).tolist() == ended(ids_of(tokenizer))


@pytest.mark.parametrize("damage", ["longer", "changed", "missing", "both"])
def test_a_file_that_has_changed_since_is_refused(damage, tokenizer, prefix, tmp_path):
    path = written("nanogpt", tmp_path, ids_of(tokenizer))[0]
    preprocess([path], tokenizer, prefix)
    content = path.read_bytes()
    if damage == "longer":
        path.write_bytes(content + b"\0\0")
    elif damage == "changed":
        path.write_bytes(b"\1" + content[1:])
    elif damage == "missing":
        path.unlink()
    else:
        prefix.with_suffix(".bin").write_bytes(content)
    said = {"missing": "does not exist", "both": "is not clear which"}.get(damage, "has changed")
    with pytest.raises(DataError, match=said):
        open_tokens(prefix)


def test_a_reference_follows_when_both_are_moved(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    path = written("nanogpt", tmp_path / "a", ids_of(tokenizer))[0]
    preprocess([path], tokenizer, tmp_path / "a" / "shards" / "p")
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_tokens(tmp_path / "b" / "shards" / "p").num_tokens


def test_a_copy_replaces_a_reference_and_the_other_way_round(tokenizer, prefix, tmp_path):
    path = written("nanogpt", tmp_path, ids_of(tokenizer))[0]
    preprocess([path], tokenizer, prefix)
    with pytest.raises(DataError, match=r"exists without the files that belong to it.*--overwrite"):
        preprocess([path], tokenizer, prefix, copy=True)
    preprocess([path], tokenizer, prefix, copy=True, overwrite=True)
    assert names(prefix) == ["p.bin", "p.idx", "p.json"]
    preprocess([path], tokenizer, prefix, overwrite=True)
    assert names(prefix) == ["p.bin.json", "p.idx", "p.json"]


def test_an_index_goes_on_where_it_was(tokenizer, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 40)
    paths = written("nanogpt", tmp_path, ids_of(tokenizer))
    preprocess(paths, tokenizer, tmp_path / "whole")
    original, calls = token_sources_module._pack_tokens, iter(range(10**6))

    def failing(*arguments):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(token_sources_module, "_pack_tokens", failing)
    with pytest.raises(KeyboardInterrupt):
        preprocess(paths, tokenizer, prefix)
    monkeypatch.setattr(token_sources_module, "_pack_tokens", original)
    assert names(prefix) == ["p.partial"]
    with pytest.raises(DataError, match=r"holds an unfinished job: go on with --resume"):
        preprocess(paths, tokenizer, prefix)
    preprocess(paths, tokenizer, prefix, resume=True)
    assert names(prefix) == ["p.bin.json", "p.idx", "p.json"]
    index = (tmp_path / "whole.idx").read_bytes()
    assert prefix.with_suffix(".idx").read_bytes() == index
