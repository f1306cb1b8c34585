"""Quality of generated texts, against counts by hand and the loss of transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.repetition import distinct_n, token_entropy
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.studies.papers.text_quality import (
    Judge,
    TextLosses,
    judge_texts,
    nats_per_token,
    retokenize,
)


@pytest.fixture
def judge(export, tiny):
    return ExportedModel(export(tiny(is_causal=True), "causal")[0])


def losses(nats, tokens):
    return TextLosses(np.array(nats, dtype=np.float64), np.array(tokens))


def test_entropy_is_that_of_the_counts():
    assert token_entropy([7, 7, 7, 7]) == 0.0
    assert token_entropy([3, 1, 2, 4]) == pytest.approx(math.log(4))
    # Shares 1/2, 1/4, 1/4.
    assert token_entropy([5, 6, 5, 9]) == pytest.approx(1.5 * math.log(2))


def test_entropy_of_one_token_and_of_none():
    assert math.copysign(1, token_entropy([4])) == 1.0
    assert token_entropy([4]) == 0.0
    assert math.isnan(token_entropy([]))


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 6), (2, 3 / 4), (3, 2 / 2)])
def test_distinct_n_grams_are_counted_over_all_texts_but_not_across_them(n, expected):
    # Pairs: (1 2) (2 1) and (1 2) (2 3); across both there would be (1 1).
    assert distinct_n([[1, 2, 1], [1, 2, 3]], n) == pytest.approx(expected)


def test_distinct_n_of_texts_that_are_too_short():
    assert math.isnan(distinct_n([[1], []], 2))
    assert distinct_n([[1], [], [1, 2]], 2) == 1.0


def test_loss_is_all_nats_over_all_tokens():
    found = nats_per_token(losses([4.0, 3.0, 0.0], [1, 3, 0]))
    assert found.mean == pytest.approx(7 / 4)
    # Residuals 4 - 7/4, 3 - 21/4 and 0.
    assert found.standard_error == pytest.approx(math.sqrt(2 * 2.25**2 * 3 / 2) / 4)


def test_error_of_texts_of_one_length_is_that_of_a_mean():
    nats = np.random.default_rng(0).normal(20, 3, 50)
    found = nats_per_token(losses(nats, [10] * 50))
    assert found.mean == pytest.approx(np.mean(nats / 10))
    assert found.standard_error == pytest.approx(np.std(nats / 10, ddof=1) / math.sqrt(50))


def test_error_covers_the_loss_of_texts_of_many_lengths():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        tokens = generator.integers(1, 40, 100)
        # A text's own level makes its tokens depend on each other; 2 nats per token on average.
        nats = tokens * (2 + generator.normal(0, 0.3, 100)) + generator.normal(0, 1, 100)
        found = nats_per_token(TextLosses(nats, tokens))
        covered += abs(found.mean - 2) < 1.959964 * found.standard_error
    assert 0.93 < covered / 2000 < 0.965


def test_one_text_has_no_error_and_none_no_loss():
    assert math.isnan(nats_per_token(losses([2.0], [4])).standard_error)
    with pytest.raises(DataError, match="nothing to judge"):
        nats_per_token(losses([0.0, 0.0], [0, 0]))


def test_judged_loss_is_that_of_transformers(judge):
    generator = np.random.default_rng(2)
    sizes = [(1, 5), (4, 1), (3, 0), (6, 12)]
    texts = [
        Request(*(tuple(generator.integers(0, 19, size).tolist()) for size in pair))
        for pair in sizes
    ]
    found = judge_texts(texts, Scorer(judge, ScoringSettings()).score)
    expected = []
    for prompt, new, _ in texts:
        tokens = torch.tensor([[*prompt, *new]])
        # The loss of transformers: position i predicts label i, and -100 is not counted.
        labels = torch.tensor([[*[-100] * (len(prompt) - 1), *new, -100]])
        with torch.no_grad():
            expected.append(
                len(new) * float(judge._model(tokens, labels=labels).loss) if new else 0
            )
    assert found.nats_N == pytest.approx(expected, abs=1e-4)
    assert found.tokens_N.tolist() == [5, 1, 0, 12]


def test_only_a_causal_model_judges(judge, export, tiny):
    Judge(judge, judge.tokenizer, "--judge")
    masked = ExportedModel(export(tiny())[0])
    with pytest.raises(ConfigError, match=r"--judge: .* is a masked-diffusion model"):
        Judge(masked, judge.tokenizer, "--judge")


@pytest.fixture
def letters():
    """A tokenizer of single letters; 0 ends a text, 1 is a space, 2 is a."""
    vocabulary = {"<eos>": 0, " ": 1} | {letter: i for i, letter in enumerate("abcdw", 2)}
    vocabulary |= {f"{digit}": 10 + digit for digit in range(10)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_texts_are_encoded_anew_for_a_judge_with_another_tokenizer(judge, letters):
    writer = judge.tokenizer
    texts = [
        Request((2, 3), (4,)),
        # What special tokens stand for is no text.
        Request((0, 2), (0,)),
        Request((0,), (5,)),
    ]
    found = retokenize(letters, judge.facts, texts, writer)
    w, space = 6, 1
    assert found[0] == Request((w, 12, space, w, 13), (space, w, 14))
    assert found[1] == Request((), ())
    assert found[2] == Request((judge.facts.end_token_id,), (w, 15))


def test_what_the_judge_has_no_room_for_is_left_out(judge, letters):
    text = Request((2,), tuple([3] * 15))
    (found,) = retokenize(letters, judge.facts, [text], judge.tokenizer)
    assert len(found.context) + len(found.continuation) == judge.facts.max_length == 32
    long = Request(tuple([3] * 15), (2,))
    with pytest.raises(DataError, match="Prompt 0 has 44 tokens"):
        retokenize(letters, judge.facts, [long], judge.tokenizer)
