"""Held-out loss on shards: against transformers' own, and the same tokens for both objectives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.perplexity import (
    Domain,
    choose_requests,
    judge_domain,
    open_domain,
    paired_difference,
    parse_domain,
)
from megatron_mdm.inference.requests import ScoringSettings
from megatron_mdm.inference.scoring import Scorer

SEQ = 16
# Shards without a manifest do not say which tokenizer made them.
UNUSED = Path("unused")


@pytest.fixture
def shards(tmp_path) -> Domain:
    with ShardWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 19, 20 * SEQ + 5))
        writer.finish()
    return Domain("noise", tmp_path / "tokens")


@pytest.fixture
def causal(export, tiny):
    return ExportedModel(export(tiny(is_causal=True), "causal")[0])


@pytest.fixture
def masked(export, tiny):
    return ExportedModel(export(tiny())[0])


def judge(model, domain):
    windows = open_domain(domain, model.facts, SEQ, UNUSED)
    requests = choose_requests(windows, 12, seed=0)
    return judge_domain(domain.name, requests, Scorer(model, ScoringSettings(draws=8)).score)


def test_of_an_autoregressive_export_it_is_the_loss_of_transformers(causal, shards):
    found = judge(causal, shards)
    windows = open_domain(shards, causal.facts, SEQ, UNUSED)
    requests = choose_requests(windows, 12, seed=0).requests
    losses = []
    for context, continuation, _ in requests:
        tokens = torch.tensor([[*context, *continuation]])
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], dim=1)
        with torch.no_grad():
            losses.append(float(causal._model(tokens, labels=labels).loss))
    assert found.losses_N == pytest.approx(losses, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    error = np.std(losses, ddof=1) / math.sqrt(12)
    assert found.estimate.standard_error == pytest.approx(error, rel=1e-3)
    low, high = found.perplexity_interval
    assert low < found.perplexity < high
    # Student's quantile of 11 degrees of freedom, from tables.
    assert math.log(high / low) == pytest.approx(2 * 2.200985 * error, rel=1e-3)


def test_both_objectives_are_judged_on_the_same_tokens(causal, masked, shards):
    chosen = [
        choose_requests(open_domain(shards, model.facts, SEQ, UNUSED), 12, seed=0).requests
        for model in (causal, masked)
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 12
    first, second = judge(causal, shards), judge(masked, shards)
    assert first.num_tokens == second.num_tokens == 12 * (SEQ - 1)
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(second.estimate.mean - first.estimate.mean)


def test_all_windows_at_most(masked, shards):
    windows = open_domain(shards, masked.facts, SEQ, UNUSED)
    requests, documents = choose_requests(windows, 1000, seed=1)
    assert len(documents) == len(set(requests)) == windows.num_windows == 20


@pytest.mark.parametrize("seq_length", [1, 33])
def test_windows_that_the_model_cannot_take_are_refused(masked, shards, seq_length):
    with pytest.raises(ConfigError, match=f"--seq-length={seq_length} does not fit"):
        open_domain(shards, masked.facts, seq_length, UNUSED)


def test_shards_of_too_many_tokens_are_refused(masked, tmp_path):
    with ShardWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_document(np.full(2 * SEQ, 500))
        writer.finish()
    windows = open_domain(Domain("other", tmp_path / "other"), masked.facts, SEQ, UNUSED)
    with pytest.raises(DataError, match="500"):
        choose_requests(windows, 1, seed=0)


@pytest.mark.parametrize("size", [15, 19, 20])
def test_shards_fit_up_to_the_vocabulary_of_the_model(masked, shards, tmp_path, size):
    folder = tmp_path / "tokenizer"
    save_tokenizer(train_byte_level_bpe(["a few words"], 260), folder)
    Manifest(
        tokenizer="tok",
        tokenizer_sha256=load_tokenizer(str(folder)).sha256,
        vocab_size=size,
        eod_token_id=0,
        special_tokens={},
        num_documents=1,
        num_tokens=20 * SEQ + 5,
        max_token_id=14,
        dtype="uint16",
        source_files=[],
    ).write(manifest_path(shards.prefix))
    if size <= 19:
        assert open_domain(shards, masked.facts, SEQ, folder).num_windows == 20
        return
    # The tool has no option for another vocabulary, and advises none.
    remedy = rf"run mdm prepare again with the tokenizer of {folder}\.$"
    with pytest.raises(DataError, match=rf"20 tokens, more than the 19 of {folder}: {remedy}"):
        open_domain(shards, masked.facts, SEQ, folder)


def test_names_of_domains():
    assert parse_domain("news=data/2023") == Domain("news", Path("data/2023"))
    assert parse_domain("data/2023") == Domain("2023", Path("data/2023"))
