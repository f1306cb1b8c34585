"""Passes that requests share: they are made once, and nothing about a score tells of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.passes import Passes
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer

CONTEXTS = ((3, 4, 5, 6, 7, 8), (9, 10, 11, 12, 13, 14), (15, 16))


class CountingModel(ExportedModel):
    """Notes each batch that it judges."""

    def __init__(self, folder):
        super().__init__(folder)
        self.batches: list[Passes] = []

    def judge(self, passes):
        self.batches.append(passes)
        return super().judge(passes)

    def num_rows(self) -> int:
        return sum(
            len(batch.tokens_RS) + (0 if batch.guidance is None else len(batch.guidance.tokens_CS))
            for batch in self.batches
        )

    def num_tokens(self) -> int:
        return sum(int(batch.lengths_R.sum()) for batch in self.batches)


@pytest.fixture
def model(export, tiny):
    return CountingModel(export(tiny())[0])


@pytest.fixture
def causal(export, tiny):
    return CountingModel(export(tiny(is_causal=True, num_query_groups=2), "causal")[0])


def answers(*sizes: int) -> list[Request]:
    """To each context one answer of each length."""
    generator = np.random.default_rng(1)
    return [
        Request(context, tuple(generator.integers(2, 19, size).tolist()))
        for context in CONTEXTS
        for size in sizes
    ]


@pytest.mark.parametrize("max_tokens", [1, 40, None])
def test_answers_to_one_context_are_scored_as_if_each_stood_alone(causal, max_tokens):
    requests = answers(1, 4, 2, 7, 4)
    settings = ScoringSettings(max_tokens=max_tokens)
    scores = Scorer(causal, settings).score(requests)
    for (context, continuation, _), score in zip(requests, scores, strict=True):
        with torch.no_grad():
            logits = causal._model(torch.tensor([[*context, *continuation]])).logits[0]
        log_probs = logits[len(context) - 1 : -1].double().log_softmax(-1)
        targets = torch.tensor(continuation)
        by_hand = float(log_probs.gather(1, targets[:, None]).sum())
        assert score.log_likelihood == pytest.approx(by_hand, abs=1e-4)
        assert score.is_greedy == bool((log_probs.argmax(-1) == targets).all())
    backwards = Scorer(causal, settings).score(requests[::-1])[::-1]
    assert [one.log_likelihood for one in backwards] == pytest.approx(
        [one.log_likelihood for one in scores], abs=1e-5
    )


def test_a_context_is_computed_once_for_all_its_answers(causal):
    requests = [one for one in answers(1, 4, 2, 7) if len(one.context) > 2]
    Scorer(causal, ScoringSettings()).score(requests)
    # Nothing is predicted at the last token of an answer.
    assert causal.num_tokens() == 2 * (6 + 0 + 3 + 1 + 6)
    assert any(batch.branches is not None for batch in causal.batches)


def test_rows_of_one_text_need_no_mask(causal):
    Scorer(causal, ScoringSettings()).score(answers(3))
    assert all(batch.branches is None for batch in causal.batches)


def test_random_masks_that_repeat_themselves_are_run_once(model):
    settings = ScoringSettings("monte_carlo", draws=64, seed=2)
    (score,) = Scorer(model, settings).score([Request((3, 4), (5, 6))])
    # Both tokens, either one; with none hidden there is nothing to ask.
    assert model.num_rows() == 3
    assert score.num_passes == 64


@pytest.mark.parametrize(
    ("scale", "rows"),
    # Hidden answers of one length are the same; without their context those of two contexts are.
    [(0.0, 3 * (1 + 2)), (0.7, 3 * (1 + 2) + 2 * 1 + 3 * 2)],
    ids=["no guidance", "guided"],
)
def test_hidden_answers_of_one_length_share_their_pass(model, scale, rows):
    requests = answers(2, 2)
    settings = ScoringSettings("chain_rule", guidance_scale=scale)
    shared = Scorer(model, settings).score(requests)
    assert model.num_rows() == rows
    alone = [Scorer(model, settings).score([one])[0] for one in requests]
    for one, other in zip(shared, alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
        assert one.num_passes == other.num_passes


def test_without_its_context_a_text_still_knows_what_is_asked(model):
    # All masks, as many of them, but asked about different tokens.
    requests = [Request((3, 4), (5, 6, 7)), Request((3, 4, 5), (6, 7))]
    settings = ScoringSettings("chain_rule", guidance_scale=1.5)
    together = Scorer(model, settings).score(requests)
    for one, request in zip(together, requests, strict=True):
        (alone,) = Scorer(model, settings).score([request])
        # Float32 sums of another batch size; guidance adds two of them up with weights above 1.
        assert one.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)


def test_only_batches_that_would_be_almost_empty_are_padded(model):
    requests = [Request(tuple(range(2, 14)), (5,) * size) for size in (3, 4)]
    Scorer(model, ScoringSettings("chain_rule")).score(requests)
    assert not model.batches[0].is_real_RS.all()
    model.batches.clear()
    Scorer(model, ScoringSettings("chain_rule", max_tokens=128)).score(requests)
    assert len(model.batches) == 2
    assert all(batch.is_real_RS.all() for batch in model.batches)
