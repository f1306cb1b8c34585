from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mdm.data.manifest import Manifest, manifest_path, part_prefix
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.overlap import SharedContent, describe_shared_content, find_shared_content
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.subset import make_subset
from megatron_mdm.data.writer import ShardWriter


def write(prefix, first, count, documents=20):
    """Shards of tokens that stand nowhere else."""
    tokens = np.arange(first, first + count)
    with ShardWriter(prefix, np.int32) as writer:
        for document in np.array_split(tokens, documents):
            writer.add_document(document)
        writer.finish()
    Manifest(
        tokenizer="t",
        tokenizer_sha256="x",
        vocab_size=10**6,
        eod_token_id=0,
        special_tokens={},
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        max_token_id=first + count,
        dtype="int32",
        source_files=[],
    ).write(manifest_path(prefix))
    return open_tokens(prefix)


def counted(sources, used):
    """What is shared, by looking at every token."""
    held = [Counter(source.read(0, n).tolist()) for source, n in zip(sources, used, strict=True)]
    times = Counter()
    for token in set().union(*held):
        kind = tuple(tokens[token] for tokens in held)
        if sum(kind) > 1:
            times[kind] += 1
    return times


def found(sources, used):
    return {
        tuple(content.times.get(n, 0) for n in range(len(sources))): content.num_tokens
        for content in find_shared_content(sources, used)
    }


def test_the_same_shards_twice_and_a_copy_of_them_are_one_content(tmp_path):
    source = write(tmp_path / "a", 0, 1000)
    other = write(tmp_path / "b", 5000, 1000)
    for path in tmp_path.glob("a.*"):
        shutil.copy(path, tmp_path / path.name.replace("a", "copy", 1))
    copy = open_tokens(tmp_path / "copy")
    sources = [source, source, other, copy]
    (shared,) = find_shared_content(sources, [1000, 1000, 1000, 600])[:1]
    assert (shared.times, shared.num_tokens) == ({0: 1, 1: 1, 3: 1}, 600)
    assert found(sources, [1000, 1000, 1000, 600]) == {(1, 1, 0, 1): 600, (1, 1, 0, 0): 400}
    assert shared.epochs([1.0, 0.5, 9.0, 2.0]) == 3.5


def test_sources_of_their_own_share_nothing(tmp_path):
    sources = [write(tmp_path / name, 1000 * n, 900) for n, name in enumerate("abc")]
    assert find_shared_content(sources, [900, 900, 900]) == []


def test_a_view_that_names_a_part_twice_repeats_it(tmp_path):
    for task in range(2):
        prefix = part_prefix(tmp_path / "v", task, 2)
        prefix.parent.mkdir(exist_ok=True)
        write(prefix, 0, 500)
    assert found([merge_parts(tmp_path / "v")], [1000]) == {(2,): 500}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_shared_is_what_counting_every_token_finds(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "m.parts").mkdir()
    parts = [write(part_prefix(folder / "m", task, 2), 3000 * task, 700) for task in range(2)]
    whole = merge_parts(folder / "m")
    sources, used = [], []
    for number in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["part", "whole", "subset"]))
        source = {"part": parts[number % 2], "whole": whole}.get(kind)
        if source is None:
            size, seed = data.draw(st.integers(50, 1400)), data.draw(st.integers(0, 2))
            source = make_subset(whole.prefix, folder / f"s{number}", size, seed)
        sources.append(source)
        used.append(data.draw(st.integers(1, source.num_tokens)))
    assert found(sources, used) == counted(sources, used)


def test_what_is_shared_is_said_in_words():
    shared = [SharedContent({0: 1, 1: 1}, 1200), SharedContent({1: 2}, 30)]
    assert describe_shared_content(shared, ["a", "b"], [1.0, 0.5]) == [
        "1,200 tokens stand in a and b: the run sees each 1.5000 times",
        "30 tokens stand in b (2 times): the run sees each 1.0000 times",
    ]


@pytest.mark.parametrize("used", [1, 49, 50, 51, 1000])
def test_only_what_a_run_uses_counts(tmp_path, used):
    source = write(tmp_path / "a", 0, 1000)
    assert found([source, source], [1000, used]) == {(1, 1): used}
