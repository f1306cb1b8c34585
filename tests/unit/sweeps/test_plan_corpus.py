"""Plans for a corpus that is there: its vocabulary, its size, and a run that starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mdm.config import load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.studies.sweeps.plan_command import PlanSettings, plan_run
from megatron_mdm.studies.sweeps.planned_run import find_corpus
from megatron_mdm.training.description import describe

VOCAB, TOKENS = 300, 9000


def write_shards(prefix: Path, num_tokens: int = TOKENS) -> Path:
    tokens = np.arange(num_tokens) % VOCAB
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add_document(tokens)
        writer.finish()
    Manifest(
        tokenizer="tok",
        tokenizer_sha256="ab" * 32,
        vocab_size=VOCAB,
        eod_token_id=0,
        special_tokens={},
        num_documents=1,
        num_tokens=num_tokens,
        max_token_id=VOCAB - 1,
        dtype="uint16",
        source_files=[],
    ).write(manifest_path(prefix))
    return prefix


def planned(folder: Path, train: Path | None, **options):
    settings = {
        "unique_tokens": 8192.0,
        "flops": 1e15,
        "gpus": 1,
        "out": folder / "plan.yaml",
        "train": None if train is None else str(train),
    }
    return plan_run(PlanSettings(**(settings | options)))


@pytest.mark.parametrize("held_out", ["kjv-valid", None])
def test_a_plan_for_a_small_corpus_starts(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    train = write_shards(tmp_path / "kjv")
    if held_out is not None:
        write_shards(tmp_path / held_out, 4500)
    plan, _ = planned(tmp_path, train)
    config = load_config(tmp_path / "plan.yaml", ["run.device=cpu"])
    assert (config.model.vocab_size, plan.budget.vocab_size) == (VOCAB, VOCAB)
    # 3 layers of 4 x 128^2 + 3 x 128 x 320 + 6 x 128, and the 300 rows of its own embedding.
    smallest = plan.budget.sizes["dc-7M"]
    assert smallest.with_embeddings == 3 * (65_536 + 122_880 + 768) + 300 * 128
    assert [Path(one.path).name for one in config.data.valid] == ([held_out] if held_out else [])
    # What --dry-run prints; it was refused before with vocab_size=50257.
    assert "flops_parameters: with_embeddings" in describe(config)
    said = any("No held-out shards" in warning for warning in plan.warnings)
    assert said == (held_out is None)


def test_more_tokens_than_the_corpus_has_are_refused(tmp_path):
    train = write_shards(tmp_path / "kjv")
    with pytest.raises(ConfigError, match=r"--unique-tokens=9001 is more than the 9,000 tokens of"):
        planned(tmp_path, train, unique_tokens=9001.0)


def test_shards_that_are_still_to_be_made_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = find_corpus(str(tmp_path / "later"), None)
    assert (corpus.vocab_size, corpus.num_tokens) == (None, None)
    assert "no shards" in corpus.warnings[0]
    # Nobody named the usual place.
    assert find_corpus(None, None) == ("data/train", "data/valid", None, None, None, ())
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        write_shards(tmp_path / "data" / name)
    found = find_corpus(None, None)
    assert (found.valid_prefix, found.vocab_size) == ("data/valid", VOCAB)
